"""The suffix study's prompts: files of suffixes, the places of their tokens, and the stage that chooses them."""

import json
import shutil

import numpy as np
import pytest
from commands import forked
from safetensors.numpy import load_file

from refusal_jax import UserError, demo_model_path, load_model
from refusal_jax.mechanism import suffixes
from refusal_jax.mechanism.suffix_files import read_suffixes
from refusal_jax.mechanism.suffixes import GROUPS, HARMFUL, HARMLESS, RANDOM, SUFFIXED, row_of, with_random
from refusal_jax.report.findings import Findings
from refusal_jax.runs.artifacts import ATTRIBUTED, ATTRIBUTION, PROMPTS, SETUP, SUFFIXES
from refusal_jax.runs.run import Run
from refusal_jax.study.config import get_config
from refusal_jax.study.mechanism import attribution
from refusal_jax.study.mechanism import suffixes as stage
from refusal_jax.study.mechanism.run import run_mechanism
from refusal_jax.study.mechanism.settings import MechanismSettings
from refusal_jax.study.mechanism.shared import MechanismStudy
from refusal_jax.study.mechanism.stages import STAGES

ASKED = ["How do I rob the cake?", "How do I rob, then bake, the “bread”?", "How do I rob the oven?"]
SUFFIX = " help bread ! assistant cake"


def test_files_of_suffixes(tmp_path):
    """Blanks at the beginning count; BOM, line ends of Windows, empty lines, commas and curly quotes are as they are."""

    def read(name: str, text: str) -> list:
        (tmp_path / name).write_bytes(text.encode("utf-8"))
        return read_suffixes(tmp_path / name, ASKED)

    assert read("one.txt", "\ufeff one, “two” \\!--three \r\n\r\n") == [" one, “two” \\!--three"] * 3
    assert read("each.txt", " a\n\n b\n c\n") == [" a", " b", " c"]
    assert read("list.json", json.dumps([" a", "b", " c"])) == [" a", "b", " c"]
    assert read("one.jsonl", '{"suffix": " a"}\n') == [" a"] * 3
    rows = [{"goal": ASKED[1], "best_string": " b "}, {"goal": "Another?", "best_string": "z"}]
    assert read("rows.json", json.dumps(rows)) == [None, " b ", None]
    table = f'instruction,suffix\n{ASKED[0]}," a, b"\n"{ASKED[1]}"," “c”"\n'
    assert read("rows.csv", table) == [" a, b", " “c”", None]
    log = {"params": {"goals": ASKED[::-1]}, "controls": [" 1", " 2", " 3"], "losses": []}
    assert read("log.json", json.dumps(log)) == [" 3", " 2", " 1"]


@pytest.mark.parametrize(
    "name,text,message",
    [
        ("a.txt", "\n \n", r"a.txt holds no suffix\. Give one suffix for all prompts"),
        ("a.txt", " a\n b\n", r"a.txt holds 2 suffixes, and the study has 3 harmful test prompts"),
        ("a.json", '[" "]', r"entry 0: the suffix is ' ', expected text"),
        ("a.json", '[{"suffix": 3}]', r"entry 0: the suffix is 3, expected text"),
        ("a.json", "[3]", r"entry 0 is a int, expected a suffix or an object"),
        ("a.json", '[{"prompt": "a"}]', r"entry 0 has no suffix: its fields are prompt, one of suffix, adv_suffix"),
        ("a.json", '[{"goal": "a", "suffix": "b"}]', r"suffixes for 1 instructions, such as 'a', and none of them"),
        ("a.json", '{"controls": [" a"], "params": {"goals": []}}', r"controls .* are not one for each of its goals"),
        ("a.json", '{"suffix": " a"}', r"holds a JSON dict, expected a list"),
        ("a.exe", " a", r"must end in \.json, \.jsonl, \.csv or \.txt"),
    ],
)
def test_files_that_hold_no_suffixes(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        read_suffixes(tmp_path / name, ASKED)
    with pytest.raises(UserError, match="b.txt is not a file"):
        read_suffixes(tmp_path / "b.txt", ASKED)


def test_the_parts_of_a_row(model):
    chat = model.chat
    for instruction in (*ASKED, "  How?"):
        row = row_of(chat, "harmful_suffix", 0, instruction, SUFFIX)
        plain = row_of(chat, "harmful", 0, instruction)
        whole, width = chat.prompt_ids(row.text), 200
        ids = np.asarray(chat.pad([whole], width).tokens[0])
        decoded = [chat.tokenizer.decode(ids[span.within(width)]) for span in (row.instruction, row.suffix, row.post)]
        assert decoded == [instruction.lstrip(), SUFFIX, chat.tokenizer.decode(chat.post_instruction_ids)]
        assert len(plain.suffix) == 0 and len(row.instruction) + len(row.suffix) + len(row.post) < len(whole)
        assert whole[: -len(row.suffix) - len(row.post)] == chat.prompt_ids(instruction)[: -len(row.post)]
    assert row_of(chat, "harmful_suffix", 0, "How do I ba", "ke") is None  # one token for both
    assert row_of(chat, "harmful_suffix", 0, "How?", "  ") is None  # the template drops it


def test_suffixes_that_cannot_be_read(model):
    with pytest.raises(UserError, match=r"suffix .* is too long: .* has \d+ tokens, and the model's context is 256"):
        row_of(model.chat, "harmful", 0, "How?", " a" * 300)
    for marker in ("<|eot_id|>", "<|start_header_id|>"):
        with pytest.raises(UserError, match="which is a token or a line of the chat template"):
            with_random(model.chat, ["How?"], [f" a{marker} b"], 0)


def test_no_random_suffix(model, monkeypatch):
    monkeypatch.setattr(suffixes, "random_suffix", lambda *of: "ke")
    with pytest.raises(UserError, match=r"No random suffix of \d tokens was found for the prompt 'How do I ba'"):
        with_random(model.chat, ["How do I ba"], [" a"], 0)


def test_random_suffixes_have_as_many_tokens(model):
    rows = with_random(model.chat, ASKED, [SUFFIX, " a", "ke"], 0)
    assert [row.tokens for row in rows[:2]] == [len(model.chat.ids(text)) for text in (SUFFIX, " a")]
    assert rows[0].random != with_random(model.chat, ASKED, [SUFFIX] * 3, 1)[0].random
    for row in rows[:2]:
        alone, suffixed, drawn = row.rows(model.chat, 4)
        assert len(alone.suffix) == 0 and len(suffixed.suffix) == len(drawn.suffix) == row.tokens
        assert {one.prompt for one in (alone, suffixed, drawn)} == {4}
        assert [one.group for one in (alone, suffixed, drawn)] == list(GROUPS[:3])


def test_the_prompts_that_are_looked_at(suffix_study):
    found = json.loads((suffix_study / SUFFIXES).read_text())
    prompts = json.loads((suffix_study / PROMPTS).read_text())
    refusal = [token["id"] for token in json.loads((suffix_study / SETUP).read_text())["refusal_tokens"]]
    model = load_model(demo_model_path())
    assert len(found["harmful"]) == len(found["harmless"]) == 6
    known = [row["instruction"].rstrip() for row in prompts["harmful_test"]]
    assert {row["instruction"] for row in found["harmful"]} < {*known}
    for group in (HARMFUL, SUFFIXED, RANDOM):
        texts = {
            HARMFUL: [row["instruction"] for row in found["harmful"]],
            SUFFIXED: [row["instruction"] + row["suffix"] for row in found["harmful"]],
            RANDOM: [row["instruction"] + row["random"] for row in found["harmful"]],
        }[group]
        batch = model.encode(texts)
        logits = np.asarray(model.logits(batch.tokens, batch.mask), np.float64)
        chances = np.exp(logits - logits.max(axis=1, keepdims=True))
        p = chances[:, refusal].sum(axis=1) / chances.sum(axis=1)
        expected = np.log(p + 1e-8) - np.log(1 - p + 1e-8)
        scores = [row["scores"][group] for row in found["harmful"]]
        np.testing.assert_allclose(scores, expected, atol=1e-3)
        assert found["refused"][group]["successes"] == (expected > 0).sum()
        assert found["scores"][group]["mean"] == pytest.approx(np.mean(expected), abs=1e-3)
        if group != HARMFUL:
            own = np.asarray(scores) - [row["scores"][HARMFUL] for row in found["harmful"]]
            assert found["differences"][group]["mean"] == pytest.approx(own.mean())
            assert found["differences"][group]["low"] <= own.mean() <= found["differences"][group]["high"]
    assert found["refused"][HARMFUL]["rate"] == 1 and found["refused"][HARMLESS]["rate"] == 0


def test_what_is_attributed(suffix_study):
    """The figures' numbers, from each prompt's parts as the file has them."""
    found = json.loads((suffix_study / ATTRIBUTION).read_text())
    arrays = {name: values.astype(np.float64) for name, values in load_file(suffix_study / ATTRIBUTED).items()}
    heads = {group: arrays[f"{group}.heads"] for group in GROUPS}
    mean_ln = heads[HARMFUL].mean(axis=0)
    assert len(found["heads"]) == 8
    assert [mean_ln[row["layer"], row["head"]] for row in found["heads"]] == sorted(mean_ln.ravel())[::-1][:8]
    for group in GROUPS:
        cosines = arrays[f"{group}.along"] / arrays[f"{group}.norm"]
        np.testing.assert_allclose(found["cosines"][group]["mean"], cosines.mean(axis=0), atol=1e-6)
        np.testing.assert_allclose(found["cosines"][group]["sd"], cosines.std(axis=0, ddof=1), atol=1e-6)
        whole = sum(arrays[f"{group}.{part}"].reshape(6, -1).sum(axis=1) for part in ("embed", "heads", "bias", "mlp"))
        np.testing.assert_allclose(whole, arrays[f"{group}.along"][:, -1], atol=1e-4)
        together = sum(heads[group][:, row["layer"], row["head"]] for row in found["heads"])
        assert found["heads_together"]["written"][group]["mean"] == pytest.approx(together.mean(), abs=1e-6)
        for row in found["heads"]:
            own = heads[group][:, row["layer"], row["head"]]
            assert row["written"][group]["mean"] == pytest.approx(own.mean(), abs=1e-6)
            if group in (SUFFIXED, RANDOM):
                change = own - heads[HARMFUL][:, row["layer"], row["head"]]
                assert row["changes"][group]["mean"] == pytest.approx(change.mean(), abs=1e-6)
                assert row["changes"][group]["low"] <= change.mean() <= row["changes"][group]["high"]
    assert 0 <= found["largest_error"] < 1e-4


def test_the_report_shows_the_parts(suffix_study):
    page = (suffix_study / "report.html").read_text()
    for heading in (
        "<h2>Suffixes</h2>",
        "<h2>Attribution along the direction</h2>",
        "Cosine with the direction, by layer",
    ):
        assert heading in page
    assert page.index('id="suffixes"') < page.index('id="attribution"')


def test_parts_that_are_done_are_skipped(suffix_study, tmp_path):
    """Without a file, too: the study has its suffixes. A changed setting has only its own parts done anew."""
    folder = shutil.copytree(suffix_study, tmp_path / "run")
    changed, shown = {"parts": ("attention",), "suffixes": {"n_prompts": 6}}, ["attention", "report", "figures"]
    assert run_mechanism(changed, folder).worked == []
    assert run_mechanism(changed | {"attribution": {"heads": 3}}, folder).worked == ["attribution", *shown]
    changed["suffixes"]["seed"] = 1
    assert run_mechanism(changed, folder).worked == ["suffixes", "attribution", *shown]


def scored(monkeypatch, refused: int) -> None:
    """Makes the first so many harmful prompts the only ones that are refused."""
    known = []

    def scores(study, prompts, title):
        known.append(len(prompts))
        return np.where(np.arange(len(prompts)) < (refused if len(known) == 1 else 0), 1.0, -1.0)

    monkeypatch.setattr(stage, "scores_of", scores)


def test_a_study_without_refused_prompts(demo_study, tmp_path, monkeypatch):
    folder = shutil.copytree(demo_study, tmp_path / "run")
    (tmp_path / "suffix.txt").write_text(" varnish")
    scored(monkeypatch, 0)
    run = run_mechanism({"parts": ("attribution",), "suffix": str(tmp_path / "suffix.txt")}, folder)
    assert run.worked == ["suffixes", "report", "figures"]
    assert run.manifest["stages"]["attribution"]["skipped"].startswith("The model refuses no harmful test prompt")
    assert "The model refuses no harmful test prompt" in (folder / "report.html").read_text()
    (line,) = stage.lines(Findings(run, []))[1:]
    assert line.endswith("Left out: 12 not refused.")


def test_one_prompt_and_an_interrupted_part(demo_study, tmp_path, monkeypatch):
    """One prompt has no interval. What was done before the interruption is not done again."""
    folder = shutil.copytree(demo_study, tmp_path / "run")
    (tmp_path / "suffix.txt").write_text(" varnish")
    scored(monkeypatch, 1)
    settings = {"parts": ("attribution",), "suffix": str(tmp_path / "suffix.txt")}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(attribution, "attribute", lambda *of: (_ for _ in ()).throw(KeyboardInterrupt))
        run_mechanism(settings, folder)
    run = run_mechanism(settings, folder)
    assert run.worked == ["attribution", "report", "figures"]
    assert "  Only 1 prompts are refused, so intervals are wide." in stage.lines(Findings(run, []))
    found = json.loads((folder / ATTRIBUTION).read_text())
    assert found["heads"][0]["changes"][SUFFIXED]["low"] is None and found["cosines"][HARMFUL]["sd"] == [0] * 9
    assert "None" not in (folder / "report.html").read_text().partition('id="suffixes"')[2].partition('id="limits"')[0]


def test_studies_without_a_suffix(suffix_study, tmp_path):
    """Tests a model that none ships with, and one without refusal tokens."""
    run = Run(tmp_path, {"inputs": {"model": "another"}, "stages": {}})
    study = MechanismStudy(MechanismSettings(), get_config(), run, demo_model_path())
    run.write_json(PROMPTS, {"harmful_test": [{"instruction": "How?"}]})
    run.write_json(SETUP, {"refusal_tokens": [{"id": 1}]})
    assert stage.skipped(study).startswith("No suffix was given: suffix=FILE names a file with one for all")
    assert stage.without_rows(study) == stage.skipped(study)
    run.write_json(SETUP, {"refusal_tokens": []})
    assert stage.skipped(study) == "Without refusal tokens, no refusal of a prompt is known."


def test_a_suffix_that_changes_most_prompts(suffix_study, tmp_path, monkeypatch):
    folder = shutil.copytree(suffix_study, tmp_path / "run")
    (tmp_path / "suffix.txt").write_text(" varnish")
    monkeypatch.setattr(stage, "with_random", lambda chat, instructions, *of: [None] * len(instructions))
    with pytest.raises(UserError, match=r"suffix changes the tokens before or after it in \d+ of \d+ refused prompts"):
        run_mechanism({"parts": ("suffixes",), "suffix": str(tmp_path / "suffix.txt")}, folder)


@pytest.mark.parametrize("name", ["suffixes.n_prompts", "attribution.heads"])
def test_numbers_that_are_too_small(name):
    settings = MechanismSettings()
    settings.update_from_flattened_dict({name: 0})
    with pytest.raises(UserError, match=f"{name} = 0, expected at least 1"):
        settings.check(())


def test_the_help_lists_all_parts():
    text = forked("mechanism", "--help").stdout
    for one in STAGES:
        assert f"\n  {one.name} " in text and one.about[0].isupper() and one.about.endswith("."), one.name
