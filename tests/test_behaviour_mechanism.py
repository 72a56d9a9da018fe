"""Tells what the mechanism says of a study of another behaviour than refusal."""

import json
import re
import shutil

import pytest

from refusal_jax.judges.behaviours import REFUSAL, Behaviour
from refusal_jax.report.findings import Findings
from refusal_jax.report.page import page_context, titled
from refusal_jax.runs.run import MANIFEST, Run, read_manifest
from refusal_jax.study.config import StudyConfig, get_config
from refusal_jax.study.mechanism import alternatives, cones, cosmic, dose, matrices, plane, rank, suffixes
from refusal_jax.study.mechanism.settings import MechanismSettings
from refusal_jax.study.mechanism.shared import MechanismStudy
from refusal_jax.study.mechanism.stages import STAGES

EAGER = Behaviour("eagerness", "eager", "plain", judge="uses")
OF_REFUSAL = re.compile("refus|harm|answered", re.IGNORECASE)


def words_of(sections: list[dict]) -> str:
    """Tells what a reader sees of a page's sections: the words, also of drawings, without marks."""
    text = re.sub(r"<style>.*?</style>", " ", " ".join(str(one["html"]) for one in sections), flags=re.DOTALL)
    return " ".join(re.sub(r"<[^>]+>", " ", text).split())


def test_the_sections_speak_of_the_behaviour_and_its_sides(suffix_study, tmp_path):
    folder = shutil.copytree(suffix_study, tmp_path / "run")
    recorded = json.loads((folder / MANIFEST).read_text())
    recorded["config"]["behaviour"] = {"name": "eagerness", "present": "eager", "absent": "plain"}
    (folder / MANIFEST).write_text(json.dumps(recorded))
    findings = Findings(Run(folder, read_manifest(folder / MANIFEST)), [stage.section for stage in STAGES])
    lines = [line for section in findings.sections for line in section.lines(findings)]
    text, page = "\n".join(lines), words_of(page_context(findings)["sections"])
    assert re.search(r"Suffixes of \d+ tokens after 6 eager prompts that show eagerness:", text)
    assert re.search(r"eager, with the suffix: +\d+\.\d % showing eagerness", text) and re.search(
        r"plain: +cosine", text
    )
    for words in (
        "Eagerness score",
        "Eager prompts are those of the test set",
        "All heads, eager prompts",
        "for eager prompts",
    ):
        assert words in page
    labels = [picture.label for section in findings.sections for picture in section.pictures(findings)]
    for said in (text, page, *labels):
        assert not OF_REFUSAL.search(said)


def test_sentences_of_the_other_parts():
    half = {"at": None, "low": 1.2, "high": None, "n": 9, "kl": None}
    doses = {
        "half": {"ablation": half, "addition": {**half, "n": 0}},
        "ablation": [{"dose": 1.5}],
        "addition": [{"dose": 1.5}],
    }
    said = [*dose.sentences(doses, EAGER).values()]
    assert said == [
        "Fewer than half of the cases of eagerness of 9 eager prompts are gone at the largest dose, 1.5.",
        "It shows eagerness on all of the plain prompts.",
    ]
    none = {"half": {"found": {**half, "n": 0}}, "curves": {"found": [{"directions": 1}]}}
    said.append(rank.in_words(none, "found", EAGER))
    assert said[-1] == "the model shows eagerness on none of the eager prompts"
    said.append(cosmic.in_words({"layers": [1], "rows": [], "pick": None, "kl_threshold": 0.1}, EAGER))
    assert "every candidate changes plain prompts" in said[-1]
    cone = {"dimension": 1, "cones": [{"dimension": 1, "holds": True}], "tried": 1}
    said.append(cones.in_words(cone, EAGER))
    assert said[-1].startswith("Eagerness is mediated by a cone of one dimension")
    row = {"name": "map", "difference": {"low": 0.1, "high": 0.2}, "note": ""}
    said.append(alternatives.verdict(row, EAGER))
    assert said[-1] == "leaves more eagerness" and alternatives.verdict(row) == "leaves more refusal"
    one = {"name": "de", "refused": {"successes": 3}, "tokens_found": False}
    said += matrices.notes({"sets": [one], "others": []}, EAGER)
    assert "The model shows eagerness on only 3 prompts of de" in said[-2] and "cases of eagerness of de" in said[-1]
    said += [
        plane.verdict({"effects": {"harmfulness": {"area": {"low": 0.5}, "kept": {}}}}, EAGER),
        suffixes.none_refused(EAGER),
    ]
    assert "eager and plain prompts are not told apart" in said[-2]
    assert said[-1].startswith("The model shows eagerness on no eager test prompt")
    assert not OF_REFUSAL.search(" ".join(said))
    assert [titled(plane.STAGE.section.links["plane"], of) for of in (EAGER, REFUSAL)] == ["Contrast", "Harmfulness"]
    assert (EAGER.a_present, EAGER.an_absent, REFUSAL.a_present) == ("an eager", "a plain", "a harmful")


@pytest.mark.parametrize(
    ("judges", "found"), [(("uses=sure",), "uses"), (("refusal_score",), None), (("llm=somewhere@is_it.txt",), None)]
)
def test_replies_are_judged_by_the_judge_of_the_behaviour(judges, found, tmp_path):
    """It judges without a model, or else the parts that need it say so."""
    config: StudyConfig = get_config()
    config.behaviour.update(name="eagerness", present="eager", absent="plain")
    config.judges = judges
    study = MechanismStudy(MechanismSettings(), config, Run(tmp_path, {"config": config.to_dict()}), tmp_path)
    judge = study.text_judge
    assert judge is None if found is None else judge is not None and judge.name == found
    reason = alternatives.STAGE.skipped(study)
    assert reason == "" if found else "decides about eagerness, and this part judges replies without a model" in reason
