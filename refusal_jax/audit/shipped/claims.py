"""What a checkpoint's files say of how it was made: records of editing tools, of merges and of exports, adapters and control
vectors beside the weights, the card, and names.

None of it proves anything about the weights. A record whose hashes are those of the files is stronger than one without, and words
of a card or a name are weak.
"""

import contextlib
import dataclasses
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from refusal_jax import hub
from refusal_jax.audit.shipped.card import card_of, claiming_name, claiming_sentences
from refusal_jax.audit.shipped.reading import MOST, at, record_of, text_of, texts, words, yaml_of
from refusal_jax.checkpoints.fingerprint import file_hashes
from refusal_jax.checkpoints.gguf_header import read_gguf
from refusal_jax.checkpoints.hub import fetch
from refusal_jax.checkpoints.mirrors import on_the_hub
from refusal_jax.errors import UserError
from refusal_jax.models.hf_config import ADAPTER

HERETIC = ("reproduce/reproduce.json", "reproduce.json")
OBLITERATUS, OURS = "abliteration_metadata.json", "refusal_jax.json"
MERGE = ("mergekit_config.yml", "mergekit_config.yaml", "mergekit_moe_config.yml")
CONTROL = "controlvector"  # general.architecture of llama.cpp's control vectors
MOST_FILES = 64  # GGUF files of which the header is read
VERIFIED, STATED, WEAK = "verified", "stated", "weak"  # strengths of a claim


@dataclasses.dataclass(frozen=True)
class Claim:
    """Something that a file says.

    source: the file or place. strength: VERIFIED where the hashes that it gives are those of the files, STATED for a tool's own
    record, WEAK for words. kind: "removal" of refusal, "merge", "adapter", "control_vector" or another "edit". says: what it
    says, one whole sentence. bases: the models that it names as what this one was made from.
    """

    source: str
    strength: str
    kind: str
    says: str
    bases: tuple[str, ...] = ()

    @property
    def record(self) -> dict[str, Any]:
        """Returns the claim in plain values."""
        return dataclasses.asdict(self) | {"bases": list(self.bases)}


def find_claims(
    folders: Sequence[pathlib.Path], names: Sequence[str], base_folders: Sequence[pathlib.Path] = ()
) -> list[Claim]:
    """Returns all claims of what was shipped with a checkpoint, the strongest first.

    folders: from `reading.places`. names: of the model. base_folders: the base's, whose card's own sentences are no claims.
    """
    found: list[Claim] = []
    for folder in folders:
        for look in (_heretic, _obliteratus, _ours, _merged, _adapters, _control_vectors):
            found += [one for one in look(folder) if one.source not in {known.source for known in found}]
    card, front = card_of(list(folders))
    sentences = claiming_sentences(card, card_of(list(base_folders))[0])
    tags = [tag for tag in texts(front.get("tags")) if claiming_name(tag)]
    if tags:
        found.append(Claim("README.md", WEAK, "removal", f"The card's tags hold {', '.join(tags[:6])}."))
    found += [Claim("README.md", WEAK, "removal", f"The card says: “{sentence}”") for sentence in sentences]
    for name in dict.fromkeys(names):
        if part := claiming_name(name):
            found.append(Claim("name", WEAK, "removal", f"The name {words(name)} holds “{part}”."))
    return sorted(found, key=lambda one: (VERIFIED, STATED, WEAK).index(one.strength))


def fetch_records(folder: pathlib.Path) -> None:
    """Fetches the records of a checkpoint on the hub into the hub's cache, as its mirror holds only what loading needs; without
    a network nothing is fetched."""
    named = on_the_hub(folder)
    if named is None or not named.revision:
        return
    with contextlib.suppress(Exception):  # whatever the hub's client raises
        listing = hub.listing(named)
        wanted = [name for name in (*HERETIC, OBLITERATUS, OURS, *MERGE) if name in listing.files]
        fetch(named, [name for name in wanted if listing.files[name].size < MOST], listing)


def claimed_bases(folders: Sequence[pathlib.Path], claims: Sequence[Claim]) -> list[str]:
    """Returns the models that a checkpoint's files name as what it was made from, each once."""
    front = card_of(list(folders))[1]
    named = texts(front.get("base_model")) + [base for claim in claims for base in claim.bases]
    for folder in folders:
        named += texts(record_of(folder / "config.json").get("_name_or_path"))
        named += texts(record_of(folder / ADAPTER).get("base_model_name_or_path"))
    return list(dict.fromkeys(named))


def _heretic(folder: pathlib.Path) -> Iterator[Claim]:
    """Yields what heretic records to make a model again: https://github.com/p-e-w/heretic, reproduce.json of any version."""
    for name in HERETIC:
        record = record_of(folder / name)
        program = at(record, "environment", "heretic") or at(record, "system", "heretic")
        if not isinstance(program, dict) and not at(record, "settings", "model"):
            continue
        base = words(at(record, "settings", "model")) or words(at(record, "base_model", "id"))
        hashes = record.get("hashes")
        same = _hashes_agree(folder, hashes if isinstance(hashes, dict) else {})
        version = (
            words(at(record, "version") if not isinstance(program, dict) else program.get("version"), 40) or "unknown"
        )
        says = f"heretic {version} wrote how it removed refusal from {base or 'a model that it does not name'}"
        numbers = _parameters(record.get("parameters"))
        says += f" ({numbers})" if numbers else ""
        says += {
            True: "; its hashes are those of the weight files.",
            None: ".",
            False: "; its hashes are not those of these files.",
        }[same]
        yield Claim(name, VERIFIED if same else STATED, "removal", says, (base,) if base else ())


def _parameters(value: Any) -> str:
    """Returns the numbers among nested parameters, a few of them, in words."""
    found: list[str] = []

    def walk(prefix: str, one: Any, depth: int) -> None:
        if isinstance(one, Mapping) and depth < 4:
            for key, inner in list(one.items())[:40]:
                walk(f"{prefix}.{words(str(key), 60)}".strip("."), inner, depth + 1)
        elif isinstance(one, int | float) and not isinstance(one, bool):
            found.append(f"{prefix} {one:.3g}")

    walk("", value, 0)
    return ", ".join(found[:12])


def _hashes_agree(folder: pathlib.Path, hashes: Mapping[str, Any]) -> bool | None:
    """Returns whether the sha256 that a record gives are those of the files in its folder; None if it gives none that can be
    compared."""
    known = {name: one for name, one in hashes.items() if isinstance(one, str) and pathlib.PurePath(name).name == name}
    paths = {name: folder / name for name in list(known)[:1000] if os.path.isfile(folder / name)}
    if not paths:
        return None
    found = file_hashes(folder, list(paths.values()))
    return len(paths) == len(known) and all(found[paths[name]] == known[name].lower() for name in known)


def _obliteratus(folder: pathlib.Path) -> Iterator[Claim]:
    """Yields what OBLITERATUS, and others that took over its file, write."""
    path = folder / OBLITERATUS
    if not os.path.isfile(path):
        return
    record = record_of(path)
    bases = [
        words(at(record, *keys))
        for keys in (
            ("source_model",),
            ("base_model",),
            ("model",),
            ("model_name",),
            ("parameters", "model"),
            ("config", "model"),
        )
    ]
    method = words(record.get("method")) or words(record.get("technique")) or words(at(record, "parameters", "method"))
    says = "It holds what tools such as OBLITERATUS write when they remove refusal"
    says += f": the method {method}." if method else "." if record else ", though it cannot be read."
    yield Claim(OBLITERATUS, STATED, "removal", says, tuple(dict.fromkeys(filter(None, bases)))[:3])


def _ours(folder: pathlib.Path) -> Iterator[Claim]:
    """Yields the provenance of an export of this package."""
    record = record_of(folder / OURS)
    kind = at(record, "edit", "kind")
    if not record:
        return
    files, base = record.get("files"), words(at(record, "base", "name"))
    weights = (
        {n: h for n, h in files.items() if n.endswith((".safetensors", ".gguf"))} if isinstance(files, dict) else {}
    )
    same = _hashes_agree(folder, weights)
    scale = at(record, "edit", "scale")
    by = f" by {scale:g}" if isinstance(scale, int | float) else ""
    did = (
        f"a direction was ablated{by}"
        if kind == "ablate"
        else f"a direction was added{by}"
        if kind == "add"
        else "it was edited"
    )
    state = {
        True: "and the weight files are those that were exported",
        None: "",
        False: "but the weight files are others now",
    }[same]
    says = f"refusal-jax recorded that in {base or 'a model'} {did}{', ' * bool(state)}{state}."
    word = "removal" if kind == "ablate" else "edit"
    yield Claim(OURS, VERIFIED if same else STATED, word, says, (base,) if base else ())


def _merged(folder: pathlib.Path) -> Iterator[Claim]:
    """Yields what mergekit merged."""
    for name in MERGE:
        config = yaml_of(text_of(folder / name, 1 << 20))
        if not config:
            continue
        models = list(dict.fromkeys(_models(config)))
        method = words(config.get("merge_method"), 60) or "a method that it does not name"
        edited = [model for model in models if claiming_name(model)]
        says = f"mergekit merged {len(models)} models by {method}: {', '.join(models[:8])}."
        yield Claim(name, STATED, "merge", says, tuple(models[:32]))
        if edited:
            said = f"Of the merged models, {', '.join(edited[:8])} are by their names without refusal."
            yield Claim(f"{name}, names", WEAK, "removal", said)


def _models(value: Any, depth: int = 0) -> Iterator[str]:
    """Yields the models that a config of mergekit names, at any depth."""
    if isinstance(value, list) and depth < 8:
        for one in value[:200]:
            yield from _models(one, depth + 1)
    elif isinstance(value, Mapping) and depth < 8:
        for key, one in list(value.items())[:200]:
            name = (at(one, "path") or at(one, "model", "path")) if isinstance(one, Mapping) else one
            if key in ("model", "base_model", "source_model") and words(name):
                yield words(name)
            elif isinstance(one, list | Mapping):
                yield from _models(one, depth + 1)


def _adapters(folder: pathlib.Path) -> Iterator[Claim]:
    """Yields a PEFT adapter that lies beside a model's weights: transformers loads it with them."""
    if os.path.isfile(folder / ADAPTER) and os.path.isfile(folder / "config.json"):
        base = words(record_of(folder / ADAPTER).get("base_model_name_or_path"))
        says = (
            f"A PEFT adapter{f' of {base}' if base else ''} lies beside the weights. transformers loads it with them where PEFT "
            "is installed, so the model that runs is not the one in the weight files, which is what is audited here."
        )
        yield Claim(ADAPTER, STATED, "adapter", says, (base,) if base else ())


def _control_vectors(folder: pathlib.Path) -> Iterator[Claim]:
    """Yields control vectors and adapters for llama.cpp that lie beside the weights."""
    try:
        paths = sorted(p for p in (*folder.glob("*.gguf"), *folder.glob("*/*.gguf")) if p.is_file())[:MOST_FILES]
    except OSError:
        return
    for path in paths:
        try:
            metadata = read_gguf(path).metadata
        except UserError:
            continue
        name = path.relative_to(folder).as_posix()
        if metadata.get("general.architecture") == CONTROL:
            hint = words(metadata.get("controlvector.model_hint"))
            what = f"{name} is a control vector for llama.cpp{f' ({hint})' if hint else ''}"
            says = f"{what}, which adds directions to the residual stream."
            yield Claim(name, STATED, "control_vector", says)
        elif metadata.get("general.type") == "adapter":
            yield Claim(name, STATED, "adapter", f"{name} is a LoRA adapter for llama.cpp.")
