"""Directions in, what may be asked of them, model cards and sharing; and the job, whose flags say all that."""

import dataclasses
import json
import shutil
import sys

import families
import numpy as np
import pytest
import torch
import yaml
from absl import flags
from exports import DIRECTION, STUDY, TEXTS, UNIT, edit_of, exported
from safetensors.numpy import save_file

from refusal_jax import UserError
from refusal_jax.checkpoints.fingerprint import checkpoint_fingerprint
from refusal_jax.directions import Direction, read_direction
from refusal_jax.errors import VerificationError
from refusal_jax.export import hub
from refusal_jax.export.card import read_card
from refusal_jax.export.finished import FinishedStudy
from refusal_jax.export.staging import PROVENANCE
from refusal_jax.export.tensor_edits import check_edit
from refusal_jax.export.verify import Sample
from refusal_jax.files import file_hash
from refusal_jax.jobs import export as job
from refusal_jax.models.hf_config import load_config

MEANS = np.random.default_rng(0).normal(size=(2, 3, 32)).astype(np.float32)


@pytest.mark.parametrize("values", [np.zeros(32), np.full(32, np.nan), np.ones((2, 2, 32)), [DIRECTION, np.zeros(32)]])
def test_unusable_directions_are_refused(values):
    with pytest.raises(UserError, match="must be a vector of finite numbers that is not zero"):
        Direction.of(values)


def test_several_directions_span_a_subspace():
    found = Direction.of([DIRECTION, 1e-6 * MEANS[0, 0], MEANS[1, 1]])
    assert found.basis_jd.shape == (3, 32) and found.layer is None
    np.testing.assert_allclose(found.basis_jd @ found.basis_jd.T, np.eye(3), atol=1e-12)
    left = found.raw_jd - found.raw_jd @ found.basis_jd.T @ found.basis_jd
    assert np.abs(left).max() < 1e-12
    np.testing.assert_allclose(Direction.of(DIRECTION).basis_jd[0], UNIT, atol=1e-6)
    for values in ([DIRECTION, 2 * DIRECTION], [*np.eye(2), [1, 1]]):
        with pytest.raises(UserError, match="directions are linearly dependent"):
            Direction.of(values)


@pytest.mark.parametrize("ending", ["a.npy", "a.safetensors", "a.pt", ""])
def test_what_is_written_is_read(ending, tmp_path):
    one, several = Direction.of(DIRECTION, layer=2, position=-1), Direction.of(MEANS[:, 0])
    files = one.write(tmp_path / "one" / ending)
    assert [file.name for file in files] == [ending or "direction.safetensors", "direction_metadata.json"]
    found = read_direction([tmp_path / "one" / ending])
    np.testing.assert_array_equal(found.raw_jd, one.raw_jd)
    assert found.place == one.place == (-1, 2) and found.sha256 == one.sha256 and found.norm == one.norm
    (file,) = several.write(tmp_path / "several" / ending)
    np.testing.assert_array_equal(read_direction([file], n_layers=6).raw_jd, several.raw_jd)


def test_what_a_direction_cannot_be_asked(tmp_path):
    with pytest.raises(UserError, match=r"the name of a direction ends in \.npy, \.safetensors, \.pt"):
        Direction.of(DIRECTION).write(tmp_path / "a.txt")
    with pytest.raises(UserError, match="These are 2 directions. Only one direction can be used here"):
        _ = Direction.of(MEANS[:, 0]).norm
    with pytest.raises(UserError, match="does not tell at which position and layer it was read"):
        _ = Direction.of(DIRECTION, layer=1).place


def test_every_kind_of_file(tmp_path):
    np.save(tmp_path / "a.npy", DIRECTION)
    save_file({"direction": DIRECTION, "other": MEANS}, tmp_path / "b.safetensors")
    save_file({"anything": DIRECTION}, tmp_path / "c.safetensors")
    torch.save(torch.tensor(DIRECTION, dtype=torch.bfloat16).double(), tmp_path / "d.pt")
    torch.save(torch.tensor(MEANS), tmp_path / "mean_diffs.pt")
    save_file({"mean_diffs": MEANS, "harmful": MEANS, "harmless": MEANS}, tmp_path / "e.safetensors")
    for name in ("a.npy", "b.safetensors", "c.safetensors", "d.pt"):
        found = read_direction([tmp_path / name])
        np.testing.assert_allclose(found.raw_jd[0], DIRECTION, rtol=1e-2)
        assert found.layer is None and found.files == {name: file_hash(tmp_path / name)}
    assert read_direction([tmp_path / "a.npy"], layer=2).layer == 2
    for name in ("mean_diffs.pt", "e.safetensors"):
        with pytest.raises(UserError, match=r"2 positions x 3 layers .* position= \(-2 to -1\) and layer= \(0 to 2\)"):
            read_direction([tmp_path / name], position=-1)
        found = read_direction([tmp_path / name], -2, 1)
        np.testing.assert_array_equal(found.raw_jd[0], MEANS[-2, 1])
        assert found.layer == 1
        with pytest.raises(UserError, match="no direction at position -3, layer 1"):
            read_direction([tmp_path / name], -3, 1)
    for folder in ("published", "b"):
        (tmp_path / folder).mkdir()
    np.save(tmp_path / "b" / "a.npy", MEANS[1, 0])
    np.save(tmp_path / "published" / "mean_diffs.npy", MEANS)
    (tmp_path / "direction_metadata.json").write_text('{"pos": -1, "layer": 2}')  # a folder above, as published
    found = read_direction([tmp_path / "published" / "mean_diffs.npy", tmp_path / "a.npy"])
    np.testing.assert_array_equal(found.raw_jd, [MEANS[-1, 2], DIRECTION])
    assert found.layer is None and len(found.files) == 2
    assert read_direction([tmp_path / "published" / "mean_diffs.npy"]).layer == 2
    twice = read_direction([tmp_path / "a.npy", tmp_path / "published" / "mean_diffs.npy", tmp_path / "b" / "a.npy"])
    assert len(twice.files) == 3 and "b/a.npy" in twice.files
    (tmp_path / "direction_metadata.json").write_text('{"pos": -1}')
    with pytest.raises(UserError, match="direction_metadata.json is damaged: it must say pos and layer"):
        read_direction([tmp_path / "a.npy"])


ROWS = np.random.default_rng(2).normal(size=(4, 32))


@pytest.mark.parametrize("form", ["npy", "safetensors", "pt"])
def test_a_file_with_a_row_for_each_layer(form, tmp_path):
    """`layer` chooses the row, of as many rows as the model has layers or one more; without it, nobody guesses."""
    file = tmp_path / f"rows.{form}"
    for count, n_layers in ((4, 4), (4, 3)):
        if form == "npy":
            np.save(file, ROWS[:count])
        elif form == "pt":
            torch.save(torch.tensor(ROWS[:count]), file)
        else:
            save_file({"rows": ROWS[:count]}, file)
        for layer in (0, 2):
            found = read_direction([file], layer=layer, n_layers=n_layers)
            np.testing.assert_array_equal(found.raw_jd, ROWS[[layer]])
            assert found.layer == layer and found.summary == (
                f"1 direction (rows.{form}: row {layer} of 4, counted from 0)"
            )
        message = (
            rf"rows\.{form} has 4 rows and the model has {n_layers} layers: they may be one direction for each layer, or 4 "
            rf"directions that span a subspace\. Say which: layer=N \(0 to {n_layers - 1}\) takes .*; subspace= takes all"
        )
        (tmp_path / "direction_metadata.json").write_text('{"pos": -1, "layer": 2}')  # tells of another file
        with pytest.raises(UserError, match=message):
            read_direction([file], n_layers=n_layers)
        (tmp_path / "direction_metadata.json").unlink()
        whole = read_direction([file], n_layers=n_layers, subspace=True)
        np.testing.assert_array_equal(whole.raw_jd, ROWS)
        assert whole.layer is None
        assert whole.summary == f"4 directions, as the subspace that they span (rows.{form}: all 4 rows)"
        for wrong in (-1, n_layers):
            with pytest.raises(UserError, match=rf"There is no layer {wrong}: the layers are 0 to {n_layers - 1}"):
                read_direction([file], layer=wrong, n_layers=n_layers)


def test_what_does_not_go_with_the_shape_of_a_file(tmp_path):
    np.save(tmp_path / "d.npy", DIRECTION)
    np.save(tmp_path / "one.npy", ROWS[:1])
    np.save(tmp_path / "rows.npy", ROWS)
    np.save(tmp_path / "means.npy", MEANS)
    one, rows, means = (tmp_path / f"{name}.npy" for name in ("one", "rows", "means"))

    def refused(message, *paths, **more):
        with pytest.raises(UserError, match=message):
            read_direction(paths, n_layers=6, **more)

    refused(r"layer=1 was given, but .*rows\.npy has 4 rows and the model has 6 layers.*Leave it out", rows, layer=1)
    refused("There is no layer 6: the layers are 0 to 5", one, layer=6)
    refused(r"position=-1 chooses among mean differences, .* there are none: rows\.npy \[4, 32\]", rows, position=-1)
    refused("position=-1 chooses among mean differences", one, position=-1)
    refused("subspace= takes all 4 rows of .*, and layer=1 one of them", rows, layer=1, subspace=True)
    refused("holds mean differences, .*subspace= takes all rows of a file", means, subspace=True)
    refused("layer=1 says at which layer one direction was read, and these are 2", one, tmp_path / "d.npy", layer=1)
    assert len(read_direction([rows], n_layers=6).raw_jd) == 4
    found = read_direction([one], layer=5, n_layers=6)
    assert found.raw_jd.shape == (1, 32) and found.layer == 5 and found.summary == "1 direction (one.npy)"
    both = read_direction([means, one], -1, 2, n_layers=6)
    np.testing.assert_array_equal(both.raw_jd, [MEANS[-1, 2], ROWS[0]])
    assert both.layer is None and both.taken == ("means.npy: position -1, layer 2", "one.npy")
    np.testing.assert_array_equal(read_direction([rows, one], layer=3, n_layers=4).raw_jd, ROWS[[3, 0]])


def test_files_that_hold_no_direction(tmp_path, monkeypatch):
    def refused(name, message, **settings):
        with pytest.raises(UserError, match=message):
            read_direction([tmp_path / name], **settings)

    (tmp_path / "a.txt").write_text("1 2 3")
    refused("a.txt", "is no direction: give the folder of a finished study, or a file that ends in .npy")
    refused("gone.npy", "is not a file")
    np.save(tmp_path / "objects.npy", np.array([{}], object), allow_pickle=True)
    refused("objects.npy", "is not a readable .npy file")
    np.save(tmp_path / "wide.npy", np.ones((1, 1, 1, 1)))
    refused("wide.npy", r"an array of shape \[1, 1, 1, 1\] and type float64")
    np.save(tmp_path / "none.npy", np.ones((0, 32)))
    refused("none.npy", r"an array of shape \[0, 32\]")
    save_file({"x": DIRECTION, "y": DIRECTION}, tmp_path / "two.safetensors")
    refused("two.safetensors", r"holds 2 tensors \(x, y\): call the one that counts 'direction'")
    (tmp_path / "torn.safetensors").write_bytes(b"12345678")
    refused("torn.safetensors", "is not a readable safetensors file")
    torch.save({"direction": torch.ones(3)}, tmp_path / "dict.pt")
    refused("dict.pt", "holds no plain tensor")
    torch.save(STUDY, tmp_path / "object.pt")
    refused("object.pt", "Only tensors are read, because other pickles can run code")
    for name, size in (("a.npy", 3), ("b.npy", 4)):
        np.save(tmp_path / name, np.ones(size))
    with pytest.raises(UserError, match="have 3, 4 entries: they belong to different models"):
        read_direction([tmp_path / "a.npy", tmp_path / "b.npy"])
    monkeypatch.setitem(sys.modules, "torch", None)
    refused("dict.pt", "only be read with PyTorch, which is not installed.*numpy.save")


def test_what_cannot_be_asked_of_an_edit(llama):
    cfg = load_config(llama)

    def refused(message, values=DIRECTION, **settings):
        with pytest.raises(UserError, match=message):
            check_edit(cfg, edit_of(values, **settings))

    refused("has 7 entries, the model's residual stream has 32", np.ones(7))
    refused("The edit is at layer 3, and the model's layers are 0 to 2. Choose layers= among these", layers=[1, 3])
    refused("The edit is at no layer", layers=[])
    refused("scale=0 leaves nothing", scale=0)
    refused("scale=nan leaves nothing", scale=float("nan"))
    refused("sites=resid_pre: what weights write is embed, attn_out, mlp_out", sites=("resid_pre",))
    refused("does not tell at which layer to add it", kind="add")
    refused("takes one direction, these are 2", np.stack([DIRECTION, MEANS[0, 0]]), kind="add")


@pytest.fixture
def study(llama, tmp_path):
    """The folder of a finished study, as far as an export looks at it."""
    folder = tmp_path / "study"
    (folder / "completions").mkdir(parents=True)
    save_file({"direction": DIRECTION}, folder / "direction.safetensors")
    (folder / "direction_metadata.json").write_text('{"pos": -1, "layer": 2}')
    texts = {side: [{"instruction": text} for text in TEXTS] for side in ("harmful_val", "harmless_val")}
    (folder / "prompts.json").write_text(json.dumps(texts))
    (folder / "setup.json").write_text(json.dumps({"model": str(llama)}))
    writes = {}
    for dataset, refused in (("harmful", [0, 0, 0, 1]), ("harmless", [1, 1, 1, 1])):
        rows = [
            {
                "category": None,
                "prompt": f"Bake {i}.",
                "response": "Sure, bread." * (i > 0),
                "is_jailbreak_substring_matching": v,
            }
            for i, v in enumerate(refused)
        ]
        name = f"completions/{dataset}_baseline_evaluations.json"
        writes[name] = "0"
        (folder / name).write_text(json.dumps({"substring_matching_success_rate": 0.5, "completions": rows}))
    manifest = {
        "config": {"chat_template": "llama-3"},
        "inputs": {"model": checkpoint_fingerprint(llama)},
        "stages": {"evaluations": {"writes": writes}},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def test_what_an_export_takes_from_a_study(study):
    found = FinishedStudy.read(study, 2)
    assert found.prompts == TEXTS[:2] * 2 and found.harmless == [(f"Bake {i}.", "Sure, bread.") for i in (1, 2)]
    assert found.template == {"chat_template": "llama-3", "system_prompt": ""}
    harmful, harmless = found.refusals()
    assert (harmful["prompts"], harmful["intervention"], harmful["refused"], harmful["n"]) == (
        "harmful",
        "baseline",
        0.75,
        4,
    )
    assert 0 < harmful["interval"][0] < 0.75 < harmful["interval"][1] < 1 and harmless["refused"] == 0
    assert len(FinishedStudy.none(3).prompts) == 6 and FinishedStudy.none(3).refusals() == []
    (study / "prompts.json").write_text("[")
    with pytest.raises(UserError, match="The study in .* is damaged"):
        FinishedStudy.read(study, 2)
    (study / "setup.json").unlink()
    with pytest.raises(UserError, match="holds no setup.json, so it is not a finished study"):
        FinishedStudy.read(study, 2)


def test_a_sample_needs_harmless_text(model):
    with pytest.raises(UserError, match="No harmless text is left"):
        Sample.of(model.chat, TEXTS, [("", "")])


def run_job(*args) -> None:
    """The job with these flags."""
    flags.FLAGS.unparse_flags()
    for name in flags.FLAGS.get_flags_for_module(job.__name__):
        name.unparse()
    flags.FLAGS(["export", *map(str, args)])
    job.main(list(map(str, args)))


def test_the_job_exports_a_study_and_shares_it(study, llama, tmp_path, capsys, monkeypatch):
    api = FakeHub()
    monkeypatch.setattr(hub, "hub_api", lambda: api)
    out = tmp_path / "out"
    run_job(f"--direction={study}", f"--out={out}", "--prompts=2", "--push_to_hub=me/edited", "--base_model=org/base")
    printed = capsys.readouterr().out
    assert "7 tensors edited (7 orthogonal; largest amplification 1.00)" in printed and "hub/me/edited" in printed
    assert "export: max |difference|" in printed and "Perplexity on" in printed
    assert api.created == {"me/edited": True} and api.uploaded == [str(out)]
    report = json.loads((out / "export.json").read_text())
    assert report["verification"]["prompts"] == 4 and report["base"]["name"] == "org/base"
    assert report["direction"]["files"] == {"direction.safetensors": file_hash(study / "direction.safetensors")}
    card = (out / "README.md").read_text()
    assert read_card(out)[0]["base_model"] == "org/base"
    assert "| harmful | baseline | 75.0 % | 30.1 to 95.4 % | 4 |" in card
    assert "refusal-jax export --direction=study --out=out --prompts=2" in card and str(tmp_path) not in card
    assert str(tmp_path) not in (out / PROVENANCE).read_text()
    run_job(f"--check={out}", "--push_to_hub=me/edited")
    assert "files are as they were exported and verified" in capsys.readouterr().out and len(api.uploaded) == 2
    run_job(
        f"--direction={study}", f"--out={tmp_path / 'v'}", "--edit=add", "--format=gguf", "--noverify", "--layers=all"
    )
    assert "Control vector: " in capsys.readouterr().out
    assert json.loads((tmp_path / "v" / "export.json").read_text())["edit"] == {
        "kind": "add",
        "scale": 1.0,
        "layers": [2],
    }


def test_the_job_on_tied_embeddings_behind_norms(tmp_path, capsys):
    source = families.tiny_model(tmp_path / "source", "gemma2")
    np.save(tmp_path / "d.npy", DIRECTION)
    run_job(f"--model={source}", f"--direction={tmp_path / 'd.npy'}", f"--out={tmp_path / 'out'}", "--prompts=2")
    printed = capsys.readouterr().out
    assert "The embedding is tied: its unembedding stays as it was." in printed
    assert "  --tied=keep: 0 bytes more, max |difference|" in printed and "plain orthogonalisation: max" in printed
    assert "9 tensors edited (8 oblique, 1 orthogonal" in printed


def test_the_job_says_how_many_directions_it_takes(llama, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    np.save(tmp_path / "rows.npy", ROWS[:3])
    asked = [f"--model={llama}", "--direction=~/rows.npy", "--noverify"]
    with pytest.raises(UserError, match="has 3 rows and the model has 3 layers"):
        run_job(*asked, "--out=~/none")
    for name, more, said in (
        ("row", ["--layer=1"], "1 direction (rows.npy: row 1 of 3, counted from 0)"),
        ("all", ["--subspace"], "3 directions, as the subspace that they span (rows.npy: all 3 rows)"),
    ):
        run_job(*asked, f"--out=~/{name}", *more)
        assert f"Exported: {said}." in capsys.readouterr().out
        report = json.loads((tmp_path / name / "export.json").read_text())
        assert report["direction"]["count"] == int(said[0])
    assert not (tmp_path / "none").exists()


def test_what_the_job_refuses(study, llama, tmp_path, monkeypatch):
    def refused(message, *args, error=UserError):
        with pytest.raises(error, match=message):
            run_job(*args)

    np.save(tmp_path / "d.npy", DIRECTION)
    file, out = f"--direction={tmp_path / 'd.npy'}", f"--out={tmp_path / 'out'}"
    refused("--direction is missing", out)
    refused("--out is missing", file)
    refused("--model is missing: a direction from a file does not tell", file, out)
    refused("Only verified exports are pushed", file, out, "--noverify", "--push_to_hub=me/x")
    refused("--layers = 1-x: write numbers and ranges", file, out, f"--model={llama}", "--layers=1-x")
    refused("The edit is at layer 3", file, out, f"--model={llama}", "--layers=0,2-5")
    monkeypatch.setattr("refusal_jax.export.verify.MOST_KL", -1.0)
    refused("The verification of .* failed: the mean KL", f"--direction={study}", out, error=VerificationError)
    other = families.tiny_model(tmp_path / "other", "llama", seed=1)
    (study / "setup.json").write_text(json.dumps({"model": str(other)}))
    refused(
        "is not the checkpoint that .* was made from: it has changed", f"--direction={study}", f"--out={tmp_path / 'b'}"
    )
    flags.FLAGS.unparse_flags()
    flags.FLAGS(["export", f"--direction={study}", f"--out={tmp_path / 'b'}", f"--model={other}"])
    assert job.read_request([]).study.conditions == []


class FakeHub:
    """What `push` uses of the hub's client."""

    def __init__(self, public=(), broken=""):
        self.public, self.broken, self.created, self.uploaded = set(public), broken, {}, []

    def create_repo(self, name, repo_type, private, exist_ok):
        if self.broken == "create":
            raise ConnectionError("no token\nand no network")
        self.created[name] = private
        return f"https://hub/{name}"

    def repo_info(self, name, repo_type):
        return dataclasses.make_dataclass("Info", ["private"])(name not in self.public and self.created[name])

    def upload_folder(self, folder_path, repo_id, repo_type, commit_message):
        if self.broken == "upload":
            raise ConnectionError("gone")
        self.uploaded.append(folder_path)


def test_sharing_is_private_and_only_of_whole_exports(llama, tmp_path, monkeypatch):
    folder = tmp_path / "out"
    exported(llama, folder)
    for broken, reason in (("create", "no token and no network"), ("upload", "gone")):
        message = rf"whole in .*, but could not be pushed to me/x \({reason}\).*--check=.* --push_to_hub=me/x"
        with pytest.raises(UserError, match=message):
            hub.push(folder, "me/x", api=FakeHub(broken=broken))
    api = FakeHub(public=["me/x"])
    with pytest.raises(UserError, match="me/x is a public repository, so nothing was uploaded"):
        hub.push(folder, "me/x", api=api)
    assert api.uploaded == []
    assert hub.push(folder, "me/x", public=True, api=api) == "https://hub/me/x" and api.uploaded == [str(folder)]
    (folder / "config.json").write_text("{}")
    with pytest.raises(VerificationError, match="config.json has changed"):
        hub.push(folder, "me/x", api=api)
    assert hub.hub_api().upload_folder


def test_the_card_keeps_the_base_models_card_and_licence(llama, tmp_path):
    source = shutil.copytree(llama, tmp_path / "source")
    base = "---\nlicense: other\nlicense_name: gemma\nlanguage: [en]\nextra_gated_prompt: no\n---\n# Base\n\nIts *own* text.\n"
    (source / "README.md").write_text(base)
    (source / "LICENSE").write_text("terms")
    exported(source, tmp_path / "out", verify=False)
    text = (tmp_path / "out" / "README.md").read_text()
    metadata, body = read_card(tmp_path / "out")
    assert metadata["license"] == "other" and metadata["license_name"] == "gemma" and metadata["language"] == ["en"]
    assert "base_model" not in metadata and metadata["library_name"] == "transformers"  # its name is a folder's
    assert "extra_gated_prompt" not in metadata and text.count("---\n") == 2
    assert body.rstrip().endswith("# The base model's own card\n\n# Base\n\nIts *own* text.")
    assert "That of the base model: gemma." in body and "The files were not verified." in body
    assert "Refusals were not measured" in body and (tmp_path / "out" / "LICENSE").read_text() == "terms"
    for broken in ("---\n: [\n---\nText", "---\n- a list\n---\nText", "Text"):
        (source / "README.md").write_text(broken)
        assert read_card(source) == ({}, "Text")
    exported(source, tmp_path / "again", verify=False)
    assert "names no licence" in (tmp_path / "again" / "README.md").read_text()
    assert yaml.safe_load(text.split("---\n")[1])["tags"] == ["refusal-direction", "refusal-jax"]


def test_the_command_names_the_commit_of_a_model_on_the_hub(tmp_path):
    snapshot = tmp_path / "models--org--tiny" / "snapshots" / ("a" * 40)
    words = ["--model=org/tiny", "--direction=/here/run"]
    assert job.command(words, snapshot) == f"refusal-jax export --model=org/tiny@{'a' * 40} --direction=run"
    assert job.command(["--model=/here/tiny"], tmp_path) == "refusal-jax export --model=tiny"
