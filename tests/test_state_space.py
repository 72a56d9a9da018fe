"""State-space layers: both forms against the recurrence as it is defined and against transformers' functions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.models.falcon_h1.modeling_falcon_h1 import FalconH1RMSNormGated
from transformers.models.granitemoehybrid import modeling_granitemoehybrid as theirs

from refusal_jax.models.mixers.state_space import CHUNK, chunked, gated_norm, recurrent, time_steps

HEADS, HEAD_DIM, STATE = 6, 5, 7
FORWARD = jax.jit(chunked)


def inputs(tokens: int, groups: int, seed: int = 0):
    """Random x, dt before its softplus, rate, B, C and state."""
    rng = np.random.default_rng(seed)
    shapes = (2, tokens, HEADS, HEAD_DIM), (2, tokens, HEADS), (2, tokens, groups, STATE), (2, tokens, groups, STATE)
    x, dt, b, c = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    rate = np.exp(rng.normal(size=HEADS)).astype(np.float32)
    return x, 2 * dt, rate, b, c, rng.normal(size=(2, HEADS, HEAD_DIM, STATE)).astype(np.float32)


def defined(x, dt, rate, b, c, state):
    """The recurrence, token by token in float64."""
    outputs, state = [], state.astype(np.float64)
    b, c = (np.repeat(a, HEADS // a.shape[2], axis=2).astype(np.float64) for a in (b, c))
    for at in range(x.shape[1]):
        step = dt[:, at].astype(np.float64)
        state = np.exp(-step * rate)[..., None, None] * state
        state = state + np.einsum("bnh,bnz->bnhz", step[..., None] * x[:, at], b[:, at])
        outputs.append(np.einsum("bnhz,bnz->bnh", state, c[:, at]))
    return np.stack(outputs, axis=1), state


def close(ours, expected, tolerance=1e-4):
    np.testing.assert_allclose(np.asarray(ours), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("tokens", [2, CHUNK, CHUNK + 1, 3 * CHUNK - 5])
@pytest.mark.parametrize("groups", [1, 3])
def test_chunks_are_the_recurrence(tokens, groups):
    x, dt, rate, b, c, state = inputs(tokens, groups)
    mask = np.random.default_rng(1).random((2, tokens)) < 0.8
    dt = np.asarray(time_steps(dt, np.zeros(HEADS), (0.0, np.inf), mask))
    assert (dt[~mask] == 0).all() and (dt[mask] > 0).all()
    for ours, expected in zip(FORWARD(x, dt, rate, b, c, state), defined(x, dt, rate, b, c, state), strict=True):
        assert ours.dtype == jnp.float32 and np.std(expected) > 0.3
        close(ours, expected)


def test_slow_decay_after_a_fast_one():
    """Sums of logarithms are large after the first tokens, and what is lost then shows in the decays of the others."""
    x, _, _, b, c, state = inputs(CHUNK, 1)
    dt, rate = np.full((2, CHUNK, HEADS), 1e-3, np.float32), np.full(HEADS, 80.0, np.float32)
    dt[:, : CHUNK // 2] = 5e3
    x[:, : CHUNK // 2] *= 1e-4
    expected, _ = defined(x, dt, rate, b, c, state)
    ours = np.asarray(FORWARD(x, dt, rate, b, c, state)[0])
    assert np.abs(ours - expected).max() < 2e-6 * np.abs(expected).max()


@pytest.mark.parametrize("groups", [1, 2])
def test_one_token_at_a_time(groups):
    x, dt, rate, b, c, state = inputs(9, groups)
    dt = np.log1p(np.exp(dt))
    whole, last = FORWARD(x, dt, rate, b, c, state)
    step = jax.jit(recurrent)
    for at in range(9):
        y, state = step(*(a[:, at : at + 1] for a in (x, dt)), rate, *(a[:, at : at + 1] for a in (b, c)), state)
        close(y[:, 0], whole[:, at])
    close(state, last)


@pytest.mark.parametrize("limits", [(0.0, np.inf), (0.5, 1.5)])
def test_chunks_are_those_of_transformers(limits):
    x, dt, rate, b, c, state = inputs(CHUNK + 9, 2)
    bias, skip = np.random.default_rng(2).normal(size=(2, HEADS)).astype(np.float32)
    tensors = [torch.tensor(a) for a in (x, dt, -rate, b, c)]
    more = {"dt_bias": torch.tensor(bias), "dt_softplus": True, "dt_limit": limits, "D": torch.tensor(skip)}
    expected, last = theirs.mamba2_chunk_scan(
        *tensors, chunk_size=8, initial_states=torch.tensor(state), return_final_states=True, **more
    )
    steps = time_steps(dt, bias, limits, np.ones(dt.shape[:2], bool))
    y, end = FORWARD(x, steps, rate, b, c, state)
    close(y + skip[:, None] * x, expected.numpy())
    close(end, last.numpy())


def test_a_token_is_that_of_transformers():
    x, dt, rate, b, c, state = inputs(1, 3)
    bias = np.random.default_rng(2).normal(size=HEADS).astype(np.float32)
    wide = torch.tensor(dt[:, 0])[..., None].expand(-1, -1, HEAD_DIM)
    more = {"dt_bias": torch.tensor(bias)[:, None].expand(-1, HEAD_DIM), "dt_softplus": True}
    rates = -torch.tensor(rate)[:, None, None].expand(-1, HEAD_DIM, STATE)
    last = torch.tensor(state)
    expected = theirs.mamba2_selective_state_update(
        last, torch.tensor(x[:, 0]), wide, rates, torch.tensor(b[:, 0]), torch.tensor(c[:, 0]), **more
    )
    y, end = recurrent(x, time_steps(dt, bias, (0.0, np.inf), np.ones((2, 1), bool)), rate, b, c, state)
    close(y[:, 0], expected.numpy())
    close(end, last.numpy())


@pytest.mark.parametrize("groups", [1, 4])
def test_norms_are_those_of_transformers(groups):
    y, z = jnp.asarray(np.random.default_rng(0).normal(size=(2, 2, 3, 24)), jnp.float32)
    scale = np.random.default_rng(1).normal(size=24).astype(np.float32)
    modules = {
        "gated": theirs.GraniteMoeHybridRMSNormGated(24, 24 // groups, 0.1),
        "before": FalconH1RMSNormGated(24, 0.1, groups, norm_before_gate=True),
    }
    found = []
    for kind, module in modules.items():
        with torch.no_grad():
            module.weight.copy_(torch.tensor(scale))
            expected = module(*(torch.tensor(np.asarray(a)) for a in (y, z))).numpy()
        found.append(np.asarray(gated_norm(y, z, scale, groups, 0.1, kind)))
        close(found[-1], expected)
    assert np.abs(found[0] - found[1]).max() > 0.1
    close(gated_norm(y, z, None, groups, 0.1, ""), y * z / (1 + jnp.exp(-z)))
