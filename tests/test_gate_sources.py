"""Tests what a gate asks: servers with all their faults, checkpoints, and what an interrupted gate goes on with."""

import json
import shutil

import pytest
from endpoint_server import CutStream, Drop, Hang, Says, Status, serving
from test_gate import REFUSES, policy  # noqa: F401, the fixture

from refusal_jax.chat.model import demo_model_path
from refusal_jax.endpoints.endpoint import Answer
from refusal_jax.errors import UserError
from refusal_jax.files import to_json
from refusal_jax.gate.checkpoints import Checkpoint
from refusal_jax.gate.gate import LEDGERS, kept_replies, run_gate
from refusal_jax.gate.opened import open_candidate, open_reference
from refusal_jax.gate.output.junit import junit_xml
from refusal_jax.gate.output.record import gate_record
from refusal_jax.gate.output.sarif import sarif_log
from refusal_jax.gate.policy import get_config
from refusal_jax.gate.prompts import draw
from refusal_jax.gate.served import Served
from refusal_jax.judges.judge import Outcome
from refusal_jax.runs.ledger import Ledger
from refusal_jax.runs.storage import DiskFolder

KEY = "sk-a-secret-of-the-team-1234567890"


def model(messages):
    asked = messages[-1]["content"]
    return REFUSES if "forge" in asked else f"Sure, here is how to do that: {asked} Begin."


@pytest.fixture
def served(policy, monkeypatch):  # noqa: F811
    """A policy whose candidate is a server with a key, and no reference."""
    monkeypatch.setenv("GATE_KEY", KEY)
    with serving() as server:
        server.says, server.key = model, KEY
        policy.update(candidate=f"{server.url}#tiny", reference="")
        policy.endpoint.update(retries=1, wait_s=0.01, timeout_s=2.5, api_key_env="GATE_KEY", concurrency=8)
        policy.harmful.n = policy.harmless.n = 60
        policy.harmless.ceiling = 0.2
        yield policy, server


def test_a_server_is_asked_and_named(served, tmp_path):
    policy, server = served  # noqa: F811
    policy.system_prompt = "Be kind."
    found = run_gate(policy)
    assert found.verdict.overall == "pass" and not found.verdict.contradictions
    assert found.identities["candidate"]["answered"] == {"tiny": 120}
    assert {body["max_tokens"] for body in server.asked} == {64} and len(server.asked) == 120
    assert all(body["messages"][0] == {"role": "system", "content": "Be kind."} for body in server.asked)
    written = [to_json(gate_record(found)), junit_xml(found), to_json(sarif_log(found, tmp_path / "gate.py"))]
    assert not any(KEY.encode() in text for text in written) and b"GATE_KEY" in written[0]


def test_faults_of_a_server_are_never_outcomes(served):
    policy, server = served  # noqa: F811
    prompts = [one.text for one in draw(policy)[0].prompts[:8]]
    for text, acts in zip(
        prompts,
        (
            [Status(429, {"Retry-After": "0"})],  # passes at the second try
            [Status(500)] * 2,
            [Hang(60)] * 2,
            [Drop()] * 2,
            [Says({"content": "I'm sorry, but I can"}, finish_reason="content_filter")] * 2,
            [Says({"content": ""})] * 2,
            [Says({"content": None, "refusal": "I cannot do that."})],
            [Status(503)],
        ),
        strict=True,
    ):
        server.plan[text] = list(acts)
    policy.most_missing = 0.1
    found = run_gate(policy)
    judged = found.judged["candidate"]
    texts = [one.text for one in judged.prompts]
    outcomes = dict(zip(texts, judged.outcomes["rules"], strict=True))
    said = [outcomes[text] for text in prompts]
    assert (said[0], said[6], said[7]) == (Outcome.REFUSES,) * 3, judged.faults[:8]
    assert said[1] is said[2] is said[3] is said[4] is None
    assert said[5] in (None, Outcome.BROKEN)
    assert found.verdict.missing["candidate"]["harmful"].count == said.count(None)
    policy.most_missing = 0.05
    for text in prompts[1:5]:
        server.plan[text] = [Status(500)] * 2
    assert run_gate(policy).verdict.overall == "inconclusive"


def test_streams_that_are_cut_are_missing(served):
    policy, server = served  # noqa: F811
    policy.endpoint.stream = True
    (first, *_) = draw(policy)[0].prompts
    server.plan[first.text] = [CutStream(3), CutStream(3)]
    found = run_gate(policy).judged["candidate"]
    assert found.outcomes["rules"][0] is None and found.faults[0] and found.outcomes["rules"].count(None) == 1


def test_a_server_that_lies_about_its_model(served):
    policy, server = served  # noqa: F811
    server.model = "other-model"
    found = run_gate(policy)
    assert any(
        "120 of 120 replies came under another name than tiny: other-model" in said
        for said in found.verdict.contradictions
    )


def test_a_server_that_fails_or_is_not_there(served):
    policy, server = served  # noqa: F811
    server.always = Status(500)
    found = run_gate(policy)
    assert found.verdict.overall == "broken" and found.verdict.exit_code == 40
    assert any("gave no reply to 5 conversations in a row" in text for text in found.verdict.sentences)
    assert junit_xml(found) and gate_record(found)["candidate"]["kind"] == "broken"
    policy.update(candidate="embedded", reference=policy.candidate)
    policy.reference_endpoint.update(retries=0, api_key_env="GATE_KEY")
    with pytest.raises(UserError, match="The reference cannot be asked: .* gave no reply to 5 conversations"):
        run_gate(policy)


def test_what_a_servers_settings_may_not_say(served):
    policy, _ = served  # noqa: F811
    policy.endpoint.max_tokens = 9
    with pytest.raises(
        UserError, match=r"config\.endpoint\.max_tokens is set, but a gate takes it from config\.max_new_tokens"
    ):
        open_candidate(policy)


def test_an_interrupted_gate_goes_on(served, tmp_path):
    policy, server = served  # noqa: F811
    folder, last = DiskFolder(tmp_path / "gated"), draw(policy)[1].prompts[-1].text
    server.plan[last] = [Status(401)]  # what no later request could mend ends the gate
    with pytest.raises(UserError, match="GATE_KEY"), kept_replies(folder):
        run_gate(policy, folder=folder)
    asked = len(server.asked)
    with kept_replies(folder):
        kept = len(Ledger.open(folder, LEDGERS["candidate"]).rows)
        found = run_gate(policy, folder=folder)
    assert kept > 60 and found.verdict.overall == "pass" and len(server.asked) == asked + 120 - kept
    assert not (tmp_path / "gated" / LEDGERS["candidate"]).exists()  # a server's replies may change


def test_sources_by_their_names(policy, tmp_path):  # noqa: F811
    policy.candidate = "https://host.example#m"
    assert isinstance(open_candidate(policy), Served)
    policy.candidate = "ORG/NAME"
    assert isinstance(open_candidate(policy), Checkpoint)
    policy.reference = ""
    assert open_reference(policy) is None
    (tmp_path / "x.json").write_text("{}")
    policy.reference = str(tmp_path / "x.json")
    with pytest.raises(UserError, match="is no recorded run: its schema is None, expected refusal_jax/gate-record/1"):
        open_reference(policy)


@pytest.fixture(scope="module")
def few():
    policy = get_config()  # noqa: F811
    policy.update(judges=("rules",), max_new_tokens=16)
    policy.harmful.n = policy.harmless.n = 6
    return policy


def test_a_checkpoint_is_asked_once(few, tmp_path, monkeypatch):
    folder = DiskFolder(tmp_path / "gated")
    with folder.held():
        ledger = Ledger.open(folder, LEDGERS["candidate"])
        prompts = [one for drawn in draw(few) for one in drawn.prompts]
        source = Checkpoint("embedded", "candidate", few)
        answers = source.answers(prompts, ledger)
        assert [Answer.of(json.loads(json.dumps(one.row))) for one in answers] == answers
        assert source.identity()["name"] == "the embedded model" and len(source.identity()["fingerprint"]) == 64
        monkeypatch.setattr(Checkpoint, "model", lambda self: pytest.fail("it was asked again"))
        again = Checkpoint("embedded", "candidate", few).answers(prompts, Ledger.open(folder, LEDGERS["candidate"]))
    assert again == answers and all(one.finish_reason in ("stop", "length") for one in answers)
    assert all(one.ended == (one.finish_reason == "stop") and 0 < one.tokens <= 16 for one in answers)
    refusals = [one.text for one, prompt in zip(answers, prompts, strict=True) if prompt.kind == "harmful"]
    assert all("sorry" in text or "can" in text for text in refusals)


def test_a_damaged_checkpoint_is_broken(few, tmp_path):
    shutil.copytree(demo_model_path(), tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    few = type(few).of(few.to_dict() | {"candidate": str(tmp_path / "model")})
    found = run_gate(few)
    assert found.verdict.overall == "broken" and "model.safetensors" in " ".join(found.verdict.sentences)
    few.update(candidate="embedded", reference=str(tmp_path / "model"))
    with pytest.raises(UserError, match=r"The reference cannot be asked: .*model\.safetensors"):
        run_gate(few)
