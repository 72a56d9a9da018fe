"""Broken checkpoints by the hundred: whatever is wrong with a file, what comes is a UserError that names it, or a model
whose logits are finite. Every copy is made from a seed, so that a failure can be made again."""

import json
import pathlib
import random
import shutil
import time

import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file

from refusal_jax import UserError, demo_model_path, load_model
from refusal_jax.models.tensor_files import INDEX, SINGLE

COPIES, AT_ONCE = 600, 60
SLOW = 8.0  # seconds, after which a copy counts as one that hangs
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
        import os

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
    return f"{outer}, {key!r}: {str(inner[key])[:40] if key in inner or isinstance(inner, list) and key < len(inner) else 'gone'}"


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
    text = json.dumps(header).encode()
    if draw.random() < 0.1:
        size = draw.choice((0, 1, 1 << 40, 1 << 63, len(text) + 8))
    else:
        size = len(text)
    rewrite(path, size.to_bytes(8, "little") + text + data[8 + int.from_bytes(data[:8], "little") :])
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
        try:
            told.append(f"{path.name} {way.__name__}: {way(draw, path)}")
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
            pass  # what the first mutation left
    return "; ".join(told)
