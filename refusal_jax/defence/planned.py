"""Describes the training of a defence, so that it can be planned: its step as one program, compiled from shapes."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from refusal_jax.defence.adversarial_settings import DeepRefusalSettings
from refusal_jax.defence.deep_refusal import TokenAblation
from refusal_jax.defence.two_kinds import KindRows, TwoKinds
from refusal_jax.models.config import ModelConfig
from refusal_jax.plan.programs import Group, Program, Shapes, Workload
from refusal_jax.training.rows import Share, TrainRows
from refusal_jax.training.settings import TrainSettings
from refusal_jax.training.step import Step, state_shapes, trained_shapes

KINDS = 2  # of rows: refusals and answers
# Passes through the model that a step is as long as: one forward, one backward with respect to activations, one with respect to
# all weights where they are trained, and one forward more where blocks are computed anew.
FORWARD_BACKWARD, WEIGHTS, ANEW = 2, 1, 1


def training_workload(settings: TrainSettings) -> Callable[[ModelConfig, str, Any, int], Workload]:
    """Returns the function that describes a training under these settings for a model, the dtype of its weights and a study's
    settings, in the way in which `study.study.workload` describes a study. Rows of text are as long as `settings.max_tokens`.

    The step is that of the recipe deep_refusal, which has the largest edits. A recipe that compares with the model before
    training runs that once more.
    """

    def described(cfg: ModelConfig, dtype: str, config: Any, length: int) -> Workload:
        settings.check(cfg)
        assumed = (
            f"{settings.steps} steps are done, each of {KINDS * settings.batch} rows of {settings.max_tokens} tokens, in as many "
            f"parts as the rows that fit at a time ask for, and that what is trained is {settings.method} in float32"
        )
        group = Group("training", "loss", partial(steps, settings=settings), assumed=assumed)
        return Workload(cfg, dtype, config, settings.max_tokens, (group,))

    return described


def steps(shapes: Shapes, rows: int, settings: TrainSettings) -> list[Program]:
    """Returns the step as a program. rows: of a part of the batch, at most."""
    total = KINDS * settings.batch
    part = min(rows, total)
    parts = max(total // part, 1)
    own = dataclasses.replace(settings, accumulate=parts)
    passes = FORWARD_BACKWARD + ANEW * settings.remat + WEIGHTS * (settings.method == "full")
    length = settings.max_tokens
    return [
        Program(
            f"step in {parts} parts" if parts > 1 else "step",
            partial(lowered_step, shapes, own, part * parts),
            runs=settings.steps,
            rows=part * parts,
            tokens=length,
            layers=shapes.work.cfg.n_layers,
            steps=passes,
            read=length,
        )
    ]


def lowered_step(shapes: Shapes, settings: TrainSettings, rows: int) -> jax.stages.Lowered:
    """Returns the step for batches of `rows` rows in all, lowered for the devices of the shapes."""
    cfg, mesh, length = shapes.work.cfg, shapes.mesh, settings.max_tokens
    none = np.zeros((1, length), np.int32)
    share = Share(TrainRows(none, none > 0, none.astype(np.float32)), 1, 0)
    own = DeepRefusalSettings()
    kinds = TwoKinds(share, share, own.refusal_weight, own.answer_weight)
    step = Step(TokenAblation(kinds, np.ones((1, cfg.d_model)), own, settings.steps), settings, mesh)
    trained = trained_shapes(cfg, settings, mesh)
    state = state_shapes(step.optimiser, trained, mesh)
    tokens, mask = shapes.prompts(rows, length)
    stand_ins: Any = (
        tokens,
        mask,
        shapes.array((rows, length), jnp.float32, "batch"),
        shapes.array((rows,), jnp.bool_, "batch"),
    )
    batch = KindRows(TrainRows(*stand_ins[:3]), stand_ins[3])
    extra = {"basis_jd": shapes.array((1, cfg.d_model), jnp.float32)}
    number = jax.ShapeDtypeStruct((), jnp.int32)
    return step.jitted(trained, state).lower(trained, state, shapes.decoder, batch, extra, number)
