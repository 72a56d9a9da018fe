"""A chat model with edits for evaluation harnesses: it is made from their plain arguments and gives greedy replies with
stop strings."""

import dataclasses
import functools
import inspect
import logging
import pathlib
from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from refusal_jax.chat.conditional import Conditional, written_for
from refusal_jax.chat.messages import SYSTEM_ROLES
from refusal_jax.chat.model import ChatModel, demo_model_path, load_model
from refusal_jax.chat.padding import bucket
from refusal_jax.chat.thoughts import is_marked
from refusal_jax.checkpoints.fingerprint import checkpoint_fingerprint
from refusal_jax.checkpoints.remote import checkpoint_folder
from refusal_jax.conditions import Ablate, Add, Baseline
from refusal_jax.directions import Direction, direction_file, read_each
from refusal_jax.edits import Edits
from refusal_jax.errors import UserError, did_you_mean, setting
from refusal_jax.export.finished import FinishedStudy
from refusal_jax.files import local_path
from refusal_jax.models.config import ModelConfig
from refusal_jax.models.hf_config import load_config
from refusal_jax.models.sharding import MESH_AXES, make_mesh, parse_mesh

LOG = logging.getLogger(__name__)


@functools.cache
def warn_once(message: str) -> None:
    """Logs a warning the first time that a process has it."""
    LOG.warning(message)


@dataclasses.dataclass(frozen=True)
class Reply:
    """A reply's text, up to any stop string; how many tokens were generated for it; and whether it ended, rather than being
    cut. thinking: whether the end of a thought was asked for and did not come. marked: whether marks of a thought are in it."""

    text: str
    tokens: int
    ended: bool
    thinking: bool
    marked: bool


@dataclasses.dataclass(frozen=True)
class EditedModel:
    """model; edits: one row, which applies to all that is asked of it, or a conditional steering, which decides by the prompt;
    about: what they are, in plain values."""

    model: ChatModel
    edits: Edits | Conditional
    about: dict

    @classmethod
    def load(cls, arguments: dict) -> "EditedModel":
        """Returns the model for the arguments that `read_arguments` explains, by name. data, fsdp and model, in which a mesh was
        written formerly, are understood too. Raises UserError for unknown arguments."""
        arguments = {name.replace("-", "_"): value for name, value in arguments.items()}
        sides = [arguments.pop(axis, None) for axis in MESH_AXES]
        if any(side is not None for side in sides):
            arguments.setdefault("mesh", "x".join(str(side or 1) for side in sides))
        unknown = sorted(set(arguments) - set(ARGUMENTS))
        if unknown:
            raise UserError(
                f"unknown model argument {', '.join(unknown)}: the arguments are {', '.join(ARGUMENTS)}."
                f"{did_you_mean(unknown[0], ARGUMENTS)}"
            )
        return read_arguments(**arguments)

    def replies(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        stops: Sequence[Sequence[str]],
        rows: int,
        bar=None,
        thought_end: str | int | None = None,
        show_marks: bool = False,
    ) -> list[Reply]:
        """Returns greedy replies to prompts of token ids, each with its own stop strings.

        Prompts of like length share programs. bar: the progress to move, if any. thought_end, show_marks: as for `cut`; before
        the end of a thought, stop strings end nothing. Raises UserError for a prompt that does not fit the context with its
        reply.
        """
        replies: dict[int, Reply] = {}
        for index, length in like_lengths(prompts):
            batch = self.model.chat.pad([prompts[i] for i in index], length)

            def over(number: int, ids: list[int], index: Sequence[int] = index) -> bool:
                reply = self.cut(ids, stops[index[number]], thought_end, show_marks)
                return reply.ended and not reply.thinking

            found = self.model.reply_ids(
                batch, max_new_tokens, self.edits, rows=rows, over=over if any(stops) else None
            )
            for numbers, ids in found:
                for number, row in zip(numbers, ids.tolist(), strict=True):
                    replies[index[number]] = self.cut(row, stops[index[number]], thought_end, show_marks)
                if bar is not None:
                    bar.update(len(numbers))
        return [replies[i] for i in range(len(prompts))]

    def decided(self, prompts: Sequence[Sequence[int]], length: int, rows: int) -> Edits:
        """Returns the edits of prompts of token ids, a row for each, with the last one repeated up to `rows` rows. length: what
        prompts are padded to. Raises UserError for a conditional steering of another model."""
        batch = self.model.chat.pad(prompts, length).padded_to(rows)
        return self.model.rows_of(batch.tokens, batch.mask, self.edits)

    def rendered(self, messages: Sequence[dict[str, str]]) -> str:
        """Returns the text of a conversation up to the start of the next reply. A system message of its own takes the place of
        the system prompt. Raises UserError as `Chat.render_messages` does."""
        if self.model.chat.told and messages and messages[0]["role"] in SYSTEM_ROLES:
            warn_once("The harness's own system messages take the place of the system prompt that the model was given.")
        return self.model.chat.render_messages(messages)

    def cut(
        self, row: Sequence[int], stops: Sequence[str], thought_end: str | int | None = None, show_marks: bool = False
    ) -> Reply:
        """Returns the reply of generated ids, which ends at an end token or before the first of the stop strings.

        thought_end: a token's id, or a text, after whose last appearance the reply begins; None if thoughts stay in it.
        show_marks: whether the text has the marks of thoughts, where they are special tokens too.
        """
        chat = self.model.chat
        added = chat.tokenizer.get_added_vocab()
        marks = {added[stop] for stop in stops if stop in added}  # which the text does not show
        ids, mark = chat.before_end(row), added.get(thought_end) if isinstance(thought_end, str) else thought_end
        start = max((i + 1 for i, token in enumerate(ids) if token == mark), default=0)
        stop = next((i for i in range(start, len(ids)) if ids[i] in marks), len(ids))
        shown, thinking = ids[start:stop], thought_end is not None and not start
        text = chat.decode_with_marks(shown) if show_marks else chat.tokenizer.decode(shown, skip_special_tokens=True)
        if isinstance(thought_end, str):
            thinking, text = thinking and thought_end not in text, text.split(thought_end)[-1]
        if thought_end is not None:
            text = text.lstrip()
        end = min((at for stop in stops if stop and (at := text.find(stop)) >= 0), default=None)
        marked = is_marked(text[:end]) or not chat.mark_tokens.keys().isdisjoint(ids[start:stop])
        return Reply(text[:end], stop, end is not None or stop < len(row), thinking, marked)


def template_names(given: Mapping | None) -> dict:
    """Returns further names for the chat template. Raises UserError for anything but a mapping."""
    if isinstance(given or {}, Mapping):
        return dict(given or {})
    raise UserError(
        f"chat_template_args = {given!r} is not a mapping of names to values. Give one, such as "
        '{"enable_thinking": false}: on a command line, in a file or JSON object of all model arguments.'
    )


def read_arguments(
    pretrained: str = "",
    ablate: str = "",
    add: str = "",
    scale: float = 1.0,
    layer: int | None = None,
    position: int | None = None,
    subspace: bool = False,
    dtype: str = "auto",
    mesh: str = "",
    chat_template: str = "",
    thinking: bool | None = None,
    cache: str = "",
    generation_from_checkpoint: bool = False,
    enable_thinking: bool | None = None,
    chat_template_args: Mapping | None = None,
    system_prompt: str = "",
    steer: str = "",
) -> EditedModel:
    """Returns a model with edits, from what can be written on a command line.

    pretrained: folder of an HF checkpoint; default, the model of the study that the edit comes from, and with no edit the
    embedded one. ablate, add: folder of a study or file of a direction, to take out or to add. scale: how much to add, or
    with `ablate` alone which part to take out. layer: where to add, default the direction's own; with position, which one of
    a file of mean differences, and alone which row of a file with one for each layer. subspace: whether `ablate` alone takes
    out the span of all rows of a file, also where there are as many as layers. mesh: devices along the axes data, fsdp and
    model, such as 1x1x8; default, one device. generation_from_checkpoint: as in `load_model`. enable_thinking: another name
    of thinking. chat_template_args: more names for the chat template, which win over thinking. system_prompt: for
    conversations without a system message of their own. steer: folder of a conditional steering, in place of ablate and add. The
    others: as in a study's
    config. A leading ~ of paths is expanded. Raises UserError for directions or settings that cannot be used.
    """
    thinking = asked_thinking(thinking, enable_thinking)
    steering = read_steering(steer, ablate, add, scale)
    names = template_names(chat_template_args)
    shape = parse_mesh(str(mesh)) if mesh else (1, 1, 1)
    paths = [local_path(str(path)) for path in (ablate, add) if path]
    studies = [FinishedStudy.read(path, 1) for path in paths if path.is_dir() and not pretrained]
    told = studies[0].template if studies else {}
    if pretrained:
        folder = checkpoint_folder(str(pretrained))
    else:
        folder = model_of(paths, studies) if steering is None else written_for(steering)
    ablated, added = named_directions((ablate, add), layer, position, load_config(folder).n_layers, subspace)
    loaded = load_model(
        folder,
        dtype,
        make_mesh(*shape) if shape != (1, 1, 1) else None,
        progress=True,
        chat_template=chat_template or told.get("chat_template", ""),
        thinking=told.get("thinking", False) if thinking is None else thinking,
        cache=cache,
        generation_from_checkpoint=generation_from_checkpoint,
        system_prompt=system_prompt or told.get("system_prompt", ""),
    )
    loaded = dataclasses.replace(loaded, chat=dataclasses.replace(loaded.chat, template_arguments=names))
    if steering is not None:
        steering.check_fits(loaded.config.d_model, loaded.config.n_layers)
        return EditedModel(loaded, steering, {"steer": steering.record})
    return EditedModel(loaded, one_edit(loaded.config, ablated, added, scale), edit_record(ablated, added, scale))


def named_directions(
    names: tuple[str, str], layer: int | None, position: int | None, n_layers: int, subspace: bool
) -> list[Direction | None]:
    """Returns the directions to take out and to add, None where none is named. Raises UserError as `one_each` and `read_each`
    do."""
    paths = [local_path(str(path)) for path in names if path]
    adds = bool(names[1])
    each = one_each(paths, layer, position, n_layers) if adds else read_each(paths, position, layer, n_layers, subspace)
    found = iter(each)
    return [next(found) if path else None for path in names]


def read_steering(steer: str, ablate: str, add: str, scale: float) -> Conditional | None:
    """Returns the conditional steering of a folder, None without one. Raises UserError beside another edit, and as
    `Conditional.read` does."""
    if not steer:
        return None
    if ablate or add or scale != 1.0:
        raise UserError(
            "steer is a conditional steering, whose strength is in its file. Leave out ablate, add and scale, or leave out steer."
        )
    return Conditional.read(local_path(str(steer)))


def edit_record(ablated: Direction | None, added: Direction | None, scale: float) -> dict[str, dict]:
    """Returns what identifies the edits in results: hash and scale of each direction, and the layer of the addition; and logs
    where they come from."""
    for name, direction in (("ablate", ablated), ("add", added)):
        if direction is not None:
            LOG.info(f"{name}: {direction.summary}")
    found = {}
    if ablated is not None:
        found["ablate"] = {"sha256": ablated.sha256, "scale": 1.0 if added is not None else scale}
    if added is not None:
        found["add"] = {"sha256": added.sha256, "scale": scale, "layer": added.layer}
    return found


ARGUMENTS = tuple(inspect.signature(read_arguments).parameters)


def asked_thinking(thinking: bool | None, enable_thinking: bool | None) -> bool | None:
    """Returns the value of the switch that has two names, None if neither is given. Raises UserError for
    no booleans, and if they contradict each other."""
    given = {"thinking": thinking, "enable_thinking": enable_thinking}
    for name, value in given.items():
        if value not in (None, True, False):
            raise UserError(f"{name} = {value!r} is neither true nor false.")
    values = {bool(value) for value in given.values() if value is not None}
    if len(values) > 1:
        raise UserError("thinking and enable_thinking are two names of one switch and contradict each other: give one.")
    return next(iter(values), None)


def model_of(paths: Sequence[pathlib.Path], studies: Sequence[FinishedStudy]) -> pathlib.Path:
    """Returns the checkpoint that the studies ran on, or the embedded one without any edit.

    Raises UserError if that is not told.
    """
    if not paths:
        return demo_model_path()
    if not studies:
        for path in paths:
            direction_file(path)
        raise UserError("The model is missing: a direction from a file does not tell which model it belongs to.")
    model = studies[0].checkpoint()
    if model is None or checkpoint_fingerprint(model) != studies[0].fingerprint:
        raise UserError(
            f"{studies[0].model} is not the checkpoint that the study {paths[0]} was made from: its files have changed "
            f"since. Give {setting('pretrained', 'FOLDER') or setting('model', 'FOLDER')} if the direction "
            "should be applied all the same."
        )
    return model


def one_each(paths: Sequence[pathlib.Path], layer: int | None, position: int | None, n_layers: int) -> list[Direction]:
    """Returns the one direction of each study or file, as `read_each` does. Raises UserError for none or several in one."""
    each = read_each(paths, position, layer, n_layers, subspace=None)
    for path, one in zip(paths, each, strict=True):
        if len(one.raw_jd) > 1:
            raise UserError(f"{path} holds {len(one.raw_jd)} directions: an edit while the model runs takes one.")
    return each


def one_edit(cfg: ModelConfig, ablated: Direction | None, added: Direction | None, scale: float) -> Edits:
    """Returns one row that takes out and adds. Raises UserError for a direction of another model, or no layer to add at."""
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not np.isfinite(scale):
        raise UserError(f"scale = {scale!r} is not a number.")
    first = Ablate(ablated, scale=1.0 if added else scale) if ablated else Baseline()
    edits = first.edits(cfg)
    return edits.adding(Add(added, scale=scale).edits(cfg)) if added else edits


def like_lengths(rows: Sequence[Sequence[int]]) -> list[tuple[list[int], int]]:
    """Groups rows of similar length: the indices of each group and its padded length, longest first."""
    groups = defaultdict(list)
    for i, row in enumerate(rows):
        groups[max(6, (len(row) - 1).bit_length())].append(i)
    return [(groups[key], bucket(max(len(rows[i]) for i in groups[key]))) for key in sorted(groups, reverse=True)]
