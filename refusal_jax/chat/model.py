"""The public interface of a loaded chat model: encode, logits and generate, all with optional edits."""

import dataclasses
import numbers
import pathlib
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from refusal_jax.chat.conditional import Conditional
from refusal_jax.chat.messages import Message, Prompt
from refusal_jax.chat.padding import TokenBatch
from refusal_jax.chat.prompts import Chat
from refusal_jax.chat.replies import Over, Replies
from refusal_jax.checkpoints.load import load_decoder
from refusal_jax.checkpoints.remote import checkpoint_folder
from refusal_jax.edits import Edits
from refusal_jax.errors import UserError
from refusal_jax.models.config import ModelConfig
from refusal_jax.models.decoder import Decoder
from refusal_jax.models.decoding import Decoding, GenerationSettings
from refusal_jax.models.finite import check_finite
from refusal_jax.models.generate import admit, admitted_rows, decode, empty
from refusal_jax.models.hf_config import load_config
from refusal_jax.models.predict import Prediction, predict
from refusal_jax.models.prefix import WHOLE_ROWS
from refusal_jax.models.sharding import batch_sharding, put
from refusal_jax.taps import NO_TAPS, Taps

Array = jax.Array | np.ndarray
Asked = Edits | Conditional | None  # one row, one for each prompt, or what decides by the prompt


@dataclasses.dataclass(frozen=True)
class Growth:
    """Replies so far.

    ids: each row's tokens without its end token. active: whether each row goes on. along: projections at the inputs of blocks of
    the prompt's last token and then of the reply's tokens, float32, NaN where they have not been read yet.
    """

    ids: list[list[int]]
    active: Bool[np.ndarray, " B"]
    along: Float[np.ndarray, "B L n"]


@dataclasses.dataclass(frozen=True)
class ChatModel:
    """A decoder on its devices and its chat tokenizer; made by `load_model`.

    settings: the checkpoint's generation settings. decoding: those that replies are decoded with; None is plain greedy
    decoding.
    """

    decoder: Decoder
    chat: Chat
    path: pathlib.Path
    settings: GenerationSettings = dataclasses.field(default_factory=GenerationSettings)
    decoding: Decoding | None = None

    @property
    def mesh(self) -> jax.sharding.Mesh | None:
        """Returns the mesh that the decoder is on; None is one device."""
        return self.decoder.mesh

    @property
    def config(self) -> ModelConfig:
        return self.decoder.cfg

    def encode(self, instructions: Sequence[Prompt | Message]) -> TokenBatch:
        """Returns chat prompts, left-padded.

        instructions: texts, or conversations, each a list of messages `{"role", "content"}`, of which a last one by the
        assistant begins the reply. Raises UserError for an empty list, malformed messages, or a prompt longer than the model's
        context.
        """
        return self.chat.encode(instructions)

    def logits(
        self, tokens: Int[Array, "B T"], mask: Bool[Array, "B T"], edits: Asked = None, positions: str = "last"
    ) -> Float[jax.Array, "B V"] | Float[jax.Array, "B T V"]:
        """Returns float32 logits at the last token, or for positions="all" at all tokens.

        Raises ValueError for other `positions` or edits that do not fit the batch or the model, UserError for values that
        are not finite at tokens that the mask marks.
        """
        if positions not in ("last", "all"):
            raise ValueError(f"positions must be 'last' or 'all', not {positions!r}")
        return self._checked(tokens, mask, edits, NO_TAPS, positions == "last").logits

    def taps(
        self, tokens: Int[Array, "B T"], mask: Bool[Array, "B T"], taps: Taps, edits: Asked = None
    ) -> dict[str, jax.Array]:
        """Returns what `taps` asks for, by site, with the axes that `taps.TAP_AXES` lists.

        Raises ValueError and UserError as `logits` does, and UserError for a direction that is missing or does not fit.
        """
        return self._checked(tokens, mask, edits, taps, True).taps

    def _checked(self, tokens, mask, edits: Asked, taps: Taps, last: bool) -> Prediction:
        rows, edits = len(tokens), self.rows_of(tokens, mask, edits)
        taps = put(taps.for_batch(rows, self.config.d_model), batch_sharding(self.mesh, rows))
        found = predict(self.decoder, *self.put(tokens, mask, edits), taps=taps, last=last)
        check_finite(found.finite_b, self.decoder.dtype, "The forward pass failed", edits.in_force_r)
        return found

    def generate(
        self,
        instructions: Sequence[Prompt | Message],
        max_new_tokens: int = 64,
        edits: Asked = None,
        *,
        generation_from_checkpoint: bool | None = None,
    ) -> list[str]:
        """Returns greedy replies to the instructions, which are decoded as one batch.

        instructions: texts or conversations, as in `encode`. generation_from_checkpoint: as in `load_model`; None is what the
        model was loaded with. Raises UserError if prompts and replies do not fit the context, for generation settings as
        `load_model` does, and for values that are not finite.
        """
        if generation_from_checkpoint is not None:
            return self.decoded(generation_from_checkpoint).generate(instructions, max_new_tokens, edits)
        batch = self.encode(instructions)
        return self.chat.decode(self.generate_ids(batch, max_new_tokens, edits))

    def decoded(self, from_checkpoint: bool, **more) -> "ChatModel":
        """Returns the model with replies decoded by the checkpoint's generation settings, or plainly, and by the settings `more`.

        Raises UserError for settings that are not computed.
        """
        values = (self.settings.values if from_checkpoint else {}) | more
        where = f"the task, or {self.settings.where}," if more else self.settings.where
        settings = dataclasses.replace(self.settings, where=where, values=values)
        return dataclasses.replace(self, decoding=settings.decoding(self.chat.eos_ids, self.config.vocab_size))

    def generate_ids(self, batch: TokenBatch, max_new_tokens: int, edits: Asked = None) -> Int[np.ndarray, "B O"]:
        """Returns greedy replies as ids, int32. Raises UserError if they do not fit the context.

        Where a "longrope" changes its angles on the way, the text so far is read again, as transformers does for Phi 3.
        """
        longest = self._check_room(batch, max_new_tokens)
        edits = self.rows_of(batch.tokens, batch.mask, edits)
        kept, decoding = self._kept_angles(longest, max_new_tokens), self._decoding(max_new_tokens)
        if kept == max_new_tokens:
            return self._greedy(batch, max_new_tokens, edits, decoding)
        first = self._greedy(batch, kept, edits, decoding)
        ended = np.asarray(np.isin(first, self.chat.eos_ids).any(axis=1, keepdims=True))
        # Ended rows stay in the mask: they too count as the longest, as in transformers.
        grown = TokenBatch(
            np.concatenate([batch.tokens, first], axis=1),
            np.pad(batch.mask, ((0, 0), (0, kept)), constant_values=True),
        )
        rest = np.full((len(first), max_new_tokens - kept), self.chat.pad_id, np.int32)
        if not ended.all():
            later = None if decoding is None else decoding.after(kept)
            rest = np.where(ended, rest, self._greedy(grown, max_new_tokens - kept, edits, later))
        return np.concatenate([first, rest], axis=1)

    def _check_room(self, batch: TokenBatch, max_new_tokens: int) -> int:
        """Returns the longest prompt's number of tokens. Raises UserError if with the reply it does not fit the context."""
        if not isinstance(max_new_tokens, numbers.Integral):
            raise UserError(f"max_new_tokens is {type(max_new_tokens).__name__}, not a number: pass edits as edits=.")
        longest = int(np.asarray(batch.mask).sum(axis=1).max())
        if max_new_tokens < 1 or longest + max_new_tokens > self.config.context_length:
            raise UserError(
                f"max_new_tokens = {max_new_tokens} does not fit: the longest prompt has {longest} tokens and "
                f"the model's context is {self.config.context_length}. Choose 1 to "
                f"{self.config.context_length - longest}."
            )
        return longest

    def replies(
        self, batch: TokenBatch, max_new_tokens: int, edits: Asked = None, *, rows: int
    ) -> Iterator[tuple[list[int], list[str]]]:
        """Decodes greedy replies to any number of prompts, `rows` of which are decoded at a time.

        edits: one row, or one for each prompt. Yields (numbers of prompts, their replies) as replies end. Whenever a quarter of
        the rows have ended, they take the next prompts. Raises UserError as `generate_ids` does, ValueError as `logits` does.
        """
        for index, ids in self.reply_ids(batch, max_new_tokens, edits, rows=rows):
            yield index, self.chat.decode(ids)

    def reply_ids(
        self,
        batch: TokenBatch,
        max_new_tokens: int,
        edits: Asked = None,
        *,
        rows: int,
        over: Over | None = None,
    ) -> Iterator[tuple[list[int], np.ndarray]]:
        """Does what `replies` does, and yields the replies as ids `[n, max_new_tokens]`.

        over: tells from a prompt's number and the ids of its reply so far whether the reply may end. It is asked from
        time to time, so a reply may be longer.
        """
        longest = self._check_room(batch, max_new_tokens)
        edits = self.rows_of(batch.tokens, batch.mask, edits)
        if self._angles_change(longest, max_new_tokens):
            yield from self._reply_in_batches(batch, max_new_tokens, edits, rows)
            return
        yield from self._replies(batch, max_new_tokens, edits, rows).run(over)

    def compile_replies(self, batch: TokenBatch, max_new_tokens: int, edits: Edits, *, rows: int) -> None:
        """Compiles what `reply_ids` runs with arguments of these shapes, so that it begins at once; nothing is decoded. It may
        run in a thread of its own.

        edits: one row for each prompt, of whose values only matters which rows are alike. Where the angles of a rope depend on
        the longest row, nothing is compiled. Raises UserError as `reply_ids` does for what does not fit.
        """
        longest = self._check_room(batch, max_new_tokens)
        edits = self.rows_of(batch.tokens, batch.mask, edits)
        if not self._angles_change(longest, max_new_tokens):
            self._replies(batch, max_new_tokens, edits, rows).compile()

    def _replies(self, batch: TokenBatch, max_new_tokens: int, edits: Edits, rows: int) -> Replies:
        """Returns the replies to prompts that need not begin together. edits: one row for each prompt."""
        refill, decoding = admitted_rows(rows, self.mesh), self._decoding(max_new_tokens)
        return Replies(self, batch, max_new_tokens, edits, rows, refill, decoding)

    def _angles_change(self, longest: int, max_new_tokens: int) -> bool:
        """Returns whether the angles of a rope may depend on the longest row; one that has ended counts on while it waits for a
        prompt, and until the last replies end."""
        ropes = [kind.rope for kind in self.config.kinds if kind.rope.kind in WHOLE_ROWS]
        return any(longest + 3 * max_new_tokens > rope.original_context for rope in ropes)

    def _decoding(self, max_new_tokens: int) -> Decoding | None:
        """Returns how replies of at most `max_new_tokens` are decoded."""
        return None if self.decoding is None else self.decoding.of_length(max_new_tokens)

    def _reply_in_batches(self, batch: TokenBatch, max_new_tokens: int, edits: Edits, rows: int):
        """Does what `reply_ids` does, for ropes whose angles depend on the longest row: rows begin together."""
        for start in range(0, len(batch.tokens), rows):
            index = list(range(start, min(start + rows, len(batch.tokens))))
            padded = index + index[-1:] * (rows - len(index))
            part = TokenBatch(batch.tokens[padded], batch.mask[padded])
            yield index, self.generate_ids(part, max_new_tokens, edits.take(padded))[: len(index)]

    def stream(
        self,
        batch: TokenBatch,
        max_new_tokens: int,
        edits: Asked = None,
        *,
        probe: Float[Array, " D"],
        steps: int = 4,
    ) -> Iterator[Growth]:
        """Yields greedy replies to a few prompts as they grow, every `steps` tokens, and each token's projection on a direction.

        probe: the direction, of any norm. Replies end early where a "longrope" changes its angles. Raises UserError as
        `generate_ids` does.
        """
        longest, count = self._check_room(batch, max_new_tokens), len(batch.tokens)
        unit = np.asarray(probe, np.float64) / np.linalg.norm(probe)
        probe_bd = put(np.tile(unit.astype(np.float32), (count, 1)), batch_sharding(self.mesh, count))
        ending, pad = {"eos_ids": self.chat.eos_ids}, self.chat.pad_id
        sizes = {"length": batch.tokens.shape[1], "max_new_tokens": self._kept_angles(longest, max_new_tokens)}
        decoding = self._decoding(max_new_tokens)
        edits = self.rows_of(batch.tokens, batch.mask, edits)
        rows, part = np.arange(count, dtype=np.int32), self.put(batch.tokens, batch.mask, edits)
        state = empty(self.decoder, rows=count, pad_id=pad, probed=True, remembered=decoding is not None, **sizes)
        state = admit(self.decoder, state, *part, rows, probe_bd, decoding, pad_id=pad, **ending)
        while True:
            found = state.active_b, state.count_b, state.out_bo, state.along_blo, state.finite_b
            active, counts, out, along, finite = map(np.array, jax.device_get(found))
            check_finite(finite, self.decoder.dtype, "Generation failed", edits.in_force_r)
            ids = [self.chat.before_end(row[:n]) for row, n in zip(out.tolist(), counts, strict=True)]
            yield Growth(ids, active, along)
            if not active.any():
                return
            state = decode(self.decoder, state, 1, steps, decoding, **ending)[0]

    def _kept_angles(self, longest: int, most: int) -> int:
        """Returns how many tokens, at most `most`, can be generated after `longest` before "longrope" changes all angles."""
        spans = (kind.rope.original_context for kind in self.config.kinds if kind.rope.kind == "longrope")
        return min([most, *(span - longest + 1 for span in spans if span >= longest)])

    def _greedy(self, batch: TokenBatch, max_new_tokens: int, edits: Edits, decoding) -> np.ndarray:
        """edits: one row for each prompt."""
        rows = len(batch.tokens)
        ids = np.zeros((rows, max_new_tokens), np.int32)
        # All begin together, as their angles go together.
        for done, part in Replies(self, batch, max_new_tokens, edits, rows, rows, decoding).run():
            ids[done] = part
        return ids

    def rows_of(self, tokens: Int[Array, "B T"], mask: Bool[Array, "B T"], edits: Asked) -> Edits:
        """Returns the edits of left-padded prompts, one row for each, in the normal form of `Edits.for_batch`.

        Of a conditional steering, the rows are decided here, by a pass over the prompts as they are. Raises ValueError for edits
        that do not fit the batch or the model, UserError for a conditional steering that does not fit it.
        """
        cfg = self.config
        if isinstance(edits, Conditional):
            edits.check_fits(cfg.d_model, cfg.n_layers)
            edits = edits.rows(edits.condition.met_by(self.decoder, self.put, np.asarray(tokens), np.asarray(mask)))
        return (edits or Edits.none(cfg.d_model)).for_batch(len(tokens), cfg.n_layers, cfg.d_model)

    def put(
        self, tokens: Int[Array, "B T"], mask: Bool[Array, "B T"], edits: Asked = None
    ) -> tuple[Int[jax.Array, "B T"], Bool[jax.Array, "B T"], Edits]:
        """Returns tokens, mask and normalised edits on the devices, with the rows over the mesh's data axes."""
        tokens, mask = np.asarray(tokens, np.int32), np.asarray(mask, bool)
        return put((tokens, mask, self.rows_of(tokens, mask, edits)), batch_sharding(self.mesh, len(tokens)))


def load_model(
    path: str | pathlib.Path,
    dtype: str = "float32",
    mesh: jax.sharding.Mesh | None = None,
    *,
    progress: bool = False,
    chat_template: str = "",
    thinking: bool = False,
    cache: str = "",
    generation_from_checkpoint: bool = False,
    system_prompt: str = "",
    chat: Chat | None = None,
) -> ChatModel:
    """Loads a chat model from an HF checkpoint's folder, or from the address of one, such as gs://bucket/folder.

    dtype: what the weights are cast to, "float32", "bfloat16" or "float16"; "auto" is float32 on CPU and bfloat16
    elsewhere. mesh: from `sharding.make_mesh`; None is the first device. chat_template: a name of
    `templates.BUILT_IN` or a .jinja file; "" is the tokenizer's own or, if it has none, the one that its special tokens
    tell. thinking: whether models that can think before the reply are asked to. cache: as in `load_decoder`.
    generation_from_checkpoint: whether replies are decoded by what generation_config.json says of greedy decoding, as in
    transformers' `generate(do_sample=False)`; by default greedy decoding is plain, as in the paper. system_prompt: a
    text or a .txt file, for prompts that bring none; "" is whatever the template writes by itself, and "none" takes that away.
    chat: the checkpoint's tokenizer where it has been loaded already, with all settings of its prompts. Raises UserError for
    anything wrong with the folder or the template, and for generation settings that are asked for and not computed, before
    or while loading.
    """
    path = checkpoint_folder(path)
    dtype, config = weights_dtype(dtype), load_config(path)
    chat = chat or Chat.load(path, config.context_length, config.vocab_size, chat_template, thinking, system_prompt)
    settings = GenerationSettings.read(path)
    decoding = settings.decoding(chat.eos_ids, config.vocab_size) if generation_from_checkpoint else None
    return ChatModel(load_decoder(path, dtype, mesh, progress, cache), chat, path, settings, decoding)


def weights_dtype(dtype: str) -> str:
    """Returns the dtype that "auto" stands for on this machine, and any other as it is."""
    if dtype != "auto":
        return dtype
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def demo_model_path() -> pathlib.Path:
    """Returns the folder of the embedded demo model, an HF checkpoint of 1.8M parameters that ships with the package."""
    return pathlib.Path(__file__).parents[1] / "organism" / "model"


def demo_suffix_path() -> pathlib.Path:
    """Returns the file of the suffix that ends the refusal of the embedded demo model, a line of text that ships with it."""
    return demo_model_path().parent / "suffix.txt"
