"""Where caches are kept, and what is asked of object stores."""

import sys

import fsspec
import jax
import pytest
from etils.epath import backend
from fsspec.implementations.memory import MemoryFileSystem
from jax.experimental.compilation_cache import compilation_cache

from refusal_jax.errors import UserError
from refusal_jax.files import cache_folder
from refusal_jax.jobs import common
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


class Bucket(MemoryFileSystem):
    """Stands in for gs:// in this process's memory."""

    cachable = False

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(str(path).removeprefix("gs:/"))


@pytest.fixture
def programs(monkeypatch):
    """An empty bucket in which JAX may keep every program; afterwards it keeps them where it did."""
    for scheme in ("gs", "gcs"):
        monkeypatch.setitem(sys.modules["fsspec.registry"]._registry, scheme, Bucket)
    monkeypatch.setattr(Bucket, "store", {})
    monkeypatch.setattr(Bucket, "pseudo_dirs", [""])
    names = "compilation_cache_dir", "persistent_cache_min_compile_time_secs", "enable_compilation_cache"
    before = {f"jax_{name}": getattr(jax.config, f"jax_{name}") for name in names}
    jax.config.update("jax_enable_compilation_cache", True)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    compilation_cache.reset_cache()
    yield Bucket.store
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    backend.fsspec_backend._get_filesystem.cache_clear()


def test_compiled_programs_are_kept_in_a_bucket(programs):
    """Another process that names the bucket finds what this one has compiled."""
    hits = []
    jax.monitoring.register_event_listener(listener := lambda event, **_: hits.append(event.endswith("/cache_hits")))
    for _ in range(2):
        assert common.parse("study", ["--compile_cache=gs://bucket/xla/", "list"]) == ("info", ["list"])
        assert jax.config.jax_compilation_cache_dir == "gs://bucket/xla"
        assert float(jax.jit(lambda x: 3 * x + 1)(2.0)) == 7
        jax.clear_caches()
        compilation_cache.reset_cache()
    jax.monitoring.unregister_event_listener(listener)
    assert any(name.startswith("/bucket/xla/") for name in programs) and any(hits)


def test_a_compile_cache_that_is_no_place(programs, tmp_path):
    common.keep_programs(str(tmp_path / "mine"))
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "mine")
    with pytest.raises(
        UserError, match=r"memory://bucket/xla is no place for a compile cache: give a folder, or an add.* gs"
    ):
        common.keep_programs("memory://bucket/xla")
