"""Edited checkpoints of every family: the edit is exact or as near as weights can come, and transformers loads it."""

import dataclasses
import json
import pathlib
import shutil

import families
import ml_dtypes
import numpy as np
import pytest
import tiny
from exports import (
    DIRECTION,
    POST_NORM,
    UNIT,
    differences,
    edit_of,
    exported,
    largest,
    our_logits,
    part,
    sample_of,
    tensors_of,
    transformers_agrees,
)
from safetensors.numpy import load_file, save_file

from refusal_jax import Edits, UserError
from refusal_jax.checkpoints.rewrite import Checkpoint
from refusal_jax.checkpoints.safetensors import LocalFile, read_header
from refusal_jax.checkpoints.tensor_files import INDEX, SINGLE, TensorFiles
from refusal_jax.export import tensor_edits
from refusal_jax.export.forward import READ, Stream
from refusal_jax.export.hf import TIED, Plan
from refusal_jax.export.tensor_edits import MOST_AMPLIFICATION
from refusal_jax.models.families import TABLES, hf_names
from refusal_jax.models.hf_config import load_config
from refusal_jax.models.weights import weight_table

# With biases, tied embeddings and scalars where a family has them.
VARIANTS = {"llama": "biased", "qwen": "biased", "olmo2": "biased", "granite": "scaled", "phi3": "longrope"}
VARIANTS |= {"qwen2_moe": "alternating", "glm4_moe": "grouped", "deepseek_v2": "greedy"}
VARIANTS |= {"glm4_moe_lite": "alternating"}


@dataclasses.dataclass
class Case:
    family: str
    source: pathlib.Path
    target: pathlib.Path
    report: dict

    @property
    def found(self) -> dict:
        return self.report["verification"]


@pytest.fixture(scope="module", params=families.FAMILIES)
def case(request, tmp_path_factory):
    """A model of each family and its export."""
    family, folder = request.param, tmp_path_factory.mktemp(request.param)
    variant = VARIANTS.get(family) or next(iter(families.FAMILIES[family]))
    source = families.tiny_model(folder / "source", family, variant)
    return Case(family, source, folder / "out", exported(source, folder / "out"))


def test_every_family_loads_in_transformers_and_computes_what_we_compute(case):
    transformers_agrees(case.target)


def test_no_layer_writes_along_the_direction(case):
    assert case.found["problems"] == [] and not (case.target / ".unverified").exists()
    left, before = largest(case.found["export"]), largest(case.found["original"])
    assert set(left) == set(READ)
    for site in READ:
        assert left[site] < 1e-4 < 1e-2 < before[site], site


def test_the_export_is_ablation_or_as_near_as_weights_can_come(case):
    export, original = case.found["export"], case.found["original"]
    assert original["max_logit_difference"] > 0.1 and original["ce_loss"] != export["ce_loss"]
    if case.family not in POST_NORM:
        assert export["max_logit_difference"] < 1e-3 and "orthogonalised" not in case.found
        assert export["perplexity"] == pytest.approx(case.found["reference"]["perplexity"], rel=1e-4)
        return
    plain = case.found["orthogonalised"]
    # Weights also take the direction out of what per-layer inputs read of the embedding, which no site of an edit is.
    near = 1.0 if load_config(case.source).d_per_layer else 0.5
    assert export["mean_logit_difference"] < near * plain["mean_logit_difference"]
    assert min(largest(plain)[site] for site in ("attn_out", "mlp_out")) > 1e-2


def test_exactly_the_writers_are_edited_every_expert_among_them(case):
    cfg, names = load_config(case.source), set(case.report["edited_tensors"])
    wanted = {"embed", "blocks.o", "blocks.down"} | ({"blocks.o_bias"} if cfg.o_bias else set())
    wanted |= {"blocks.down_bias"} if cfg.mlp_bias or cfg.expert_bias else set()
    wanted |= {"blocks.shared_down"} if cfg.d_shared else set()
    wanted |= {"blocks.expert_down"} if cfg.d_beside else set()
    wanted |= {"blocks.per_layer_out"} if cfg.d_per_layer else set()
    wanted |= {"blocks.full_o"} if "blocks.full_o" in weight_table(cfg) else set()
    wanted |= {"blocks.dense_down"} if cfg.dense_layers else set()
    wanted |= {path for path in weight_table(cfg) if path.endswith(("_o", "_o_bias"))}  # of other mixers than attention
    assert names == {name for path in wanted for name in hf_names(cfg, path)}
    one = case.family.startswith(("granitemoe", "gpt_oss", "llama4", "qwen3_5_moe"))  # tensor of all experts
    experts = 1 if one else cfg.n_experts
    blocks = cfg.n_layers if cfg.without_mlp else 2 * cfg.n_layers  # where a layer is one block, one matrix writes
    assert len(names) >= 1 + blocks + len(cfg.sparse_layers) * (experts + bool(cfg.d_shared) - 1)
    untied = {TABLES[case.family]["unembed"]} if cfg.tied_embeddings else set()
    assert differences(case.source, case.target) == names | untied
    assert set(case.report["kinds"]) == ({"orthogonal", "oblique"} if case.family in POST_NORM else {"orthogonal"})
    tensors = tensors_of(case.target)
    for name, edit in Plan.of(Checkpoint.open(case.source), edit_of()).edits.items():
        rows = tensors[name] if edit.by_rows else np.swapaxes(tensors[name], -1, -2)
        assert part(rows, edit.right_dj[:, 0] / np.linalg.norm(edit.right_dj)) < 1e-5, name


def test_the_reference_is_ablation_and_addition_as_studies_do_them(llama, model):
    checkpoint, sample = Checkpoint.open(llama), sample_of(llama)
    batch, count = sample.batch(), len(sample.prompts)
    last = model.config.n_layers - 1
    for settings, edits in (
        ({}, Edits.ablate(DIRECTION)),
        ({"kind": "add", "layers": [last], "scale": -2.0}, Edits.add(DIRECTION, last, scale=-2.0)),
    ):
        ours = our_logits(Stream(checkpoint, edit_of(**settings).edits(checkpoint.cfg)), sample)
        theirs = np.asarray(model.logits(batch.tokens, batch.mask, edits))[:count]
        np.testing.assert_allclose(ours, theirs, atol=2e-4)


@pytest.mark.parametrize("kind", ["orthogonal", "oblique", "projected"])
@pytest.mark.parametrize("rank", [1, 3])
def test_the_three_kinds_of_edit(kind, rank):
    rng = np.random.default_rng(1)
    basis = np.linalg.qr(rng.normal(size=(32, rank)))[0].T
    scale = None if kind == "orthogonal" else rng.normal(1, 0.15, 32)
    if kind == "projected":
        scale[4] = 1e-9
    down, bias = (tensor_edits.projection(path, basis, scale) for path in ("blocks.down", "blocks.down_bias"))
    assert down.kind == bias.kind == kind and not down.by_rows and bias.by_rows
    assert (down.amplification == pytest.approx(1)) != (kind == "oblique") and down.amplification <= MOST_AMPLIFICATION
    w, b, x = rng.normal(size=(32, 48)), rng.normal(size=32), rng.normal(size=(48, 5))
    norm = np.ones(32) if scale is None else scale
    before, after = norm * (w @ x).T + norm * b, norm * (down(w) @ x).T + norm * bias(b)
    assert np.abs(after @ basis.T).max() < 1e-5
    ablated = before - before @ basis.T @ basis
    assert np.allclose(after, ablated, atol=1e-4) == (kind != "projected")
    np.testing.assert_allclose(down(np.stack([w, 2 * w]))[1], down(2 * w))  # axes may lead
    half = tensor_edits.projection("blocks.down", basis, scale, 0.5)
    np.testing.assert_allclose(half(w), (w + down(w)) / 2, atol=1e-5)
    blocks = dict(down.blocks(lambda: ((i, w[i : i + 7].astype(np.float32)) for i in range(0, 32, 7))))
    np.testing.assert_allclose(np.concatenate(list(blocks.values())), down(w), atol=1e-5)


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
    report = exported(muted, tmp_path / "out")
    kinds = report["edited_tensors"]
    assert (
        kinds["model.layers.1.self_attn.o_proj.weight"] == kinds["model.layers.2.mlp.down_proj.weight"] == "projected"
    )
    assert kinds["model.layers.1.mlp.down_proj.weight"] == kinds["model.layers.2.self_attn.o_proj.weight"] == "oblique"
    assert "model.layers.0.mlp.down_proj.weight" not in kinds
    assert 1 < report["largest_amplification"] <= MOST_AMPLIFICATION
    assert report["verification"]["problems"] == []
    transformers_agrees(tmp_path / "out")


def test_a_part_of_the_direction_in_some_layers_at_some_sites(tmp_path, llama):
    report = exported(llama, tmp_path / "out", layers=[1, 2], sites=("mlp_out",), scale=0.5)
    assert set(report["edited_tensors"]) == {f"model.layers.{i}.mlp.down_proj.weight" for i in (1, 2)}
    name = "model.layers.1.mlp.down_proj.weight"
    old, new = (tensors_of(folder)[name] for folder in (llama, tmp_path / "out"))
    np.testing.assert_allclose(UNIT @ new, UNIT @ old / 2, atol=1e-6)
    found = report["verification"]
    assert found["problems"] == [] and found["export"]["max_logit_difference"] < 1e-3
    assert report["edit"] == {"kind": "ablate", "scale": 0.5, "layers": [1, 2], "sites": ["mlp_out"]}
    card = (tmp_path / "out" / "README.md").read_text()
    assert "mlp_out, in layer 1 to 2, by 0.5 of it. 2 tensors are edited (2 orthogonal)" in card


@pytest.mark.parametrize("family", ["llama", "olmo2"])
def test_a_subspace_of_directions(tmp_path, family):
    source = families.tiny_model(tmp_path / "source", family)
    rows = np.random.default_rng(5).normal(size=(3, 32)) * [[1], [100], [0.01]]
    report = exported(source, tmp_path / "out", rows)
    found = report["verification"]
    assert report["direction"]["count"] == 3 and found["problems"] == []
    assert max(largest(found["export"]).values()) < 1e-4 < 1e-1 < min(largest(found["original"]).values())
    if family == "llama":
        assert found["export"]["max_logit_difference"] < 1e-3
        embed = tensors_of(tmp_path / "out")["model.embed_tokens.weight"]
        assert np.abs(embed @ rows.T).max() < 1e-3


BIASED = {
    "llama": {"mlp_bias": False},
    "granite": {"mlp_bias": True, "residual_multiplier": 0.6},
    "qwen": {"no_bias": True},
    "gpt_oss": {"num_experts_per_tok": 3},  # whose weights sum to 1, and so does what all their biases gain
}


@pytest.mark.parametrize("family", BIASED)
def test_an_addition_is_a_bias_of_the_block_before(tmp_path, family):
    source = families.tiny_model(tmp_path / "source", family, "gqa" if family != "qwen" else "mha", **BIASED[family])
    if family == "llama":
        tensors = load_file(source / SINGLE)
        files = {"a.safetensors": {n: t for n, t in tensors.items() if "layers.1" in n}}
        files["b.safetensors"] = {n: t for n, t in tensors.items() if "layers.1" not in n}
        write_shards(source, files)
    report = exported(source, tmp_path / "out", kind="add", layers=[2], scale=-1.5)
    name = TABLES[family]["blocks.down_bias"].format(l=1)
    found = report["verification"]
    assert report["edited_tensors"] == {name: "addition"} and found["problems"] == []
    assert found["export"]["max_logit_difference"] < 1e-3 < 0.1 < found["original"]["max_logit_difference"]
    cfg = load_config(tmp_path / "out")
    before = load_config(source)
    assert cfg.mlp_bias or cfg.expert_bias
    assert (before.mlp_bias or before.expert_bias) == (family in ("granite", "gpt_oss"))
    new = differences(source, tmp_path / "out") - {name}
    assert all(not tensors_of(tmp_path / "out")[other].any() for other in new) and bool(new) == (
        family not in ("granite", "gpt_oss")
    )
    assert report["added_bytes"] == sum(tensors_of(tmp_path / "out")[n].nbytes for n in new | {name}) * bool(new)
    TensorFiles.open(tmp_path / "out")  # the index tells the truth
    transformers_agrees(tmp_path / "out")


def test_additions_that_weights_cannot_hold(tmp_path, llama):
    gemma = families.tiny_model(tmp_path / "gemma", "gemma")
    with pytest.raises(UserError, match="MLP of a gemma model has no bias.*Use format=gguf, a control vector"):
        exported(gemma, tmp_path / "out", kind="add", layers=[2])
    with pytest.raises(UserError, match="No block comes before layer 0 .* from 1 to 2"):
        exported(llama, tmp_path / "out", kind="add", layers=[0])


def write_shards(source, files: dict[str, dict]) -> None:
    """Stores a checkpoint's tensors in these files, with an index."""
    (source / SINGLE).unlink(missing_ok=True)
    size = sum(t.nbytes for tensors in files.values() for t in tensors.values())
    index = {
        "metadata": {"total_size": size, "total_parameters": size // 4, "more": "kept"},
        "weight_map": {name: file for file, tensors in files.items() for name in tensors},
    }
    (source / INDEX).write_text(json.dumps(index))
    for file, tensors in files.items():
        save_file(tensors, source / file, {"format": "pt"})


@pytest.fixture(scope="module")
def tied_source(tmp_path_factory):
    return tiny.tiny_llama(tmp_path_factory.mktemp("tied") / "source", tied=True)


@pytest.mark.parametrize("storage", ["single", "sharded", "spare"])
@pytest.mark.parametrize("tied", TIED)
def test_tied_embeddings(tied_source, tmp_path, tied, storage):
    """In one file, in several, or with an unembedding in a file of its own all the same."""
    source, target = pathlib.Path(shutil.copytree(tied_source, tmp_path / "source")), tmp_path / "out"
    if storage != "single":
        tensors = load_file(source / SINGLE)
        files = {"model-1.safetensors": tensors, "model-2.safetensors": {}}
        for name in list(tensors):
            if name == "model.embed_tokens.weight" or "layers.1" in name:
                files["model-2.safetensors"][name] = tensors.pop(name)
        if storage == "spare":
            embed = files["model-2.safetensors"]["model.embed_tokens.weight"]
            files["model-3.safetensors"] = {"lm_head.weight": embed.copy()}
        write_shards(source, files)
    report = exported(source, target, tied=tied)
    before, after = tensors_of(source), tensors_of(target)
    embed, head, spare = "model.embed_tokens.weight", "lm_head.weight", "lm_head.weight" in before
    edited = set(report["edited_tensors"])
    assert report["tied"] == tied and (embed in edited) == (tied != "skip")
    assert differences(source, target) - {head} == edited - {head}
    more = {p.name for p in target.iterdir()} - {p.name for p in source.iterdir()}
    assert more == {"README.md", "export.json", "refusal_jax.json"}
    if tied == "untie":
        assert after[head].dtype == np.float32 and after[head].tobytes() == before[embed].tobytes()
    elif tied == "keep" and spare:
        assert after[head].tobytes() == after[embed].tobytes() != before[embed].tobytes()
    else:
        assert (head in after) == spare and head not in differences(source, target)
    sizes = [sum(t.nbytes for t in tensors.values()) for tensors in (before, after)]
    assert report["added_bytes"] == sizes[1] - sizes[0] and (spare or (sizes[1] > sizes[0]) == (tied == "untie"))
    unchanged = tied != "untie"
    assert ((source / "config.json").read_bytes() == (target / "config.json").read_bytes()) == unchanged
    assert load_config(target).tied_embeddings == unchanged
    if (source / INDEX).exists():
        index, old = (json.loads((folder / INDEX).read_text()) for folder in (target, source))
        assert index["metadata"]["total_size"] - old["metadata"]["total_size"] == report["added_bytes"]
        parameters = index["metadata"]["total_parameters"] - old["metadata"]["total_parameters"]
        assert parameters == report["added_bytes"] // 4 and index["metadata"]["more"] == "kept"
        assert list(old["weight_map"]) == list(index["weight_map"])[: len(old["weight_map"])]
    TensorFiles.open(target)  # the index tells the truth
    found = report["verification"]
    assert found["problems"] == []
    assert (found["export"]["max_logit_difference"] < 1e-3) == (tied == "untie")
    assert (max(largest(found["export"]).values()) < 1e-4) == (tied != "skip")
    costs = found["tied"]
    assert costs["untie"]["added_bytes"] == (0 if spare else before[embed].nbytes)
    assert costs["keep"]["added_bytes"] == costs["skip"]["added_bytes"] == 0
    assert costs[tied]["max_logit_difference"] == found["export"]["max_logit_difference"]
    assert costs["untie"]["max_logit_difference"] < 1e-3 < min(costs[o]["mean_kl"] for o in ("keep", "skip"))
    if storage == "sharded":
        transformers_agrees(target)


def test_what_other_choices_for_tied_embeddings_cost_is_what_they_do_cost(tied_source, tmp_path):
    reports = {tied: exported(tied_source, tmp_path / tied, tied=tied)["verification"] for tied in TIED}
    for tied in TIED:
        for other in TIED:
            told, found = reports[tied]["tied"][other]["mean_kl"], reports[other]["export"]["mean_kl"]
            assert told == pytest.approx(found, rel=1e-3, abs=1e-7), (tied, other)
    with pytest.raises(UserError, match="Nothing is left to edit: at these sites"):
        exported(tied_source, tmp_path / "out", tied="skip", sites=("embed",))
    with pytest.raises(ValueError, match="tied must be one of untie, keep, skip, not 'cut'"):
        exported(tied_source, tmp_path / "out", tied="cut")


def test_a_mixture_of_dtypes_is_kept(tmp_path):
    source = tiny.tiny_llama(tmp_path / "source", tied=True)
    kinds = {"mlp": ml_dtypes.bfloat16, "o_proj": np.float16, "q_proj": np.float16, "embed": ml_dtypes.bfloat16}
    tensors = {
        name: tensor.astype(next((d for piece, d in kinds.items() if piece in name), np.float32))
        for name, tensor in load_file(source / SINGLE).items()
    }
    save_file(tensors, source / SINGLE, {"format": "pt", "note": "kept"})
    report = exported(source, tmp_path / "out")
    after = tensors_of(tmp_path / "out")
    assert {name: t.dtype for name, t in after.items() if name in tensors} == {n: t.dtype for n, t in tensors.items()}
    assert after["lm_head.weight"].dtype == ml_dtypes.bfloat16
    assert read_header(LocalFile(tmp_path / "out" / SINGLE)).metadata == {"format": "pt", "note": "kept"}
    found = report["verification"]
    assert found["problems"] == [] and found["export"]["mean_kl"] < 1e-3
    transformers_agrees(tmp_path / "out")


def test_bfloat16_stays_near_ablation(tmp_path):
    source = tiny.tiny_llama(tmp_path / "source", dtype="bfloat16")
    found = exported(source, tmp_path / "out")["verification"]
    assert found["problems"] == [] and found["export"]["mean_kl"] < 1e-3 < 1e-2 < found["original"]["mean_kl"]


def test_a_fused_writer_is_refused(llama, monkeypatch):
    monkeypatch.setitem(TABLES["llama"], "blocks.o", TABLES["llama"]["blocks.q"])
    checkpoint = Checkpoint(llama, load_config(llama), {}, {})
    with pytest.raises(ValueError, match="q_proj.weight holds blocks.o fused with other weights"):
        tensor_edits.tensor_edits(checkpoint, edit_of(sites=("attn_out",)))
