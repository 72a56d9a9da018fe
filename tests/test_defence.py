"""Defences: what is written is what was trained, what is measured, and runs that go on."""

import dataclasses
import json

import families
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import tiny
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from refusal_jax import UserError, demo_model_path, distributed, load_model
from refusal_jax.checkpoints.lora import read_changes
from refusal_jax.checkpoints.rewrite import Checkpoint
from refusal_jax.conditions import Ablate
from refusal_jax.defence import written
from refusal_jax.defence.asked import asked_for, settings_for
from refusal_jax.defence.catalogue import RECIPES, named
from refusal_jax.defence.data import DefenceData
from refusal_jax.defence.measure import compared, outcomes
from refusal_jax.defence.run import CHECK, MOST_KL, RECORD, TRAINING, Defence, compared_with_trained, defend
from refusal_jax.defence.settings import DefenceSettings
from refusal_jax.defence.text import lines
from refusal_jax.defence.written import Origin, is_exact, last_logits, write_trained
from refusal_jax.directions import Direction
from refusal_jax.errors import VerificationError
from refusal_jax.export.provenance import check
from refusal_jax.judges.judge import Outcome
from refusal_jax.judges.outcomes import judged_once
from refusal_jax.judges.rules import RuleJudge
from refusal_jax.models.decoder import Decoder
from refusal_jax.models.hf_config import load_config
from refusal_jax.runs.run import Run
from refusal_jax.training.changes import low_rank_changes
from refusal_jax.training.checkpoints import STATES
from refusal_jax.training.lora import fresh_factors, scaled
from refusal_jax.training.settings import TARGETS, TrainSettings
from refusal_jax.training.trainer import Trained

SMALL = {
    "recipe": "sft",
    "output": "both",
    "max_new_tokens": 6,
    "data": {"n_train": 8, "n_test": 8},
    "train": {"steps": 2, "warmup": 0, "batch": 4, "rank": 2, "rate": 1e-2, "every": 1},
}


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A defence of the embedded model by two steps, stopped before its result is checked: its folder and its run."""
    folder, command = tmp_path_factory.mktemp("defence") / "out", "refusal-jax defend --recipe=sft"
    with pytest.MonkeyPatch.context() as patched, pytest.raises(KeyError):
        patched.delitem(MOST_KL, True)
        defend(SMALL, folder, command)
    assert (folder / TRAINING / STATES).exists()
    for kind in ("model", "adapter"):
        with pytest.raises(VerificationError, match="was not verified"):
            check(folder / kind)
    run = defend(SMALL, folder, command)["sft"]
    assert run.worked == ["after", "record"]
    return folder, run


def test_the_checkpoint_and_the_adapter_are_what_was_trained(done):
    folder, _ = done
    source, record = demo_model_path(), json.loads((folder / RECORD).read_text())
    assert record["outputs"] == ["model", "adapter"] and record["check"]["max_logit_difference"] < 1e-4
    assert record["checks"].keys() == {"model", "adapter"} and record["checks"]["model"] == record["check"]
    assert record["checks"]["adapter"]["mean_kl"] < 1e-5 and check(folder / "adapter")["format"] == "lora"
    base = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    merged = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    ids = torch.arange(5, 25)[None]
    before = base(ids).logits.detach()
    adapted = peft.PeftModel.from_pretrained(base, str(folder / "adapter"))(ids).logits.detach()
    after = merged(ids).logits.detach()
    assert torch.allclose(after, adapted, atol=1e-4) and (after - before).abs().max() > 1e-2
    old, new = (load_file(place / "model.safetensors") for place in (source, folder / "model"))
    assert old.keys() == new.keys()
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert len(changed) == 8 * len(TARGETS) and all("_proj" in name for name in changed)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "config.json"):
        assert (source / name).read_bytes() == (folder / "model" / name).read_bytes()
    assert check(folder / "model")["edit"] == {"kind": "defence", "recipe": "sft", "method": "lora"}
    card = (folder / "model" / "README.md").read_text()
    assert "defended by sft" in card and "refusal-jax defend --recipe=sft" in card


def test_a_defence_records_what_it_measured_and_says_it(done):
    folder, _ = done
    record = json.loads((folder / RECORD).read_text())
    measured = record["measured"]
    assert (
        measured["harmful"]["before"]["n"] + measured["harmful"]["undecided"] == 8
        and len(measured["prompts"]["kl"]) == 8
    )
    assert record["training"]["last"]["step"] == 2 and len((folder / "losses.jsonl").read_text().splitlines()) == 2
    assert not (folder / TRAINING).exists()
    text = "\n".join(lines(record))
    assert "Harmful prompts refused" in text and "KL on harmless prompts" in text and "2 steps" in text


def test_a_finished_defence_is_left_and_a_missing_result_is_made_again(done):
    folder, _ = done
    (again,) = defend(SMALL, folder).values()
    assert again.worked == []
    weights = (folder / "model" / "model.safetensors").read_bytes()
    (folder / "model" / "refusal_jax.json").unlink()
    (again,) = defend(SMALL, folder).values()
    assert again.worked[0] == "defend" and (folder / "model" / "model.safetensors").read_bytes() == weights
    with pytest.raises(UserError, match=r"train.rate was 0.01, is now 0.02"):
        defend({**SMALL, "train": {**SMALL["train"], "rate": 0.02}}, folder)


def test_what_is_measured_counts_pairs():
    before = {"harmful": ["refuses", "complies", None, "refuses"], "harmless": ["complies", "refuses"]}
    after = {"harmful": ["refuses", "refuses", "refuses", "broken"], "harmless": ["complies", "complies"]}
    found = compared(before, after, [0.1, 0.3])
    harmful, harmless = found["harmful"], found["harmless"]
    assert (harmful["before"]["successes"], harmful["after"]["successes"], harmful["before"]["n"]) == (2, 2, 3)
    assert harmful["undecided"] == 1 and harmful["difference"]["mean"] == 0 and harmful["difference"]["p"] == 1
    assert harmless["difference"]["mean"] == 0.5 and found["kl"]["mean"] == pytest.approx(0.2)


def trained_on(source, **settings) -> Trained:
    """A training's result with random factors, or random weights, in place of learnt ones."""
    made, model = TrainSettings.of({"rank": 2, **settings}), load_model(source, settings.pop("dtype", "float32"))
    rng = np.random.default_rng(0)

    def noise(a):
        return jnp.asarray(rng.normal(size=a.shape), a.dtype)

    if made.method == "full":
        weights = {path: a + 0.1 * noise(a) for path, a in model.decoder.weights().items()}
        return Trained(Decoder(model.config, weights), None, made, [])
    fresh = fresh_factors(model.config, made, None)
    factors = {path: noise(a) if path.endswith("_left") else a for path, a in fresh.items()}
    return Trained(Decoder(model.config, model.decoder.weights() | scaled(factors, made.scale)), factors, made, [])


def test_conversations_verify_an_edit_by_their_last_message(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(written, "export", lambda request: asked.append(request) or {"verification": {"passed": True}})
    talk = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Bake."})
    prompts = {"harmful": (talk,), "harmless": ("Bake it.", talk)}
    edit = Ablate(Direction.of(np.eye(8)[0]))
    found = written.write_edited(Origin(RECIPES["injection"], tmp_path), edit, prompts, tmp_path / "out", "model")
    assert found == {"passed": True} and asked[0].study.prompts == ["Bake.", "Bake it.", "Bake."]
    assert asked[0].study.harmless == [("Bake it.", ""), ("Bake.", "")]


@pytest.mark.parametrize("method", ["lora", "full"])
def test_dtype_and_shards_are_the_sources(tmp_path, method):
    source = tiny.tiny_llama(tmp_path / "source", dtype="bfloat16", shards="40KB", tied=True)
    trained = trained_on(source, method=method)
    write_trained(Origin(RECIPES["sft"], source), trained, tmp_path / "model", "model")
    names = sorted(path.name for path in source.glob("*.safetensors*"))
    assert len(names) == 3 and names == sorted(path.name for path in (tmp_path / "model").glob("*.safetensors*"))
    found, want = load_model(tmp_path / "model").decoder.weights(), trained.decoder.weights()
    assert all(t.dtype == "BF16" for t in Checkpoint.open(tmp_path / "model").tensors.values())
    for path, values in want.items():
        np.testing.assert_allclose(found[path], values, rtol=2**-8, err_msg=path)


def test_factors_of_fused_matrices_are_one_module(tmp_path):
    source = families.tiny_model(tmp_path / "source", "phi3", "gqa")
    trained = trained_on(source, targets=("q", "v", "up"), layers=(1,), rslora=True)
    changes = low_rank_changes(load_config(source), trained)
    assert sorted(name.split(".")[-2] for name in changes) == ["gate_up_proj", "qkv_proj"]
    for kind in ("model", "adapter"):
        write_trained(Origin(RECIPES["sft"], source), trained, tmp_path / kind, kind)
    found = load_model(tmp_path / "model").decoder.weights()
    zeroed = {path: jnp.where(jnp.arange(len(a))[:, None, None] == 1, a, 0) for path, a in trained.factors.items()}
    base = load_model(source)
    want = Decoder(base.config, base.decoder.weights() | scaled(zeroed, trained.settings.scale)).weights()
    read = read_changes(tmp_path / "adapter", base.config)
    assert read.keys() == {name for name in changes}
    for name, change in changes.items():
        np.testing.assert_allclose(read[name].left @ read[name].right, change.left @ change.right, rtol=1e-4, atol=1e-5)
    for path in ("blocks.q", "blocks.k", "blocks.v", "blocks.up", "blocks.gate"):
        np.testing.assert_allclose(found[path][1], want[path][1], atol=1e-5, err_msg=path)


def test_recipes_have_defaults_that_what_is_given_overrides():
    recipe = RECIPES["sft"]
    assert settings_for(recipe, {}, True).train.rate == 1e-3
    assert settings_for(recipe, {}, False).train.rate == TrainSettings().rate
    given = settings_for(recipe, {"train": {"rate": TrainSettings().rate}}, True)
    assert given.train.rate == TrainSettings().rate and given.train.steps == 200
    assert [one.name for one in named("all")] == [name for name in RECIPES if name != "calibration"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"recipe": ""}, r"recipe is missing.*The recipes are sft"),
        ({"recipe": "sft,sft"}, r"names \['sft', 'sft'\] twice"),
        ({"recipe": "sff"}, r"There is no recipe 'sff'.*Did you mean sft"),
        ({"output": "modle"}, r"output is 'modle', expected model, adapter, both.*Did you mean model"),
        ({"max_new_tokens": 0}, r"max_new_tokens = 0 and .*batch_size = 0: replies have"),
        ({"output": "adapter", "train": {"method": "full"}}, r"output = adapter: an adapter holds low-rank factors"),
    ],
)
def test_settings_that_cannot_be_say_why(given, message, tmp_path):
    with pytest.raises(UserError, match=message):
        defend({"recipe": "sft", **given}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_mixture_of_experts_is_refused_before_any_work(tmp_path):
    source = families.tiny_model(tmp_path / "source", "qwen3_moe")
    with pytest.raises(
        UserError, match="This model is a mixture of experts, and the loop over its experts has no gradient"
    ):
        defend({"recipe": "sft", "model": str(source)}, tmp_path / "out")


def test_a_result_that_its_dtype_rounds_is_held_to_the_rounding(tmp_path):
    source = tiny.tiny_llama(tmp_path / "source", dtype="bfloat16")
    trained, model = trained_on(source, alpha=0.5), load_model(source, "float32")
    write_trained(Origin(RECIPES["sft"], source), trained, tmp_path / "out" / "model", "model")
    with Run.open(tmp_path / "run", {}, {}) as run:
        shared = Defence(RECIPES["sft"], DefenceSettings.of({"recipe": "sft"}), run, source, RuleJudge(), "")
        prompts = ("Bake the bread.", "Fix the roof.", "Paint the door.", "Mend the shoe.")
        shared.data = DefenceData((), (), (), (), prompts, prompts)
        after = dataclasses.replace(model, decoder=trained.decoder)
        run.write_tensors(CHECK, {"logits": last_logits(after, shared.held_out)})
        found = compared_with_trained(shared, load_model(tmp_path / "out" / "model", "float32"), "model")
        assert MOST_KL[True] < found["mean_kl"] < MOST_KL[False]
        with pytest.raises(VerificationError, match=r"run/model is not what was trained: at 8 held-out prompts"):
            compared_with_trained(shared, model, "model")
    assert is_exact(demo_model_path()) and not is_exact(source)


def test_recipes_are_checked_before_any_work(tmp_path, caplog):
    source = tiny.tiny_llama(tmp_path / "source")
    with pytest.raises(UserError, match=r"A circuit breaker needs harmful prompts.*data.compliant=FILE.jsonl"):
        asked_for({"recipe": "sft,breakers"}, source)
    with pytest.raises(UserError, match=r"breakers.noise = -1"):
        asked_for({"recipe": "sft,breakers", "breakers": {"noise": -1.0}}, source)
    found = asked_for({"recipe": "all"}, source)
    left = {"depth", "breakers", "deep_refusal"}
    assert [one.name for one in found] == [one.name for one in named("all") if one.name not in left]
    assert {one.message.split(" is left out")[0].split()[-1] for one in caplog.records} == left
    given = {"recipe": "breakers", "data": {"compliant": "replies.jsonl"}}
    assert [one.name for one in asked_for(given, source)] == [""]


class Listening(RuleJudge):
    """A judge behind a server that keeps what it is shown."""

    uses_devices = elsewhere = True

    def __init__(self):
        self.seen = []

    def judge(self, rows, ledger=None):
        self.seen.extend(rows)
        return super().judge(rows, ledger)


def test_judges_see_the_system_prompt_and_are_asked_once(monkeypatch):
    model, judge = load_model(demo_model_path(), system_prompt="Be kind."), Listening()
    found = outcomes(model, {"harmful": ("Hello",), "harmless": ("Bake it.",)}, judge, 2, 8)
    assert [row["system_prompt"] for row in judge.seen] == ["Be kind."] * 2 and len(found["harmful"]) == 1
    monkeypatch.setattr(distributed, "first", lambda: False)  # another process, which gets what the first one was told
    monkeypatch.setattr(distributed, "share_json", lambda value: ["refuses", None])
    assert judged_once(judge, judge.seen[:2]) == [Outcome.REFUSES, None] and len(judge.seen) == 2


def test_results_need_a_local_folder():
    with pytest.raises(UserError, match=r"gs://b/out is an address"):
        defend({"recipe": "sft"}, "gs://b/out")
