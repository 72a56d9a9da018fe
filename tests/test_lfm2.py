"""LFM2 against transformers where tiny random models do not reach: small router scores, and what configs say in other ways."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from real_models import REAL_MODELS
from transformers import Lfm2MoeConfig
from transformers.models.lfm2_moe.modeling_lfm2_moe import Lfm2MoeTopKRouter

from refusal_jax.models.hf_config import from_hf
from refusal_jax.models.layers import route

FIRST, LATER = (REAL_MODELS[name].config for name in ("LFM2-350M", "LFM2.5-1.2B-Instruct"))
SIZES = {"hidden_size": 16, "num_experts": 6, "num_experts_per_tok": 2, "num_hidden_layers": 1, "layer_types": ["conv"]}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 8, "routed_scaling_factor": 1.3}


@pytest.mark.parametrize("offset", [0.0, -12.0, -40.0, -120.0])
def test_small_scores_are_weighed_as_transformers_does(offset):
    """It adds 1e-6 to the sum that weights are divided by: near that sum experts add less, and far below it nothing."""
    rng = np.random.default_rng(0)
    weight, bias = rng.normal(size=(6, 16)).astype(np.float32), rng.normal(size=6).astype(np.float32)
    h = np.concatenate([rng.normal(size=(5, 15)), np.ones((5, 1))], axis=1).astype(np.float32)
    weight[:, -1] = offset
    theirs = Lfm2MoeTopKRouter(Lfm2MoeConfig(**SIZES))
    with torch.no_grad():
        theirs.weight.copy_(torch.tensor(weight))
        _, weights, chosen = theirs(torch.tensor(h), torch.tensor(bias))
    ours = {"router": jnp.asarray(weight), "router_correction": jnp.asarray(bias)}
    found, shares = route(from_hf(SIZES | {"model_type": "lfm2_moe"}), ours.get, jnp.asarray(h))
    assert np.array_equal(found, chosen)
    np.testing.assert_allclose(shares, weights, rtol=1e-4, atol=1e-7)


def test_other_ways_of_saying_it():
    """Older names count more than newer ones, and a list of kinds more than one of layers, as in transformers."""
    cfg, ignored = from_hf(FIRST), {"intermediate_size": 99, "tie_word_embeddings": False}
    assert (cfg.d_mlp, cfg.tied_embeddings, from_hf(LATER).d_mlp) == (4608, True, 8192)
    assert from_hf(FIRST | ignored | {"tie_embedding": True}) == cfg
    assert not from_hf(FIRST | {"tie_embedding": False}).tied_embeddings
    attending = [layer for layer in range(16) if cfg.mixers[cfg.layer_mixers[layer]].has_heads]
    assert attending == FIRST["full_attn_idxs"] and from_hf(LATER | {"full_attn_idxs": [0]}) == from_hf(LATER)
    assert len(from_hf(FIRST | {"full_attn_idxs": None}).mixers) == 1
