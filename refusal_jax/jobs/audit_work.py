"""Describes what an audit runs and reads, so that it can be planned: the lanes that run models are made of a study's programs."""

import dataclasses
import math

import jax.numpy as jnp

from refusal_jax.audit.settings import AuditSettings
from refusal_jax.models.config import ModelConfig
from refusal_jax.models.weights import weight_table
from refusal_jax.plan.costs import gib
from refusal_jax.plan.limits import parameters
from refusal_jax.plan.programs import Group, Program, Shapes, Workload
from refusal_jax.study import completions, directions
from refusal_jax.study.config import StudyConfig

MODELS = 2  # the candidate and its base
FLOAT32 = 4  # bytes


def audit_workload(cfg: ModelConfig, dtype: str, config: StudyConfig, length: int) -> Workload:
    """Returns the programs of the lanes "activations" and "behaviour" of an audit with a base, under the audit's own numbers of
    prompts and tokens. config: batch sizes are taken from it. length: tokens that prompts are padded to."""
    settings, asked = AuditSettings(), StudyConfig.of(config)
    asked.data.update(n_train=settings.n_fit, n_val=settings.n_test, n_test=settings.n_test, over_refusal=())
    asked.generation.max_new_tokens = settings.max_new_tokens
    asked.generation.conditions = ("harmful_baseline", "harmless_baseline")
    stages = (("activations", directions.STAGE.programs), ("behaviour", completions.STAGE.programs))
    groups = tuple(of_both(name, group) for name, group in stages if group)
    beside = (MODELS - 1) * parameters(cfg) * jnp.dtype(dtype).itemsize
    return Workload(cfg, dtype, asked, length, groups, beside)


def of_both(name: str, group: Group) -> Group:
    """Returns a stage's programs as they run for the candidate and for its base, one after the other."""

    def describe(shapes: Shapes, rows: int) -> list[Program]:
        return [dataclasses.replace(one, runs=MODELS * one.runs) for one in group.describe(shapes, rows)]

    return dataclasses.replace(group, name=name, describe=describe)


def reading(cfg: ModelConfig, dtype: str) -> str:
    """Returns what the lanes that only read weights need, in words: bytes from the disk, and memory."""
    stored = parameters(cfg) * jnp.dtype(dtype).itemsize
    matrices = (
        [size for size, axis in zip(one.shape, one.axes, strict=True) if axis not in ("layers", "experts")]
        for one in weight_table(cfg).values()
    )
    largest = max(map(math.prod, matrices))
    both, one = gib(MODELS * stored), gib(stored)
    return (
        f"The lanes of weights run no model and need no accelerator. 'files' and 'weights' each read {both}, both checkpoints "
        f"once, and 'alone' reads {one}; they hold a few matrices of both in float32, of which the largest takes "
        f"{gib(FLOAT32 * largest)}."
    )
