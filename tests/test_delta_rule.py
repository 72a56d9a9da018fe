"""The gated delta rule against transformers' two forms of it, and its two forms here against each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.models.qwen3_next import modeling_qwen3_next as theirs

from refusal_jax.models.mixers import delta

chunked = jax.jit(delta.chunked)
TOKENS = ("q_btkh", "k_btkh", "v_btkgi", "decay_btkg", "beta_btkg")
SHAPE = {"b": 2, "k": 2, "g": 3, "h": 16, "i": 8}


def inputs(tokens: int, alike: float = 0.0, slow: float = 1.0, spread: float = 1.0, **shape) -> dict[str, np.ndarray]:
    """Random arguments of `delta.chunked`. alike: how large a part of all keys and queries is the same. slow: scales decays.
    spread: how much they differ."""
    s, rng = SHAPE | shape, np.random.default_rng(tokens)
    b, k, g, h, i = s.values()

    def normal(*axes):
        return rng.normal(size=axes).astype(np.float32)

    q, keys = (np.asarray(delta.unit(normal(b, tokens, k, h) + alike * normal(h))) for _ in range(2))
    return {
        "q_btkh": q * h**-0.5,
        "k_btkh": keys,
        "v_btkgi": normal(b, tokens, k, g, i),
        "decay_btkg": -slow * np.exp(spread * normal(b, tokens, k, g)),
        "beta_btkg": 1 / (1 + np.exp(-normal(b, tokens, k, g))),
        "state_bkghi": normal(b, k, g, h, i),
    }


def in_torch(run, given) -> tuple[np.ndarray, np.ndarray]:
    """Returns what transformers computes of the same."""
    b, t, k, g, i = given["v_btkgi"].shape
    q, keys, v, decay, beta = (torch.tensor(a) for a in list(given.values())[:5])
    state = torch.tensor(given["state_bkghi"]).reshape(b, k * g, -1, i)
    q, keys = q * q.shape[-1] ** 0.5, keys  # which scales queries itself
    heads = (a.reshape(b, t, k * g, *a.shape[4:]) for a in (v, decay, beta))
    out, after = run(q, keys, *heads, initial_state=state, output_final_state=True)
    return out.reshape(b, t, k, g, i).numpy(), after.reshape(given["state_bkghi"].shape).numpy()


def token_by_token(*, state_bkghi, **tokens):
    """The recurrent form's outputs of all tokens, and its last state."""

    def step(state, token):
        out, state = delta.recurrent(*(token[name] for name in TOKENS), state)
        return state, out

    state, out = jax.lax.scan(step, state_bkghi, {name: jnp.moveaxis(a, 1, 0) for name, a in tokens.items()})
    return jnp.moveaxis(out, 0, 1), state


def close(ours, expected, tolerance=1e-4):
    for a, b in zip(ours, expected, strict=True):
        np.testing.assert_allclose(np.asarray(a), b, rtol=tolerance, atol=tolerance)


# tokens, how alike keys are, speed of decay, spread of speeds
CASES = {
    "one": (1, 0, 1),
    "few": (5, 0, 1),
    "chunk": (64, 0, 0.01),
    "chunks": (150, 0, 0.1),
    "alike": (130, 8.0, 0.0),  # where a sum of powers would be far off
    "fast": (70, 1.0, 300.0),  # decays that underflow
    "both": (130, 1.0, 0.1, 6.0),  # slow ones after fast ones
}


@pytest.mark.parametrize("case", CASES)
def test_both_forms_compute_what_transformers_does(case):
    given = inputs(*CASES[case])
    expected = in_torch(theirs.torch_recurrent_gated_delta_rule, given)
    assert expected[0].std() > 0.02
    close(chunked(**given), expected)
    close(token_by_token(**given), expected)
    if case != "both":  # where their form by chunks, with differences of sums, is off by 0.07
        close(in_torch(theirs.torch_chunk_gated_delta_rule, given), expected)


def test_a_text_may_be_cut_anywhere():
    given = inputs(150, slow=0.1)
    *tokens, state = given.values()
    parts = []
    for part in (slice(0, 70), slice(70, 71), slice(71, 150)):
        out, state = chunked(*(a[:, part] for a in tokens), state)
        parts.append(out)
    close((jnp.concatenate(parts, axis=1), state), chunked(**given))


def test_tokens_of_zeros_change_nothing():
    """As those of padding are."""
    given = inputs(40, slow=0.1)
    *tokens, state = given.values()
    padded = [np.pad(a, [(0, 0), (30, 0)] + [(0, 0)] * (a.ndim - 2)) for a in tokens]
    out, after = chunked(*padded, state)
    close((out[:, 30:], after), chunked(**given))


def test_gradients_are_finite_and_those_of_the_recurrent_form():
    given = inputs(70, 1.0, 30.0)

    def gradients(run):
        return jax.jit(jax.grad(lambda given: sum(jnp.sum(jnp.sin(a)) for a in run(**given))))(given)

    both = gradients(delta.chunked), gradients(token_by_token)
    for name in given:
        close([both[0][name]], [np.asarray(both[1][name])], 1e-3)


@pytest.mark.parametrize("size", [1, 2, 32, 64])
def test_inverse(size):
    whole = np.random.default_rng(0).normal(size=(3, size, size)).astype(np.float32) * size**-0.5
    expected = np.linalg.inv(np.eye(size) + np.tril(whole.astype(np.float64), -1))
    close([delta.inverse(whole)], [expected])


def test_no_loop_but_the_one_over_chunks():
    """A loop over the tokens, or over the rows of a chunk, would leave a TPU's matrix units idle."""
    text = chunked.lower(**inputs(4096, b=1)).as_text()
    assert text.count("stablehlo.while") == 1 and "triangular_solve" not in text
    assert (
        "stablehlo.while"
        not in jax.jit(delta.recurrent)
        .lower(*(a[:, 0] for a in list(inputs(1).values())[:5]), inputs(1)["state_bkghi"])
        .as_text()
    )
