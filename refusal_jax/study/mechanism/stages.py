"""The stages of the mechanism, in the order in which they are done and shown."""

from refusal_jax.runs.stage import Stage
from refusal_jax.study.mechanism import (
    agreement,
    alternatives,
    attention,
    attribution,
    cones,
    cosmic,
    dose,
    matrices,
    plane,
    rank,
    scatter,
    som,
    suffixes,
)
from refusal_jax.study.mechanism.shared import MechanismStudy

STAGES: tuple[Stage[MechanismStudy], ...] = (
    suffixes.STAGE,
    attribution.STAGE,
    attention.STAGE,
    plane.STAGE,
    agreement.STAGE,
    dose.STAGE,
    rank.STAGE,
    scatter.STAGE,
    matrices.STAGE,
    cosmic.STAGE,
    som.STAGE,
    cones.STAGE,
    alternatives.STAGE,
)
