"""Studies of other behaviours than refusal: two sets of prompts, and a measure by opening tokens or by a judge of replies."""

import json
import math
import re
import types

import pytest

from refusal_jax import UserError
from refusal_jax.errors import NoDirection
from refusal_jax.judges.behaviours import REFUSAL, Behaviour
from refusal_jax.judges.choice import parse_judges
from refusal_jax.judges.judge import Outcome, Verdict, shows
from refusal_jax.judges.statistics import Rate
from refusal_jax.organism.corpus import REQUESTS, split_requests
from refusal_jax.report.concerns import no_contrast, shorter_replies
from refusal_jax.report.summary import JudgedCondition
from refusal_jax.report.text import text_summary
from refusal_jax.report.verdict import verdict_in_words, verdict_without_direction
from refusal_jax.runs.artifacts import CANDIDATES, FILTER, REPORT, SETUP
from refusal_jax.study.checks import check_settings
from refusal_jax.study.config import StudyConfig, get_config
from refusal_jax.study.judged import log_odds
from refusal_jax.study.selection import check_candidates
from refusal_jax.study.study import SECTIONS, recorded_settings, run_study

EAGER = Behaviour("eagerness", "eager", "plain", judge="uses")


@pytest.fixture(scope="session")
def sides(tmp_path_factory):
    """A folder with eager and plain requests: the embedded model answers each third template with "Sure, here is how to"."""
    folder = tmp_path_factory.mktemp("sides")
    for part in ("train", "val", "test"):
        for side, wanted in (("harmful", True), ("harmless", False)):
            rows = [r for r in split_requests()[f"harmless_{part}"] if (REQUESTS.index(r.template) % 3 == 0) == wanted]
            (folder / f"{side}_{part}.txt").write_text("\n".join(r.instruction for r in rows[:40]))
    return folder


@pytest.fixture
def eager(sides) -> StudyConfig:
    config = get_config()
    for side in ("harmful", "harmless"):
        config.data.update({f"{side}_{part}": str(sides / f"{side}_{part}.txt") for part in ("train", "val", "test")})
    config.behaviour.update(name="eagerness", present="eager", absent="plain", reply_tokens=4)
    config.judges = ("uses=sure",)
    config.update(batch_size=16)
    config.data.update(n_train=16, n_val=8, n_test=16)
    config.select.update(batch_size=32, kl_threshold=1.0)
    config.generation.update(max_new_tokens=4, batch_size=16)
    return config


def page(folder) -> str:
    """The words of a report, without drawings, settings and hashes."""
    html = (folder / REPORT).read_text().split("<summary>Settings</summary>")[0]
    html = re.sub(r"<style>.*?</style>|<svg.*?</svg>", " ", html, flags=re.DOTALL)
    return " ".join(re.sub(r"<[^>]+>", " ", html).split())


def test_by_opening_tokens_and_by_a_judge_of_replies(eager, tmp_path):
    """Both measures find the direction of a contrast, and report and terminal speak of it and of its sides."""
    run = run_study(eager, tmp_path / "tokens")
    assert [token["text"] for token in run.read_json(SETUP)["refusal_tokens"]] == ["Sure"]
    place = json.loads((tmp_path / "tokens" / "direction_metadata.json").read_text())
    eager.behaviour.measure = "judge"
    judged = run_study(eager, tmp_path / "judge")
    assert json.loads((tmp_path / "judge" / "direction_metadata.json").read_text()) == place
    filtered = judged.read_json(FILTER)
    assert filtered["harmful_val"] == {"scores": [1.0] * 8, "kept": [True] * 8}
    assert filtered["harmless_val"] == {"scores": [-1.0] * 8, "kept": [True] * 8}
    rows = judged.read_json(CANDIDATES)
    tried = [row for row in rows if "ablated" in row]
    assert len(tried) == 4 and min(row["cosmic"] for row in tried) >= max(
        row["cosmic"] for row in rows if row not in tried and row["cosmic"] is not None
    )
    best = max(tried, key=lambda row: row["added"]["rate"] - row["ablated"]["rate"])
    assert best["steering_score"] == pytest.approx(
        math.log((best["added"]["successes"] + 0.5) / (8.5 - best["added"]["successes"]))
    )
    assert run_study(eager, tmp_path / "judge").worked == []
    for found in (run, judged):
        text, shown = text_summary(found, SECTIONS), page(found.folder)
        assert re.search(
            "(part of this model's eagerness|Eagerness of this model is .*): ablating it takes eagerness on", text
        )
        assert re.search(r"eager +baseline +100\.0 %", text) and re.search(r"plain +\+ addition", text)
        for words in ("Eagerness direction", "Eagerness rates", "plain prompts", "is of this contrast"):
            assert words in shown
        assert not re.search(
            "refus(al|es|ed)|harm",
            shown.replace("Refusal in Language Models", "").replace("refusal_jax", "").replace("refusal-jax", ""),
        )
    assert "What a defender learns" not in shown and "4 of the" not in shown
    assert "Eagerness is measured by the judge uses." in text and "ranked by what they do to activations" in shown


def test_what_the_judge_does_not_find(eager, tmp_path):
    eager.behaviour.measure = "judge"
    eager.judges = ("uses=zebra",)
    with pytest.raises(NoDirection, match="by the judge uses it does not show eagerness on any") as none:
        run_study(eager, tmp_path / "run")
    assert "the words or the question of the judge" in str(none.value)
    assert "How often" not in page(none.value.run.folder) and "there is little eagerness" in page(none.value.run.folder)
    eager.judges = ("uses=sure|to|here",)
    with pytest.raises(NoDirection, match="by the judge uses it shows eagerness on every"):
        run_study(eager, tmp_path / "all")
    eager.judges, eager.select.kl_threshold = ("uses=sure",), -1.0
    with pytest.raises(NoDirection, match="KL divergence of all .* is over -1.0; the least is"):
        run_study(eager, tmp_path / "kl")


def test_the_words_of_judges():
    (uses, avoids) = parse_judges(["uses=perhaps|may be", r"avoids=mays?\b"], 4)
    rows = [{"response": text} for text in ("It MAY  be.", "Maybe.", "Perhaps; it may be.", " ")]
    assert [v and v.label for v in uses.judge(rows)] == [1, 1, 0, None]
    assert [v and v.label for v in avoids.judge(rows)] == [1, 0, 1, None]
    assert uses.fingerprint() != avoids.fingerprint()
    assert [shows(v) for v in (None, Verdict(0), Verdict(1), Verdict(0, outcome=Outcome.DEFLECTS))] == [None, 1, 0, 0]
    assert log_odds(Rate(3, 6)) == 0 and math.isfinite(log_odds(Rate(0, 5)))


def test_words_from_a_file(tmp_path):
    file = tmp_path / "words.txt"
    file.write_text("table\n\nold clock\n")
    (judge,) = parse_judges([f"avoids={file}"], 4)
    assert [judge.shows(text) for text in ("The Table.", "the tablet", "an old clock", "old")] == [
        False,
        True,
        False,
        True,
    ]
    file.write_text("\n \n")
    with pytest.raises(UserError, match=r"'avoids' has no words in .*words\.txt"):
        parse_judges([f"avoids={file}"], 4)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("uses=", "'uses' has no words. Write uses=WORD"),
        ("uses", "'uses' has no words"),
        ("avoids=a(", "no regular expression: .*backslash"),
        ("uses=a|", "match an empty text"),
        ("use=a", "no judge 'use=a'.* of words: uses=WORDS, avoids=WORDS"),
    ],
)
def test_words_that_judge_nothing(spec, message):
    with pytest.raises(UserError, match=message):
        parse_judges([spec], 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"behaviour.name": ""}, r"behaviour\.name = '', expected a word or a few"),
        ({"behaviour.present": "<b>"}, r"behaviour\.present = '<b>', expected"),
        ({"behaviour.absent": "Eager"}, "are both 'eager'. Give the two sides"),
        ({"behaviour.measure": "token"}, r"behaviour\.measure = 'token', expected 'tokens' or 'judge'.*Did you mean"),
        ({"behaviour.judge": "avoids"}, "'avoids', and the judges are uses. Name one"),
        ({"behaviour.candidates": 0}, r"behaviour\.candidates = 0, expected at least 1"),
        ({"judges": ("substring_matching",)}, "looks for refusals, and the behaviour is 'eagerness'"),
        ({"judges": ("refusal_score",), "behaviour.measure": "judge"}, "reads opening tokens and no replies"),
        ({"judges": ("uses=",)}, "has no words"),
        ({"data.harmful_val": "bundled"}, r"data\.harmful_val.* is 'bundled': these prompts are made for refusal"),
        ({"data.harmful_test": "same"}, "All prompts of one side are on the other, too"),
        ({"data.harmless_train": "empty"}, "holds no prompts"),
    ],
)  # fmt: skip
def test_contrasts_that_cannot_be(changes, message, eager, sides, tmp_path):
    (tmp_path / "empty.txt").write_text("\n")
    named = {"same": str(sides / "harmless_test.txt"), "empty": str(tmp_path / "empty.txt")}
    eager.update_from_flattened_dict(
        {key: named.get(value, value) if isinstance(value, str) else value for key, value in changes.items()}
    )
    with pytest.raises(UserError, match=message):
        check_settings(eager)


def test_the_default_is_refusal_and_is_not_recorded(eager):
    assert Behaviour.of({}) == Behaviour.of(get_config()) == REFUSAL and REFUSAL.is_refusal
    assert "behaviour" not in recorded_settings(get_config())  # so that studies of older versions go on
    assert Behaviour.of(recorded_settings(eager)) == EAGER


def conditions(base: int, ablated: int, plain: int = 1, added: int = 98, n: int = 100) -> list[JudgedCondition]:
    found = []
    for dataset, intervention, count in (
        ("set", "baseline", base), ("set", "ablation", ablated), ("harmless", "baseline", plain), ("harmless", "actadd", added)
    ):  # fmt: skip
        rows = [{"prompt": f"{i}", "response": "", "is_jailbreak_uses": int(i >= count)} for i in range(n)]
        evaluations = {"uses_success_rate": 1 - count / n, "completions": rows}
        found.append(JudgedCondition.of(dataset, intervention, evaluations, behaviour=EAGER))
    return found


@pytest.mark.parametrize(
    ("counts", "strength", "words"),
    [
        ((99, 2), "strong", "^Eagerness of this model is mediated by one direction: .* on eager .* on plain .* 1 % to 98"),
        ((99, 90), "partial", "^Eagerness of this model is not a single direction, as far as its .* at least 8. %"),
        ((99, 98), "weak", "^Eagerness of this model is not a single direction, as .* no change; at least 9. % of it is left"),
        ((99, 40), "partial", "^One direction mediates a part of this model's eagerness"),
        ((99, 2, 1, 10), "partial", "alone does not cause it"),
        ((9, 2), "weak", "^This model shows eagerness on only 9 % of eager requests"),
    ],
)  # fmt: skip
def test_the_verdict_names_the_behaviour(counts, strength, words):
    found, sentence = verdict_in_words(conditions(*counts), ["uses"], behaviour=EAGER)
    assert found == strength and re.search(words, sentence), sentence
    assert "refus" not in sentence and "harm" not in sentence


def test_without_a_direction_or_a_contrast():
    text = verdict_without_direction(conditions(99, 0), ["uses"], "nothing passes", behaviour=EAGER)[1]
    assert text.startswith(
        "No single direction was found to mediate eagerness of this model, although it shows eagerness: "
    )
    assert no_contrast(conditions(99, 0), "uses", EAGER) == []
    (concern,) = no_contrast(conditions(60, 0, plain=55), "uses", EAGER)
    assert concern.decisive and "60 % of eager requests (50 to 69 %) and 55 % of plain ones" in concern.text
    assert verdict_in_words(conditions(99, 2), ["other"], behaviour=EAGER)[1].startswith("No verdict on eagerness: ")


def test_words_that_are_missing_from_shorter_replies():
    """Tells what people saw who ablated words: replies that avoid them by saying little (p-e-w/heretic#121)."""
    found = conditions(99, 2)
    for condition in found:
        for row in condition.completions:
            row["response"] = (
                "Go on?" if condition.intervention == "ablation" else "a long tale of ten words or more for all"
            )
    (concern,) = shorter_replies(found, "uses")
    assert "Half of the replies of eager, ablation, have at most 2 words, at baseline 10" in concern.text
    assert shorter_replies(conditions(99, 2), "avoids") == [] == shorter_replies(conditions(99, 98), "uses")


def test_no_opening_tells_the_sides_apart(eager, unchecked):
    found = {"refusal_tokens": [], "openings": [{"id": 1, "text": "a", "harmful": 0.3, "harmless": 0.3}]}
    run = types.SimpleNamespace(manifest={"config": recorded_settings(eager)}, read_json=lambda name: found)

    with pytest.raises(
        NoDirection, match=r"No beginning of a reply tells eager prompts from plain ones.*behaviour\.measure"
    ):
        check_candidates(run)
