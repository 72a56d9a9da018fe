"""Broken checkpoints by the hundred: whatever is wrong with a file, what comes is a UserError that names it, or a model
whose logits are finite. Every copy is made from a seed, so that a failure can be made again."""

import contextlib
import json
import os
import pathlib
import random
import shutil
import time

import numpy as np
import pytest
import tiny

from refusal_jax import UserError, demo_model_path, load_model
from refusal_jax.chat import templates
from refusal_jax.checkpoints.tensor_files import INDEX, SINGLE

COPIES, GROUP = 640, 80
SAMPLE = 20  # of the copies that load, one in so many is run: each may need a compile
SLOW = 30.0  # seconds, of which a copy needs some hundredths on a quiet machine
HUGE = (10**12, 2**31, 2**63, 10**400, float("inf"), float("nan"), 1e300, 1e-300)
VALUES = (*HUGE, -1, 0, 1, 0.5, "text", "", "\ud800", "\0", "x" * 100_000, [], {}, [1], [[["deep"]]], None, True, False)
TEMPLATES = (
    "{% for i in range(99999) %}{% for j in range(99999) %}{{ i }}{% endfor %}{% endfor %}",
    "{% for i in range(10 ** 9) %}{% endfor %}",
    "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
    "{{ messages | no_such_filter }}",
    "{{ no_such_function(messages) }}",
    "{{ raise_exception('system prompt needed') }}",
    "{{ messages[0]['content'].__class__.__mro__ }}",
    "{% include 'other' %}",
    "{% if %}",
    "{{ " + "(" * 3000 + ")" * 3000 + " }}",
    "{{ 1 / 0 }}",
    "{{ messages[0].content ~ messages[9].content.nothing.here }}",
    "{{ messages[0].content * 0 }}",
    "{{ messages[0].content }}",
    "{{ messages[0].content.encode('utf-16').decode('utf-8') }}",
    "{{ '\\ud800' ~ messages[0].content }}",
)
CONTENTS = (b"", b"\0" * 64, b"\xff\xfe\xfd", b"<html>404</html>", b"null", b"[]", b"3", b'"text"', b"{}", b"[" * 5000)
CONTENTS += (
    b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
    b"\xef\xbb\xbf{}",
    b'{"a": 1, "a": 2}',
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Checkpoints to be broken, one with a single weight file and one with several."""
    shards = tiny.tiny_llama(tmp_path_factory.mktemp("whole") / "shards", shards="40KB")
    (shards / "chat_template.json").write_text(json.dumps({"chat_template": tiny.TEMPLATE}))
    return [demo_model_path(), shards]


def copied(source: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    """A copy of links, each of which a mutation may replace."""
    folder.mkdir()
    for path in source.iterdir():
        if path.is_file():
            (folder / path.name).symlink_to(path)
    return folder


def rewrite(path: pathlib.Path, data: bytes) -> None:
    path.unlink(missing_ok=True)
    path.write_bytes(data)


def places(value, path=()):
    """The paths of all values in a JSON value."""
    yield path
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(inner, (*path, key))


def replaced(draw: random.Random, path: pathlib.Path) -> str:
    """The file becomes something that is no file, or one of other content."""
    kind = draw.choice(("gone", "folder", "loop", "dangling", "pipe", "device", *CONTENTS))
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "dangling":
        path.symlink_to(path.with_name("nowhere"))
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "pipe":
        os.mkfifo(path)
    elif isinstance(kind, bytes):
        path.write_bytes(kind)
    return str(kind[:30])


def damaged(draw: random.Random, path: pathlib.Path) -> str:
    """Some bytes of the file change, or its end is missing."""
    data = bytearray(path.read_bytes())
    if draw.random() < 0.4:
        at = draw.randrange(len(data))
        rewrite(path, data[:at])
        return f"cut at {at}"
    span = min(len(data), 4096) if path.suffix == ".safetensors" else len(data)
    for _ in range(draw.choice((1, 3, 30))):
        data[draw.randrange(span)] = draw.choice((0, 255, 34, 123, draw.randrange(256)))
    rewrite(path, data)
    return "bytes changed"


def revalued(draw: random.Random, path: pathlib.Path) -> str:
    """One value of a JSON file becomes another, goes, or moves."""
    value = json.loads(path.read_text())
    found = [place for place in places(value) if place]
    if draw.random() < 0.5:  # else tokens of the vocabulary are nearly all that there is
        found = [place for place in found if len(place) < 3]
    *outer, key = draw.choice(found)
    inner = value
    for step in outer:
        inner = inner[step]
    if isinstance(inner, dict) and draw.random() < 0.2:
        inner[str(draw.choice(("new", "", key)))] = inner.pop(key)
    elif draw.random() < 0.1:
        del inner[key]
    else:
        inner[key] = draw.choice(VALUES)
    text = json.dumps(value)
    if draw.random() < 0.1:
        text = f'{text[:-1]}, "{key}": {"[" * 990}{"]" * 990}}}'
    rewrite(path, text.encode())
    return f"{[*outer, key]}"


def reworded(draw: random.Random, path: pathlib.Path) -> str:
    """Another chat template."""
    text = draw.choice(TEMPLATES)
    rewrite(path, text.encode() if path.suffix == ".jinja" else json.dumps({"chat_template": text}).encode())
    return text[:60]


def reheaded(draw: random.Random, path: pathlib.Path) -> str:
    """A weight file whose header lies."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    name = draw.choice(list(header))
    key = draw.choice(("dtype", "shape", "data_offsets", None))
    values = ("F64", "BF16", "I8", "F8_E4M3", "X", [1 << 40], [0, 1 << 62], [-1], [0, 8], [8, 0], *VALUES)
    if key is None or not isinstance(header[name], dict) or key not in header[name]:
        header[draw.choice(("", "lm_head.weight", "model." + name, name + ".lora_A"))] = header.pop(name)
    else:
        header[name][key] = draw.choice(values)
    text, sizes = json.dumps(header).encode(), (0, 1, 1 << 40, 1 << 63)
    told = draw.choice(sizes) if draw.random() < 0.1 else len(text)
    rewrite(path, told.to_bytes(8, "little") + text + data[8 + size :])
    return f"{name} {key}"


def reindexed(draw: random.Random, path: pathlib.Path) -> str:
    """An index that names other files."""
    index = json.loads(path.read_text())
    files = (
        "../" + SINGLE,
        "/etc/passwd",
        "",
        ".",
        "config.json",
        INDEX,
        "a\0b",
        "x" * 300,
        *index["weight_map"].values(),
    )
    name = draw.choice(list(index["weight_map"]))
    index["weight_map"][draw.choice((name, "extra"))] = value = draw.choice(files)
    rewrite(path, json.dumps(index).encode())
    return f"{name} in {value[:30]!r}"


def broken(seed: int, whole: list[pathlib.Path], folder: pathlib.Path) -> str:
    """Makes the copy of this seed, and tells what is broken in it."""
    draw = random.Random(seed)
    copied(draw.choice(whole), folder)
    told = []
    for _ in range(draw.choice((1, 1, 1, 2))):
        path = draw.choice(sorted(path for path in folder.iterdir() if path.is_file()))
        ways = [replaced, damaged, damaged]
        if path.suffix == ".json":
            ways += [revalued] * 6
        if path.name.startswith("chat_template"):
            ways += [reworded] * 4
        if path.suffix == ".safetensors":
            ways += [reheaded] * 4
        if path.name == INDEX:
            ways += [reindexed] * 6
        way = draw.choice(ways)
        with contextlib.suppress(
            ValueError, LookupError, TypeError, AttributeError, RecursionError
        ):  # of a file broken twice
            told.append(f"{path.name} {way.__name__}: {way(draw, path)}")
    return "; ".join(told)


@pytest.mark.parametrize("start", range(0, COPIES, GROUP))
def test_broken_copies_load_or_say_what_is_wrong(start, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(templates, "RENDER_SECONDS", 0.3)
    loaded = 0
    for seed in range(start, start + GROUP):
        folder = tmp_path / f"copy-{seed}"
        told, began = broken(seed, whole, folder), time.monotonic()
        try:
            model = load_model(folder)
            batch = model.encode(["hi there", "How do I bake the bread?"])
            assert len(model.chat.post_instruction_ids) and batch.tokens.dtype == np.int32, (seed, told)
            assert time.monotonic() - began < SLOW, (seed, told)
            loaded += 1
            if loaded % SAMPLE == 1:
                logits = np.asarray(model.logits(batch.tokens, batch.mask))
                assert logits.shape == (2, model.config.vocab_size) and np.isfinite(logits).all(), (seed, told)
                assert all(isinstance(reply, str) for reply in model.chat.decode(batch.tokens)), (seed, told)
        except UserError as error:
            assert time.monotonic() - began < SLOW, (seed, told)
            assert str(folder) in str(error) and len(str(error)) < 3000, (seed, told, str(error)[:3000])
        except (AssertionError, KeyboardInterrupt):
            raise
        except BaseException as error:  # a panic of Rust code is no Exception
            raise AssertionError(f"copy {seed}, {told}: {type(error).__name__}: {error}") from error
        shutil.rmtree(folder)
    assert loaded >= 5
