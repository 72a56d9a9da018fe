"""Downloads files over bad networks: downloads resume where they stopped, are checked by hash, and appear only when
complete.

This is plain urllib, because pooch begins anew after each broken connection. It takes proxies from the environment
(HTTPS_PROXY, NO_PROXY) and certificates from the system.
"""

import hashlib
import os
import pathlib
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Collection

from refusal_jax.errors import UserError
from refusal_jax.files import cannot_write, file_hash
from refusal_jax.progress import Progress

CHUNK = 1 << 18  # bytes
TIMEOUT = 30.0  # seconds without a byte
ATTEMPTS = 4  # of which all but the first resume


class CutShort(OSError):
    """The connection ended before the file did."""


def download(url: str, target: pathlib.Path, known: Collection[str]) -> str:
    """Downloads `url` to `target`, unless a file with a known hash is there already, and returns the file's sha256.

    known: the hashes that the file may have; empty accepts any, and the caller decides. Bytes arrive in `.NAME.part`,
    from which a later call continues; `target` appears when they are all there and right. Raises UserError for an
    address that is not http(s), no network, an answer that is not a file, unexpected bytes, or a disk that cannot be
    written.
    """
    if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
        raise UserError(f"{url} cannot be fetched: only http and https addresses can. Correct the manifest.")
    if target.is_file() and known and (found := file_hash(target)) in known:
        return found
    part = target.with_name(f".{target.name}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        resumed = part.exists() and part.stat().st_size > 0
        _fetch(url, part)
        found = file_hash(part)
        if known and found not in known and resumed:  # the part may hold bytes of an older version
            part.unlink()
            _fetch(url, part)
            found = file_hash(part)
        if known and found not in known:
            part.unlink()
            raise UserError(
                f"{url} is not the file that was expected: its sha256 is {found}, expected {' or '.join(sorted(known))}. It "
                "has changed, or a proxy answered in its place. Nothing was kept; try again, or get the file elsewhere and "
                "name its folder: `refusal-jax data fetch --from=FOLDER`."
            )
        os.replace(part, target)
    except urllib.error.HTTPError as error:
        raise UserError(
            f"{url} could not be fetched: the server answered {error.code} ({error.reason}). If it stays so, get the file "
            f"elsewhere, call it {target.name}, and name its folder: `refusal-jax data fetch --from=FOLDER`."
        ) from None
    except (urllib.error.URLError, TimeoutError, ConnectionError, CutShort) as error:
        raise UserError(
            f"{url} could not be fetched ({getattr(error, 'reason', error)}). Without a network, get the file on another "
            f"machine, call it {target.name}, and name its folder: `refusal-jax data fetch --from=FOLDER`. Behind a proxy, set "
            "HTTPS_PROXY. What has arrived is kept, and the same command continues."
        ) from None
    except OSError as error:
        raise cannot_write(target, error) from None
    return found


def _fetch(url: str, part: pathlib.Path) -> None:
    """Appends to `part` what it lacks of `url`, over several connections if one breaks while bytes still come."""
    for attempt in range(ATTEMPTS):
        before = part.stat().st_size if part.exists() else 0
        try:
            return _transfer(url, part, before)
        except (TimeoutError, ConnectionError, CutShort):
            now = part.stat().st_size if part.exists() else 0
            if attempt == ATTEMPTS - 1 or now == before:
                raise


def _transfer(url: str, part: pathlib.Path, have: int) -> None:
    """Reads from one connection. Raises CutShort if it ends early, and what urllib raises."""
    headers = {"User-Agent": "refusal-jax"} | ({"Range": f"bytes={have}-"} if have else {})
    try:
        # Not urlopen, whose proxies are those of the environment at its first use.
        answer = urllib.request.build_opener().open(urllib.request.Request(url, headers=headers), timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code != 416 or not have:
            raise
        part.unlink()  # nothing is left to send: either it is all there, or it is of another file; so once more
        return _transfer(url, part, 0)
    with answer:
        resumes = answer.status == 206 and answer.headers.get("Content-Range", "").startswith(f"bytes {have}-")
        have = have if resumes else 0
        length = answer.headers.get("Content-Length")
        total = have + int(length) if length and length.isdigit() else None
        bar = Progress(part.name[1:-5], total, "B", done=have)
        with bar, open(part, "ab" if resumes else "wb") as file:
            while chunk := answer.read(CHUNK):
                file.write(chunk)
                bar.update(len(chunk))
        if total is not None and part.stat().st_size < total:
            raise CutShort(f"the connection ended after {part.stat().st_size:,} of {total:,} bytes")


def short_hash(text: str) -> str:
    """Returns the first 16 hex digits of a text's sha256, which identify a prompt without revealing it."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]
