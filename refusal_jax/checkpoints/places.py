"""One weight of the decoder on its way from the checkpoint to the devices of this process.

A weight is a stack of the tensors that HF keeps apart (layers, experts). It is read in blocks that are whole rows of
some of those tensors, each block by one thread; the slices that several devices need are read once, and a block that
is on the devices is forgotten. So the host holds a few blocks, whatever the size of the model.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from refusal_jax.checkpoints.tensor_files import STORED, TensorFiles
from refusal_jax.models.families import Piece
from refusal_jax.models.sharding import weight_place
from refusal_jax.models.weights import Weight

ALIGNMENT = 64  # bytes
BLOCK = 32 << 20  # bytes of a weight that are read at a time, for all devices of this process


@dataclasses.dataclass(frozen=True)
class Block:
    """A part of a weight, for every device that holds any of it.

    ranges: of the device's own part, along the stacked axes and rows. parts: an array a device, in the order of `Place.held`.
    """

    ranges: tuple[range, ...]
    parts: list[np.ndarray]
    finite: bool


class Place:
    """Where one weight goes: which part of it each of this process's devices holds.

    shape, sharding: of the whole, from `weight_place`: rows beyond the weight's own are zeros that no file holds. stacked:
    how many leading axes HF keeps apart. held: of each device, its range along every axis. bands: what is read together:
    per stacked axes and rows, the runs of columns, each of which several devices may share.
    """

    def __init__(self, mesh: Mesh | None, weight: Weight, pieces: dict[tuple[int, ...], Piece], dtype):
        """pieces: by index, as in `families.pieces`. dtype: what values are cast to."""
        self.shape, self.sharding = weight_place(mesh, weight)
        self.weight, self.pieces, self.dtype = weight, pieces, np.dtype(dtype)
        self.stacked = len(next(iter(pieces)))
        indices = self.sharding.addressable_devices_indices_map(self.shape)
        self.held = {
            device: tuple(range(*i.indices(size)) for i, size in zip(index, self.shape, strict=True))
            for device, index in indices.items()
        }
        self.bands: dict[tuple[range, ...], list[tuple[range, ...]]] = {}
        for ranges in dict.fromkeys(self.held.values()):
            self.bands.setdefault(ranges[: self.stacked + 1], []).append(ranges[self.stacked + 1 :])
        self.bands = {leading: joined(runs) for leading, runs in self.bands.items()}

    def share(self, files: TensorFiles) -> int:
        """Bytes of the files that this process needs."""
        total = 0
        for (*outer, rows), runs in self.bands.items():
            cells = len(self.own(rows)) * sum(math.prod(map(len, run)) for run in runs)
            for index in itertools.product(*outer):
                total += cells * np.dtype(STORED[files.dtypes[self.pieces[index].name]]).itemsize
        return total

    def own(self, rows: range) -> range:
        """Those of the rows that the weight has itself."""
        return range(rows.start, max(min(rows.stop, self.weight.shape[self.stacked]), rows.start))

    def blocks(self) -> Iterator[tuple[range, ...]]:
        """The ranges of all blocks, in order: as many entries of an axis as fit, of the first axis of which one does."""
        if not self.held:
            return
        sizes = self.sharding.shard_shape(self.shape)[: self.stacked + 1]
        row = self.dtype.itemsize * sum(math.prod(map(len, run)) for runs in self.bands.values() for run in runs)
        entries = [row * math.prod(sizes[axis + 1 :]) for axis in range(len(sizes))]
        axis = next((a for a, entry in enumerate(entries) if entry <= BLOCK), self.stacked)
        step = max(BLOCK // max(entries[axis], 1), 1)
        for outer in itertools.product(*map(range, sizes[:axis])):
            for start in range(0, sizes[axis], step):
                inner = [range(start, min(start + step, sizes[axis])), *map(range, sizes[axis + 1 :])]
                yield (*(range(i, i + 1) for i in outer), *inner)

    def read(self, files: TensorFiles, ranges: tuple[range, ...]) -> Block:
        """One block. Raises UserError if a file cannot be read."""
        found, finite = {}, True
        for leading, runs in self.bands.items():
            *outer, rows = (range(a.start + r.start, a.start + r.stop) for a, r in zip(leading, ranges, strict=True))
            own = self.own(rows)
            for run in runs:
                values = found[leading, run] = np.empty([*map(len, (*outer, rows)), *map(len, run)], self.dtype)
                for at in np.ndindex(*map(len, outer)):
                    piece = self.pieces[tuple(a[i] for a, i in zip(outer, at, strict=True))]
                    wanted = slice(piece.start + own.start, piece.start + own.stop)
                    files.read_into(
                        piece.name, (wanted, *(slice(a.start, a.stop) for a in run)), values[at][: len(own)]
                    )
                    values[at][len(own) :] = 0
                finite = finite and all_finite(values)
        return Block(ranges, [self._part(found, held) for held in self.held.values()], finite)

    def _part(self, found: dict, held: tuple[range, ...]) -> np.ndarray:
        """A device's part of what was read."""
        leading, columns = held[: self.stacked + 1], held[self.stacked + 1 :]
        run = next(run for run in self.bands[leading] if all(c.start in r for c, r in zip(columns, run, strict=True)))
        inside = tuple(slice(c.start - r.start, c.stop - r.start) for c, r in zip(columns, run, strict=True))
        return found[leading, run][(..., *inside)]

    def array(self, blocks: Iterator[Block]) -> jax.Array:
        """The weight on the devices, from its blocks, of which none is held after the next one is asked for."""
        devices, part_shape = tuple(self.held), self.sharding.shard_shape(self.shape)
        fill = Filling.of(devices, part_shape, self.dtype)
        parts = []
        for block in blocks:
            if block.parts[0].shape == part_shape:
                parts = jax.device_put(block.parts, list(devices))
            else:
                fill.write(block)
            del block
            jax.block_until_ready(parts)  # else blocks that wait pile up
        return jax.make_array_from_single_device_arrays(
            self.shape, self.sharding, parts or fill.parts(), dtype=self.dtype
        )


def joined(runs: list[tuple[range, ...]]) -> list[tuple[range, ...]]:
    """Runs of columns with those that touch made one; there is at most one axis of columns."""
    merged: list[tuple[range, ...]] = []
    for run in sorted(runs, key=lambda run: [r.start for r in run]):
        if run and merged and merged[-1][0].stop == run[0].start:
            merged[-1] = (range(merged[-1][0].start, run[0].stop),)
        else:
            merged.append(run)
    return merged


def all_finite(values: np.ndarray) -> bool:
    """Whether floats hold no NaN and no infinity: by their exponents' bits, which is many times as fast as by value."""
    bits = values.reshape(-1).view(f"u{values.itemsize}")
    infinity = np.asarray(np.inf, values.dtype).view(bits.dtype)
    step = 1 << 18  # what is compared stays in the processor's cache
    return all((bits[i : i + step] & infinity).max() < infinity for i in range(0, len(bits), step))


class Filling:
    """Parts of one shape, one a device, that are written block by block."""

    def __init__(self, devices: tuple, shape: tuple[int, ...], dtype):
        self.devices, self.shape, self.dtype, self.whole = devices, shape, dtype, None

    @staticmethod
    def of(devices: tuple, shape: tuple[int, ...], dtype) -> "Filling":
        in_host = bool(devices) and devices[0].platform == "cpu"
        return (HostFilling if in_host else DeviceFilling)(devices, shape, dtype)


class HostFilling(Filling):
    """Where the devices' memory is the host's: arrays that become the devices' own without a copy."""

    def write(self, block: Block) -> None:
        if self.whole is None:
            self.whole = [aligned(self.shape, self.dtype) for _ in self.devices]
        at = tuple(slice(r.start, r.stop) for r in block.ranges)
        for whole, part in zip(self.whole, block.parts, strict=True):
            whole[at] = part

    def parts(self) -> list[jax.Array]:
        return jax.device_put(self.whole or [], list(self.devices) if self.whole else None)


class DeviceFilling(Filling):
    """The parts of all devices as one array, device after device along its first axis: one program, which writes in place,
    serves them all."""

    def write(self, block: Block) -> None:
        if self.whole is None:
            self.whole = zeros(self.devices, self.shape, self.dtype)
        new = abreast(self.devices, jax.device_put(block.parts, list(self.devices)))
        at = [r.start for r in block.ranges] + [0] * (len(self.shape) - len(block.ranges))
        self.whole = filling(self.devices)(self.whole, new, np.asarray(at, np.int32))
        self.whole.block_until_ready()  # else blocks that wait to be written pile up

    def parts(self) -> list[jax.Array]:
        return [] if self.whole is None else side_by_side(self.devices, self.whole)


def aligned(shape: tuple[int, ...], dtype) -> np.ndarray:
    """An array that begins where XLA wants its own to begin, so that it need not be copied."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def device_sharding(devices: tuple) -> NamedSharding:
    """Of an array whose first axis is as many parts as there are devices."""
    mesh = Mesh(np.asarray(devices), ("device",), axis_types=(jax.sharding.AxisType.Auto,))
    return NamedSharding(mesh, PartitionSpec("device"))


def abreast(devices: tuple, parts: list[jax.Array]) -> jax.Array:
    """The parts of the devices, all of one shape, as one array."""
    shape = (len(devices) * parts[0].shape[0], *parts[0].shape[1:])
    return jax.make_array_from_single_device_arrays(shape, device_sharding(devices), parts)


def side_by_side(devices: tuple, whole: jax.Array) -> list[jax.Array]:
    """The inverse of `abreast`."""
    found = {shard.device: shard.data for shard in whole.addressable_shards}
    return [found[device] for device in devices]


def zeros(devices: tuple, part_shape: tuple[int, ...], dtype) -> jax.Array:
    """Zeros of a shape on each device, as one array."""
    shape, sharding = (len(devices) * part_shape[0], *part_shape[1:]), device_sharding(devices)
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)()


@functools.cache
def filling(devices: tuple):
    """The program that writes a block at the same place of each device's part, in place."""
    sharding = device_sharding(devices)
    each, all_alike = sharding.spec, PartitionSpec()

    def fill(whole, block, at):
        return jax.lax.dynamic_update_slice(whole, block, tuple(at))

    mapped = jax.shard_map(fill, mesh=sharding.mesh, in_specs=(each, each, all_alike), out_specs=each)
    return jax.jit(mapped, donate_argnums=0)
