"""Weights on their way to meshes: right values, each byte read once, few blocks at a time, all processes in step."""

import itertools
import pathlib

import families
import jax
import ml_dtypes
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file

from refusal_jax import UserError, make_mesh
from refusal_jax.checkpoints import load
from refusal_jax.checkpoints import places as place
from refusal_jax.checkpoints.load import load_decoder
from refusal_jax.checkpoints.places import DeviceFilling, Filling, HostFilling, Place
from refusal_jax.checkpoints.tensor_files import SINGLE, TensorFiles
from refusal_jax.models.families import pieces
from refusal_jax.models.hf_config import load_config
from refusal_jax.models.sharding import split_for
from refusal_jax.models.weights import weight_table

MESHES = ({"fsdp": 2, "model": 4}, {"model": 8}, {"data": 2, "model": 3})


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Tied; fused, with biases; experts; three dtypes in one file; a vocabulary that nothing divides."""
    root = tmp_path_factory.mktemp("places")
    made = {
        "tied": tiny.tiny_llama(root / "tied", layers=2, tied=True, attention_bias=True),
        "mixed": tiny.tiny_llama(root / "mixed", layers=2),
        **{
            family: families.tiny_model(root / family, family)
            for family in ("phi3", "qwen3_moe", "granitemoe", "gpt_oss")
        },
    }
    tensors = load_file(made["mixed"] / SINGLE)
    kinds = (np.float16, ml_dtypes.bfloat16, np.float32)
    save_file({n: t.astype(kinds[i % 3]) for i, (n, t) in enumerate(sorted(tensors.items()))}, made["mixed"] / SINGLE)
    return made


@pytest.fixture
def opened(monkeypatch):
    """The readers that were made."""
    made, make = [], TensorFiles.open
    monkeypatch.setattr(TensorFiles, "open", lambda folder: made.append(make(folder)) or made[-1])
    return made


def stored(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """The decoder's weights, float32, straight from the tensors."""
    cfg, tensors = load_config(folder), load_file(folder / SINGLE)
    found = {path: np.full(weight.shape, np.nan, np.float32) for path, weight in weight_table(cfg).items()}
    for piece in pieces(cfg):
        matrix = tensors[piece.name][piece.within]
        matrix = matrix.T if piece.transposed else matrix
        found[piece.path][piece.index] = matrix[piece.start : piece.stop : piece.step].astype(np.float32)
    return found


def places(folder: pathlib.Path, mesh, dtype=np.float32) -> dict[str, Place]:
    cfg, found = load_config(folder), {}
    for piece in pieces(cfg):
        found.setdefault(piece.path, {})[piece.index] = piece
    mesh = split_for(mesh, cfg.n_kv_heads)
    return {path: Place(mesh, weight, found[path], dtype) for path, weight in weight_table(cfg).items()}


@pytest.mark.parametrize("name", ["tied", "mixed", "phi3", "qwen3_moe", "granitemoe", "gpt_oss"])
@pytest.mark.parametrize("block", [place.SLAB_BYTES, 1000, 1])
def test_values_and_bytes(name, block, checkpoints, opened, monkeypatch):
    monkeypatch.setattr(place, "SLAB_BYTES", block)
    expected = stored(checkpoints[name])
    for mesh in MESHES:
        weights = load_decoder(checkpoints[name], mesh=make_mesh(**mesh)).weights()
        for path, whole in expected.items():
            found = np.asarray(weights[path])
            np.testing.assert_array_equal(found[: len(whole)], whole)
            assert not found[len(whole) :].any()
        held = opened[-1].headers[checkpoints[name] / SINGLE].tensors
        once = sum(extent.stop - extent.start for extent in held.values())  # each byte once
        both = sum(e.stop - e.start for n, e in held.items() if "gate_up_proj" in n and name == "gpt_oss")
        assert opened[-1].bytes_read == once if not both else once <= opened[-1].bytes_read < once + both


@pytest.mark.parametrize("mesh", MESHES[:2])
def test_a_process_reads_its_share_and_no_more(mesh, checkpoints, monkeypatch):
    devices, every = jax.devices(), jax.sharding.Sharding.addressable_devices_indices_map
    expected = stored(checkpoints["mixed"])
    for own in (devices[:4], devices[4:], devices[1:2], []):

        def addressable(self, shape, own=own):
            return {device: index for device, index in every(self, shape).items() if device in own}

        monkeypatch.setattr(jax.sharding.Sharding, "addressable_devices_indices_map", addressable)
        files = TensorFiles.open(checkpoints["mixed"])
        for path, there in places(checkpoints["mixed"], make_mesh(**mesh)).items():
            before = files.bytes_read
            monkeypatch.setattr(place, "SLAB_BYTES", 500)
            ranges = list(there.slabs())
            for block in (there.read(files, r) for r in ranges):
                for held, part in zip(there.held.values(), block.parts, strict=True):
                    inside = tuple(
                        slice(h.start + r.start, h.start + r.stop) for h, r in zip(held, block.ranges, strict=False)
                    )
                    columns = tuple(slice(h.start, h.stop) for h in held[len(inside) :])
                    whole = expected[path][(*inside, *columns)]
                    np.testing.assert_array_equal(part[tuple(map(slice, whole.shape))], whole)
            # the cells that the process's devices hold between them, whoever else holds them
            cells = np.zeros(there.shape, bool)
            for held in there.held.values():
                cells[tuple(slice(h.start, h.stop) for h in held)] = True
            sizes = np.zeros(there.shape[: there.stacked] or (1,))
            for index, piece in there.pieces.items():
                sizes[index or 0] = np.dtype(tiny_dtype(files, piece.name)).itemsize
            own_cells = cells[tuple(map(slice, there.weight.shape))]
            counts = own_cells.reshape(*sizes.shape, -1).sum(axis=-1)
            assert files.bytes_read - before == (counts * sizes).sum() == there.share(files)


def tiny_dtype(files: TensorFiles, name: str):
    return {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}[files.tensors[name].dtype]


@pytest.mark.parametrize("kind", [DeviceFilling, HostFilling])
@pytest.mark.parametrize("mesh", [None, {"fsdp": 2, "model": 4}])
def test_both_ways_of_filling(kind, mesh, checkpoints, monkeypatch):
    monkeypatch.setattr(place, "SLAB_BYTES", 700)
    monkeypatch.setattr(Filling, "of", staticmethod(kind))
    folder = checkpoints["tied"]
    weights = load_decoder(folder, "bfloat16", make_mesh(**mesh) if mesh else None).weights()
    for path, whole in stored(folder).items():
        np.testing.assert_array_equal(np.asarray(weights[path]), whole.astype(ml_dtypes.bfloat16))


def test_arrays_in_the_hosts_memory_are_not_copied(checkpoints):
    files = TensorFiles.open(checkpoints["mixed"])
    for path, there in places(checkpoints["mixed"], None).items():
        fill = there.filling()
        (ranges,) = there.slabs()
        slab = there.read(files, ranges, fill.room(ranges))
        assert slab.parts[0].ctypes.data == fill.room(ranges)[0].ctypes.data, path
        (made,) = there.array(fill, iter([slab])).addressable_shards
        assert made.data.unsafe_buffer_pointer() == fill.whole[0].ctypes.data, path


@pytest.mark.parametrize("fail", [False, True])
def test_few_blocks_at_a_time(fail, checkpoints, monkeypatch):
    read, sizes, alive, most = Place.read, [], set(), []
    count = itertools.count()

    class Watched(place.Slab):
        def __del__(self):
            alive.discard(id(self))

    def spy(self, files, ranges, room):
        if fail and next(count) == 20:
            raise UserError("gone")
        block = read(self, files, ranges, room)
        block = Watched(block.ranges, block.parts, block.finite)
        alive.add(id(block))
        most.append(len(alive))
        sizes.append(sum({id(p.base): p.nbytes for p in block.parts}.values()))
        return block

    monkeypatch.setattr(place, "SLAB_BYTES", 2000)
    monkeypatch.setattr(Filling, "of", staticmethod(DeviceFilling))
    monkeypatch.setattr(Place, "read", spy)
    try:
        load_decoder(checkpoints["qwen3_moe"], mesh=make_mesh(model=8))
        assert not fail
    except UserError as error:
        assert fail and str(error) == "gone" and len(sizes) < 20 + 2 * load.READERS
    assert len(sizes) > 15 and max(most) <= load.READERS + 1 and max(sizes) <= 2000


def test_progress_counts_bytes(checkpoints, opened, monkeypatch):
    bars = []

    class Bar(load.Progress):
        def __exit__(self, *error):
            bars.append((self.n, self.total, self.unit))
            super().__exit__(*error)

    monkeypatch.setattr(load, "Progress", Bar)
    load_decoder(checkpoints["mixed"], mesh=make_mesh(model=8), progress=True)
    assert bars[0] == (opened[0].bytes_read, opened[0].bytes_read, "B")


def gathered(rows):
    """An allgather in which other processes' flags are `rows` of (ok, finite)."""

    def gather(flags):
        return np.stack([flags, *([ok, *[finite] * (len(flags) - 1)] for ok, finite in rows)])

    return gather


def test_another_process_fails(checkpoints, monkeypatch):
    monkeypatch.setattr(load.multihost_utils, "process_allgather", gathered([(True, True), (False, False)]))
    with pytest.raises(UserError, match="Process 2 could not read its part of .*: see what it says"):
        load_decoder(checkpoints["tied"])


def test_another_process_holds_nan(checkpoints, monkeypatch):
    monkeypatch.setattr(load.multihost_utils, "process_allgather", gathered([(True, False)]))
    with pytest.raises(UserError, match="holds NaN or infinite weights .*embed.*more"):
        load_decoder(checkpoints["tied"])


def test_the_others_hear_of_an_error(checkpoints, monkeypatch):
    told = []
    monkeypatch.setattr(load.multihost_utils, "process_allgather", lambda flags: told.append(flags) or flags)
    with pytest.raises(UserError, match="dtype"):
        load_decoder(checkpoints["tied"], "int8")
    monkeypatch.setattr(load, "check_tensors", lambda *_: (_ for _ in ()).throw(UserError("broken")))
    with pytest.raises(UserError, match="broken"):
        load_decoder(checkpoints["tied"])
    assert len(told) == 1 and not told[0].any()


def test_the_parts_of_a_tied_unembedding_are_compared_by_several(tmp_path):
    folder = tiny.tiny_llama(tmp_path, layers=1, tied=True)
    tensors = load_file(folder / SINGLE)
    table = tensors["model.embed_tokens.weight"].copy()
    table[200] += 1
    save_file(tensors | {"lm_head.weight": table}, folder / SINGLE)
    cfg, files = load_config(folder), TensorFiles.open(folder)
    load.check_tensors(cfg, files, (0, 2))
    assert files.bytes_read == 2 * table.nbytes // 2
    with pytest.raises(UserError, match="ties its embeddings"):
        load.check_tensors(cfg, files, (1, 2))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_all_finite(dtype):
    values = np.full((3, 300_000), -0.0, dtype)
    values[1, 1] = np.finfo(np.float16).max if dtype == np.float16 else 3e38
    assert place.all_finite(values) and place.all_finite(values[:0])
    for bad in (np.nan, np.inf, -np.inf):
        values[2, -1] = bad
        assert not place.all_finite(values)
