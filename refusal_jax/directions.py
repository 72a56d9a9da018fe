"""Directions of the residual stream: what they are, and every format that they are read from and written to.

A direction comes from a study, or from a file as other tools write it. Several together are the subspace that they span.
"""

import dataclasses
import hashlib
import pathlib
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float
from safetensors.numpy import save_file

from refusal_jax.checkpoints.safetensors import read_tensors
from refusal_jax.edits import INDEPENDENT, orthonormal
from refusal_jax.errors import UserError, setting
from refusal_jax.files import file_hash, read_json, to_json, write_atomically

DIRECTION, METADATA, MEANS = "direction.safetensors", "direction_metadata.json", "mean_diffs"
NO_DIRECTION = "no_direction.json"  # in the folder of a study that found none
ONE_ONLY = "Only one direction can be used here: save it in a file of its own."


@runtime_checkable
class Run(Protocol):
    """The files of a run's folder, as `refusal_jax.runs.run.Run` reads and writes them."""

    def read_json(self, name: str) -> Any: ...
    def read_tensors(self, name: str) -> dict[str, np.ndarray]: ...
    def write_json(self, name: str, value) -> None: ...
    def write_tensors(self, name: str, tensors: dict[str, np.ndarray]) -> None: ...


def check_found(folder: pathlib.Path) -> None:
    """Raises UserError if the folder is that of a study that found no direction."""
    if (folder / NO_DIRECTION).is_file():
        claim = read_json(folder / NO_DIRECTION).get("claim", "")
        raise UserError(
            f"The study in {folder} found no direction, so there is nothing to take from it: {claim} Its report.html shows how "
            "near the candidates came, and the same `refusal-jax study` command continues it with other settings of the "
            "selection."
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Direction:
    """A direction, or several that span a subspace, with their norms and where they come from.

    raw_jd: float64 `[J, D]`. layer, position: at which block's input, and which token from the prompt's end, a single direction
    was read, where that is known. files: sha256 of each file they come from, by name. taken: what was taken out of each file,
    in words. origin_d: the mean residual of the harmless prompts at that place, float64 `[D]`, where that is known.
    """

    raw_jd: np.ndarray
    layer: int | None = None
    position: int | None = None
    files: dict[str, str] = dataclasses.field(default_factory=dict)
    taken: tuple[str, ...] = ()
    origin_d: np.ndarray | None = None

    def __post_init__(self):
        """Raises UserError for what is no direction: zero, not finite, or in the span of the others."""
        if self.raw_jd.ndim != 2 or not np.isfinite(self.raw_jd).all() or not self.raw_jd.any(axis=-1).all():
            raise UserError(
                f"The direction (shape {list(self.raw_jd.shape)}) must be a vector of finite numbers that is not zero. "
                "Export the direction of a finished study."
            )
        units = self.raw_jd / np.linalg.norm(self.raw_jd, axis=1, keepdims=True)
        if len(units) > units.shape[1] or np.linalg.svd(units, compute_uv=False)[-1] < INDEPENDENT:
            raise UserError(
                f"The {len(units)} directions are linearly dependent, so one of them is in the span of the others. Leave "
                "it out."
            )

    @classmethod
    def of(cls, values, layer: int | None = None, position: int | None = None) -> "Direction":
        """Returns the direction of a vector `[D]`, or of the rows of `[J, D]`. Raises UserError as the class does."""
        return cls(np.atleast_2d(np.asarray(values, np.float64)), layer, position)

    @classmethod
    def selected(cls, run: Run) -> "Direction":
        """Reads the direction that a study selected. Raises KeyError for files that lack what a study writes."""
        told = run.read_json(METADATA)
        return cls.of(run.read_tensors(DIRECTION)["direction"], told["layer"], told["pos"])

    def write_selected(self, run: Run) -> None:
        """Writes the direction that a study selected, which has a layer and a position, to the study's run."""
        run.write_json(METADATA, {"pos": self.position, "layer": self.layer})
        run.write_tensors(DIRECTION, self._tensors())

    def write(self, path: pathlib.Path) -> list[pathlib.Path]:
        """Writes what `read_direction` reads, in float32, and returns the files.

        path: a file that ends in .npy, .safetensors or .pt (which needs PyTorch), or a folder, which gets a study's file. A
        single direction whose layer and position are known gets direction_metadata.json beside it. Raises UserError for
        another ending.
        """
        file = path if path.suffix else path / DIRECTION
        if file.suffix not in WRITERS:
            raise UserError(f"{file} cannot be written: the name of a direction ends in {', '.join(WRITERS)}.")
        file.parent.mkdir(parents=True, exist_ok=True)
        WRITERS[file.suffix](file, self._tensors())
        if self.layer is None or self.position is None:
            return [file]
        write_atomically(file.parent / METADATA, to_json({"pos": self.position, "layer": self.layer}))
        return [file, file.parent / METADATA]

    def _tensors(self) -> dict[str, np.ndarray]:
        """Returns the values in float32 under the name that readers look for: `[D]` of one direction, else `[J, D]`."""
        rows = self.raw_jd.astype(np.float32)
        return {"direction": rows[0]} if len(rows) == 1 else {"directions": rows}

    @property
    def raw_d(self) -> Float[np.ndarray, " D"]:
        """Returns the single direction with its norm, float64. Raises UserError for a subspace."""
        if len(self.raw_jd) > 1:
            raise UserError(f"These are {len(self.raw_jd)} directions. {ONE_ONLY}")
        return self.raw_jd[0]

    @property
    def norm(self) -> float:
        """Returns the norm of the single direction. Raises UserError for a subspace."""
        return float(np.linalg.norm(self.raw_d))

    @property
    def place(self) -> tuple[int, int]:
        """Returns the position and the layer at which the direction was read. Raises UserError if they are not known."""
        if self.position is None or self.layer is None:
            raise UserError("The direction does not tell at which position and layer it was read. Use a study's own.")
        return self.position, self.layer

    @property
    def basis_jd(self) -> Float[np.ndarray, "J D"]:
        """Returns an orthonormal basis of the same span, float64; a single direction is only made unit."""
        if len(self.raw_jd) == 1:
            return self.raw_jd / np.linalg.norm(self.raw_jd)
        return orthonormal(self.raw_jd[None])[0]

    @property
    def sha256(self) -> str:
        """Returns the hash of the float32 values, row by row."""
        return hashlib.sha256(np.ascontiguousarray(self.raw_jd, "<f4").tobytes()).hexdigest()

    @property
    def summary(self) -> str:
        """Returns how many directions these are and where they come from, for people."""
        count = len(self.raw_jd)
        what = "1 direction" if count == 1 else f"{count} directions, as the subspace that they span"
        return f"{what} ({'; '.join(self.taken)})" if self.taken else what

    def check_width(self, d_model: int) -> None:
        """Raises UserError for another width than the residual stream's."""
        if self.raw_jd.shape[1] != d_model:
            raise UserError(
                f"The direction has {self.raw_jd.shape[1]} entries, the model's residual stream has {d_model}: it belongs "
                "to another model. Export with the model that the study ran on."
            )


def read_direction(
    paths: Sequence[pathlib.Path],
    position: int | None = None,
    layer: int | None = None,
    n_layers: int | None = None,
    subspace: bool | None = False,
) -> Direction:
    """Reads folders of studies and .npy, .safetensors and .pt files as one direction, or all together as a subspace.

    The arguments are those of `read_each`. Raises UserError as that does, for a layer that the model does not have, and for a
    layer that is said of several directions.
    """
    if layer is not None and n_layers is not None:
        _check_layer(layer, n_layers)
    found = _read_all(paths, position, layer, n_layers, subspace)
    each = [one for one, _ in found]
    if len(each) == 1 and len(each[0].raw_jd) == 1:
        return each[0]
    count = sum(len(one.raw_jd) for one in each)
    if layer is not None and not any(chosen for _, chosen in found):
        raise UserError(
            f"{setting('layer', layer)} says at which layer one direction was read, and these are {count}, which are taken "
            f"out everywhere as the subspace that they span. Leave out {setting('layer')}, or name one direction."
        )
    if len({one.raw_jd.shape[1] for one in each}) > 1:
        raise UserError(
            f"The directions have {', '.join(str(one.raw_jd.shape[1]) for one in each)} entries: they belong to different "
            "models."
        )
    files: dict[str, str] = {}
    for path, one in zip(paths, each, strict=True):
        for name, digest in one.files.items():
            while name in files:
                name = f"{direction_file(path).resolve().parent.name}/{name}"
            files[name] = digest
    raw_jd = np.concatenate([one.raw_jd for one in each])
    return Direction(raw_jd, files=files, taken=tuple(words for one in each for words in one.taken))


def read_each(
    paths: Sequence[pathlib.Path],
    position: int | None = None,
    layer: int | None = None,
    n_layers: int | None = None,
    subspace: bool | None = False,
) -> list[Direction]:
    """Reads the direction, or the subspace, of each folder of a study or file. This alone decides how a file's shape is read:

    `[D]` and `[1, D]` are one direction, read at `layer` or where the direction_metadata.json beside it says. Of mean
    differences, `[positions, layers, D]`, `position` and `layer` choose one, by default those of that file. `[J, D]` is one
    direction a layer if J is the model's `n_layers` or one more, of which `layer` chooses; and J directions that span a
    subspace if J is another number, or if `subspace` says so. subspace None: where only one direction can be used. n_layers
    None: where the model is not known, so that `layer` alone tells which of both it is. Raises UserError for what holds no
    direction, can be read both ways, or does not go with `position`, `layer` or `subspace`.
    """
    return [one for one, _ in _read_all(paths, position, layer, n_layers, subspace)]


def _read_all(paths, position, layer, n_layers, subspace) -> list[tuple[Direction, bool]]:
    """Returns what `read_each` does, each with whether it was chosen from several."""
    files = [direction_file(path) for path in paths]
    values = [_read(file) for file in files]
    if position is not None and not any(array.ndim == 3 for array in values):
        shapes = ", ".join(f"{f.name} {list(array.shape)}" for f, array in zip(files, values, strict=True))
        raise UserError(
            f"{setting('position', position)} chooses among mean differences, [positions, layers, D], and there are none: "
            f"{shapes}. Leave it out, or name the file of mean differences."
        )
    return [_taken(f, array, position, layer, n_layers, subspace) for f, array in zip(files, values, strict=True)]


def _taken(file: pathlib.Path, values: np.ndarray, position, layer, n_layers, subspace) -> tuple[Direction, bool]:
    """Returns what is taken out of one file, whose array `[D]`, `[J, D]` or `[positions, layers, D]` is `values`, and whether it
    was chosen from several."""
    told = read_metadata(file)

    def taken(rows_jd, layer, position, words: str = "") -> Direction:
        text = f"{file.name}: {words}" if words else file.name
        return Direction(rows_jd, layer, position, {file.name: file_hash(file)}, (text,))

    if values.ndim == 3:
        if subspace:
            raise UserError(
                f"{file} holds mean differences, [positions, layers, D], of which one is taken, and {setting('subspace')} "
                "takes all rows of a file [directions, D]. Leave it out."
            )
        position, layer = _candidate(file, values, told, position, layer)
        return taken(values[position, layer][None], layer, position, f"position {position}, layer {layer}"), True
    rows_jd = np.atleast_2d(values)
    if len(rows_jd) == 1:
        known = layer in (None, told.get("layer"))
        return taken(rows_jd, told.get("layer") if known else layer, told.get("pos") if known else None), False
    if subspace and layer is not None:
        raise UserError(
            f"{setting('subspace')} takes all {len(rows_jd)} rows of {file}, and {setting('layer', layer)} one of them. "
            "Leave out one of the two."
        )
    if not subspace and _row_per_layer(file, len(rows_jd), layer, n_layers, subspace is not None):
        return taken(rows_jd[layer][None], layer, None, f"row {layer} of {len(rows_jd)}, counted from 0"), True
    return taken(rows_jd, None, None, f"all {len(rows_jd)} rows"), False


def _row_per_layer(file, count: int, layer: int | None, n_layers: int | None, several: bool) -> bool:
    """Returns whether the `count` rows of a file are one direction a layer, of which `layer` is taken. several: whether a
    subspace can be used. Raises UserError if that cannot be told, or if `layer` asks for a row that there is not."""
    per_layer = layer is not None if n_layers is None else count in (n_layers, n_layers + 1)
    if not per_layer and layer is not None:
        raise UserError(
            f"{setting('layer', layer)} was given, but {file} has {count} rows and the model has {n_layers} layers: they "
            "are not one direction a layer. "
            + ("Leave it out to take the subspace that they span." if several else ONE_ONLY)
        )
    if per_layer and layer is None:
        raise UserError(
            f"{file} has {count} rows and the model has {n_layers} layers: they may be one direction for each layer, or "
            f"{count} directions that span a subspace. Say which: {setting('layer', 'N')} (0 to "
            f"{(n_layers or count) - 1}) takes the direction of layer N"
            + (f"; {setting('subspace')} takes all of them." if several else f". {ONE_ONLY}")
        )
    if layer is not None:
        _check_layer(layer, n_layers or count)
    return per_layer


def _check_layer(layer: int, n_layers: int) -> None:
    if not 0 <= layer < n_layers:
        raise UserError(f"There is no layer {layer}: the layers are 0 to {n_layers - 1}. Correct {setting('layer')}.")


def direction_file(path: pathlib.Path) -> pathlib.Path:
    """Returns the file of a direction: `path`, or the one in the folder of a study. Raises UserError if there is none, such as
    after a study that found none."""
    check_found(path)
    file = path / DIRECTION if path.is_dir() else path
    if file.suffix not in READERS:
        raise UserError(
            f"{file} is no direction: give the folder of a finished study, or a file that ends in {', '.join(READERS)}."
        )
    if not file.is_file():
        raise UserError(f"{file} is not a file. Check the path of the direction.")
    return file


def read_metadata(file: pathlib.Path) -> dict:
    """Returns what is said of a direction in the folder of its file, or in the one above as in published runs: "pos" and
    "layer"."""
    for folder in (file.parent, file.parent.parent):
        if (folder / METADATA).is_file():
            told = read_json(folder / METADATA)
            if not all(isinstance(told.get(key), int) for key in ("pos", "layer")):
                raise UserError(f"{folder / METADATA} is damaged: it must say pos and layer, two numbers.")
            return told
    return {}


def _candidate(file, values_pld, told: dict, position: int | None, layer: int | None) -> tuple[int, int]:
    """Returns position, counted from the end, and layer of the direction that is taken from mean differences."""
    position = told.get("pos") if position is None else position
    layer = told.get("layer") if layer is None else layer
    positions, layers, _ = values_pld.shape
    if position is None or layer is None:
        raise UserError(
            f"{file} holds {positions} positions x {layers} layers of mean differences and no {METADATA} lies beside it. "
            f"Say which direction to take with {setting('position')} (-{positions} to -1) and {setting('layer')} (0 to "
            f"{layers - 1})."
        )
    if not -positions <= position < positions or not 0 <= layer < layers:
        raise UserError(
            f"{file} has no direction at position {position}, layer {layer}: its positions are -{positions} to -1, its "
            f"layers 0 to {layers - 1}."
        )
    return position - positions * (position >= 0), layer


def _read(file: pathlib.Path) -> np.ndarray:
    """Returns the array in a file, float64, of one to three axes."""
    values = np.asarray(READERS[file.suffix](file))
    if values.dtype.kind not in "fiuV" or values.ndim not in (1, 2, 3) or not values.size:
        raise UserError(
            f"{file} holds an array of shape {list(values.shape)} and type {values.dtype}: a direction is numbers of shape "
            "[D], several are [directions, D], mean differences are [positions, layers, D]."
        )
    return values.astype(np.float64)


def _read_npy(file: pathlib.Path) -> np.ndarray:
    try:
        return np.load(file, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise UserError(f"{file} is not a readable .npy file ({error}). Save it again with numpy.save.") from None


def _read_safetensors(file: pathlib.Path) -> np.ndarray:
    tensors = read_tensors(file)
    names = [name for name in ("direction", "directions", MEANS) if name in tensors] or list(tensors)
    if len(tensors) != 1 and names == list(tensors):
        raise UserError(
            f"{file} holds {len(tensors)} tensors ({', '.join(sorted(tensors)[:5])}): call the one that counts 'direction'."
        )
    return tensors[names[0]]


def _read_pt(file: pathlib.Path) -> np.ndarray:
    """Reads a tensor saved by PyTorch, whose loader for weights alone runs no code of the file."""
    try:
        import torch
    except ImportError:
        raise UserError(
            f"{file} can only be read with PyTorch, which is not installed. Where it is, convert the file: numpy.save("
            f"'{file.stem}.npy', torch.load('{file.name}', weights_only=True).float().numpy())."
        ) from None
    try:
        return torch.load(file, map_location="cpu", weights_only=True).detach().double().numpy()
    except Exception as error:  # the loader raises many types; all mean that this is not a plain tensor
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{file} holds no plain tensor ({reason}). Only tensors are read, because other pickles can run code: save the "
            "direction alone, with torch.save(direction, FILE)."
        ) from None


def _write_pt(file: pathlib.Path, tensors: dict[str, np.ndarray]) -> None:
    try:
        import torch
    except ImportError:
        raise UserError(
            f"{file} can only be written with PyTorch, which is not installed. Write .npy instead."
        ) from None
    (values,) = tensors.values()
    torch.save(torch.from_numpy(values), file)


def _write_npy(file: pathlib.Path, tensors: dict[str, np.ndarray]) -> None:
    (values,) = tensors.values()
    np.save(file, values)


READERS = {".npy": _read_npy, ".safetensors": _read_safetensors, ".pt": _read_pt}
WRITERS = {".npy": _write_npy, ".safetensors": lambda file, tensors: save_file(tensors, file), ".pt": _write_pt}
