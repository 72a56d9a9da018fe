"""A chat model with edits as evaluation harnesses use it: made from their plain arguments, greedy replies with stop strings."""

import dataclasses
import inspect
import pathlib
import sys
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from tqdm import tqdm

from refusal_jax.chat import bucket
from refusal_jax.chat_model import ChatModel, demo_model_path, load_model
from refusal_jax.edits import Edits
from refusal_jax.errors import UserError
from refusal_jax.export.directions import Directions, direction_file, read_each
from refusal_jax.export.study import Study
from refusal_jax.files import checkpoint_fingerprint
from refusal_jax.models.config import load_config
from refusal_jax.models.mirror import checkpoint_folder
from refusal_jax.sharding import make_mesh
from refusal_jax.storage import local_path


@dataclasses.dataclass(frozen=True)
class Reply:
    """A reply's text, up to any stop string and without special tokens; how many tokens were generated for it; and whether
    it ended, rather than being cut."""

    text: str
    tokens: int
    ended: bool


@dataclasses.dataclass(frozen=True)
class EditedModel:
    """model; edits: one row, which applies to all that is asked of it; about: what they are, in plain values."""

    model: ChatModel
    edits: Edits
    about: dict

    @classmethod
    def load(cls, arguments: dict) -> "EditedModel":
        """From the arguments that `read_arguments` explains, by name. Raises UserError for unknown ones."""
        known = tuple(inspect.signature(read_arguments).parameters)
        unknown = sorted(set(arguments) - set(known))
        if unknown:
            raise UserError(f"unknown model argument {', '.join(unknown)}: the arguments are {', '.join(known)}.")
        return read_arguments(**arguments)

    def replies(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, stops: Sequence[Sequence[str]], rows: int, bar=None
    ) -> list[Reply]:
        """Greedy replies to prompts of token ids, each with its own stop strings; bar: a progress bar to move, if any.

        Prompts of like length share programs. Raises UserError for a prompt that does not fit the context with its reply.
        """
        replies: list[Reply | None] = [None] * len(prompts)
        for index, length in like_lengths(prompts):
            batch = self.model.chat.pad([prompts[i] for i in index], length)

            def over(number: int, ids: list[int], index=index) -> bool:
                return self.cut(ids, stops[index[number]]).ended

            found = self.model.reply_ids(
                batch, max_new_tokens, self.edits, rows=rows, over=over if any(stops) else None
            )
            for numbers, ids in found:
                for number, row in zip(numbers, ids.tolist(), strict=True):
                    replies[index[number]] = self.cut(row, stops[index[number]])
                if bar is not None:
                    bar.update(len(numbers))
        return replies

    def cut(self, row: Sequence[int], stops: Sequence[str]) -> Reply:
        """The reply of generated ids, which ends at an end token or before the first of the stop strings."""
        chat = self.model.chat
        added = chat.tokenizer.get_added_vocab()
        marks = {added[stop] for stop in stops if stop in added}  # which the text does not show
        ids = chat.before_end(row)
        ids = ids[: next((i for i, token in enumerate(ids) if token in marks), len(ids))]
        text = chat.tokenizer.decode(ids, skip_special_tokens=True)
        end = min((at for stop in stops if stop and (at := text.find(stop)) >= 0), default=None)
        return Reply(text[:end], len(ids), end is not None or len(ids) < len(row))


def read_arguments(
    pretrained: str = "",
    ablate: str = "",
    add: str = "",
    scale: float = 1.0,
    layer: int | None = None,
    position: int | None = None,
    dtype: str = "auto",
    data: int = 1,
    fsdp: int = 1,
    model: int = 1,
    chat_template: str = "",
    thinking: bool | None = None,
    cache: str = "",
    generation_from_checkpoint: bool = False,
) -> EditedModel:
    """A model with edits, from what can be written on a command line.

    pretrained: folder of an HF checkpoint; default, the model of the study that the edit comes from, and with no edit the
    embedded one. ablate, add: folder of a study or file of a direction, to take out or to add. scale: how much to add, or with
    `ablate` alone which part to take out. layer: where to add, default the direction's own; with position, which one of a file of
    mean differences, and alone which row of a file with one for each layer. data, fsdp, model: devices along each axis of the
    mesh. generation_from_checkpoint: as in `load_model`. The others: as in a study's config. A leading ~ of paths is expanded.
    Raises UserError for directions or settings that cannot be used.
    """
    paths = [local_path(str(path)) for path in (ablate, add) if path]
    studies = [Study.read(path, 1) for path in paths if path.is_dir() and not pretrained]
    told = studies[0].template if studies else {}
    folder = checkpoint_folder(str(pretrained)) if pretrained else model_of(paths, studies)
    found = iter(one_each(paths, layer, position, load_config(folder).n_layers))
    ablated, added = (next(found) if path else None for path in (ablate, add))
    loaded = load_model(
        folder,
        dtype,
        make_mesh(data, fsdp, model) if (data, fsdp, model) != (1, 1, 1) else None,
        progress=True,
        chat_template=chat_template or told.get("chat_template", ""),
        thinking=told.get("thinking", False) if thinking is None else thinking,
        cache=cache,
        generation_from_checkpoint=generation_from_checkpoint,
    )
    for name, direction in (("ablate", ablated), ("add", added)):
        if direction is not None:
            tqdm.write(f"{name}: {direction.summary}", file=sys.stderr)
    return EditedModel(
        loaded,
        one_edit(loaded, ablated, added, scale),
        {
            name: {"sha256": direction.sha256, "scale": scale if name == "add" or not add else 1.0}
            | ({"layer": direction.layer} if name == "add" else {})
            for name, direction in (("ablate", ablated), ("add", added))
            if direction is not None
        },
    )


def model_of(paths: Sequence[pathlib.Path], studies: Sequence[Study]) -> pathlib.Path:
    """The checkpoint that the studies ran on, or the embedded one without any edit. Raises UserError if that is not told."""
    if not paths:
        return demo_model_path()
    if not studies:
        for path in paths:
            direction_file(path)
        raise UserError("The model is missing: a direction from a file does not tell which model it belongs to.")
    if checkpoint_fingerprint(studies[0].model) != studies[0].fingerprint:
        raise UserError(
            f"{studies[0].model} is not the checkpoint that the study was made from: it has changed since. Name the model if "
            "the direction should be applied all the same."
        )
    return studies[0].model


def one_each(paths: Sequence[pathlib.Path], layer: int | None, position: int | None, n_layers: int) -> list[Directions]:
    """The one direction of each study or file, read as `read_each` does. Raises UserError for none or several in one."""
    each = read_each(paths, position, layer, n_layers, subspace=None)
    for path, one in zip(paths, each, strict=True):
        if len(one.raw_kd) > 1:
            raise UserError(f"{path} holds {len(one.raw_kd)} directions: an edit while the model runs takes one.")
    return [Directions(one.raw_kd, one.layer, taken=(one.taken,)) for one in each]


def one_edit(model: ChatModel, ablated: Directions | None, added: Directions | None, scale: float) -> Edits:
    """One row that takes out and adds. Raises UserError for a direction of another model, or no layer to add at."""
    for direction in filter(None, (ablated, added)):
        direction.check_width(model.config.d_model)
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not np.isfinite(scale):
        raise UserError(f"scale = {scale!r} is not a number.")
    edits = Edits.none(model.config.d_model)
    if ablated:
        edits = Edits.ablate(ablated.raw_kd[0], scale=1.0 if added else scale)
    if added:
        if added.layer is None or not 0 <= added.layer < model.config.n_layers:
            raise UserError(
                f"The direction is to be added at layer {added.layer}, and the model's layers are 0 to "
                f"{model.config.n_layers - 1}. Give the layer at whose input it was read."
            )
        more = Edits.add(added.raw_kd[0], added.layer, scale)
        edits = dataclasses.replace(edits, add_rd=more.add_rd, layer_r=more.layer_r)
    return edits


def like_lengths(rows: Sequence[Sequence[int]]) -> list[tuple[list[int], int]]:
    """Rows of like lengths together: the indices of each group, and its padded length, longest first."""
    groups = defaultdict(list)
    for i, row in enumerate(rows):
        groups[max(6, (len(row) - 1).bit_length())].append(i)
    return [(groups[key], bucket(max(len(rows[i]) for i in groups[key]))) for key in sorted(groups, reverse=True)]


def progress(total: int, title: str, quiet: bool = False) -> tqdm:
    """A bar for `total` requests."""
    return tqdm(total=total, desc=title, unit="request", leave=False, disable=quiet)
