"""The whole study on the embedded model: the phenomenon, compiles, resume, laziness, sharding."""

import json
import pathlib
import shutil
from collections import Counter

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from refusal_jax import UserError, demo_model_path
from refusal_jax.chat import prefix, residuals
from refusal_jax.chat.prompts import Chat
from refusal_jax.data.sources import resolve
from refusal_jax.models import generate as generate_module
from refusal_jax.models import losses
from refusal_jax.models import prefix as models_prefix
from refusal_jax.runs.ledger import Ledger
from refusal_jax.runs.run import Run
from refusal_jax.study import completions, directions, scoring, shared
from refusal_jax.study.config import get_config
from refusal_jax.study.study import run_study

PROGRAMS = {
    "extract": residuals.extract_batch,
    "score": scoring.score_edits,
    "induce": scoring.score_from_layer,
    "advance": scoring.advance,
    "embed": prefix.embed,
    "begun": models_prefix.begun,
    "empty": generate_module.empty,
    "admit": generate_module.admit,
    "decode": generate_module.decode,
    "base": scoring.last_logits,
    "loss": losses.loss_batch,
    "project": residuals.project,
}
VOLATILE = ("manifest.json", "report.html", "log.txt", ".lock")  # hold times
CONDITIONS = ("harmful_baseline", "harmful_ablation", "harmful_actadd", "harmless_baseline", "harmless_actadd")


def small_config(**data):
    config = get_config()
    config.batch_size = 16
    config.data.update({"n_train": 32, "n_val": 16, "n_test": 12, **data})
    config.generation.update({"max_new_tokens": 40, "batch_size": 30})
    config.loss.batch_size = 4
    return config


def artifacts(folder: pathlib.Path) -> dict[str, bytes]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in VOLATILE)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def compiled() -> dict[str, int]:
    return {name: program._cache_size() for name, program in PROGRAMS.items()}


TOKENISED = Counter()  # texts that the study of `finished` gave its tokenizer


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished small study: its folder, and how many programs it compiled for each purpose."""
    before, tokenise = compiled(), PreTrainedTokenizerBase.__call__

    def counted(self, text, **settings):
        TOKENISED.update([text])
        return tokenise(self, text, **settings)

    folder = tmp_path_factory.mktemp("study") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PreTrainedTokenizerBase, "__call__", counted)
        run_study(small_config(), folder)
    return folder, {name: count - before[name] for name, count in compiled().items()}


def test_the_demo_model_is_small_and_whole():
    files = {path.name: path.stat().st_size for path in demo_model_path().iterdir()}
    assert sum(files.values()) <= 8 << 20
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= files.keys()


def test_the_embedded_model_shows_the_phenomenon(finished):
    def refused(name):
        found = json.loads((finished[0] / f"completions/{name}_evaluations.json").read_text())
        return 1 - found["substring_matching_success_rate"]

    assert refused("harmful_baseline") > 0.9 and refused("harmless_baseline") < 0.1
    assert refused("harmful_ablation") < 0.2 and refused("harmful_actadd") < 0.2 and refused("harmless_actadd") > 0.8


def test_directions_at_template_tokens_of_layer_zero_are_exactly_zero(finished):
    diffs = Run(finished[0], {}).read_tensors("mean_diffs.safetensors")["mean_diffs"]
    assert diffs.dtype == np.float64 and not diffs[:, 0].any()
    assert np.linalg.norm(diffs[:, 1:], axis=-1).min() > 0


def test_each_text_is_tokenised_once(finished):
    prompts = [
        row["instruction"] for rows in json.loads((finished[0] / "prompts.json").read_text()).values() for row in rows
    ]
    chat = Chat.load(demo_model_path(), 1024)
    assert {chat.render(text) for text in prompts} <= TOKENISED.keys()
    assert {text: count for text, count in TOKENISED.items() if count > 1} == {}


def test_one_compile_serves_every_candidate_and_condition(finished):
    folder, counts = finished
    rows = json.loads((folder / "direction_evaluations.json").read_text())
    assert sum(row["steering_score"] is not None for row in rows) > 10
    assert all(len(json.loads((folder / f"completions/{c}_completions.json").read_text())) == 12 for c in CONDITIONS)
    # Prompts have at most two padded lengths; replies, of which the loss is measured, three.
    assert counts["admit"] == counts["decode"] == 1 and counts["loss"] <= 3, counts
    assert all(counts[name] <= 2 for name in ("extract", "score", "induce", "project")), counts
    # What all prompts begin with is a row of its own: unedited, under candidates, and under interventions.
    assert all(counts[name] <= 3 for name in ("advance", "embed", "begun")), counts


def test_other_directions_compile_nothing_new(finished, tmp_path):
    before = compiled()
    prompts = json.loads(resolve("bundled", "harmful_train").read_text())
    (tmp_path / "train.json").write_text(json.dumps(prompts[100:]))
    run_study(small_config(harmful_train=str(tmp_path / "train.json")), tmp_path / "run")
    grown = {name: count - before[name] for name, count in compiled().items() if name != "loss"}
    assert not any(grown.values()), grown


def test_a_finished_study_does_no_model_work(finished, monkeypatch):
    monkeypatch.setattr(shared, "load_model", lambda *a, **k: pytest.fail("the model was loaded"))
    before = artifacts(finished[0])
    assert run_study(small_config(), finished[0]).worked == []
    assert artifacts(finished[0]) == before


@pytest.mark.parametrize("stop_after", [1, 4, 7, 9])
def test_stopped_at_any_ledger_row_it_ends_the_same(finished, tmp_path, monkeypatch, stop_after):
    append, calls = Ledger.append, []

    def stopping(self, rows):
        append(self, rows)
        calls.append(1)
        if len(calls) == stop_after:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Ledger, "append", stopping)
        run_study(small_config(), tmp_path / "run")
    assert not (tmp_path / "run" / "report.html").exists()
    run_study(small_config(), tmp_path / "run")
    assert artifacts(tmp_path / "run") == artifacts(finished[0])


def test_finished_stages_are_not_repeated_after_a_stop(finished, tmp_path, monkeypatch):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(completions, "complete", stop)
        run_study(small_config(), tmp_path / "run")
    monkeypatch.setattr(directions, "extract", lambda *a, **k: pytest.fail("extraction was repeated"))
    assert run_study(small_config(), tmp_path / "run").worked[0] == "completions"


def test_a_damaged_artifact_is_made_again(finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished[0], folder)
    (folder / "loss_evals" / "ablation_loss_eval.json").write_text("{}")
    assert run_study(small_config(), folder).worked == ["loss"]  # the same numbers, so the report still holds
    assert artifacts(folder) == artifacts(finished[0])


def test_the_full_grid_picks_the_same(finished, tmp_path):
    config = small_config()
    config.select.full_grid = True
    run_study(config, tmp_path / "run")
    lazy, full = (json.loads((f / "direction_evaluations.json").read_text()) for f in (finished[0], tmp_path / "run"))
    assert all(None not in row.values() for row in full) and any(None in row.values() for row in lazy)
    for one, other in zip(lazy, full, strict=True):
        assert all(value is None or value == pytest.approx(other[key], abs=1e-5) for key, value in one.items())
    picks = [json.loads((f / "direction_metadata.json").read_text()) for f in (finished[0], tmp_path / "run")]
    assert picks[0] == picks[1]


@pytest.mark.parametrize(
    "mesh",
    [{"data": 8}, {"data": 2, "model": 4}, {"model": 8}, {"fsdp": 4, "model": 2}, {"data": 2, "fsdp": 2, "model": 2}],
)
def test_a_mesh_of_eight_devices_gives_the_same_study(finished, tmp_path, mesh):
    config = small_config()
    config.mesh.update(mesh)
    config.generation.batch_size = 32
    run_study(config, tmp_path / "run")
    ours, theirs = (json.loads((f / "direction_evaluations.json").read_text()) for f in (tmp_path / "run", finished[0]))
    for one, other in zip(ours, theirs, strict=True):
        assert all(v == other[key] or v == pytest.approx(other[key], abs=1e-4) for key, v in one.items())
    same = [n for n in artifacts(finished[0]) if n.startswith("completions/") or n == "direction_metadata.json"]
    assert len(same) == 2 * len(CONDITIONS) + 1
    assert all((tmp_path / "run" / n).read_bytes() == (finished[0] / n).read_bytes() for n in same)


def test_settings_that_cannot_work_are_refused(tmp_path):
    config = small_config(n_test=0)
    with pytest.raises(UserError, match=r"^config\.data\.n_test = 0, expected at least 1"):
        run_study(config, tmp_path / "run")
    with pytest.raises(UserError, match="needs 64 devices, there are 8"):
        config = small_config()
        config.mesh.data = 64
        run_study(config, tmp_path / "run")
