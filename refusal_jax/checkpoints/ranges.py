"""Reads ranges of weight files that lie in an object store or on the Hugging Face hub, of which a mirror holds a stub."""

import abc
import pathlib
import threading
import urllib.parse
from collections.abc import Sequence

import numpy as np

from refusal_jax.errors import UserError
from refusal_jax.files import read_json
from refusal_jax.stores import explained, open_store

REQUEST = 16 << 20  # bytes of one request, where the runs wanted lie apart and are fetched with what is between them
TIMEOUT = 60.0  # seconds without a byte from the hub
WAIT = 0.5  # seconds before a request to the hub is first repeated
MOVED = (401, 403, 404, 410)  # what a server says to an address that was good for a while


class RequestedFile(abc.ABC):
    """A file elsewhere, of which ranges are read as from a `safetensors.LocalFile`."""

    path: str
    size: int

    def read_into(self, offsets: Sequence[int] | np.ndarray, length: int, target: memoryview) -> int:
        """Reads as `LocalFile.read_into` does. What lies between runs that are near each other is fetched too, and counted.

        Raises OSError if the other side fails or sends too little.
        """
        fetched, at = 0, 0
        while at < len(offsets):
            first, upto = int(offsets[at]), at + 1
            while upto < len(offsets) and int(offsets[upto]) + length - first <= REQUEST:
                upto += 1
            stop = int(offsets[upto - 1]) + length
            data = memoryview(self._fetched(first, stop))
            for i in range(at, upto):
                begin = int(offsets[i]) - first
                target[i * length : (i + 1) * length] = data[begin : begin + length]
            fetched, at = fetched + len(data), upto
        return fetched

    def _fetched(self, start: int, stop: int) -> bytes:
        try:
            data = self.fetch(start, stop)
        except Exception as error:  # every store has its own kinds
            raise OSError(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}") from None
        if len(data) != stop - start:
            raise OSError(f"the store sent {len(data):,} of {stop - start:,} bytes from byte {start:,}")
        return data

    @abc.abstractmethod
    def fetch(self, start: int, stop: int) -> bytes:
        """Returns bytes of the file. Raises any error."""


class StoreFile(RequestedFile):
    """A file in an object store."""

    def __init__(self, address: str, size: int):
        """Opens a file. Raises UserError if support for its kind of address is not installed."""
        self.path, self.size = address, size
        with explained(address):
            self.files, self.place = open_store(address)

    def fetch(self, start: int, stop: int) -> bytes:
        return self.files.cat_file(self.place, start=start, end=stop)


class RepositoryFile(RequestedFile):
    """A file at a commit of a repository on the hub.

    The hub answers with an address of the server that holds the bytes, which is good for some time, and is asked once in
    that time. The token is shown to the hub only.
    """

    def __init__(self, repo: str, commit: str, file: str, size: int):
        self.repo, self.commit, self.file, self.size = repo, commit, file, size
        self.path = f"hf://{repo}@{commit}/{file}"
        self.address, self.lock = "", threading.Lock()

    def fetch(self, start: int, stop: int) -> bytes:
        from huggingface_hub.utils import hf_raise_for_status

        address = self._located("")
        answer = self._asked(address, start, stop)
        if answer.status_code in MOVED:
            answer = self._asked(self._located(address), start, stop)
        hf_raise_for_status(answer)
        return answer.content

    def _asked(self, address: str, start: int, stop: int):
        from huggingface_hub import constants
        from huggingface_hub.utils import build_hf_headers, http_backoff

        ours = urllib.parse.urlsplit(address).netloc == urllib.parse.urlsplit(constants.ENDPOINT).netloc
        headers = (build_hf_headers() if ours else {}) | {
            "Range": f"bytes={start}-{stop - 1}",
            "Accept-Encoding": "identity",
        }
        return http_backoff("GET", address, headers=headers, timeout=TIMEOUT, base_wait_time=WAIT)

    def _located(self, stale: str) -> str:
        """Returns the address of the bytes, asked anew if it is `stale`. Raises OSError for a file of another size."""
        from huggingface_hub import get_hf_file_metadata, hf_hub_url
        from huggingface_hub.utils import build_hf_headers

        with self.lock:
            if self.address == stale:
                url = hf_hub_url(self.repo, self.file, revision=self.commit)
                token = build_hf_headers().get("authorization", "").removeprefix("Bearer ") or False
                found = get_hf_file_metadata(url, token=token, timeout=TIMEOUT)
                if found.size != self.size:
                    raise OSError(f"its size is {found.size} there, expected {self.size}")
                self.address = found.location
            return self.address


def open_stub(stub: pathlib.Path) -> RequestedFile:
    """Opens the file that a stub of a mirror stands for. Raises UserError for a damaged stub, or if support for its kind of
    address is not installed."""
    entry = read_json(stub)
    address, size, hub = entry.get("address"), entry.get("size"), entry.get("hub")
    if not isinstance(address, str) or not isinstance(size, int):
        raise UserError(f"{stub} is damaged: it lacks address and size. Remove its folder: it is made anew.")
    if isinstance(hub, list):
        repo, commit, file = hub
        return RepositoryFile(repo, commit, file, size)
    return StoreFile(address, size)
