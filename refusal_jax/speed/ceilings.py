"""Measures what this machine can do, to hold the parts of a study against: a large matrix product, a pass over a large array, and
reading and writing files.

Each is the best of several tries, since other work on the machine can only slow one down.
"""

import contextlib
import dataclasses
import math
import os
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from refusal_jax.checkpoints.tensor_files import TensorFiles
from refusal_jax.files import cannot_write
from refusal_jax.progress import each

TRIES = 5
SIDE, LARGE_SIDE = 2048, 8192  # of the matrices, on a CPU and elsewhere
ARRAY_OF_HOST = 256 << 20  # bytes of the array on a CPU, shared by its devices: more than its caches hold
LARGE_ARRAY = 2 << 30  # and on each other device
PART = 8 << 20  # bytes that are read from a file or written to one at a time
READERS = 4  # threads, as in loading
WRITTEN = 1 << 30  # bytes of the test file, at most


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """The most a machine does in a second, all devices together: operations of a large matrix product by kind (as in `Work`),
    and bytes of devices' memory, of reading a checkpoint's files, and of writing one; 0 where that was not measured."""

    flops: dict[str, float]
    memory: float
    read: float = 0.0
    write: float = 0.0


def measure(kinds: Iterable[str], devices: list, files: list[pathlib.Path], folder: pathlib.Path | None) -> Ceilings:
    """Returns the ceilings. kinds: of products. files: to read. folder: to write to. Nothing is read or written without them."""
    mesh = Mesh(np.asarray(devices), ("all",))
    parts: list[tuple[str, Callable[[], float]]] = [(kind, lambda kind=kind: product(mesh, kind)) for kind in kinds]
    parts.append(("memory", lambda: memory(mesh)))
    if files:
        parts.append(("read", lambda: reading(files)))
    if folder is not None:
        parts.append(("write", lambda: writing(folder, sum(path.stat().st_size for path in files) or WRITTEN)))
    found = {name: work() for name, work in each(parts, "ceilings", "ceiling")}
    rest = {name: found.pop(name) for name in ("memory", "read", "write") if name in found}
    return Ceilings(found, **rest)


def best(work: Callable[[], object], tries: int = TRIES) -> float:
    """Returns the seconds of the fastest of several runs, after one that is not counted."""
    jax.block_until_ready(work())
    found = []
    for _ in range(tries):
        start = time.perf_counter()
        jax.block_until_ready(work())
        found.append(time.perf_counter() - start)
    return min(found)


def product(mesh: Mesh, kind: str) -> float:
    """Returns the operations a second of a product of square matrices on every device at once."""
    dtype, _, precision = kind.partition(" ")
    side = SIDE if mesh.devices.flat[0].platform == "cpu" else LARGE_SIDE
    spec = PartitionSpec("all")
    (a, b) = _filled(mesh, (mesh.size, side, side), jnp.dtype(dtype), 2)

    def multiply(a, b):
        return jnp.matmul(a[0], b[0], precision=precision or None)[None]

    run = jax.jit(jax.shard_map(multiply, mesh=mesh, in_specs=spec, out_specs=spec))
    return 2.0 * side**3 * mesh.size / best(lambda: run(a, b))


def memory(mesh: Mesh) -> float:
    """Returns the bytes a second of a pass over a large array: the faster of a scaled copy and a product with a vector, which
    only reads, as decoding does."""
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    size = ARRAY_OF_HOST // mesh.size if on_cpu else LARGE_ARRAY
    (x,) = _filled(mesh, (mesh.size, size // 4 // 1024, 1024), jnp.dtype(jnp.float32), 1)
    vector = jnp.ones(1024)
    copy, read = jax.jit(lambda x: x * 2), jax.jit(lambda x: x @ vector)
    return max(2 * x.nbytes / best(lambda: copy(x)), x.nbytes / best(lambda: read(x)))


def _filled(mesh: Mesh, shape: tuple[int, ...], dtype, count: int) -> list[jax.Array]:
    """Returns arrays of random numbers, a part on each device: zeros need less power, and some devices run faster then."""
    sharding = NamedSharding(mesh, PartitionSpec("all"))

    def fill(key):
        return [jax.random.uniform(one, shape, jnp.float32).astype(dtype) for one in jax.random.split(key, count)]

    return jax.jit(fill, out_shardings=sharding)(jax.random.key(0))


def evict(files: Iterable[pathlib.Path]) -> bool:
    """Asks the system to forget what it has in memory of files, and returns whether it can be asked."""
    if not hasattr(os, "posix_fadvise"):
        return False
    for path in files:
        with contextlib.suppress(OSError):
            file = os.open(path, os.O_RDONLY)
            try:
                os.fsync(file)  # what is not on the disk yet cannot be forgotten
                os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(file)
    return True


def reading(files: list[pathlib.Path]) -> float:
    """Returns the bytes a second of reading files that the system does not hold in memory, by several threads."""

    def part(job: tuple[pathlib.Path, int]) -> int:
        path, start = job
        with open(path, "rb", buffering=0) as file:
            file.seek(start)
            return len(file.read(PART))

    jobs = [(path, start) for path in files for start in range(0, path.stat().st_size, PART)]
    found = []
    for _ in range(2):
        evict(files)
        start = time.perf_counter()
        with ThreadPoolExecutor(READERS) as pool:
            total = sum(pool.map(part, jobs))
        found.append(total / (time.perf_counter() - start))
    return max(found)


def writing(folder: pathlib.Path, size: int) -> float:
    """Returns the bytes a second of writing a file, until they are on the disk. Raises UserError if there is no room for it."""
    size, block, found = min(size, WRITTEN), os.urandom(PART), []
    for _ in range(2):
        try:
            with tempfile.NamedTemporaryFile(dir=folder) as file:
                start = time.perf_counter()
                for _ in range(math.ceil(size / PART)):
                    file.write(block)
                file.flush()
                os.fsync(file.fileno())
                found.append(math.ceil(size / PART) * PART / (time.perf_counter() - start))
        except OSError as error:
            raise cannot_write(folder, error) from None
    return max(found)


def weight_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """Returns the files of a checkpoint's weights that are on this machine, and not streamed from elsewhere. Raises UserError for
    files that cannot be read."""
    return [path for path in TensorFiles.open(folder).handles if path.is_file()]
