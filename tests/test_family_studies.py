"""What needs more than a forward pass, on families that differ in kind: the whole study, and sharding over a mesh."""

import json

import families
import jax
import numpy as np
import pytest
import tiny
from test_qwen_tokenizer import write_ranks

from refusal_jax import Edits, Taps, make_mesh
from refusal_jax.checkpoints.load import load_decoder
from refusal_jax.models.predict import predict
from refusal_jax.models.sharding import batch_sharding
from refusal_jax.study.config import get_config
from refusal_jax.study.study import run_study


@pytest.mark.parametrize(
    "family,variant",
    [
        ("qwen", "mha"),
        ("gemma4", "gqa"),
        ("lfm2", "biased"),
        ("qwen3_5_moe", "gqa"),
    ],
)
def test_the_whole_study_runs(family, variant, tmp_path):
    """A random model has no direction to find; what is checked is that every stage runs and leaves its results."""
    more = {"vocab_size": 600} if family == "qwen" else {}  # its own tokenizer's special tokens are many
    model = families.tiny_model(tmp_path / "model", family, variant, **more)
    if family == "qwen":
        for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json"):
            (model / file).unlink(missing_ok=True)
        write_ranks(model)
    config = get_config()
    config.model, config.filter, config.refusal_tokens = str(model), False, ("I",)
    config.data.n_train = config.data.n_val = config.batch_size = 6
    config.data.n_test = config.generation.batch_size = 3
    config.select.kl_threshold, config.select.induce_threshold = 1e9, -1e9
    config.generation.max_new_tokens = 5
    run = run_study(config, tmp_path / "run")
    setup, picked = run.read_json("setup.json"), run.read_json("direction_metadata.json")
    assert setup["n_layers"] == load_decoder(model).cfg.n_layers > picked["layer"]
    origin = {"qwen": "built in: chatml"}.get(family, "tokenizer")
    assert setup["chat_template"] == origin and setup["refusal_tokens_from"] == "config"
    replies = json.loads((run.folder / "completions/harmless_actadd_completions.json").read_text())
    assert len(replies) == 3 and run.path("report.html").exists()


# Families with few key/value heads, experts that do not divide, what is shared or a state, over more ways than they have heads.
WIDE = {"gemma3", "glm4_moe", "gpt_oss", "deepseek_v3", "qwen3_next"}


@pytest.mark.parametrize(
    "family,variant",
    [
        ("phi3", "longrope"),
        ("gemma3", "gqa"),
        ("gemma4_text", "gqa"),
        ("gemma4_text", "experts"),
        ("glm4", "mqa"),
        ("olmoe", "clipped"),
        ("gpt_oss", "gqa"),
        ("cohere", "normed"),
        ("qwen2_moe", "alternating"),
        ("glm4_moe", "gqa"),
        ("granitemoe", "scaled"),
        ("deepseek_v2", "greedy"),
        ("deepseek_v3", "grouped"),
        ("llama4_text", "two"),
        ("lfm2", "biased"),
        ("lfm2_moe", "gqa"),
        ("qwen3_next", "alternating"),
        ("qwen3_5_text", "gqa"),
    ],
)
def test_a_mesh_changes_nothing(family, variant, tmp_path):
    """Fused tensors are cut across their parts, experts along their width, and what does not divide is replicated, of
    experts or of what all tokens go through beside them."""
    folder = families.tiny_model(tmp_path, family, variant)
    outputs, wide = [], [make_mesh(data=1, fsdp=1, model=8)] * (family in WIDE)
    for mesh in (None, make_mesh(data=2, fsdp=2, model=2), *wide):
        decoder = load_decoder(folder, mesh=mesh)
        tokens, mask = tiny.left_padded((3, 20, 11, 1), decoder.cfg.vocab_size)
        direction = np.random.default_rng(0).normal(size=decoder.cfg.d_model)
        edits = Edits.ablate(direction).for_batch(4, decoder.cfg.n_layers, decoder.cfg.d_model)
        batch = jax.device_put((tokens, mask, edits), batch_sharding(mesh, 4))
        out = predict(decoder, *batch, taps=Taps(("mlp_out",), 3), last=True)
        outputs.append((np.asarray(out.logits), np.asarray(out.taps["mlp_out"])))
    for other in outputs[1:]:
        for a, b in zip(outputs[0], other, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
