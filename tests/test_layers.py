"""Routing to experts, against every token computed by every expert."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from test_config import ON, SMALL, read

from refusal_jax.models.layers import ACTIVATE, experts, route

# tokens, experts, experts a token, how much the router prefers the first experts
CASES = {
    "usual": (50, 6, 2, 0),
    "one-token": (1, 6, 2, 0),
    "one-expert": (9, 1, 1, 0),
    "all-experts": (7, 4, 4, 0),
    "more-experts-than-pairs": (3, 40, 2, 0),
    "all-to-one": (300, 8, 1, 1e3),
    "all-to-two": (200, 5, 2, 1e3),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("renormalise", [False, True])
def test_experts(case, renormalise):
    tokens, count, chosen, preference = CASES[case]
    cfg = dataclasses.replace(
        read("mixtral", SMALL | ON), n_experts=count, experts_per_token=chosen, renormalise_experts=renormalise
    )
    rng, d, f, layers = np.random.default_rng(0), cfg.d_model, cfg.d_mlp, 3
    router = rng.normal(size=(count, d)).astype(np.float32)
    h = rng.normal(size=(tokens, d)).astype(np.float32)
    if preference:
        h[:, 0], router[:, 0] = 1, 0
        router[:chosen, 0] = preference
    shapes = {"gate": (f, d), "up": (f, d), "down": (d, f)}
    stack = {name: rng.normal(size=(layers, count, *shapes[name])).astype(np.float32) * 0.3 for name in shapes}

    def dense(expert):
        gate, up, down = (stack[name][1, expert] for name in shapes)
        return (np.asarray(ACTIVATE[cfg.activation](h @ gate.T)) * (h @ up.T)) @ down.T

    own = {"router": router}
    picked, weights = (np.asarray(a) for a in route(cfg, own.get, h))
    share = np.zeros((tokens, count), np.float32)
    np.put_along_axis(share, picked, weights, axis=1)
    if preference:
        assert set(picked.ravel()) == set(range(chosen))
    assert not renormalise or np.allclose(share.sum(1), 1)
    expected = sum(share[:, [expert]] * dense(expert) for expert in range(count))
    ours = jax.jit(lambda stack, layer, h: experts(cfg, stack.get, layer, h, *route(cfg, own.get, h)))(stack, 1, h)
    np.testing.assert_allclose(np.asarray(ours), expected, rtol=1e-4, atol=1e-4)


def test_no_product_of_every_token_with_every_expert():
    cfg = dataclasses.replace(read("mixtral", SMALL | ON), n_experts=64, experts_per_token=2)
    d, f, tokens = cfg.d_model, cfg.d_mlp, 512
    shapes = {"gate": (2, 64, f, d), "up": (2, 64, f, d), "down": (2, 64, d, f)}
    shapes = {name: jax.ShapeDtypeStruct(shape, "float32") for name, shape in shapes.items()}
    router, h = (jax.ShapeDtypeStruct(shape, "float32") for shape in ((64, d), (tokens, d)))
    run = jax.jit(lambda router, stack, h: experts(cfg, stack.get, 0, h, *route(cfg, {"router": router}.get, h)))
    program = run.lower(router, shapes, h).compile()
    blocks = tokens * 2 // 32 + 64  # as many rows as pairs, and at most one block a expert that is not full
    assert program.memory_analysis().temp_size_in_bytes < 3 * blocks * 32 * d * 4 < tokens * 64 * d * 4


@pytest.mark.parametrize("offset,logits", [(0.0, 0.0), (6.9, 0.0), (11.3, -60.0), (34.5, -200.0)])
def test_a_corrected_choice_in_bfloat16_is_that_of_transformers(offset, logits):
    """Published corrections are alike but for small differences, which bfloat16 does not hold, and with which scores near zero
    vanish. Between experts that are equal then, either choice is as good."""
    from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeConfig, Glm4MoeTopkRouter

    sizes = {"n_routed_experts": 16, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 3, "hidden_size": 16}
    cfg = read("glm4_moe", SMALL | ON | sizes | {"norm_topk_prob": True})
    generator = torch.Generator().manual_seed(0)
    theirs = Glm4MoeTopkRouter(Glm4MoeConfig(**sizes, routed_scaling_factor=cfg.routed_scale))
    with torch.no_grad():
        theirs.weight.copy_(torch.randn(16, 16, generator=generator).bfloat16())
        theirs.weight[:, 0] = logits
        theirs.e_score_correction_bias.copy_(offset + 0.1 * torch.randn(16, generator=generator))
        h = torch.randn(200, 16, generator=generator).bfloat16()
        h[:, 0] = 1
        _, weights, chosen = theirs(h)
    own = {"router": theirs.weight.detach().numpy(), "router_correction": theirs.e_score_correction_bias.numpy()}
    ours = route(cfg, lambda name: jnp.asarray(own.get(name)), jnp.asarray(h.float().numpy(), jnp.bfloat16))
    picked, shares = (np.asarray(a) for a in ours)
    order, other = np.argsort(picked), np.argsort(chosen.numpy())
    np.testing.assert_array_equal(np.take_along_axis(picked, order, 1), np.take_along_axis(chosen.numpy(), other, 1))
    ours, theirs = np.take_along_axis(shares, order, 1), np.take_along_axis(weights.numpy(), other, 1)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)
    assert np.isfinite(shares).all()
