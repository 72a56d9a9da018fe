"""The files of an export: bytes that are only copied, folders that appear whole or not at all, and the record of them."""

import dataclasses
import errno
import fcntl
import json
import os
import pathlib
import shutil
import types
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import pytest
import tiny
from exports import DIRECTION, differences, digest, edit_of, exported, part, request, tensors_of
from safetensors.numpy import load_file, save_file

from refusal_jax import UserError
from refusal_jax.checkpoints import rewrite
from refusal_jax.checkpoints.rewrite import Checkpoint, WeightFile, copy_range
from refusal_jax.checkpoints.safetensors import LocalFile, read_header
from refusal_jax.checkpoints.tensor_files import INDEX, SINGLE
from refusal_jax.checkpoints.tensors import PlainTensor
from refusal_jax.errors import VerificationError
from refusal_jax.export import run, staging, verify
from refusal_jax.export.hf import Plan
from refusal_jax.export.provenance import base_model, check
from refusal_jax.export.tensor_edits import Projection
from refusal_jax.progress import Progress


def fast(source, target, **settings) -> dict:
    """An export without verification, for what that has no part in."""
    return exported(source, target, verify=False, **settings)


def write(file: WeightFile, path) -> str:
    with ThreadPoolExecutor(2) as pool:
        return file.write(path, pool, Progress("", None, "B", quiet=True))


def opened(path) -> WeightFile:
    file = LocalFile(path)
    header = read_header(file)
    return WeightFile.of(header, {n: PlainTensor(n, path, file, extent) for n, extent in header.tensors.items()}, {})


def test_untouched_tensors_and_files_are_copied_byte_for_byte(tmp_path, monkeypatch):
    for name, size in (("COPY_BYTES", 1000), ("BLOCK_BYTES", 700), ("HASH_BYTES", 300)):
        monkeypatch.setattr(rewrite, name, size)  # several blocks a tensor
    source = tiny.tiny_llama(tmp_path / "source", shards="20KB", dtype="bfloat16")
    (source / "extra").mkdir()
    (source / "extra" / "note.txt").write_text("kept")
    for name in ("pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.safetensors", ".hidden"):
        (source / name).write_bytes(b"weights of the unedited model")
    report = fast(source, tmp_path / "out")
    names = set(report["edited_tensors"])
    (source / "consolidated.safetensors").unlink()
    assert differences(source, tmp_path / "out") == names
    ours = {str(p.relative_to(tmp_path / "out")): p for p in (tmp_path / "out").rglob("*") if p.is_file()}
    theirs = {str(p.relative_to(source)): p for p in source.rglob("*") if p.is_file()}
    assert set(theirs) - set(ours) == {"pytorch_model.bin", "pytorch_model.bin.index.json", ".hidden"}
    assert set(ours) - set(theirs) == {"README.md", "export.json", "refusal_jax.json", ".unverified"}
    for name in ours.keys() & theirs.keys():
        if name.endswith(".safetensors"):
            header = 8 + int.from_bytes(ours[name].read_bytes()[:8], "little")
            assert ours[name].read_bytes()[:header] == theirs[name].read_bytes()[:header]
        else:
            assert digest(ours[name]) == digest(theirs[name]), name
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert part(tensors_of(tmp_path / "out")["model.embed_tokens.weight"]) < 1e-2
    edits = Plan.of(Checkpoint.open(source), edit_of()).edits
    for name in names:  # blocks change nothing
        old = tensors_of(source)[name]
        new = edits[name](old.astype(np.float32)).astype(old.dtype)
        got = tensors_of(tmp_path / "out")[name]
        np.testing.assert_allclose(got.astype(np.float32), new.astype(np.float32), rtol=1e-2, atol=1e-6)


def test_copying_where_the_kernel_cannot(tmp_path, monkeypatch):
    (tmp_path / "source").write_bytes(bytes(range(256)) * 10)

    def refuses(*args):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "copy_file_range", refuses)
    with open(tmp_path / "target", "wb") as target:
        source = LocalFile(tmp_path / "source")
        copy_range(source, 100, target.fileno(), 5, 2000)
        assert (tmp_path / "target").read_bytes() == bytes(5) + (tmp_path / "source").read_bytes()[100:2100]
        with pytest.raises(
            UserError, match=r"source could not be read \(it ends at byte 2,560, before its header says so\)"
        ):
            copy_range(source, 100, target.fileno(), 0, 9999)
        monkeypatch.setattr(os, "copy_file_range", lambda *args: refuses_for_space())
        with pytest.raises(OSError, match="No space left"):
            copy_range(source, 0, target.fileno(), 0, 10)


def refuses_for_space():
    raise OSError(errno.ENOSPC, "No space left on device")


def test_every_tensor_of_a_new_header_begins_at_a_multiple_of_its_size(tmp_path):
    arrays = {"a": np.ones(3, np.float16), "b": np.arange(5, dtype=np.float32)}
    save_file(arrays, tmp_path / "file")
    file = opened(tmp_path / "file")
    by_name = {t.name: t for t in file.tensors}
    added, zeros = (
        dataclasses.replace(by_name["b"], **changes) for changes in ({"name": "d"}, {"name": "z", "source": None})
    )
    new = file.holding([by_name["a"], added, by_name["b"], zeros])
    assert write(new, tmp_path / "new") == digest(tmp_path / "new")
    found = opened(tmp_path / "new")
    assert (
        all(t.source.extent.start % {"F16": 2, "F32": 4}[t.dtype] == 0 for t in found.tensors)
        and len(found.header) % 8 == 0
    )
    back = load_file(tmp_path / "new")
    assert back["d"].tobytes() == back["b"].tobytes() == arrays["b"].tobytes() and not back["z"].any()
    with pytest.raises(FileExistsError):
        write(new, tmp_path / "new")


def test_weights_that_are_no_numbers_and_files_cut_short_are_found(llama, tmp_path):
    source = pathlib.Path(shutil.copytree(llama, tmp_path / "source"))
    tensors = load_file(source / SINGLE)
    tensors["model.layers.1.mlp.down_proj.weight"][3, 4] = np.inf
    save_file(tensors, source / SINGLE, {"format": "pt"})
    with pytest.raises(UserError, match="layers.1.mlp.down_proj.weight holds NaN or infinite values.* as F32"):
        fast(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    tensor = Checkpoint.open(llama).tensors["lm_head.weight"]
    extent = tensor.source.extent
    beyond = dataclasses.replace(extent, start=extent.start + 10**6, stop=extent.stop + 10**6)
    late = dataclasses.replace(tensor, source=dataclasses.replace(tensor.source, extent=beyond))
    with pytest.raises(UserError, match=r"safetensors could not be read \(it ends at byte [\d,]+, before its header"):
        late.rows()


def test_links_are_followed_and_never_written_through(llama, tmp_path):
    """A snapshot as the hub's cache makes it: links to blobs elsewhere."""
    blobs = tmp_path / "models--org--name" / "blobs"
    snapshot = tmp_path / "models--org--name" / "snapshots" / ("0123456789" * 4)
    shutil.copytree(llama, blobs)
    snapshot.mkdir(parents=True)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(os.path.relpath(path, snapshot))
    before = {p.name: digest(p) for p in blobs.iterdir()}
    report = fast(snapshot, tmp_path / "out")
    assert {p.name: digest(p) for p in blobs.iterdir()} == before
    assert not any(p.is_symlink() for p in (tmp_path / "out").iterdir())
    assert differences(snapshot, tmp_path / "out") == set(report["edited_tensors"])
    assert (report["base"]["name"], report["base"]["revision"]) == ("org/name", "0123456789" * 4)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for link in ("linked", "dangling"):
        with pytest.raises(UserError, match="exists already and is no export of ours"):
            fast(llama, tmp_path / link)
    (tmp_path / ".planned.part").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"\.planned\.part is a link, and nothing is written through links"):
        fast(llama, tmp_path / "planned")
    assert not any((tmp_path / "elsewhere").iterdir())


def test_the_revision_of_a_download(llama, tmp_path):
    record = tmp_path / "model" / ".cache" / "huggingface" / "download" / "config.json.metadata"
    record.parent.mkdir(parents=True)
    shutil.copytree(llama, tmp_path / "model", dirs_exist_ok=True)
    record.write_text("ab" * 20 + "\netag\n1.0\n")
    base = base_model(tmp_path / "model")
    assert (base["name"], base["revision"]) == ("model", "ab" * 20)
    assert base_model(tmp_path / "model", "org/model")["name"] == "org/model"
    record.write_text("../../etc")
    assert base_model(tmp_path / "model")["revision"] is None


def test_targets_that_cannot_be(llama, tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="exists already and is no export of ours"):
        fast(llama, tmp_path / "there")
    with pytest.raises(UserError, match="lies inside the source checkpoint"):
        fast(llama, llama / "inside")
    fast(llama, tmp_path / "out")
    with pytest.raises(UserError, match="exists already, an export of ours. Check it with"):
        fast(llama, tmp_path / "out")
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="could not be written: (Not a directory|File exists)"):
        fast(llama, tmp_path / "file" / "out")


@pytest.mark.parametrize("place", [(shutil, "copyfile"), (rewrite, "copy_range"), (os, "pwrite"), (run, "write_card")])
def test_a_full_disk_leaves_nothing_behind(llama, tmp_path, monkeypatch, place):
    monkeypatch.setattr(*place, lambda *args, **kwargs: refuses_for_space())
    with pytest.raises(UserError, match="could not be written: No space left on device"):
        fast(llama, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_too_small_is_refused_at_once(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=1000))
    with pytest.raises(UserError, match=r"needs \d+,\d+ bytes, its disk has 1,000 free"):
        fast(llama, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("where", ["weights", "verification", "card"])
def test_an_interrupted_export_has_no_folder_and_a_rerun_completes(llama, tmp_path, monkeypatch, where):
    place = {"weights": (Projection, "blocks"), "verification": (verify, "run_streams"), "card": (run, "write_card")}[
        where
    ]

    def stopping(*args, **kwargs):
        assert not (tmp_path / "out").exists()
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(*place, stopping)
        with pytest.raises(KeyboardInterrupt):
            exported(llama, tmp_path / "out", verify=where == "verification")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / ".out.part").mkdir()  # as a killed process leaves it
    (tmp_path / ".out.part" / "model.safetensors").write_bytes(b"half")
    fast(llama, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"] and digest(tmp_path / "out" / "config.json")


def test_what_runs_while_files_are_written_ends_when_that_fails():
    writing = Future()
    bar = verify.Beside(writing, "running", 2, "layer")
    bar.update()
    writing.set_exception(UserError("The disk is full."))
    with pytest.raises(UserError, match="The disk is full"):
        bar.update()


def test_two_processes_do_not_share_a_folder(llama, tmp_path):
    (tmp_path / ".out.part").mkdir()
    lock = os.open(tmp_path / ".out.part", os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    with pytest.raises(UserError, match=r"Another process is writing .*\.out\.part"):
        fast(llama, tmp_path / "out")
    os.close(lock)


def index_of(folder, weight_map) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def test_checkpoints_that_cannot_be_trusted(tmp_path):
    source = tiny.tiny_llama(tmp_path / "source", shards="20KB")
    weight_map = json.loads((source / INDEX).read_text())["weight_map"]
    name, file = next(iter(weight_map.items()))
    other = next(f for f in weight_map.values() if f != file)
    index_of(source, weight_map | {name: "../escape.safetensors"})
    with pytest.raises(UserError, match=r"names files outside the checkpoint's folder: \.\./escape"):
        fast(source, tmp_path / "out")
    index_of(source, weight_map | {name: "gone.safetensors"})
    with pytest.raises(UserError, match="lacks 1 of the .* gone.safetensors"):
        fast(source, tmp_path / "out")
    index_of(source, weight_map)
    twice = load_file(source / other) | {name: load_file(source / file)[name]}
    save_file(twice, source / other, {"format": "pt"})
    with pytest.raises(UserError, match="is in both"):
        fast(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.fixture
def checked(llama, tmp_path):
    """An export that counts as verified."""
    exported(llama, tmp_path / "out")
    return tmp_path / "out"


def test_the_record_of_an_export_and_what_changed_since(checked, llama):
    record = check(checked)
    assert record["files"][SINGLE] == digest(checked / SINGLE) and set(record["files"]) == {
        p.name for p in checked.iterdir() if p.name != staging.PROVENANCE
    }
    assert record["edit"]["kind"] == "ablate" and record["direction"]["sha256"] and record["verified"]
    assert record["base"]["fingerprint"] and str(llama.parent) not in (checked / staging.PROVENANCE).read_text()
    (checked / ".gitattributes").write_text("the hub's")
    check(checked)
    (checked / "config.json").write_text("{}")
    (checked / "tokenizer.json").unlink()
    (checked / "new.bin").write_text("")
    with pytest.raises(
        VerificationError, match="config.json has changed; tokenizer.json is missing|tokenizer.json is missing"
    ) as error:
        check(checked)
    assert "new.bin is not part of the export" in str(error.value) and error.value.exit_code == 3


def test_records_that_cannot_be_used(checked, llama, tmp_path):
    with pytest.raises(UserError, match="holds no refusal_jax.json, so it is no export of ours"):
        check(llama)
    record = json.loads((checked / staging.PROVENANCE).read_text())
    for files, message in (({"../../etc/passwd": "0"}, "names files outside its folder"), ([], "lists no files")):
        (checked / staging.PROVENANCE).write_text(json.dumps(record | {"files": files}))
        with pytest.raises(UserError, match=message):
            check(checked)
    fast(llama, tmp_path / "unchecked")
    with pytest.raises(VerificationError, match="was not verified: see its .unverified"):
        check(tmp_path / "unchecked")


def test_an_export_that_fails_its_verification_says_so(llama, tmp_path, monkeypatch):
    plan = Plan.of
    halved = lambda checkpoint, edit, tied: plan(checkpoint, dataclasses.replace(edit, scale=0.5), tied)  # noqa: E731
    monkeypatch.setattr(run.hf.Plan, "of", halved)
    report = run.export(request(llama, tmp_path / "out", DIRECTION))
    found = report["verification"]["problems"]
    assert any("the largest difference of a logit is" in text for text in found)
    assert any("left along the direction at attn_out of layer" in text for text in found)
    assert (tmp_path / "out" / ".unverified").read_text().splitlines() == found
    assert "**Verification failed**" in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(VerificationError, match="was not verified"):
        check(tmp_path / "out")


@pytest.mark.usefixtures("unchecked")
def test_what_verification_accepts():
    edit = edit_of()
    cfg = types.SimpleNamespace(post_norm=True)
    checkpoint = types.SimpleNamespace(cfg=cfg, tensors={"w": types.SimpleNamespace(dtype="BF16")})
    written = types.SimpleNamespace(tied=None, edits={"w": None})

    def problems(kl=0.0, left=0.0, gap=0.0):
        numbers = {"mean_kl": kl, "max_logit_difference": gap, "projection": {"mlp_out": [0.0, left]}}
        return verify.problems(checkpoint, edit, written, {"export": numbers, "original": {"mean_kl": 0.5}}, 10.0)

    assert problems(kl=0.4, left=5e-3, gap=9.0) == []  # behind a norm, in bfloat16
    assert "mlp_out of layer 1, as a part of the whole, is 2.00e-02, over 1e-02" in problems(left=2e-2)[0]
    assert "the mean KL divergence is 6.00e-01, over 5e-01" in problems(kl=0.6)[0]
    assert len(problems(kl=np.nan, left=np.nan)) == 2
    written.tied = "keep"  # whose cost was chosen
    assert problems(kl=0.6) == [] and len(problems(kl=0.6, left=2e-2)) == 1
    written.tied, cfg.post_norm, checkpoint.tensors["w"].dtype = None, False, "F32"
    assert [text.rpartition(" is ")[0] for text in problems(kl=2e-3, gap=2e-3, left=2e-4)] == [
        "the largest difference of a logit",
        "the mean KL divergence",
        "what is left along the direction at mlp_out of layer 1, as a part of the whole,",
    ]


@pytest.mark.parametrize("kind", ["a link to no file", "a device or pipe"])
def test_a_source_that_holds_what_is_no_file(kind, llama, tmp_path):
    source, staging_folder = shutil.copytree(llama, tmp_path / "source"), tmp_path / "staging"
    odd = source / "notes.txt"
    _ = odd.symlink_to("gone") if kind == "a link to no file" else os.mkfifo(odd)
    with pytest.raises(UserError, match=rf"notes\.txt is {kind}, expected a file"):
        staging.copy_other_files(source, staging_folder)
