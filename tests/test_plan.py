"""Planning: slices by name, what compiled text says, meshes and batches that fit; and the real TPU compiler where it is."""

import dataclasses
import importlib.util
import json
import math
import os
import subprocess
import sys
from types import SimpleNamespace

import decode_programs
import families
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import forked
from real_models import REAL_MODELS

from refusal_jax import UserError
from refusal_jax.audit.settings import AuditSettings
from refusal_jax.jobs import help
from refusal_jax.jobs import main as command
from refusal_jax.jobs.audit_work import audit_workload, reading
from refusal_jax.models.hf_config import from_hf, load_config
from refusal_jax.models.layers import block_rows
from refusal_jax.plan import chips, costs, hlo, known, limits, planner, programs, table
from refusal_jax.plan.chips import Slice
from refusal_jax.plan.planner import MeshShape, Sizes, fit, make_plan, ranked_meshes, run_mesh, run_sizes
from refusal_jax.plan.programs import Group, Program, Shapes, Workload
from refusal_jax.study.config import get_config
from refusal_jax.study.mechanism.run import MECHANISM
from refusal_jax.study.study import workload


def work_of(name: str = "llama_3_70b", **config) -> Workload:
    settings = get_config()
    settings.update_from_flattened_dict(config)
    return workload(known.config_of(name), "bfloat16", settings, 64)


@pytest.mark.parametrize(
    "text,shape,count,name",
    [
        ("v5e-16", (4, 4), 16, "v5e-16"),
        ("v5litepod-8", (2, 4), 8, "v5e-8"),
        ("v5p-16", (2, 2, 2), 8, "v5p-16"),  # TensorCores
        ("v4-32", (2, 2, 4), 16, "v4-32"),
        ("V6E:4x4", (4, 4), 16, "v6e-16"),
        ("2xv5e-16", (4, 4), 32, "2xv5e-16"),
        ("tpu7x-16", (2, 2, 2), 8, "tpu7x-16"),
    ],
)
def test_slices_are_named_as_in_gcloud(text, shape, count, name):
    where = Slice.parse(text)
    assert (where.shape, where.chips, where.name) == (shape, count, name)
    assert where.size == count * (2 if where.chip.name == "tpu7x" else 1)  # of which a chip is two devices


@pytest.mark.parametrize("text", ["a100-8", "v5e", "v9-8", "", "v5e-", "xv5e-8", "0xv5e-8"])
def test_other_names_are_an_error(text):
    with pytest.raises(
        UserError, match=r"is no TPU slice that can be planned for\. Name one as gcloud does \(v4-8, .*v6e-256"
    ):
        Slice.parse(text)


@pytest.mark.parametrize("text", ["v5e-12", "v5p-7", "v5e:2x2x2", "v5p:3x3x3"])
def test_slices_that_there_are_not(text):
    with pytest.raises(UserError, match=rf"There is no {text}\. Slices of v5"):
        Slice.parse(text)


TEXT = """HloModule m

%fused (p: f32[8,4]) -> f32[8,4] {
  ROOT %inner = f32[8,4]{1,0} all-reduce(%p)
}

%body (arg: (s32[], bf16[8,4])) -> (s32[], bf16[8,4]) {
  %x = bf16[8,4]{1,0:T(8,128)(2,1)S(1)} fusion(%arg), kind=kLoop, calls=%fused, backend_config={"estimated_cycles":"100"}
  %g = (bf16[8,4]{1,0}, u32[]) all-gather-start(%x), replica_groups={{0,1}}
  %huge = f32[2]{0} fusion(%x), calls=%fused, backend_config={"estimated_cycles":"9223372036854775807"}
}

%until (arg: (s32[], bf16[8,4])) -> pred[] {
  %limit = s32[]{:T(128)} constant(12)
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

%asked (arg: (s32[])) -> pred[] {
  ROOT %go = pred[] and(%a, %b)
}

%outer (arg: (s32[])) -> (s32[]) {
  %w = (s32[], bf16[8,4]) while(%t), condition=%until, body=%body
}

ENTRY %main (a: f32[4]) -> f32[4] {
  %r = f32[4]{0} reduce-scatter(%a), dimensions={0}
  %loop = (s32[]) while(%t), condition=%asked, body=%outer, backend_config={"estimated_cycles":"7"}
  ROOT %k = f32[4]{0} copy(%r), backend_config={"estimated_cycles":"5"}
}
"""


def test_a_programs_text_is_counted_as_often_as_it_runs():
    found = {i.kind: (i.times, i.bytes) for i in hlo.collectives(TEXT, hlo.Runs(3))}
    assert found == {"all-gather": (36, 2 * 32 + 4), "reduce-scatter": (1, 16)}
    assert hlo.cycles(TEXT, hlo.Runs(3)) == 36 * 100 + 5  # an estimate that is none counts as nothing


def test_text_of_a_loop_that_xla_compiled():
    def step(x, _):
        return jnp.sin(x @ x), None

    text = jax.jit(lambda x: jax.lax.scan(step, x, length=37)[0]).lower(jnp.ones((16, 16))).compile().as_text()
    assert any(i.times == 37 for i in hlo.instructions(text))


CHOICE = """HloModule m

%one (arg: f32[4]) -> f32[4] {
  ROOT %g = f32[8]{0} all-gather(%arg), dimensions={0}
}

%turn (arg: (s32[])) -> (s32[]) {
  %r = f32[4]{0} all-reduce(%x), to_apply=%sum, backend_config={"estimated_cycles":"10"}
}

%loop (arg: f32[4]) -> f32[4] {
  %w = (s32[]) while(%t), condition=%until, body=%turn, backend_config={"known_trip_count":{"n":"5"}}
}

%until (arg: (s32[])) -> pred[] {
  ROOT %go = pred[] and(%a, %b)
}

%other (arg: f32[4]) -> f32[4] {
  ROOT %k = f32[4]{0} copy(%arg), backend_config={"estimated_cycles":"100"}
}

ENTRY %main (a: f32[4]) -> f32[4] {
  %c = f32[4]{0} conditional(%i, %a, %a, %a), branch_computations={%one, %loop, %other}, metadata={op_name="jit(f)/mixer/cond"}
  ROOT %d = f32[4]{0} conditional(%p, %c, %c), true_computation=%other, false_computation=%one
}
"""


def test_branches_are_counted_as_often_as_they_are_taken():
    taken = {"mixer": (0.5, 0.25, 0.25), "channel": (1.0,)}
    found = [(i.kind, i.times) for i in hlo.collectives(CHOICE, hlo.Runs(shares=taken))]
    assert found == [("all-gather", 0.5), ("all-reduce", 1.25), ("all-gather", 0.5)]  # the last by an unknown choice
    assert hlo.cycles(CHOICE, hlo.Runs(shares=taken)) == 1.25 * 10 + (0.25 + 0.5) * 100
    even = hlo.cycles(CHOICE, hlo.Runs(shares={"mixer": (0.5, 0.5)}))  # another choice of that name
    assert even == hlo.cycles(CHOICE) == pytest.approx(5 / 3 * 10 + (1 / 3 + 0.5) * 100)


ASIDE = """HloModule m

%called (arg: f32[4]) -> f32[4] {
  %k = f32[4]{0} copy(%arg), backend_config={"estimated_cycles":"9"}
  ROOT %r = f32[4]{0} all-reduce(%k), to_apply=%sum
}, execution_thread="sparsecore"

%computed (arg: f32[4]) -> f32[4] {
  ROOT %c = f32[4]{0} custom-call(%arg), custom_call_target="x", called_computations={%called}
}, execution_thread="sparsecore"

%block (arg: (s32[])) -> (s32[]) {
  %d = f32[4]{0} copy(%x), backend_config={"estimated_cycles":"100"}
}

%until (arg: (s32[])) -> pred[] {
  ROOT %go = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (a: f32[4]) -> f32[4] {
  %s = ((f32[4]), f32[4]) async-start(%a), async_execution_thread="sparsecore", calls=%computed
  %w = (s32[]) while(%t), condition=%until, body=%block, metadata={op_name="jit(f)/channel/experts/while"}
  %v = (s32[]) while(%t), condition=%until, body=%block, metadata={op_name="jit(f)/while"}
  ROOT %u = f32[4]{0} async-done(%s)
}
"""


def test_communication_of_other_cores_and_loops_with_a_name():
    """What other cores compute costs nothing, what they send is there; a loop by name runs as often as is said of its name."""
    assert [(i.kind, i.times) for i in hlo.collectives(ASIDE)] == [("all-reduce", 1)]
    assert hlo.cycles(ASIDE, hlo.Runs(3, {"experts": 2.5})) == (2.5 + 3) * 100


def test_models_that_are_known_by_name():
    """By the hub's name, its last part, and the name of their settings; the table has the paper's and today's."""
    assert known.repo_of("llama_3_70b") == known.repo_of("Meta-Llama-3-70B-Instruct")
    assert known.repo_of("deepseek-ai/DeepSeek-V3") == known.repo_of("deepseek_v3") and known.repo_of("nobody") is None
    tables = [model.table for model in known.KNOWN.values()]
    assert tables.count("paper") == 13 and tables.count("today") >= 20 and set(tables) == {"paper", "today", ""}
    assert all(model.name for model in known.KNOWN.values() if model.table)
    assert len(known.NAMES) == sum(bool(model.name) for model in known.KNOWN.values())
    with pytest.raises(KeyError, match="nobody"):
        known.config_of("nobody")
    mixture = from_hf(REAL_MODELS["Mixtral-8x7B-Instruct-v0.1"].config)
    assert limits.parameters(mixture, active=True) < 0.3 * limits.parameters(mixture)


def real(name: str) -> Workload:
    return workload(from_hf(REAL_MODELS[name].config), "bfloat16", get_config(), 64)


def prefill(work: Workload, tokens: int, **more) -> Program:
    """Returns a program that reads one row of so many tokens."""
    return Program("prefill", lambda: pytest.fail("it is not compiled"), 1, 1, tokens, work.cfg.n_layers, **more)


def test_work_of_hybrids():
    """Active parameters as published, to the embeddings; attention costs more per token in longer prompts, states do not."""
    work = real("Qwen3-Next-80B-A3B-Instruct")
    cfg = work.cfg
    assert limits.parameters(cfg, active=True) == pytest.approx(3.56e9, rel=0.01)
    assert limits.mlp_width(cfg) == 10 * 512 + 512
    attention, states = 4 * 16 * 256 * 12, 6 * 36 * (32 * 128 * 128 + 3 * 8192)
    for tokens in (64, 4096):
        found = limits.flops(work, prefill(work, tokens)) - 2 * cfg.vocab_size * cfg.d_model
        in_layers = 2 * (limits.parameters(cfg, active=True) - cfg.vocab_size * cfg.d_model)
        assert found == tokens * (in_layers + attention * tokens + states)
    matrices = 36 * 32 * 128 * 128 * 4
    windows, keys = 36 * 3 * 8192 * 2, 12 * 2 * 2 * 256 * 2 * work.slots
    assert limits.cache_bytes(work, 1) == matrices + windows + keys
    # Of 16 chips 2 share the keys and 16 the states, whose windows of keys have 16 heads, too.
    assert limits.cache_bytes(work, 3, 16, states=2) == 3 * (2 * (matrices + windows) // 16 + keys // 2)


def test_work_of_latents_and_of_dense_layers_before_experts():
    work = real("DeepSeek-V3")
    cfg = work.cfg
    assert limits.parameters(cfg, active=True) == pytest.approx(37e9, rel=0.02)
    assert limits.mlp_width(cfg) == (3 * 18432 + 58 * 9 * 2048) / 61
    assert limits.cache_bytes(work, 1, 16) == 61 * 576 * 2 * work.slots  # which each chip has as a whole
    step, prompt = (limits.flops(work, prefill(work, 1, cached=n)) for n in (1000, 0))
    assert step - prompt == 61 * 128 * 2 * (1001 * 2 * 576 - (128 + 64 + 128))
    gemma = real("gemma-4-E2B-it").cfg
    assert limits.mlp_width(gemma) == (15 * 6144 + 20 * 12288) / 35
    assert limits.parameters(gemma, active=True) == limits.parameters(gemma) - 262144 * 35 * 256


def test_blocks_of_experts_are_those_of_random_routing():
    cfg = real("Qwen3-30B-A3B").cfg
    for tokens in (16, 128, 2048):
        rows = block_rows(tokens * 8, 128)
        draws = np.random.default_rng(0).random((50, tokens, 128)).argsort(-1)[..., :8]
        counts = [np.bincount(draw.ravel(), minlength=128) for draw in draws]
        found = np.mean([np.ceil(count / rows).sum() for count in counts])
        assert limits.expert_turns(cfg, tokens) == pytest.approx(found, rel=0.03)


def test_the_limit_is_what_takes_longest():
    """Decoding is bound by memory, prompts on one chip by operations, and on many by what is sent; estimates are above it."""
    work, where = work_of("llama_3_8b"), Slice.parse("v5e-16")
    prompt, one = prefill(work, 4096), Slice.parse("v5e-1")
    step = dataclasses.replace(prefill(work, 1, cached=64), rows=8)
    for program, mesh, chips_, binds in (
        (prompt, MeshShape(1, 1, 1), one, "compute"),
        (step, MeshShape(1, 1, 1), one, "memory"),
        (prompt, MeshShape(1, 1, 16), where, "network"),
    ):
        limit = limits.limit(work, program, mesh, chips_)
        assert limit.binds == binds and 0 < limit.seconds < costs.estimate(work, program, mesh, chips_)
    assert limits.limit(work, prompt, MeshShape(1, 1, 1), one).seconds == limits.flops(work, prompt) / one.chip.flops
    both = limit + limits.Limit(compute=2 * limit.seconds)
    assert both.binds == "compute" and both.seconds == pytest.approx(3 * limit.seconds) == limit.times(3).seconds


def test_of_experts_the_chosen_are_read():
    """One token reads 8 of 128 experts, many tokens all of them, once."""
    work, alone = real("Qwen3-30B-A3B"), MeshShape(1, 1, 1)
    few, many = (limits.traffic(work, prefill(work, tokens), alone) for tokens in (1, 2048))
    experts = 48 * 3 * 2048 * 768 * 2
    assert few == pytest.approx(2 * limits.parameters(work.cfg, active=True), rel=0.01)
    assert many - few > 0.99 * 120 * experts
    once, block = limits.block_work(work, prefill(work, 1), alone)
    assert once[1] == pytest.approx(8 * experts) and block[1] == experts / 48 + 4 * 8 * 2048 * 2


def test_a_plan_that_compiles_nothing():
    """In seconds, for every kind of model, and with every estimate above its limit."""
    for name in ("llama_3_8b", "gemma_4_e2b", "glm_4_7_flash", "granite_4_h_small", "falcon_h1_0_5b"):
        plan = make_plan(work_of(name), Slice.parse("tpu7x-8"), compiling=False)
        assert not plan.problems and plan.mesh is not None and plan.mesh.size == 8
        assert plan.peak > limits.weight_bytes(plan.work) / 8 and plan.sizes == planner.WANTED
        for stage in plan.stages.values():
            assert 0 < stage.limit.seconds < stage.seconds and not stage.cycles
    text = table.detail(plan, "falcon")
    assert "(4 chips, 8 devices of 94.7 GiB)" in text and "operations and bytes" in text
    assert table.as_json("falcon", plan)["limit"]["memory"] == plan.limit.memory


def test_work_grows_as_it_should():
    """Selection with the candidates, extraction not at all."""
    mesh, where = MeshShape(1, 1, 16), Slice.parse("v5e-16")

    def seconds(*names, **config):
        work = work_of(**config)
        found = programs.programs(Shapes(work, None), planner.WANTED)
        return sum(p.runs * costs.estimate(work, p, mesh, where) for p in found if p.name in names)

    few, many = ({"positions": n, "select.full_grid": True} for n in (4, 16))
    assert seconds("scores", "induce", **many) == pytest.approx(4 * seconds("scores", "induce", **few), rel=0.02)
    assert seconds("extraction", **many) == seconds("extraction", **few)


@pytest.mark.parametrize(
    "model,where,fits",
    [
        ("qwen_1_8b", "v5e-1", True),
        ("llama_3_70b", "v5e-16", True),
        ("qwen_72b", "v5e-8", False),
        ("qwen_72b", "v5p-16", True),
    ],
)
def test_meshes_hold_the_weights(model, where, fits):
    work, where = work_of(model), Slice.parse(where)
    ranked = ranked_meshes(work, where, planner.WANTED)
    assert bool(ranked) == fits
    for mesh in ranked:
        assert mesh.size == where.chips
        assert limits.weight_bytes(work) / mesh.fsdp / mesh.model < where.chip.hbm


def test_only_data_crosses_slices():
    assert all(mesh.data % 2 == 0 for mesh in ranked_meshes(work_of(), Slice.parse("2xv5e-16"), planner.WANTED))


SHAPES = object.__new__(Shapes)  # nothing of it is read


def program(rows: int, peak: int, error: str = ""):
    """A stand-in for one that needs `peak` bytes a row."""

    def compiled():
        if error:
            raise jax.errors.JaxRuntimeError(error)
        analysis = SimpleNamespace(peak_memory_in_bytes=rows * peak)
        return SimpleNamespace(memory_analysis=lambda: analysis)

    return Program("step", lambda: SimpleNamespace(compile=compiled), runs=1, rows=rows, tokens=1, layers=1)


def test_batches_are_halved_until_they_fit():
    rows, done, why = fit(SHAPES, 0, 128, lambda _, rows: [program(rows, 10)], 700.0, 1)
    assert rows == 64 and len(done) == 1 and not why
    rows, done, why = fit(SHAPES, 0, 128, lambda _, rows: [program(rows, 1000)], 700.0, 1)
    assert rows == 0 and why == "step needs 0.0 GiB a chip in 8 rows, of 0.0 GiB"
    assert (
        fit(SHAPES, 0, 8, lambda _, rows: [program(rows, 1)], 700.0, 16)[0] == 16
    )  # a row for every part of the batch
    assert fit(SHAPES, 0, 128, lambda _, rows: [program(rows, 10)], 700.0, 6)[0] == 60  # whole shares of each
    assert fit(SHAPES, 4, 128, lambda _, rows: [program(rows, 10)], 700.0, 1)[0] == 4  # as the user has set it
    assert fit(SHAPES, 100, 128, lambda _, rows: [program(rows, 10)], 700.0, 1)[0] == 0


def test_what_the_compiler_says_of_memory_is_kept_and_other_errors_are_raised():
    _, _, why = fit(SHAPES, 0, 8, lambda _, rows: [program(rows, 1, "RESOURCE_EXHAUSTED: Ran out of Hbm")], 700.0, 1)
    assert "Ran out of Hbm" in why
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        fit(SHAPES, 0, 8, lambda _, rows: [program(rows, 1, "INTERNAL: a bug")], 700.0, 1)


@pytest.fixture
def tiny_work(llama):
    config = get_config()
    config.generation.max_new_tokens = 16
    config.batch_size = config.select.batch_size = config.generation.batch_size = config.loss.batch_size = 8
    return workload(load_config(llama), "float32", config, 16)


def test_a_plan_of_programs_that_really_compile(tiny_work, monkeypatch):
    """On the fake devices of this machine, in place of a slice's."""
    monkeypatch.setattr(Slice, "devices", lambda self: jax.devices()[: self.chips])
    plan = make_plan(tiny_work, Slice.parse("v5e-8"), MeshShape(2, 1, 4))
    assert set(plan.stages) == {"extraction", "selection", "completions", "loss"} and not plan.problems
    assert plan.seconds > 0 and plan.peak > 0 and plan.sizes == Sizes(8, 8, 8, 8)
    text = table.detail(plan, "tiny")
    assert "mesh: data 2 × model 4" in text and "chip-hours" in text
    assert "| tiny | v5e-8 | data 2 × model 4 | 8/8/8/8 |" in table.markdown([("tiny", plan)])
    assert json.loads(json.dumps(table.as_json("tiny", plan)))["mesh"] == {"data": 2, "fsdp": 1, "model": 4}


@pytest.mark.parametrize("family,variant", [("gemma4_text", "gqa"), ("nemotron_h", None), ("qwen3_5_text", "gqa")])
def test_every_program_of_a_study_can_be_traced(family, variant, tmp_path):
    """Also where layers are told of the tokens besides the residual stream, and where they differ in kind."""
    folder = families.tiny_model(tmp_path, family, variant or next(iter(families.FAMILIES[family])))
    work = workload(load_config(folder), "float32", get_config(), 16)
    for program in programs.programs(Shapes(work, None), Sizes(2, 2, 2, 2)):
        assert program.lower().out_info is not None, program.name


def test_a_mechanism_is_planned(llama, monkeypatch):
    """All its parts, with room for suffixes after the prompts."""
    monkeypatch.setattr(Slice, "devices", lambda self: jax.devices()[: self.chips])
    config = get_config()
    config.batch_size = 8
    work = MECHANISM.workload(load_config(llama), "float32", config, 16)
    assert [group.name for group in work.groups[:2]] == ["suffixes", "attribution"] and work.length == 40
    (suffixes,), (attribution,) = (group.describe(Shapes(work, None), 8) for group in work.groups[:2])
    assert (suffixes.runs, attribution.runs) == (2 * 13 + 2 * 13, 50)
    work = dataclasses.replace(work, groups=work.groups[:2])
    plan = make_plan(work, Slice.parse("v5e-4"), MeshShape(1, 1, 4))
    assert set(plan.stages) == {"suffixes", "attribution"} and not plan.problems and plan.seconds > 0


def test_an_audit_is_planned_with_both_models(llama, monkeypatch):
    """Twice the runs of the same programs, and the base's weights beside the candidate's."""
    monkeypatch.setattr(Slice, "devices", lambda self: jax.devices()[: self.chips])
    config, cfg, settings = get_config(), load_config(llama), AuditSettings()
    config.batch_size = config.generation.batch_size = 8
    work = audit_workload(cfg, "float32", config, 16)
    assert [group.name for group in work.groups] == ["activations", "behaviour"]
    (extract,), (admit, decode) = (group.describe(Shapes(work, None), 8) for group in work.groups)
    assert extract.runs == 2 * 2 * (math.ceil(settings.n_fit / 8) + math.ceil(settings.n_test / 8))
    assert decode.runs == 2 * 2 * settings.n_test / 8 and decode.steps == settings.max_new_tokens
    assert admit.runs >= decode.runs
    where, mesh = Slice.parse("v5e-4"), MeshShape(1, 1, 4)
    plan, alone = (make_plan(one, where, mesh) for one in (work, dataclasses.replace(work, beside=0)))
    assert set(plan.stages) == {"activations", "behaviour"} and not plan.problems
    assert plan.peak - alone.peak == limits.weight_bytes(work) // 4
    text = table.detail(plan, "tiny")
    assert "forward 8, generation 8;" in text and "selection" not in text
    assert "loss" not in text and "behaviour" in table.markdown([("tiny", plan)])
    said = reading(known.config_of("llama_3_70b"), "bfloat16")
    assert "'files' and 'weights' each read 262.8 GiB" in said and "the largest takes 3.9 GiB" in said
    assert config.generation.max_new_tokens == get_config().generation.max_new_tokens


def test_a_plan_says_what_does_not_fit(tiny_work, monkeypatch):
    monkeypatch.setattr(Slice, "devices", lambda self: jax.devices()[: self.chips])
    where = Slice.parse("v5e-4")
    small = Slice(chips.dataclasses.replace(where.chip, hbm=30e3), where.shape)
    plan = make_plan(tiny_work, small, MeshShape(1, 1, 4))
    assert plan.problems and all("GiB" in problem for problem in plan.problems)
    assert "does not fit" in table.detail(plan, "tiny") and "does not fit" in table.markdown([("tiny", plan)])
    none = make_plan(work_of("qwen_72b"), Slice.parse("v5e-4"))
    assert (
        none.mesh is None and "does not fit" in table.detail(none, "q") and "134.6 GiB of weights" in none.problems[0]
    )
    assert "- v5e-4 does not hold q." in table.markdown([("q", none)])
    with pytest.raises(UserError, match="The mesh data 2 has 2 devices, v5e-4 has 4"):
        make_plan(tiny_work, where, MeshShape(2, 1, 1))


def device(kind: str, limit: int = 0):
    return SimpleNamespace(
        platform="tpu", device_kind=kind, memory_stats=lambda: {"bytes_limit": limit} if limit else None
    )


def test_a_run_decides_by_the_same_code(tiny_work, monkeypatch):
    assert run_mesh(tiny_work, tiny_work.config.mesh, jax.devices()) is None  # a CPU: one device
    assert run_sizes(tiny_work, None, jax.devices()) == Sizes(8, 8, 8, 8)
    open_ = workload(tiny_work.cfg, "float32", get_config(), 16)
    assert run_sizes(open_, None, jax.devices()) == planner.ON_CPU
    given = get_config().mesh
    given.model = 4
    assert dict(run_mesh(tiny_work, given, jax.devices()).shape) == {"data": 1, "fsdp": 1, "model": 4}
    made = []
    monkeypatch.setattr(planner, "make_mesh", lambda *sides, **named: made.append(sides or named))
    run_mesh(work_of("llama_3_70b"), get_config().mesh, [device("TPU v5 lite")] * 16)
    run_mesh(tiny_work, get_config().mesh, [device("H100")] * 2)
    assert made == [(1, 1, 16), {"model": 2}]
    with pytest.raises(UserError, match=r"The model does not fit these 4 chips: 134\.6 GiB of weights"):
        run_mesh(work_of("qwen_72b"), get_config().mesh, [device("TPU v5 lite")] * 4)


def test_a_run_that_does_not_fit_says_so(tiny_work, monkeypatch):
    group = Group("huge", "forward", lambda shapes, rows: [program(rows, 1 << 30)])
    work = Workload(tiny_work.cfg, "float32", get_config(), 16, (group,))
    with pytest.raises(UserError, match=r"The study does not fit these devices: step needs 8\.0 GiB a chip in 8 rows"):
        run_sizes(work, None, [device("H100", limit=1 << 20)])


@pytest.mark.parametrize(
    "argv,message",
    [
        (["--model=nowhere"], "'nowhere' is no checkpoint folder, no config.json and none of the models known by name"),
        (["--model=gone/config.json"], "gone/config.json does not exist"),
        (["--model=qwen_72b", "--topology=v7-8"], "v7-8 is no TPU slice"),
        ([], "Name a model with --model"),
        (["--model=qwen_72b", "--out=."], "--out=. is no name for files"),
        (["--model=qwen_72b", "--config.data.n_val=0"], "--config.data.n_val = 0, expected at least 1"),
        (["--model=qwen_72b", "--mesh=16"], "--mesh=16 is not of the form DATAxFSDPxMODEL"),
    ],
)
def test_bad_requests(argv, message):
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu, the TPU compiler, is not installed")
    done = forked("plan", *argv, env={"XLA_FLAGS": ""})
    assert done.returncode == 2 and message in " ".join(done.stderr.split()), done.stderr


WITHOUT_FLAGS = {
    name: value for name, value in os.environ.items() if name != "XLA_FLAGS"
}  # libtpu knows none of a CPU's


def test_without_the_compiler_it_says_what_to_install():
    code = (
        "import sys; sys.modules['libtpu'] = None; from refusal_jax.jobs.main import main; "
        "sys.argv[1:] = ['plan', '--model=qwen_72b']; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=WITHOUT_FLAGS)
    assert done.returncode == 2 and "not installed here: pip install 'refusal-jax[plan]'" in " ".join(
        done.stderr.split()
    )


def test_a_topology_without_a_compiler(monkeypatch):
    from jax.experimental import topologies

    def missing(**settings):
        raise RuntimeError("no libtpu")

    monkeypatch.setattr(topologies, "get_topology_desc", missing)
    with pytest.raises(UserError, match=r"There is no TPU compiler for v5e:4x4 here \(no libtpu\)"):
        Slice.parse("v5e-16").devices()


@pytest.mark.parametrize("name,rows", [("llama_3_70b", 128), ("qwen_72b", 32)])
def test_decoding_copies_no_cache(name, rows):
    """By the real TPU compiler: a step's temporary memory is under a tenth of the cache that a chip would have without a share of
    the rows, and it changes its own part in place, with shared key/value heads or not."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu, the TPU compiler, is not installed")
    step = [sys.executable, decode_programs.__file__, name, "v5e-16", str(rows)]
    done = subprocess.run(step, capture_output=True, text=True, env=WITHOUT_FLAGS)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    cache = {"llama_3_70b": 2 * found["cache"], "qwen_72b": found["cache"]}[name]
    assert found["temporary"] < cache / 10 and found["cache"] <= found["changed_in_place"] < 1.2 * found["cache"], found
    # The residual of all rows is gathered twice and summed twice; besides, only queries and what they find are exchanged.
    kinds = {"all-gather": 2, "all-reduce": 2} | ({"all-to-all": 2} if name == "llama_3_70b" else {})
    counts = dict.fromkeys(kinds, 0)
    for line, count in found["a_layer"].items():
        counts[line.split()[0]] += count
    assert counts == kinds, found


def test_the_command_knows_the_job():
    assert "plan" in command.JOBS and "without a TPU" in help.usage(command.JOBS)
