"""Directions and cones that mediate refusal, found by gradient (arXiv 2502.17420).

Refusal direction optimisation (RDO) looks for one direction whose ablation makes the model comply with harmful prompts and leaves
harmless ones alone, and whose addition makes it refuse. A cone of dimension k is k orthonormal directions of which every
combination with positive weights does the same: the losses are of the basis and of directions that are drawn from the cone.
The decoder's weights are constants.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping

import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float, Int

from refusal_jax.chat.model import ChatModel
from refusal_jax.edits import Edits
from refusal_jax.mechanism.direction_loss import TargetRows, row_losses
from refusal_jax.mechanism.mediation import Mediation, cone_holds

# The losses of unit directions [M, D] on the texts of some numbers [n], and their gradients [M, D].
Losses = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
CLIP = 10.0  # the norm that gradients are cut to


@dataclasses.dataclass(frozen=True)
class ConeRecipe:
    """Tells how a cone is trained; the defaults are the paper's.

    steps: at most. batch: prompts of each kind in a step. samples: directions of the cone that are drawn in a step. rate: of the
    learning. ablation, addition, retain: weights of the three losses. patience: steps without a lower loss after which the rate
    is divided by 10, or the training ends once it has been `cuts` times.
    """

    steps: int = 100
    batch: int = 16
    samples: int = 8
    rate: float = 1e-2
    ablation: float = 1.0
    addition: float = 0.2
    retain: float = 1.0
    patience: int = 5
    cuts: int = 2


@dataclasses.dataclass(frozen=True)
class ConeData:
    """The texts that directions are trained on: harmful prompts with compliant replies, harmless prompts with refusals, and
    harmless prompts with the model's own replies. All have one width."""

    ablation: TargetRows
    addition: TargetRows
    retain: TargetRows


@dataclasses.dataclass(frozen=True)
class Trained:
    """A cone that has been trained. basis_kd: orthonormal, float64. losses: of each step: the weighted sum of the three losses,
    of the basis and of the drawn directions together. seconds: that the training took."""

    basis_kd: Float[np.ndarray, "K D"]
    losses: tuple[float, ...]
    seconds: float


def gram_schmidt(rows_kd: Float[np.ndarray, "K D"]) -> Float[np.ndarray, "K D"]:
    """Returns orthonormal rows of the same span, each the part of a row that is orthogonal to those before it."""
    basis_dk, upper_kk = np.linalg.qr(np.asarray(rows_kd, np.float64).T)
    return (basis_dk * np.where(np.diag(upper_kk) < 0, -1.0, 1.0)).T


def drawn(rng: np.random.Generator, count: int, dimension: int) -> Float[np.ndarray, "n K"]:
    """Returns the weights of directions of a cone, of norm 1 and none negative: absolute values of normal numbers."""
    weights_nk = np.abs(rng.normal(size=(count, dimension)))
    return weights_nk / np.linalg.norm(weights_nk, axis=1, keepdims=True)


def unit(rows_nd: Float[np.ndarray, "n D"]) -> Float[np.ndarray, "n D"]:
    """Returns vectors divided by their norms."""
    return rows_nd / np.linalg.norm(rows_nd, axis=-1, keepdims=True)


def direction_losses(
    model: ChatModel,
    data: ConeData,
    index: Int[np.ndarray, " n"],
    units_md: Float[np.ndarray, "M D"],
    layer: int,
    norm: float,
    recipe: ConeRecipe,
    at_once: int,
) -> tuple[Float[np.ndarray, " M"], Float[np.ndarray, "M D"]]:
    """Returns the loss of each of M unit directions, and its gradient with respect to the direction.

    index: which rows of the data are used. layer, norm: where a direction is added, and with which norm. at_once: rows of text in
    a call.
    """
    many, n, cfg = len(units_md), len(index), model.config
    tiled, owner = np.tile(index, many), np.repeat(np.arange(many), n)
    ablated = Edits.ablate(units_md).for_batch(many, cfg.n_layers, cfg.d_model).take(owner)
    added = Edits.add(units_md, layer, norm).for_batch(many, cfg.n_layers, cfg.d_model).take(owner)
    spoken = data.ablation.take(tiled).followed_by(data.addition.take(tiled))
    losses, by_ablation, by_addition = row_losses(model, spoken, Edits.concat([ablated, added]), False, at_once)
    kept_losses, by_retaining, _ = row_losses(model, data.retain.take(tiled), ablated, True, at_once)

    def mean(values):  # over the texts of a direction
        return values.reshape(many, n, *values.shape[1:]).mean(axis=1)

    half = many * n
    parts = (recipe.ablation, losses[:half]), (recipe.addition, losses[half:]), (recipe.retain, kept_losses)
    loss_m = np.sum([weight * mean(values) for weight, values in parts], axis=0)
    gradient_md = recipe.ablation * mean(by_ablation[:half, 0]) + recipe.retain * mean(by_retaining[:, 0])
    return loss_m, gradient_md + recipe.addition * norm * mean(by_addition[half:])


def cone_loss(
    basis_kd: Float[np.ndarray, "K D"],
    weights_nk: Float[np.ndarray, "n K"],
    losses: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]],
) -> tuple[float, Float[np.ndarray, "K D"]]:
    """Returns the loss of a cone, the mean of its basis plus the mean of the directions that `weights_nk` draws from it, and its
    gradient with respect to the basis. losses: those of unit directions `[M, D]`, and their gradients."""
    k, n = len(basis_kd), len(weights_nk)
    mixed_nd = weights_nk @ basis_kd
    loss_m, gradient_md = losses(np.concatenate([basis_kd, unit(mixed_nd)]) if n else basis_kd)
    total, gradient_kd = float(loss_m[:k].mean()), gradient_md[:k] / k
    if n:
        norms_n1, unit_nd = np.linalg.norm(mixed_nd, axis=1, keepdims=True), unit(mixed_nd)
        along_n1 = (gradient_md[k:] * unit_nd).sum(axis=1, keepdims=True)
        through_nd = (gradient_md[k:] - along_n1 * unit_nd) / norms_n1
        total, gradient_kd = total + float(loss_m[k:].mean()), gradient_kd + weights_nk.T @ through_nd / n
    return total, gradient_kd


def train_cone(
    losses: Losses,
    count: int,
    start_kd: Float[np.ndarray, "K D"],
    recipe: ConeRecipe,
    *,
    seed: int,
    told: Callable[[int], object] = lambda step: None,
    over: Callable[[], bool] = lambda: False,
) -> Trained:
    """Returns the cone of the lowest loss that is met on the way from a basis.

    losses: of directions on some of the texts. count: how many texts of each kind there are. start_kd: what the basis begins as,
    linearly independent rows. seed: of the texts' order and of what is drawn. told: is called with the number of each step. over:
    is asked after each step, and ends the training.
    """
    rng, begun = np.random.default_rng(seed), time.monotonic()
    basis_kd = gram_schmidt(start_kd)
    optimiser = optax.chain(optax.clip_by_global_norm(CLIP), optax.scale_by_amsgrad(b1=0.9, b2=0.98))
    state = optimiser.init(jnp.asarray(basis_kd, jnp.float32))
    rate, waited, cuts, met = recipe.rate, 0, 0, []
    best, lowest, order = basis_kd, np.inf, np.zeros(0, int)
    for step in range(recipe.steps):
        while len(order) < recipe.batch:
            order = np.concatenate([order, rng.permutation(count)])
        index, order = order[: recipe.batch], order[recipe.batch :]
        weights_nk = drawn(rng, recipe.samples if len(basis_kd) > 1 else 0, len(basis_kd))
        loss, gradient_kd = cone_loss(basis_kd, weights_nk, functools.partial(losses, index))
        met.append(loss)
        told(step)
        best, lowest, waited = (basis_kd, loss, 0) if loss < lowest else (best, lowest, waited + 1)
        if over():
            break
        if waited >= recipe.patience:
            if cuts == recipe.cuts:
                break
            rate, waited, cuts = rate / 10, 0, cuts + 1
        gradient_kd = gradient_kd - (gradient_kd * basis_kd).sum(axis=1, keepdims=True) * basis_kd  # along the sphere
        updates, state = optimiser.update(jnp.asarray(gradient_kd, jnp.float32), state)
        basis_kd = gram_schmidt(basis_kd - rate * np.asarray(updates, np.float64))
    return Trained(best, tuple(met), time.monotonic() - begun)


def find_cones(
    losses: Losses,
    count: int,
    test: Callable[[np.ndarray], list[Mediation]],
    first_d: Float[np.ndarray, " D"],
    recipe: ConeRecipe,
    *,
    dimensions: int,
    drawn: int,
    seed: int,
    kl_threshold: float,
    known: Mapping[int, Trained] | None = None,
    save: Callable[[int, Trained], object] = lambda dimension, trained: None,
    told: Callable[[int], object] = lambda step: None,
) -> tuple[dict[int, Trained], dict[int, list[Mediation]]]:
    """Returns the cones of dimension 1, 2 and so on, until one is not seen to mediate refusal, and the effects of the directions
    of each: of its basis, and of those that are drawn from it.

    losses, count, told: as in `train_cone`. test: gives the effects of unit directions. first_d: the direction that training
    begins with; each further dimension begins with a random one beside the cone before it. dimensions: at most. drawn: directions
    of a cone that are tested. kl_threshold: as in `Mediation.holds`. known: cones of an interrupted run; save: is called with
    each new one.
    """
    trained: dict[int, Trained] = {}
    tested: dict[int, list[Mediation]] = {}
    for k in range(1, dimensions + 1):
        if known and k in known:
            trained[k] = known[k]
        else:
            start_kd = grown(trained[k - 1].basis_kd, seed + k) if k > 1 else first_d[None]
            trained[k] = train_cone(losses, count, start_kd, recipe, seed=seed + k, told=told)
            save(k, trained[k])
        tested[k] = test(cone_samples(trained[k].basis_kd, drawn, seed))
        if not cone_holds(tested[k], kl_threshold):
            break
    return trained, tested


def grown(basis_kd: Float[np.ndarray, "K D"], seed: int) -> Float[np.ndarray, "_ D"]:
    """Returns a basis with one more direction, a random one, from which a cone of the next dimension begins."""
    more_d = np.random.default_rng(seed).normal(size=(1, basis_kd.shape[1]))
    return gram_schmidt(np.concatenate([basis_kd, more_d]))


def cone_samples(basis_kd: Float[np.ndarray, "K D"], count: int, seed: int) -> Float[np.ndarray, "n D"]:
    """Returns unit directions of a cone: its basis, and `count` that are drawn from it where it has more than one dimension."""
    if len(basis_kd) == 1:
        return basis_kd
    weights_nk = drawn(np.random.default_rng(seed), count, len(basis_kd))
    return np.concatenate([basis_kd, unit(weights_nk @ basis_kd)])
