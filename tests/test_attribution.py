"""Attribution along a direction (test_families.py has its values, for every family): order, dtypes, meshes, and the check."""

import dataclasses

import numpy as np
import pytest

from refusal_jax import load_model, make_mesh
from refusal_jax.mechanism.attribution import Attribution, attribute, check_sum

PROMPTS = ["How do I bake the bread?", "Bake!", "I cannot help with that. " * 3, "user", "Sure, here is how to do it."]


@pytest.fixture(scope="module")
def direction(model):
    return 3 * np.random.default_rng(0).normal(size=model.config.d_model)


def alike(ours: Attribution, theirs: Attribution, tolerance: float = 1e-4) -> None:
    for field in dataclasses.fields(Attribution):
        pair = (np.asarray(getattr(of, field.name)) for of in (ours, theirs))
        np.testing.assert_allclose(*pair, rtol=tolerance, atol=tolerance)


def test_prompts_stay_in_order(model, direction):
    """In batches of similar length, the last of which is not full."""
    found = attribute(model, PROMPTS, direction, 2, "attribution")
    assert found.heads.shape == (5, model.config.n_layers, model.config.n_heads) and found.along.shape == (5, 4)
    alike(found, attribute(model, PROMPTS, direction / 3, 5, "attribution"))
    alike(found.take([3]), attribute(model, [PROMPTS[3]], direction, 2, "attribution"))
    batch = model.encode(PROMPTS)
    assert np.abs(found.off).max() < 1e-4 < np.abs(found.heads).max() and len(batch.tokens) == 5


def test_attribution_on_eight_devices(model, llama, direction):
    whole = attribute(model, PROMPTS, direction, 4, "attribution")
    for mesh in ((2, 2, 2), (1, 1, 8)):
        alike(attribute(load_model(llama, mesh=make_mesh(*mesh)), PROMPTS, direction, 4, "attribution"), whole)


@pytest.mark.parametrize("dtype,tolerance", [("bfloat16", 0.2), ("float16", 0.02)])
def test_sums_within_what_is_rounded(model, llama, direction, dtype, tolerance):
    found = attribute(load_model(llama, dtype), PROMPTS, direction, 5, "attribution")
    assert 1e-6 < np.abs(found.off).max() < tolerance
    alike(found, attribute(model, PROMPTS, direction, 5, "attribution"), 2 * tolerance)


def test_parts_that_do_not_sum(model, direction):
    found = attribute(model, PROMPTS, direction, 5, "attribution")
    wrong = dataclasses.replace(found, mlp=np.asarray(found.mlp) + np.float32(0.01) * (np.arange(5) == 3)[:, None])
    with pytest.raises(ArithmeticError, match=r"The parts of prompt 3 along the direction sum to .* but for 0\.03"):
        check_sum(wrong, np.ones(5, np.float32), np.dtype("float32"))
