"""Directions in: from a study, or from files as other tools write them; one or several, which span a subspace."""

import dataclasses
import hashlib
import pathlib
from collections.abc import Sequence

import numpy as np

from refusal_jax.checkpoints.safetensors import read_tensors
from refusal_jax.errors import UserError, setting
from refusal_jax.files import file_hash, read_json

DIRECTION, METADATA, MEANS = "direction.safetensors", "direction_metadata.json", "mean_diffs"
# The least part of a direction that must lie outside the span of those before it.
INDEPENDENT = 1e-6
ONE_ONLY = "Only one direction can be used here: save it in a file of its own."


@dataclasses.dataclass(frozen=True, eq=False)
class Directions:
    """raw_kd: float64 `[K, D]`, of any norms. layer: at whose input the single direction was read, if that is known.
    files: sha256 of each file they come from, by name. taken: what was taken out of each file, in words."""

    raw_kd: np.ndarray
    layer: int | None = None
    files: dict[str, str] = dataclasses.field(default_factory=dict)
    taken: tuple[str, ...] = ()

    def __post_init__(self):
        """Raises UserError for what is no direction: zero, not finite, or in the span of the others."""
        if self.raw_kd.ndim != 2 or not np.isfinite(self.raw_kd).all() or not self.raw_kd.any(axis=-1).all():
            raise UserError(
                f"The direction (shape {list(self.raw_kd.shape)}) must be a vector of finite numbers that is not zero. "
                "Export the direction of a finished study."
            )
        units = self.raw_kd / np.linalg.norm(self.raw_kd, axis=1, keepdims=True)
        if len(units) > units.shape[1] or np.linalg.svd(units, compute_uv=False)[-1] < INDEPENDENT:
            raise UserError(
                f"The {len(units)} directions are linearly dependent, so one of them is in the span of the others. Leave "
                "it out."
            )

    @classmethod
    def of(cls, values) -> "Directions":
        """From a vector `[D]` or the rows of `[K, D]`; raises UserError as above."""
        return cls(np.atleast_2d(np.asarray(values, np.float64)))

    @property
    def basis_kd(self) -> np.ndarray:
        """Orthonormal, of the same span; a single direction is only made unit. float64 `[K, D]`."""
        if len(self.raw_kd) == 1:
            return self.raw_kd / np.linalg.norm(self.raw_kd)
        return np.linalg.svd(self.raw_kd / np.linalg.norm(self.raw_kd, axis=1, keepdims=True), full_matrices=False)[2]

    @property
    def sha256(self) -> str:
        """Of their float32 values, row by row."""
        return hashlib.sha256(np.ascontiguousarray(self.raw_kd, "<f4").tobytes()).hexdigest()

    @property
    def summary(self) -> str:
        """How many directions these are and where they come from, for people."""
        count = len(self.raw_kd)
        what = "1 direction" if count == 1 else f"{count} directions, as the subspace that they span"
        return f"{what} ({'; '.join(self.taken)})" if self.taken else what

    def check_width(self, d_model: int) -> None:
        """Raises UserError for another width than the residual stream's."""
        if self.raw_kd.shape[1] != d_model:
            raise UserError(
                f"The direction has {self.raw_kd.shape[1]} entries, the model's residual stream has {d_model}: it belongs "
                "to another model. Export with the model that the study ran on."
            )


def read_directions(
    paths: Sequence[pathlib.Path],
    position: int | None = None,
    layer: int | None = None,
    n_layers: int | None = None,
    subspace: bool | None = False,
) -> Directions:
    """The directions of folders of studies and of .npy, .safetensors and .pt files, all together.

    The arguments are those of `read_each`. Raises UserError as that does, for a layer that the model does not have, and for a
    layer that is said of several directions.
    """
    if layer is not None and n_layers is not None:
        _check_layer(layer, n_layers)
    each = read_each(paths, position, layer, n_layers, subspace)
    count = sum(len(one.raw_kd) for one in each)
    if count > 1 and layer is not None and not any(one.chosen for one in each):
        raise UserError(
            f"{setting('layer', layer)} says at which layer one direction was read, and these are {count}, which are taken "
            f"out everywhere as the subspace that they span. Leave out {setting('layer')}, or name one direction."
        )
    if len({one.raw_kd.shape[1] for one in each}) > 1:
        raise UserError(
            f"The directions have {', '.join(str(one.raw_kd.shape[1]) for one in each)} entries: they belong to different "
            "models."
        )
    files: dict[str, str] = {}
    for one in each:
        name = one.file.name
        while name in files:
            name = f"{one.file.resolve().parent.name}/{name}"
        files[name] = file_hash(one.file)
    raw_kd = np.concatenate([one.raw_kd for one in each])
    return Directions(raw_kd, each[0].layer if count == 1 else None, files, tuple(one.taken for one in each))


@dataclasses.dataclass(frozen=True, eq=False)
class Taken:
    """The directions that were taken out of one file. raw_kd: `[K, D]`. layer: at whose input one direction was read. chosen:
    whether it was picked from several. taken: all this in words."""

    file: pathlib.Path
    raw_kd: np.ndarray
    layer: int | None
    chosen: bool
    taken: str


def read_each(
    paths: Sequence[pathlib.Path],
    position: int | None = None,
    layer: int | None = None,
    n_layers: int | None = None,
    subspace: bool | None = False,
) -> list[Taken]:
    """The directions of each folder of a study or file. This alone decides how a file's shape is read:

    `[D]` and `[1, D]` are one direction, read at `layer` or where the direction_metadata.json beside it says. Of mean
    differences, `[positions, layers, D]`, `position` and `layer` choose one, by default those of that file. `[K, D]` is one
    direction a layer if K is the model's `n_layers` or one more, of which `layer` chooses; and K directions that span a
    subspace if K is another number, or if `subspace` says so. subspace None: where only one direction can be used. n_layers
    None: where the model is not known, so that `layer` alone tells which of both it is. Raises UserError for what holds no
    direction, can be read both ways, or does not go with `position`, `layer` or `subspace`.
    """
    files = [direction_file(path) for path in paths]
    values = [_read(file) for file in files]
    if position is not None and not any(array.ndim == 3 for array in values):
        shapes = ", ".join(f"{f.name} {list(array.shape)}" for f, array in zip(files, values, strict=True))
        raise UserError(
            f"{setting('position', position)} chooses among mean differences, [positions, layers, D], and there are none: "
            f"{shapes}. Leave it out, or name the file of mean differences."
        )
    return [_taken(f, array, position, layer, n_layers, subspace) for f, array in zip(files, values, strict=True)]


def _taken(file: pathlib.Path, values: np.ndarray, position, layer, n_layers, subspace) -> Taken:
    """Returns what is taken out of one file, whose array `[D]`, `[K, D]` or `[positions, layers, D]` is `values`."""
    told = read_metadata(file)
    if values.ndim == 3:
        if subspace:
            raise UserError(
                f"{file} holds mean differences, [positions, layers, D], of which one is taken, and {setting('subspace')} "
                "takes all rows of a file [directions, D]. Leave it out."
            )
        row_d, at, words = _candidate(file, values, told, position, layer)
        return Taken(file, row_d[None], at, True, f"{file.name}: {words}")
    rows_kd = np.atleast_2d(values)
    if len(rows_kd) == 1:
        return Taken(file, rows_kd, told.get("layer") if layer is None else layer, False, file.name)
    if subspace and layer is not None:
        raise UserError(
            f"{setting('subspace')} takes all {len(rows_kd)} rows of {file}, and {setting('layer', layer)} one of them. "
            "Leave out one of the two."
        )
    if not subspace and _row_per_layer(file, len(rows_kd), layer, n_layers, subspace is not None):
        return Taken(
            file, rows_kd[layer][None], layer, True, f"{file.name}: row {layer} of {len(rows_kd)}, counted from 0"
        )
    return Taken(file, rows_kd, None, False, f"{file.name}: all {len(rows_kd)} rows")


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
            f"{count} directions that span a subspace. Say which: {setting('layer', 'N')} (0 to {n_layers - 1}) takes the "
            "direction of layer N" + (f"; {setting('subspace')} takes all of them." if several else f". {ONE_ONLY}")
        )
    if per_layer:
        _check_layer(layer, n_layers or count)
    return per_layer


def _check_layer(layer: int, n_layers: int) -> None:
    if not 0 <= layer < n_layers:
        raise UserError(f"There is no layer {layer}: the layers are 0 to {n_layers - 1}. Correct {setting('layer')}.")


def direction_file(path: pathlib.Path) -> pathlib.Path:
    """Returns the file of a direction: `path`, or the one in the folder of a study. Raises UserError if there is none."""
    file = path / DIRECTION if path.is_dir() else path
    if file.suffix not in READERS:
        raise UserError(
            f"{file} is no direction: give the folder of a finished study, or a file that ends in {', '.join(READERS)}."
        )
    if not file.is_file():
        raise UserError(f"{file} is not a file. Check the path of the direction.")
    return file


def read_metadata(file: pathlib.Path) -> dict:
    """What is said of a direction in the folder of its file, or the one above as in published runs: "pos" and "layer"."""
    for folder in (file.parent, file.parent.parent):
        if (folder / METADATA).is_file():
            told = read_json(folder / METADATA)
            if not all(isinstance(told.get(key), int) for key in ("pos", "layer")):
                raise UserError(f"{folder / METADATA} is damaged: it must say pos and layer, two numbers.")
            return told
    return {}


def _candidate(file, values_pld, told: dict, position: int | None, layer: int | None):
    """One direction out of mean differences `[positions, layers, D]`, its layer, and which it is, in words."""
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
    return values_pld[position, layer], layer, f"position {position - positions * (position >= 0)}, layer {layer}"


def _read(file: pathlib.Path) -> np.ndarray:
    """The array in a file, float64, of one to three axes."""
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
    """A tensor saved by PyTorch, whose loader for weights alone runs no code of the file."""
    try:
        import torch
    except ImportError:
        raise UserError(
            f"{file} can only be read with PyTorch, which is not installed. Where it is, convert the file: numpy.save("
            f"'{file.stem}.npy', torch.load('{file.name}', weights_only=True).float().numpy())."
        ) from None
    try:
        return torch.load(file, map_location="cpu", weights_only=True).detach().double().numpy()
    except Exception as error:  # the loader raises many kinds; all mean that this is no plain tensor
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{file} holds no plain tensor ({reason}). Only tensors are read, because other pickles can run code: save the "
            "direction alone, with torch.save(direction, FILE)."
        ) from None


READERS = {".npy": _read_npy, ".safetensors": _read_safetensors, ".pt": _read_pt}
