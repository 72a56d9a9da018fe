"""Fetches checkpoints from the Hugging Face hub into its own cache, and mirrors them.

Only safetensors and what config, tokenizer, template and licence need are taken: no pickles, no code, no second copies of the
weights. The mirror holds links to exactly these, so that a checkpoint has one fingerprint, whatever else is in the cache.
Where each process reads its own slices only, the large weight files stay on the hub, and the mirror has stubs for them.
"""

import contextlib
import logging
import os
import pathlib
import re
import shutil
import threading
from collections.abc import Collection, Iterator, Mapping

from refusal_jax import hub
from refusal_jax.checkpoints.adapters import is_adapter
from refusal_jax.checkpoints.fingerprint import SMALL, file_hashes
from refusal_jax.checkpoints.lora import ADAPTER as ADAPTER_WEIGHTS
from refusal_jax.checkpoints.mirrors import STUB, keep_only, link, mirrors, read_origin, write_origin
from refusal_jax.errors import UserError, did_you_mean, shown
from refusal_jax.files import read_json, to_json, write_atomically
from refusal_jax.hub import HubFile, HubName, Listing
from refusal_jax.models.hf_config import ADAPTER, MERGE
from refusal_jax.progress import Progress

LOG = logging.getLogger(__name__)
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
# The small files of a checkpoint that anything here reads or passes on, licences among them.
SMALL_FILES = re.compile(
    r"(config|generation_config|quantize_config|hf_quant_config|quant_config|adapter_config"
    r"|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab|chat_template|processor_config|preprocessor_config"
    r"|model\.safetensors\.index)\.json"
    r"|merges\.txt|chat_template\.jinja|.+\.tiktoken|tokenizer\.model|.*\.spm"
    r"|README\.md|(LICEN[CS]E|NOTICE|USE_POLICY|COPYING)[^/]*",
    re.IGNORECASE,
)
SPLIT = re.compile(r"(.+)-\d{5}-of-(\d{5})\.gguf")
LOOK = 0.5  # seconds between looks at how much has arrived


def hub_mirror(name: HubName, weights: bool = True, streamed: bool = False, adapters: bool = False) -> pathlib.Path:
    """Returns the mirror of a checkpoint on the hub, or the path of a GGUF file once it is in the cache.

    weights: False for config and tokenizer alone. streamed: leave large weight files on the hub, as several hosts do anyway.
    adapters: whether the repository may be a PEFT adapter's, whose folder in the hub's cache is then returned.
    All processes must call this. What is in the cache already at the commit needs no network. Raises UserError for whatever
    the hub says, for repositories that hold no weights of a kind that is read, for a full disk, and for files that arrive
    damaged.
    """
    at = name.at(hub.commit_of(name))
    streamed = not name.file and (streamed or not hub.downloads())
    folder = mirrors() / f"{at.repo.replace('/', '--')}-{at.revision[:12]}"
    wanted = ("all",) if weights and not streamed else ("all", "streamed") if weights else ("all", "streamed", "small")
    if not name.file and _made(folder, wanted):
        return folder
    try:
        listing: Listing | None = hub.listing(at)
    except Exception as error:
        if adapters and hub.unreachable(error) and is_adapter(snapshot_of(at)):
            return snapshot_of(at)
        if not hub.unreachable(error) or not (snapshot_of(at) / (name.file or "config.json")).is_file():
            raise hub.explanation(name, error) from None
        listing = None  # what another tool fetched is read, and whoever reads it says what is missing
    snapshot = snapshot_of(at)
    if name.file:
        if listing is not None:
            fetch(at, gguf_files(name, listing), listing)
        return snapshot / name.file
    if adapters and listing is not None and ADAPTER in listing.files and "config.json" not in listing.files:
        fetch(at, [file for file in listing.files if SMALL_FILES.fullmatch(file) or file == ADAPTER_WEIGHTS], listing)
        return snapshot
    if listing is not None:
        check_kind(name, listing)
    files = {p.name for p in snapshot.iterdir()} if listing is None else set(listing.files)
    small = sorted(file for file in files if SMALL_FILES.fullmatch(file) and (weights or file != "README.md"))
    if listing is None:
        _fill(folder, snapshot, [*small, *weight_files(name, snapshot, files)], {})
        write_origin(folder, at.repo, at.revision, held="whatever there was")
        return folder
    fetch(at, small, listing)
    large = weight_files(name, snapshot, files) if weights else []
    left = {file for file in large if streamed and listing.files[file].size > SMALL}
    fetch(at, [file for file in large if file not in left], listing)
    stubs = {f"{file}{STUB}": _stub(at, file, listing.files[file]) for file in left}
    _fill(folder, snapshot, [file for file in (*small, *large) if file not in left], stubs)
    write_origin(folder, at.repo, at.revision, held="streamed" if left else "all" if weights else "small")
    return folder


def snapshot_of(at: HubName) -> pathlib.Path:
    """Returns the folder of a commit in the hub's cache, whether it is there or not."""
    return hub.repository_folder(at) / "snapshots" / at.revision


def _made(folder: pathlib.Path, wanted: Collection[str]) -> bool:
    """Returns whether a mirror is there and holds one of what is wanted, all links leading somewhere."""
    return read_origin(folder).get("held") in wanted and all(path.exists() for path in folder.iterdir())


def _fill(folder: pathlib.Path, snapshot: pathlib.Path, files: Collection[str], stubs: Mapping[str, bytes]) -> None:
    """Makes a mirror hold links to files of a snapshot, and stubs, and nothing else."""
    found = [file for file in files if (snapshot / file).is_file()]
    for file in found:
        link(folder / file, snapshot / file)
    for stub, content in stubs.items():
        write_atomically(folder / stub, content)
    keep_only(folder, {*found, *stubs})


def _stub(at: HubName, file: str, entry: HubFile) -> bytes:
    where = {"address": f"hf://{at}/{file}", "hub": [at.repo, at.revision, file]}
    return to_json(where | {"size": entry.size, "sha256": entry.sha256})


def check_kind(name: HubName, listing: Listing) -> None:
    """Raises UserError for a repository without a config, or with weights of other kinds only, before anything is fetched."""
    there = sorted(listing.files)
    gguf = [file for file in there if file.endswith(".gguf")]
    pickled = [file for file in there if file.endswith((".bin", ".pt", ".pth"))]
    if SINGLE in there or INDEX in there:
        if "config.json" not in there:
            raise UserError(
                f"{name} has no config.json, so no tool could load it as a chat model. Take another repository."
            )
        return
    if ADAPTER in there:
        base = read_json(_fetched(name.at(listing.commit), ADAPTER, listing)).get("base_model_name_or_path")
        code = MERGE.format(
            folder=name.repo,
            target=f"{name.repo.rpartition('/')[2]}-merged",
            base=repr(base if isinstance(base, str) else "BASE"),
        )
        raise UserError(
            f"{name} is a PEFT adapter of {shown(base or 'a base model')}, not a model. Merge the two:{code}"
        )
    if gguf:
        raise UserError(
            f"{name} has no safetensors, but GGUF files: {_listed(gguf)}. Name the one that you want, such as "
            f"{name.repo}/{gguf[0]}{f'@{name.revision}' * bool(name.revision)}."
        )
    if pickled:
        raise UserError(
            f"{name} has no safetensors, but pickled weights ({_listed(pickled)}), which can run code when opened and are never "
            "read. Take a repository with safetensors, or convert them with transformers' save_pretrained."
        )
    others = [file for file in there if file.endswith(".safetensors")]
    hint = f" Its safetensors are {_listed(others)}, which transformers would not load either." if others else ""
    raise UserError(
        f"{name} has neither {SINGLE} nor {INDEX}.{hint} Name the repository of a chat model for transformers."
    )


def weight_files(name: HubName, snapshot: pathlib.Path, files: Collection[str]) -> list[str]:
    """Returns which of the files hold the weights, as the snapshot's index says where there is one.

    Raises UserError where it is not clear which weights count.
    """
    if INDEX not in files:
        return [SINGLE]
    weight_map = read_json(snapshot / INDEX).get("weight_map")
    named = sorted({str(file) for file in weight_map.values()}) if isinstance(weight_map, dict) else []
    if SINGLE in files and SINGLE not in named:
        raise UserError(
            f"{name} holds both {SINGLE} and {INDEX}, which names other files: it is not clear which weights count. Fetch it by "
            f"`hf download {name.repo} --local-dir DIR`, remove one of the two, and name the folder."
        )
    return [file for file in named if file in files and "/" not in file]


def gguf_files(name: HubName, listing: Listing) -> list[str]:
    """Returns the file that is named, and the other parts where it is one of several. Raises UserError if it is not there."""
    there = sorted(file for file in listing.files if file.endswith(".gguf"))
    if name.file not in there:
        known = f" It has {_listed(there)}." if there else " It has no GGUF files."
        raise UserError(f"{name.repo} has no file {name.file}.{known}{did_you_mean(name.file, there)}")
    part = SPLIT.fullmatch(name.file)
    if part is None:
        return [name.file]
    return [file for file in there if (found := SPLIT.fullmatch(file)) and found.groups() == part.groups()]


def _listed(names: list[str], most: int = 12) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _fetched(at: HubName, file: str, listing: Listing) -> pathlib.Path:
    fetch(at, [file], listing)
    return snapshot_of(at) / file


def fetch(at: HubName, files: Collection[str], listing: Listing) -> None:
    """Fetches files at a commit into the hub's cache, those that are not there yet; broken downloads go on where they stopped.

    Raises UserError for what the hub says, a disk that is too full, and files whose hash is not the one that the hub names.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import tqdm as bar_of_the_hub

    class NoBar(bar_of_the_hub):
        def __init__(self, *args, **more):
            super().__init__(*args, **more | {"disable": True})

    snapshot = snapshot_of(at)
    missing = [file for file in files if not (snapshot / file).exists()]
    if not missing:
        return
    _check_room(at, sum(listing.files[file].size for file in missing))
    try:
        with _watched(at, missing, listing):
            escaped = [re.sub(r"([*?\[])", r"[\1]", file) for file in missing]
            snapshot_download(at.repo, revision=at.revision, allow_patterns=escaped, tqdm_class=NoBar)
    except Exception as error:
        raise hub.explanation(at, error) from None
    weights = [snapshot / file for file in missing if listing.files[file].sha256 is not None]
    for path, found in file_hashes(snapshot, weights).items():
        file = path.relative_to(snapshot).as_posix()
        known = str(listing.files[file].sha256)
        if found != known:
            path.resolve().unlink()
            path.unlink(missing_ok=True)
            raise UserError(
                f"{at.repo}/{file} did not arrive as it is on the hub: its sha256 is {found[:16]}…, expected {known[:16]}…. A "
                "proxy or a mirror of the hub answered something else, or the disk is damaged. It was removed; try again."
            )


def _check_room(at: HubName, size: int) -> None:
    """Raises UserError if the disk of the hub's cache has no room for `size` bytes more."""
    folder = hub.repository_folder(at)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise hub.explanation(at, error) from None
    if size > free:
        raise UserError(
            f"{at.repo} needs {size:,} bytes in the hub's cache ({folder.parent}), whose disk has {free:,} free. Free space, or "
            f"set HF_HOME to a folder on another disk; hf://{at.repo} reads the weights without keeping them."
        )


@contextlib.contextmanager
def _watched(at: HubName, files: Collection[str], listing: Listing) -> Iterator[None]:
    """Shows how much of the files has arrived, by the sizes in the cache: the client's own bars would be many."""
    total, blobs = sum(listing.files[file].size for file in files), hub.repository_folder(at) / "blobs"
    over = threading.Event()

    def held() -> int:
        with contextlib.suppress(OSError):  # a file that is renamed meanwhile
            return sum(entry.stat().st_size for entry in os.scandir(blobs))
        return 0

    with Progress(f"fetching {at.repo}", total, "B", delay=1.0) as bar:
        before = held()

        def look() -> None:
            while not over.wait(LOOK):
                bar.update(max(0, min(held() - before, total) - bar.n))

        thread = threading.Thread(target=look, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
