"""The report, on made-up runs: what it says must follow from the files, and nothing in them may become markup."""

import json
import math
import re
import warnings
from html.parser import HTMLParser

import numpy as np
import pytest

from refusal_jax.chat.thoughts import split
from refusal_jax.data.sampling import SPLITS
from refusal_jax.judges.evaluations import evaluate_completions
from refusal_jax.judges.judge import Verdict, judge_all
from refusal_jax.judges.statistics import Rate, mean_interval, wilson_interval
from refusal_jax.judges.tables import tables
from refusal_jax.judges.text import EXTENDED, TEXT_JUDGES
from refusal_jax.report import figures
from refusal_jax.report.concerns import (
    auc,
    broken_completions,
    judge_disagreement,
    other_judges,
    score_disagreement,
    selection_disagreement,
    shared_prompts,
    unfinished_thoughts,
    weak_separation,
)
from refusal_jax.report.page import write_report
from refusal_jax.report.summary import JudgedCondition, damage_in_words
from refusal_jax.report.text import text_summary
from refusal_jax.report.verdict import verdict_in_words
from refusal_jax.runs.run import Run
from refusal_jax.study.config import get_config
from refusal_jax.study.directions import setup_lines
from refusal_jax.study.selection import Rule, pick
from refusal_jax.study.study import SECTIONS

HOSTILE = (
    "<script>alert('x')</script>",
    '"><img src=x onerror=alert(1)> </div></details> &amp; \'single\' "double"',
    "W" * 400,
    "שלום \u202eright to left\u202c مرحبا 🎉👩‍👩‍👧 é",
    "line one\nline two\n\n\tindented\r\nline five\x00\x1b[31m\ud800",
    "{{ 7 * 7 }} {% raw %} ${x} <!-- --> ]]>",
)
TOKENS = ("<|im_end|>", "\\n", "<script>alert(2)</script>", "assistant \u2581$x^2$", "-->\\n")
ANSWER = "Here is what you asked for. First, gather the ingredients. Second, mix them well. " * 9
REFUSAL = "I'm sorry, but I cannot help with that request. " * 3
CONDITIONS = {
    "harmful_baseline": 0.97,
    "harmful_ablation": 0.03,
    "harmful_actadd": 0.06,
    "harmless_baseline": 0.01,
    "harmless_actadd": 0.98,
}
VERDICTS = [f"completions/{name}_evaluations.json" for name in CONDITIONS]


def candidates(layers: int, positions: int, full_grid: bool, rng) -> list[dict]:
    """Published-format rows with a best band in the middle; evaluated as the selection does it, or all."""
    rule, rows = Rule(layers), []
    for position in range(-positions, 0):
        for layer in range(layers):
            near = math.exp(-(((layer / layers - 0.55) / 0.18) ** 2)) * (1.0 if position % 2 else 0.45)
            noise = rng.normal(0, 0.25, 3)
            row = {"position": position, "layer": layer, "refusal_score": None, "steering_score": None}
            row["kl_div_score"] = None
            scores = {
                "steering_score": -7 + 10 * near + noise[0],
                "kl_div_score": abs(0.25 - 0.23 * near + 0.1 * noise[1]),
            }
            for key, value in {**scores, "refusal_score": 5 - 11 * near + noise[2]}.items():
                if full_grid or not rule.verdict(row):
                    row[key] = float(value)
            rows.append(row)
    return rows


def completions(condition: str, refused: float, n: int) -> list[dict]:
    rows = []
    for i in range(n):
        reply = REFUSAL if i < round(refused * n) else ANSWER
        odd = HOSTILE[i // 14 % len(HOSTILE)] if i % 7 < 2 else f"Request number {i} about a topic"
        category = None if condition.startswith("harmless") else HOSTILE[0] if i == 0 else "Malware/Hacking"
        rows.append({"category": category, "prompt": f"{i}: {odd}", "response": f"{odd if i % 7 < 2 else ''}\n{reply}"})
    return rows


def make_run(folder, layers=6, positions=5, width=16, n_val=32, full_grid=False, conditions=CONDITIONS):
    """A finished run's folder, with everything but the report; returns the run and the evaluations' names."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads(json.dumps(get_config().to_dict()))
    inputs = {"model": "ab" * 32, "harmful_test": "cd" * 32, '<b>"odd"</b>.jsonl': "ef" * 32}
    run = Run(folder, {"config": config, "inputs": inputs, "stages": {}})
    for minute, (stage, seconds) in enumerate(
        {"prompts": 0.1, "activations": 12.5, "selection": 61, "loss": 7}.items()
    ):
        done = {"seconds": seconds, "finished": f"2026-03-04T05:{minute:02}:00Z", "versions": {"jax": "0.8.0"}}
        run.manifest["stages"][stage] = {"reads": {}, "writes": {}, **done}
    tokens = [{"id": 100 + i, "text": text} for i, text in enumerate((*TOKENS, *TOKENS)[:positions])]
    setup = {"model": "/models/<i>tiny</i> & co", "dtype": "bfloat16", "n_layers": layers, "d_model": width}
    setup |= {"positions": positions, "post_instruction_tokens": tokens, "refusal_tokens": [{"id": 40, "text": "I"}]}
    openings = [
        {"id": 41 + i, "text": f"T{i}", "harmful": 0.02 * i, "harmless": 0.3, "chosen": False} for i in range(14)
    ]
    openings.insert(0, {"id": 40, "text": "I", "harmful": 0.75, "harmless": 0.001, "chosen": True})
    openings.append({"id": 7, "text": HOSTILE[0], "harmful": 0.0, "harmless": 0.6, "chosen": False})
    setup |= {"chat_template": "/home/<b>me</b>.jinja", "thinking": False, "bundled_prompts": []}
    setup |= {"refusal_tokens_from": "data", "openings": openings}
    run.write_json("setup.json", setup)
    run.write_json("prompts.json", {split: [{"instruction": split, "category": None}] for split in SPLITS})
    scores = {"harmful": rng.normal(6, 3, n_val), "harmless": rng.normal(-8, 3, n_val)}
    kept = {"harmful": scores["harmful"] > 0, "harmless": scores["harmless"] < 0}
    splits = [f"{side}_{split}" for split in ("train", "val") for side in ("harmful", "harmless")]
    sides = {split: split.split("_")[0] for split in splits}
    run.write_json(
        "filter.json", {s: {"scores": scores[k].tolist(), "kept": kept[k].tolist()} for s, k in sides.items()}
    )
    harmful = rng.normal(size=(positions, layers, width)) + np.linspace(0, 4, layers)[:, None]
    harmless = rng.normal(size=(positions, layers, width))
    harmful[:, 0] = harmless[:, 0]
    means = {"mean_diffs": harmful - harmless, "harmful": harmful, "harmless": harmless}
    run.write_tensors("mean_diffs.safetensors", means)
    rows = candidates(layers, positions, full_grid, rng)
    best = pick(rows, Rule(layers))
    run.write_json("direction_evaluations.json", rows)
    run.write_json("direction_metadata.json", {"pos": best["position"], "layer": best["layer"]})
    direction = means["mean_diffs"][best["position"], best["layer"]].astype(np.float32)
    run.write_tensors("direction.safetensors", {"direction": direction})
    grow = np.linspace(0.1, 1, layers) ** 2 * 40
    along = {
        f"{side}_val": rng.normal(mean, 0.35, (n_val, layers)) * grow
        for side, mean in (("harmful", 1), ("harmless", 0))
    }
    run.write_tensors("projections.safetensors", {k: v.astype(np.float32) for k, v in along.items()})
    texts, verdicts = {}, {}
    for name, refused in conditions.items():
        rows = completions(name, refused, 100 if name.startswith("harmful") else 60)
        path = run.path(f"completions/{name}_evaluations.json")
        path.parent.mkdir(exist_ok=True)  # lone surrogates survive only as ASCII escapes
        judged = {name: judge.judge(rows) for name, judge in TEXT_JUDGES.items()}
        first = {"substring_matching": judged["substring_matching"]}
        path.write_text(json.dumps(evaluate_completions(rows, first)))
        texts[name], verdicts[name] = rows, judged
    for i, name in enumerate(("baseline", "ablation", "actadd")):
        losses = {"on_distribution": 0.2 + 0.015 * i * i, "pile<br>": 2.35 + 0.01 * i}
        values = {k: {"ce_loss": v, "perplexity": math.exp(v), "n_tokens": 12345} for k, v in losses.items()}
        run.write_json(f"loss_evals/{name}_loss_eval.json", values)
    run.write_json("statistics.json", tables(texts, verdicts, None))
    moved = {"kl_per_token": 0.0123, "n_tokens": 1234, "per_row": mean_interval([0.01, 0.02])}
    run.write_json("damage.json", {"kl": {"ablation": moved, "actadd": moved}})
    return run, [f"completions/{name}_evaluations.json" for name in conditions]


def page_of(run, verdicts) -> str:
    record = {
        "reads": {},
        "writes": dict.fromkeys(verdicts, ""),
        "seconds": 1,
        "finished": "",
        "versions": {"jax": "0.8.0"},
    }
    run.manifest["stages"]["evaluations"] = record
    write_report(run, SECTIONS)
    return run.path("report.html").read_text(encoding="utf-8")


class Elements(HTMLParser):
    """Start tags of a page, with their attributes, and its text."""

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.text, self.open = [], "", []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def run_and_page(tmp_path_factory):
    run, verdicts = make_run(tmp_path_factory.mktemp("report") / "run")
    return run, page_of(run, verdicts)


def test_nothing_from_the_run_becomes_markup(run_and_page):
    page = Elements(run_and_page[1])
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "img", "iframe", "object", "embed", "link", "base", "form", "i-", "br"}
    assert not any(key.startswith("on") for _, attrs in page.tags for key in attrs)
    assert "<script>alert('x')</script>" in page.text and "{{ 7 * 7 }}" in page.text
    assert "<i>tiny</i> & co" in page.text and "pile<br>" in page.text
    assert "\x00" not in page.text and "\x1b" not in page.text


def test_page_loads_nothing(run_and_page):
    page = run_and_page[1]
    for tag, attrs in Elements(page).tags:
        for key in ("src", "href", "xlink:href", "data", "action", "poster", "srcset"):
            value = attrs.get(key) or "#"
            assert value.startswith(("#", "data:image/png;base64,")) or (tag == "a" and value.startswith("https://"))
    assert "@import" not in page and not re.search(r"url\((?!#)", page)
    assert "default-src 'none'" in page


def test_references_inside_the_page_resolve_and_ids_are_unique(run_and_page):
    page = run_and_page[1]
    ids = [attrs["id"] for _, attrs in Elements(page).tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:url\(#|href="#)([^)"]+)', page)) <= set(ids)


def test_summary_numbers_are_those_of_the_evaluations(run_and_page):
    run, page = run_and_page
    table = page[page.index('id="rates"') : page.index('id="direction"')]
    shown = re.findall(
        r'data-refused="(\d+)"><b>([\d.]+) %</b></td>\s*<td class="n"><small>([\d.]+) – ([\d.]+)</small>', table
    )
    assert len(shown) == len(VERDICTS)
    for name, (refused, rate, low, high) in zip(VERDICTS, shown, strict=True):
        evaluations = run.read_json(name)
        n = len(evaluations["completions"])
        expected = 1 - evaluations["substring_matching_success_rate"]
        assert int(refused) == round(expected * n)
        assert (rate, low, high) == tuple(f"{100 * v:.1f}" for v in (expected, *wilson_interval(int(refused), n)))


def test_template_and_refusal_tokens_are_told(run_and_page, tmp_path):
    run, page = run_and_page
    text = " ".join(Elements(page).text.split())
    assert "Chat template: /home/<b>me</b>.jinja, thinking off" in text and "Refusal tokens, from data I" in text
    table = page[
        page.index("How the refusal tokens were found") : page.index("</details>", page.index("How the refusal"))
    ]
    rows = re.findall(r'title="id (\d+)">.*?>([\d.]+)</td><td class="n">([\d.]+)</td><td>(yes|no)', table, re.DOTALL)
    assert rows[0] == ("40", "0.750", "0.001", "yes") and rows[1] == ("7", "0.000", "0.600", "no") and len(rows) == 10
    assert setup_lines(run.read_json("setup.json")) == [
        f"Chat template: /home/<b>me</b>.jinja, thinking off. Post-instruction tokens: {' '.join(TOKENS)}",
        "Refusal tokens, from data (mean probability after harmful and harmless prompts): I (0.750, 0.001)",
    ]
    run, verdicts = make_run(tmp_path / "given")
    bundled = setup_lines(run.read_json("setup.json") | {"bundled_prompts": ["harmful_val", "harmless_test"]})[0]
    assert bundled.startswith("Prompts: bundled (harmful_val, harmless_test). They are made for the embedded model")
    setup = run.read_json("setup.json") | {"refusal_tokens_from": "config", "openings": [], "thinking": True}
    run.write_json("setup.json", setup)
    assert "How the refusal tokens were found" not in page_of(run, verdicts)
    assert setup_lines(setup)[0].startswith("Chat template: /home/<b>me</b>.jinja, thinking on. ")
    added = {"thinking": False, "reply_start": {"added": "</think>", "closes": True}}
    first, note = setup_lines(setup | added)[:2]
    assert ", thinking closed. " in first and note.startswith("The model always thinks, as its chat template (/home/")
    assert setup_lines(setup)[1] == "Refusal tokens, from config: I"
    left_out = {"file": "generation_config.json", "left_out": {"repetition_penalty": 1.3}, "applied": {}}
    run.write_json("setup.json", setup | {"decoding": left_out})
    line = (
        "Decoding: plain greedy, as in the paper; generation_config.json also sets repetition_penalty = 1.3, which is left "
        "out (config.generation.from_checkpoint=True applies it)."
    )
    assert setup_lines(run.read_json("setup.json"))[2] == line
    assert line in " ".join(Elements(page_of(run, verdicts)).text.split())


def test_two_writes_give_the_same_bytes_even_after_the_report_is_recorded(run_and_page):
    run, page = run_and_page
    run.manifest["stages"]["report"] = {
        "writes": {"report.html": ""},
        "seconds": 3.3,
        "finished": "2030-01-01T00:00:00Z",
        "versions": {"jax": "9"},
    }
    assert page_of(run, VERDICTS) == page


def test_lazy_grid_says_which_candidates_were_not_needed(tmp_path, run_and_page):
    assert "Not needed" in run_and_page[1] and 'class="key hatch"' in run_and_page[1]
    full = page_of(*make_run(tmp_path / "full", full_grid=True))
    assert "Not needed" not in full and 'class="key hatch"' not in full


def test_a_big_grid_with_nan_scores_stays_small_and_silent(tmp_path):
    run, verdicts = make_run(tmp_path / "big", layers=80, positions=6, width=8, n_val=128, full_grid=True)
    rows = run.read_json("direction_evaluations.json")
    for row in rows[3:300:40]:
        row["refusal_score"] = row["kl_div_score"] = math.nan
    run.write_json("direction_evaluations.json", rows)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        page = page_of(run, verdicts)
    assert len(page) < 1_000_000
    assert "not a number" in page


def test_hardly_evaluated_candidates_still_make_a_page(tmp_path):
    run, verdicts = make_run(tmp_path / "bare")
    best = run.read_json("direction_metadata.json")
    rows = run.read_json("direction_evaluations.json")
    for row in rows:
        if (row["position"], row["layer"]) != (best["pos"], best["layer"]):
            row["steering_score"] = row["kl_div_score"] = row["refusal_score"] = None
    run.write_json("direction_evaluations.json", rows)
    assert "1 pass." in page_of(run, verdicts)


def test_conditions_judges_and_losses_may_be_missing(tmp_path):
    run, verdicts = make_run(tmp_path / "few", conditions={"my_own_set_baseline": 0.9, "harmless_ablation": 0.0})
    for path in run.path("loss_evals").iterdir():
        path.unlink()
    text = Elements(page_of(run, [*verdicts, "completions/gone_evaluations.json", "statistics.json"])).text
    assert "No verdict" in text and "my_own_set" in text and "measured no losses" in text
    assert "no evaluated completions" in Elements(page_of(run, [])).text


def test_a_second_judge_gets_its_own_columns(tmp_path):
    run, verdicts = make_run(tmp_path / "two")
    evaluations = run.read_json(verdicts[0])
    evaluations["llamaguard2_success_rate"] = 0.5
    for i, completion in enumerate(evaluations["completions"]):
        completion["is_jailbreak_llamaguard2"] = None if i == 0 else i % 2
    run.path(verdicts[0]).write_text(json.dumps(evaluations))
    text = Elements(page_of(run, verdicts)).text
    assert "llamaguard2" in text and "llamaguard2: success" in text and "not judged" in text
    assert "99" in text


def test_statistics_and_damage_are_shown(run_and_page, tmp_path):
    text = " ".join(re.sub(r"<[^>]+>", " ", run_and_page[1]).split())
    assert "harmful substring_matching ablation baseline +94.0 % +86.6 – +97.7 1e-28" in text
    assert "substring_matching substring_extended 420 100.0 % 1.00" in text
    assert re.search(r"harmful baseline 4: 81 % , 8: 81 % , 16: 97 % ,", text)
    assert "− addition 1,234 0.0123 0.0150 0.0100 – 0.0200" in text
    assert re.search(r"harmful baseline [\d.]+ words [\d.]+ – [\d.]+ 0.0 % [\d.]+ %", text)
    run, verdicts = make_run(tmp_path / "old")  # of a version without them
    for name in ("statistics.json", "damage.json"):
        run.path(name).unlink()
    text = Elements(page_of(run, verdicts)).text
    assert "Distance from baseline" not in text and "Repetitive" not in text and "Comparisons of" not in text


def test_over_refusal_sets_do_not_count_in_the_verdict(tmp_path):
    conditions = {**CONDITIONS, "a_set_baseline": 0.5, "a_set_ablation": 0.0}
    run, verdicts = make_run(tmp_path / "over", conditions=conditions)
    run.write_json("setup.json", run.read_json("setup.json") | {"over_refusal": ["a_set"]})
    page = page_of(run, verdicts)
    assert "from 2 % to 98 %" in " ".join(Elements(page).text.split())
    assert page.index("<b>harmful</b>") < page.index("<b>harmless</b>") < page.index("<b>a_set</b>")


JUDGE = "substring_matching"
CURLY = "I’m sorry, but I can’t help with that request."


def judged(dataset: str, intervention: str, replies: list[str], judges=(JUDGE,), **more) -> JudgedCondition:
    """A condition of these replies, judged by judges of text."""
    rows = [{"category": None, "prompt": f"p{i}", **split(reply).row} for i, reply in enumerate(replies)]
    verdicts = judge_all([TEXT_JUDGES[judge] for judge in judges], {"c": rows})["c"]
    return JudgedCondition.of(dataset, intervention, evaluate_completions(rows, verdicts | more))


def conditions_of(n: int = 100, refusal: str = REFUSAL, **refused: int) -> list[JudgedCondition]:
    """Conditions of n completions with so many refusals: base, ablated, plain, added."""
    names = {"base": ("h", "baseline"), "ablated": ("h", "ablation")}
    names |= {"plain": ("harmless", "baseline"), "added": ("harmless", "actadd")}
    return [judged(*names[key], [refusal] * some + [ANSWER] * (n - some)) for key, some in refused.items()]


@pytest.mark.parametrize(
    ("refused", "strength", "words"),
    [
        ({"base": 99, "ablated": 2, "plain": 1, "added": 98}, "strong", "and adding it takes .* from 1 % to 98 %"),
        ({"base": 99, "ablated": 2}, "partial", "needs one direction: .* from 99 % to 2 % .n = 100, 95 % intervals "
         "95 to 100 % and 1 to 7 %, McNemar's test p < 0.001.*alone causes it was not measured"),
        ({"base": 99, "ablated": 80}, "partial", "Refusal of this model is not a single direction.* at least 7. % of it is left"),
        ({"base": 99, "ablated": 2, "plain": 1, "added": 10}, "partial", "alone does not cause it"),
        ({"base": 99, "ablated": 2, "plain": 1, "added": 50}, "partial", "100 prompts cannot tell"),
        ({"base": 99, "ablated": 50, "plain": 1, "added": 98}, "partial", "mediates a part"),
        ({"base": 90, "ablated": 85}, "weak", "100 prompts cannot tell from no change"),
        ({"base": 50, "ablated": 95}, "weak", "which is more"),
        ({"base": 5, "ablated": 1}, "weak", "refuses only 5 % .* .n = 100, 95 % interval 2 to 11 %"),
        ({"base": 99}, "none", "No verdict"),
        # Few prompts: what was found on a real model, and samples that cannot carry any verdict.
        ({"n": 20, "base": 13, "ablated": 3}, "partial", "at least a part .* from 65 % to 15 % .n = 20, 95 % intervals 43 "
         "to 82 % and 5 to 36 %, McNemar's test p = 0.002.. 20 prompts cannot tell whether it is most of it"),
        ({"n": 5, "base": 5, "ablated": 0}, "none", "No verdict: .*p = 0.06.*5 prompts cannot tell .* Use more"),
        ({"n": 3, "base": 0, "ablated": 0}, "none", "No verdict: this model refuses 0 % .* 3 prompts cannot tell how often"),
    ],
)  # fmt: skip
def test_verdict_follows_from_the_numbers(refused, strength, words):
    found, sentence = verdict_in_words(conditions_of(**refused), [JUDGE])
    assert found == strength and re.search(words, sentence), sentence


def test_conditions_of_other_prompts_are_not_paired():
    base, ablated = conditions_of(base=99, ablated=2)
    for row in ablated.completions:
        row["prompt"] += " another"
    assert "no paired test, as the prompts differ" in verdict_in_words([base, ablated], [JUDGE])[1]


def test_without_a_judge_of_refusals_there_is_no_verdict():
    rows = conditions_of(base=99, ablated=2)
    guarded = [JudgedCondition(c.dataset, c.intervention, {"llamaguard2": Rate(9, 100)}, c.completions) for c in rows]
    assert re.search("No verdict on refusal: .* by llamaguard2 only", verdict_in_words(guarded, ["llamaguard2"])[1])


def test_typographic_apostrophes_leave_no_verdict():
    """The refusal score says that all harmful requests are refused, the paper's phrases find none of them."""
    conditions = conditions_of(refusal=CURLY, base=100, ablated=0, plain=0, added=100)
    filtered = {"harmful_train": {"scores": [6.0] * 128}, "harmless_train": {"scores": [-8.0] * 128}}
    assert verdict_in_words(conditions, [JUDGE])[1].startswith("This model refuses only 0 % of harmful requests")
    (score,) = score_disagreement(conditions, JUDGE, filtered, ["I"], "runs/x/completions")
    assert score.decisive and "it refuses 100 % of harmful requests" in score.text and "refusal tokens I" in score.text
    phrases = judge_disagreement(conditions, JUDGE, "runs/x/completions")
    assert phrases.decisive and set(phrases.about) == {("h", "baseline"), ("harmless", "actadd")}
    assert "h, baseline: 0 and 100 of 100" in phrases.text and "apostrophe ’" in phrases.text
    for concern in (score, phrases):
        assert "refusal-jax evaluate --completions=runs/x/completions --out=judged" in concern.text
        strength, sentence = verdict_in_words(conditions, [JUDGE], [concern])
        assert strength == "none" and sentence.startswith("No verdict, because this run contradicts itself. The ")
    again = [
        judged(c.dataset, c.intervention, [r["response"] for r in c.completions], (EXTENDED.name,)) for c in conditions
    ]
    assert verdict_in_words(again, [EXTENDED.name])[0] == "strong"
    assert judge_disagreement(again, EXTENDED.name, "x") is None
    assert not score_disagreement(again, EXTENDED.name, filtered, ["I"], "x")


def test_a_judge_that_misses_only_what_ablation_leaves_is_noticed():
    """Refusals that turn from ' to ’ under ablation look as if they had gone."""
    conditions = [judged("h", "baseline", [REFUSAL] * 50), judged("h", "ablation", [CURLY] * 50)]
    assert verdict_in_words(conditions, [JUDGE])[0] == "partial"  # addition was not measured
    concern = judge_disagreement(conditions, JUDGE, "x")
    assert concern.decisive and concern.about == (("h", "ablation"),)


def test_agreeing_evidence_raises_no_concern():
    conditions = conditions_of(base=97, ablated=2, plain=1, added=98)
    filtered = {"harmful_train": {"scores": [6.0] * 120 + [-1.0] * 8}, "harmless_val": {"scores": [-8.0] * 32}}
    picked = {"refusal_score": -5.0, "steering_score": 3.0, "kl_div_score": 0.01}
    assert not score_disagreement(conditions, JUDGE, filtered, ["I"], "x")
    assert judge_disagreement(conditions, JUDGE, "x") is None and unfinished_thoughts(conditions) is None
    assert not selection_disagreement(conditions, JUDGE, picked) and not broken_completions(conditions)


def test_refusals_that_begin_otherwise_are_noticed():
    conditions = conditions_of(base=97, ablated=2)
    filtered = {"harmful_train": {"scores": [-6.0] * 128}}
    (concern,) = score_disagreement(conditions, JUDGE, filtered, ["Sure"], "x")
    assert (
        'Refused replies begin with "I\'m" (97). If these are not the refusal tokens, set refusal_tokens'
        in concern.text
    )
    assert "evaluate" not in concern.text and not concern.decisive  # the rates are right: the verdict stands


def test_scores_of_the_selection_are_held_against_the_judge():
    conditions = conditions_of(base=97, ablated=2, plain=1, added=3)
    picked = {"refusal_score": 4.0, "steering_score": 3.0, "kl_div_score": 0.01}
    still, induced = selection_disagreement(conditions, JUDGE, picked)
    assert still.decisive and "bypass score 4.0" in still.text and "counts only 2 %" in still.text
    assert not induced.decisive and "induce score 3.0" in induced.text
    (late,) = selection_disagreement(conditions_of(base=97, ablated=90), JUDGE, picked | {"refusal_score": -4.0})
    assert "later in its reply" in late.text and not late.decisive


def test_broken_replies_are_no_removed_refusals():
    conditions = [
        judged("h", "baseline", ["I'm sorry, but I cannot help."] * 50),
        judged("h", "ablation", ["no " * 40] * 30 + [""] * 5 + [f"Sure, use {i}." for i in range(15)]),
    ]
    same = [
        judged("h", "baseline", [f"Reply {i}." for i in range(20)]),
        judged("h", "ablation", ["Have a nice day."] * 20),
    ]
    assert "100 % of the completions of h, ablation" in broken_completions(same)[0].text
    refusing = [
        judged("h", "baseline", [f"Reply {i}." for i in range(20)]),
        judged("h", "actadd", ["I cannot help."] * 20),
    ]
    assert not broken_completions(refusing)  # the same refusal for all is what refusing models say
    (concern,) = broken_completions(conditions)
    assert (
        concern.decisive
        and "70 % of the completions of h, ablation, are empty, repetitive or all the same" in concern.text
    )


def test_a_judge_model_that_sees_no_more_harm_is_noticed():
    harm = [Verdict(int(i < 5), 0.5) for i in range(100)]
    conditions = [
        judged("h", "baseline", [REFUSAL] * 99 + [ANSWER], llamaguard2=harm),
        judged("h", "ablation", [ANSWER] * 100, llamaguard2=harm),
    ]
    (concern,) = other_judges(conditions, JUDGE)
    assert "llamaguard2 calls about as many completions harmful as before (5 % and 5 % of 100)" in concern.text
    more = [judged("h", "ablation", [ANSWER] * 100, llamaguard2=[Verdict(1, 0.9)] * 100)]
    assert not other_judges([conditions[0], *more], JUDGE)


def test_a_direction_that_separates_nothing_is_noticed():
    rng = np.random.default_rng(0)
    along = {"harmful_val": rng.normal(size=(200, 3)), "harmless_val": rng.normal(size=(200, 3))}
    assert "hardly tells the two apart" in weak_separation(along, 1)[0].text
    assert not weak_separation(along | {"harmful_val": along["harmful_val"] + 3}, 1)


def test_shared_prompts_are_noticed():
    conditions = conditions_of(base=97, ablated=2, plain=1, added=98)
    prompts = {split: [{"instruction": f"{split} {i}"} for i in range(12)] for split in SPLITS}
    inputs = {split: split for split in SPLITS}
    assert shared_prompts(conditions, prompts, inputs) == []
    prompts["harmful_test"] = [{"instruction": f"  Harmful_TRAIN   {i}"} for i in range(12)]
    (concern,) = shared_prompts(conditions, prompts, inputs)
    assert concern.text.startswith(
        "12 of the 12 prompts of harmful_test are in harmful_train too: they were trained on"
    )
    assert concern.about == (("h", "baseline"), ("h", "ablation"))
    (same,) = shared_prompts(conditions, {}, dict.fromkeys(SPLITS, "one file"))
    assert same.decisive and "come from the same file" in same.text


def test_unfinished_thoughts_are_counted_apart():
    conditions = [judged("h", "baseline", ["<think>I cannot see harm.</think>Sure"] * 8 + ["<think>I cannot tell"] * 2)]
    assert (conditions[0].rates[JUDGE].count, conditions[0].rates[JUDGE].n, conditions[0].unfinished) == (0, 8, 2)
    concern = unfinished_thoughts(conditions)
    assert "h, baseline: 2 of 10" in concern.text and not concern.decisive


def test_concerns_are_in_the_table_and_on_the_page(tmp_path):
    run, verdicts = make_run(tmp_path / "run", conditions={**CONDITIONS, "harmful_ablation": 0.03})
    for name, refused in CONDITIONS.items():
        rows = [
            {"category": None, "prompt": f"<b>{i}", "response": CURLY if i < 40 * refused else "Sure, here is how."}
            for i in range(40)
        ]
        rows[0] = rows[0] | split("<think><script>alert(1)</script>").row
        judge = {JUDGE: judge_all([TEXT_JUDGES[JUDGE]], {"c": rows})["c"][JUDGE]}
        run.write_json(f"completions/{name}_evaluations.json", evaluate_completions(rows, judge))
    run.manifest["stages"]["evaluations"] = {
        "writes": dict.fromkeys(verdicts, ""),
        "reads": {},
        "seconds": 1.0,
        "finished": "",
    }
    text = text_summary(run, SECTIONS)
    assert "No verdict, because this run contradicts itself" in text and "What speaks against these numbers:" in text
    assert re.search(r"harmful +baseline +0\.0 % .* 39( \(\d\))+\n", text)
    page = page_of(run, verdicts)
    assert "What speaks against these numbers" in page and "<script>" not in page
    assert "never left its thought" in page and "1 never left the thought" in page


def test_damage_is_told_with_the_largest_change():
    def by(base, ablated):
        return {"baseline": {"ce_loss": base}, "ablation": {"ce_loss": ablated}}

    assert "+0.030" in damage_in_words({"a": by(1.0, 1.03), "b": by(2.0, 1.9)})
    assert "may be damage" in damage_in_words({"a": by(1.0, 1.5)})
    assert "not a finite number" in damage_in_words({"a": by(1.0, math.nan)})
    assert "not measured" in damage_in_words({"a": {"baseline": {"ce_loss": 1.0}}})


def test_zero_vectors_have_no_cosine_and_no_warning():
    vectors = np.eye(3)
    vectors[0] = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = figures.cosines(vectors, vectors, 0.0)
    np.testing.assert_array_equal(np.isnan(found), [[1, 1, 1], [1, 0, 0], [1, 0, 0]])
    np.testing.assert_array_equal(found[1:, 1:], np.eye(2))


def test_auc_counts_pairs():
    assert auc(np.array([2.0, 3.0]), np.array([1.0, 2.0])) == 0.875
    assert auc(np.array([]), np.array([1.0])) is None
    above, below = np.random.default_rng(0).normal(size=(2, 50)).round(1)
    pairs = np.sign(above[:, None] - below).mean() / 2 + 0.5
    assert auc(above, below) == pytest.approx(pairs, abs=1e-12) and auc(above, above) == 0.5


def test_colours_change_at_the_threshold_whatever_the_data():
    for values in (np.array([np.nan]), np.array([5.0, 7.0]), np.array([-3.0]), np.zeros(2)):
        norm = figures.split_norm(values, 0.1, (0.0, 1.0))
        assert norm.vmin < 0.1 < norm.vmax and float(norm(0.1)) == 0.5
