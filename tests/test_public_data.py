"""Public prompt sets: downloads from a server of our own, and the paper's splits from made-up and from the real raw files."""

import contextlib
import hashlib
import http.server
import json
import os
import pathlib
import random
import threading

import datasets
import numpy as np
import pytest

from refusal_jax import UserError
from refusal_jax.data import download as downloads
from refusal_jax.data.download import download, short_hash
from refusal_jax.data.prompts import read_prompts
from refusal_jax.data.public import MANIFEST, build, build_splits, fetch_set, load_manifest, status, take_files
from refusal_jax.data.sources import dataset_name, resolve
from refusal_jax.jobs.main import run_job

SHARED = pathlib.Path(os.environ.get("REFUSAL_JAX_SHARED", pathlib.Path(__file__).resolve().parents[2] / "shared"))
needs_raw = pytest.mark.skipif(not (SHARED / "data" / "raw").is_dir(), reason="no public raw files here")
CONTENT = bytes(range(256)) * 5000


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@contextlib.contextmanager
def served(behaviour: str = "ranges", content: bytes = CONTENT):
    """A server of one file; yields its address and the Range headers that it saw.

    behaviour: "ranges"; "whole" ignores ranges; "cut" ends each answer after 400,000 bytes; "stuck" after none.
    """
    seen = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked = self.headers.get("Range")
            seen.append(asked)
            if self.path.endswith("gone"):
                return self.send_error(404)
            start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and behaviour != "whole" else 0
            if start >= len(content):
                return self.send_error(416)
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            most = {"cut": 400_000, "stuck": 0}.get(behaviour, len(content))
            with contextlib.suppress(OSError):
                self.wfile.write(content[start : start + most])

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}/file", seen
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    for name in (
        "http_proxy",
        "https_proxy",
        "HTTP_PROXY",
        "HTTPS_PROXY",
        "no_proxy",
        "NO_PROXY",
        "all_proxy",
        "ALL_PROXY",
    ):
        monkeypatch.delenv(name, raising=False)


def test_a_file_is_fetched_once(tmp_path):
    target = tmp_path / "raw" / "a.csv"
    with served() as (url, seen):
        assert download(url, target, {sha(CONTENT), "0" * 64}) == sha(CONTENT)
        assert target.read_bytes() == CONTENT and os.listdir(target.parent) == ["a.csv"]
        download(url, target, {sha(CONTENT)})
        assert seen == [None]
        target.write_bytes(b"other")
        download(url, target, {sha(CONTENT)})
        assert target.read_bytes() == CONTENT


@pytest.mark.parametrize("behaviour", ["ranges", "whole", "cut"])
def test_a_download_continues_where_it_stopped(behaviour, tmp_path):
    (tmp_path / ".a.csv.part").write_bytes(CONTENT[:300_000])
    with served(behaviour) as (url, seen):
        download(url, tmp_path / "a.csv", {sha(CONTENT)})
    assert (tmp_path / "a.csv").read_bytes() == CONTENT
    more = ["bytes=700000-", "bytes=1100000-"] if behaviour == "cut" else []
    assert seen == ["bytes=300000-", *more]


@pytest.mark.parametrize("left", [CONTENT[:-5], b"older bytes", CONTENT, CONTENT + b"more"])
def test_a_part_of_other_bytes_is_dropped(left, tmp_path):
    (tmp_path / ".a.csv.part").write_bytes(left)
    with served() as (url, _):
        download(url, tmp_path / "a.csv", {sha(CONTENT)})
    assert (tmp_path / "a.csv").read_bytes() == CONTENT and os.listdir(tmp_path) == ["a.csv"]


def test_other_bytes_than_expected(tmp_path):
    message = rf"not the file that was expected: its sha256 is {sha(CONTENT)}, expected {'0' * 64}.* Nothing was kept"
    with served() as (url, _), pytest.raises(UserError, match=message):
        download(url, tmp_path / "a.csv", {"0" * 64})
    assert os.listdir(tmp_path) == []


def test_servers_that_do_not_answer(tmp_path):
    with served() as (url, _), pytest.raises(UserError, match=r"gone could not be fetched: the server answered 404"):
        download(f"{url}/gone", tmp_path / "a.csv", ())
    with (
        served("stuck") as (url, _),
        pytest.raises(UserError, match=r"the connection ended after 0 of 1,280,000 bytes"),
    ):
        download(url, tmp_path / "a.csv", ())
    with pytest.raises(
        UserError, match=r"could not be fetched \(.*refused\)\. Without a network, .*--from.*HTTPS_PROXY"
    ):
        download(url, tmp_path / "a.csv", ())
    with pytest.raises(UserError, match=r"file:///etc/passwd cannot be fetched: only http and https addresses"):
        download("file:///etc/passwd", tmp_path / "a.csv", ())


def test_a_disk_that_does_not_take_the_bytes(tmp_path, monkeypatch):
    def full(url, part):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(downloads, "_fetch", full)
    with pytest.raises(UserError, match=r"a\.csv could not be written: No space left on device"):
        download("https://example.org/a", tmp_path / "a.csv", ())


def test_proxies_are_taken_from_the_environment(tmp_path, monkeypatch):
    with served() as (url, seen):
        monkeypatch.setenv("http_proxy", url.removesuffix("/file"))
        download("http://nowhere.invalid/a", tmp_path / "a.csv", {sha(CONTENT)})
        assert len(seen) == 1


# A manifest of the real form on made-up texts.
ADVBENCH = [f"Do bad thing {i}" for i in range(9)]
LATER = {"advbench": ADVBENCH[4], "tdc": "Dup of test"}
RAW = {
    "advbench.csv": "goal,target\n" + "".join(f'"{text} ",Sure\n' for text in ADVBENCH),
    "malicious_instruct.txt": "Mal one\nMal two\n",
    "tdc2023_dev_behaviors.json": json.dumps(["Tdc dev", LATER["tdc"]]),
    "tdc2023_test_behaviors.json": json.dumps(["Tdc test"]),
    "harmbench_val.csv": "Behavior,FunctionalCategory,SemanticCategory,Tags\nVal,standard,x,\nSong,copyright,x,\n"
    'Ctx,contextual,x,"a, Context"\nDup of jbb,standard,y,\n',
    "harmbench_test.csv": "Behavior,FunctionalCategory,SemanticCategory,Tags\n Test one ,standard,x,\nDup of test,standard,z,\n",
    "jailbreakbench.csv": f",Goal,Category\n0,Dup of jbb,c\n1,{LATER['advbench']},d\n",
    "strongreject.csv": "category,source,forbidden_prompt\nv,w,Strong\n",
    "alpaca_data.json": json.dumps(
        [{"instruction": f"Help {i}", "input": "x" if i % 4 == 3 else " ", "output": f"Out {i}"} for i in range(40)]
    ),
    "xstest_prompts.csv": "id,prompt,type,label\n1,Kill a process?,homonym,safe\n2,Kill a person?,contrast,unsafe\n",
    "or-bench-hard-1k.csv": "prompt,category\nHarsh but fine,privacy\n",
}


def harmless_splits() -> dict:
    rows = [{"instruction": f"Help {i}", "category": None} for i in range(40) if i % 4 != 3]
    random.seed(42)
    random.shuffle(rows)
    return {"harmless_train": rows[:18], "harmless_val": rows[18:24], "harmless_test": rows[24:]}


@pytest.fixture
def files(tmp_path):
    """A folder of raw files, and a manifest of them."""
    folder, manifest = tmp_path / "from", json.loads(MANIFEST.read_text())
    folder.mkdir()
    for name, text in RAW.items():
        (folder / name).write_text(text)
    for one in manifest["sets"].values():
        for file in one["files"]:
            if file["file"] in RAW:
                file.update(sha256=sha(RAW[file["file"]].encode()), also=[])
    manifest["advbench_train"] = [short_hash(ADVBENCH[i]) for i in (7, 0, 4, 2)]
    for split, rows in harmless_splits().items():
        manifest["splits"][split] = {"rows": len(rows), "sha256": sha(json.dumps(rows, indent=4).encode())}
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(manifest))
    return folder, path


def texts(path) -> list[str]:
    return [row["instruction"] for row in json.loads(path.read_text())]


def test_splits_from_files_on_the_disk(files, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(downloads.urllib.request, "build_opener", None)  # the network is not used
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source, manifest = files
    data = tmp_path / "cache" / "refusal_jax" / "data"
    take_files([one for one in load_manifest(manifest).sets.values() if not one.hub], source, data)
    rows = build(load_manifest(manifest), data)
    assert texts(data / "splits" / "harmful_train.json") == [
        *(ADVBENCH[i] for i in (7, 0, 2)),  # in the order of the draw; the fifth is in JailbreakBench
        "Mal one",
        "Mal two",
        "Tdc dev",
        "Tdc test",
    ]
    assert json.loads((data / "splits" / "harmful_val.json").read_text()) == [{"instruction": "Val", "category": "x"}]
    test = ["Dup of jbb", LATER["advbench"], "Test one", "Dup of test", "Strong"]
    assert texts(data / "splits" / "harmful_test.json") == test
    for split, expected in harmless_splits().items():
        assert json.loads((data / "splits" / f"{split}.json").read_text()) == expected
    assert texts(data / "prompts" / "xstest.json") == ["Kill a process?"] and rows["prompts/or_bench_hard.json"] == 1
    pairs = [json.loads(line) for line in (data / "loss" / "alpaca.jsonl").read_text().splitlines()]
    order = [i for i in datasets.Dataset.from_dict({"i": list(range(40))}).shuffle(seed=42)["i"] if i % 4 != 3]
    assert pairs == [{"prompt": f"Help {i}", "response": f"Out {i}"} for i in order]
    found = status(load_manifest(manifest), data)
    assert (
        found["raw/pile.jsonl"] == "missing" and found["splits/harmless_val.json"] == found["raw/advbench.csv"] == "ok"
    )
    assert found["splits/harmful_val.json"].startswith("differs: sha256")  # these are not the paper's prompts

    assert resolve("paper", "harmful_val") == data / "splits" / "harmful_val.json"
    assert [p["instruction"] for p in read_prompts(resolve("xstest", "harmless_test"))] == ["Kill a process?"]
    assert resolve("alpaca", "loss") == data / "loss" / "alpaca.jsonl" and dataset_name("paper") == "harmful_test"
    assert texts(data / "prompts" / "xstest_unsafe.json") == ["Kill a person?"]  # of the same file
    with pytest.raises(
        UserError,
        match=r"or_bench_toxic\.json is not there\..* Run `refusal-jax data fetch --sets=or_bench_toxic --accept_new_hash`",
    ):
        resolve("or_bench_toxic", "harmful_test")
    with pytest.raises(
        UserError,
        match=r"'xtest' is no file, and .*xtest\.json is not there\. Did you mean xstest\? Run `refusal-jax",
    ):
        resolve("xtest", "harmful_test")


def test_only_the_splits_whose_sets_are_there():
    one = [{"instruction": "a", "category": None}]
    sets = {name: one for name in ("jailbreakbench", "harmbench_test", "strongreject", "advbench")}
    assert set(build_splits(sets, [])) == {"harmful_test"}
    assert build_splits({"advbench": one}, []) == {}
    with pytest.raises(UserError, match="AdvBench lacks 1 of the 1 prompts of the paper's train split"):
        build_splits({**dict.fromkeys(("malicious_instruct", "tdc2023", "harmbench_val"), one), **sets}, ["0" * 16])


def test_alpaca_as_parquet_and_other_alpacas(files, tmp_path):
    import pyarrow
    import pyarrow.parquet

    manifest, rows = load_manifest(files[1]), json.loads(RAW["alpaca_data.json"])
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert build(manifest, tmp_path / "data", tmp_path / "a.parquet")["splits/harmless_test.json"] == 6
    (tmp_path / "a.json").write_text(json.dumps(rows[1:]))
    with pytest.raises(
        UserError, match=r"a\.json does not give the paper's harmless_train \(17 prompts, sha256 .*expected 18"
    ):
        build(manifest, tmp_path / "other", tmp_path / "a.json")
    assert not (tmp_path / "other").exists()
    (tmp_path / "a.json").write_text(json.dumps([{"text": "x"}]))
    with pytest.raises(UserError, match=r"a\.json, entry 0 does not have the form of Alpaca .*expected instruction"):
        build(manifest, tmp_path / "other", tmp_path / "a.json")
    (tmp_path / "b.parquet").write_text("no parquet")
    with pytest.raises(UserError, match=r"b\.parquet is not readable Parquet"):
        build(manifest, tmp_path / "other", tmp_path / "b.parquet")
    with pytest.raises(UserError, match=r"gone\.json is not a file\. Name Alpaca's, or leave it out"):
        build(manifest, tmp_path / "other", tmp_path / "gone.json")
    with pytest.raises(UserError, match="holds no complete set, so there is nothing to build"):
        build(manifest, tmp_path / "other")


def test_files_that_cannot_be_taken(files, tmp_path):
    source, manifest = files[0], load_manifest(files[1])
    with pytest.raises(UserError, match=r"gone is not a folder\. Name the folder that holds the files\."):
        take_files(manifest.choose(["xstest"]), tmp_path / "gone", tmp_path / "data")
    (source / "xstest_prompts.csv").write_text("other")
    with pytest.raises(
        UserError, match=r"xstest_prompts\.csv is not the file that was expected \(XSTest.*Get it from https"
    ):
        take_files(manifest.choose(["xstest"]), source, tmp_path / "data")
    (source / "xstest_prompts.csv").unlink()
    with pytest.raises(UserError, match=r"holds no complete set\. The files are called xstest_prompts\.csv"):
        take_files(manifest.choose(["xstest"]), source, tmp_path / "data")
    with pytest.raises(
        UserError, match=r"there is no public set 'xtest'\. Did you mean xstest\? The sets are advbench, "
    ):
        manifest.choose(["xtest"])


def test_manifests_that_are_none(tmp_path):
    path = tmp_path / "m.json"
    for content in ("[]", "{}", '{"sets": {"a": {"files": [{}]}}, "splits": {}, "advbench_train": []}'):
        path.write_text(content)
        load_manifest.cache_clear()
        with pytest.raises(UserError, match=r"m\.json is no manifest of data sets"):
            load_manifest(path)
    file = {"file": "../a", "url": None, "sha256": None}
    path.write_text(json.dumps({"sets": {"a": {"files": [file]}}, "splits": {}, "advbench_train": []}))
    with pytest.raises(UserError, match=r"the file name '\.\./a' of a leaves its folder"):
        load_manifest(path)


def test_the_hub_is_streamed_and_an_unknown_hash_recorded(files, tmp_path, monkeypatch):
    content = json.loads(files[1].read_text())
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "train.jsonl").write_text("".join(f'{{"text": " doc {i} ", "meta": 1}}\n' for i in range(9)))
    content["sets"]["pile"]["hub"] |= {"path": str(tmp_path / "hub"), "revision": None, "rows": 3}
    files[1].write_text(json.dumps(content))
    manifest, data = load_manifest(files[1]), tmp_path / "data"
    (pile,) = manifest.choose(["pile"])
    with pytest.raises(
        UserError, match=r"the sha256 of pile\.jsonl is not known.*fetch --accept_new_hash.*hashes\.json"
    ):
        fetch_set(pile, data)
    (tmp_path / "from").mkdir(exist_ok=True)
    (tmp_path / "from" / "pile.jsonl").write_text('{"text": "mine"}\n')
    with pytest.raises(UserError, match=r"the sha256 of pile\.jsonl is not known"):
        take_files([pile], tmp_path / "from", tmp_path / "other")
    take_files([pile], tmp_path / "from", tmp_path / "other", accept_new=True)
    assert status(manifest, tmp_path / "other")["raw/pile.jsonl"] == "ok"
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    fetch_set(pile, data, accept_new=True)
    assert status(manifest, data)["raw/pile.jsonl"] == "ok"
    fetch_set(pile, data)  # it is here
    build(manifest, data)
    lines = [json.loads(line) for line in (data / "loss" / "pile.jsonl").read_text().splitlines()]
    assert lines == [{"text": f" doc {i} "} for i in range(3)] and not (data / "prompts" / "pile.json").exists()
    (data / "raw" / "pile.jsonl").write_text("{}")
    (tmp_path / "hub" / "train.jsonl").write_text('{"text": "changed"}\n' * 9)
    with pytest.raises(UserError, match=r"pile\.jsonl: the Hub sent other rows than before"):
        fetch_set(pile, data)
    with pytest.raises(UserError, match=r"the Hub data set .*gone could not be streamed .*HF_HUB_OFFLINE"):
        from refusal_jax.data.public import stream_hub

        stream_hub({"path": str(tmp_path / "gone"), "split": "train", "columns": ["text"], "rows": 1}, tmp_path / "x")


def test_the_job(files, tmp_path, capsys):
    source, manifest = files
    flags = [f"--manifest={manifest}", f"--folder={tmp_path / 'data'}"]
    assert run_job("data", ["verify", *flags]) == 2 and "holds no data" in capsys.readouterr().err
    content = json.loads(manifest.read_text())
    with served(content=RAW["xstest_prompts.csv"].encode()) as (url, _):
        content["sets"]["xstest"]["files"][0]["url"] = url
        manifest.write_text(json.dumps(content))
        load_manifest.cache_clear()
        assert run_job("data", ["fetch", "--sets=xstest", *flags]) == 0
    assert (
        "prompts/xstest.json" in (out := capsys.readouterr().out) and "Not built, for want of sets: harmful_tr" in out
    )
    content["sets"] = {name: content["sets"][name] for name in ("xstest", "or_bench_toxic")}
    (tmp_path / "two.json").write_text(json.dumps(content))
    two = [f"--manifest={tmp_path / 'two.json'}", flags[1], "--sets="]
    assert run_job("data", ["fetch", *two]) == 0  # what cannot be checked is named, and not fetched
    assert "OR-Bench, toxic. `refusal-jax data fetch --sets=or_bench_toxic --accept_new" in capsys.readouterr().out
    assert run_job("data", ["fetch", "--sets=", f"--from={source}", *flags]) == 0
    assert "splits/harmful_train.json" in capsys.readouterr().out
    assert run_job("data", ["list", *flags]) == 0
    assert [line.split()[-2] for line in capsys.readouterr().out.splitlines()[1:11]] != ["no"] * 10
    assert run_job("data", ["verify", *flags]) == 2  # made-up prompts do not give the paper's harmful splits
    assert "3 files in" in " ".join((captured := capsys.readouterr()).err.split()) and "differs" in captured.out
    assert run_job("data", [*flags]) == 2 and "data needs an action: fetch, list, verify" in capsys.readouterr().err
    assert run_job("data", ["fly"]) == 2 and "data has no action 'fly'" in capsys.readouterr().err
    assert run_job("data", ["list", "more"]) == 2 and "unexpected argument 'more'" in capsys.readouterr().err


def test_the_manifest_is_pinned():
    manifest = load_manifest()
    assert (MANIFEST.parents[2] / "third_party" / "datasets.json").resolve() == MANIFEST or "site-packages" in str(
        MANIFEST
    )
    for one in manifest.sets.values():
        assert one.licence and one.home.startswith("https://") and one.rows > 0
        for file in one.files:
            assert one.hub or (file.url.startswith("https://") and "/main/" not in file.url)
    unpinned = {name for name, one in manifest.sets.items() if not one.pinned}
    assert unpinned == {"pile", "jailbreakbench_benign", "or_bench_toxic"}
    assert len(manifest.advbench_train) == len(set(manifest.advbench_train)) == 117


@needs_raw
def test_the_papers_splits_from_the_real_files(tmp_path):
    manifest = load_manifest()
    take_files(list(manifest.sets.values()), SHARED / "data" / "raw", tmp_path)
    rows = build(manifest, tmp_path)
    assert rows["prompts/tdc2023.json"] == 100
    for split in ("harmful_train", "harmful_val", "harmful_test"):
        assert (tmp_path / f"splits/{split}.json").read_bytes() == (SHARED / f"data/splits/{split}.json").read_bytes()
        assert status(manifest, tmp_path)[f"splits/{split}.json"] == "ok"
    harmless = [row for s in ("train", "val", "test") for row in _split(f"harmless_{s}")]
    order = list(range(len(harmless)))
    random.Random(42).shuffle(order)
    (tmp_path / "alpaca.json").write_text(json.dumps([harmless[i] for i in np.argsort(order)]))
    build(manifest, tmp_path, tmp_path / "alpaca.json")
    assert all(status(manifest, tmp_path)[f"splits/harmless_{s}.json"] == "ok" for s in ("train", "val", "test"))


def _split(name):
    return json.loads((SHARED / f"data/splits/{name}.json").read_text())
