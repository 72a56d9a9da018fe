"""Converted copies of checkpoints: read again onto other meshes, made again when they are not what was written."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from test_load_places import places
from test_processes import Pair

from refusal_jax import UserError, load_model, make_mesh
from refusal_jax.checkpoints import copies
from refusal_jax.checkpoints.copies import ConvertedCopy
from refusal_jax.checkpoints.load import load_decoder
from refusal_jax.checkpoints.places import abreast
from refusal_jax.checkpoints.tensor_files import TensorFiles
from refusal_jax.study import study as pipeline
from refusal_jax.study.config import get_config


@pytest.fixture(scope="module")
def filled(llama, tmp_path_factory):
    """A cache with a copy of `llama`, made on a mesh that pads its vocabulary."""
    cache = tmp_path_factory.mktemp("cache")
    load_decoder(llama, mesh=make_mesh(model=5), cache=str(cache))
    return cache


@pytest.fixture
def cache(filled, tmp_path):
    """A copy of that, to be broken."""
    return shutil.copytree(filled, tmp_path / "cache")


@pytest.fixture
def unread(monkeypatch):
    """Fails where a checkpoint's tensors are read."""

    def fail(folder):
        raise AssertionError("the checkpoint was read")

    monkeypatch.setattr(TensorFiles, "open", fail)


def record(cache):
    return next(cache.glob("*.json"))


def copy(cache):
    return record(cache).with_suffix("")


def largest(cache):
    return max(copy(cache).rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0)


def same(decoder, model):
    for path, whole in model.decoder.weights().items():
        found = np.asarray(decoder.weights()[path])
        np.testing.assert_array_equal(found[: len(whole)], whole)
        assert not found[len(whole) :].any()


@pytest.mark.parametrize("mesh", [None, {"fsdp": 2, "model": 4}, {"model": 7}])
def test_other_meshes(mesh, llama, model, filled, unread):
    mesh = make_mesh(**mesh) if mesh else None
    same(load_decoder(llama, mesh=mesh, cache=str(filled)), model)


def test_only_whole_copies_are_left(filled):
    names = sorted(path.name for path in filled.iterdir())
    assert names == [copy(filled).name, record(filled).name]
    assert record(filled).name.endswith("-float32-1.json")


def test_another_dtype_or_checkpoint_is_another_copy(llama, filled, tmp_path):
    keys = {ConvertedCopy.of(str(filled), llama, dtype).folder for dtype in ("float32", "bfloat16")}
    other = shutil.copytree(llama, tmp_path / "other")
    (other / "generation_config.json").write_text("{}")
    keys.add(ConvertedCopy.of(str(filled), other, "float32").folder)
    assert len(keys) == 3 and str(copy(filled)) in keys


def test_relative_and_home_folders(llama, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    assert ConvertedCopy.of("here", llama, "float32").cache == str(tmp_path / "here")
    assert ConvertedCopy.of("~/c", llama, "float32").cache == str(tmp_path / "me" / "c")
    assert ConvertedCopy.of("gs://bucket/c/", llama, "float32").cache == "gs://bucket/c"


def truncated(cache):
    largest(cache).write_bytes(largest(cache).read_bytes()[:-100])


def removed(cache):
    largest(cache).unlink()


def flipped(cache):
    data = bytearray(largest(cache).read_bytes())
    data[len(data) // 2] ^= 4
    largest(cache).write_bytes(data)


def scrambled(cache):
    data = largest(cache).read_bytes()
    largest(cache).write_bytes(b"\xa5" * len(data))


def garbled(cache):
    record(cache).write_text("{")


def emptied(cache):
    record(cache).write_text("{}")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of reads that orbax gave up
@pytest.mark.parametrize(
    "damage,reason",
    [
        (truncated, "its files are not those that were written"),
        (removed, "its files are not those that were written"),
        (flipped, ""),  # found by orbax or by the sums, whichever holds the byte
        (scrambled, ""),
        (garbled, "Expecting property name"),
        (emptied, "'files'"),
    ],
)
def test_damage_is_noticed(damage, reason, llama, cache):
    damage(cache)
    converted = []
    there = ConvertedCopy.of(str(cache), llama, "float32")

    class Stop(Exception):
        pass

    def convert():
        converted.append(1)
        raise Stop

    with pytest.raises(Stop):
        there.weights(places(llama, None), convert)
    assert converted and reason in there._read(places(llama, None))[1]


def test_sums_find_a_bit(llama, cache):
    written = json.loads(record(cache).read_text())
    written["sums"]["blocks.q"] ^= 1
    record(cache).write_text(json.dumps(written))
    there = ConvertedCopy.of(str(cache), llama, "float32")
    assert there._read(places(llama, None)) == (None, "its values are not those that were written")


def test_a_half_written_copy_is_made_again(llama, model, cache, caplog, monkeypatch):
    removed(cache)
    record(cache).unlink()
    leftover = cache / f"{copy_name(llama, cache)}.orbax-checkpoint-tmp"
    leftover.mkdir()
    same(load_decoder(llama, cache=str(cache)), model)
    said = caplog.text
    caplog.clear()
    assert "cannot be used (it is not whole): it is made again" in said and said.count("made again") == 1
    assert not leftover.exists()
    monkeypatch.setattr(TensorFiles, "open", lambda folder: pytest.fail("the checkpoint was read"))
    same(load_model(llama, cache=str(cache)).decoder, model)
    assert "made again" not in caplog.text


def copy_name(llama, cache) -> str:
    return pathlib.Path(ConvertedCopy.of(str(cache), llama, "float32").folder).name


def test_a_cache_that_cannot_be_written(llama, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        UserError, match=r"The copy .* could not be written \(.*File exists.*set config\.cache to another"
    ):
        load_decoder(llama, cache=str(tmp_path / "file"))

    def full(*args, **kwargs):
        raise ValueError("RESOURCE_EXHAUSTED: No space left on device")

    monkeypatch.setattr(copies.ocp, "save", full)
    with pytest.raises(UserError, match="could not be written .*No space left on device.*Free space"):
        load_decoder(llama, cache=str(tmp_path / "cache"))
    assert not list((tmp_path / "cache").glob("*.json"))


def test_errors_of_the_checkpoint_stay_as_they_are(tmp_path, llama):
    folder = shutil.copytree(llama, tmp_path / "model")
    (folder / "model.safetensors").write_bytes(b"1234")
    with pytest.raises(UserError, match="is not a readable safetensors file"):
        load_decoder(folder, cache=str(tmp_path / "cache"))
    assert not list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_sums_of_devices_and_hosts_agree(dtype):
    devices = tuple(jax.devices()[:2])
    rng = np.random.default_rng(0)
    parts = [jax.device_put(rng.standard_normal((3, 5, 7)).astype(jax.numpy.dtype(dtype)), d) for d in devices]
    on_devices = np.asarray(copies.device_sums(devices)(abreast(devices, parts)))
    assert copies.host_sums(parts) == on_devices.tolist()


TWO = """
import sys
import jax
rank, port, folder, cache = int(sys.argv[1]), *sys.argv[2:]
jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=rank)
import numpy as np
from jax.experimental.multihost_utils import process_allgather
from refusal_jax import make_mesh
from refusal_jax.checkpoints.load import load_decoder
from refusal_jax.checkpoints.tensor_files import TensorFiles
made, make = [], TensorFiles.open
TensorFiles.open = lambda folder: made.append(make(folder)) or made[-1]
plain = None
for mesh in ({"model": 8}, {"fsdp": 2, "model": 4}):
    weights = load_decoder(folder, mesh=make_mesh(**mesh), cache=cache).weights()
    plain = plain or {path: process_allgather(w, tiled=True) for path, w in weights.items()}
    for path, w in weights.items():
        np.testing.assert_array_equal(process_allgather(w, tiled=True), plain[path])
print("read", [files.bytes_read for files in made])
np.savez(f"{cache}-{rank}.npz", **plain)
"""


def test_two_processes(llama, model, tmp_path):
    """Each reads its half and what both hold; together they write a copy, and read it onto another mesh."""
    cache = tmp_path / "cache"
    pair = Pair(lambda rank, port: ("-c", TWO, rank, port, llama, cache), tmp_path).wait()
    assert pair.codes == [0, 0], pair.err
    whole = {path: np.asarray(w) for path, w in model.decoder.weights().items()}
    # norms, and keys and values whose two heads are on all four devices of either process by halves
    shared = sum(w.nbytes for path, w in whole.items() if "norm" in path)
    split = sum(w.nbytes for path, w in whole.items() if "norm" not in path)
    for out in pair.out:
        assert f"read [{shared + split // 2}]" in out
    for rank in range(2):
        with np.load(f"{cache}-{rank}.npz") as found:
            for path, weight in whole.items():
                np.testing.assert_array_equal(found[path], weight)


def test_a_study_may_change_its_cache(tmp_path, monkeypatch):
    """The copies' place is no part of what a run is."""
    opened = []

    class Stop(Exception):
        pass

    def stop(folder, settings, inputs, *more):
        opened.append(settings)
        raise Stop

    monkeypatch.setattr(pipeline.Run, "open", stop)
    for place in ("", str(tmp_path / "copies")):
        config = get_config()
        config.cache = place
        with pytest.raises(Stop):
            pipeline.run_study(config, tmp_path / "run")
    assert opened[0] == opened[1]
