"""One step of a training: the gradients of an objective, and what the optimiser makes of them, as one jitted program."""

from collections.abc import Callable
from typing import cast

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from refusal_jax.models.config import ModelConfig
from refusal_jax.models.decoder import Decoder
from refusal_jax.models.sharding import replicate, sharding_of, weight_place
from refusal_jax.models.weight import factor_names
from refusal_jax.models.weights import weight_table
from refusal_jax.training.lora import factor_shapes, factor_sharding, scaled
from refusal_jax.training.objective import Objective
from refusal_jax.training.optimiser import optimiser
from refusal_jax.training.settings import TrainSettings


class Step:
    """The step of an objective under settings, on a mesh; None is one device."""

    def __init__(self, objective: Objective, settings: TrainSettings, mesh: Mesh | None):
        self.objective, self.settings, self.mesh = objective, settings, mesh
        self.optimiser = optimiser(settings)

    def decoder(self, frozen: Decoder, trained: dict[str, jax.Array]) -> Decoder:
        """Returns the decoder with what is trained; usable inside a jitted function.

        Outside of one, weights that are not trained are not copied.
        """
        cfg, remat = frozen.cfg, self.settings.remat
        if self.settings.method == "lora":
            weights = frozen.weights() | scaled(trained, self.settings.scale)
            return Decoder(cfg, weights, frozen.mesh, remat=remat)
        table = weight_table(cfg)
        return Decoder(
            cfg,
            {path: w.astype(table[path].stored_as(frozen.dtype)) for path, w in trained.items()},
            frozen.mesh,
            remat=remat,
        )

    def jitted(self, trained: dict, state: optax.OptState) -> Callable:
        """Returns the jitted step, which gives the memory of the old state to the new one.

        It takes what is trained, the optimiser's state, the frozen decoder, a batch, what the objective keeps outside the step,
        and the number of the step; it returns the first two anew, and named losses. trained, state: arrays or stand-ins, placed
        as they will be.
        """
        places = jax.tree.map(lambda a: a.sharding, (trained, state))
        return jax.jit(self._step, donate_argnums=(0, 1), out_shardings=(*places, None))

    def _step(self, trained, state, frozen: Decoder, batch, extra, number):
        key = jax.random.fold_in(jax.random.key(self.settings.seed), number)
        named, grads = self._gradients(trained, frozen, batch, extra, key)
        norm = optax.global_norm(grads)
        updates, state = self.optimiser.update(grads, state, trained)
        updates = self._learning(frozen.cfg, cast(dict[str, jax.Array], updates))
        return optax.apply_updates(trained, updates), state, replicate(self.mesh, named | {"gradient_norm": norm})

    def _learning(self, cfg: ModelConfig, updates: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """Returns the updates without those of weights that are to stay, where only some blocks of all weights learn."""
        if self.settings.method == "lora" or not self.settings.layers:
            return updates
        table = weight_table(cfg)

        def masked(path: str, u: jax.Array) -> jax.Array:
            if not path.startswith("blocks."):
                return u * 0.0
            learns = jnp.isin(jnp.asarray(table[path].layers), jnp.asarray(self.settings.layers))
            return u * learns.reshape(-1, *[1] * (u.ndim - 1))

        return {path: masked(path, u) for path, u in updates.items()}

    def _loss(self, trained, frozen: Decoder, batch, extra, key):
        base = None
        if self.objective.needs_frozen:
            stopped = jax.lax.stop_gradient(frozen.weights())
            base = Decoder(frozen.cfg, stopped, frozen.mesh, remat=self.settings.remat)
        value, named = self.objective.loss(self.decoder(frozen, trained), base, batch, extra, key)
        return value, {"loss": value, **named}

    def _gradients(self, trained, frozen: Decoder, batch, extra, key):
        """Returns the named losses of a batch and the gradients, both sums over its parts."""
        both, parts = jax.value_and_grad(self._loss, has_aux=True), self.settings.accumulate
        if parts == 1:
            (_, named), grads = both(trained, frozen, batch, extra, jax.random.fold_in(key, 0))
            return named, grads

        def add(total, numbered):
            number, part = numbered
            (_, named), grads = both(trained, frozen, part, extra, jax.random.fold_in(key, number))
            return jax.tree.map(jnp.add, total, (named, grads)), None

        cut = jax.tree.map(lambda a: self._cut(a, parts), batch)
        first = jax.tree.map(lambda a: a[0], cut)
        shapes = jax.eval_shape(lambda: both(trained, frozen, first, extra, key))
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), (shapes[0][1], shapes[1]))
        return jax.lax.scan(add, zeros, (jnp.arange(parts), cut))[0]

    def _cut(self, array: jax.Array, parts: int) -> jax.Array:
        """Returns an array with rows first as `[parts, rows / parts, …]`, whose parts are divided over the mesh as it was."""
        cut = array.reshape(parts, len(array) // parts, *array.shape[1:])
        if self.mesh is None:
            return cut
        return jax.lax.with_sharding_constraint(cut, sharding_of(self.mesh, None, ("batch", cut.shape[1])))


def state_shapes(optimiser: optax.GradientTransformation, trained: dict, mesh: Mesh | None) -> optax.OptState:
    """Returns stand-ins for the optimiser's state: what belongs to a weight is placed as that is, the rest is whole everywhere.

    trained: arrays or stand-ins with their placement.
    """

    def beside(leaf, weight):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=weight.sharding)

    def whole(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding_of(mesh))

    state = jax.eval_shape(optimiser.init, trained)
    return optax.tree_map_params(optimiser, beside, state, trained, transform_non_params=whole)


def trained_shapes(cfg: ModelConfig, settings: TrainSettings, mesh: Mesh | None) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns stand-ins for what is trained, float32, by path: factors, or all weights."""
    if settings.method == "lora":
        factors = {
            name: (factor.shape, factor_sharding(mesh, factor))
            for path, pair in factor_shapes(cfg, settings).items()
            for name, factor in zip(factor_names(path), pair, strict=True)
        }
    else:
        factors = {path: weight_place(mesh, weight) for path, weight in weight_table(cfg).items()}
    return {
        path: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding) for path, (shape, sharding) in factors.items()
    }
