"""Opens object stores, such as gs:// and s3:// buckets, through fsspec, and explains their errors.

Clients of stores (gcsfs, s3fs) write an object whole or not at all and repeat requests that fail for a moment.
"""

import contextlib
import os
import re
from collections.abc import Iterator

from refusal_jax.errors import UserError

ADDRESS = re.compile(r"([a-z][a-z0-9+]+):/+(.+)")  # with one slash too, which is all that pathlib leaves


def store_address(path: str | os.PathLike) -> str | None:
    """Returns an address such as gs://bucket/folder in its plain form, or None for a path of this machine."""
    match = ADDRESS.fullmatch(os.fspath(path))
    return f"{match[1]}://{match[2].strip('/')}" if match else None


def open_store(address: str):
    """Returns the file system of fsspec for an address or an absolute path, and the address as that file system writes it.

    What is in the store is asked anew. Raises what fsspec raises, for `explained`.
    """
    import fsspec  # imported late: work on local files does not need it

    if "://" not in address:
        return fsspec.filesystem("file"), address  # whatever signs are in the path
    files, place = fsspec.core.url_to_fs(address)
    files.invalidate_cache()
    return files, place


def is_in_store(files, place: str) -> bool:
    """Returns whether there is a file or folder at `place`. Unlike fsspec's `exists`, it raises all errors but its absence."""
    try:
        files.info(place)
    except FileNotFoundError:
        return False
    return True


@contextlib.contextmanager
def explained(address: str, then: str = "Try again.") -> Iterator[None]:
    """Turns what a store's client raises into a UserError that names `address`. then: what to do once the cause is gone."""
    scheme = address.split("://")[0]
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(
            f"{address} was not found: there is no such bucket, or no files in that folder. Check the address, e.g. with "
            f"`gcloud storage ls {address}/`."
        ) from None
    except ImportError as error:
        extra = {"gs": "'refusal-jax[gcs]'", "gcs": "'refusal-jax[gcs]'", "s3": "s3fs"}.get(scheme)
        install = f": pip install {extra}" if extra else ""
        raise UserError(f"{address} cannot be used without another package ({error}). Install it{install}.") from None
    except Exception as error:  # every store has its own kinds
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        code = str(getattr(error, "code", getattr(error, "status", "")))
        if code == "404":
            raise UserError(f"{address} was not found ({reason}). Check the address.") from None
        if (
            isinstance(error, PermissionError)
            or code in ("401", "403")
            or re.search("credential|forbidden|denied|unauthorized", reason, re.I)
        ):
            raise UserError(
                f"{address} may not be used by you ({reason}). Log in, e.g. with `gcloud auth application-default login`, or "
                f"have the account of this machine allowed to use the bucket. {then}"
            ) from None
        raise UserError(f"{address} could not be used ({reason}). Check the address and the network. {then}") from None
