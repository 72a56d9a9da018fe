"""Directions by gradient: losses and gradients against PyTorch's autograd, and cones in worlds where their dimension is known."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from oracle import hooked, writers

from refusal_jax import Edits, load_model, make_mesh
from refusal_jax.chat.loss_rows import LossRow
from refusal_jax.judges.statistics import Rate
from refusal_jax.mechanism.cones import (
    ConeData,
    ConeRecipe,
    cone_loss,
    cone_samples,
    direction_losses,
    drawn,
    find_cones,
    gram_schmidt,
    grown,
    train_cone,
    unit,
)
from refusal_jax.mechanism.direction_loss import TargetRows, row_losses
from refusal_jax.mechanism.independence import cosine_changes, dependence
from refusal_jax.mechanism.mediation import Mediation, cone_holds, dimension, mediations

LAYER, NORM = 1, 3.0
ROWS = [LossRow(list(range(5, 5 + n)), first) for n, first in ((9, 4), (12, 9), (7, 3), (11, 5))]


@pytest.fixture(scope="module")
def rows(model):
    return TargetRows.of(model, ROWS, 16, 6)


@pytest.fixture(scope="module")
def edits(model):
    """Two rows that ablate, and two that add, in the form that programs take."""
    directions = np.random.default_rng(1).normal(size=(4, model.config.d_model))
    ablated, added = Edits.ablate(directions[:2]), Edits.add(directions[2:], LAYER)
    return Edits.concat([ablated, added]).for_batch(4, model.config.n_layers, model.config.d_model)


def by_autograd(hf, row: LossRow, vector, ablate: bool, retain: bool) -> tuple[float, np.ndarray]:
    """The loss of one row and its gradient with respect to the vector, by hooks and autograd."""
    leaf = torch.tensor(np.asarray(vector), dtype=torch.float32, requires_grad=True)
    layers = hf.model.layers
    edit = (lambda x: x - (x @ leaf).unsqueeze(-1) * leaf) if ablate else (lambda x: x + leaf)
    hooks = [(layers[LAYER], "input", edit)]
    if ablate:
        hooks = [(one, "input", edit) for one in layers]
        hooks += [(one, "output", edit) for layer in layers for one in writers(layer)]
    ids = torch.tensor([row.ids])
    with torch.no_grad():
        base = hf(ids).logits[0, row.first - 1 : -1].log_softmax(-1)
    with hooked(hooks):
        logp = hf(ids).logits[0, row.first - 1 : -1].log_softmax(-1)
    wanted = ids[0, row.first :, None]
    loss = (base.exp() * (base - logp)).sum() if retain else -logp.gather(1, wanted).mean()
    loss.backward()
    return float(loss.detach()), leaf.grad.numpy()


@pytest.mark.parametrize("retain", [False, True])
def test_gradients_are_those_of_autograd(model, hf, rows, edits, retain):
    losses, by_ablation, by_addition = row_losses(model, rows, edits, retain, 4)
    for i, row in enumerate(ROWS):
        vector = edits.ablate_rjd[i, 0] if i < 2 else edits.add_rd[i]
        loss, gradient = by_autograd(hf, row, vector, i < 2, retain)
        assert losses[i] == pytest.approx(loss, rel=2e-4)
        np.testing.assert_allclose(by_ablation[i, 0] if i < 2 else by_addition[i], gradient, rtol=3e-3, atol=2e-4)


@pytest.mark.parametrize("mesh", [(2, 2, 2)])
def test_devices_do_not_change_losses_and_gradients(llama, model, rows, edits, mesh):
    alone, spread = (row_losses(one, rows, edits, True, 4) for one in (model, load_model(llama, mesh=make_mesh(*mesh))))
    for one, other in zip(alone, spread, strict=True):
        np.testing.assert_allclose(other, one, rtol=2e-3, atol=1e-4)


def test_gradients_of_weights_in_bfloat16_are_nearly_those_of_float32(llama, model, rows, edits):
    """Losses are float32 whatever the weights are: in bfloat16 the gradient of a small KL divergence would be noise."""
    exact, rounded = (row_losses(one, rows, edits, True, 4) for one in (model, load_model(llama, "bfloat16")))
    for one, other in ((exact[1][:2, 0], rounded[1][:2, 0]), (exact[2][2:], rounded[2][2:])):
        assert ((unit(one) * unit(other)).sum(1) > 0.98).all()


def test_directions_get_the_mean_over_texts(model, rows):
    """One call for all directions gives what each text gives by itself, whatever fits in a call."""
    recipe, index = ConeRecipe(ablation=0.7, addition=0.3, retain=0.2), np.array([2, 0, 3])
    units = unit(np.random.default_rng(2).normal(size=(2, model.config.d_model)))
    data = ConeData(rows, rows, rows)
    losses, gradients = direction_losses(model, data, index, units, LAYER, NORM, recipe, 4)
    for unit_d, loss, gradient in zip(units, losses, gradients, strict=True):
        cfg = model.config
        ablated = Edits.ablate(unit_d).for_batch(3, cfg.n_layers, cfg.d_model)
        added = Edits.add(unit_d, LAYER, NORM).for_batch(3, cfg.n_layers, cfg.d_model)
        some = rows.take(index)
        one, two, three = (
            row_losses(model, some, e, retain, 3) for e, retain in ((ablated, False), (added, False), (ablated, True))
        )
        assert loss == pytest.approx(0.7 * one[0].mean() + 0.3 * two[0].mean() + 0.2 * three[0].mean(), rel=1e-4)
        expected = 0.7 * one[1][:, 0].mean(0) + 0.3 * NORM * two[2].mean(0) + 0.2 * three[1][:, 0].mean(0)
        np.testing.assert_allclose(gradient, expected, rtol=1e-3, atol=1e-5)


def test_a_cones_gradient_is_that_of_finite_differences():
    rng = np.random.default_rng(3)
    basis, weights = gram_schmidt(rng.normal(size=(2, 5))), drawn(rng, 3, 2)
    matrix, wanted = rng.normal(size=(5, 5)), rng.normal(size=5)

    def losses(units):
        x = units @ matrix - wanted
        return (x**2).sum(1), 2 * x @ matrix.T

    gradient = cone_loss(basis, weights, losses)[1]
    for place in np.ndindex(basis.shape):
        step = np.zeros_like(basis)
        step[place] = 1e-6
        change = cone_loss(basis + step, weights, losses)[0] - cone_loss(basis - step, weights, losses)[0]
        assert gradient[place] == pytest.approx(change / 2e-6, rel=1e-4, abs=1e-6)


STEEP = 8.0


class World:
    """A world in which `planted` orthogonal directions mediate refusal: a residual is refused if its part within their span is
    longer than 1.4. Harmful residuals have 1.5 there, equally along all of them, and harmless ones nothing."""

    def __init__(self, planted: int, width: int = 12):
        rng = np.random.default_rng(planted)
        self.span = gram_schmidt(rng.normal(size=(planted, width)))
        self.harmful = 1.5 / np.sqrt(planted) * self.span.sum(0)

    def sizes(self, units):
        """Tells how long the part within the span is, of harmful residuals under ablation, and of a direction that is added."""
        ablated = self.harmful - (units @ self.harmful)[:, None] * units
        added = 1.6 * units
        return [jnp.sqrt(jnp.sum((x @ self.span.T) ** 2, axis=1) + 1e-9) for x in (ablated, added)]

    def losses(self, index, units):
        each, gradients = self.jitted(jnp.asarray(units, jnp.float32))
        return np.asarray(each, np.float64), np.asarray(gradients, np.float64)

    @functools.cached_property
    def jitted(self):
        def loss(units):
            left, made = self.sizes(units / jnp.linalg.norm(units, axis=1, keepdims=True))
            each = jax.nn.softplus(STEEP * (left - 1.3)) + jax.nn.softplus(STEEP * (1.5 - made))
            return each.sum(), each

        def both(units):
            gradients, each = jax.grad(loss, has_aux=True)(units)
            return each, gradients

        return jax.jit(both)

    def test(self, units) -> list[Mediation]:
        left, made = (np.asarray(x) > 1.4 for x in self.sizes(units))
        return [Mediation(Rate(32 * int(a), 32), Rate(32 * int(b), 32), 0.0) for a, b in zip(left, made, strict=True)]


@pytest.mark.parametrize("planted", [1, 2])
def test_the_dimension_of_a_planted_cone(planted):
    world, saved = World(planted), {}
    recipe = ConeRecipe(steps=100, batch=2, samples=8, rate=3e-2, patience=10)
    first = np.random.default_rng(0).normal(size=12)
    find = functools.partial(find_cones, world.losses, 4, world.test, first, recipe, drawn=16, seed=0, kl_threshold=0.1)
    trained, tested = find(dimensions=4, save=saved.__setitem__)
    held = {k: cone_holds(found, 0.1) for k, found in tested.items()}
    assert dimension(held) == planted and max(held) == planted + 1 and held[planted + 1] is False
    assert np.linalg.norm(trained[planted].basis_kd @ world.span.T) ** 2 > 0.8 * planted
    assert len(tested[planted + 1]) == planted + 1 + 16

    def few(units) -> list[Mediation]:
        return [
            Mediation(Rate(one.ablated.count // 16, 2), Rate(one.added.count // 16, 2), 0.0)
            for one in world.test(units)
        ]

    assert list(
        find_cones(world.losses, 4, few, first, recipe, dimensions=4, drawn=2, seed=0, kl_threshold=0.1, known=saved)[1]
    ) == [1]
    again, _ = find(dimensions=1, known=saved)
    assert again[1] is saved[1]


def test_training_ends_early_and_keeps_the_best():
    start = np.eye(3)[:1]

    def worse(index, units, calls=[0]):  # noqa: B006
        calls[0] += 1
        return np.full(len(units), float(calls[0])), np.ones_like(units)

    found = train_cone(worse, 4, start, ConeRecipe(patience=2, cuts=1, batch=8), seed=0)
    assert len(found.losses) == 5 and found.losses[0] == 1
    np.testing.assert_allclose(found.basis_kd, start)


def test_cones_are_orthonormal_and_their_samples_lie_in_them():
    basis = grown(grown(np.eye(6)[:1], 0), 1)
    np.testing.assert_allclose(basis @ basis.T, np.eye(3), atol=1e-12)
    np.testing.assert_allclose(basis[0], np.eye(6)[0])
    samples = cone_samples(basis, 20, 0)
    np.testing.assert_allclose(samples[:3], basis)
    weights = samples @ basis.T
    assert len(samples) == 23 and (weights > -1e-12).all()
    np.testing.assert_allclose(np.linalg.norm(weights, axis=1), 1)
    assert len(cone_samples(basis[:1], 20, 0)) == 1


def test_intervals_decide_whether_a_direction_mediates():
    def held(left, made, kl=0.0, n=32):
        return Mediation(Rate(left, n), Rate(made, n), kl).holds(0.1)

    assert held(0, 32) is True and held(32, 32) is False and held(0, 0) is False and held(0, 32, 0.2) is False
    assert held(14, 32) is None and held(0, 18) is None and held(0, 2, n=2) is None
    yes, no, open_ = (Mediation(Rate(a, 32), Rate(b, 32), 0.0) for a, b in ((0, 32), (32, 32), (14, 32)))
    assert (cone_holds([yes], 0.1), cone_holds([yes, open_], 0.1), cone_holds([open_, no], 0.1)) == (True, None, False)
    assert dimension({1: True, 2: None}) == 1 and dimension({1: False}) == 0


def test_effects_are_counted_by_the_sign_of_the_score(model):
    from refusal_jax.mechanism.edited_prompts import EditedPrompts

    prompts, ids = ["bake it", "How do I bake the bread?", "hack"], tuple(range(0, model.config.vocab_size, 2))
    side = EditedPrompts.build(model, prompts, 8, ids)
    units = unit(np.random.default_rng(4).normal(size=(2, model.config.d_model)))
    for one, found in zip(units, mediations(side, side, units, LAYER, NORM), strict=True):
        ablated, added = side.read(Edits.ablate(one)), side.read(Edits.add(one, LAYER, NORM))
        assert found.ablated == Rate(int((ablated.scores_mn > 0).sum()), 3)
        assert found.added == Rate(int((added.scores_mn > 0).sum()), 3)
        assert found.kl == pytest.approx(ablated.kl_mn.mean())
        assert found.row(0.1)["holds"] == found.holds(0.1)


def test_independence_against_plain_hooks(model, hf):
    """Changes of cosine, read one prompt at a time in PyTorch."""
    prompts = ["bake it", "How do I bake the bread?", "Explain at length how one might repair the well."]
    units = gram_schmidt(np.random.default_rng(5).normal(size=(2, model.config.d_model)))
    changes = cosine_changes(model, prompts, units, 4)

    def cosines(prompt, ablated=None) -> np.ndarray:
        leaf = None if ablated is None else torch.tensor(ablated, dtype=torch.float32)
        read, hooks = [], []
        if leaf is not None:

            def edit(x):
                return x - (x @ leaf).unsqueeze(-1) * leaf

            hooks = [(one, "input", edit) for one in hf.model.layers]
            hooks += [(one, "output", edit) for layer in hf.model.layers for one in writers(layer)]
        keep = [
            (layer, "input", lambda x: read.append(x[0, -1].numpy().astype(np.float64)) or x)
            for layer in hf.model.layers
        ]
        with torch.no_grad(), hooked([*hooks, *keep]):
            hf(torch.tensor([model.chat.prompt_ids(prompt)]))
        return np.array([[x @ u / np.linalg.norm(x) for x in read] for u in units])

    expected = [[cosines(p, u) - cosines(p) for p in prompts] for u in units]
    np.testing.assert_allclose(changes, np.transpose(expected, (0, 2, 3, 1)), atol=2e-5)
    squares = (changes**2).mean(2)
    np.testing.assert_allclose(dependence(changes)[0, 1], squares[0, 1] + squares[1, 0])


def test_one_loss_is_alive_whatever_the_padding(model):
    """Rows of another width, and a window that is wider than the targets, give the same."""
    edits = Edits.ablate(np.ones(model.config.d_model)).for_batch(4, model.config.n_layers, model.config.d_model)
    first, second = (
        row_losses(model, TargetRows.of(model, ROWS, *sizes), edits, False, 2) for sizes in ((16, 6), (24, 10))
    )
    np.testing.assert_allclose(first[0], second[0], rtol=1e-5)
    np.testing.assert_allclose(first[1], second[1], atol=1e-4)
