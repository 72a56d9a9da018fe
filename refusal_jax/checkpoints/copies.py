"""Converted copies of checkpoints, kept by orbax: cast, stacked and in chunks, to be read again onto any mesh.

A copy is a folder of the cache, `HASH-DTYPE`, with beside it a record, `HASH-DTYPE.json`: the sizes of its files and the
sum of every weight's bits. The record is written last, so that without it a copy counts for nothing. Both must agree
with what is there, else the copy is made again.
"""

import contextlib
import dataclasses
import functools
import gc
import json
import logging
import math
import sys
from collections.abc import Callable

import fsspec
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp
from tqdm import tqdm

from refusal_jax.checkpoints.fingerprint import checkpoint_fingerprint
from refusal_jax.checkpoints.places import Place, abreast, device_sharding
from refusal_jax.checkpoints.remote import explained
from refusal_jax.errors import UserError
from refusal_jax.files import local_path, to_json

FORMAT = 1  # of the copies: changes when the decoder's weights or their layout do
AT_A_TIME = 64 << 20  # bytes that a process writes at a time besides one weight
CHUNK = 32 << 20  # bytes that are stored together


@dataclasses.dataclass(frozen=True)
class Cached:
    """The place of one checkpoint's copy in a cache, whether it is there or not."""

    folder: epath.Path

    @classmethod
    def of(cls, cache: str, checkpoint, dtype: str) -> "Cached":
        """The copy of a checkpoint folder's weights as `dtype`; cache: a folder or an address."""
        root = cache if "://" in cache else local_path(cache).absolute()
        return cls(epath.Path(root) / f"{checkpoint_fingerprint(checkpoint)[:24]}-{dtype}-{FORMAT}")

    @property
    def record(self) -> epath.Path:
        return self.folder.parent / f"{self.folder.name}.json"

    def weights(self, places: dict[str, Place], convert: Callable[[], dict[str, jax.Array]]) -> dict[str, jax.Array]:
        """The weights by path: from the copy or, if there is no good one, from `convert`, leaving a copy.

        All processes must call this. Raises UserError if the cache cannot be written.
        """
        with self._writing():
            self.folder.parent.mkdir(parents=True, exist_ok=True)
        wrong = "it is not whole" if agreed(self.folder.exists()) else None
        if agreed(self.record.exists()):
            weights, wrong = self._read(places)
            if weights is not None:
                return weights
        if wrong and jax.process_index() == 0:
            tqdm.write(f"{self.folder} cannot be used ({wrong}): it is made again.", file=sys.stderr)
        weights = convert()
        with self._writing():
            self._write(weights)
        return weights

    def _read(self, places: dict[str, Place]) -> tuple[dict[str, jax.Array] | None, str | None]:
        """The copy's weights, or what is wrong with it."""
        weights, record, wrong = None, {}, None
        try:
            record = json.loads(self.record.read_text())
            if record["files"] != self._files():
                raise ValueError("its files are not those that were written")
            abstract = {
                path: jax.ShapeDtypeStruct(place.shape, place.dtype, sharding=place.sharding)
                for path, place in places.items()
            }
            weights = dict.fromkeys(abstract)
            # One at a time, as orbax holds twice what it reads at once; large ones while little is there yet.
            for path in sorted(abstract, key=lambda path: -math.prod(abstract[path].shape)):
                with settings():
                    weights |= ocp.load(self.folder, {path: abstract[path]})
                jax.block_until_ready(weights[path])
                gc.collect()  # what orbax read is part of cycles
        except Exception as error:  # orbax and what is below it raise many kinds
            wrong = " ".join(str(error).split())[:200] or type(error).__name__
        if not agreed(wrong is None):
            return None, wrong or "another process could not read it"
        if bit_sums(weights) != record["sums"]:
            return None, "its values are not those that were written"
        return weights, None

    def _write(self, weights: dict[str, jax.Array]) -> None:
        first = jax.process_index() == 0
        if first:
            self.record.unlink(missing_ok=True)
            for left in self.folder.parent.glob(
                f"{self.folder.name}.orbax-checkpoint-tmp*"
            ):  # of a run that was killed
                left.rmtree()
        shares = [sum(shard.data.nbytes for shard in weight.addressable_shards) for weight in weights.values()]
        with settings(max(shares)):
            ocp.save(self.folder, weights, overwrite=True)
        sums = bit_sums(weights)
        if first:
            self.record.write_text(to_json({"files": self._files(), "sums": sums}).decode())

    def _files(self) -> dict[str, int]:
        """Sizes of the copy's files; by fsspec, as epath forgets the kind of address where it walks folders."""
        files, place = fsspec.core.url_to_fs(str(self.folder))
        files.invalidate_cache()
        return {path.removeprefix(place): entry["size"] for path, entry in files.find(place, detail=True).items()}

    @contextlib.contextmanager
    def _writing(self):
        """Turns what fails in the cache into a UserError."""
        try:
            with explained(str(self.folder.parent)) if "://" in str(self.folder) else contextlib.nullcontext():
                yield
        except UserError:
            raise
        except Exception as error:  # of a file system, or from below orbax
            raise UserError(
                f"The copy {self.folder} could not be written ({' '.join(str(error).split())[:300]}). Free space, or set "
                "config.cache to another folder, or to '' for no copy."
            ) from None


@contextlib.contextmanager
def settings(largest: int = 0):
    """Orbax within bounds of memory, and without its own reports of what it also raises. Weights do not compress; rows
    beyond a vocabulary come and go with the mesh. largest: bytes of what is written at a time, which must fit the bounds.
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
    """Whether it is so for every process."""
    return bool(multihost_utils.process_allgather(np.asarray(ok)).all())


def bit_sums(weights: dict[str, jax.Array]) -> dict[str, int]:
    """The sum of every weight's values, read as whole numbers, modulo 2**32: the same on every mesh, as rows of zeros add
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
    """Of parts that are in the host's memory: XLA would copy them there, as it does not fuse sums on a CPU."""
    return [np.asarray(p).view(f"u{p.dtype.itemsize}").sum(dtype=np.uint32) for p in parts]


@functools.cache
def device_sums(devices: tuple):
    """The program of `bit_sums` for the parts of each device, `[devices]`."""
    sharding = device_sharding(devices)

    def total(part):
        bits = jax.lax.bitcast_convert_type(part, jnp.dtype(f"uint{part.dtype.itemsize * 8}"))
        return jnp.sum(bits, dtype=jnp.uint32)[None]

    return jax.jit(jax.shard_map(total, mesh=sharding.mesh, in_specs=sharding.spec, out_specs=sharding.spec))
