"""Keeps converted copies of checkpoints with orbax: cast, stacked and in chunks, so that they can be read onto any
mesh.

A copy is a folder of the cache, `HASH-DTYPE-FORMAT`. Beside it is a record, `HASH-DTYPE-FORMAT.json`, of the sizes of
its files and the sum of every weight's bits. The record is written last, so a copy without one is ignored. If files and
record do not agree, the copy is made again.
"""

import contextlib
import dataclasses
import functools
import gc
import json
import logging
import math
import pathlib
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from refusal_jax.checkpoints.fingerprint import checkpoint_fingerprint
from refusal_jax.checkpoints.places import Place, abreast, device_sharding
from refusal_jax.errors import UserError
from refusal_jax.files import local_path, to_json
from refusal_jax.stores import explained, is_in_store, open_store

LOG = logging.getLogger(__name__)

FORMAT = 1  # of the copies: changes when the decoder's weights or their layout do
AT_A_TIME = 64 << 20  # bytes that a process writes at a time besides one weight
CHUNK = 32 << 20  # bytes that are stored together


@dataclasses.dataclass(frozen=True)
class ConvertedCopy:
    """The copy of one checkpoint in a cache, whether it is there or not. folder: its path or address."""

    folder: str

    @classmethod
    def of(cls, cache: str, checkpoint: pathlib.Path, dtype: str) -> "ConvertedCopy":
        """Names the copy of a checkpoint folder's weights as `dtype`. cache: a folder or an address."""
        root = cache.rstrip("/") if "://" in cache else str(local_path(cache).absolute())
        return cls(f"{root}/{checkpoint_fingerprint(checkpoint)[:24]}-{dtype}-{FORMAT}")

    @property
    def cache(self) -> str:
        """Returns the folder or address of the cache."""
        return self.folder.rpartition("/")[0]

    @property
    def record(self) -> str:
        """Returns the path or address of the record."""
        return f"{self.folder}.json"

    def weights(self, places: dict[str, Place], convert: Callable[[], dict[str, jax.Array]]) -> dict[str, jax.Array]:
        """Returns the weights by path: from the copy or, if there is no good one, from `convert`, leaving a copy.

        All processes must call this. Raises UserError if the cache cannot be written.
        """
        with self._writing():
            files, cache = open_store(self.cache)
            files.makedirs(cache, exist_ok=True)
            there, recorded = (is_in_store(files, open_store(path)[1]) for path in (self.folder, self.record))
        wrong = "it is not whole" if agreed(there) else None
        if agreed(recorded):
            weights, wrong = self._read(places)
            if weights is not None:
                return weights
        if wrong and jax.process_index() == 0:
            LOG.warning(f"{self.folder} cannot be used ({wrong}): it is made again.")
        weights = convert()
        with self._writing():
            self._write(weights)
        return weights

    def _read(self, places: dict[str, Place]) -> tuple[dict[str, jax.Array] | None, str | None]:
        """Returns the copy's weights, or what is wrong with it."""
        weights, record, wrong = {}, {}, None
        try:
            files, place = open_store(self.record)
            record = json.loads(files.cat_file(place))
            if record["files"] != self._files():
                raise ValueError("its files are not those that were written")
            abstract = {
                path: jax.ShapeDtypeStruct(place.shape, place.dtype, sharding=place.sharding)
                for path, place in places.items()
            }
            # One at a time, as orbax holds twice what it reads at once; large ones while little is there yet.
            for path in sorted(abstract, key=lambda path: -math.prod(abstract[path].shape)):
                with settings():
                    weights |= ocp.load(self.folder, {path: abstract[path]})
                jax.block_until_ready(weights[path])
                gc.collect()  # what orbax read is part of cycles
            weights = {path: weights[path] for path in places}
        except Exception as error:  # orbax and its dependencies raise many types
            wrong = " ".join(str(error).split())[:200] or type(error).__name__
        if not agreed(wrong is None):
            return None, wrong or "another process could not read it"
        if bit_sums(weights) != record["sums"]:
            return None, "its values are not those that were written"
        return weights, None

    def _write(self, weights: dict[str, jax.Array]) -> None:
        first = jax.process_index() == 0
        files, cache = open_store(self.cache)
        if first:
            for path in files.ls(cache, detail=False):
                if path.endswith(self.record.rpartition("/")[2]):
                    files.rm_file(path)
                elif f"{self.folder.rpartition('/')[2]}.orbax-checkpoint-tmp" in path:  # left by a run that was killed
                    files.rm(path, recursive=True)
        with settings(largest_share(weights.values())):
            ocp.save(self.folder, weights, overwrite=True)
        sums = bit_sums(weights)
        if first:
            record = to_json({"files": self._files(), "sums": sums})
            files.pipe_file(open_store(self.record)[1], record)

    def _files(self) -> dict[str, int]:
        """Returns the sizes of the copy's files by their path in its folder."""
        files, place = open_store(self.folder)
        return {path.removeprefix(place): entry["size"] for path, entry in files.find(place, detail=True).items()}

    @contextlib.contextmanager
    def _writing(self):
        """Turns a failure in the cache into a UserError."""
        try:
            with explained(self.cache) if "://" in self.cache else contextlib.nullcontext():
                yield
        except UserError:
            raise
        except Exception as error:  # of a file system, or from below orbax
            raise UserError(
                f"The copy {self.folder} could not be written ({' '.join(str(error).split())[:300]}). Free space, or set "
                "config.cache to another folder, or to '' for no copy."
            ) from None


def largest_share(arrays: Iterable[jax.Array]) -> int:
    """Returns the most bytes that this process holds of one of the arrays."""
    return max((sum(shard.data.nbytes for shard in array.addressable_shards) for array in arrays), default=0)


@contextlib.contextmanager
def settings(largest: int = 0):
    """Keeps orbax within bounds of memory, and without its own reports of what it also raises. Weights do not compress; rows
    beyond a vocabulary come and go with the mesh. largest: the most bytes that are written at a time, which must fit the bounds.
    """
    context = ocp.Context()
    context.memory.write_concurrent_bytes = context.memory.transfer_concurrent_bytes = largest + AT_A_TIME
    context.pytree.loading.partial_load = True
    context.memory.deepcopy_host_arrays = False
    context.array.saving.use_compression = False
    context.array.saving.storage_options.chunk_byte_size = CHUNK
    context.array.loading.enable_padding_and_truncation = True
    log = logging.getLogger("absl")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        with context:
            yield
    finally:
        log.setLevel(level)


def agreed(ok: bool) -> bool:
    """Returns whether the value is true in every process."""
    return bool(multihost_utils.process_allgather(np.asarray(ok)).all())


def bit_sums(weights: dict[str, jax.Array]) -> dict[str, int]:
    """Sums every weight's values, read as whole numbers, modulo 2**32. The sum is the same on every mesh, as rows of zeros add
    nothing, and another one if any bit differs."""
    own = []
    for weight in weights.values():
        shards = weight.addressable_shards
        devices, parts = tuple(shard.device for shard in shards), [shard.data for shard in shards]
        in_host = devices and devices[0].platform == "cpu"
        sums = host_sums(parts) if in_host else np.asarray(device_sums(devices)(abreast(devices, parts)))
        own.append(sum(int(s) for s, shard in zip(sums, shards, strict=True) if not shard.replica_id) % 2**32)
    everywhere = multihost_utils.process_allgather(np.asarray(own, np.uint32)).reshape(-1, len(own))
    totals = everywhere.astype(np.uint64).sum(axis=0) % 2**32
    return {path: int(total) for path, total in zip(weights, totals, strict=True)}


def host_sums(parts: list[jax.Array]) -> list[int]:
    """Sums parts that are in the host's memory, where XLA would copy them, as it does not fuse sums on a CPU."""
    return [int(np.asarray(p).view(f"u{p.dtype.itemsize}").sum(dtype=np.uint32)) for p in parts]


@functools.cache
def device_sums(devices: tuple):
    """Returns the program that sums the part of each device, `[devices]`."""
    sharding = device_sharding(devices)

    def total(part):
        bits = jax.lax.bitcast_convert_type(part, jnp.dtype(f"uint{part.dtype.itemsize * 8}"))
        return jnp.sum(bits, dtype=jnp.uint32)[None]

    return jax.jit(jax.shard_map(total, mesh=sharding.mesh, in_specs=sharding.spec, out_specs=sharding.spec))
