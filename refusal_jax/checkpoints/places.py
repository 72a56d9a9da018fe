"""Brings one weight of the decoder from the checkpoint to the devices of this process, each of which holds a part of it.

A weight is a stack of the tensors that HF keeps apart (layers, experts). It is read in slabs, which are whole rows of
some of those tensors, each slab by one thread; slices that several devices need are read once, and a slab that is on
the devices is forgotten. So the host holds only a few slabs, whatever the size of the model. For devices whose memory is
the host's, slabs are read to their place in the weight, and nothing is copied.
"""

import abc
import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Float, Shaped

from refusal_jax.checkpoints.tensor_files import TensorFiles
from refusal_jax.checkpoints.tensors import copy_in_strips
from refusal_jax.models.families import Piece
from refusal_jax.models.sharding import weight_place
from refusal_jax.models.weight import Weight

ALIGNMENT = 64  # bytes
SLAB_BYTES = 32 << 20  # bytes of a weight that are read at a time, for all devices of this process


@dataclasses.dataclass(frozen=True)
class Slab:
    """Some rows of a weight, for every device that holds a part of it.

    ranges: which rows of each device's own part these are, along the stacked axes and rows. parts: an array for each device, in
    the order of `Place.held`. finite: whether no value is NaN or infinite.
    """

    ranges: tuple[range, ...]
    parts: list[np.ndarray]
    finite: bool


class Place:
    """The place of one weight: the part of it that each of this process's devices holds.

    shape, sharding: those of the whole weight, from `weight_place`; rows beyond the weight's own are zeros that no file holds.
    stacked: how many leading axes HF keeps apart. held: each device's range along every axis. bands: what is read together,
    which is, for some ranges of stacked axes and rows, runs of columns that several devices may share.
    """

    def __init__(self, mesh: Mesh | None, weight: Weight, pieces: dict[tuple[int, ...], Piece], dtype):
        """Lays out a weight. pieces: its tensors by index, as in `families.pieces`. dtype: what values are cast to."""
        self.shape, self.sharding = weight_place(mesh, weight)
        self.weight, self.pieces, self.dtype = weight, pieces, np.dtype(dtype)
        self.stacked = len(next(iter(pieces)))
        indices = self.sharding.addressable_devices_indices_map(self.shape)
        self.held = {
            device: tuple(range(*i.indices(size)) for i, size in zip(index, self.shape, strict=True))
            for device, index in indices.items()
            if index is not None
        }
        self.bands: dict[tuple[range, ...], list[tuple[range, ...]]] = {}
        for ranges in dict.fromkeys(self.held.values()):
            self.bands.setdefault(ranges[: self.stacked + 1], []).append(ranges[self.stacked + 1 :])
        self.bands = {leading: joined(runs) for leading, runs in self.bands.items()}

    def share(self, files: TensorFiles) -> int:
        """Returns how many bytes of the files this process needs."""
        total = 0
        for (*outer, rows), runs in self.bands.items():
            cells = len(self.own(rows)) * sum(math.prod(map(len, run)) for run in runs)
            for index in itertools.product(*outer):
                piece = self.pieces[index]
                tensor = files.tensors[piece.name]
                total += cells * piece.step * tensor.nbytes // max(math.prod(tensor.shape), 1)
        return total

    def own(self, rows: range) -> range:
        """Returns the rows that belong to the weight itself, without the zeros after them."""
        return range(rows.start, max(min(rows.stop, self.weight.shape[self.stacked]), rows.start))

    def slabs(self) -> Iterator[tuple[range, ...]]:
        """Yields the ranges of all slabs in order: as many entries as fit of the first axis of which one entry fits."""
        if not self.held:
            return
        sizes = self.sharding.shard_shape(self.shape)[: self.stacked + 1]
        row = self.dtype.itemsize * sum(math.prod(map(len, run)) for runs in self.bands.values() for run in runs)
        entries = [row * math.prod(sizes[axis + 1 :]) for axis in range(len(sizes))]
        axis = next((a for a, entry in enumerate(entries) if entry <= SLAB_BYTES), self.stacked)
        step = max(SLAB_BYTES // max(entries[axis], 1), 1)
        for outer in itertools.product(*map(range, sizes[:axis])):
            for start in range(0, sizes[axis], step):
                inner = [range(start, min(start + step, sizes[axis])), *map(range, sizes[axis + 1 :])]
                yield (*(range(i, i + 1) for i in outer), *inner)

    def filling(self) -> "Filling":
        """Returns the arrays of this process's devices, yet to be filled with slabs."""
        return Filling.of(tuple(self.held), self.sharding.shard_shape(self.shape), self.dtype)

    def read(self, files: TensorFiles, ranges: tuple[range, ...], room: Sequence[np.ndarray] = ()) -> Slab:
        """Reads one slab. room: of `Filling.room`. Raises UserError if a file cannot be read."""
        found, finite, rooms = {}, True, dict(zip(self.held.values(), room, strict=False))
        for leading, runs in self.bands.items():
            *outer, rows = (range(a.start + r.start, a.start + r.stop) for a, r in zip(leading, ranges, strict=True))
            own = self.own(rows)
            for run in runs:
                values = rooms.get((*leading, *run))
                if values is None:
                    values = np.empty([*map(len, (*outer, rows)), *map(len, run)], self.dtype)
                found[leading, run] = values
                for at in np.ndindex(*map(len, outer)):
                    piece = self.pieces[tuple(a[i] for a, i in zip(outer, at, strict=True))]
                    target, span = values[at][: len(own)], piece.span(own, tuple(slice(a.start, a.stop) for a in run))
                    if piece.plain:
                        files.read_into(piece.name, span, target.reshape((1,) * len(piece.within) + target.shape))
                    else:
                        part = np.empty([s.stop - s.start for s in span], self.dtype)
                        files.read_into(piece.name, span, part)
                        copy_in_strips(piece.of(part), target)
                    values[at][len(own) :] = 0
                finite = finite and all_finite(values)
        return Slab(ranges, [self._part(found, held) for held in self.held.values()], finite)

    def _part(self, found: dict, held: tuple[range, ...]) -> np.ndarray:
        """Returns a device's part of what was read."""
        leading, columns = held[: self.stacked + 1], held[self.stacked + 1 :]
        run = next(run for run in self.bands[leading] if all(c.start in r for c, r in zip(columns, run, strict=True)))
        inside = tuple(slice(c.start - r.start, c.stop - r.start) for c, r in zip(columns, run, strict=True))
        return found[leading, run][(..., *inside)]

    def array(self, fill: "Filling", slabs: Iterator[Slab]) -> jax.Array:
        """Puts the weight on the devices, slab by slab, and holds none of them once the next one is asked for."""
        for slab in slabs:
            fill.write(slab)
            del slab
        return jax.make_array_from_single_device_arrays(self.shape, self.sharding, fill.parts(), dtype=self.dtype)


def joined(runs: list[tuple[range, ...]]) -> list[tuple[range, ...]]:
    """Returns runs of columns, with adjacent ones joined; there is at most one axis of columns."""
    merged: list[tuple[range, ...]] = []
    for run in sorted(runs, key=lambda run: [r.start for r in run]):
        if run and merged and merged[-1][0].stop == run[0].start:
            merged[-1] = (range(merged[-1][0].start, run[0].stop),)
        else:
            merged.append(run)
    return merged


def all_finite(values: Float[np.ndarray, "..."]) -> bool:
    """Returns whether floats hold no NaN and no infinity, by their exponents' bits, which is many times as fast as by value."""
    bits = values.reshape(-1).view(f"u{values.itemsize}")
    infinity = np.asarray(np.inf, values.dtype).view(bits.dtype)
    step = 1 << 18  # keeps each compared part in the processor's cache
    return all((bits[i : i + step] & infinity).max() < infinity for i in range(0, len(bits), step))


class Filling(abc.ABC):
    """Arrays of one shape, one on each device, that are written slab by slab."""

    def __init__(self, devices: tuple, shape: tuple[int, ...], dtype):
        self.devices, self.shape, self.dtype = devices, shape, dtype
        self.whole: Any = None  # made at the first slab

    @abc.abstractmethod
    def room(self, ranges: tuple[range, ...]) -> list[np.ndarray]:
        """Returns each device's array for a slab that is yet to be read, of which `write` has nothing to copy; none where slabs
        are arrays of their own."""

    @abc.abstractmethod
    def write(self, slab: Slab) -> None:
        """Writes a slab to its place in every device's array."""

    @abc.abstractmethod
    def parts(self) -> list[jax.Array]:
        """Returns the arrays, in the order of the devices."""

    @staticmethod
    def of(devices: tuple, shape: tuple[int, ...], dtype) -> "Filling":
        """Returns an empty filling of the kind that suits the devices."""
        in_host = bool(devices) and devices[0].platform == "cpu"
        return (HostFilling if in_host else DeviceFilling)(devices, shape, dtype)


class HostFilling(Filling):
    """Arrays for devices whose memory is the host's, which become the devices' own without a copy."""

    def room(self, ranges: tuple[range, ...]) -> list[np.ndarray]:
        if self.whole is None:
            self.whole = [aligned(self.shape, self.dtype) for _ in self.devices]
        return [whole[tuple(slice(r.start, r.stop) for r in ranges)] for whole in self.whole]

    def write(self, slab: Slab) -> None:
        for room, part in zip(self.room(slab.ranges), slab.parts, strict=True):
            if not np.may_share_memory(room, part):  # it was read for another device
                room[...] = part

    def parts(self) -> list[jax.Array]:
        return jax.device_put(self.whole, list(self.devices)) if self.whole else []


class DeviceFilling(Filling):
    """The arrays of all devices as one, device after device along its first axis, so that one program, which writes in place,
    serves them all; or, where one slab is all, that slab."""

    only: Sequence[jax.Array] = ()

    def room(self, ranges: tuple[range, ...]) -> list[np.ndarray]:
        return []

    def write(self, slab: Slab) -> None:
        new = jax.device_put(slab.parts, list(self.devices))
        if new[0].shape == self.shape:
            self.only = jax.block_until_ready(new)
            return
        if self.whole is None:
            self.whole = zeros(self.devices, self.shape, self.dtype)
        at = [r.start for r in slab.ranges] + [0] * (len(self.shape) - len(slab.ranges))
        self.whole = filling(self.devices)(self.whole, abreast(self.devices, new), np.asarray(at, np.int32))
        self.whole.block_until_ready()  # otherwise slabs that wait to be written would pile up

    def parts(self) -> list[jax.Array]:
        return list(self.only) if self.whole is None else side_by_side(self.devices, self.whole)


def aligned(shape: tuple[int, ...], dtype) -> Shaped[np.ndarray, "..."]:
    """Returns an array that begins where XLA wants its own to begin, so that it need not be copied."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def device_sharding(devices: tuple) -> NamedSharding:
    """Returns the sharding of an array whose first axis is as many parts as there are devices."""
    mesh = Mesh(np.asarray(devices), ("device",), axis_types=(jax.sharding.AxisType.Auto,))
    return NamedSharding(mesh, PartitionSpec("device"))


def abreast(devices: tuple, parts: list[Shaped[jax.Array, "n ..."]]) -> Shaped[jax.Array, "_ ..."]:
    """Returns the parts of the devices, all of one shape, as one array."""
    shape = (len(devices) * parts[0].shape[0], *parts[0].shape[1:])
    return jax.make_array_from_single_device_arrays(shape, device_sharding(devices), parts)


def side_by_side(devices: tuple, whole: Shaped[jax.Array, "_ ..."]) -> list[Shaped[jax.Array, "n ..."]]:
    """Returns the parts of the devices of such an array: the inverse of `abreast`."""
    found = {shard.device: shard.data for shard in whole.addressable_shards}
    return [found[device] for device in devices]


def zeros(devices: tuple, part_shape: tuple[int, ...], dtype) -> Shaped[jax.Array, "_ ..."]:
    """Makes zeros of a shape on each device, as one array."""
    shape, sharding = (len(devices) * part_shape[0], *part_shape[1:]), device_sharding(devices)
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)()


@functools.cache
def filling(devices: tuple):
    """Returns the program that writes a slab at the same place of each device's part, in place."""
    sharding = device_sharding(devices)
    each, all_alike = sharding.spec, PartitionSpec()

    def fill(whole, slab, at):
        return jax.lax.dynamic_update_slice(whole, slab, tuple(at))

    mapped = jax.shard_map(fill, mesh=sharding.mesh, in_specs=(each, each, all_alike), out_specs=each)
    return jax.jit(mapped, donate_argnums=0)
