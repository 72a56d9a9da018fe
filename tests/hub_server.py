"""A hub of our own for tests: a local server that answers the real client as the Hugging Face hub does.

Names of repositories are asked of one host, `localhost`; large files lie on another, `127.0.0.1`, to which the first one
redirects with addresses that are good for a while, as the hub does.
"""

import contextlib
import dataclasses
import hashlib
import http.server
import json
import pathlib
import re
import threading
import urllib.parse
from collections.abc import Iterator

import pytest

COMMITS = ("a" * 40, "b" * 40)
LFS = (".safetensors", ".gguf", ".bin", ".parquet")


@dataclasses.dataclass
class Repository:
    """Files by commit; revisions: the commit of each branch; gated: whether only a token opens it."""

    commits: dict[str, dict[str, bytes]]
    revisions: dict[str, str]
    gated: bool = False


class Hub:
    """The state of the server: what it holds, how it misbehaves, and what was asked of it.

    repositories: by kind ("models" or "datasets") and name. drop: after how many bytes one connection for a large file ends.
    corrupt: files that arrive changed. asked: (host, method, path, range) of every request. stale: whether addresses of large
    files have expired; asking the hub again gives fresh ones.
    """

    def __init__(self):
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.drop: int | None = None
        self.corrupt: set[str] = set()
        self.asked: list[tuple[str, str, str, str]] = []
        self.tickets, self.status = 0, 0
        self.stale = False
        self.authorised: list[str] = []  # hosts that saw a token

    def add(
        self, name: str, folder: pathlib.Path | None = None, kind: str = "models", commit: str = COMMITS[0], **files
    ):
        """Adds a commit to a repository, which main then is at."""
        held = {} if folder is None else {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}
        held |= files.get("files", {})
        repository = self.repositories.setdefault((kind, name), Repository({}, {}))
        repository.commits[commit], repository.revisions["main"] = held, commit
        return repository


class Handler(http.server.BaseHTTPRequestHandler):
    hub: Hub
    cdn: str
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def do_POST(self):
        self.answer()

    def send(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_json(self, value) -> None:
        self.send(200, json.dumps(value).encode(), Content_Type="application/json")

    def refuse(self, status: int, code: str = "", message: str = "no") -> None:
        self.send(status, json.dumps({"error": message}).encode(), **({"X_Error_Code": code} if code else {}))

    def answer(self) -> None:
        hub, host = self.hub, self.headers["Host"].split(":")[0]
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        url = urllib.parse.urlsplit(self.path)
        path, query = urllib.parse.unquote(url.path), dict(urllib.parse.parse_qsl(url.query))
        hub.asked.append((host, self.command, path, self.headers.get("Range") or ""))
        if self.headers.get("Authorization"):
            hub.authorised.append(host)
        if hub.status:
            return self.refuse(hub.status)
        if host == "127.0.0.1":
            return self.large(path, query)
        if path in ("/api/models", "/api/datasets"):
            return self.search(path.rpartition("/")[2], query)
        found = re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(.*))?", path)
        if found:
            return self.api(*found.groups(), query, body)
        found = re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/(.+)", path)
        if found:
            return self.resolve("datasets" if found[1] else "models", found[2], found[3])
        self.refuse(404)

    def search(self, kind: str, query: dict) -> None:
        names = [name for known, name in self.hub.repositories if known == kind]
        author, word = query.get("author", ""), query.get("search", "")
        self.send_json([{"id": n} for n in names if n.startswith(author) and word.lower() in n.lower()])

    def at(self, kind: str, name: str, rest: str):
        """Returns the repository, the commit and what follows the revision in a path; None once it is refused."""
        repository = self.hub.repositories.get((kind, name))
        if repository is None:
            return self.refuse(401 if not self.headers.get("Authorization") else 404, "RepoNotFound")
        known = {**repository.revisions, **{commit: commit for commit in repository.commits}}
        for revision, commit in known.items():
            if rest == revision or rest.startswith(f"{revision}/"):
                return repository, commit, rest[len(revision) + 1 :]
        return self.refuse(404, "RevisionNotFound")

    def api(self, kind: str, name: str, rest: str | None, query: dict, body: bytes) -> None:
        verb, _, tail = (rest or "revision/main").partition("/")
        if verb == "refs":
            known = self.hub.repositories[kind, name].revisions
            one = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": c} for n, c in known.items()]
            return self.send_json({"branches": one, "tags": [], "converts": []})
        found = self.at(kind, name, tail)
        if found is None:
            return
        repository, commit, inside = found
        files = repository.commits[commit]
        if verb == "tree":
            below = {file: data for file, data in files.items() if file.startswith(f"{inside}/" if inside else "")}
            if query.get("recursive", "").lower() != "true":
                start = len(inside) + 1 if inside else 0
                folders = {file[: file.index("/", start)] for file in below if "/" in file[start:]}
                below = {file: data for file, data in below.items() if "/" not in file[start:]}
                rows = [{"type": "directory", "path": f, "oid": "0" * 40, "size": 0} for f in sorted(folders)]
            else:
                rows = []
            return self.send_json(rows + [self.entry(file, data, "oid") for file, data in below.items()])
        if verb == "paths-info":
            text = body.decode()
            asked = json.loads(text)["paths"] if text.startswith("{") else urllib.parse.parse_qs(text)["paths"]
            return self.send_json([self.entry(f, files[f], "oid") for f in asked if f in files])
        siblings = [{"rfilename": file, **self.entry(file, data, "sha256")} for file, data in files.items()]
        self.send_json({"_id": "1", "id": name, "sha": commit, "private": False, "tags": [], "siblings": siblings})

    @staticmethod
    def entry(file: str, data: bytes, name: str) -> dict:
        blob, sha256 = hashlib.sha1(data).hexdigest(), hashlib.sha256(data).hexdigest()
        found = {"type": "file", "path": file, "size": len(data), "oid": blob, "blobId": blob}
        large = {name: sha256, "size": len(data), "pointerSize": 130}
        return found | ({"lfs": large} if file.endswith(LFS) else {})

    def resolve(self, kind: str, name: str, rest: str) -> None:
        found = self.at(kind, name, rest)
        if found is None:
            return
        repository, commit, file = found
        if repository.gated and not self.headers.get("Authorization"):
            return self.refuse(401, "GatedRepo", "Access to this is restricted")
        data = repository.commits[commit].get(file)
        if data is None:
            return self.send(404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        if not file.endswith(LFS):
            blob = hashlib.sha1(data).hexdigest()
            return self.send(200, data, ETag=f'"{blob}"', X_Repo_Commit=commit, Accept_Ranges="bytes")
        self.hub.tickets += 1
        self.hub.stale = False
        place = f"{self.cdn}/{kind}/{name}/{commit}/{urllib.parse.quote(file)}?ticket={self.hub.tickets}"
        etag = hashlib.sha256(data).hexdigest()
        self.send(302, Location=place, X_Repo_Commit=commit, X_Linked_Size=str(len(data)), X_Linked_ETag=f'"{etag}"')

    def large(self, path: str, query: dict) -> None:
        hub = self.hub
        if hub.stale or not query.get("ticket"):
            return self.refuse(403)
        kind, owner, name, commit, file = path.lstrip("/").split("/", 4)
        data = hub.repositories[kind, f"{owner}/{name}"].commits[commit][file]
        if file in hub.corrupt:
            data = data[:-1] + bytes([data[-1] ^ 1])
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        start, stop = (int(wanted[1]), int(wanted[2] or len(data) - 1) + 1) if wanted else (0, len(data))
        part = data[start:stop]
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(len(part)))
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(data)}")
        self.end_headers()
        if hub.drop is not None and self.command == "GET" and len(part) > hub.drop:
            part, hub.drop = part[: hub.drop], None
            self.wfile.write(part)
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(2)
            return
        if self.command != "HEAD":
            self.wfile.write(part)


@contextlib.contextmanager
def serving() -> Iterator[tuple[Hub, str]]:
    """Yields a hub and its address."""
    hub = Hub()
    servers = []
    for _ in range(2):
        handler = type("OurHandler", (Handler,), {"hub": hub})
        servers.append(http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler))
    for server in servers:
        server.RequestHandlerClass.cdn = f"http://127.0.0.1:{servers[1].server_address[1]}"
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield hub, f"http://localhost:{servers[0].server_address[1]}"
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub that this process's client talks to, with an empty cache, an empty home for mirrors, and no token."""
    import huggingface_hub
    from huggingface_hub import constants

    from refusal_jax.checkpoints import hub as checkpoints

    with serving() as (hub, address):
        cache = tmp_path / "hf" / "hub"
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_URL_HOSTS", frozenset({"localhost"}), raising=False)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setattr(checkpoints, "LOOK", 0.01)
        huggingface_hub.close_session()
        yield hub
        huggingface_hub.close_session()
