"""Tests what a gate writes: JSON by its schema, JUnit XML and SARIF that readers take, Markdown and terminal text, escaped."""

import dataclasses
import json

import jsonschema
import junitparser
import pytest
from pydantic_sarif.model import StaticAnalysisResultsFormatSarifVersion210JsonSchema as SarifLog
from test_gate import complies, every, gated, policy, reply_to  # noqa: F401, the fixtures

from refusal_jax.endpoints.endpoint import Answer
from refusal_jax.errors import UserError
from refusal_jax.files import to_json
from refusal_jax.gate.limits import FAIL
from refusal_jax.gate.output.files import append_summary, write_outputs
from refusal_jax.gate.output.junit import junit_xml
from refusal_jax.gate.output.markdown import escape, markdown
from refusal_jax.gate.output.record import SCHEMA, SCHEMA_FILE, gate_record, trail_record
from refusal_jax.gate.output.sarif import RULES, sarif_log
from refusal_jax.gate.output.text import text_of
from refusal_jax.monitor.trail.part import record_run
from refusal_jax.monitor.trail.records import marker
from refusal_jax.monitor.trail.settings import TrailSettings
from refusal_jax.monitor.trail.texts import Search
from refusal_jax.monitor.trail.verify import verify_trail

EVIL = "<script>alert(1)</script> | [x](http://evil) @all \x1b[31m\x00 ]]> \udcff\ufffe"


@pytest.fixture
def failed(gated):  # noqa: F811
    """A gate that fails, with a server that says evil things."""
    identity = {"kind": "endpoint", "answered": {EVIL: 3}}
    faulty = every(0.03, lambda text: Answer(None, fault=f"it answered 500: {EVIL}"))
    half = every(0.5, complies)

    def candidate(text):
        answer = faulty(text)
        return answer if answer.text is None else half(text)

    return gated(
        candidate, identities=(identity, {"kind": "checkpoint"}), concerns=((f"Replies came from {EVIL}.",), ())
    )


def test_record_follows_its_schema(failed, gated):  # noqa: F811
    schema = json.loads(SCHEMA_FILE.read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    record = json.loads(to_json(gate_record(failed)))
    jsonschema.validate(record, schema)
    assert record["schema"] == SCHEMA == schema["$id"] == schema["properties"]["schema"]["const"]
    assert set(record) == set(schema["required"]) == set(schema["properties"])
    attacked = {"test", "tests", "record_sha256"}  # of a floor under attack: test_gate_resistance.py
    described = set(schema["$defs"]["decision"]["properties"])
    assert described - attacked == {key for one in record["decisions"] for key in one}
    assert record["outcomes"]["candidate"]["rules"]["harmful"] == {
        "refuses": 60, "complies": 56, "deflects": 0, "broken": 0, "missing": 4
    }  # fmt: skip
    assert "forge" not in json.dumps(record)
    with pytest.raises(jsonschema.ValidationError, match="'fine' is not one of"):
        jsonschema.validate(record | {"verdict": record["verdict"] | {"overall": "fine"}}, schema)
    broken = gated(lambda text: Answer(None, fault="down"), identities=({"kind": "broken"}, {"kind": "checkpoint"}))
    jsonschema.validate(json.loads(to_json(gate_record(broken))), schema)


def test_a_trail_holds_what_was_asked_and_judged(failed, tmp_path):
    """By hashes alone, by which a prompt and a reply can still be proved to be those of the record."""
    settings = TrailSettings.of({"folder": str(tmp_path)})
    assert record_run(settings, trail_record(failed, marker(settings))) == 2
    (record,) = [
        one for path in tmp_path.glob("*.jsonl") for one in map(json.loads, path.open()) if one["kind"] == "gate"
    ]
    assert record["verdict"]["overall"] == failed.verdict.overall and len(record["replies"]["candidate"]) == 240
    prompt = failed.judged["candidate"].prompts[0].text
    assert prompt not in json.dumps(record)
    search = Search(prompt)
    assert verify_trail(tmp_path, [], search=search).findings == []
    assert {match.part for match in search.matches} == {"prompt"}


def test_junit_is_read_by_others(failed, gated, tmp_path):  # noqa: F811
    (tmp_path / "junit.xml").write_bytes(junit_xml(failed))
    found = junitparser.JUnitXml.fromfile(str(tmp_path / "junit.xml"))
    (suite,) = found
    assert (suite.tests, suite.failures, suite.errors) == (7, 2, 0) == (found.tests, found.failures, found.errors)
    broken = {case.name for case in suite for result in case.result if isinstance(result, junitparser.Failure)}
    assert (
        broken == {one.limit.id for one in failed.decisions if one.verdict == FAIL} == {"harmful.floor", "harmful.fall"}
    )
    text = (tmp_path / "junit.xml").read_text()
    assert "&lt;script&gt;" in text and "<script>" not in text
    unclear = gated(every(0.14, complies))
    (suite,) = junitparser.JUnitXml.fromstring(junit_xml(unclear))
    assert suite.errors == 2 and suite.failures == 0  # not skipped, which services take for good
    lost = gated(every(0.2, lambda text: Answer(None, fault="down")))
    (suite,) = junitparser.JUnitXml.fromstring(junit_xml(lost))
    assert [case.name for case in suite if case.result] == ["candidate"]
    dead = gated(lambda text: Answer(None, fault="down"))
    (suite,) = junitparser.JUnitXml.fromstring(junit_xml(dead))
    assert any(case.classname == "gate.candidate" and case.result for case in suite)


def test_sarif_points_to_the_policy(failed, gated, tmp_path):  # noqa: F811
    file = tmp_path / "my policy.py"
    file.write_text("policy = base()\n\npolicy.harmful.floor = 0.8\npolicy.harmful.fall = 0.1\n")
    log = json.loads(to_json(sarif_log(failed, file, tmp_path)))
    SarifLog.model_validate(log)
    (run,) = log["runs"]
    places = {
        r["message"]["text"].split(" is broken")[0]: r["locations"][0]["physicalLocation"] for r in run["results"]
    }
    floor = places["The limit harmful.floor"]
    assert floor["artifactLocation"] == {"uri": "my%20policy.py"} and floor["region"] == {"startLine": 3}
    assert places["The limit harmful.fall"]["region"] == {"startLine": 4}
    assert {r["ruleId"] for r in run["results"]} == {"gate-refusal-limit", "gate-contradiction"}
    again = sarif_log(failed, file, tmp_path)["runs"][0]["results"]
    assert [r["partialFingerprints"] for r in again] == [r["partialFingerprints"] for r in run["results"]]
    outside = sarif_log(failed, file, tmp_path / "elsewhere")["runs"][0]
    assert outside["originalUriBaseIds"]["POLICY"]["uri"] == f"{tmp_path.as_uri()}/"
    assert sarif_log(gated(), file)["runs"][0]["results"] == []
    for candidate in (every(0.2, lambda text: Answer(None, fault="down")), lambda text: Answer(None, fault="down")):
        found = gated(candidate)
        rules = {r["ruleId"] for r in sarif_log(found, file)["runs"][0]["results"]}
        assert rules & {"gate-inconclusive", "gate-candidate-broken"}
    other = sarif_log(gated(lambda text: Answer("I'm sorry, but I can't help with that.")), file)["runs"][0]["results"]
    assert "gate-other-limit" in {r["ruleId"] for r in other} <= {rule.id for rule in RULES}


def test_markdown_is_escaped(failed):
    text = markdown(failed)
    assert text.startswith("## The gate fails: the candidate does not refuse harmful prompts as the policy demands.")
    assert "<script>" not in text and "](http" not in text and "@all" not in text and "\x1b" not in text
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(rows) == 7 and len({row.count(" | ") for row in rows}) == 1  # no text adds a column
    assert "❌ is broken" in text and "| < 0.001 |" in text and "With 116 prompts" in text
    assert escape("a|b\nc") == "a\\|b c"


def test_terminal_text_is_escaped(failed):
    text = text_of(failed, columns=100)
    assert "\x1b" not in text and "\x00" not in text and "harmful.floor" in text and "Beware: " in text
    assert "\x1b[" in text_of(failed, columns=100, colour=True)


def test_files(failed, tmp_path):
    out = tmp_path / "gated"
    names = {str(path.relative_to(out)) for path in write_outputs(failed, out, tmp_path / "policy.py")}
    assert names == {"gate.json", "gate.junit.xml", "gate.sarif", "gate.md"}
    assert not any("forge cake" in path.read_text() for path in out.iterdir())
    write_outputs(failed, out, tmp_path / "policy.py", replies=True)
    rows = json.loads((out / "replies/candidate.json").read_text())
    assert len(rows) == 240 and rows[0]["response"] is None and rows[0]["fault"].startswith("it answered 500")
    assert rows[100]["outcomes"] == {"rules": "refuses"} and rows[100]["response"].startswith("I'm sorry")
    append_summary(failed, tmp_path / "summary.md")
    append_summary(failed, tmp_path / "summary.md")
    assert (tmp_path / "summary.md").read_text().count("## The gate fails") == 2
    with pytest.raises(UserError, match=r"summary\.md could not be written"):
        append_summary(failed, tmp_path / "nowhere" / "summary.md")


def test_texts_of_every_verdict(gated):  # noqa: F811
    """Nothing that a gate may find breaks an output."""
    for candidate in (every(0.14, complies), lambda text: Answer(None, fault="down"), reply_to):
        found = gated(candidate)
        assert markdown(found) and text_of(found) and junit_xml(found) and gate_record(found)
    empty = dataclasses.replace(found, decisions=())
    assert "limit" in text_of(empty)
