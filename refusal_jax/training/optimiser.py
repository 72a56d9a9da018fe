"""The optimiser: AdamW with warm-up, a cosine and clipping, as PyTorch and transformers compute them."""

import optax

from refusal_jax.training.settings import TrainSettings


def schedule(settings: TrainSettings) -> optax.Schedule:
    """Returns the learning rate by step: it rises from 0 to the largest in `warmup` steps, and falls along a cosine."""
    return optax.warmup_cosine_decay_schedule(
        0.0 if settings.warmup else settings.rate,
        settings.rate,
        settings.warmup,
        max(settings.steps, settings.warmup + 1),
        settings.final * settings.rate,
    )


def optimiser(settings: TrainSettings) -> optax.GradientTransformation:
    """Returns AdamW after clipping. Weights that are not trained are not given to it, so they have no state."""
    adamw = optax.adamw(
        schedule(settings),
        b1=settings.beta1,
        b2=settings.beta2,
        eps=settings.epsilon,
        weight_decay=settings.weight_decay,
    )
    return optax.chain(optax.clip_by_global_norm(settings.clip), adamw) if settings.clip else adamw
