"""Presents the tensors of a GGUF file under HF's names, in HF's layout, and dequantised as they are read.

What llama.cpp's converter did to a checkpoint is undone: it renamed tensors, stacked experts, put the two halves of each head's
rotated rows together (Llama), and added 1 to norms (Gemma). Fused tensors may be fused here or there.
"""

import dataclasses
import itertools
import pathlib
from collections.abc import Iterator

import numpy as np
from gguf.constants import GGMLQuantizationType
from jaxtyping import Float32, Int64, Shaped

from refusal_jax.checkpoints.gguf_blocks import PLAIN, UNPACKED, as_bfloat16, block_of, dequantise
from refusal_jax.checkpoints.gguf_header import GgufHeader, Stored
from refusal_jax.checkpoints.gguf_layouts import BY_HEAD, PERMUTED, PLAIN_NORMS, RATES, Layout
from refusal_jax.checkpoints.safetensors import LocalFile, RangeFile, reading
from refusal_jax.checkpoints.tensors import Tensor, listed
from refusal_jax.errors import UserError
from refusal_jax.models.config import ModelConfig
from refusal_jax.models.families import Piece, hf_shapes, pieces
from refusal_jax.models.mixers.latent import Latent
from refusal_jax.models.structure import structure
from refusal_jax.models.weight import Weight
from refusal_jax.models.weights import weight_table

KEYS = ("k", "v", "k_norm")
CHUNK_VALUES = 1 << 18  # that are dequantised at a time, in float32


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """Rows of a stored tensor: `count` of them from `first` on. head: how many rows of each head are interleaved, 0 for none.
    order, columns: where its rows, counted from `first`, and its columns are stored, None where they are in order. rates: whether
    - exp of the values is stored. transposed: whether these are columns of the stored rows from `first` on, all columns.

    A vector's entries count as rows.
    """

    stored: Stored
    file: RangeFile
    first: int
    count: int
    head: int = 0
    order: Int64[np.ndarray, " n"] | None = None
    columns: Int64[np.ndarray, " n"] | None = None
    rates: bool = False
    transposed: bool = False

    @property
    def width(self) -> int:
        """Returns the number of values in a row."""
        return self.stored.shape[-1] if len(self.stored.shape) > 1 else 1

    @property
    def row_bytes(self) -> int:
        block, size = block_of(self.stored.type)
        return self.width // block * size

    @property
    def nbytes(self) -> int:
        """Returns how many bytes of the file this part is made of."""
        return (self.stored.shape[-2] if self.transposed else self.count) * self.row_bytes

    def spans(self, start: int, stop: int, width: int) -> Iterator[tuple[int, int]]:
        """Yields ranges of rows of which about CHUNK_VALUES values are selected. Of interleaved rows, whole heads are read."""
        step = max(CHUNK_VALUES // max(width, 1), 1)
        if self.head:
            step = -(-step // self.head) * self.head
        while start < stop:
            end = min((start // step + 1) * step, stop)
            yield start, end
            start = end

    def read_into(
        self, rows: tuple[int, int], columns: tuple[int, int], out: Shaped[np.ndarray, "R C"], offset: float
    ) -> int:
        """Reads rows and columns of this part, with `offset` added. Returns how many bytes of the file were read."""
        if self.transposed:
            turned = np.empty((columns[1] - columns[0], rows[1] - rows[0]), np.float32)
            count = dataclasses.replace(self, transposed=False).read_into(columns, rows, turned, offset)
            with np.errstate(over="ignore"):
                out[:] = turned.T
            return count
        if self.columns is not None:
            whole = np.empty((len(out), self.width), np.float32)
            count = dataclasses.replace(self, columns=None).read_into(rows, (0, self.width), whole, offset)
            out[:] = whole[:, self.columns[columns[0] : columns[1]]]
            return count
        if self.order is not None:
            plain, stored = dataclasses.replace(self, order=None), self.order[rows[0] : rows[1]]
            edges = [0, *(np.flatnonzero(np.diff(stored) != 1) + 1).tolist(), len(stored)]
            runs = [(int(stored[a]), int(stored[b - 1]) + 1, out[a:b]) for a, b in itertools.pairwise(edges)]
            return sum(plain.read_into((start, stop), columns, target, offset) for start, stop, target in runs)
        block, size = block_of(self.stored.type)
        left, right = columns[0] // block, -(-columns[1] // block)
        length, whole = (right - left) * size, left == 0 and (right - left) * size == self.row_bytes
        count = 0
        for start, stop in self.spans(*rows, (right - left) * block):
            order = self._order(start, stop)
            low, high = (start, stop) if order is None else (int(order.min()), int(order.max()) + 1)
            data = np.empty((high - low, length), np.uint8)
            begin = self.stored.start + (self.first + low) * self.row_bytes + left * size
            begins, run = ([begin], data.nbytes) if whole else (begin + np.arange(high - low) * self.row_bytes, length)
            count += self.file.read_into(begins, run, data.reshape(-1).data)
            if order is not None:
                data = data[order - low]
            target = out[start - rows[0] : stop - rows[0]]
            if target.dtype == np.float32 and target.shape[1] == (right - left) * block:
                values = target
            else:
                values = np.empty((stop - start, (right - left) * block), np.float32)
            dequantise(self.stored.type, data.reshape(-1, size), values.reshape(-1, block))
            if self.rates:
                np.log(-values, out=values)
            if offset:
                values += offset
            if values is not target:
                values = values[:, columns[0] - left * block : columns[1] - left * block]
                if (
                    target.dtype == PLAIN[GGMLQuantizationType.BF16]
                    and self.stored.type in UNPACKED
                    and not (offset or self.rates)
                ):
                    as_bfloat16(values, target)
                else:
                    with np.errstate(over="ignore"):  # overflows are found and reported once everything is loaded
                        target[:] = values
        return count

    def _order(self, start: int, stop: int) -> Int64[np.ndarray, " n"] | None:
        """Returns where rows are stored that HF has in order, if they are interleaved."""
        if not self.head:
            return None
        rows = np.arange(start, stop)
        heads, inside = rows // self.head, rows % self.head
        return heads * self.head + inside % (self.head // 2) * 2 + inside // (self.head // 2)


@dataclasses.dataclass(frozen=True)
class GgufTensor:
    """A tensor by its HF name, whose rows are those of its parts; a `Tensor` of checkpoints.

    dtype: BF16 where it is dequantised, else as it is stored.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    offset: float = 0.0

    @property
    def dtype(self) -> str:
        stored = {part.stored.type for part in self.parts}
        return stored.pop().name if len(stored) == 1 and stored <= set(PLAIN) else "BF16"

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    @property
    def path(self) -> pathlib.Path:
        return self.parts[0].stored.path

    def read_into(self, index: tuple[slice, ...], out: Shaped[np.ndarray, "..."]) -> int:
        """Reads as `Tensor.read_into` does. Raises UserError if the file cannot be read."""
        spans = [s.indices(n)[:2] for s, n in zip(index, self.shape, strict=False)]
        spans += [(0, n) for n in self.shape[len(spans) :]]
        selected = tuple(max(stop - start, 0) for start, stop in spans)
        if selected != out.shape or not out.flags.c_contiguous:
            raise ValueError(f"{self.name}: an array of shape {out.shape} cannot take {selected}")
        if not out.size:
            return 0
        (start, stop), columns = spans[0], spans[-1] if len(spans) > 1 else (0, 1)
        matrix, count, base = out.reshape(stop - start, -1), 0, 0
        for part in self.parts:
            low, high = max(start, base), min(stop, base + part.count)
            if low < high:
                with reading(part.stored.path):
                    rows = low - base, high - base
                    count += part.read_into(rows, columns, matrix[low - start : high - start], self.offset)
            base += part.count
        return count


@dataclasses.dataclass(frozen=True)
class Woven:
    """A tensor of all experts of a layer by its HF name, made of one or two that GGUF keeps apart; a `Tensor` of checkpoints.

    members: tensors `[experts * rows, columns]`, or of biases `[experts, rows]`, each with the place of its first row and the
    step to the next one among the rows of an expert, and at which of its own rows of an expert it begins. rows: how many each
    member has for an expert. transposed: whether the rows are the tensor's columns.
    """

    name: str
    shape: tuple[int, ...]
    members: tuple[tuple[GgufTensor, int, int, int], ...]
    rows: int
    transposed: bool

    @property
    def dtype(self) -> str:
        found = {tensor.dtype for tensor, *_ in self.members}
        return found.pop() if len(found) == 1 else "BF16"

    @property
    def nbytes(self) -> int:
        return sum({tensor.name: tensor.nbytes for tensor, *_ in self.members}.values())

    @property
    def path(self) -> pathlib.Path:
        return self.members[0][0].path

    def read_into(self, index: tuple[slice, ...], out: Shaped[np.ndarray, "..."]) -> int:
        """Reads as `Tensor.read_into` does. Raises UserError if the file cannot be read."""
        spans = [s.indices(n)[:2] for s, n in zip(index, self.shape, strict=False)]
        spans += [(0, n) for n in self.shape[len(spans) :]]
        selected = tuple(max(stop - start, 0) for start, stop in spans)
        if selected != out.shape:
            raise ValueError(f"{self.name}: an array of shape {out.shape} cannot take {selected}")
        (first, last), *matrix = spans
        (start, stop), *columns = reversed(matrix) if self.transposed else matrix
        count = 0
        for tensor, offset, step, begin in self.members:
            low, high = (min(max(-(-(edge - offset) // step), 0), self.rows) for edge in (start, stop))
            if low >= high:
                continue
            places = slice(offset + step * low - start, offset + step * (high - 1) - start + 1, step)
            if not columns:
                part = np.empty((last - first, high - low), out.dtype)
                count += tensor.read_into((slice(first, last), slice(begin + low, begin + high)), part)
                out[:, places] = part
            for expert in range(first, last) if columns else ():
                part = np.empty((high - low, columns[0][1] - columns[0][0]), out.dtype)
                own = expert * (tensor.shape[0] // self.shape[0]) + begin
                rows = slice(own + low, own + high)
                count += tensor.read_into((rows, slice(*columns[0])), part)
                target = out[expert - first]
                (target.T if self.transposed else target)[places] = part
        return count


def gguf_tensors(
    header: GgufHeader, cfg: ModelConfig, layout: Layout, used: frozenset[str]
) -> tuple[dict[str, Tensor], dict[pathlib.Path, RangeFile]]:
    """Returns the tensors of a GGUF model by HF name, and its open files.

    used: names of tensors that its config was made of. Raises UserError, with everything that is wrong, unless the file holds
    exactly the tensors of the config, in the right shapes.
    """
    with reading(header.paths[0]):
        files: dict[pathlib.Path, RangeFile] = {path: LocalFile(path) for path in header.paths}
    weights, names = weight_table(cfg), layout.names(cfg)
    places = {path: layout.places(names, weights, path) for path in weights}
    tensors: dict[str, list[tuple[Piece, Part]]] = {}
    missing, known, wrong = set(), set(used) | _unneeded(header, cfg), set()
    for piece in pieces(cfg):
        if piece.path == "blocks.latent_kv_up" and (split := _by_head(header, files, cfg, piece)):
            parts, names_of_parts, misshapen = split
            known |= names_of_parts
            wrong |= misshapen
            if f"blk.{piece.layer}.attn_kv_b.weight" not in header.tensors:
                tensors[piece.name] = [(piece, part) for part in parts]
                continue
        found = _place(header, weights, places[piece.path], piece)
        if isinstance(found, str):
            missing.add(found)
            continue
        stored, first, count, expected = found
        known.add(stored.name)
        if _flat(stored, expected).shape != expected:
            wrong.add(f"{stored.name} is {list(stored.shape)}, expected {list(expected)}")
        head = cfg.head_dim if layout.permuted and piece.path in PERMUTED else 0
        order, columns = layout.order(cfg, piece.path), None
        if piece.path == "blocks.delta_o":
            order, columns = None, order
        elif order is not None and layout.by_key_head and piece.path in ("blocks.delta_b", "blocks.delta_a"):
            first = 0
        rates = piece.path in RATES
        part = Part(_flat(stored, expected), files[stored.path], first, count, head, order, columns, rates)
        tensors.setdefault(piece.name, []).append((piece, part))
    groups = (("missing", missing), ("unknown", set(header.tensors) - known), ("misshapen", wrong))
    problems = [f"{len(group)} {what}: {listed(sorted(group))}" for what, group in groups if group]
    if problems:
        raise UserError(
            f"The tensors of {header.paths[0]} do not fit its metadata: {'. '.join(problems)}. The file is of a variant of its "
            "architecture that is not computed here, or damaged. Use the original Hugging Face checkpoint of the model."
        )
    shapes = hf_shapes(cfg)
    return {name: _tensor(name, shapes[name], held, layout) for name, held in tensors.items()}, files


def _unneeded(header: GgufHeader, cfg: ModelConfig) -> set[str]:
    """Returns the tensors that are not computed with: of layers that guess tokens ahead, and what would make keys and values of
    layers that use those of others."""
    drafts = header.metadata.get(f"{header.metadata['general.architecture']}.nextn_predict_layers") or 0
    layers = tuple(f"blk.{cfg.n_layers + layer}." for layer in range(drafts))
    sources = enumerate(structure(cfg).source_l)
    keys = {f"blk.{layer}.attn_{part}.weight" for layer, source in sources if source is not None for part in KEYS}
    return keys | {name for name in header.tensors if name.startswith(layers)}


def _by_head(
    header: GgufHeader, files: dict[pathlib.Path, RangeFile], cfg: ModelConfig, piece: Piece
) -> tuple[list[Part], set[str], set[str]] | None:
    """Returns the rows of what makes keys and values of latents where a file has the two apart: of each head its keys', which are
    stored transposed, then its values'. Then the names of the two, and what is wrong with their shapes; None without them."""
    names = [f"blk.{piece.layer}.{name}.weight" for name in BY_HEAD]
    if any(name not in header.tensors for name in names):
        return None
    latent = next(mixer for mixer in cfg.mixers if isinstance(mixer, Latent))
    keys, values = (header.tensors[name] for name in names)
    n, rank, plain, v = cfg.n_heads, latent.kv_rank, latent.plain_dim, latent.v_dim
    wrong = {
        f"{stored.name} is {list(stored.shape)}, expected {list(expected)}"
        for stored, expected in ((keys, (n, rank, plain)), (values, (n, v, rank)))
        if stored.shape != expected
    }
    parts = []
    for head in range(n):
        parts.append(Part(keys, files[keys.path], head * rank, plain, transposed=True))
        parts.append(Part(values, files[values.path], head * v, v))
    return parts, set(names), wrong


def _flat(stored: Stored, expected: tuple[int, ...]) -> Stored:
    """Returns a stored tensor without axes that the converter of state spaces put into vectors."""
    flat = len(expected) == 1 and len(stored.shape) > 1 and stored.type in PLAIN and stored.rows * stored.shape[-1]
    return dataclasses.replace(stored, shape=expected) if flat == expected[0] else stored


def _tensor(name: str, shape: tuple[int, ...], held: list[tuple[Piece, Part]], layout: Layout) -> Tensor:
    """Returns an HF tensor of the parts of all pieces that it holds."""
    first = held[0][0]
    if not first.within:
        offset = -layout.norm_offset if first.path.endswith("norm") and first.path not in PLAIN_NORMS else 0.0
        return GgufTensor(name, shape, tuple(part for _, part in held), offset)
    members = []
    for piece, part in held:
        if piece.within == (0,):  # whose tensor holds all experts
            whole = dataclasses.replace(part, first=0, count=part.stored.rows)
            member = GgufTensor(f"{name} ({part.stored.name})", (whole.count, whole.width), (whole,))
            members.append((member, piece.start, piece.step, part.first))
    rows = len(range(first.start, first.stop, first.step))
    return Woven(name, shape, tuple(members), rows, first.transposed)


def _place(
    header: GgufHeader, weights: dict[str, Weight], places: list[tuple[str, tuple[str, ...]]], piece: Piece
) -> tuple[Stored, int, int, tuple[int, ...]] | str:
    """Returns the stored tensor that holds a piece, at which row it begins and how many it has, and the shape that tensor must
    have; or, if the file has none, the name that it should have. places: the names that may hold the piece, each with all that
    it holds."""
    expert = piece.index[-1] if len(piece.index) > 1 else 0
    names = [template.format(l=piece.layer, e=expert) for template, _ in places] or [f"the tensor of {piece.path}"]
    at = next((i for i, name in enumerate(names) if name in header.tensors), None)
    if at is None:
        return names[0]
    template, paths = places[at]
    shapes = [weights[path].shape[len(piece.index) :] for path in paths]
    rows, at_row = sum(shape[0] for shape in shapes), sum(shape[0] for shape in shapes[: paths.index(piece.path)])
    stored, count = header.tensors[names[at]], shapes[paths.index(piece.path)][0]
    expected = (
        rows,
        *(size for size in shapes[0][1:] if size > 1),
    )  # a convolution is stored without the axis of its inputs
    if len(piece.index) > 1 and "{e}" not in template:
        return stored, at_row + expert * rows, count, (weights[piece.path].shape[1], *expected)
    return stored, at_row, count, expected


def as_values(stored: Stored) -> Float32[np.ndarray, " n"]:
    """Reads a whole stored vector, such as the factors of a rope. Raises UserError if it cannot be read or is no vector."""
    if len(stored.shape) != 1 or stored.type not in PLAIN:
        raise UserError(
            f"{stored.path} holds {stored.name} as {stored.type.name} {list(stored.shape)}, expected a vector."
        )
    out = np.empty(stored.shape, np.float32)
    with reading(stored.path):
        part = Part(stored, LocalFile(stored.path), 0, len(out))
        part.read_into((0, len(out)), (0, 1), out[:, None], 0.0)
    return out
