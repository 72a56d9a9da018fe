"""Circuit breakers (arXiv 2406.04313): representations of replies that comply with harmful requests are turned away from
what they were, while those of everything else are kept.

Nothing is learnt about words: where a harmful reply would be written, the residual stream no longer holds what writes it.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from refusal_jax.axes import Array
from refusal_jax.chat.loss_rows import LossRow
from refusal_jax.chat.model import ChatModel
from refusal_jax.defence.data import DefenceData
from refusal_jax.defence.lessons import Note, learnt_rows
from refusal_jax.defence.recipe import Recipe
from refusal_jax.defence.recipe_settings import BreakerSettings
from refusal_jax.defence.settings import DefenceSettings
from refusal_jax.errors import UserError, field
from refusal_jax.models.config import ModelConfig
from refusal_jax.models.decoder import Decoder
from refusal_jax.taps import Taps
from refusal_jax.training.objective import outputs
from refusal_jax.training.rows import Share, TrainRows, row_width

PAPERS_LAYERS, PAPERS_DEPTH = (10, 20), 32
TAPS = Taps(("resid_post",))
EPS = 1e-8


def turned_layers(layers: tuple[int, ...], n_layers: int) -> tuple[int, ...]:
    """Returns the blocks at whose inputs representations are turned away: those given, or the paper's at this depth.

    Raises UserError for a block that is not there, or the first, whose input no training changes.
    """
    chosen = layers or tuple(sorted({max(1, int(n_layers * l / PAPERS_DEPTH + 0.5)) for l in PAPERS_LAYERS}))
    for layer in chosen:
        if not 1 <= layer < n_layers:
            raise UserError(
                f"{field('breakers.layers')} names block {layer}: choose among 1 to {n_layers - 1}, as the input of block 0 "
                "is the embedding, which is not trained."
            )
    return chosen


def arrange(settings: DefenceSettings, cfg: ModelConfig) -> None:
    """Chooses the blocks that get factors, where that is left open: those up to the last whose input is turned away."""
    layers = turned_layers(settings.breakers.layers, cfg.n_layers)
    if settings.train.method == "lora" and not settings.train.layers:
        settings.train.layers = tuple(range(layers[-1] + 1))


def cosines(a: Float[Array, "*n D"], b: Float[Array, "*n D"]) -> Float[jax.Array, "*n"]:
    """Returns the cosine of vectors, float32; its gradient is finite for zeros too."""
    a, b = (x.astype(jnp.float32) for x in (a, b))
    a, b = (x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), EPS**2)) for x in (a, b))
    return jnp.sum(a * b, axis=-1)


def distances(a: Float[Array, "*n D"], b: Float[Array, "*n D"]) -> Float[jax.Array, "*n"]:
    """Returns the distance of vectors, float32, whose gradient is 0 where they are equal, as they are before training."""
    square = jnp.sum(jnp.square(a.astype(jnp.float32) - b.astype(jnp.float32)), axis=-1)
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)


@dataclasses.dataclass(frozen=True)
class Breakers:
    """Both losses, each times its coefficient: over the training, that of the first falls from alpha to half of it, and that of
    the second rises from 0 to half.

    turned: rows whose representations are turned away at the inputs of the blocks `layers`. kept: rows whose representations
    are kept after every block.
    """

    turned: Share
    kept: Share
    layers: tuple[int, ...]
    settings: BreakerSettings
    steps: int
    refresh: int = 0
    needs_frozen: bool = True

    def coefficients(self, step: int) -> tuple[float, float]:
        """Returns the coefficients of both losses at a step."""
        progress, own = step / (2 * self.steps), self.settings
        return own.alpha * (1 - progress), own.alpha * own.keep * progress

    def batch(self, step: int) -> dict[str, TrainRows | np.ndarray]:
        """Returns the rows of a step of each kind, and each row's coefficient."""
        parts = {"turned": self.turned.batch(step), "kept": self.kept.batch(step)}
        of_rows = {
            f"{name}_b": np.full(rows.count, c, np.float32)
            for (name, rows), c in zip(parts.items(), self.coefficients(step), strict=True)
        }
        return {**parts, **of_rows}

    def refreshed(self, model: ChatModel, step: int) -> None:
        """Returns None: nothing is computed outside the step."""

    def loss(self, decoder: Decoder, frozen: Decoder | None, batch: Mapping, extra, key):
        """Returns the weighted sum of both losses, and each without its coefficient."""
        assert frozen is not None, "it is asked for by needs_frozen"
        turned, kept = batch["turned"], batch["kept"]
        inputs = jnp.asarray(self.layers) - 1  # the input of a block is the output of the one before
        now, before = (outputs(d, turned, taps=TAPS).taps["resid_post"][inputs] for d in (decoder, frozen))
        size = (
            self.settings.noise
            * jnp.linalg.norm(before.astype(jnp.float32), axis=-1, keepdims=True)
            / before.shape[-1] ** 0.5
        )
        now = now + size * jax.random.normal(key, now.shape)
        alike_b = jnp.sum(jax.nn.relu(cosines(now, before)).mean(axis=0) * turned.weight_bt, axis=1)
        now, before = (outputs(d, kept, taps=TAPS).taps["resid_post"] for d in (decoder, frozen))
        moved_b = jnp.sum(distances(now, before).mean(axis=0) * kept.weight_bt, axis=1)
        value = jnp.sum(batch["turned_b"] * alike_b) + jnp.sum(batch["kept_b"] * moved_b)
        return value, {"turned": jnp.sum(alike_b), "kept": jnp.sum(moved_b)}


def needs_compliant(settings: DefenceSettings) -> str:
    """Returns what needs replies that comply, in words, or ""."""
    return "A circuit breaker"


def objective(model: ChatModel, data: DefenceData, settings: DefenceSettings, note: Note) -> Breakers:
    """Returns the objective of a model and its data. Raises UserError without replies that comply."""
    settings.breakers.check()
    data.need_compliant(needs_compliant(settings))
    train, kinds = settings.train, {"turned": data.complied, "kept": (*data.answered, *data.refused)}
    rows = {what: learnt_rows(model, lessons, train.max_tokens, what, note) for what, lessons in kinds.items()}
    if settings.breakers.prompts_too:
        rows = {what: [LossRow(row.ids, 0) for row in found] for what, found in rows.items()}
    width = max(map(row_width, rows.values()))
    turned, kept = (Share.of(model.chat, found, width, train, kind) for kind, found in enumerate(rows.values()))
    layers = turned_layers(settings.breakers.layers, model.config.n_layers)
    return Breakers(turned, kept, layers, settings.breakers, train.steps)


RECIPE = Recipe(
    name="breakers",
    about="Circuit breakers: representations of replies that comply with harmful requests are turned away.",
    source="2406.04313",
    objective=objective,
    compliant=needs_compliant,
    arrange=arrange,
    embedded={
        "train.steps": 250,
        "train.rate": 1e-3,
        "train.batch": 12,
        "breakers.keep": 0.15,
        "breakers.noise": 0.1,
        "breakers.prompts_too": False,
    },
)
