"""A study makes ready what later stages need while earlier ones run: programs are compiled once, and not by the stage itself."""

import dataclasses
import threading
import weakref
from collections import Counter
from functools import partial

import jax
import numpy as np
import pytest

from refusal_jax import load_model
from refusal_jax.chat import prefix
from refusal_jax.chat.padding import TokenBatch
from refusal_jax.edits import Edits
from refusal_jax.models.sharding import make_mesh
from refusal_jax.runs.artifacts import NO_DIRECTION
from refusal_jax.runs.run import Run
from refusal_jax.runs.stage import Stage
from refusal_jax.study.ahead import Ahead
from refusal_jax.study.shared import Study
from refusal_jax.study.study import run_study

PROMPTS = ["Bake bread.", "Rob a bank, please.", "Bake a cake.", "Sing.", "Tell a story about the sea."]
GENERATION = {"empty", "admit", "decode"}


@pytest.fixture
def compilations():
    """Counts compilations by program and thread."""
    found = Counter()

    def count(event: str, duration_secs: float, **kwargs) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            found[kwargs["fun_name"].removeprefix("jit(").removesuffix(")"), threading.current_thread().name] += 1

    jax.clear_caches()
    jax.monitoring.register_event_duration_secs_listener(count)
    yield found
    jax.monitoring.unregister_event_duration_listener(count)


def edits_of(model, count: int) -> Edits:
    """Returns a row of edits for each of `count` prompts, of two kinds in turn."""
    ablation = Edits.ablate(np.ones((1, 1, model.config.d_model), np.float32))
    none = Edits.none(model.config.d_model)
    return Edits.concat([none, ablation]).take([i % 2 for i in range(count)])


def decoded(model, batch: TokenBatch, edits: Edits) -> dict[int, list[int]]:
    """Returns the replies of six tokens, decoded in four rows."""
    found = {}
    for numbers, ids in model.reply_ids(batch, 6, edits, rows=4):
        found |= dict(zip(numbers, ids.tolist(), strict=True))
    return found


@pytest.mark.parametrize("shared", [False, True], ids=["whole prompts", "shared beginnings"])
@pytest.mark.parametrize("sizes", [None, (2, 1, 2)], ids=["one device", "a mesh"])
@pytest.mark.parametrize("settings", [{}, {"repetition_penalty": 1.3}], ids=["greedy", "penalised"])
def test_replies_compile_nothing_that_was_compiled_ahead(llama, sizes, shared, settings, monkeypatch, compilations):
    monkeypatch.setattr(prefix, "PROGRAMS", 0 if shared else 1e9)
    model = load_model(llama, mesh=make_mesh(*sizes) if sizes else None).decoded(False, **settings)
    batch = model.encode(PROMPTS)
    before = dict(compilations)
    model.compile_replies(batch, 6, edits_of(model, len(PROMPTS)), rows=4)
    ahead = Counter(compilations) - Counter(before)
    names = GENERATION | ({"embed", "begun"} if shared else set())
    assert {name for name, _ in ahead} == names and set(ahead.values()) == {1}
    replies = decoded(model, batch, edits_of(model, len(PROMPTS)))
    assert Counter(compilations) - Counter(before) == ahead
    jax.clear_caches()
    assert replies == decoded(model, batch, edits_of(model, len(PROMPTS)))


def test_a_study_compiles_its_completions_and_projections_while_earlier_stages_run(small_study, tmp_path, compilations):
    run_study(small_study, tmp_path / "run")
    threads = {name: [thread for program, thread in compilations if program == name] for name, _ in compilations}
    assert {name for name, found in threads.items() if found == ["ahead_0"]} == {"empty", "admit", "project"}
    assert all(sum(n for (one, _), n in compilations.items() if one == name) == 1 for name in GENERATION)
    assert threads["decode"] == ["decode_0"]


def test_decoding_is_compiled_beside_what_reads_the_prompts(llama, compilations):
    model = load_model(llama)
    batch = model.encode(PROMPTS)
    replies = decoded(model, batch, edits_of(model, len(PROMPTS)))
    assert compilations["admit", "MainThread"] == compilations["decode", "decode_0"] == 1
    assert all(sum(n for (one, _), n in compilations.items() if one == name) == 1 for name in GENERATION)
    before = dict(compilations)
    assert replies == decoded(model, batch, edits_of(model, len(PROMPTS))) and compilations == before


class Prepared:
    """Three stages, of which the last two are prepared, and what happened in order."""

    def __init__(self, tmp_path, ahead):
        self.told: list[str] = []
        self.run = Run(tmp_path, {"stages": {}}, storage=None)
        self.stages = [
            Stage("first", self.work("first")),
            Stage("second", self.work("second"), ahead=ahead),
            Stage("third", self.work("third"), ahead=lambda shared: lambda: self.told.append("third is ready")),
        ]

    def work(self, name: str):
        return lambda shared, ledger: self.told.append(name)


def test_only_later_stages_that_are_not_done_are_prepared(tmp_path):
    prepared = Prepared(tmp_path, lambda shared: lambda: prepared.told.append("second is ready"))
    prepared.run.manifest["stages"]["second"] = {}
    with Ahead(prepared.run, prepared.stages) as ahead:
        ahead.reach(prepared.stages[0], None)
        ahead.begin(None)
        ahead.begin(None)
        for stage in prepared.stages[1:]:
            ahead.reach(stage, None)
    assert prepared.told == ["third is ready"]
    with Ahead(prepared.run, prepared.stages) as ahead:
        ahead.reach(prepared.stages[2], None)
        ahead.begin(None)
    (tmp_path / NO_DIRECTION).write_text("{}")
    with Ahead(prepared.run, prepared.stages) as ahead:
        ahead.begin(None)
        ahead.wait()
    assert prepared.told == ["third is ready"]


def test_a_stage_that_is_skipped_is_not_waited_for(tmp_path):
    gate = threading.Event()
    prepared = Prepared(tmp_path, lambda shared: gate.wait)
    second = dataclasses.replace(prepared.stages[1], skipped=lambda shared: "There is no direction.")
    with Ahead(prepared.run, [second]) as ahead:
        ahead.begin(None)
        ahead.reach(second, None)
        assert not gate.is_set()
        gate.set()


def test_a_stage_waits_until_it_is_prepared(tmp_path, caplog):
    gate = threading.Event()
    prepared = Prepared(tmp_path, lambda shared: gate.wait)
    with Ahead(prepared.run, prepared.stages) as ahead, caplog.at_level("INFO", logger="refusal_jax"):
        ahead.begin(None)
        threading.Timer(0.2, gate.set).start()
        ahead.reach(prepared.stages[1], None)
        assert gate.is_set()
    assert "second: waits until its programs are compiled" in caplog.text


def test_a_model_is_freed_once_nothing_ahead_holds_it(small_study, llama, tmp_path, monkeypatch):
    gate, study = threading.Event(), None
    prepared = Prepared(tmp_path, lambda shared: partial(held, shared.model))

    def held(model):
        gate.wait()
        prepared.told.append(str(model.path))

    monkeypatch.setattr(Study, "_load", lambda self: load_model(llama))
    with Ahead(prepared.run, prepared.stages) as ahead:
        study = Study(small_study, prepared.run, llama, ahead=ahead)
        model = weakref.ref(study.model.decoder)
        ahead.begin(study)
        threading.Timer(0.2, gate.set).start()
        study.release()
        assert prepared.told == [str(llama), "third is ready"] and model() is None


@pytest.mark.parametrize("at_once", [True, False], ids=["at once", "in the thread"])
def test_what_fails_ahead_is_left_to_the_stage(at_once, tmp_path, caplog):
    def fail(*_):
        raise RuntimeError("no such device")

    prepared = Prepared(tmp_path, fail if at_once else lambda shared: fail)
    with Ahead(prepared.run, prepared.stages) as ahead, caplog.at_level("DEBUG", logger="refusal_jax"):
        ahead.begin(None)
        for stage in prepared.stages:
            ahead.reach(stage, None)
    assert prepared.told == ["third is ready"]
    assert "second: could not be prepared: no such device" in caplog.text


def test_what_has_not_begun_is_given_up_where_a_study_ends_early(tmp_path):
    gate = threading.Event()
    prepared = Prepared(tmp_path, lambda shared: gate.wait)
    with pytest.raises(KeyboardInterrupt), Ahead(prepared.run, prepared.stages) as ahead:
        ahead.begin(None)
        raise KeyboardInterrupt
    assert not gate.is_set() and prepared.told == []
    gate.set()
    assert ahead._tasks["third"].cancelled()
