"""The Hugging Face hub: names of repositories, the commits that they stand for, and the hub's errors in words.

All traffic goes through `huggingface_hub`, which reads HF_TOKEN, HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE. A name without a
commit may mean another content tomorrow, so in a `session`, such as a study, a name keeps the commit that it had at first.
"""

import contextlib
import dataclasses
import logging
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

from refusal_jax import distributed
from refusal_jax.errors import UserError, did_you_mean
from refusal_jax.files import cannot_write, write_atomically

LOG = logging.getLogger(__name__)
COMMIT = re.compile(r"[0-9a-f]{40}")
PART = r"[A-Za-z0-9_][\w.\-]{0,95}"
MODEL = re.compile(rf"({PART}/{PART})(?:/((?:[^/@]+/)*[^/@]+\.gguf))?(?:@(.+))?", re.ASCII)
EXPLICIT = re.compile(r"hf:(/*)(.*)", re.DOTALL)
TIMEOUT = 20.0  # seconds for an answer of the hub's API
KINDS = {"model": "model", "dataset": "data set"}


@dataclasses.dataclass(frozen=True)
class HubName:
    """A repository on the hub. revision: a branch, a tag or a commit, "" for the main branch. file: one file in it, "" for the
    repository as a whole. kind: a key of KINDS."""

    repo: str
    revision: str = ""
    file: str = ""
    kind: str = "model"

    def __str__(self) -> str:
        return self.repo + f"/{self.file}" * bool(self.file) + f"@{self.revision}" * bool(self.revision)

    @property
    def key(self) -> str:
        """Returns the name that its commit is recorded under, which all files of the repository share."""
        return "hf:" * (self.kind == "dataset") + str(dataclasses.replace(self, file=""))

    def at(self, commit: str) -> "HubName":
        """Returns the name of the same at a commit."""
        return dataclasses.replace(self, revision=commit)


def model_name(text: str) -> tuple[HubName, str] | None:
    """Returns the name that `ORG/NAME`, `ORG/NAME@REVISION` or `ORG/NAME/FILE.gguf` stands for, and what is put before it, "",
    "hf:" or "hf://"; None for a text that is none. Raises UserError for what follows hf: and is none."""
    explicit = EXPLICIT.fullmatch(text)
    before = "" if explicit is None else "hf://" if explicit[1] else "hf:"
    found = MODEL.fullmatch(explicit[2] if explicit else text)
    if found is None or ".." in f"{found[1]}/{found[2]}":
        if explicit is None:
            return None
        raise UserError(
            f"{text} is not the name of a model on the hub. Write {before}ORG/NAME, {before}ORG/NAME@REVISION or "
            f"{before}ORG/NAME/FILE.gguf; a folder inside a repository cannot be named."
        )
    return HubName(found[1], found[3] or "", found[2] or ""), before


@dataclasses.dataclass(frozen=True)
class HubFile:
    """A file in a repository. size: in bytes. sha256: of its content, None for the small files that git itself keeps."""

    size: int
    sha256: str | None


@dataclasses.dataclass(frozen=True)
class Listing:
    """The files of a repository at a commit, by path."""

    commit: str
    files: Mapping[str, HubFile]


@dataclasses.dataclass
class Session:
    """pinned: commits that names stand for, by their `key`. found: the same for all names that were asked for. download: whether
    each of several hosts downloads models as a whole."""

    pinned: Mapping[str, str]
    found: dict[str, str]
    download: bool = False


_session: Session | None = None


@contextlib.contextmanager
def session(pinned: Mapping[str, str], download: bool = False) -> Iterator[dict[str, str]]:
    """Makes names stand for the commits in `pinned`, and any other name for the commit that it has when it is first asked for.

    download: whether each of several hosts downloads models as a whole. Yields the commits of all names that were asked for.
    """
    global _session  # not a context variable, because threads that a job starts must see it
    before, _session = _session, Session(pinned, {}, download)
    try:
        yield _session.found
    finally:
        _session = before


def downloads() -> bool:
    """Returns whether this process downloads models as a whole, rather than to read only its slices of them."""
    return not distributed.several() or (_session is not None and _session.download)


def commit_of(name: HubName) -> str:
    """Returns the commit that a name stands for, the same in all processes, all of which must call this.

    Raises UserError for a repository or revision that is not there or may not be read, and if the hub cannot be reached and
    the cache does not tell either.
    """
    if COMMIT.fullmatch(name.revision):
        return name.revision
    if _session is not None and name.key in _session.found:
        return _session.found[name.key]
    pinned = None if _session is None else _session.pinned.get(name.key)
    if pinned is not None:
        _tell_if_moved(name, pinned)
    commit = pinned or distributed.share_json(_newest(name) if distributed.first() else None)
    if _session is not None:
        _session.found[name.key] = commit
    return commit


def _newest(name: HubName) -> str:
    """Returns the commit that a name stands for on the hub now, or stood for when the hub was last reached."""
    reference = repository_folder(name) / "refs" / (name.revision or "main")
    try:
        commit = listing(name).commit
    except Exception as error:
        if not unreachable(error):
            raise explanation(name, error) from None
        commit = reference.read_text().strip() if reference.is_file() else ""
        if not COMMIT.fullmatch(commit):
            raise explanation(name, error) from None
        if type(error).__name__ != "OfflineModeIsEnabled":  # which was asked for
            LOG.warning(
                f"{name}: the hub could not be reached ({_reason(error)}), so commit {commit} of the cache is used."
            )
        return commit
    with contextlib.suppress(UserError, OSError):  # as the client does, so that others find it too without a network
        if not reference.is_file() or reference.read_text() != commit:
            write_atomically(reference, commit.encode())
    return commit


def _tell_if_moved(name: HubName, pinned: str) -> None:
    if not distributed.first():
        return
    with contextlib.suppress(Exception):  # it is only told
        now = listing(name).commit
        if now != pinned:
            LOG.info(
                f"{name} is now at commit {now} on the hub. This run began with {pinned} and goes on with it; a run in a new "
                "folder takes the new one."
            )


def listing(name: HubName) -> Listing:
    """Returns the files of a repository. Raises what the hub's client raises, for `explanation`."""
    from huggingface_hub import HfApi  # imported late: work on local files does not need it

    info: Any = HfApi().repo_info(
        name.repo, repo_type=name.kind, revision=name.revision or None, files_metadata=True, timeout=TIMEOUT
    )
    if not COMMIT.fullmatch(info.sha or ""):
        raise OSError(f"it answered {info.sha!r} for a commit")
    files = {
        one.rfilename: HubFile(one.lfs.size if one.lfs else one.size or 0, one.lfs.sha256 if one.lfs else None)
        for one in info.siblings or ()
    }
    return Listing(info.sha, files)


def repository_folder(name: HubName) -> pathlib.Path:
    """Returns the folder of the hub's own cache that a repository is kept in, with `refs/` and `snapshots/`."""
    from huggingface_hub import constants

    return pathlib.Path(constants.HF_HUB_CACHE) / f"{name.kind}s--{name.repo.replace('/', '--')}"


def snapshot_name(folder: pathlib.Path) -> HubName | None:
    """Returns the name, with its commit, of a snapshot in a cache of the hub, such as `models--ORG--NAME/snapshots/COMMIT`, or of
    a file in it; None for any other path."""
    for path in (folder, *folder.parents):
        kind, _, repo = path.parent.parent.name.partition("s--")
        if path.parent.name == "snapshots" and COMMIT.fullmatch(path.name) and kind in KINDS and repo:
            file = "" if path == folder else folder.relative_to(path).as_posix()
            return HubName(repo.replace("--", "/"), path.name, file, kind)
    return None


def unreachable(error: BaseException) -> bool:
    """Returns whether an error of the hub's client says that the hub cannot be reached now, and nothing of what is there."""
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(error, HfHubHTTPError):
        code = getattr(error.response, "status_code", 0)
        return code >= 500 or code == 429
    ours = isinstance(error, ConnectionError | TimeoutError)  # OfflineModeIsEnabled is one
    return ours or any(kind.__name__ == "TransportError" for kind in type(error).__mro__)  # of httpx


def gated(name: HubName) -> UserError:
    """Returns the error for a repository that is given to some only."""
    return UserError(
        f"{name} is gated: its owner gives it to those who have accepted its terms. Accept them at {_page(name)}, and log in by "
        "`hf auth login`, or set HF_TOKEN to a token that may read it."
    )


def _page(name: HubName) -> str:
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/{'datasets/' * (name.kind == 'dataset')}{name.repo}"


def explanation(name: HubName, error: Exception) -> UserError:
    """Returns the error that says in words what the hub's client raised, and what to do."""
    from huggingface_hub import constants, errors

    kind, page = KINDS[name.kind], _page(name)
    cause = error.__cause__
    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(cause, Exception):
        return explanation(name, cause)
    if isinstance(error, errors.GatedRepoError):
        return gated(name)
    if isinstance(error, errors.DisabledRepoError):
        return UserError(
            f"{name} is disabled on the hub, so nobody can read it now. See {page}, or take another {kind}."
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return _not_found(name)
    if isinstance(error, errors.RevisionNotFoundError):
        return _no_revision(name)
    local = "no folder here, and it is " if name.kind == "model" else ""
    cache = f"not wholly in the hub's cache ({constants.HF_HUB_CACHE})"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return UserError(
            f"{name} is {local}{cache}, and HF_HUB_OFFLINE is set. Unset it, or fetch the {kind} where there is a network: `hf "
            f"download {'--repo-type=dataset ' * (name.kind == 'dataset')}{name.repo}`."
        )
    if unreachable(error):
        return UserError(
            f"{name} is {local}{cache}, and the hub ({constants.ENDPOINT}) could not be reached ({_reason(error)}). Check the "
            "network, HF_ENDPOINT and the proxy (HTTPS_PROXY), and try again: what has arrived is kept."
        )
    if isinstance(error, errors.HfHubHTTPError):
        return UserError(
            f"The hub did not give the {kind} {name} ({_reason(error)}). Check HF_TOKEN, or log in anew with `hf auth login`; if "
            f"it stays so, see {page}."
        )
    if isinstance(error, OSError) and error.errno is not None:
        broken = cannot_write(pathlib.Path(str(error.filename or constants.HF_HUB_CACHE)), error)
        return UserError(f"{broken} HF_HOME names the folder of the hub's cache, now {constants.HF_HOME}.")
    if isinstance(error, errors.HFValidationError):
        return UserError(
            f"{name} cannot be the name of a {kind} on the hub ({_reason(error)}). Check the spelling (ORG/NAME)."
        )
    return UserError(f"The {kind} {name} could not be fetched ({_reason(error)}). Try again: what has arrived is kept.")


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _not_found(name: HubName) -> UserError:
    """Returns the error for a repository that is not there, with what may have been meant."""
    from huggingface_hub import HfApi, constants

    api, kind, hint = HfApi(), KINDS[name.kind], ""
    other = next(iter(KINDS.keys() - {name.kind}))
    with contextlib.suppress(Exception):  # a hint may fail
        api.repo_info(name.repo, repo_type=other, timeout=TIMEOUT)
        wanted = "Name a model, and give the data set for prompts" if other == "dataset" else "Name a data set"
        return UserError(f"{name.repo} is a {KINDS[other]} on the hub, not a {kind}. {wanted}, as hf:ORG/NAME:SPLIT.")
    with contextlib.suppress(Exception):
        owner, _, last = name.repo.partition("/")
        search = api.list_models if name.kind == "model" else api.list_datasets
        known = [one.id for found in (search(author=owner, limit=200), search(search=last, limit=20)) for one in found]
        hint = did_you_mean(name.repo, known)
        if not hint and known:
            hint = f" Near it are {', '.join(known[:4])}."
    local = "no folder here, and " if name.kind == "model" else ""
    return UserError(
        f"{name.repo} is {local}no {kind} that the hub ({constants.ENDPOINT}) shows you.{hint} Check the spelling (ORG/NAME); "
        f"for a private {kind}, log in with `hf auth login` or set HF_TOKEN."
    )


def _no_revision(name: HubName) -> UserError:
    from huggingface_hub import HfApi

    there: list[str] = []
    with contextlib.suppress(Exception):
        refs = HfApi().list_repo_refs(name.repo, repo_type=name.kind)
        there = [one.name for one in (*refs.branches, *refs.tags)]
    known = f" Its branches and tags are {', '.join(there[:12])}." if there else ""
    return UserError(
        f"{name.repo} has no revision {name.revision!r} on the hub.{known}{did_you_mean(name.revision, there)} Name one of "
        f"them or a whole commit hash, or leave @{name.revision} out for the main branch."
    )
