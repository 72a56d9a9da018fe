"""Weight edits and HF export, for every family: exact, byte-preserving, loadable by transformers, refused when it can't be."""

import dataclasses
import hashlib
import json
import pathlib
import re
import shutil
import subprocess
import sys

import families
import ml_dtypes
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file
from tqdm import tqdm

from refusal_jax import Edits, Taps, UserError, load_model
from refusal_jax.export import hf, rank_one
from refusal_jax.export.hf import TIED, export_hf
from refusal_jax.export.rank_one import MOST_AMPLIFICATION, RankOne, unit_direction
from refusal_jax.export.verify import READ, compare, projection
from refusal_jax.models.config import load_config
from refusal_jax.models.families import TABLES, hf_names
from refusal_jax.models.load import INDEX, SINGLE, TensorFiles
from refusal_jax.runs import checkpoint_fingerprint

TEXTS = ["How do I bake the bread?", "Bake.", "I want to mend a coat. What should I do about the bread on the table?"]
# With biases, tied embeddings and scalars where a family has them.
VARIANTS = {"llama": "biased", "qwen": "biased", "olmo2": "biased", "granite": "scaled", "phi3": "longrope"}
LIKE_BELOW = {"gemma": "gqa", "gemma2": "gqa"}  # one compiled program less
POST_NORM = ("gemma2", "gemma3_text", "gemma3", "olmo2", "glm4")
DIRECTION = np.random.default_rng(3).normal(size=32).astype(np.float32)
UNIT = DIRECTION / np.linalg.norm(DIRECTION)


def digest(path: pathlib.Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def tensors_of(folder) -> dict[str, np.ndarray]:
    """Every tensor of a checkpoint, in whichever file."""
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def differences(before, after) -> set[str]:
    """The names of tensors that are not the same, byte for byte, in two checkpoints."""
    old, new = tensors_of(before), tensors_of(after)
    same = {n for n in old.keys() & new.keys() if old[n].dtype == new[n].dtype and old[n].tobytes() == new[n].tobytes()}
    return (old.keys() | new.keys()) - same


def compared(source, target) -> dict:
    return compare(source, target, DIRECTION, load_model(source).chat, TEXTS)


def transformers_agrees(folder) -> None:
    """transformers loads the checkpoint, whole, and computes what we compute."""
    model = load_model(folder)
    batch = model.encode(TEXTS)
    last = model.taps(batch.tokens, batch.mask, Taps(READ, 1))["resid_post"][-1]  # the program that `compare` compiled
    theirs = tiny.hf_forward(families.reference(folder), batch.tokens, batch.mask).logits[:, -1].numpy()
    np.testing.assert_allclose(model.decoder.logits(last)[:, 0], theirs, atol=1e-4, rtol=1e-4)


@dataclasses.dataclass
class Case:
    family: str
    source: pathlib.Path
    target: pathlib.Path
    export: hf.Export
    result: dict


@pytest.fixture(scope="module", params=families.FAMILIES)
def case(request, tmp_path_factory):
    """A model of each family and its export."""
    family, folder = request.param, tmp_path_factory.mktemp(request.param)
    source = families.tiny_model(
        folder / "source", family, (VARIANTS | LIKE_BELOW).get(family) or next(iter(families.FAMILIES[family]))
    )
    export = export_hf(source, folder / "out", DIRECTION)
    return Case(family, source, folder / "out", export, compared(source, folder / "out"))


def test_every_family_loads_in_transformers_and_computes_what_we_compute(case):
    transformers_agrees(case.target)


def test_no_layer_writes_along_the_direction(case):
    assert set(case.result["projection"]) == set(READ)
    for site, most in case.result["projection"].items():
        assert most < 1e-4 < 1e-2 < case.result["original_projection"][site], site


def test_the_export_is_ablation_or_as_near_as_weights_can_come(case):
    result = case.result
    assert result["original_max_logit_difference"] > 0.1
    if case.family not in POST_NORM:
        assert result["max_logit_difference"] < 1e-3 and "orthogonalised_mean_kl" not in result
        return
    assert result["mean_logit_difference"] < 0.5 * result["orthogonalised_mean_logit_difference"]
    assert min(result["orthogonalised_projection"][site] for site in ("attn_out", "mlp_out")) > 1e-2


def test_exactly_the_writers_are_edited_every_expert_among_them(case):
    cfg, names = load_config(case.source), set(case.export.edits)
    wanted = {"embed", "blocks.o", "blocks.down"} | ({"blocks.o_bias"} if cfg.o_bias else set())
    wanted |= {"blocks.down_bias"} if cfg.mlp_bias else set()
    assert names == {name for path in wanted for name in hf_names(cfg, path)}
    assert len(names) >= 1 + cfg.n_layers * (1 + max(cfg.n_experts, 1))
    untied = {TABLES[case.family]["unembed"]} if cfg.tied_embeddings else set()
    assert differences(case.source, case.target) == names | untied
    kinds = {edit.kind for edit in case.export.edits.values()}
    assert kinds == ({"orthogonal", "oblique"} if case.family in POST_NORM else {"orthogonal"})
    tensors = tensors_of(case.target)
    for name, edit in case.export.edits.items():
        rows = tensors[name] if edit.by_rows else tensors[name].T
        assert projection(rows, edit.right_d / np.linalg.norm(edit.right_d)) < 1e-5, name


def test_behind_a_norm_the_output_is_the_ablated_one_up_to_a_scalar(case):
    if case.family not in POST_NORM:
        return
    original, exported = load_model(case.source), load_model(case.target)
    batch = original.encode(TEXTS)
    site = Taps(READ, 1)
    want = np.asarray(original.taps(batch.tokens, batch.mask, site, Edits.ablate(DIRECTION))["attn_out"])[0, :, 0]
    got = np.asarray(exported.taps(batch.tokens, batch.mask, site)["attn_out"])[0, :, 0]  # layer 0: of the same input
    scalars = np.linalg.norm(got, axis=1, keepdims=True) / np.linalg.norm(want, axis=1, keepdims=True)
    np.testing.assert_allclose(got, scalars * want, atol=1e-5)
    assert np.abs(scalars - 1).max() > 1e-3


@pytest.mark.parametrize("kind", ["orthogonal", "oblique", "projected"])
def test_the_three_kinds_of_edit(kind):
    rng = np.random.default_rng(1)
    scale = None if kind == "orthogonal" else rng.normal(1, 0.3, 32)
    if kind == "projected":
        scale[4] = 1e-9
    down, bias = (rank_one.rank_one(path, UNIT, scale) for path in ("blocks.down", "blocks.down_bias"))
    assert down.kind == bias.kind == kind
    assert (down.amplification == pytest.approx(1)) != (kind == "oblique") and down.amplification <= MOST_AMPLIFICATION
    w, b, x = rng.normal(size=(32, 48)), rng.normal(size=32), rng.normal(size=(48, 5))
    norm = np.ones(32) if scale is None else scale
    before, after = norm * (w @ x).T + norm * b, norm * (down(w) @ x).T + norm * bias(b)
    assert projection(after, UNIT) < 1e-6
    ablated = before - np.outer(before @ UNIT, UNIT)
    assert np.allclose(after, ablated, atol=1e-4) == (kind != "projected")
    np.testing.assert_allclose(down(np.stack([w, 2 * w]))[1], down(2 * w))  # axes may lead


@pytest.fixture(scope="module")
def muted(tmp_path_factory):
    """A Gemma 2 whose post-norms have scales that are nearly zero, or zero."""
    source = families.tiny_model(tmp_path_factory.mktemp("muted") / "source", "gemma2", dtype="bfloat16")
    tensors = load_file(source / SINGLE)
    name = "model.layers.{}.post_{}_layernorm.weight"
    near = tensors[name.format(1, "attention")] = tensors[name.format(1, "attention")].astype(np.float32)
    near[5:7] = 1e-4 - 1  # bfloat16 has no such number
    tensors[name.format(2, "feedforward")][5:7] = -1
    tensors[name.format(0, "feedforward")][:] = -1  # what this MLP computes goes nowhere
    save_file(tensors, source / SINGLE, {"format": "pt"})
    return source


def test_norm_scales_near_zero_get_the_stable_edit(muted, tmp_path):
    export = export_hf(muted, tmp_path / "out", DIRECTION)
    kinds = {name: edit.kind for name, edit in export.edits.items()}
    assert (
        kinds["model.layers.1.self_attn.o_proj.weight"] == kinds["model.layers.2.mlp.down_proj.weight"] == "projected"
    )
    assert kinds["model.layers.1.mlp.down_proj.weight"] == kinds["model.layers.2.self_attn.o_proj.weight"] == "oblique"
    assert "model.layers.0.mlp.down_proj.weight" not in kinds
    assert 1 < export.largest_amplification <= MOST_AMPLIFICATION
    result = compared(muted, tmp_path / "out")
    assert max(result["projection"].values()) < 1e-2  # in bfloat16
    transformers_agrees(tmp_path / "out")


TIED_MODELS = {"gemma": {}, "llama": {"tie_word_embeddings": True}}


@pytest.fixture(
    scope="module", params=[(f, s) for f in TIED_MODELS for s in ("single", "sharded", "spare")], ids="-".join
)
def tied_model(request, tmp_path_factory):
    """A model with tied embeddings in one file, in several, or with an unembedding in a file of its own all the same."""
    family, storage = request.param
    source = families.tiny_model(tmp_path_factory.mktemp(family) / "source", family, **TIED_MODELS[family])
    if storage != "single":
        tensors = load_file(source / SINGLE)
        files = {"model-1.safetensors": tensors, "model-2.safetensors": {}}
        for name in list(tensors):
            if name == "model.embed_tokens.weight" or "layers.1" in name:
                files["model-2.safetensors"][name] = tensors.pop(name)
        if storage == "spare":
            embed = files["model-2.safetensors"]["model.embed_tokens.weight"]
            files["model-3.safetensors"] = {"lm_head.weight": embed.copy()}
        (source / SINGLE).unlink()
        size = sum(t.nbytes for tensors in files.values() for t in tensors.values())
        index = {
            "metadata": {"total_size": size, "total_parameters": size // 4, "more": "kept"},
            "weight_map": {name: file for file, tensors in files.items() for name in tensors},
        }
        (source / INDEX).write_text(json.dumps(index))
        for file, tensors in files.items():
            save_file(tensors, source / file, {"format": "pt"})
    return source


@pytest.mark.parametrize("tied", TIED)
def test_tied_embeddings(tied_model, tmp_path, tied):
    source, target = tied_model, tmp_path / "out"
    export = export_hf(source, target, DIRECTION, tied)
    before, after = tensors_of(source), tensors_of(target)
    embed, head, spare = "model.embed_tokens.weight", "lm_head.weight", "lm_head.weight" in before
    assert export.tied == tied and (embed in export.edits) == (tied != "skip")
    assert differences(source, target) - {head} == export.edits.keys() - {head}
    assert {p.name for p in target.iterdir()} == {p.name for p in source.iterdir()}
    if tied == "untie":
        assert after[head].dtype == np.float32 and after[head].tobytes() == before[embed].tobytes()
    elif tied == "keep" and spare:
        assert after[head].tobytes() == after[embed].tobytes() != before[embed].tobytes()
    else:
        assert (head in after) == spare and head not in differences(source, target)
    sizes = [sum(t.nbytes for t in tensors.values()) for tensors in (before, after)]
    assert export.added_bytes == sizes[1] - sizes[0] and (spare or (export.added_bytes > 0) == (tied == "untie"))
    unchanged = tied != "untie"
    assert (digest(source / "config.json") == digest(target / "config.json")) == unchanged
    assert load_config(target).tied_embeddings == unchanged
    if (source / INDEX).exists():
        index, old = (json.loads((folder / INDEX).read_text()) for folder in (target, source))
        assert index["metadata"]["total_size"] - old["metadata"]["total_size"] == (
            0 if unchanged else export.added_bytes
        )
        more = index["metadata"]["total_parameters"] - old["metadata"]["total_parameters"]
        assert more == (0 if unchanged else before[embed].size) and index["metadata"]["more"] == "kept"
        assert list(old["weight_map"]) == list(index["weight_map"])[: len(old["weight_map"])]
    TensorFiles.open(target)  # the index tells the truth
    transformers_agrees(target)
    result = compared(source, target)
    assert (result["max_logit_difference"] < 1e-3) == (tied == "untie")
    assert (max(result["projection"].values()) < 1e-5) == (tied != "skip")


def test_a_mixture_of_dtypes_is_kept(tmp_path):
    source = families.tiny_model(tmp_path / "source", "llama", tie_word_embeddings=True)
    kinds = {"mlp": ml_dtypes.bfloat16, "o_proj": np.float16, "q_proj": np.float16, "embed": ml_dtypes.bfloat16}
    tensors = {
        name: tensor.astype(next((d for part, d in kinds.items() if part in name), np.float32))
        for name, tensor in load_file(source / SINGLE).items()
    }
    save_file(tensors, source / SINGLE, {"format": "pt", "note": "kept"})
    export_hf(source, tmp_path / "out", DIRECTION)
    after = tensors_of(tmp_path / "out")
    assert {name: t.dtype for name, t in after.items() if name in tensors} == {n: t.dtype for n, t in tensors.items()}
    assert after["lm_head.weight"].dtype == ml_dtypes.bfloat16
    file = hf.WeightFile.read(tmp_path / "out" / SINGLE)
    assert file.metadata == {"format": "pt", "note": "kept"}
    result = compared(source, tmp_path / "out")
    assert max(result["projection"].values()) < 1e-2 and 5 * result["mean_kl"] < result["original_mean_kl"]
    transformers_agrees(tmp_path / "out")


def test_every_tensor_of_a_new_header_begins_at_a_multiple_of_its_size(tmp_path):
    arrays = {"a": np.ones(3, np.float16), "b": np.ones(5, np.float32)}
    save_file(arrays, tmp_path / "file")
    file = hf.WeightFile.read(tmp_path / "file")
    by_name = {t.name: t for t in file.tensors}
    added = dataclasses.replace(by_name["b"], name="d")
    file.holding([by_name["a"], added, by_name["b"]]).write(tmp_path / "new", tqdm(disable=True))
    new = hf.WeightFile.read(tmp_path / "new")
    assert all(t.start % {"F16": 2, "F32": 4}[t.dtype] == 0 for t in new.tensors) and len(new.header) % 8 == 0
    back = load_file(tmp_path / "new")
    assert back.keys() == {"a", "b", "d"} and back["d"].tobytes() == back["b"].tobytes() == arrays["b"].tobytes()


def test_untouched_tensors_and_files_are_copied_byte_for_byte(tmp_path, monkeypatch):
    monkeypatch.setattr(hf, "COPY_BYTES", 1000)  # several blocks a tensor
    source = tiny.tiny_llama(tmp_path / "source", shards="20KB", dtype="bfloat16")
    (source / "extra").mkdir()
    (source / "extra" / "note.txt").write_text("kept")
    (source / "pytorch_model.bin").write_bytes(b"pickled weights of the unedited model")
    names = set(export_hf(source, tmp_path / "out", DIRECTION).edits)
    assert differences(source, tmp_path / "out") == names
    ours = {str(p.relative_to(tmp_path / "out")): p for p in (tmp_path / "out").rglob("*") if p.is_file()}
    theirs = {str(p.relative_to(source)): p for p in source.rglob("*") if p.is_file()}
    assert set(theirs) - set(ours) == {"pytorch_model.bin"} and set(ours) <= set(theirs)
    for name, path in ours.items():
        if path.suffix == ".safetensors":
            header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
            assert path.read_bytes()[:header] == theirs[name].read_bytes()[:header]
        else:
            assert digest(path) == digest(theirs[name]), name
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    rows = tensors_of(tmp_path / "out")["model.embed_tokens.weight"].astype(np.float64)
    assert projection(rows, UNIT) < 1e-2


def test_links_are_followed_and_never_written_through(tmp_path):
    blobs = tiny.tiny_llama(tmp_path / "blobs")
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(path)
    before = {p.name: digest(p) for p in blobs.iterdir()}
    export = export_hf(snapshot, tmp_path / "out", DIRECTION)
    assert {p.name: digest(p) for p in blobs.iterdir()} == before
    assert not any(p.is_symlink() for p in (tmp_path / "out").iterdir())
    assert differences(snapshot, tmp_path / "out") == set(export.edits)


@pytest.mark.parametrize("direction", [np.zeros(32), np.full(32, np.nan), np.ones((2, 32))])
def test_unusable_directions_are_refused(direction):
    with pytest.raises(UserError, match="must be a vector of finite numbers that is not zero"):
        unit_direction(direction, 32)


def test_targets_and_sources_that_cannot_be(llama, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="has 7 entries, the model's residual stream has 32"):
        export_hf(llama, tmp_path / "out", np.ones(7))
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="exists already"):
        export_hf(llama, tmp_path / "there", DIRECTION)
    with pytest.raises(UserError, match="lies inside the source checkpoint"):
        export_hf(llama, llama / "inside", DIRECTION)
    with pytest.raises(ValueError, match="tied must be one of untie, keep, skip, not 'cut'"):
        export_hf(llama, tmp_path / "out", DIRECTION, "cut")
    monkeypatch.setitem(TABLES["llama"], "blocks.o", TABLES["llama"]["blocks.q"])
    with pytest.raises(ValueError, match="q_proj.weight holds blocks.o fused with other weights"):
        rank_one.writer_edits(load_config(llama), None, UNIT)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("place", [(shutil, "copyfile"), (hf.WeightFile, "write")])
def test_a_full_disk_leaves_nothing_behind(llama, tmp_path, monkeypatch, place):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(*place, full)
    with pytest.raises(UserError, match="could not be written: No space left on device"):
        export_hf(llama, tmp_path / "out", DIRECTION)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="could not be written: (Not a directory|File exists)"):
        export_hf(llama, tmp_path / "file" / "out", DIRECTION)


def test_an_interrupted_export_has_no_folder(llama, tmp_path, monkeypatch):
    calls, edit = [], RankOne.__call__

    def stopping(self, tensor):
        calls.append(self.path)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return edit(self, tensor)

    monkeypatch.setattr(RankOne, "__call__", stopping)
    with pytest.raises(KeyboardInterrupt):
        export_hf(llama, tmp_path / "out", DIRECTION)
    assert list(tmp_path.iterdir()) == []
    export_hf(llama, tmp_path / "out", DIRECTION)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["hidden_size"] == 32


def test_the_job_reports_what_it_did(muted, tmp_path):
    study = tmp_path / "study"
    study.mkdir()
    save_file({"direction": DIRECTION}, study / "direction.safetensors")
    texts = {side: [{"instruction": text} for text in TEXTS] for side in ("harmful_val", "harmless_val")}
    (study / "prompts.json").write_text(json.dumps(texts))
    (study / "setup.json").write_text(json.dumps({"model": str(muted)}))
    manifest = {
        "config": {"chat_template": "llama-3"},
        "inputs": {"model": checkpoint_fingerprint(muted)},
        "stages": {},
    }
    (study / "manifest.json").write_text(json.dumps(manifest))
    command = [sys.executable, "-m", "refusal_jax.jobs.main", "export", f"--direction={study}"]
    done = subprocess.run([*command, f"--out={tmp_path / 'out'}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out" / "export.json").read_text())
    assert report["kinds"] == {"orthogonal": 1, "oblique": 5, "projected": 2} and report["tied"] == "untie"
    assert len(report["edited_tensors"]) == 8 and report["comparison"]["prompts"] == 6
    assert re.search(r"8 tensors edited \(5 oblique, 2 projected, 1 orthogonal; largest amplification \d", done.stdout)
    assert (
        f"its unembedding is now a tensor of its own, the embedding as it was ({report['added_bytes']:,}" in done.stdout
    )
    assert re.search(
        r"  plain orthogonalisation: max .* largest projection on the direction \d\.\d\de-0[12] of", done.stdout
    )
