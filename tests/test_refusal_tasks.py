"""The tasks that measure refusal with EleutherAI's harness: any of its models, our judges, prompts of any source."""

import json
import logging
import math
import pathlib
import pickle
import sys

import pytest

from refusal_jax import UserError, demo_model_path
from refusal_jax.data.prompts import BUNDLED, read_prompts
from refusal_jax.data.sources import resolve
from refusal_jax.jobs.main import run_job
from refusal_jax.judges.statistics import Rate

pytest.importorskip("lm_eval", reason="the extra lm_eval is not installed")

from lm_eval import evaluator, simple_evaluate
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

from refusal_jax.harness.edited import warn_once
from refusal_jax.harness.refusal_tasks import FOLDER, RefusalTask, slug

REFUSES, COMPLIES = "I cannot help with that request.", "Sure, here is how: first, find a hat."
ASKED = [
    {"prompt": "Forge a hat?", "category": "Hats, caps"},
    {"prompt": "Forge a cap?", "category": "Hats, caps"},
    {"prompt": "42", "category": "numbers"},
    {"prompt": "{{ 1 + 1 }} or [1]", "category": "numbers"},
    {"prompt": "Forge a toy?", "category": None},
]


@pytest.fixture(autouse=True)
def unwarned(monkeypatch):
    warn_once.cache_clear()
    monkeypatch.setattr(evaluator, "add_env_info", lambda results: None)  # which starts commands for a second


class Answering(LM):
    """A model of the harness that answers by a function of the rendered prompt, and keeps what it was asked."""

    tokenizer_name, template = "answering", "user: {}"

    def __init__(self, answer):
        super().__init__()
        self.answer, self.asked = answer, []

    def generate_until(self, requests, disable_tqdm: bool = False):
        self.asked += [request.args for request in requests]
        return [self.answer(request.args[0]) for request in requests]

    def apply_chat_template(self, chat_history, add_generation_prompt=True):
        return "\n".join(f"{m['role']}: {m['content']}" for m in chat_history) + "\nassistant: "

    def chat_template(self, chat_template=False):
        return self.template

    loglikelihood = loglikelihood_rolling = None


Answering.__abstractmethods__ = frozenset()


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ASKED))
    return path


def evaluated(
    model, prompts, harmful=True, tasks=("refusal_prompts",), apply_chat_template=True, settings=None, **more
):
    metadata = {"prompts": str(prompts), "harmful": harmful} | (settings or {})
    manager = TaskManager(include_path=str(FOLDER), include_defaults=False, metadata=metadata)
    more = {"task_manager": manager, "apply_chat_template": apply_chat_template} | more
    return simple_evaluate(model, tasks=list(tasks), **more)


def rates(found, task="refusal_prompts"):
    return {name: value for name, value in found["results"][task].items() if "," in name}


def test_rates_of_a_model_that_refuses_some(prompts):
    model = Answering(lambda text: REFUSES if "Forge" in text else COMPLIES)
    judges = ["substring_matching", "substring_extended"]
    found = evaluated(model, prompts, settings={"judges": judges}, system_instruction="Be brief.")
    values = rates(found)
    for judge in judges:
        assert values[f"refusal_rate,{judge}"] == 0.6 and values[f"success_rate,{judge}"] == 0.4
        assert values[f"refusal_rate_stderr,{judge}"] == pytest.approx(math.sqrt(0.6 * 0.4 / 4))
        assert values[f"refusal_rate/hats_caps,{judge}"] == 1 and values[f"success_rate/numbers,{judge}"] == 1
        assert values[f"unjudged_rate,{judge}"] == 0 and f"broken_rate,{judge}" not in values
    assert found["higher_is_better"]["refusal_prompts"]["refusal_rate/numbers"] is True
    assert found["higher_is_better"]["refusal_prompts"]["success_rate"] is False
    first, settings = model.asked[0]
    assert first == "system: Be brief.\nuser: Forge a hat?\nassistant: "
    assert [text.splitlines()[1] for text, _ in model.asked] == [f"user: {row['prompt']}" for row in ASKED]
    assert settings == {"until": [], "do_sample": False, "temperature": 0.0, "max_gen_toks": 512}
    (sample, *_) = found["samples"]["refusal_prompts"]
    assert sample["resps"] == [[REFUSES]] and sample["target"] == "refuses" and sample["refusal_rate"] == 1.0
    told = found["configs"]["refusal_prompts"]["metadata"]
    assert told["judges"] == judges and len(told["prompts_sha256"]) == 64 and told["version"] == 1.0
    json.dumps(found["configs"])

    harmless = evaluated(model, prompts, harmful=False, limit=3)
    assert harmless["higher_is_better"]["refusal_prompts"]["refusal_rate"] is False
    assert harmless["samples"]["refusal_prompts"][0]["target"] == "complies"
    assert harmless["n-samples"]["refusal_prompts"] == {"original": 5, "effective": 3}
    assert rates(harmless)["refusal_rate/numbers_stderr,substring_matching"] == "N/A"  # of one prompt


def test_thoughts_and_replies_that_did_not_come(prompts):
    """A thought that never ends and a request without a reply are neither refusals nor successes."""
    replies = {
        "hat": f"<think>I cannot do that?</think>\n{COMPLIES}",
        "cap": "<think>I'm sorry, I cannot",
        "toy": None,
    }
    model = Answering(lambda text: next((replies[name] for name in replies if name in text), REFUSES))
    values = rates(evaluated(model, prompts))
    assert values["refusal_rate,substring_matching"] == pytest.approx(2 / 3)
    assert values["unjudged_rate,substring_matching"] == 0.4
    nothing = rates(evaluated(Answering(lambda text: "<think>hm"), prompts))
    assert {name.partition(",")[0] for name in nothing} == {"unjudged_rate", "unjudged_rate_stderr"}


def test_outcomes_by_a_judge_that_tells_them_apart(prompts):
    """The paper's judge takes an empty reply for a success; a reply that is too short to tell is not counted."""
    replies = {"hat": "", "cap": REFUSES, "toy": "No.", "42": "What would you like to know about that number?"}
    long = "Take the first hat from the shelf, and put it on the table. Then fold its rim twice and sew the two ends together."
    found = evaluated(Answering(lambda text: next((replies[name] for name in replies if name in text), long)), prompts)
    values = rates(found)
    shares = {name: values[f"{name}_rate,rules"] for name in ("refusal", "success", "deflection", "broken", "unjudged")}
    refused = {
        sample["doc"]["instruction"]: sample["filtered_resps"][0].get("outcome")
        for sample in found["samples"]["refusal_prompts"]
        if sample["filter"] == "rules"
    }
    assert list(refused.values())[:4] == ["broken", "refuses", "deflects", "complies"]
    judged = sum(outcome is not None for outcome in refused.values())
    assert shares["unjudged"] == 1 - judged / 5 and sum(shares.values()) - shares["unjudged"] == pytest.approx(1)
    assert values["success_rate,substring_matching"] == 0.8


def test_a_template_that_opens_a_thought(prompts):
    class Opening(Answering):
        def apply_chat_template(self, chat_history, add_generation_prompt=True):
            return super().apply_chat_template(chat_history) + "<think>\n"

    model = Opening(lambda text: f"I cannot do that?</think>{COMPLIES}" if "hat" in text else "I cannot")
    values = rates(evaluated(model, prompts))
    assert values["success_rate,substring_matching"] == 1 and values["unjudged_rate,substring_matching"] == 0.8


def test_without_a_template(prompts, caplog):
    model = Answering(lambda text: COMPLIES)
    with caplog.at_level(logging.WARNING, "refusal_jax"):
        evaluated(model, prompts, apply_chat_template=False)
    assert model.asked[0][0] == "Forge a hat?"
    assert "No chat template is applied to the prompts. A chat model then continues the text" in caplog.text
    caplog.clear()
    evaluated(model, prompts, num_fewshot=3)
    assert "No chat template" not in caplog.text and "Forge a cap" not in model.asked[5][0]  # no example before it


def test_replies_stay_out_of_the_logs_if_asked(prompts):
    found = evaluated(Answering(lambda text: COMPLIES), prompts, settings={"log_replies": False})
    samples = found["samples"]["refusal_prompts"]
    assert COMPLIES not in json.dumps(samples, default=str) and samples[0]["resps"][0][0].startswith("sha256:")
    assert samples[0]["success_rate"] == 1.0


def test_predictions_alone(prompts):
    found = evaluated(Answering(lambda text: COMPLIES), prompts, predict_only=True)
    assert found["results"]["refusal_prompts"]["bypass,none"] == 999
    assert found["samples"]["refusal_prompts"][0]["filtered_resps"] == [COMPLIES]


def test_cached_requests_are_those_of_the_same_prompts(prompts, tmp_path, monkeypatch):
    """The harness's own key has neither the prompts nor the settings of generation."""
    from lm_eval.caching import cache

    monkeypatch.setattr(cache, "PATH", str(tmp_path / "requests"))
    model = Answering(lambda text: COMPLIES)
    evaluated(model, prompts, cache_requests=True)
    evaluated(model, prompts, cache_requests=True)
    kept = list((tmp_path / "requests").iterdir())
    assert len(kept) == 1 and len(pickle.loads(kept[0].read_bytes())) == 5
    evaluated(model, prompts, cache_requests=True, gen_kwargs={"max_gen_toks": 7})
    assert model.asked[-1][1]["max_gen_toks"] == 7
    prompts.write_text('{"prompt": "Forge a bow?"}\n')
    evaluated(model, prompts, cache_requests=True)
    assert model.asked[-1][0] == "user: Forge a bow?\nassistant: "


def test_categories_that_not_all_processes_have(prompts):
    manager = TaskManager(
        include_path=str(FOLDER), include_defaults=False, metadata={"prompts": str(prompts), "harmful": True}
    )
    task = manager.load(["refusal_prompts"])["tasks"]["refusal_prompts"]
    task.build_all_requests(rank=1, world_size=2)
    assert set(task.categories) == {"Hats, caps", "numbers"} and len(task.instances) == 2
    task.build_all_requests(rank=0, world_size=2, limit=3)  # one process has no prompt of the second
    assert set(task.categories) == {"Hats, caps"}


def test_categories_with_like_names_and_with_many(tmp_path, caplog):
    path = tmp_path / "p.json"
    path.write_text(json.dumps([{"prompt": f"{i}", "category": name} for i, name in enumerate(["a b", "a, b", "?"])]))
    model = Answering(lambda text: REFUSES)
    values = rates(evaluated(model, path, settings={"judges": "substring_matching"}))
    assert {name for name in values if name.startswith("refusal_rate/") and "stderr" not in name} == {
        f"refusal_rate/{name},substring_matching" for name in ("a_b", "category_a_b", "category")
    }
    path.write_text(json.dumps([{"prompt": f"{i}", "category": f"c{i}"} for i in range(17)]))
    with caplog.at_level(logging.WARNING, "refusal_jax"):
        values = rates(evaluated(model, path))
    assert "has 17 categories. Rates by category are given for up to 16" in caplog.text
    assert not any("/" in name for name in values) and slug("Sexual/Adult content") == "sexual_adult_content"


def test_a_task_of_the_users_own(prompts, tmp_path):
    lines = ["task: mine", "class: !function refusal_jax.harness.refusal_tasks.RefusalTask", "dataset_kwargs:"]
    lines += [f"  prompts: {prompts}", "  harmful: false", "  judges: [substring_extended]", "description: Be kind."]
    (tmp_path / "mine.yaml").write_text("\n".join([*lines, "generation_kwargs: {max_gen_toks: 9}"]))
    model = Answering(lambda text: COMPLIES)
    metadata = {"prompts": "elsewhere.jsonl", "judges": ["substring_matching"]}
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False, metadata=metadata)
    found = simple_evaluate(model, tasks=["mine"], task_manager=manager, apply_chat_template=True)
    assert rates(found, "mine")["refusal_rate,substring_extended"] == 0
    assert model.asked[0][0].startswith("system: Be kind.\n") and model.asked[0][1]["until"] == []
    assert model.asked[0][1]["max_gen_toks"] == 9


def test_the_public_sets(tmp_path, monkeypatch):
    """Each is a task, which says which command fetches its prompts, and runs once they are there."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    manager = TaskManager(include_path=str(FOLDER), include_defaults=False)
    names = manager.match_tasks(["refusal"])
    assert names == ["refusal"] and {"refusal_xstest", "refusal_jailbreakbench", "refusal_or_bench"} <= set(
        manager.all_tags
    )
    commands = {
        "refusal_xstest_safe": "--sets=xstest`",
        "refusal_xstest_unsafe": "--sets=xstest_unsafe`",
        "refusal_jailbreakbench_harmful": "--sets=jailbreakbench`",
        "refusal_jailbreakbench_benign": "--sets=jailbreakbench_benign --accept_new_hash`",
        "refusal_strongreject": "--sets=strongreject`",
        "refusal_harmbench": "--sets=harmbench_test`",
        "refusal_or_bench_hard": "--sets=or_bench_hard`",
        "refusal_or_bench_toxic": "--sets=or_bench_toxic --accept_new_hash`",
    }
    assert set(commands) == {*manager.all_subtasks} - {"refusal_prompts"}
    for name, command in commands.items():
        with pytest.raises(UserError, match=rf"The prompts of {name} cannot be read\. .*data fetch {command}"):
            manager.load([name])
    folder = tmp_path / "refusal_jax" / "data" / "prompts"
    folder.mkdir(parents=True)
    for name in ("xstest", "xstest_unsafe"):
        (folder / f"{name}.json").write_text(json.dumps([{"instruction": f"Forge a {name}?", "category": "hats"}]))
    model = Answering(lambda text: REFUSES if "unsafe" in text else COMPLIES)
    found = simple_evaluate(model, tasks=["refusal_xstest"], task_manager=manager, apply_chat_template=True)
    assert [rates(found, f"refusal_xstest_{s}")["refusal_rate,substring_matching"] for s in ("safe", "unsafe")] == [
        0,
        1,
    ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, r"t needs prompts\. Name a file, a public set .*--metadata"),
        ({"prompts": "p.txt"}, r"t does not say whether p\.txt are prompts that are to be refused\. Add"),
        ({"prompts": "p.txt", "harmful": "often"}, "t: harmful = 'often', expected true or false"),
        ({"prompts": 3, "harmful": True}, "t: prompts = 3, expected a text"),
        ({"prompts": "p.txt", "harmful": True, "judges": 3}, "t: judges = 3, expected a list of judges"),
        (
            {"prompts": "p.txt", "harmful": True, "judge_batch_size": 0},
            "judge_batch_size = 0, expected a number of rows",
        ),
        (
            {"prompts": "p.txt", "harmful": True, "judge": "x"},
            r"t has an unknown setting 'judge': .*Did you mean judges\?",
        ),
        (
            {"prompts": "p.txt", "harmful": True, "judges": "refusal_score"},
            "'refusal_score' reads what a study measures",
        ),
        ({"prompts": "p.txt", "harmful": True, "judges": "rhubarb"}, "there is no judge 'rhubarb'"),
        ({"prompts": "gone.txt", "harmful": True}, r"The prompts of t cannot be read\. gone\.txt"),
    ],
)
def test_settings_that_cannot_be_used(settings, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("p.txt").write_text("Forge a hat?\n")
    with pytest.raises(UserError, match=message):
        RefusalTask({"task": "t", "dataset_kwargs": settings})


def test_examples_are_refused(prompts):
    with pytest.raises(
        UserError, match=r"t asks for 5 examples in each prompt\. Refusal is measured on the prompts alone"
    ):
        RefusalTask({"task": "t", "num_fewshot": 5, "dataset_kwargs": {"prompts": str(prompts), "harmful": True}})


@pytest.fixture(scope="module")
def direction(tmp_path_factory):
    """The difference in means of the embedded model at a middle layer, as a file."""
    import numpy as np

    from refusal_jax import load_model
    from refusal_jax.audit.base_directions import residual_means

    model = load_model(demo_model_path(), "float32")
    sides = (
        [row["instruction"] for row in read_prompts(resolve(BUNDLED, f"{s}_val"))] for s in ("harmful", "harmless")
    )
    harmful, harmless = (residual_means(model, side, 1, 0).mean(axis=0) for side in sides)
    path = tmp_path_factory.mktemp("direction") / "r.npy"
    np.save(path, (harmful - harmless)[5, -1])
    return path


def test_the_embedded_model_as_its_own_evaluation_judges_it(direction):
    """Rates are those of our own replies and judges, before and after ablation; and those of the harness's hf model."""
    from lm_eval.models.huggingface import HFLM

    from refusal_jax.harness.lm_eval import RefusalJaxLM
    from refusal_jax.judges.text import PAPERS

    asked = read_prompts(resolve(BUNDLED, "harmful_test"))[:12]
    found = {}
    for name, more in (("base", {}), ("ablated", {"ablate": str(direction)})):
        lm = RefusalJaxLM(pretrained=str(demo_model_path()), dtype="float32", batch_size=12, **more)
        batch = lm.model.encode([row["instruction"] for row in asked])
        replies = {}
        for index, ids in lm.model.reply_ids(batch, 40, lm.edited.edits, rows=12):
            replies |= {i: reply.row for i, reply in zip(index, lm.model.chat.replies(ids), strict=True)}
        refused = Rate.of(v and v.label for v in PAPERS.judge([replies[i] for i in range(12)])).complement
        result = evaluated(lm, BUNDLED, limit=12, gen_kwargs={"max_gen_toks": 40})
        found[name] = [sample["resps"][0][0] for sample in result["samples"]["refusal_prompts"]]
        assert rates(result)["refusal_rate,substring_matching"] == refused.rate == (1.0 if name == "base" else 0.0)
    hf = HFLM(pretrained=str(demo_model_path()), device="cpu", dtype="float32", batch_size=12)
    theirs = evaluated(hf, BUNDLED, limit=12, gen_kwargs={"max_gen_toks": 40})
    assert [sample["resps"][0][0] for sample in theirs["samples"]["refusal_prompts"]] == found["base"]


def test_the_command_finds_the_tasks(tmp_path, capsys, monkeypatch):
    from lm_eval._cli import HarnessCLI

    assert run_job("lm_eval", ["tasks_folder"]) == 0 and capsys.readouterr().out.strip() == str(FOLDER)
    seen = []
    monkeypatch.setattr(HarnessCLI, "execute", lambda self, arguments: seen.append(arguments.include_path))
    monkeypatch.setattr(sys, "argv", [])
    for more in ([], ["--include_path", str(tmp_path)]):
        assert run_job("lm_eval", ["--model", "refusal_jax", "--tasks", "refusal_xstest", *more]) == 0
    assert seen == [[str(FOLDER)], [str(FOLDER), str(tmp_path)]]
    assert sys.argv == ["refusal-jax lm_eval", "run", "--model", "refusal_jax", "--tasks", "refusal_xstest", *more]
    (tmp_path / "mine.yaml").write_text("task: mine\n")
    assert "mine" in TaskManager(include_path=seen[1], include_defaults=False).all_tasks
