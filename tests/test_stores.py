"""Where caches are kept, and what is asked of object stores."""

import fsspec
import pytest

from refusal_jax.files import cache_folder
from refusal_jax.stores import is_in_store, open_store, store_address


def test_caches_are_where_they_always_were(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder("xla") == tmp_path / ".cache" / "refusal_jax" / "xla"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert cache_folder("xla") == tmp_path / ".cache" / "refusal_jax" / "xla"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    assert cache_folder("data") == tmp_path / "caches" / "refusal_jax" / "data"
    assert not (tmp_path / "caches").exists()


@pytest.mark.parametrize(
    "path,address",
    [
        ("gs://bucket/a/", "gs://bucket/a"),
        ("gs:/bucket/a", "gs://bucket/a"),  # as pathlib leaves it
        ("s3://bucket", "s3://bucket"),
        ("folder/a", None),
        ("C:/a", None),
        ("/a:/b", None),
    ],
)
def test_addresses(path, address):
    assert store_address(path) == address


def test_local_paths_with_the_signs_of_addresses(tmp_path):
    folder = tmp_path / "a::b [*]"
    folder.mkdir()
    files, place = open_store(str(folder))
    files.pipe_file(f"{place}/x", b"1")
    assert (folder / "x").read_bytes() == b"1" and is_in_store(files, place)
    assert not is_in_store(files, f"{place}/y")


def test_an_error_is_no_absence(monkeypatch):
    """As fsspec's own `exists` and `isfile` would have it: then a finished stage would be done again."""
    files = fsspec.filesystem("memory")

    def denied(*args, **kwargs):
        raise PermissionError("denied")

    monkeypatch.setattr(type(files), "info", denied)
    with pytest.raises(PermissionError):
        is_in_store(files, "bucket/a")
