"""Directions in: from a study, or from files as other tools write them; one or several, which span a subspace."""

import dataclasses
import hashlib
import pathlib
from collections.abc import Sequence

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from refusal_jax.data.prompts import file_hash
from refusal_jax.errors import UserError, setting
from refusal_jax.models.hf_attributes import read_json

DIRECTION, METADATA, MEANS = "direction.safetensors", "direction_metadata.json", "mean_diffs"
# The least part of a direction that must lie outside the span of those before it.
INDEPENDENT = 1e-6


@dataclasses.dataclass(frozen=True, eq=False)
class Directions:
    """raw_kd: float64 `[K, D]`, of any norms. layer: at whose input the single direction was read, if that is known.
    files: sha256 of each file they come from, by name."""

    raw_kd: np.ndarray
    layer: int | None = None
    files: dict[str, str] = dataclasses.field(default_factory=dict)

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

    def check_width(self, d_model: int) -> None:
        """Raises UserError for another width than the residual stream's."""
        if self.raw_kd.shape[1] != d_model:
            raise UserError(
                f"The direction has {self.raw_kd.shape[1]} entries, the model's residual stream has {d_model}: it belongs "
                "to another model. Export with the model that the study ran on."
            )


def read_directions(paths: Sequence[pathlib.Path], position: int | None = None, layer: int | None = None) -> Directions:
    """The directions of folders of studies and of .npy, .safetensors and .pt files, all together.

    position, layer: which one of a file of mean differences, `[positions, layers, D]`; by default what the
    direction_metadata.json beside it says. Raises UserError for anything that holds no direction.
    """
    rows, files, layers = [], {}, []
    for path in paths:
        file = path / DIRECTION if path.is_dir() else path
        values = _read(file)
        told = read_metadata(file)
        if values.ndim == 3:
            values, at = _candidate(file, values, told, position, layer)
        else:
            at = layer if layer is not None else told.get("layer")
        rows.append(np.atleast_2d(values))
        layers += [at] * len(rows[-1])
        name = file.name
        while name in files:
            name = f"{file.resolve().parent.name}/{name}"
        files[name] = file_hash(file)
    if len({row.shape[1] for row in rows}) > 1:
        raise UserError(
            f"The directions have {', '.join(str(row.shape[1]) for row in rows)} entries: they belong to different models."
        )
    return Directions(np.concatenate(rows), layers[0] if len(layers) == 1 else None, files)


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
    """One direction out of mean differences `[positions, layers, D]`, and its layer."""
    position = told.get("pos") if position is None else position
    layer = told.get("layer") if layer is None else layer
    positions, layers, _ = values_pld.shape
    if position is None or layer is None:
        raise UserError(
            f"{file} holds {positions} positions x {layers} layers of mean differences and no {METADATA} lies beside it. Say "
            f"which direction to take with {setting('position')} (-{positions} to -1) and {setting('layer')} (0 to {layers - 1})."
        )
    if not -positions <= position < positions or not 0 <= layer < layers:
        raise UserError(
            f"{file} has no direction at position {position}, layer {layer}: its positions are -{positions} to -1, its layers "
            f"0 to {layers - 1}."
        )
    return values_pld[position, layer], layer


def _read(file: pathlib.Path) -> np.ndarray:
    """The array in a file, float64, of one to three axes."""
    readers = {".npy": _read_npy, ".safetensors": _read_safetensors, ".pt": _read_pt}
    if file.suffix not in readers:
        raise UserError(
            f"{file} is no direction: give the folder of a finished study, or a file that ends in {', '.join(readers)}."
        )
    if not file.is_file():
        raise UserError(f"{file} is not a file. Check the path of the direction.")
    values = np.asarray(readers[file.suffix](file))
    if values.dtype.kind not in "fiuV" or values.ndim not in (1, 2, 3):
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
    try:
        tensors = load_file(file)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is not a readable safetensors file ({error}). Copy it again.") from None
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
