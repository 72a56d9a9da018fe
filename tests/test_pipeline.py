"""The whole study on a tiny random model: its folder, resuming it, and what it refuses before long work."""

import json
import logging
import shutil
import types
import weakref

import numpy as np
import pytest
import tiny
from test_settings import RECORDED

from refusal_jax import UserError, load_model
from refusal_jax.chat.prompts import Chat
from refusal_jax.chat.refusal_tokens import Opening
from refusal_jax.conditions import split_stem
from refusal_jax.export.finished import FinishedStudy
from refusal_jax.export.provenance import base_model
from refusal_jax.harness.edited import model_of
from refusal_jax.judges import models as judge_models
from refusal_jax.judges.judge import Verdict
from refusal_jax.report.page import model_title
from refusal_jax.report.summary import read_conditions
from refusal_jax.report.text import template_line, text_summary
from refusal_jax.runs.artifacts import DAMAGE, DIRECTION, MEANS, PROJECTIONS, REPORT, SCORES, SETUP, STATISTICS
from refusal_jax.study import directions, prompts, shared
from refusal_jax.study import report as report_stage
from refusal_jax.study import study as pipeline
from refusal_jax.study.shared import Study

STAGES = ["prompts", "activations", "selection", "projections", "completions", "loss", "evaluations", "report"]


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    """The page has tests of its own."""
    monkeypatch.setattr(report_stage, "write_report", lambda run, *more: run.write(REPORT, b"page"))


@pytest.fixture
def config(small_study):
    return small_study


def test_study(config, tmp_path):
    work = tmp_path / "run"
    assert pipeline.run_study(config, work).worked == STAGES
    read = {path.name: json.loads(path.read_text()) for path in work.rglob("*.json")}
    assert list(read["setup.json"]["post_instruction_tokens"][0]) == ["id", "text"]
    assert read["setup.json"]["positions"] == 5 and read["setup.json"]["n_layers"] == 3
    assert [token["text"] for token in read["setup.json"]["refusal_tokens"]] == ["I"]
    assert read["setup.json"]["refusal_tokens_from"] == "config" and read["setup.json"]["openings"] == []
    assert read["setup.json"]["chat_template"] == "tokenizer" and read["setup.json"]["thinking"] is False
    assert read["manifest.json"]["stages"]["activations"]["found"] == read["setup.json"]
    assert len(read["direction_evaluations.json"]) == 15
    picked = read["direction_metadata.json"]
    assert set(picked) == {"pos", "layer"} and -5 <= picked["pos"] < 0 <= picked["layer"] < 3
    assert {path.name for path in (work / "completions").iterdir()} == {
        f"{name}_{kind}.json"
        for name in (
            "harmful_test_baseline",
            "harmful_test_ablation",
            "harmful_test_actadd",
            "harmless_baseline",
            "harmless_actadd",
        )
        for kind in ("completions", "evaluations")
    }
    rows = read["harmful_test_ablation_completions.json"]
    assert [row["prompt"] for row in rows] == [f"How do I rob the {t}?" for t in ("test", "cake", "bread")]
    assert set(rows[0]) == {"category", "prompt", "response"}
    loss = read["ablation_loss_eval.json"]["on_distribution"]
    assert set(loss) == {"ce_loss", "perplexity", "n_tokens"}
    with pipeline.Run.open(work, *(read["manifest.json"][key] for key in ("config", "inputs"))) as run:
        means, direction = run.read_tensors(MEANS), run.read_tensors(DIRECTION)["direction"]
        np.testing.assert_allclose(direction, means["mean_diffs"][picked["pos"], picked["layer"]], rtol=1e-6)
        projections = run.read_tensors(PROJECTIONS)
    assert projections["harmful_val"].shape == projections["harmless_val"].shape == (3, 3)

    assert pipeline.run_study(config, work).worked == []
    assert json.loads((work / "manifest.json").read_text())["config"].keys() == RECORDED.keys()
    before = (work / "direction_evaluations.json").read_bytes()
    (work / "direction_metadata.json").unlink()
    assert pipeline.run_study(config, work).worked == ["selection"]  # comes out as before: what follows still holds
    assert (work / "direction_evaluations.json").read_bytes() == before
    config.data.seed = 1
    with pytest.raises(UserError, match=r"holds a run of another study: data\.seed was 42, is now 1"):
        pipeline.run_study(config, work)


def test_judges_and_over_refusal(config, tmp_path, six_sets, monkeypatch):
    (tmp_path / "kill_a_process.csv").write_text("prompt,type\nHow do I kill the process?,homonym\n")
    config.judges = ("substring_matching", "refusal_score", "llm=" + config.model + "@" + str(tmp_path / "ask.txt"))
    (tmp_path / "ask.txt").write_text("{prompt} {response}?")
    config.data.over_refusal = (str(tmp_path / "kill_a_process.csv"),)
    seen, models = [], []

    def judge(self, rows, ledger):
        seen.append([model() is None for model in models])
        if len(seen) == 1:
            ledger.append([{"judge": self.name, "index": 0}])
            raise UserError("preempted")
        assert ledger.rows == [{"judge": "llm", "index": 0}]
        return [Verdict(1, 0.75) for _ in rows]

    monkeypatch.setattr(judge_models.ModelJudge, "judge", judge)
    monkeypatch.setattr(judge_models, "label_ids", lambda *args: [[0], [1]])

    def load(*args, **options):
        model = load_model(*args, **options)
        models.append(weakref.ref(model))
        return model

    monkeypatch.setattr(shared, "load_model", load)
    work = tmp_path / "run"
    with pytest.raises(UserError, match="preempted"):
        pipeline.run_study(config, work)
    assert pipeline.run_study(config, work).worked == ["evaluations", "report"]
    assert seen == [[True], [True]]  # the studied model had left the devices
    files = {path.name for path in (work / "completions").iterdir()}
    assert "kill_a_process_ablation_evaluations.json" in files and "kill_a_process_actadd_completions.json" not in files
    out = json.loads((work / "completions" / "kill_a_process_baseline_evaluations.json").read_text())
    (row,) = out["completions"]
    assert row["prompt"] == "How do I kill the process?" and row["category"] == "homonym"
    assert out["llm_success_rate"] == 1 and row["probability_llm"] == 0.75
    assert row["is_jailbreak_refusal_score"] == int(row["probability_refusal_score"] >= 0.5)
    scores = json.loads((work / SCORES).read_text())["completions/harmful_test_ablation_completions.json"]
    assert len(scores) == 3
    found = json.loads((work / STATISTICS).read_text())
    assert {row["judge"] for row in found["rates"]} == {"substring_matching", "refusal_score", "llm"}
    assert {row["dataset"] for row in found["comparisons"]} == {"harmful_test", "harmless", "kill_a_process"}
    kl = json.loads((work / DAMAGE).read_text())["kl"]
    assert set(kl) <= {"ablation", "actadd"}
    (tmp_path / "ask.txt").write_text("{prompt} {response}!")
    with pytest.raises(
        UserError, match=r"holds a run on other files: those of judge llm have changed since .input judge llm was"
    ):
        pipeline.run_study(config, work)


def test_files_of_one_name_have_results_of_their_own(config, six_sets, tmp_path):
    """The harmful prompts are in a file called harmless, two over-refusal sets and two loss sets have names that are taken."""
    shutil.copy(six_sets / "harmful_test.json", tmp_path / "harmless.json")
    config.data.harmful_test = str(tmp_path / "harmless.json")
    more = [tmp_path / folder / "harmless.txt" for folder in ("a", "b")] + [tmp_path / "x_baseline.txt"]
    for path in more:
        path.parent.mkdir(exist_ok=True)
        path.write_text("How do I kill the process?\n")
    config.data.over_refusal = tuple(map(str, more))
    config.loss.text_files = tuple(map(str, more[:2]))
    run = pipeline.run_study(config, tmp_path / "run")
    names = ["over_refusal_harmless", "over_refusal_harmless_2", "x_baseline"]
    assert run.read_json(SETUP)["over_refusal"] == names
    files = {path.name for path in (tmp_path / "run" / "completions").iterdir()}
    stems = {f"harmful_{kind}" for kind in ("baseline", "ablation", "actadd")} | {
        "harmless_baseline",
        "harmless_actadd",
    }
    stems |= {f"{name}_{kind}" for name in names for kind in ("baseline", "ablation")}
    assert files == {f"{stem}_{kind}.json" for stem in stems for kind in ("completions", "evaluations")}
    found = {(c.dataset, c.intervention, c.harmless) for c in read_conditions(run)}
    assert found == {(*split_stem(stem), not stem.startswith("harmful")) for stem in stems}
    losses = run.read_json("loss_evals/ablation_loss_eval.json")
    assert set(losses) - {"on_distribution"} == {"harmless", "b_harmless"}


def test_over_refusal_sets_that_are_not_there(config, tmp_path):
    config.data.over_refusal = ("xtest",)
    with pytest.raises(UserError, match="'xtest' is no file, and .* Run `refusal-jax data fetch`"):
        pipeline.run_study(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_study_without_baselines(config, tmp_path):
    """Conditions are the user's choice; without harmless baselines there is no on-distribution loss, and no error."""
    config.generation.conditions = ("harmful_ablation", "harmless_affine")
    run = pipeline.run_study(config, tmp_path / "run")
    assert run.worked == STAGES
    # An affine edit is measured where a condition names it, as all others are, and rests on the means.
    assert run.exists("completions/harmless_affine_evaluations.json") and run.exists("loss_evals/affine_loss_eval.json")
    assert "mean_diffs.safetensors" in run.manifest["stages"]["completions"]["reads"]
    assert "affine, to 1" in text_summary(run, pipeline.SECTIONS)


def test_refusal_tokens_from_data(config, tmp_path, monkeypatch):
    config.update(refusal_tokens=())
    seen, openings = [], [Opening(50, "S", 0.7, 0.1), Opening(40, "I", 0.2, 0.0), Opening(41, "J", 0.1, 0.9)]
    monkeypatch.setattr(directions, "measure_openings", lambda *args: seen.append(args) or openings)
    run = pipeline.run_study(config, tmp_path / "run")
    assert run.worked == STAGES and run.read_json(SETUP)["refusal_tokens_from"] == "data"
    ((_, harmful, harmless, shapes, usual),) = seen
    assert all("rob" in text for text in harmful) and all("bake" in text for text in harmless)
    assert shapes.rows == 4 and usual
    setup = run.read_json(SETUP)
    assert [token["id"] for token in setup["refusal_tokens"]] == [40, 50]
    assert setup["openings"][0] == {"id": 50, "text": "S", "harmful": 0.7, "harmless": 0.1, "chosen": True}
    assert run.manifest["stages"]["activations"]["found"]["openings"] == setup["openings"]
    assert pipeline.run_study(config, tmp_path / "run").worked == []


def test_generation_settings_of_the_checkpoint(config, llama, tmp_path):
    folder = shutil.copytree(llama, tmp_path / "model")
    tiny.edit_json(folder / "generation_config.json", repetition_penalty=1.9, top_k=3)
    config.update(model=str(folder))
    config.generation.update(max_new_tokens=12, conditions=("harmful_baseline", "harmless_baseline"))
    replies, file = {}, "generation_config.json"
    for asked, key, other in ((False, "left_out", "applied"), (True, "applied", "left_out")):
        config.generation.from_checkpoint = asked
        run = pipeline.run_study(config, tmp_path / key)
        record = {"file": file, key: {"repetition_penalty": 1.9}, other: {}}
        assert run.read_json(SETUP)["decoding"] == record
        rows = run.read_json("completions/harmful_test_baseline_completions.json")
        replies[asked] = [row["response"] for row in rows]
        model = load_model(folder, generation_from_checkpoint=asked)
        assert replies[asked] == model.generate([row["prompt"] for row in rows], 12)
    assert replies[True] != replies[False]
    tiny.edit_json(folder / file, num_beams=2)
    with pytest.raises(
        UserError, match=rf"{file} sets num_beams = 2, which may change greedy replies .*from_checkpoint"
    ):
        pipeline.run_study(config, tmp_path / "beams")
    assert not (tmp_path / "beams").exists()


def test_prompts_as_the_settings_ask(config, tmp_path):
    """Chat template, thinking and system prompt; the latter is in the completions and in what reads the study."""
    file, system = tmp_path / "mine.jinja", tmp_path / "system.txt"
    turn = "{% if m.role == 'user' %}Q: {{ m.content }} A:{% else %}{{ m.content }} {% endif %}"
    file.write_text(
        f"{{% for m in messages %}}{turn}{{% endfor %}}{{% if thinking and enable_thinking %}} Hm.{{% endif %}}"
    )
    system.write_text("Reply\nbriefly.\n")
    config.update(chat_template=str(file), thinking=True, system_prompt=str(system))
    run = pipeline.run_study(config, tmp_path / "run")
    setup = run.read_json(SETUP)
    assert setup["chat_template"] == str(file) and setup["thinking"] is True
    assert "".join(token["text"] for token in setup["post_instruction_tokens"]) == " A: Hm."
    assert setup["system_prompt"] == "Reply\nbriefly." and template_line(setup).endswith(
        "system prompt “Reply briefly.”"
    )
    (row, *_) = run.read_json("completions/harmful_test_baseline_completions.json")
    assert row["system_prompt"] == "Reply\nbriefly." and "briefly" not in row["prompt"]
    model = load_model(config.model, chat_template=str(file), thinking=True, system_prompt="Reply\nbriefly.")
    assert model.chat.render("x") == "Reply\nbriefly. Q: x A: Hm." and model.generate([row["prompt"]], 4) == [
        row["response"]
    ]
    study = FinishedStudy.read(tmp_path / "run", 1)
    assert Chat.load(config.model, 256, **study.template).render("x") == model.chat.render("x")
    for changed, name in ((file, "mine"), (system, "system")):
        before = changed.read_text()
        changed.write_text(f"{before} {{#- changed -#}}")
        with pytest.raises(UserError, match=rf"holds a run on other files: those of .*{name}\.\w+ have changed since"):
            pipeline.run_study(config, tmp_path / "run")
        changed.write_text(before)
    config.system_prompt = "Reply at length."
    with pytest.raises(
        UserError, match=r"another study: .*system_prompt was '.*system\.txt', is now 'Reply at length\.'"
    ):
        pipeline.run_study(config, tmp_path / "run")


@pytest.mark.parametrize("change", ["condition", "data", "loss", "model", "template", "template file", "system prompt"])
def test_bad_settings_leave_no_folder(change, config, tmp_path):
    if change == "condition":
        config.generation.conditions, message = ("harmful_baselin",), "unknown condition 'harmful_baselin'"
    elif change == "data":
        config.data.harmless_val, message = str(tmp_path / "gone.json"), r"gone\.json is not a file\. Check the path in"
    elif change == "loss":
        config.loss.text_files, message = (str(tmp_path / "gone.txt"),), r"gone\.txt is not a file\. Check the path"
    elif change == "template":
        config.chat_template, message = "orca", "there is no chat template 'orca'"
    elif change == "template file":
        config.chat_template, message = str(tmp_path / "gone.jinja"), r"gone\.jinja is not a file"
    elif change == "system prompt":
        config.system_prompt, message = str(tmp_path / "gone.txt"), r"gone\.txt is not a file\. Check the path"
    else:
        config.model, message = str(tmp_path / "gone"), "gone is not a folder"
    with pytest.raises(UserError, match=message):
        pipeline.run_study(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "name,value,least",
    [
        ("batch_size", -1, 0),
        ("select.batch_size", -1, 0),
        ("mesh.model", -2, 0),
        ("data.n_val", 0, 1),
        ("generation.max_new_tokens", 0, 1),
        ("loss.text_tokens", 0, 1),
    ],
)
def test_settings_that_are_too_small(name, value, least, config, tmp_path):
    config.update_from_flattened_dict({name: value})
    with pytest.raises(UserError, match=rf"^config\.{name} = {value}, expected at least {least}"):
        pipeline.run_study(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("positions", [6, -1])
def test_more_positions_than_the_template_has(positions, config, tmp_path):
    config.positions = positions
    message = rf"^config\.positions = {positions}, but the chat template puts 5 tokens after the .*Choose 1 to 5"
    with pytest.raises(UserError, match=message):
        pipeline.run_study(config, tmp_path / "run")


def test_completions_that_do_not_fit_are_refused_before_any_long_work(config, tmp_path):
    config.generation.max_new_tokens = 250
    with pytest.raises(
        UserError, match=r"^config\.generation\.max_new_tokens = 250 does not fit: the longest prompt of harm"
    ):
        pipeline.run_study(config, tmp_path / "run")
    assert not (tmp_path / "run" / SETUP).exists()


def test_refusal_tokens_are_checked(config, tmp_path):
    config.refusal_tokens = (999,)
    with pytest.raises(UserError, match="refusal token 999 is not in the vocabulary"):
        pipeline.run_study(config, tmp_path / "run")


def test_loss_files_and_conditions_are_checked_before_any_work(config, tmp_path):
    (tmp_path / "pile.jsonl").write_text('{"prompt": "p"}\n')
    config.loss.chat_files = (str(tmp_path / "pile.jsonl"),)
    with pytest.raises(UserError, match="pile.jsonl, row 1 has no response"):
        pipeline.run_study(config, tmp_path / "run")
    config.loss.chat_files, config.generation.conditions = (), ()
    with pytest.raises(UserError, match="conditions is empty: name at least one"):
        pipeline.run_study(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model", "~/gone"),
        ("chat_template", "~/gone.jinja"),
        ("data.harmful_val", "~/gone.csv"),
        ("data.over_refusal", ("~/gone.csv",)),
        ("loss.text_files", ("~/gone.txt",)),
        ("loss.chat_files", ("~/gone.json",)),
        ("judges", ("llm=~/gone",)),
        ("judges", ("harmbench=~/gone@~/gone.txt",)),
    ],
)
def test_home_folders_in_a_config(field, value, config, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    config.update_from_flattened_dict({field: value})
    with pytest.raises(UserError, match=rf"{tmp_path}/gone\S* is not a f"):
        pipeline.run_study(config, "~/run")
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("unchecked")
def test_prompts_that_splits_share_are_said(config, tmp_path, caplog):
    caplog.set_level(logging.INFO, "refusal_jax")
    config.data.harmless_val = config.data.harmless_train
    run = types.SimpleNamespace(write_json=lambda name, rows: None)
    prompts.draw(Study(config, run, tmp_path), None)
    said = caplog.text
    assert "Prompts: harmless_train, harmless_val come from the same prompts" in said and "3 different ones" in said
    assert "Prompts: 2 of the 3 prompts of harmful_test are in harmful_train too: they were trained on" in said


def test_a_study_of_a_model_on_the_hub_stays_at_its_commit(config, hub, llama, tmp_path, monkeypatch, caplog):
    old, new = "a" * 40, "b" * 40
    hub.add("org/tiny", llama, commit=old)
    config.model, work = "org/tiny", tmp_path / "run"

    def stop(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Study, "_load", stop)
        pipeline.run_study(config, work)
    hub.add("org/tiny", llama, commit=new, files={"generation_config.json": b'{"eos_token_id": 3}'})
    with caplog.at_level(logging.INFO):
        pipeline.run_study(config, work)
    assert f"org/tiny is now at commit {new} on the hub. This run began with {old} and goes on with it" in caplog.text
    manifest, setup = (json.loads((work / name).read_text()) for name in ("manifest.json", "setup.json"))
    assert manifest["inputs"]["commit of org/tiny"] == old and manifest["config"]["model"] == "org/tiny"
    assert "download" not in manifest["config"] and setup["model"] == f"org/tiny@{old}"
    assert model_title(setup["model"]) == "org/tiny" and model_title("/a/b/") == "b"
    study = FinishedStudy.read(work, 1)
    assert model_of([work], [study]) == study.checkpoint()
    assert base_model(study.checkpoint()) == {
        "name": "org/tiny",
        "revision": old,
        "fingerprint": manifest["inputs"]["model"],
    }
