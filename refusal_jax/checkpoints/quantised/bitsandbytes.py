"""bitsandbytes: nf4 and fp4, whose scales may be quantised in turn (double quantisation), and int8 with a scale for each row.

Four-bit weights are stored flat: blocks run over the ends of rows, so a weight whose rows are no whole blocks is read as one long
row.
"""

import dataclasses
import json
import math
import pathlib
from typing import Any

import numpy as np
from jaxtyping import Shaped

from refusal_jax.checkpoints.quantised.dequantised import AT_A_TIME, Dequantised, spans
from refusal_jax.checkpoints.quantised.matrices import Fetched, Matrix, Numbers, Packed, as_bytes, reshaped
from refusal_jax.checkpoints.quantised.parts import Parts
from refusal_jax.checkpoints.tensors import PlainTensor

STATE = ".weight.quant_state.bitsandbytes__"
PART_OF_127 = 7.874015718698502e-3  # what the library multiplies by, where it means 1 / 127
ROW_MAJOR = 0  # the only layout of int8 weights that is still written


def assemble(parts: Parts) -> None:
    """Puts every weight of four bits, or of int8, together with its scales."""
    int8 = parts.given.settings.get("load_in_8bit")
    (_assemble_int8 if int8 else _assemble_four_bits)(parts)


def _assemble_int8(parts: Parts) -> None:
    owners = parts.owners(".SCB")
    formats = {o: f for o in owners if (f := parts.take(f"{o}.weight_format")) is not None}
    layouts = dict(zip(formats, parts.read(list(formats.values())), strict=True))
    for owner in owners:
        found = parts.need(owner, ".weight", ".SCB")
        if found is None:
            continue
        weight, scale = found
        if owner in layouts and layouts[owner].tolist() != ROW_MAJOR:
            parts.problems.append(
                f"{owner}.weight_format is {layouts[owner]}, expected {ROW_MAJOR}, rows one after the other"
            )
        elif len(weight.shape) != 2:
            parts.problems.append(f"{weight.name} is {list(weight.shape)}, expected a matrix")
        elif parts.fits(weight, weight.shape, "I8") and parts.fits(scale, weight.shape[:1], "F32"):
            rows, columns = weight.shape
            scales = Numbers(reshaped(scale, rows, 1))
            one = Dequantised(weight.name, weight.path, Numbers(weight), scales, (1, columns), factor=PART_OF_127)
            parts.add(weight.name, one)


def _assemble_four_bits(parts: Parts) -> None:
    kinds = ("nf4", "fp4")
    owners = [(owner, kind) for kind in kinds for owner in parts.owners(STATE + kind)]
    needed = []
    for owner, kind in owners:
        found = parts.need(owner, ".weight", ".weight.absmax", ".weight.quant_map", STATE + kind)
        nested = [parts.take(f"{owner}.weight.nested_{name}") for name in ("absmax", "quant_map")]
        if found is not None:
            needed.append((found, [tensor for tensor in nested if tensor is not None]))
    states = parts.read([found[3] for found, _ in needed])
    maps = parts.read([found[2] for found, _ in needed])
    nested_maps = iter(parts.read([nested[1] for _, nested in needed if len(nested) == 2]))
    for ((weight, absmax, _, _), nested), state, levels in zip(needed, states, maps, strict=True):
        nested_levels = next(nested_maps) if len(nested) == 2 else None
        try:
            read = json.loads(state.tobytes())
            rows, columns = (int(n) for n in read["shape"])
            found = FourBits(weight, absmax, levels, rows, columns, int(read["blocksize"]))
            if nested_levels is not None:
                found = dataclasses.replace(
                    found,
                    nested=(nested[0], nested_levels, int(read["nested_blocksize"]), float(read["nested_offset"])),
                )
            one = found.tensor()
        except (ValueError, KeyError, TypeError) as error:
            parts.problems.append(f"the quant_state of {weight.name} does not fit its tensors ({error})")
            continue
        parts.add(weight.name, one)


@dataclasses.dataclass(frozen=True)
class FourBits:
    """The stored parts of a weight `[rows, columns]` of four bits.

    block: how many values share an absmax. nested: where the absmax are codes in turn, their own absmax, the values of the codes,
    how many share one, and what is added.
    """

    weight: PlainTensor
    absmax: PlainTensor
    levels: np.ndarray
    rows: int
    columns: int
    block: int
    nested: tuple[PlainTensor, np.ndarray, int, float] | None = None

    def tensor(self) -> "Dequantised | Flat":
        """Returns the weight. Raises ValueError if the sizes do not agree."""
        count = self.rows * self.columns
        data = as_bytes(self.weight)
        blocks = math.prod(self.absmax.shape)
        if (
            self.block < 1
            or self.levels.shape != (16,)
            or -(-count // 2) != data.shape[0]
            or blocks != -(-count // self.block)
        ):
            raise ValueError(
                f"{self.weight.name} holds {data.shape[0]} bytes and {blocks} absmax for {count} values in blocks of {self.block}"
            )
        whole = self.columns % self.block == 0 and self.columns % 2 == 0
        rows, columns = (self.rows, self.columns) if whole else (1, count)
        codes = Packed(reshaped(data, rows, -(-columns // 2)), 4, 1, columns, order=(1, 0))
        scales: Matrix = Numbers(reshaped(self.absmax, rows, blocks // rows))
        if self.nested is not None:
            absmax, levels, block, offset = self.nested
            if levels.shape != (256,) or math.prod(absmax.shape) != -(-blocks // block):
                raise ValueError(f"{absmax.name} is {list(absmax.shape)} for {blocks} absmax in blocks of {block}")
            scales = Nested(scales, levels.astype(np.float32), reshaped(absmax, -(-blocks // block)), block, offset)
        levels = self.levels.astype(np.float32)
        found = Dequantised(self.weight.name, self.weight.path, codes, scales, (1, self.block), levels)
        return found if whole else Flat(found, (self.rows, self.columns))


@dataclasses.dataclass(frozen=True)
class Nested:
    """Scales that are quantised themselves: level of the code * absmax + offset, `block` of them in a row sharing an absmax."""

    codes: Matrix
    levels: np.ndarray
    absmax: PlainTensor
    block: int
    offset: float

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.absmax.nbytes

    def fetch(self, rows: range, columns: range) -> Fetched:
        """Reads a part. Raises UserError if the file cannot be read."""
        codes, width = self.codes.fetch(rows, columns), self.shape[1]
        first = (rows.start * width + columns.start) // self.block
        last = ((rows.stop - 1) * width + columns.stop - 1) // self.block
        absmax = np.empty(last - first + 1, np.float32)
        count = self.absmax.read_into((slice(first, last + 1),), absmax)

        def decode(start: int, stop: int) -> np.ndarray:
            at = np.arange(rows.start + start, rows.start + stop)[:, None] * width + np.asarray(columns)
            values = self.levels.take(codes.decode(start, stop))
            return values * absmax[at // self.block - first] + np.float32(self.offset)

        return Fetched(decode, codes.count + count)


@dataclasses.dataclass(frozen=True, eq=False)
class Flat:
    """A matrix that is stored as one long row, and a part of which is read by whole rows."""

    row: Dequantised
    shape: tuple[int, int]

    dtype = "F32"

    @property
    def nbytes(self) -> int:
        return self.row.nbytes

    @property
    def path(self) -> pathlib.Path:
        return self.row.path

    def read_into(self, index: tuple[slice, ...], out: Shaped[np.ndarray, "..."]) -> int:
        """Reads as `Tensor.read_into` does. Raises UserError if a file cannot be read."""
        rows, columns = spans(self.shape, index)
        if out.shape != (len(rows), len(columns)):
            raise ValueError(f"{self.row.name}: an array of shape {out.shape} cannot take {len(rows)} x {len(columns)}")
        width, count = self.shape[1], 0
        step = max(AT_A_TIME // max(width, 1), 1)
        for start in range(rows.start, rows.stop, step) if out.size else ():
            stop = min(start + step, rows.stop)
            values: Any = np.empty((1, (stop - start) * width), np.float32)
            count += self.row.read_into((slice(None), slice(start * width, stop * width)), values)
            with np.errstate(over="ignore"):  # overflows are found and reported once everything is loaded
                out[start - rows.start : stop - rows.start] = values.reshape(-1, width)[:, columns.start : columns.stop]
        return count
