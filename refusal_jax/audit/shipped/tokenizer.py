"""Compares the tokenizers of two checkpoints, part by part, and by what they make of texts."""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from refusal_jax.audit.shipped.reading import at, record_of, words
from refusal_jax.chat.qwen_tokenizer import RANKS
from refusal_jax.chat.tokenizers import SENTENCEPIECE
from refusal_jax.checkpoints.gguf_mirror import gguf_files
from refusal_jax.files import file_hash

FILE, CONFIG = "tokenizer.json", "tokenizer_config.json"
PARTS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")
SWITCHES = ("add_bos_token", "add_eos_token", "add_prefix_space", "clean_up_tokenization_spaces")
MOST = 64 << 20  # bytes of a tokenizer.json
SHOWN = 12


@dataclasses.dataclass(frozen=True)
class TokenizerFindings:
    """How a candidate's tokenizer differs from the base's.

    changed: whether any text may be read as other tokens, or other tokens are special. lines: what differs, in words, one line
    each. texts: how many of the probed texts become other ids, and of how many; None if that was not tried.
    """

    changed: bool
    lines: Sequence[str]
    texts: tuple[int, int] | None


def compare_tokenizers(
    base: pathlib.Path, candidate: pathlib.Path, tokenizers: tuple[Any, Any] | None, texts: Sequence[str]
) -> TokenizerFindings:
    """Returns how the tokenizers in two folders differ. tokenizers: both loaded, None if one of them could not be; texts: to try
    them on."""
    lines = _file_lines(base, candidate) + _special_lines(base, candidate)
    tried = None
    if tokenizers is not None:
        ids = [[list(one(text, add_special_tokens=False).input_ids) for text in texts] for one in tokenizers]
        tried = sum(before != after for before, after in zip(*ids, strict=True)), len(texts)
        if tried[0]:
            lines.append(f"{tried[0]} of {tried[1]} texts become other tokens.")
    return TokenizerFindings(bool(lines), lines, tried)


def _file_lines(base: pathlib.Path, candidate: pathlib.Path) -> list[str]:
    """Returns what differs in the files that hold the vocabulary."""
    made = [bool(gguf_files(folder)) for folder in (base, candidate)]
    if made[0] != made[1]:
        return []  # one was made from the metadata of a GGUF file, which has other parts for the same tokens
    if all(os.path.isfile(folder / FILE) for folder in (base, candidate)):
        if _hash(base / FILE) == _hash(candidate / FILE):
            return []
        ours, theirs = (_parts(record_of_large(folder / FILE)) for folder in (base, candidate))
        return _vocabulary_lines(ours, theirs) + [
            f"The {part.replace('_', '-')} is another one: {_short(ours[part])} before, {_short(theirs[part])} now."
            for part in (*PARTS, "merges", "kind")
            if ours[part] != theirs[part]
        ]
    lines = []
    for name in (FILE, SENTENCEPIECE, RANKS):
        there = [os.path.isfile(folder / name) for folder in (base, candidate)]
        if there[0] != there[1]:
            lines.append(f"Only the {'base' if there[0] else 'candidate'} has a {name}.")
        elif all(there) and _hash(base / name) != _hash(candidate / name):
            lines.append(f"{name} is another file.")
    return lines


def _hash(path: pathlib.Path) -> str:
    try:
        return file_hash(path)
    except OSError as error:
        return f"unreadable: {error.strerror}"


def record_of_large(path: pathlib.Path) -> dict[str, Any]:
    """Returns the JSON object of a tokenizer.json, {} for anything else or more than MOST bytes."""
    try:
        if path.stat().st_size > MOST:
            return {}
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _parts(record: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the parts of a tokenizer.json that decide about tokens, in one form whichever version wrote them."""
    model = record.get("model")
    model = model if isinstance(model, dict) else {}
    vocab, merges, added = model.get("vocab"), model.get("merges"), record.get("added_tokens")
    pieces = (
        {str(one[0]): i for i, one in enumerate(vocab) if isinstance(one, list) and one}
        if isinstance(vocab, list)
        else {}
    )
    merged = (
        [" ".join(map(str, one)) if isinstance(one, list) else str(one) for one in merges]
        if isinstance(merges, list)
        else []
    )
    tokens = [one for one in added if isinstance(one, dict)] if isinstance(added, list) else []
    return {
        "vocab": vocab if isinstance(vocab, dict) else pieces,
        "merges": hashlib.sha256("\n".join(merged).encode("utf-8", "replace")).hexdigest()[:12] if merged else "none",
        "kind": model.get("type", "BPE" if merged else None),
        "added": {str(one.get("content")): (one.get("id"), bool(one.get("special"))) for one in tokens},
        **{part: record.get(part) for part in PARTS},
    }


def _vocabulary_lines(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """Returns what differs in the vocabulary and the added tokens."""
    lines = []
    for name, what in (("vocab", "tokens of the vocabulary"), ("added", "added tokens")):
        before, after = ours[name], theirs[name]
        new, gone = sorted(after.keys() - before.keys()), sorted(before.keys() - after.keys())
        moved = [token for token in before if token in after and before[token] != after[token]]
        for tokens, did in (
            (new, "new"),
            (gone, "gone"),
            (moved, "changed in their ids or in whether they are special"),
        ):
            if tokens:
                lines.append(f"{len(tokens)} {what} are {did}: {_listed(tokens)}.")
    return lines


def _special_lines(base: pathlib.Path, candidate: pathlib.Path) -> list[str]:
    """Returns what differs in special tokens and switches of tokenizer_config.json."""
    ours, theirs = (record_of(folder / CONFIG) for folder in (base, candidate))
    lines = []
    for name in SPECIAL:
        before, after = (_content(one.get(name)) for one in (ours, theirs))
        if before != after:
            lines.append(f"{name} is {after or 'none'}, and was {before or 'none'}.")
    for name in SWITCHES:
        before, after = bool(ours.get(name)), bool(theirs.get(name))
        if name in ours and name in theirs and before != after:
            lines.append(f"{name} is {after}, and was {before}.")
    return lines


def _content(value: Any) -> str:
    """Returns the text of a special token, which may be an object."""
    return words(at(value, "content")) if isinstance(value, dict) else words(value)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False) if not isinstance(value, str) else value
    return text if len(text) <= 160 else f"{text[:160]}…"


def _listed(tokens: Sequence[str]) -> str:
    shown = ", ".join(json.dumps(str(token)[:60], ensure_ascii=False) for token in tokens[:SHOWN])
    return shown + (f" and {len(tokens) - SHOWN} more" if len(tokens) > SHOWN else "")
