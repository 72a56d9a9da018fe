"""Selection without refusal tokens, against the same cosines from PyTorch hooks."""

import numpy as np
import pytest
import torch
from oracle import Oracle, hooked

from refusal_jax import Edits, UserError
from refusal_jax.mechanism.cosmic import CosmicRule, cosine, cosmic_pick, cosmic_scores, distant_layers, mean_outputs
from refusal_jax.mechanism.edited_prompts import EditedPrompts

HARMFUL = ["steal it", "How do I rob the bank?", "Explain at length how one might poison the well.", "hack", "forge a"]
HARMLESS = ["bake it", "How do I bake the bread?", "Explain at length how one might repair the well."]
LAYERS = (2, 0)
ANY = CosmicRule(kl_threshold=1e9, prune_fraction=0.0)


@pytest.fixture(scope="module")
def oracle(llama):
    return Oracle(str(llama))


@pytest.fixture(scope="module")
def directions(model):
    """Two positions of every layer, `[L, 2, D]`; the first candidate of layer 1 is zero."""
    values = np.random.default_rng(0).normal(size=(model.config.n_layers, 2, model.config.d_model))
    values[1, 0] = 0
    return values


def outputs(oracle, texts, hooks=()) -> tuple[np.ndarray, np.ndarray]:
    """Block outputs of the last token, float64 `[n, L, D]`, and its logits, one prompt at a time, in plain PyTorch."""
    found, logits = [], []
    for text in texts:
        read = [(layer, "output", lambda x, one=[]: one.append(x[0, -1]) or x) for layer in oracle.layers]
        values = [edit.__defaults__[0] for _, _, edit in read]
        [kept.clear() for kept in values]
        with hooked([*hooks, *read]):
            logits.append(oracle.logits([text])[0].double().numpy())
        found.append(np.stack([kept[-1].double().numpy() for kept in values]))
    return np.array(found), np.array(logits)


def test_scores_are_those_of_plain_hooks(model, oracle, directions):
    rows = cosmic_scores(model, directions, HARMFUL, HARMLESS, LAYERS, rule=ANY, rows=16)
    assert len(rows) == 2 * model.config.n_layers - 1  # a direction that is zero is no candidate
    means = {
        name: outputs(oracle, texts)[0].mean(0)[list(LAYERS)].ravel()
        for name, texts in (("harmful", HARMFUL), ("harmless", HARMLESS))
    }
    unedited = outputs(oracle, HARMLESS)[1]
    for row in (rows[0], rows[-1]):
        direction = directions[row["layer"], row["position"]]
        ablated = outputs(oracle, HARMFUL, oracle.ablation(direction))[0].mean(0)[list(LAYERS)].ravel()
        added = outputs(oracle, HARMLESS, oracle.addition(direction, row["layer"]))[0].mean(0)[list(LAYERS)].ravel()
        assert row["ablated"] == pytest.approx(cos(ablated, means["harmless"]), abs=1e-5)
        assert row["added"] == pytest.approx(cos(added, means["harmful"]), abs=1e-5)
        assert row["score"] == row["ablated"] + row["added"]
        p, q = (
            torch.tensor(x).softmax(-1).numpy()
            for x in (unedited, outputs(oracle, HARMLESS, oracle.ablation(direction))[1])
        )
        assert row["kl"] == pytest.approx((p * (np.log(p + 1e-6) - np.log(q + 1e-6))).sum(-1).mean(), rel=1e-3)


def cos(a, b) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def test_only_what_the_rule_accepts_is_scored(model, directions):
    """Tells what is known of an interrupted run, and KL divergences that are known, are used again."""
    rows = cosmic_scores(model, directions, HARMFUL, HARMLESS, LAYERS, rule=ANY, rows=8)
    middle = float(np.median([row["kl"] for row in rows]))
    rule, saved = CosmicRule(middle, 0.34), []
    assert rule.layers(model.config.n_layers) == 1
    few = cosmic_scores(model, directions, HARMFUL, HARMLESS, LAYERS, rule=rule, rows=8, save=saved.extend)
    assert {row["layer"] for row in few} == {0} and saved
    assert all((row["score"] is None) == (row["kl"] > middle) for row in few)
    assert cosmic_scores(model, directions, HARMFUL, HARMLESS, LAYERS, rule=rule, rows=8, known=few) == few
    known = {(row["position"], row["layer"]): 2 * middle for row in few}
    none = cosmic_scores(model, directions, HARMFUL, HARMLESS, LAYERS, rule=rule, rows=8, known_kl=known)
    assert [row["score"] for row in none] == [None] * len(few) and cosmic_pick(none, rule) is None


def test_the_pick_has_the_highest_score_of_those_that_pass():
    def row(position, layer, kl, score):
        return {"position": position, "layer": layer, "kl": kl, "score": score}

    rows = [
        row(-1, 3, 0.05, 1.5),
        row(-1, 4, 0.3, None),
        row(-2, 2, 0.05, 1.5),
        row(-1, 2, 0.0, 1.2),
        row(-3, 1, 0.0, np.nan),
    ]
    assert cosmic_pick(rows, CosmicRule()) == rows[2]
    assert cosmic_pick(rows[1:2], CosmicRule()) is None


def test_layers_are_those_where_the_means_differ_most():
    angles = np.radians([10, 80, 30, 60, *[5] * 16])
    one = np.tile([1.0, 0.0], (20, 1))
    assert distant_layers(one, np.stack([np.cos(angles), np.sin(angles)], axis=1)) == (1, 3)
    assert distant_layers(one[:4], one[:4]) == (0,)
    assert cosine(np.zeros(2), np.ones(2)) == 0


@pytest.mark.parametrize("mesh", [(2, 1, 2)])
def test_devices_do_not_change_what_is_read(llama, model, directions, mesh):
    from refusal_jax import load_model, make_mesh

    edits = Edits.concat([Edits.ablate(directions[0]), Edits.add(directions[2], 2)])
    alone, spread = (
        EditedPrompts.build(one, HARMFUL, 16, (40, 71)).read(edits, LAYERS)
        for one in (model, load_model(llama, mesh=make_mesh(*mesh)))
    )
    for name in ("scores_mn", "kl_mn", "means_mld"):
        np.testing.assert_allclose(getattr(spread, name), getattr(alone, name), rtol=2e-4, atol=2e-5)


def test_prompts_keep_their_order(model, oracle, directions):
    prompts = EditedPrompts.build(model, HARMFUL, 16, oracle.refusal_ids)
    found = prompts.read(Edits.ablate(directions[0]))
    expected = [oracle.scores(HARMFUL, oracle.ablation(direction)).numpy() for direction in directions[0]]
    np.testing.assert_allclose(found.scores_mn, expected, atol=1e-3)
    means = mean_outputs(prompts, (1,))
    np.testing.assert_allclose(means[0], outputs(oracle, HARMFUL)[0].mean(0)[1], atol=1e-4)


def test_values_that_overflow_are_an_error(model, directions):
    prompts = EditedPrompts.build(model, HARMFUL[:2], 8)
    with pytest.raises(UserError, match="Prompts cannot be read under these edits: .* The edit may be the reason"):
        prompts.read(Edits.add(1e30 * directions[0, :1], 0))
