"""A chat with two copies of a model, one unedited and one edited, and the projections of the tokens on the
direction."""

import dataclasses
from collections.abc import Generator, Sequence

import numpy as np
from jaxtyping import Float

from refusal_jax.chat.conditional import Conditional
from refusal_jax.chat.messages import NONE
from refusal_jax.chat.model import ChatModel
from refusal_jax.chat.padding import TokenBatch
from refusal_jax.chat.projection_monitor import disagreement
from refusal_jax.chat.prompts import Chat
from refusal_jax.conditions import Ablate, Add, Affine, Baseline
from refusal_jax.directions import Direction
from refusal_jax.edits import Edits
from refusal_jax.errors import UserError, setting
from refusal_jax.judges.judge import Outcome
from refusal_jax.judges.rules import RuleJudge
from refusal_jax.terminal.screen import Piece, escaped

HELP = """Type a message, and both models reply to it, each in its own conversation. Commands:
  /ablate [PART]   take the direction out at every layer and token (PART 1 unless given)
  /add [SCALE]     add the direction at its layer, SCALE times (1 unless given; -1 subtracts it)
  /affine [PART]   give every token the direction's coordinate of harmless prompts at its layer (0 unless given), or of harmful
                   ones (1)
  /steer           add the vector of the conditional steering where the prompt meets its condition
  /off             no edit: both columns are the model as it is
  /layer N         read the projections, and add, at the input of layer N
  /numbers         show each token's projection as a number too, or no longer
  /system [TEXT]   begin a new conversation under a system prompt (the template's unless given; none: without one)
  /reset           forget the conversation
  /help            this text
  /quit            leave (as do Ctrl-D and the end of a file); Ctrl-C stops a reply
Colours: red tokens lie along the direction, blue ones against it; full colour is 0.6 of the direction's length or more."""
STEER = "steer"
EDITS = {"off": 1.0, Ablate.verb: 1.0, Add.verb: 1.0, Affine.verb: 0.0}  # with their scales unless given


@dataclasses.dataclass
class Texts:
    """The texts of a growing reply's tokens: a character that several tokens spell belongs to the last of them."""

    chat: Chat
    texts: list[str] = dataclasses.field(default_factory=list)
    shown: str = ""

    def grown(self, ids: Sequence[int], done: bool) -> list[str]:
        """Returns one text for each token; done: whether no more tokens will come."""
        for end in range(len(self.texts) + 1, len(ids) + 1):
            text = self.chat.tokenizer.decode(ids[:end], skip_special_tokens=True)
            whole = not text.endswith("\ufffd") or (done and end == len(ids))
            self.texts.append(text[len(self.shown) :] if whole else "")
            self.shown = text if whole else self.shown
        return self.texts


@dataclasses.dataclass(frozen=True)
class Turn:
    """Both replies so far. pieces: of each column; done: whether each is complete; prompt: projections of the prompts' last
    tokens, and along: those of the replies' tokens, in the residual stream's own units. warnings: of complete replies, where the
    projection says something else than the reply does; None where it does not, or where that is not known."""

    pieces: list[list[Piece]]
    done: list[bool]
    prompt: list[float]
    along: list[list[float]]
    warnings: list[str | None]


class Session:
    """The model, the direction, the edit of the second column, and both conversations."""

    def __init__(
        self,
        model: ChatModel,
        direction: Direction,
        max_new_tokens: int,
        numbers: bool = False,
        history: bool = True,
        thresholds: Float[np.ndarray, " L"] | None = None,
        conditional: Conditional | None = None,
    ):
        """Starts a chat. history: whether a message continues the conversation. thresholds: of each layer, the projection at the
        prompt's end from which on the model is taken to be about to refuse, if it is known. conditional: a conditional steering,
        with which the chat then begins. Raises UserError for a direction of
        another model or without a layer."""
        direction.check_width(model.config.d_model)
        if direction.layer is None:
            raise UserError(
                f"The file does not tell at which layer its direction was read. Give {setting('layer')}, counted from 0, "
                "or the folder of a study."
            )
        self.model, self.direction, self.raw_d = model, direction, direction.raw_d
        self.max_new_tokens, self.numbers, self.history = max_new_tokens, numbers, history
        self.thresholds, self.judge = thresholds, RuleJudge()
        self.layer = self._layer(direction.layer)
        self.conditional = conditional
        self.edit, self.scale = STEER if conditional is not None else Ablate.verb, 1.0
        self.reset()

    def reset(self) -> None:
        self.conversations: list[list[dict[str, str]]] = [[], []]

    @property
    def titles(self) -> list[str]:
        """Returns the titles of the columns."""
        scale = "" if self.scale == 1 else f" × {self.scale:g}"
        edits = {
            "off": "no edit",
            Ablate.verb: f"{Ablate.name}{scale}",
            Add.verb: f"addition{scale} at layer {self.layer}",
            Affine.verb: f"{Affine.name}, to {self.scale:g} at layer {self.direction.layer}",
            STEER: "conditional steering",
        }
        return [Baseline.name, edits[self.edit]]

    def edits(self, batch: TokenBatch | None = None) -> Edits:
        """Returns a row for each column. batch: their prompts, which a conditional steering needs."""
        if self.edit == STEER and batch is not None:
            steered = self.model.rows_of(batch.tokens[1:], batch.mask[1:], self.conditional)
            return Edits.concat([Edits.none(self.model.config.d_model), steered])
        edited = {
            "off": Baseline(),
            Ablate.verb: Ablate(self.direction, scale=self.scale),
            Add.verb: Add(self.direction, [self.layer], self.scale),
            Affine.verb: Affine(self.direction, self.scale),
        }
        return Edits.concat([one.edits(self.model.config) for one in (Baseline(), edited[self.edit])])

    def command(self, line: str) -> str:
        """Runs a command line that begins with "/" and returns what to show for it. Raises UserError for an unknown
        command."""
        name, _, argument = line[1:].strip().partition(" ")
        if name == STEER and not argument:
            if self.conditional is None:
                raise UserError(f"There is no conditional steering. Start the chat with {setting('steer', 'FOLDER')}.")
            self.edit, self.scale = STEER, 1.0
        elif name in EDITS and not (name == "off" and argument):
            scale = self._number(name, argument) if argument else EDITS[name]
            if name == Affine.verb:
                Affine(self.direction, scale).edits(self.model.config)  # it may lack what that needs
            self.edit, self.scale = name, scale
        elif name == "layer" and argument:
            self.layer = self._layer(self._number(name, argument))
        elif name == "numbers" and not argument:
            self.numbers = not self.numbers
            return f"Numbers are {'shown' if self.numbers else 'not shown'}."
        elif name == "system":
            self.model = dataclasses.replace(self.model, chat=self.model.chat.under(argument))
            self.reset()
            under = {"": "the template's system prompt", NONE: "no system prompt"}.get(argument, "this system prompt")
            return f"A new conversation begins, under {under}."
        elif name == "reset" and not argument:
            self.reset()
            return "The conversation is forgotten."
        elif name == "help":
            return HELP
        else:
            raise UserError(f"{escaped(line)} is not a command; /help lists them.")
        return f"{self.titles[0]} and {self.titles[1]}; projections at the input of layer {self.layer}."

    @staticmethod
    def _number(name: str, argument: str) -> float:
        try:
            value = float(argument)
        except ValueError:
            value = np.nan
        if not np.isfinite(value):
            raise UserError(f"/{name} takes a number, not {escaped(argument)!r}.")
        return value

    def _layer(self, layer: float) -> int:
        if layer != int(layer) or not 0 <= layer < self.model.config.n_layers:
            raise UserError(
                f"There is no layer {layer:g}: the model's layers are 0 to {self.model.config.n_layers - 1}."
            )
        return int(layer)

    def say(self, text: str) -> Generator[Turn, None, None]:
        """Yields both replies to a message as they grow. However that ends, the text so far enters the conversations.

        Raises UserError if a conversation no longer fits the model's context.
        """
        chat, growth = self.model.chat, None
        talks = [[*talk, {"role": "user", "content": text}] for talk in self.conversations]
        rows = [chat.ids(chat.render_messages(talk)) for talk in talks]
        longest = max(map(len, rows))
        room = chat.context_length - longest
        if room < 1:
            raise UserError(
                f"The conversation has {longest} tokens and the model's context is {chat.context_length}. /reset "
                "begins a new one."
            )
        batch = chat.pad(rows, 1 << max((longest - 1).bit_length(), 6))  # few widths: each compiles programs
        texts = [Texts(chat), Texts(chat)]
        growing = self.model.stream(batch, min(self.max_new_tokens, room), self.edits(batch), probe=self.raw_d)
        try:
            for growth in growing:
                yield self._turn(growth, texts)
        finally:
            if growth is not None and self.history:
                replies = [chat.replies([ids])[0].text for ids in growth.ids]
                self.conversations = [
                    [*talk, {"role": "assistant", "content": reply}] for talk, reply in zip(talks, replies, strict=True)
                ]

    def _turn(self, growth, texts: Sequence[Texts]) -> Turn:
        unit, pieces, along = self.direction.norm, [], []
        for row, (ids, active) in enumerate(zip(growth.ids, growth.active, strict=True)):
            values = growth.along[row, self.layer, 1 : 1 + len(ids)]
            values = [None if np.isnan(value) else float(value) for value in values]
            along.append([value for value in values if value is not None])
            parts = []
            for token, value in zip(texts[row].grown(ids, not active), values, strict=True):
                number = f"[{value:+z.1f}]" if self.numbers and value is not None and token else ""
                parts.append(Piece(escaped(token) + number, None if value is None else float(value / unit)))
            pieces.append(parts)
        prompt, done = growth.along[:, self.layer, 0].tolist(), (~growth.active).tolist()
        warnings = [
            self._warning(row, prompt[row], texts[row].shown) if done[row] else None for row in range(len(texts))
        ]
        return Turn(pieces, done, prompt, along, warnings)

    def _warning(self, row: int, prompt: float, reply: str) -> str | None:
        """Returns where the projection at the prompt's end and the reply disagree; an ablation leaves nothing to read, and an
        affine edit the same for all prompts."""
        if self.thresholds is None or (row and self.edit in (Ablate.verb, Affine.verb)):
            return None
        (verdict,) = self.judge.judge([{"prompt": "", "response": reply}])
        if verdict is None or verdict.outcome not in (Outcome.REFUSES, Outcome.COMPLIES):
            return None
        return disagreement(prompt, float(self.thresholds[self.layer]), verdict.outcome == Outcome.REFUSES)
