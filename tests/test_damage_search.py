"""The search of partial ablations: its space, its proposals, and what is best."""

import builtins

import numpy as np
import pytest

from refusal_jax import UserError
from refusal_jax.damage.partial import Kernel
from refusal_jax.damage.search import Space, Trial, check_optuna, is_best, least_damage, propose

SPACE = Space(4, 1.5)


def measured(values):
    """A trial whose refusal falls with its greatest strengths, and whose damage grows with their squares."""
    strengths = np.array([value for name, value in values.items() if name.endswith("most")])
    return Trial(values, float(np.mean(strengths < 0.7)), float((strengths**2).sum()))


def searched(batches, done=()):
    done = list(done)
    for _ in range(batches):
        done += [measured(values) for values in propose(SPACE, done, 4, 7, 8)]
    return done


def test_a_search_goes_on_exactly_where_it_stopped():
    whole = searched(5)
    assert searched(3, searched(2)) == whole and len({str(trial) for trial in whole}) == 20
    assert propose(SPACE, whole, 2, 7, 8) != propose(SPACE, whole, 2, 8, 8)
    for trial in whole:
        assert set(trial.values) == set(SPACE.ranges)
        assert all(low <= trial.values[name] <= high for name, (low, high) in SPACE.ranges.items())
    learnt = searched(8, whole)[20:]  # less damage than random trials do
    assert np.median([t.damage for t in learnt]) < np.median([t.damage for t in whole[:8]])


def test_parameters_are_kernels():
    values = {"embed.most": 0.5, "attn_out.most": 0.0, "attn_out.position": 1.0, "attn_out.least": 1.0}
    values |= {"attn_out.distance": 1.0, "mlp_out.most": 1.2, "mlp_out.position": 2.5, "mlp_out.least": 0.5}
    found = SPACE.partial(values | {"mlp_out.distance": 1.5})
    assert set(found.kernels) == {"resid_pre", "mlp_out"} and found.kernels["mlp_out"] == Kernel(1.2, 2.5, 0.6, 1.5)
    np.testing.assert_allclose(found.strengths(4)[:, 0], [0.5, 0, 0, 0])
    np.testing.assert_allclose(found.strengths(4)[:, 2], [0, 0.6, 1.0, 1.0], atol=1e-9)
    np.testing.assert_allclose(SPACE.partial(SPACE.everywhere(0.8)).strengths(4), [[0.8] * 3] + [[0, 0.8, 0.8]] * 3)
    assert not SPACE.partial(SPACE.everywhere(0.0)).kernels
    one = Space(1, 1.0)
    assert one.partial(one.everywhere(1.0)).strengths(1).tolist() == [[1.0, 1.0, 1.0]]


def test_what_is_best():
    refused, damage = np.array([1.0, 0.5, 0.5, 0.1, 0.1, 0.0]), np.array([0.0, 0.2, 0.3, 0.2, 0.2, 9.0])
    assert is_best(refused, damage).tolist() == [True, False, False, True, True, True]
    trials = [Trial({}, r, d) for r, d in zip(refused.tolist(), damage.tolist(), strict=True)]
    assert [least_damage(trials, level) for level in (1.0, 0.5, 0.1, 0.05)] == [0, 3, 3, 5]
    assert least_damage(trials[:2], 0.1) is None


def test_without_optuna(monkeypatch):
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name == "optuna":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    assert "pip install 'refusal-jax[damage]'" in check_optuna()
    with pytest.raises(UserError, match=r"needs Optuna, which is not installed: pip install 'refusal-jax\[damage\]'"):
        propose(SPACE, [], 1, 0, 1)
