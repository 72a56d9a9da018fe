"""Compares the tensors in the files of two checkpoints: their names, shapes and dtypes by the headers, and their bytes by hashes.

Each file is read once, and the base's tensors up to their first difference. Where only the dtypes of two tensors differ, their
values are compared as the narrower of the two.
"""

import dataclasses
import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from refusal_jax.audit.broken import BrokenCheckpoint
from refusal_jax.checkpoints.adapters import AdaptedTensor, adapter_parts
from refusal_jax.checkpoints.fingerprint import file_hashes
from refusal_jax.checkpoints.places import all_finite
from refusal_jax.checkpoints.safetensors import BITS, LocalFile, reading
from refusal_jax.checkpoints.tensor_files import TensorFiles
from refusal_jax.checkpoints.tensors import STORED, PlainTensor
from refusal_jax.models.config import ModelConfig
from refusal_jax.models.families import TABLES, is_spare
from refusal_jax.progress import Progress

CHUNK = 4 << 20  # bytes that are hashed at a time, by each thread
THREADS = 4
MOST_BYTES = 100 << 30  # of both checkpoints, beyond which bytes are not compared here


@dataclasses.dataclass(frozen=True)
class TensorNames:
    """How the tensors of a candidate differ from the base's by their headers.

    common: names that both hold. missing, extra: names that only the base, or only the candidate, holds, but for what a
    checkpoint may hold or not (a tied unembedding, constants). reshaped: common names of another shape. dtypes: how many
    common tensors have which pair of dtypes, where they differ. renamed: how many have another name in the candidate's files than
    in the base's. biases: those of `extra` that are biases. vocabulary: the rows of both embeddings, if they differ.
    """

    common: Sequence[str]
    missing: Sequence[str]
    extra: Sequence[str]
    reshaped: Sequence[str]
    dtypes: dict[tuple[str, str], int]
    renamed: int
    biases: Sequence[str]
    vocabulary: tuple[int, int] | None


@dataclasses.dataclass(frozen=True)
class TensorBytes:
    """How the bytes of the common tensors differ.

    sha256: of the candidate's tensors, by name, where they were hashed. changed: those that differ, in their shapes, too. recast:
    those that hold the base's values in another dtype. uncompared: those that are quantised in one of the two. left_out: why
    bytes were not compared, or "".
    """

    sha256: dict[str, str] = dataclasses.field(default_factory=dict)
    changed: Sequence[str] = ()
    recast: Sequence[str] = ()
    uncompared: Sequence[str] = ()
    left_out: str = ""
    bytes_read: int = 0

    @property
    def digest(self) -> str:
        """Returns one sha256 of all tensors, whatever files they are in; "" where they were not hashed."""
        lines = "".join(f"{name} {sha256}\n" for name, sha256 in sorted(self.sha256.items()))
        return hashlib.sha256(lines.encode()).hexdigest() if lines else ""


def compare_names(cfg: ModelConfig, base: TensorFiles, candidate: TensorFiles) -> TensorNames:
    """Returns how the tensors differ by their headers, under the names of their families' tables. cfg: the candidate's."""
    ours, theirs = base.tensors, candidate.tensors
    common = [name for name in ours if name in theirs]
    missing = sorted(name for name in ours.keys() - theirs.keys() if not _idle(cfg, name))
    extra = sorted(name for name in theirs.keys() - ours.keys() if not _idle(cfg, name))
    reshaped = sorted(name for name in common if ours[name].shape != theirs[name].shape)
    plain = [n for n in common if isinstance(ours[n], PlainTensor) and isinstance(theirs[n], PlainTensor)]
    pairs = Counter((ours[n].dtype, theirs[n].dtype) for n in plain if ours[n].dtype != theirs[n].dtype)
    renamed = sum(base.written.get(n, n) != candidate.written.get(n, n) for n in common)
    embed = TABLES[cfg.family]["embed"]
    rows = tuple(files[embed].shape[0] for files in (ours, theirs) if embed in files)
    vocabulary = (rows[0], rows[1]) if len(set(rows)) == 2 else None
    biases = [name for name in extra if name.endswith("bias")]
    return TensorNames(common, missing, extra, reshaped, dict(pairs), renamed, biases, vocabulary)


def _idle(cfg: ModelConfig, name: str) -> bool:
    """Returns whether a tensor makes no difference to what the text model computes, so that either checkpoint may lack it. Other
    parts of a multimodal model do count."""
    return is_spare(cfg, name) and (name == TABLES[cfg.family]["unembed"] or name.endswith("inv_freq"))


def compare_bytes(base: TensorFiles, candidate: TensorFiles, names: TensorNames) -> TensorBytes:
    """Returns which of the common tensors differ. Raises UserError if a file cannot be read, BrokenCheckpoint for values of the
    candidate that are not finite."""
    if same_files(base, candidate):
        return TensorBytes()
    parts = adapter_parts(candidate.folder)
    if parts is not None and parts[1] == base.folder.absolute():
        adapted = {n: t for n, t in candidate.tensors.items() if isinstance(t, AdaptedTensor) and n in names.common}
        return TensorBytes(changed=sorted(name for name, tensor in adapted.items() if not tensor.change.idle))
    plain = [n for n in names.common if all(isinstance(f.tensors[n], PlainTensor) for f in (base, candidate))]
    if not plain and _same_hashes(base, candidate):
        return TensorBytes()
    if not plain:
        return TensorBytes(
            left_out="The weights are not stored as plain numbers in both, so their bytes cannot be compared."
        )
    if not all(isinstance(file, LocalFile) for files in (base, candidate) for file in files.handles.values()):
        return TensorBytes(left_out="The weights are not on this machine, so their bytes were not compared.")
    total = sum(files.tensors[name].nbytes for files in (base, candidate) for name in plain)
    if total > MOST_BYTES:
        size = f"{total / 2**30:.0f} GiB"
        return TensorBytes(left_out=f"The two hold {size}, so bytes were not compared; the lane 'weights' reads them.")
    alike = [n for n in plain if _kind(base, n) == _kind(candidate, n)]
    cast = [n for n in plain if _kind(base, n) != _kind(candidate, n) and n not in names.reshaped]
    cast = [n for n in cast if all(files.tensors[n].dtype in STORED for files in (base, candidate))]
    with Progress("comparing tensors", total, "B", delay=2.0) as bar, ThreadPoolExecutor(THREADS) as pool:
        looked = list(pool.map(lambda name: _hash_and_compare(base, candidate, name, bar.update), alike))
        same = dict(
            zip(cast, pool.map(lambda name: _same_values(base, candidate, name, bar.update), cast), strict=True)
        )
    hashes = {n: sha256 for n, (sha256, _) in zip(alike, looked, strict=True)}
    recast = [n for n in cast if same[n]]
    kept = {n for n, (_, equal) in zip(alike, looked, strict=True) if equal} | set(recast)
    changed = sorted(n for n in plain if n not in kept)
    return TensorBytes(hashes, changed, recast, sorted(set(names.common) - set(plain)), bytes_read=total)


def _same_hashes(base: TensorFiles, candidate: TensorFiles) -> bool:
    """Returns whether the files of both, such as GGUF files, have the same contents. Each is hashed whole, once."""
    paths = [sorted(files.handles) for files in (base, candidate)]
    if len(paths[0]) != len(paths[1]) or [p.stat().st_size for p in paths[0]] != [p.stat().st_size for p in paths[1]]:
        return False
    found = [[hash for one in part for hash in file_hashes(one.parent, [one]).values()] for part in paths]
    return found[0] == found[1] and base.tensors.keys() == candidate.tensors.keys()


def same_files(base: TensorFiles, candidate: TensorFiles) -> bool:
    """Returns whether both read the very same files on the disk."""
    real = [sorted(os.path.realpath(path) for path in files.handles) for files in (base, candidate)]
    return (
        real[0] == real[1]
        and bool(real[0])
        and all(type(t) is type(base.tensors.get(n)) for n, t in candidate.tensors.items())
    )


def _kind(files: TensorFiles, name: str) -> tuple:
    tensor = files.tensors[name]
    return tensor.dtype, tensor.shape


def _hash_and_compare(
    base: TensorFiles, candidate: TensorFiles, name: str, done: Callable[[int], None]
) -> tuple[str, bool]:
    """Returns the sha256 of a tensor's bytes in the candidate, and whether they are the base's, which is read up to the first
    difference. Raises BrokenCheckpoint for values of the candidate that are not finite."""
    ours, theirs = base.tensors[name], candidate.tensors[name]
    assert isinstance(ours, PlainTensor) and isinstance(theirs, PlainTensor), "whoever calls this has looked"
    digest, same = hashlib.sha256(), True
    buffers = [np.empty(min(CHUNK, theirs.nbytes), np.uint8) for _ in range(2)]
    for start in range(0, theirs.nbytes, CHUNK):
        part, other = (buffer[: min(CHUNK, theirs.nbytes - start)] for buffer in buffers)
        _read(theirs, start, part)
        digest.update(part.data)
        if theirs.dtype in STORED and not all_finite(part.view(STORED[theirs.dtype])):
            raise BrokenCheckpoint(
                f"{candidate.folder} holds NaN or infinite values in {name}. The checkpoint is damaged: download it again."
            )
        if same:
            _read(ours, start, other)
            same = np.array_equal(part, other)
        done(2 * len(part))
    return digest.hexdigest(), same


def _read(tensor: PlainTensor, start: int, out: np.ndarray) -> None:
    """Fills an array with a tensor's bytes from byte `start` on."""
    with reading(tensor.path):
        tensor.file.read_into([tensor.extent.start + start], len(out), out.data)


def _same_values(base: TensorFiles, candidate: TensorFiles, name: str, done: Callable[[int], None]) -> bool:
    """Returns whether two tensors of one shape hold the same values as the narrower of their dtypes."""
    pair = base.tensors[name], candidate.tensors[name]
    narrow = STORED[min((one.dtype for one in pair), key=lambda dtype: BITS[dtype])]
    shape, same = pair[0].shape, True
    step = max(CHUNK // max(4 * int(np.prod(shape[1:])), 1), 1)
    for start in range(0, shape[0] if shape else 1, step):
        index = (slice(start, min(start + step, shape[0])),) if shape else ()
        before, after = (files.read(name, index).astype(narrow) for files in (base, candidate))
        same = same and np.array_equal(before, after)
    done(sum(one.nbytes for one in pair))
    return same


def in_words(names: Iterable[str], most: int = 6) -> str:
    """Returns many names of tensors in a few words, with the layers of each kind: "self_attn.o_proj.weight of layers 0 to 3"."""
    kinds: dict[str, list[int]] = {}
    for name in names:
        number = re.search(r"\.(\d+)\.", name)
        kind = re.sub(r"\.\d+(?=\.)", ".*", name[number.end() :] if number else name)
        kinds.setdefault(kind, []).extend([int(number[1])] if number else [])
    told = [kind + (f" of layers {_ranges(sorted(set(layers)))}" if layers else "") for kind, layers in kinds.items()]
    return "; ".join(told[:most]) + (f"; and {len(told) - most} other kinds" if len(told) > most else "")


def _ranges(numbers: Sequence[int]) -> str:
    """Returns sorted numbers with runs cut short, such as "0 to 3, 7"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(f"{a} to {b}" if b > a else str(a) for a, b in runs)
