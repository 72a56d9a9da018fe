"""Loads an HF checkpoint into a sharded decoder, and saves a decoder as one.

Every process reads only the slices that its own devices hold, each byte once, straight onto the devices, so that no host
ever holds the model. Whatever is wrong with a checkpoint's tensors is one error (`check`), and so are values that are not
finite.
"""

import itertools
import logging
import pathlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from safetensors.numpy import save_file

from refusal_jax.checkpoints.check import check_tensors
from refusal_jax.checkpoints.places import Place, Slab
from refusal_jax.checkpoints.remote import checkpoint_folder
from refusal_jax.checkpoints.tensor_files import SINGLE, TensorFiles
from refusal_jax.checkpoints.tensors import listed
from refusal_jax.errors import UserError, did_you_mean
from refusal_jax.models.config import ModelConfig
from refusal_jax.models.decoder import Decoder
from refusal_jax.models.families import Piece, hf_names, hf_shapes, pieces
from refusal_jax.models.hf_config import load_config
from refusal_jax.models.sharding import split_for
from refusal_jax.models.weights import weight_table
from refusal_jax.progress import Progress

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}
LOG = logging.getLogger(__name__)

READERS = 4  # number of threads, each with one slab in memory


def check_dtype(dtype: str) -> None:
    """Raises UserError for a name that is none of `DTYPES`."""
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}.{did_you_mean(dtype, DTYPES)}")


def load_decoder(
    folder: str | pathlib.Path, dtype: str = "float32", mesh=None, progress: bool = False, cache: str = ""
) -> Decoder:
    """Loads the decoder of an HF checkpoint, its weights read slice by slice straight into arrays sharded over `mesh`.

    folder: a folder, or an address such as gs://bucket/folder. dtype: "float32", "bfloat16" or "float16", what the weights
    are cast to. cache: a folder or address of converted copies, of which this checkpoint's is read instead if it is there, and
    else is made; "": none. All processes must call this, with a cache that all of them see. Raises UserError for anything
    wrong with the folder, its config or its tensors (all tensors' problems in one error), for NaN or infinite weights, and
    for a cache that cannot be written.
    """
    folder = checkpoint_folder(folder)
    check_dtype(dtype)
    cfg = load_config(folder)
    mesh = split_for(mesh, cfg.n_kv_heads)
    found: dict[str, dict[tuple, Piece]] = {}
    for piece in pieces(cfg):
        found.setdefault(piece.path, {})[piece.index] = piece
    places = {
        path: Place(mesh, weight, found[path], weight.stored_as(DTYPES[dtype]))
        for path, weight in weight_table(cfg).items()
    }
    if not cache:
        return Decoder(cfg, read_weights(folder, cfg, places, progress), mesh)
    from refusal_jax.checkpoints.copies import ConvertedCopy  # imported late: orbax is slow to import

    copy = ConvertedCopy.of(cache, folder, dtype)
    return Decoder(cfg, copy.weights(places, lambda: read_weights(folder, cfg, places, progress)), mesh)


def read_weights(
    folder: pathlib.Path, cfg: ModelConfig, places: dict[str, Place], progress: bool = False
) -> dict[str, jax.Array]:
    """Reads the decoder's weights from a checkpoint's tensors, by path. Raises UserError as `load_decoder` does."""
    weights, finite, error = {}, {}, None
    try:
        weights, finite = read_share(folder, cfg, places, progress)
    except UserError as own:
        error = own  # after the others know
    flags = np.asarray([error is None, *(finite.get(path, False) for path in places)])
    flags = multihost_utils.process_allgather(flags).reshape(-1, len(flags))
    if error:
        raise error
    if not flags[:, 0].all():
        raise UserError(f"Process {flags[:, 0].argmin()} could not read its part of {folder}: see what it says.")
    bad = [
        f"{path} (one or more of {', '.join(hf_names(cfg, path)[:2])}, …)"
        for path, ok in zip(places, flags[:, 1:].all(axis=0), strict=True)
        if not ok
    ]
    if bad:
        dtype = weights["embed"].dtype
        raise UserError(
            f"{folder} holds NaN or infinite weights (as {dtype}): {listed(bad)}. The checkpoint "
            "is damaged, or its values do not fit this dtype: try bfloat16 or float32."
        )
    return weights


def read_share(
    folder: pathlib.Path, cfg: ModelConfig, places: dict[str, Place], progress: bool
) -> tuple[dict[str, jax.Array], dict[str, bool]]:
    """Reads the weights without waiting for other processes; returns also whether this process's part of each is finite."""
    files = TensorFiles.open(folder)
    check_tensors(cfg, files, (jax.process_index(), jax.process_count()))
    if files.quantisation is not None:
        LOG.info(f"{folder}: {files.quantisation.note}")
    ranges = {path: list(place.slabs()) for path, place in places.items()}
    fills = {path: place.filling() for path, place in places.items()}
    jobs = ((path, slab, fills[path].room(slab)) for path, slabs in ranges.items() for slab in slabs)
    total, before = sum(place.share(files) for place in places.values()), files.bytes_read
    finite = dict.fromkeys(places, True)
    with (
        ThreadPoolExecutor(READERS) as pool,
        Progress("loading weights", total, "B", quiet=not progress) as bar,
    ):
        stream = ahead(pool, lambda job: places[job[0]].read(files, *job[1:]), jobs)

        def watched(path: str) -> Iterator[Slab]:
            for slab in itertools.islice(stream, len(ranges[path])):
                finite[path] &= slab.finite
                bar.update(min(files.bytes_read - before, total) - bar.n)
                yield slab

        return {path: place.array(fills[path], watched(path)) for path, place in places.items()}, finite


def ahead(pool: ThreadPoolExecutor, work: Callable, jobs: Iterable) -> Iterator:
    """Yields the results of `work` on each job, in order, with READERS jobs in hand besides the one that was yielded."""
    waiting = deque()
    for job in jobs:
        waiting.append(pool.submit(work, job))
        if len(waiting) == READERS:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def save_weights(decoder: Decoder, folder: pathlib.Path) -> None:
    """Writes `model.safetensors` in HF's names and layout: `load_decoder` backwards, for models of one file."""
    tensors = hf_tensors(decoder.cfg, jax.device_get(decoder.weights()))
    save_file(dict(sorted(tensors.items())), folder / SINGLE, metadata={"format": "pt"})


def hf_tensors(cfg: ModelConfig, weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns a decoder's weights, which are given by path, in HF's names and layout."""
    shapes, tensors = hf_shapes(cfg), {}
    for piece in pieces(cfg):
        value = np.asarray(weights[piece.path])[piece.index][: len(range(piece.start, piece.stop, piece.step))]
        whole = tensors.setdefault(piece.name, np.empty(shapes[piece.name], value.dtype))
        expert = tuple(slice(i, i + 1) for i in piece.within)
        piece.of(whole[expert], piece.start, piece.stop)[...] = value
    return tensors
