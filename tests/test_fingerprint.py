"""The fingerprint of a checkpoint: nothing that is written to a file escapes it, and what was hashed once is not read again."""

import os

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from refusal_jax.checkpoints import fingerprint
from refusal_jax.checkpoints.fingerprint import checkpoint_fingerprint
from refusal_jax.errors import UserError
from refusal_jax.files import file_hash

MIB = 1 << 20


@pytest.fixture
def reads(monkeypatch, tmp_path):
    """The names of the large files that are read whole, in order; hashes are remembered in a cache of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    found, hashed = [], fingerprint._hash_with_bar
    monkeypatch.setattr(fingerprint, "_hash_with_bar", lambda path, bar: found.append(path.name) or hashed(path, bar))
    return found


@pytest.fixture
def folder(tmp_path):
    """A checkpoint folder of one 45 MiB weight file and a small one."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    layers = {f"layers.{l}.v_proj": np.full((64, 64), l, np.float32) for l in range(2)}
    save_file(layers | {"embed": np.zeros((45 * MIB // 4,), np.float32)}, folder / "model.safetensors")
    return folder


def aged(monkeypatch) -> None:
    """Lets the files count as settled, as they are a minute after they were written."""
    monkeypatch.setattr(fingerprint, "SETTLED", -1.0)


def test_every_change_is_noticed(folder, reads):
    weights, config = folder / "model.safetensors", folder / "config.json"
    seen = {checkpoint_fingerprint(folder)}
    (folder / ".hidden").write_text("not part of it")
    assert seen == {checkpoint_fingerprint(folder)}
    size, data = weights.stat().st_size, bytearray(weights.read_bytes())
    for change in (
        lambda: config.write_text("[]"),
        lambda: config.rename(folder / "config2.json"),
        lambda: weights.write_bytes(data[:-1] + b"\1"),
        lambda: weights.write_bytes(bytes(data) + b"\0"),
        lambda: weights.write_bytes(data[:300_000] + b"\1" + data[300_001:]),  # between any samples
    ):
        change()
        seen.add(checkpoint_fingerprint(folder))
    assert len(seen) == 6 and weights.stat().st_size == size


def test_two_replaced_tensors_are_noticed(folder, reads, monkeypatch):
    """An adapter that is merged into the same file: same name, same size, and even the same time of modification."""
    aged(monkeypatch)
    weights = folder / "model.safetensors"
    before, stat = checkpoint_fingerprint(folder), weights.stat()
    tensors = load_file(weights)
    save_file(tensors | {f"layers.{l}.v_proj": tensors[f"layers.{l}.v_proj"] + 1 for l in range(2)}, weights)
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    after = weights.stat()
    assert (after.st_size, after.st_mtime_ns) == (stat.st_size, stat.st_mtime_ns)
    assert checkpoint_fingerprint(folder) != before
    assert reads == ["model.safetensors"] * 2


def test_what_has_not_changed_is_not_read_again(folder, reads, monkeypatch):
    before = checkpoint_fingerprint(folder)
    assert checkpoint_fingerprint(folder) == before
    assert reads == ["model.safetensors"] * 2  # written just now: another write could look the same
    aged(monkeypatch)
    assert [checkpoint_fingerprint(folder) for _ in range(3)] == [before] * 3
    assert reads == ["model.safetensors"] * 3
    memory = next((folder.parent / "cache").rglob("*.json"))
    memory.write_text('{"model.safetensors": [[1], "no hash"]}')
    assert checkpoint_fingerprint(folder) == before  # a damaged memory counts for nothing
    assert reads == ["model.safetensors"] * 4


def test_a_cache_that_cannot_be_written_costs_time_only(folder, reads, monkeypatch):
    aged(monkeypatch)
    (folder.parent / "cache").write_text("a file where the cache's folder would be")
    assert checkpoint_fingerprint(folder) == checkpoint_fingerprint(folder)


def test_weights_that_are_never_loaded_count_by_size(folder, reads):
    (folder / "pytorch_model.bin").write_bytes(bytes(9 * MIB))
    before = checkpoint_fingerprint(folder)
    assert reads == ["model.safetensors"]
    (folder / "pytorch_model.bin").write_bytes(bytes(9 * MIB + 1))
    assert checkpoint_fingerprint(folder) != before


def test_a_folder_that_is_gone(tmp_path):
    with pytest.raises(UserError, match="gone could not be read"):
        checkpoint_fingerprint(tmp_path / "gone")


def test_file_hash(tmp_path):
    (tmp_path / "abc").write_text("abc")
    assert file_hash(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
