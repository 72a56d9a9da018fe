"""A run's folder: atomic writes, stages that resume, and folders that are not ours to write."""

import errno
import fcntl
import json
import os
import pathlib

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from refusal_jax import UserError
from refusal_jax.files import NO_LOCKS, local_path, to_json, write_atomically
from refusal_jax.runs import storage
from refusal_jax.runs.ledger import Ledger
from refusal_jax.runs.run import MANIFEST, Run, versions
from refusal_jax.runs.stage import Stage
from refusal_jax.runs.storage import DiskFolder, ObjectFolder

CONFIG, INPUTS = {"seed": 1, "data": {"n": 3, "names": ("a", "b")}}, {"model": "abc"}


def fails(error):
    def call(*args, **kwargs):
        raise OSError(error, os.strerror(error))

    return call


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_write_creates_folders_and_replaces(tmp_path):
    path = tmp_path / "a" / "b" / "file.json"
    for data in (b"one", b"two, longer", b""):
        write_atomically(path, data)
        assert path.read_bytes() == data and names(path.parent) == ["file.json"]


@pytest.mark.parametrize("broken", ["replace", "fsync"])
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EROFS])
def test_failed_write_leaves_the_old_file_and_nothing_else(broken, error, tmp_path, monkeypatch):
    path = tmp_path / "file.json"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, broken, fails(error))
    with pytest.raises(UserError, match=rf"file\.json could not be written: {os.strerror(error)}\. Free space"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and names(tmp_path) == ["file.json"]
    path.unlink()
    with pytest.raises(UserError, match="could not be written"):
        write_atomically(path, b"new")
    assert names(tmp_path) == []


def test_write_under_a_file(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(UserError, match=r"x\.json could not be written"):
        write_atomically(tmp_path / "taken" / "x.json", b"")


def test_json_keeps_text_readable():
    assert to_json({"a": "é\n"}).decode() == '{\n  "a": "é\\n"\n}\n'
    assert json.loads(to_json(["lone \ud800 surrogate"])) == ["lone ? surrogate"]


def test_home_folders(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert local_path("~/a") == DiskFolder("~/a").path == tmp_path / "a" and local_path("~") == tmp_path
    assert local_path("a/~/b") == pathlib.Path("a/~/b") and local_path(tmp_path) == tmp_path
    assert local_path(local_path("./~x")) == tmp_path / "~x"
    for name in ("~nosuchuser", "~nosuchuser/a"):
        with pytest.raises(UserError, match=rf"{name}: this machine knows no home folder .* or \./{name} for a file"):
            local_path(name)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    with pytest.raises(UserError, match=rf"{tmp_path}/full is not empty"), Run.open("~/full", {}, {}):
        pass


def test_ledger_drops_a_torn_last_line(tmp_path):
    path, folder = tmp_path / "ledger.jsonl", DiskFolder(tmp_path)
    ledger = Ledger.open(folder, path.name)
    assert ledger.rows == []
    ledger.append([{"i": 0, "text": "é\n"}, {"i": 1}])
    ledger.append([{"i": 2}])
    whole = path.read_bytes()
    for torn in (b'{"i": 3, "te', b"\0\0\0\0"):
        path.write_bytes(whole + torn)
        again = Ledger.open(folder, path.name)
        assert again.rows == ledger.rows == [{"i": 0, "text": "é\n"}, {"i": 1}, {"i": 2}]
        assert path.read_bytes() == whole
    again.append([{"i": 3}])
    assert Ledger.open(folder, path.name).rows == [*ledger.rows, {"i": 3}]


def test_ledger_on_a_full_disk(tmp_path, monkeypatch):
    ledger = Ledger.open(DiskFolder(tmp_path), "ledger.jsonl")
    ledger.append([{"i": 0}])
    monkeypatch.setattr(os, "fsync", fails(errno.ENOSPC))
    with pytest.raises(UserError, match=r"ledger\.jsonl could not be written: No space left on device"):
        ledger.append([{"i": 1}])
    assert ledger.rows == [{"i": 0}]


def test_artifacts_round_trip(tmp_path):
    with Run.open(tmp_path, CONFIG, INPUTS) as run:
        run.write_json("sub/a.json", {"x": [1, 2.5, "é", None]})
        assert run.read_json("sub/a.json") == {"x": [1, 2.5, "é", None]}
        tensors = {"f": np.arange(6, dtype=np.float64).reshape(2, 3).T, "i": np.arange(3, dtype=np.int32)}
        run.write_tensors("t.safetensors", tensors)
        read = run.read_tensors("t.safetensors")
    assert read.keys() == tensors.keys()
    for name in tensors:
        assert read[name].dtype == tensors[name].dtype
        np.testing.assert_array_equal(read[name], tensors[name])


def double(folder, calls, crash_after=None):
    """Opens the run and does its two stages: `a` writes numbers, row by row, and `b` doubles them."""
    with Run.open(folder, CONFIG, INPUTS) as run:

        def first(run, ledger):
            for i in range(len(ledger.rows), 3):
                if i == crash_after:
                    raise KeyboardInterrupt
                calls.append(i)
                ledger.append([{"value": i}])
            run.write_json("a.json", [row["value"] for row in ledger.rows])

        def second(run, ledger):
            calls.append("b")
            run.write_json("b.json", [2 * x for x in run.read_json("a.json")])

        stages = Stage("a", first, writes=["a.json"]), Stage("b", second, reads=["a.json"], writes=["b.json"])
        return [run.stage(stage, run) for stage in stages], run.worked


def test_finished_stages_are_skipped(tmp_path):
    calls = []
    assert double(tmp_path, calls) == ([True, True], ["a", "b"])
    assert calls == [0, 1, 2, "b"] and json.loads((tmp_path / "b.json").read_text()) == [0, 2, 4]
    assert double(tmp_path, calls) == ([False, False], [])
    assert calls == [0, 1, 2, "b"]


@pytest.mark.parametrize("damage", ["altered", "deleted"])
def test_a_stage_is_redone_if_its_output_is_gone_or_other(damage, tmp_path):
    double(tmp_path, [])
    (tmp_path / "b.json").write_text("[]") if damage == "altered" else (tmp_path / "b.json").unlink()
    calls = []
    assert double(tmp_path, calls) == ([False, True], ["b"])
    assert json.loads((tmp_path / "b.json").read_text()) == [0, 2, 4] and calls == ["b"]
    (tmp_path / "a.json").unlink()
    assert double(tmp_path, calls)[0] == [True, False]  # a comes out as before, so b still holds


def test_a_stage_is_redone_if_what_it_read_changed(tmp_path):
    double(tmp_path, [])
    with Run.open(tmp_path, CONFIG, INPUTS) as run:
        run.write_json("a.json", [7])
        seen = []
        stage = Stage(
            "b", lambda run, _: seen.append(run.read_json("a.json")), lambda _: ["a.json"], lambda _: ["b.json"]
        )
        assert run.stage(stage, run)
    assert seen == [[7]]


def test_an_artifact_is_parsed_once_in_a_stage(tmp_path, monkeypatch):
    double(tmp_path, [])
    parsed, parse = [], json.loads
    with Run.open(tmp_path, CONFIG, INPUTS) as run:
        monkeypatch.setattr(json, "loads", lambda data: parsed.append(data) or parse(data))

        def reads(run, ledger):
            assert run.read_json("a.json") == run.read_json("a.json") == [0, 1, 2] and len(parsed) == 1
            run.write_json("a.json", [3])
            assert run.read_json("a.json") == [3] and len(parsed) == 2

        run.stage(Stage("c", reads), run)
        assert run.read_json("a.json") == [3] and len(parsed) == 3  # what the stage read is not kept


def test_what_a_stage_returns_is_in_the_manifest(tmp_path):
    double(tmp_path, [])
    with Run.open(tmp_path, CONFIG, INPUTS) as run:
        run.stage(Stage("c", lambda *_: {"template": "chatml"}), run)
    stages = json.loads((tmp_path / "manifest.json").read_text())["stages"]
    assert stages["c"]["found"] == {"template": "chatml"} and "found" not in stages["a"]


def test_a_stage_continues_where_it_stopped(tmp_path):
    calls = []
    with pytest.raises(KeyboardInterrupt):
        double(tmp_path, calls, crash_after=2)
    assert calls == [0, 1] and any(name.startswith(".ledger-a-") for name in names(tmp_path))
    assert double(tmp_path, calls)[0] == [True, True]
    assert calls == [0, 1, 2, "b"] and json.loads((tmp_path / "a.json").read_text()) == [0, 1, 2]
    assert not any(name.startswith(".ledger") for name in names(tmp_path))


def test_manifest_records_what_results_depend_on(tmp_path):
    double(tmp_path, [])
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    assert manifest["inputs"] == INPUTS and manifest["config"] == json.loads(json.dumps(CONFIG))
    record = manifest["stages"]["b"]
    assert record["reads"] == manifest["stages"]["a"]["writes"] and set(record["writes"]) == {"b.json"}
    assert all(len(value) == 64 for value in record["writes"].values())
    assert {"python", "jax", "numpy"} <= set(record["versions"]) and record["versions"] == versions()
    assert record["seconds"] >= 0 and record["finished"].endswith("Z")


def test_leftovers_of_a_crash_are_removed(tmp_path):
    double(tmp_path, [])
    (tmp_path / "completions").mkdir()
    for name in (".b.json.tmp-123", "completions/.x.json.tmp-9"):
        (tmp_path / name).write_text("half")
    double(tmp_path, [])
    assert not list(tmp_path.rglob("*.tmp-*"))


def test_another_study_in_the_folder(tmp_path):
    double(tmp_path, [])
    other = {"seed": 2, "data": {"n": 3, "names": ["a", "b"]}, "extra": True}
    with (
        pytest.raises(UserError, match="holds a run of another study") as error,
        Run.open(tmp_path, other, {"model": "x"}),
    ):
        pass
    assert "extra was None, is now True; input model was 'abc', is now 'x'; seed was 1, is now 2." in str(error.value)
    many = {str(i): i for i in range(9)}
    with (
        pytest.raises(UserError, match="; and 7 more. Pass a new folder as workdir="),
        Run.open(tmp_path, many, INPUTS),
    ):
        pass


def test_folder_of_something_else(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with (
        pytest.raises(
            UserError, match=r"is not empty \(thesis\.tex\) and holds no manifest\.json, so it is not a run's"
        ),
        Run.open(tmp_path, CONFIG, INPUTS),
    ):
        pass
    assert names(tmp_path) == ["thesis.tex"]
    with (
        pytest.raises(UserError, match=r"thesis\.tex is a file\. Pass a folder as workdir="),
        Run.open(tmp_path / "thesis.tex", CONFIG, INPUTS),
    ):
        pass


def test_folder_in_use(tmp_path):
    with (
        Run.open(tmp_path, CONFIG, INPUTS),
        pytest.raises(UserError, match="Another process is working in .*Wait for it"),
        Run.open(tmp_path, CONFIG, INPUTS),
    ):
        pass
    with Run.open(tmp_path, CONFIG, INPUTS) as run, open(tmp_path / ".lock") as lock:
        assert run.worked == []
        with pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with open(tmp_path / ".lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # free again


@pytest.mark.parametrize("number", NO_LOCKS)
def test_file_system_without_locks(number, tmp_path, monkeypatch, caplog):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    for _ in range(2):  # the .lock of an earlier run is not taken for another process
        with Run.open(tmp_path, CONFIG, INPUTS) as run:
            assert run.worked == []
    assert f"The file system of {tmp_path} has no locks ({os.strerror(number)})" in caplog.text
    number = errno.EIO
    with (
        pytest.raises(UserError, match=r"\.lock could not be written: Input/output error"),
        Run.open(tmp_path, CONFIG, INPUTS),
    ):
        pass


def forbid_writing(monkeypatch, under):
    """Opening a file of `under` for writing fails as on a read-only file system, for root too."""
    import builtins

    plain, plain_os = builtins.open, os.open

    def guarded(file, mode="r", *args, **kwargs):
        if set(mode) & set("wax+") and str(file).startswith(str(under)):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return plain(file, mode, *args, **kwargs)

    def guarded_os(file, flags, *args, **kwargs):
        if flags & (os.O_WRONLY | os.O_RDWR) and str(file).startswith(str(under)):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return plain_os(file, flags, *args, **kwargs)

    monkeypatch.setattr(builtins, "open", guarded)
    monkeypatch.setattr(os, "open", guarded_os)


def test_read_only_folder(tmp_path, monkeypatch):
    fresh, old = tmp_path / "fresh", tmp_path / "old"
    double(old, [])
    forbid_writing(monkeypatch, tmp_path)
    with (
        pytest.raises(UserError, match=r"could not be written: Read-only"),
        Run.open(fresh, CONFIG, INPUTS),
    ):
        pass
    with pytest.raises(UserError, match=r"\.lock could not be written: Read-only"), Run.open(old, CONFIG, INPUTS):
        pass


@pytest.mark.parametrize("content", ['{"config": {"se', "{}", "[]"])
def test_damaged_manifest(content, tmp_path):
    (tmp_path / MANIFEST).write_text(content)
    with pytest.raises(UserError, match=r"manifest\.json"), Run.open(tmp_path, CONFIG, INPUTS):
        pass


class Bucket(MemoryFileSystem):
    """Stands in for gs:// in this process's memory; `broken` is raised where it is called."""

    cachable, broken = False, None

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(str(path).removeprefix("gs:/"))

    def _open(self, path, mode="rb", **kwargs):
        assert mode in ("rb", "wb"), "objects are read and written whole"
        if self.broken:
            raise self.broken
        return super()._open(path, mode, **kwargs)


@pytest.fixture
def bucket(monkeypatch):
    """An empty object store, behind gs://bucket."""
    store = Bucket()
    store.store, store.pseudo_dirs = {}, [""]
    monkeypatch.setattr(fsspec.core, "url_to_fs", lambda address: (store, store._strip_protocol(address)))
    monkeypatch.setattr(storage, "PART_SECONDS", 0.0)
    return store


def test_a_run_in_an_object_store(bucket):
    address, calls = "gs://bucket/study", []
    with pytest.raises(KeyboardInterrupt):
        double(address, calls, crash_after=2)
    parts = [name for name in bucket.store if "/.ledger-a-" in name]
    assert calls == [0, 1] and len(parts) == 2 and parts[0].endswith(".jsonl.000000")
    assert double(address, calls) == ([True, True], ["a", "b"]) and calls == [0, 1, 2, "b"]
    assert sorted(bucket.store) == [f"/bucket/study/{name}" for name in ("a.json", "b.json", "log.txt", MANIFEST)]
    assert json.loads(bucket.cat("gs://bucket/study/b.json")) == [0, 2, 4]
    assert double(address, calls) == ([False, False], [])
    with Run.open(address, CONFIG, INPUTS) as run:
        tensors = {"f": np.arange(3.0)}
        run.write_tensors("sub/t.safetensors", tensors)
        np.testing.assert_array_equal(run.read_tensors("sub/t.safetensors")["f"], tensors["f"])
        assert run.exists("sub/t.safetensors") and not run.exists("sub/u") and str(run.path("u")) == f"{address}/u"
    bucket.pipe("/bucket/study/b.json", b"[]")
    assert double(address, calls) == ([False, True], ["b"])
    with Run.open(address, CONFIG, INPUTS) as run:
        run.discard()
    assert list(bucket.store) == ["/bucket/study/sub/t.safetensors"]  # no stage has named it
    with pytest.raises(UserError, match=r"gs://bucket/study is not empty \(sub\)"), Run.open(address, CONFIG, INPUTS):
        pass


def test_an_object_store_is_spared_small_writes(bucket, monkeypatch):
    monkeypatch.setattr(storage, "PART_SECONDS", 1000.0)
    folder = ObjectFolder("gs://bucket/study")
    ledger = Ledger.open(folder, "ledger.jsonl")
    for i in range(5):
        ledger.append([{"i": i}])
    assert not bucket.store and len(ledger.rows) == 5
    monkeypatch.setattr(storage, "PART_SECONDS", 0.0)
    ledger.append([{"i": 5}])
    assert list(bucket.store) == ["/bucket/study/ledger.jsonl.000000"]
    assert Ledger.open(ObjectFolder("gs://bucket/study"), "ledger.jsonl").rows == ledger.rows


@pytest.mark.parametrize(
    "error, message",
    [
        (
            PermissionError("Anonymous caller does not have access"),
            r"gs://bucket/study/manifest\.json may not be used by you \(Perm.* Then run the same command again: finished work is",
        ),
        (
            RuntimeError("503"),
            r"could not be used \(RuntimeError: 503\)\. Check the address and the network. Then run the same",
        ),
        (
            ImportError("no gcsfs"),
            r"cannot be used without another package \(no gcsfs\)\. .*pip install 'refusal-jax\[gcs\]'",
        ),
    ],
)
def test_an_object_store_out_of_reach(error, message, bucket):
    bucket.broken = error
    with pytest.raises(UserError, match=message), Run.open("gs://bucket/study", CONFIG, INPUTS):
        pass


def test_other_addresses():
    with pytest.raises(UserError, match=r"ftp://host/x: there is no access to ftp:// here\. .* gs://BUCKET/FOLDER"):
        Run("ftp://host/x", {})
