"""The reader of safetensors files: slices of tensors, the bytes that are read for them, and headers that lie."""

import itertools
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from refusal_jax import UserError
from refusal_jax.checkpoints import safetensors, tensors
from refusal_jax.checkpoints.safetensors import LocalFile, framed, header_text, read_header, read_tensors
from refusal_jax.checkpoints.tensor_files import SINGLE, TensorFiles

CUBE = np.arange(2 * 3 * 4, dtype=np.float32).reshape(2, 3, 4)
MATRIX = np.arange(60, dtype=np.float32).reshape(6, 10).astype(ml_dtypes.bfloat16)


@pytest.fixture
def files(tmp_path):
    tensors = {"cube": CUBE, "half": CUBE.astype(np.float16), "matrix": MATRIX, "none": np.zeros((0, 3), np.float32)}
    tensors |= {"line": np.arange(5, dtype=np.float32), "number": np.full((), 7, np.float32), "ids": np.arange(3)}
    save_file(tensors, tmp_path / SINGLE, metadata={"format": "pt"})
    return TensorFiles.open(tmp_path)


def write(folder, entries, data: bytes = b"", size: int | None = None):
    """A file of this header, whatever it says."""
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    (folder / SINGLE).write_bytes((len(text) if size is None else size).to_bytes(8, "little") + text + data)
    return folder


def entry(start: int, stop: int, shape=None, dtype="F32") -> dict:
    return {"dtype": dtype, "shape": [(stop - start) // 4] if shape is None else shape, "data_offsets": [start, stop]}


def test_header(files):
    header = files.headers[files.folder / SINGLE]
    assert header.metadata == {"format": "pt"} and json.loads(header.text)["cube"]["shape"] == [2, 3, 4]
    assert (
        files.tensors["none"].shape == (0, 3)
        and files.tensors["ids"].dtype == "I64"
        and files.tensors["number"].shape == ()
    )
    assert [e.start for e in header.tensors.values()] == sorted(e.start for e in header.tensors.values())
    assert files.bytes_read == 0


@pytest.mark.parametrize("name,whole", [("cube", CUBE), ("half", CUBE.astype(np.float16)), ("matrix", MATRIX)])
@pytest.mark.parametrize("values", [1 << 20, 5, 1])
def test_slices(name, whole, values, files, monkeypatch):
    monkeypatch.setattr(tensors, "CAST_VALUES", values)
    axes = [[slice(None), slice(1, 2), slice(0, size - 1), slice(2, 2)] for size in whole.shape]
    for index in [(), *itertools.product(*axes)]:
        expected, before = whole[index], files.bytes_read
        found = files.read(name, index)
        assert found.dtype == whole.dtype and files.bytes_read - before == expected.nbytes
        np.testing.assert_array_equal(found, expected)
        for dtype in (np.float32, np.float16, ml_dtypes.bfloat16):
            out = np.empty(expected.shape, dtype)
            before = files.bytes_read
            files.read_into(name, index, out)
            assert files.bytes_read - before == expected.nbytes
            np.testing.assert_array_equal(out, expected.astype(dtype))


def test_vectors_numbers_and_nothing(files):
    np.testing.assert_array_equal(files.read("line", (slice(1, 3),)), [1, 2])
    assert files.read("number") == 7 and files.read("none").shape == (0, 3)
    assert files.read("line", ...).tolist() == [0, 1, 2, 3, 4]
    assert files.bytes_read == 4 * (2 + 1 + 5)


def test_an_array_that_does_not_fit(files):
    with pytest.raises(ValueError, match=r"cube: an array of shape \(3, 4\) cannot take \(2, 3, 4\)"):
        files.read_into("cube", (), np.empty((3, 4), np.float32))
    with pytest.raises(ValueError, match="cannot take"):
        files.read_into("matrix", (), np.empty((10, 6), ml_dtypes.bfloat16).T)


def test_many_threads(files):
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: files.read("matrix", (slice(i % 6, i % 6 + 1),)), range(300)))
    assert all((f == MATRIX[i % 6]).all() for i, f in enumerate(found))
    assert files.bytes_read == 300 * 20


def test_only_the_bytes_of_a_slice_are_asked_for(files, monkeypatch):
    asked = []
    preadv = os.preadv
    monkeypatch.setattr(
        safetensors.os, "preadv", lambda fd, parts, at: asked.append((at, len(parts[0]))) or preadv(fd, parts, at)
    )
    files.read("matrix", (slice(2, 5), slice(4, 7)))
    start = files.headers[files.folder / SINGLE].tensors["matrix"].start
    assert asked == [(start + 2 * (row * 10 + 4), 6) for row in (2, 3, 4)]
    files.read("matrix", (slice(2, 5),))
    assert asked[3:] == [(start + 40, 60)]


@pytest.mark.parametrize(
    "entries,data,reason",
    [
        (b"[1]", b"", "its header is not a JSON object"),
        (b'{"a": ', b"", "Expecting value"),
        (b'\xff\xfe{"a": 1}', b"", "codec can't decode"),
        (b"[" * 100_000, b"", "recursion"),
        (b'{"a": 1, "a": 2}', b"", "its header names something twice"),
        ({"__metadata__": {"format": 3}}, b"", "its metadata are not texts"),
        ({"__metadata__": ["pt"]}, b"", "its metadata are not texts"),
        ({"a": 3}, b"", "the entry of a lacks dtype, shape or data_offsets"),
        ({"a": entry(0, 8) | {"code": "x"}}, bytes(8), "or has more"),
        ({"a": entry(0, 8, dtype="F31")}, bytes(8), "a is of an unknown dtype, 'F31'"),
        ({"a": entry(0, 8, dtype=["F32"])}, bytes(8), "a is of an unknown dtype"),
        ({"a": entry(0, 8, [-2])}, bytes(8), "a has the shape [-2]"),
        ({"a": entry(0, 8, [True])}, bytes(8), "a has the shape [True]"),
        ({"a": entry(0, 8) | {"data_offsets": [0, 4, 8]}}, bytes(8), "the offsets [0, 4, 8]"),
        ({"a": entry(0, 8) | {"data_offsets": [0, 8.0]}}, bytes(8), "the offsets [0, 8.0]"),
        ({"a": entry(0, 8, [3])}, bytes(8), "a, F32 [3], cannot have 8 bytes"),
        ({"a": entry(8, 0, [2])}, bytes(8), "cannot have -8 bytes"),
        ({"a": entry(0, 8, [2], "BF16")}, bytes(8), "a, BF16 [2], cannot have 8 bytes"),
        ({"a": entry(0, 1 << 60)}, bytes(8), "its tensors end at byte 1,152,921,504,606,84"),
        ({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12), "b begins at byte"),
        ({"a": entry(0, 8), "b": entry(12, 16)}, bytes(16), "but the tensor before it ends at"),
        ({"a": entry(4, 8)}, bytes(8), "a begins at byte"),
        ({"a": entry(0, 8)}, bytes(12), "its tensors end at byte"),
        ({"a": entry(0, 8)}, bytes(4), "its tensors end at byte"),
    ],
)
def test_headers_that_lie(entries, data, reason, tmp_path):
    with pytest.raises(
        UserError, match=rf"is not a readable safetensors file \(.*{re.escape(reason)}.*download it again"
    ):
        TensorFiles.open(write(tmp_path, entries, data))


@pytest.mark.parametrize("size", [1000, 1 << 63, 2])
def test_header_sizes_that_lie(size, tmp_path):
    with pytest.raises(UserError, match="is not a readable safetensors file"):
        TensorFiles.open(write(tmp_path, {"a": entry(0, 8)}, bytes(8), size))


def test_a_header_beyond_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors, "HEADER_LIMIT", 20)
    with pytest.raises(UserError, match=r"it says that its header has \d+ bytes"):
        TensorFiles.open(write(tmp_path, {"a": entry(0, 8)}, bytes(8)))


def test_tensors_of_no_size_between_others(tmp_path):
    write(tmp_path, {"b": entry(0, 8), "none": entry(0, 0, [0, 5]), "c": entry(8, 8, [0])}, bytes(8))
    files = TensorFiles.open(tmp_path)
    assert {n: t.shape for n, t in files.tensors.items()} == {"none": (0, 5), "b": (2,), "c": (0,)} and files.read(
        "none"
    ).shape == (0, 5)


def test_small_dtypes(tmp_path):
    write(tmp_path, {"a": entry(0, 3, [6], "F4"), "b": entry(3, 6, [4], "F6_E2M3")}, bytes(6))
    assert read_header(LocalFile(tmp_path / SINGLE)).tensors["b"].shape == (4,)


def test_whole_files(tmp_path, files):
    found = read_tensors(files.folder / SINGLE)
    assert list(found) == list(files.headers[files.folder / SINGLE].tensors)
    for name, whole in (("cube", CUBE), ("matrix", MATRIX), ("ids", np.arange(3)), ("number", np.float32(7))):
        assert found[name].dtype == whole.dtype
        np.testing.assert_array_equal(found[name], whole)
    with pytest.raises(UserError, match=r"model\.safetensors holds a as F4, which cannot be read\. Save it as float32"):
        read_tensors(write(tmp_path, {"a": entry(0, 3, [6], "F4")}, bytes(3)) / SINGLE)
    with pytest.raises(UserError, match=r"none could not be read \(No such file or directory\)"):
        read_tensors(tmp_path / "none")


def test_headers_that_are_made(tmp_path):
    data = CUBE.tobytes() + MATRIX.tobytes()
    text = header_text([("cube", "F32", CUBE.shape), ("matrix", "BF16", MATRIX.shape)], {"format": "pt"})
    (tmp_path / SINGLE).write_bytes(framed(text) + data)
    assert len(text) % 8 == 0 and read_header(LocalFile(tmp_path / SINGLE)).metadata == {"format": "pt"}
    np.testing.assert_array_equal(load_file(tmp_path / SINGLE)["matrix"], MATRIX)


def test_a_file_that_shrinks_while_being_read(files):
    path = files.folder / SINGLE
    size = path.stat().st_size
    os.truncate(path, size - 4)
    with pytest.raises(
        UserError, match=rf"could not be read \(it ends at byte {size - 4:,}, before its header says so\)"
    ):
        for name in ("cube", "half", "matrix", "line"):
            files.read(name)


def test_a_file_that_cannot_be_read(tmp_path, monkeypatch):
    (tmp_path / SINGLE).mkdir()
    with pytest.raises(UserError, match=r"could not be read \(Is a directory\)"):
        TensorFiles.open(tmp_path)

    def denied(*args):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(safetensors.os, "open", denied)
    with pytest.raises(UserError, match=r"could not be read \(Permission denied\). Check that you may read it"):
        TensorFiles.open(tmp_path)
