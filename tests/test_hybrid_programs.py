"""The programs of models whose layers differ: what a TPU does with them, and what they communicate."""

import importlib.util
import json
import math
import os
import subprocess
import sys

import families
import hybrid_programs
import pytest
from hybrid_programs import TOKENS

from refusal_jax import Taps, make_mesh
from refusal_jax.models.hf_config import from_hf
from refusal_jax.models.mixers.attention import Attention
from refusal_jax.models.predict import predict
from refusal_jax.models.structure import structure
from refusal_jax.models.weights import weight_table
from refusal_jax.plan import hlo
from refusal_jax.plan.programs import Shapes
from refusal_jax.study.config import get_config
from refusal_jax.study.study import workload

ROWS, LENGTH = 16, 24
PERIODIC = {
    "qwen3_next": {"num_attention_heads": 8, "linear_num_key_heads": 8, "linear_num_value_heads": 16},
    "granitemoehybrid": {"num_attention_heads": 8, "num_local_experts": 0, "mamba_n_groups": 8},
}


def text_of(cfg, mesh) -> str:
    """Returns the compiled reading of prompts on the fake devices of this machine."""
    shapes = Shapes(workload(cfg, "float32", get_config(), LENGTH), make_mesh(*mesh))
    inputs = *shapes.prompts(ROWS), shapes.edits(ROWS)
    return predict.lower(shapes.decoder, *inputs, taps=Taps(), last=True).compile().as_text()


@pytest.mark.parametrize("family", PERIODIC)
@pytest.mark.parametrize("mesh", [(1, 1, 8), (2, 2, 2)])
def test_layers_of_every_kind_communicate_as_those_of_one_do(family, mesh):
    """Per layer, whatever it is, a chip gathers what its two mixers read and scatters what they add: no weights but along
    `fsdp`, and of the batch its own part."""
    cfg = from_hf(families.hf_config(family, **PERIODIC[family]))
    form, (data, fsdp, model) = structure(cfg), mesh
    assert len(form.mixers) == 2
    rows = ROWS // (data * fsdp)
    read, added = (rows, LENGTH, cfg.d_model), (rows // model, LENGTH, cfg.d_model)
    largest = max(math.prod(w.shape[path.startswith("blocks.") :]) for path, w in weight_table(cfg).items())
    counts = {}
    for i in hlo.collectives(text_of(cfg, mesh), hlo.Runs(shares=form.taken)):
        shape, of_layer = i.shapes[0][1], "while/body" in i.text
        if shape in (read, added) and of_layer:
            counts[i.kind] = counts.get(i.kind, 0) + i.times
        elif fsdp == 1 and of_layer:  # the norm of a state space's groups
            assert i.kind == "all-reduce" and i.bytes <= 4 * rows * LENGTH * 8, (i.kind, i.shapes, i.times)
        else:
            assert i.bytes <= 4 * max(math.prod(read), largest // model), (i.kind, i.shapes)
    one = counts.pop("reduce-scatter", 0) + counts.pop("all-reduce", 0)
    assert (one, counts) == (2 * cfg.n_layers, {"all-gather": 2 * cfg.n_layers})


@pytest.mark.parametrize("family", ["qwen3_next"])
def test_a_tpu_reads_long_prompts_of_hybrids_by_chunks_and_decodes_in_place(family):
    """By the real TPU compiler, 4,096 tokens: no loop of a layer has more turns than there are chunks of 64, the estimate is
    within twice that of attention in every layer, and a decode step copies no keys and no states."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu, the TPU compiler, is not installed")
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}  # libtpu knows none of a CPU's
    done = subprocess.run([sys.executable, hybrid_programs.__file__, family], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert 1 < found["turns"] <= TOKENS / 64, found
    assert 0 < found["hybrid"] < 2 * found["attention"], found
    assert found["temporary"] < found["cache"] / 10 and found["changed_in_place"] >= found["cache"], found


@pytest.mark.parametrize("kinds", ["periodic", "irregular"])
def test_programs_of_80_layers_of_several_kinds(kinds):
    """Tells that they have one loop body with each kind in it once, in whatever order layers have them."""
    own = PERIODIC["qwen3_next"]
    orders = {"periodic": "llla" * 20, "irregular": ("llalllaall" * 8)}

    def size(layers: str) -> int:
        names = {"l": "linear_attention", "a": "full_attention"}
        cfg = from_hf(
            families.hf_config(
                "qwen3_next", **own, num_hidden_layers=len(layers), layer_types=[names[one] for one in layers]
            )
        )
        assert [isinstance(structure(cfg).mixers[i], Attention) for i in structure(cfg).mixer_l] == [
            one == "a" for one in layers
        ]
        shapes = Shapes(workload(cfg, "float32", get_config(), LENGTH), None)
        inputs = *shapes.prompts(ROWS), shapes.edits(ROWS)
        return len(predict.lower(shapes.decoder, *inputs, taps=Taps(), last=True).as_text().splitlines())

    assert size(orders[kinds]) == size(orders[kinds][:10])


def test_choices_have_their_names_in_compiled_programs():
    """Tells so by the branch that makes keys: it runs in the layers that attend."""
    cfg = from_hf(families.hf_config("granitemoehybrid", **PERIODIC["granitemoehybrid"]))
    form = structure(cfg)
    named = {
        i.times
        for i in hlo.instructions(text_of(cfg, (1, 1, 1)), hlo.Runs(shares=form.taken))
        if "bkgth,bkch" in i.text
    }
    layers = sum(isinstance(form.mixers[index], Attention) for index in form.mixer_l)
    assert named == {layers} and layers < cfg.n_layers
