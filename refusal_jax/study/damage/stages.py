"""The stages that measure damage, in the order in which they are done and shown. No name is one of another stage of a study."""

from refusal_jax.runs.stage import Stage
from refusal_jax.study.damage import answers, front, grid, replies, texts, weights
from refusal_jax.study.damage.shared import DamageStudy

STAGES: tuple[Stage[DamageStudy], ...] = (
    grid.STAGE,
    replies.STAGE,
    answers.STAGE,
    front.STAGE,
    texts.STAGE,
    weights.STAGE,
)
