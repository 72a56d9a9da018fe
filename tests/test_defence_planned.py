"""The plan of a defence's training: its step is compiled from shapes, holds no merged matrices, and is cut as memory asks."""

import jax
import pytest

from refusal_jax.defence.planned import steps, training_workload
from refusal_jax.models.hf_config import load_config
from refusal_jax.plan import costs, table
from refusal_jax.plan.chips import Slice
from refusal_jax.plan.hlo import instructions
from refusal_jax.plan.planner import MeshShape, make_plan
from refusal_jax.plan.programs import Shapes
from refusal_jax.study.config import get_config
from refusal_jax.training.settings import TrainSettings

MOVED = ("parameter", "get-tuple-element", "tuple", "bitcast", "copy", "while")  # what computes no values


@pytest.fixture(scope="module")
def work(llama):
    settings = TrainSettings.of({"rank": 2, "batch": 8, "steps": 5, "max_tokens": 16, "warmup": 1})
    return settings, training_workload(settings)(load_config(llama), "float32", get_config(), 64)


def test_a_defence_is_planned_and_its_step_holds_no_merged_matrices(work, monkeypatch):
    """On the fake devices of this machine, in place of a slice's. No instruction computes an array of the size of a matrix, or
    of a stack of matrices: factors stay apart."""
    texts = []

    def kept(compiled):
        texts.append(compiled.as_text())
        return texts[-1]

    monkeypatch.setattr(Slice, "devices", lambda self: jax.devices()[: self.chips])
    monkeypatch.setattr(costs, "text_of", kept)
    cfg = work[1].cfg
    plan = make_plan(work[1], Slice.parse("v5e-4"), MeshShape(4, 1, 1))
    assert set(plan.stages) == {"training"} and not plan.problems and plan.seconds > 0 and plan.peak > 0
    text = table.detail(plan, "tiny")
    assert "mesh: data 4; rows of a batch: loss 32; prompts padded to 16 tokens" in text
    assert "5 steps are done, each of 16 rows of 16 tokens" in table.assumed(work[1])
    matrices = {(cfg.d_mlp, cfg.d_model), (cfg.d_model, cfg.d_mlp)}
    stacked = {(cfg.n_layers, *shape) for shape in matrices}
    computed = [i for i in instructions(texts[0]) if i.kind not in MOVED]
    assert len(computed) > 100
    for one in computed:
        found = {shape for _, shape in one.shapes}
        assert not found & stacked, one.text
        assert not found & matrices or one.kind in ("dynamic-slice", "fusion"), one.text


def test_a_batch_is_cut_into_the_parts_that_fit_and_passes_are_counted(work):
    settings, planned = work
    shapes = Shapes(planned, None)
    (whole,), (cut,) = steps(shapes, 32, settings), steps(shapes, 4, settings)
    assert (whole.name, whole.rows, whole.runs, whole.steps) == ("step", 16, 5, 3)
    assert (cut.name, cut.rows, cut.read) == ("step in 4 parts", 16, 16)
    kept = TrainSettings.of({**settings, "remat": False, "method": "full"})
    assert steps(shapes, 32, kept)[0].steps == 3
