"""Tells whether a base is what it is called: by the hashes that the hub, its cache or its downloads record, and by the names that
the candidate gives for what it was made from."""

import dataclasses
import os
import pathlib
import re
from collections.abc import Sequence

from refusal_jax import hub
from refusal_jax.audit.shipped.reading import text_of
from refusal_jax.checkpoints.fingerprint import file_hashes
from refusal_jax.checkpoints.mirrors import on_the_hub
from refusal_jax.errors import UserError
from refusal_jax.hub import HubName, model_name

SHA256 = re.compile(r"[0-9a-f]{64}")
DOWNLOADS = pathlib.Path(".cache", "huggingface", "download")  # in a folder of `hf download --local-dir`
WEIGHTS = (".safetensors", ".gguf")
# What copies of a model in other formats add to its name.
STORED_AS = re.compile(
    r"[-_.](?:gguf|gptq\w*|awq\w*|bnb|4bit|8bit|int4|int8|fp8|fp16|bf16|mlx|q\d\w*|w\d+a\d+|unsloth)$", re.IGNORECASE
)


@dataclasses.dataclass(frozen=True)
class Origin:
    """What is known of where a checkpoint's weight files are from.

    state: "same" as recorded, "other", or "not_checked". says: how it was checked, or why not, one whole sentence.
    """

    state: str
    says: str


def check_origin(folder: pathlib.Path) -> Origin:
    """Returns whether the weight files in a folder are those that the hub has under their name. Reads them whole, once."""
    named = on_the_hub(folder)
    known, source = _recorded(folder, named)
    paths = {name: folder / name for name in known if os.path.isfile(folder / name)}
    if not paths:
        what = (
            f"No record of the hub's hashes of {named} is on this machine"
            if named
            else "The base is a folder without a record of the hub"
        )
        return Origin("not_checked", f"{what}, so it was not checked that it is what it is called.")
    try:
        found = file_hashes(folder, list(paths.values()))
    except OSError as error:
        return Origin("not_checked", f"The base's weight files could not be hashed ({error.strerror or error}).")
    other = sorted(name for name, path in paths.items() if found[path] != known[name])
    if other:
        return Origin(
            "other", f"{', '.join(other[:6])} of the base differ from {source}: the base is not what it is called."
        )
    return Origin("same", f"The sha256 of the base's {len(paths)} weight files are those of {source}.")


def _recorded(folder: pathlib.Path, named: HubName | None) -> tuple[dict[str, str], str]:
    """Returns the sha256 of weight files by name as they are recorded, and by what."""
    if named is not None:
        try:
            files = hub.listing(named).files
            return {
                n: one.sha256 for n, one in files.items() if n.endswith(WEIGHTS) and one.sha256
            }, f"the hub's {named}"
        except Exception:  # whatever the client raises: the cache knows, too
            blobs = {
                p.name: pathlib.Path(os.path.realpath(p)).name for p in folder.iterdir() if p.name.endswith(WEIGHTS)
            }
            source = f"the hub's cache of {named}, as it was when it was fetched; the hub itself could not be asked"
            return {n: one for n, one in blobs.items() if SHA256.fullmatch(one)}, source
    known = {}
    for path in folder.iterdir() if folder.is_dir() else ():
        lines = text_of(folder / DOWNLOADS / f"{path.name}.metadata", 1000).split("\n")
        if path.name.endswith(WEIGHTS) and len(lines) > 1 and SHA256.fullmatch(lines[1].strip()):
            known[path.name] = lines[1].strip()
    return known, "the record of their download from the hub"


def names_of(given: str, folder: pathlib.Path) -> list[str]:
    """Returns the names on the hub that a checkpoint goes by: the one that the user gave, and that of its mirror."""
    named, found = on_the_hub(folder), []
    try:
        told = model_name(given) if not os.path.lexists(given) else None
    except UserError:
        told = None
    for one in (named, told[0] if told else None):
        if one is not None:
            found.append(one.repo)
    return list(dict.fromkeys(found))


def named_otherwise(claimed: Sequence[str], names: Sequence[str]) -> bool | None:
    """Returns whether a candidate names models as its origin, and none of them is the base; None if that cannot be told.

    claimed: from `claims.claimed_bases`. names: of the base on the hub.
    """
    told = [name for name in claimed if re.fullmatch(r"[\w.\-]+/[\w.\-]+", name)]
    if not told or not names:
        return None
    return not {_last(name) for name in told} & {_last(name) for name in names}


def _last(name: str) -> str:
    """Returns the last part of a name without what copies in other formats add to it."""
    name = name.rstrip("/").rpartition("/")[2].lower()
    while (shorter := STORED_AS.sub("", name)) != name:
        name = shorter
    return name
