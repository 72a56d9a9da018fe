"""GGUF files that cannot be read faithfully: what is wrong is said, and nothing large is allocated for a header that lies."""

import pathlib
import re
import shutil
import struct

import gguf
import numpy as np
import pytest
from families import tiny_model
from gguf import GGMLQuantizationType as Type
from gguf_files import write_gguf

from refusal_jax.checkpoints.fingerprint import checkpoint_fingerprint
from refusal_jax.checkpoints.gguf_header import read_gguf
from refusal_jax.checkpoints.gguf_mirror import STUB, as_folder, source_name
from refusal_jax.checkpoints.remote import checkpoint_folder
from refusal_jax.checkpoints.tensor_files import TensorFiles
from refusal_jax.errors import UserError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("hf") / "hf", "llama", num_hidden_layers=1)


@pytest.fixture
def tiny(tmp_path, checkpoint):
    """Writes a GGUF file with changed metadata, and returns its path."""

    def write(name: str = "tiny.gguf", **more) -> pathlib.Path:
        folder = tmp_path / f"hf-{name}"
        shutil.copytree(checkpoint, folder)
        (tmp_path / name).parent.mkdir(exist_ok=True)
        return write_gguf(folder, tmp_path / name, **more)

    return write


def test_cut_and_foreign_files(tmp_path, tiny):
    path = tiny()
    data = path.read_bytes()
    start = read_gguf(path).tensors["output_norm.weight"].start
    broken = tmp_path / "broken.gguf"

    def fails(content: bytes, match: str) -> None:
        broken.write_bytes(content)
        with pytest.raises(UserError, match=match):
            checkpoint_folder(broken)

    fails(data[:-40], r"ends at byte [\d,]+, beyond the file's end")
    fails(data[:2000], "more than the file can hold")
    fails(data[:3], "beyond its end")
    fails(b"", "beyond its end")
    fails(b"PK\3\4" + data[4:], r"begins with b'PK")
    fails(b"version https://git-lfs.github.com/spec/v1\n", "pointer of Git LFS")
    fails(data[:4] + struct.pack(">I", 3) + data[8:], "big-endian")
    fails(data[:4] + struct.pack("<I", 9) + data[8:], "it is of version 9, and versions 2 and 3 are read")
    fails(data[:8] + struct.pack("<Q", 1 << 60) + data[16:], "more than the file can hold")
    fails(data[:16] + struct.pack("<Q", 1 << 60) + data[24:], "speaks of 1,152,921,504,606,846,976 entries")
    fails(data[:24] + struct.pack("<Q", 1 << 62) + data[32:], "beyond its end")
    fails(data[:32] + b"\xff\xfe" + data[34:], "not a readable GGUF file")
    assert start < len(data)


def entry(name: str, shape: tuple[int, ...], kind: int, start: int) -> bytes:
    """A tensor's entry in a header."""
    text = struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", len(shape))
    return text + b"".join(struct.pack("<Q", n) for n in shape) + struct.pack("<IQ", kind, start)


def header(*entries: bytes, keys: bytes = b"", n_keys: int = 0) -> bytes:
    text = b"GGUF" + struct.pack("<IQQ", 3, len(entries), n_keys) + keys + b"".join(entries)
    return text + bytes(-len(text) % 32) + bytes(4096)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (header(entry("a", (8, 1 << 61), 0, 0)), r"'a' has the shape \[2305843009213693952, 8\]"),
        (header(entry("a", (33,), 2, 0)), r"'a' has the shape \[33\], which cannot be of Q4_0"),
        (header(entry("a", (0, 4), 0, 0)), "which cannot be of F32"),
        (header(entry("a", (4,) * 5, 0, 0)), "'a' has 5 axes, expected 1 to 4"),
        (header(entry("a", (4,), 999, 0)), "'a' is of the unknown type 999"),
        (header(entry("a", (4,), 0, 7)), "'a' begins at byte 7 of the data, which is not aligned"),
        (header(entry("a", (4,), 0, 1 << 50)), "beyond the file's end"),
        (header(entry("a", (16,), 0, 0), entry("b", (16,), 0, 32)), "'b' overlaps the tensor before it"),
        (header(entry("a", (4,), 0, 0), entry("a", (4,), 0, 32)), "holds 'a' twice"),
        (
            header(keys=struct.pack("<Q", 1) + b"k" + struct.pack("<I", 99), n_keys=1),
            "'k' has a value of the unknown type 99",
        ),
        (
            header(keys=struct.pack("<Q", 1) + b"k" + struct.pack("<IIQ", 9, 9, 1), n_keys=1),
            "is a list of the unknown type 9",
        ),
        (
            header(keys=struct.pack("<Q", 1) + b"k" + struct.pack("<IIQ", 9, 0, 1 << 40), n_keys=1),
            "more than the file can hold",
        ),
        (header(keys=(struct.pack("<Q", 1) + b"k" + struct.pack("<IB", 0, 1)) * 2, n_keys=2), "gives 'k' twice"),
        (
            header(keys=struct.pack("<Q", 17) + b"general.alignment" + struct.pack("<II", 4, 3), n_keys=1),
            "general.alignment is 3, expected a power of two",
        ),
    ],
)
def test_headers_that_lie(tmp_path, content, match):
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with pytest.raises(UserError, match=match):
        read_gguf(path)


def test_long_headers_are_not_read(tmp_path, tiny, monkeypatch):
    monkeypatch.setattr("refusal_jax.checkpoints.gguf_header.HEADER_LIMIT", 500)
    monkeypatch.setattr("refusal_jax.checkpoints.gguf_header.CHUNK", 64)
    with pytest.raises(UserError, match="has more than 500 bytes"):
        read_gguf(tiny())


def test_what_is_no_model(tiny):
    for changes, match in (
        ({"general.type": "adapter"}, "holds an adapter .* without its model"),
        ({"general.type": "mmproj"}, "holds the vision part of a multimodal model"),
        ({"general.type": "other"}, "says that it holds 'other', expected a model"),
    ):
        path = tiny(f"{changes['general.type']}.gguf", **changes)
        with pytest.raises(UserError, match=match):
            checkpoint_folder(path)


def test_settings_that_would_not_be_computed(tiny):
    changes = {
        "llama.attention.scale": 0.5,
        "llama.attention.value_length": 4,
        "llama.attention.causal": False,
        "llama.attention.head_count_kv": [1, 2],
        "llama.rope.dimension_count": 4,
        "llama.rope.scaling.type": "dynamic",
        "llama.rope.scaling.attn_factor": 2.0,
        "llama.block_count": None,
        "llama.some_flag": False,
    }
    with pytest.raises(UserError) as raised:
        checkpoint_folder(tiny(**changes))
    text = str(raised.value)
    for part in (
        "llama.attention.scale = 0.5 is not supported",
        "llama.attention.value_length = 4, and only 8 is computed",
        "llama.attention.causal = False, and only True is computed",
        "llama.attention.head_count_kv = [1, 2], expected one int in range",
        "llama.rope.dimension_count = 4",
        "llama.rope.scaling.type = 'dynamic' is not supported",
        "llama.rope.scaling.attn_factor = 2.0",
        "llama.block_count is missing",
    ):
        assert part in text
    assert "some_flag" not in text and "cannot be run faithfully" in text


def test_other_architectures_and_tensors(tmp_path, tiny, monkeypatch):
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "mamba")
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UserError, match=r"is of the architecture 'mamba', .* Supported: deepseek2, .*gemma,"):
        checkpoint_folder(tmp_path / "other.gguf")
    path = tiny()
    data = path.read_bytes()
    for old, new, match in (
        (
            b"blk.0.ffn_up.weight",
            b"blk.0.ffn_xy.weight",
            r"1 missing: blk\.0\.ffn_up\.weight\. 1 unknown: blk\.0\.ffn_xy\.weight",
        ),
        (b"token_embd.weight", b"token_xxxx.weight", "no tensor token_embd.weight"),
    ):
        assert data.count(old) == 1
        path.write_bytes(data.replace(old, new))
        with pytest.raises(UserError, match=match):
            TensorFiles.open(checkpoint_folder(path))
    at = data.index(b"output_norm.weight") + 18 + 4
    path.write_bytes(data[:at] + struct.pack("<Q", 16) + data[at + 8 :])
    with pytest.raises(UserError, match=r"1 misshapen: output_norm\.weight is \[16\], expected \[32\]"):
        TensorFiles.open(checkpoint_folder(path))


def test_types_that_are_not_read(tmp_path, tiny):
    path = tiny()
    data = path.read_bytes()
    at = data.index(b"output_norm.weight") + 18 + 4 + 8
    path.write_bytes(data[:at] + struct.pack("<I", Type.I32) + data[at + 4 :])
    with pytest.raises(UserError, match=r"holds tensors of a type that is not read: output_norm\.weight is I32"):
        checkpoint_folder(path)


def test_tokenizers(tmp_path, tiny):
    for changes, match in (
        ({"tokenizer.ggml.model": None}, r"holds no tokenizer .* Put the file into a folder of its own"),
        ({"tokenizer.ggml.model": "rwkv"}, "tokenizer of the kind 'rwkv'"),
        ({"tokenizer.ggml.pre": "brand-new"}, "splits text in a way called 'brand-new'"),
        ({"tokenizer.ggml.pre": "default"}, "splits text in a way called 'default'"),
        ({"tokenizer.ggml.eos_token_id": 9999}, "damaged tokenizer .* eos_token_id is 9999"),
        ({"tokenizer.ggml.merges": ["ab"]}, "its lists do not fit together"),
        ({"tokenizer.ggml.merges": ["\u0123 \u0124"]}, "tokenizer that cannot be built"),
    ):
        path = tiny(f"{abs(hash(match))}.gguf", **changes)
        with pytest.raises(UserError, match=match):
            checkpoint_folder(path)
    folder = tmp_path / "own"
    folder.mkdir()
    shutil.move(path, folder / "model.gguf")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(next(tmp_path.glob("hf-*")) / name, folder / name)
    mirror = checkpoint_folder(folder)
    assert (mirror / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    before = checkpoint_fingerprint(mirror)
    (folder / "tokenizer.json").write_text((folder / "tokenizer.json").read_text() + " ")
    assert checkpoint_fingerprint(checkpoint_folder(folder)) != before


def test_split_files(tmp_path, tiny):
    one, first = tiny("one.gguf"), tiny("parts/many.gguf", split=4)
    count = len(list(first.parent.glob("many-*.gguf")))
    assert count > 1 and first.name == f"many-00001-of-{count:05d}.gguf"
    mirrors = [
        checkpoint_folder(path)
        for path in (one, first, first.parent, first.with_name(f"many-00002-of-{count:05d}.gguf"))
    ]
    assert mirrors[1] == mirrors[2] == mirrors[3] and mirrors[1].name.startswith("many-")
    whole, parts = (TensorFiles.open(mirror) for mirror in mirrors[:2])
    for name in whole.tensors:
        np.testing.assert_array_equal(parts.read(name), whole.read(name))
    assert len(parts.handles) == count
    second = first.with_name(f"many-00002-of-{count:05d}.gguf")
    content = second.read_bytes()
    second.unlink()
    with pytest.raises(UserError, match=rf"lacks 1 of the {count} files of many: many-00002"):
        checkpoint_folder(first)
    second.write_bytes(first.read_bytes())
    with pytest.raises(
        UserError, match="says that it is file 0 of its model, counted from 0, and its name that it is 1"
    ):
        checkpoint_folder(first)
    second.write_bytes(content)
    alone = shutil.copy(first, tmp_path / "alone.gguf")
    with pytest.raises(UserError, match=rf"is split into {count} files, but its name speaks of 1"):
        checkpoint_folder(alone)
    with pytest.raises(UserError, match="is no file of 2: files are counted from 00001"):
        read_gguf(first.with_name("many-00003-of-00002.gguf"))


def test_folders(tmp_path, tiny):
    folder = tmp_path / "models"
    path = tiny("models/a.gguf")
    assert as_folder(folder) == as_folder(path) and source_name(as_folder(path)) == "a.gguf"
    (folder / "mmproj-a.gguf").write_bytes(b"GGUF")
    assert as_folder(folder) == as_folder(path)
    shutil.copy(path, folder / "b.gguf")
    with pytest.raises(UserError, match=r"holds 2 GGUF models: a\.gguf, b\.gguf\. Pass the path of one"):
        as_folder(folder)
    (folder / "model.safetensors").write_bytes(b"")
    assert as_folder(folder) == folder  # a checkpoint with GGUF files beside it
    with pytest.raises(UserError, match="read from a disk only"):
        checkpoint_folder("gs://bucket/model.gguf")


def test_mirrors(tmp_path, tiny):
    """Stubs count in mirrors only, and the fingerprint is the file's content."""
    path = tiny()
    mirror = checkpoint_folder(path)
    assert checkpoint_folder(path) == mirror
    before = checkpoint_fingerprint(mirror)
    moved = shutil.copy(path, tmp_path / "renamed.gguf")
    assert checkpoint_fingerprint(checkpoint_folder(moved)) == before
    data = bytearray(path.read_bytes())
    data[-40] ^= 1
    pathlib.Path(moved).write_bytes(data)
    assert checkpoint_fingerprint(checkpoint_folder(moved)) != before
    copied = shutil.copytree(mirror, tmp_path / "copied")
    with pytest.raises(UserError, match="has neither model.safetensors nor"):
        TensorFiles.open(copied)
    (mirror / STUB).write_text("{}")
    with pytest.raises(UserError, match=re.escape(f"{mirror / STUB} is damaged: it names no files")):
        TensorFiles.open(mirror)
