"""Llama 4 as transformers runs it, without the mending of `families.without_padding`, and what its configs say in other ways."""

import families
import numpy as np
import pytest
import torch
from real_models import REAL_MODELS
from transformers import AutoModelForCausalLM

from refusal_jax import Edits, UserError
from refusal_jax.checkpoints.load import load_decoder
from refusal_jax.models.hf_config import from_hf
from refusal_jax.models.predict import predict
from refusal_jax.taps import NO_TAPS

SCOUT, DENSE = (REAL_MODELS[name].config for name in ("Llama-4-Scout-17B-16E-Instruct", "MobileLLM-R1-950M"))


def scout(**changes):
    return from_hf(SCOUT | {"text_config": SCOUT["text_config"] | changes})


@pytest.mark.parametrize("variant", ["mqa", "dense"])
def test_rows_without_padding_are_as_transformers_has_them(variant, tmp_path):
    """Queries that grow, chunks that end, and greedy decoding over their ends."""
    folder = families.tiny_model(tmp_path, "llama4_text", variant)
    ours, theirs = load_decoder(folder), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = np.random.default_rng(0).integers(5, ours.cfg.vocab_size, (2, 11), dtype=np.int32)
    with torch.no_grad():
        reply = theirs.generate(
            torch.tensor(tokens),
            attention_mask=torch.ones(tokens.shape),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=[],
        )
        logits = theirs(reply).logits.numpy()
    edits = Edits.none(ours.cfg.d_model).for_batch(2, ours.cfg.n_layers, ours.cfg.d_model)
    whole = np.asarray(reply, np.int32)
    found = predict(ours, whole, np.ones(whole.shape, bool), edits, taps=NO_TAPS, last=False).logits
    np.testing.assert_allclose(found, logits, rtol=1e-4, atol=1e-4)
    assert (np.argmax(found, axis=-1)[:, 10:-1] == whole[:, 11:]).all()


def test_where_it_has_ropes_chunks_and_experts():
    cfg = scout()
    ropeless = [layer for layer in range(48) if cfg.kinds[cfg.layer_kinds[layer]].rope.kind == "none"]
    assert ropeless == list(range(3, 48, 4)) and not cfg.dense_layers and cfg.context_length == 10485760
    roped, still = cfg.kinds
    assert (roped.chunk, still.chunk, roped.unit_eps, still.unit_eps) == (8192, None, 1e-5, None)
    assert (roped.rope.query_growth, still.rope.query_growth, still.rope.original_context) == (0.0, 0.1, 8192)
    positions = np.array([[0, 8190, 8191, 24575]])
    np.testing.assert_allclose(still.rope.query_scales(positions)[0], 1 + 0.1 * np.log([1, 1, 2, 4]), rtol=1e-6)
    assert scout(interleave_moe_layer_step=2).dense_layers == tuple(range(0, 48, 2))
    assert len(from_hf(DENSE).dense_layers) == 22 and from_hf(DENSE).d_dense == 6144


def test_other_ways_of_saying_it():
    """The first files have a number for whether queries grow; growth by nothing is none, and chunks need a size."""
    assert scout(attn_temperature_tuning=4) == scout(no_rope_layers=None) == scout()
    assert scout(attn_scale=0) == scout(attn_temperature_tuning=0) != scout()
    assert {kind.chunk for kind in scout(attention_chunk_size=None).kinds} == {None}
    with pytest.raises(
        UserError, match="attention_chunk_size is null, but there are layers of type 'chunked_attention'"
    ):
        scout(attention_chunk_size=None, layer_types=["chunked_attention"] * 48)
    with pytest.raises(UserError, match="num_experts_per_tok = 3 is more than the 2 experts"):
        scout(num_local_experts=2, num_experts_per_tok=3)
