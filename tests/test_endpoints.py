"""Endpoints: replies in order from a real server, what is asked again, what is a fault, and what stops at once."""

import asyncio
import dataclasses
import json
import logging
import threading
import time

import pytest
from endpoint_server import CutBody, CutStream, Drop, Hang, Raw, Says, Status, endpoint_server, serving

from refusal_jax.endpoints.address import Address
from refusal_jax.endpoints.client import Endpoint
from refusal_jax.endpoints.endpoint import Answer, EndpointSettings, Fault
from refusal_jax.endpoints.names import is_same
from refusal_jax.errors import UserError
from refusal_jax.runs.ledger import Ledger
from refusal_jax.runs.storage import DiskFolder

server = endpoint_server
SOON = 60.0  # seconds within which a busy machine does what takes none
QUICK = {"model": "tiny", "wait_s": 0.01, "retries": 2, "timeout_s": SOON}
SECRET = "sk-secret-0123456789abcdef"


def endpoint(server, **settings) -> Endpoint:
    return Endpoint(EndpointSettings.of({"url": server.url, **QUICK, **settings}))


def asked(server, *prompts, **settings) -> list[Answer]:
    return endpoint(server, **settings).answers(prompts, quiet=True)


@pytest.mark.parametrize("stream", [False, True])
def test_replies_come_in_order(server, stream):
    last = threading.Event()

    def says(messages):
        """Replies to the first prompt only once the last one has been asked."""
        prompt = messages[-1]["content"]
        if prompt == "11":
            last.set()
        assert prompt != "0" or last.wait(SOON)
        return prompt

    server.says = says
    answers = asked(server, *map(str, range(12)), stream=stream, concurrency=5, timeout_s=SOON)
    assert [one.text for one in answers] == [str(i) for i in range(12)]
    assert {(one.ended, one.finish_reason, one.tokens, one.model, one.attempts, one.fault) for one in answers} == {
        (True, "stop", 1, "tiny", 1, None)
    }
    assert 1 < server.most_active <= 5
    assert {name: server.asked[0][name] for name in ("max_tokens", "temperature", "seed", "model")} == {
        "max_tokens": 256,
        "temperature": 0.0,
        "seed": 0,
        "model": "tiny",
    }


TRANSIENT = {
    "busy": Status(429, {"Retry-After": "0"}),
    "failing": Status(500),
    "loading": Status(503, body={"error": {"message": "Loading model", "code": 503}}),
    "dropped": Drop(),
    "cut": CutBody(60),
    "cut without a length": CutBody(60, honest=False),
    "html": Raw("<html>504</html>", "text/html"),
    "error in a body": Raw({"error": {"message": "overloaded", "code": 502}}),
    "no choice": Raw({"choices": []}),
    "null choices": Raw({"choices": None}),
    # UKGovernmentBEIS/inspect_ai#1534
    "busy in a body": Raw(
        {"id": None, "choices": None, "model": None, "error": {"message": "Too many", "code": "429"}}
    ),
    "finish_reason error": Says({"content": ""}, "error"),
}


@pytest.mark.parametrize("act", TRANSIENT.values(), ids=TRANSIENT)
def test_what_may_pass_is_asked_again(server, act):
    server.plan["Hi"] = [act, act]
    answers = asked(server, "Hi", "Ho")
    assert [(one.text, one.attempts) for one in answers] == [("You said: Hi", 3), ("You said: Ho", 1)]


@pytest.mark.parametrize("act", TRANSIENT.values(), ids=TRANSIENT)
def test_what_does_not_pass_is_a_fault(server, act):
    server.plan["Hi"] = [act] * 3
    first, second = asked(server, "Hi", "Ho")
    assert (first.text, first.attempts, first.ended) == (None, 3, False)
    assert first.fault and first.kind in (Fault.BUSY, Fault.SERVER, Fault.CONNECTION, Fault.UNREADABLE)
    assert second.text == "You said: Ho"
    with pytest.raises(ValueError, match="no reply to judge"):
        _ = first.completion


@pytest.mark.parametrize("act", [CutStream(2), CutStream(3, done=True), CutStream(0), Drop(), Status(500)])
def test_streams_that_end_early_are_asked_again(server, act):
    server.plan["Hi"] = [act]
    (answer,) = asked(server, "Hi", stream=True)
    assert (answer.text, answer.attempts) == ("You said: Hi", 2)
    server.plan["Hi"] = [CutStream(3)] * 3
    (answer,) = asked(server, "Hi", stream=True)
    assert answer.kind is Fault.UNREADABLE
    assert "ended without a finish_reason, after 9 characters" in answer.fault


@pytest.mark.parametrize("drip", [False, True])
@pytest.mark.parametrize("stream", [False, True])
def test_time_outs_hold_for_the_whole_reply(server, drip, stream):
    server.plan["Hi"] = [Hang(SOON, drip)]
    answers = asked(server, "Hi", "Ho", timeout_s=1.0, stream=stream)
    assert [one.text for one in answers] == ["You said: Hi", "You said: Ho"]
    server.plan["Hi"] = [Hang(SOON, drip)] * 9
    started = time.monotonic()
    (answer,) = asked(server, "Hi", timeout_s=0.2, stream=stream)
    assert (answer.kind, answer.attempts) == (Fault.TIMEOUT, 2)
    assert time.monotonic() - started < SOON


def test_retry_after_is_kept_by_all_requests(server):
    server.plan["0"] = [Status(429, {"Retry-After": "0.4"})]
    started = time.monotonic()
    answers = asked(server, *map(str, range(6)), concurrency=2)
    assert [one.attempts for one in answers] == [2, 1, 1, 1, 1, 1]
    assert 0.4 <= time.monotonic() - started < SOON
    server.plan["0"] = [
        Status(429, {"retry-after-ms": "1"}),
        Status(429, {"Retry-After": "Thu, 01 Jan 1970 00:00:00 GMT"}),
    ]
    assert asked(server, "0")[0].attempts == 3
    server.always = Status(429, {"Retry-After": "3600"})
    with pytest.raises(UserError, match="asks to be left alone for 3600 s"):
        asked(server, "0")
    server.always = Status(429, body={"error": {"message": "You exceeded your quota", "code": "insufficient_quota"}})
    with pytest.raises(UserError, match="has no quota left"):
        asked(server, "0")


def test_a_server_for_one_request_at_a_time(server):
    """Who asks too much at once is slowed down and gets all replies."""
    server.says = lambda messages: time.sleep(0.01) or "Yes."
    act = server.act
    server.act = lambda prompt: Status(429) if server.active > 1 else act(prompt)
    answers = asked(server, *map(str, range(20)), concurrency=8, retries=8, wait_s=0.02)
    assert {one.text for one in answers} == {"Yes."}


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (Status(403), "does not let us in"),
        (Status(402), "does not let us in"),
        (
            Status(404, body={"error": {"message": "The model `tiny` does not exist."}}),
            "The model `tiny` does not exist",
        ),
        (Status(405, body="<html>not allowed</html>"), "status 405: an HTML page.*usually ends in /v1"),
    ],
)
def test_what_will_not_pass_stops_at_once(server, act, message):
    server.always = act
    with pytest.raises(UserError, match=message):
        asked(server, *map(str, range(50)))
    assert len(server.asked) <= 4


@pytest.mark.parametrize("kept", [False, True])
def test_many_faults_in_a_row_stop_early(server, tmp_path, kept):
    ledger = Ledger.open(DiskFolder(tmp_path), "kept.jsonl") if kept else None
    one = endpoint(server)
    assert one.answers(["first"], quiet=True, ledger=ledger)[0].text
    server.always = Status(500, body={"error": {"message": "out of memory"}})
    said = r"no reply to 5 conversations in a row \(\d of 40 were asked\)\. The last time, the server failed .*out of memory"
    with pytest.raises(UserError, match=said + (".*replies so far are kept" if kept else "")):
        one.answers([str(i) for i in range(40)], quiet=True, ledger=ledger)
    assert len({body["messages"][0]["content"] for body in server.asked}) < 15
    server.always = None
    assert one.answers(["after"], quiet=True)[0].text


def test_a_rejected_prompt_is_its_own_fault(server):
    long = Status(
        400, body={"error": {"message": "This model's maximum context length is 512 tokens", "code": "context"}}
    )
    server.plan = {str(i): [long] for i in range(1, 9)}
    answers = asked(server, *map(str, range(10)), concurrency=1)
    assert [one.kind for one in answers] == [None, *[Fault.REJECTED] * 8, None]
    assert answers[1].attempts == 1
    assert "maximum context length" in answers[1].fault
    server.always = long
    with pytest.raises(UserError, match="no reply to 5 conversations"):  # none was ever taken
        asked(server, *map(str, range(10)))


def test_other_names_of_fields_are_learned_once(server):
    server.refuses = ("max_tokens", "seed", "temperature")
    one = endpoint(server, concurrency=1)
    assert {answer.text is None for answer in one.answers(["a", "b", "c"], quiet=True)} == {False}
    assert len(server.asked) == 6
    assert server.asked[-1] == {
        "model": "tiny",
        "messages": [{"role": "user", "content": "c"}],
        "max_completion_tokens": 256,
    }
    assert any("takes no temperature" in concern for concern in one.identity().concerns)
    server.refuses = ("stream_options",)
    assert asked(server, "a", stream=True)[0].text == "You said: a"
    # FastAPI's list of what is wrong, which sends the request back, too.
    forbidden = {
        "type": "extra_forbidden",
        "loc": ["body", "seed"],
        "msg": "Extra inputs are not permitted",
        "input": 0,
    }
    server.refuses, server.plan["d"] = (), [Status(422, body={"detail": [forbidden]})]
    one = endpoint(server)
    assert one.answers(["d"], quiet=True)[0].text == "You said: d"
    assert "seed" not in server.asked[-1]
    role = {"loc": ["body", "messages"], "msg": "Unexpected role", "input": server.asked[-1]}
    server.plan["d"] = [Status(422, body={"detail": [role]})]
    (answer,) = one.answers(["d"], quiet=True)
    assert (answer.kind, answer.fault) == (
        Fault.REJECTED,
        "the server rejected the request (status 422: Unexpected role)",
    )
    assert one.fields.left_out == {"seed"}
    # A limit that is too high is about the number and not about the name.
    large = Status(
        400,
        body={
            "error": {"message": "max_tokens is too large: 256. This model supports at most 64", "param": "max_tokens"}
        },
    )
    server.refuses, server.plan["d"] = (), [large]
    assert asked(server, "d")[0].kind is Fault.REJECTED


def test_kinds_of_replies(server):
    call = {
        "content": None,
        "tool_calls": [{"id": "1", "type": "function", "function": {"name": "lookup", "arguments": "{}"}}],
    }
    cases = {
        "empty": (Says({"content": ""}), {"text": "", "fault": None, "ended": True}),
        "null": (Says({"content": None}), {"text": "", "fault": None}),
        "space": (Says({"content": " \n"}), {"text": ""}),
        "declined": (Says({"content": None, "refusal": "I cannot."}), {"text": "I cannot.", "declined": True}),
        "filter": (
            Says({"content": "Half of"}, "content_filter"),
            {"text": None, "kind": Fault.FILTERED, "attempts": 1},
        ),
        "tool": (Says(call, "tool_calls"), {"text": None, "kind": Fault.TOOL, "attempts": 1}),
        "both": (Says({**call, "content": "Let me see."}, "tool_calls"), {"text": "Let me see.", "fault": None}),
        "cut": (Says({"content": "One two"}, "length"), {"text": "One two", "ended": False, "finish_reason": "length"}),
        "tags": (Says({"content": "<think>Hm.</think>\n\nYes."}), {"text": "Yes.", "thought_ended": True}),
        "closed": (Says({"content": "Hm.</think>Yes."}), {"text": "Yes."}),
        "open": (Says({"content": "<think>Hm, let me"}, "length"), {"text": "", "thought_ended": False}),
        "field": (Says({"content": "Yes.", "reasoning_content": "Hm."}), {"text": "Yes.", "thought": "Hm."}),
        "other": (Says({"content": "Yes.", "reasoning": "Hm."}), {"text": "Yes.", "thought": "Hm."}),
        "only": (Says({"content": "", "reasoning_content": "Hm."}), {"text": "", "thought_ended": False}),
    }
    server.plan = {name: [act] for name, (act, _) in cases.items()}
    for stream in (False, True):
        server.plan = {name: [act] for name, (act, _) in cases.items()}
        one = endpoint(server, stream=stream)
        for (name, (_, expected)), answer in zip(cases.items(), one.answers(list(cases), quiet=True), strict=True):
            found = {field: getattr(answer, field) for field in expected}
            assert found == expected, (name, stream, answer)
        assert any("gave one reply wholly as thoughts" in concern for concern in one.identity().concerns)
    parts = [{"type": "thinking", "thinking": [{"type": "text", "text": "Hm."}]}, {"type": "text", "text": "Yes."}]
    server.plan = {"a": [Says({"content": parts})], "b": [Says({"content": [{"type": "refusal", "refusal": "No."}]})]}
    first, second = asked(server, "a", "b")
    assert (first.text, first.thought, second.text, second.declined) == ("Yes.", "Hm.", "No.", True)


def test_a_stream_whose_last_piece_says_why_it_ended(server):
    """As vLLM does it, and with keep-alive comments and unknown fields as gateways send them."""
    pieces = [{"delta": {"content": "Yes"}}, {"delta": {"content": " indeed"}, "finish_reason": "length"}]
    lines = "".join(f": keep alive\n\ndata: {json.dumps({'choices': [piece], 'x': 1})}\n\n" for piece in pieces)
    server.plan["Hi"] = [Raw(f"{lines}data: [DONE]\n\n", "text/event-stream")]
    (answer,) = asked(server, "Hi", stream=True)
    assert (answer.text, answer.finish_reason, answer.ended, answer.attempts) == ("Yes indeed", "length", False, 1)
    server.plan["Hi"] = [
        Raw('data: {"error": "out of memory"}\n\n', "text/event-stream"),
        Raw("data: {\n\n", "text/event-stream"),
    ]
    (answer,) = asked(server, "Hi", stream=True)
    assert (answer.text, answer.attempts) == ("You said: Hi", 3)
    # No reason even at its natural end (waybarrios/vllm-mlx#628): nobody can tell it from one that was cut.
    server.plan["Hi"] = [Says({"content": "Yes"}, None)] * 3
    (answer,) = asked(server, "Hi", stream=True)
    assert "then set stream to False" in answer.fault
    server.plan["Hi"] = [Says({"content": "Yes"}, None)]
    assert asked(server, "Hi")[0].text == "Yes"


def test_a_filter_before_the_model_is_no_refusal(server):
    server.plan["a"] = [Status(400, body={"error": {"code": "content_filter", "message": "The response was filtered"}})]
    server.plan["b"] = [Status(403, body={"error": {"message": "Input was flagged by moderation", "code": 403}})]
    server.plan["c"] = [Raw({"error": {"message": "This content was flagged for a risk", "code": 502}})]
    assert [one.kind for one in asked(server, "a", "b", "c", "d")] == [*[Fault.FILTERED] * 3, None]


def test_keys_are_sent_and_never_shown(server, monkeypatch, caplog):
    server.key = SECRET
    monkeypatch.setenv("MINE", f"{SECRET}\n")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-other-key-of-the-user")
    monkeypatch.setenv("OPENAI_ORG_ID", "org-of-the-user")
    caplog.set_level(logging.DEBUG)
    server.says = lambda messages: f"The key is {SECRET}."
    one = endpoint(server, api_key_env="MINE")
    (answer,) = one.answers(["Hi"], quiet=True)
    identity = one.identity()
    assert answer.text == "The key is [key]."
    server.plan["Ho"] = [Status(500, body={"error": {"message": f"got Bearer {SECRET}"}})] * 3
    (fault,) = one.answers(["Ho"], quiet=True)
    assert "got Bearer [key]" in fault.fault
    server.key = "another"
    with pytest.raises(
        UserError, match=r"Incorrect API key provided: Bearer \[key\].*environment variable MINE"
    ) as error:
        one.answers(["Hi"], quiet=True)
    assert error.value.__cause__ is None
    said = [caplog.text, str(error.value), repr(one.address), json.dumps([answer.row, fault.row, identity.record])]
    assert not any(SECRET in text for text in said)
    with pytest.raises(UserError, match="does not let us in .*api_key_env is empty"):
        asked(server, "Hi")
    assert "Authorization" not in server.headers[-1]
    assert not any("org-of" in text or "sk-other" in text for headers in server.headers for text in headers.values())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"url": ""}, "has no url"),
        ({"url": "ftp://host"}, "is not the address of a server"),
        ({"url": "http://host:99999"}, "is not the address of a server"),
        ({"url": "unix:/run/llama.sock"}, "is not the address of a server"),
        ({"url": "http://me:hidden@host/v1"}, "for host holds a user name"),
        ({"url": "http://host/v1?api_key=hidden"}, "for host holds a query"),
        ({"url": "https://api.openai.com"}, "needs an API key"),
        ({"api_key_env": "sk-hidden"}, "is not the name of an environment variable"),
        ({"api_key_env": "NOT_SET_HERE"}, "NOT_SET_HERE, which the endpoint's api_key_env names, is not set"),
        ({"api_key_env": "SPACED"}, "SPACED holds no API key"),
        ({"extra": "{"}, "extra is not JSON"),
        ({"extra": "[1]"}, "expected a JSON object"),
        ({"extra": '{"n": 4}'}, "extra holds n"),
        ({"concurrency": 0}, "concurrency is 0, expected at least 1"),
        ({"timeout_s": 0.0}, "timeout_s is 0.0"),
        ({"system_prompt": "none"}, "system_prompt cannot be 'none'"),
    ],
)
def test_settings_that_cannot_be_used(settings, message, monkeypatch):
    monkeypatch.setenv("SPACED", "two words hidden")
    with pytest.raises(UserError, match=message) as error:
        Endpoint(EndpointSettings.of({"url": "http://localhost:1", **QUICK, **settings}))
    assert "hidden" not in str(error.value)


@pytest.mark.parametrize(
    ("url", "base", "local"),
    [
        ("http://localhost:8000", "http://localhost:8000/v1", True),
        ("http://localhost:8000/", "http://localhost:8000/v1", True),
        ("localhost:8000/v1/", "http://localhost:8000/v1", True),
        ("http://127.0.0.1:8000/v1/chat/completions", "http://127.0.0.1:8000/v1", True),
        ("http://[::1]:8000", "http://[::1]:8000/v1", True),
        ("api.example.org", "https://api.example.org/v1", False),
        ("https://openrouter.ai/api/v1", "https://openrouter.ai/api/v1", False),
        ("http://10.0.0.5:8000/models", "http://10.0.0.5:8000/v1", False),
    ],
)
def test_forms_of_addresses(url, base, local, monkeypatch, caplog):
    monkeypatch.setenv("MINE", SECRET)
    address = Address.of(EndpointSettings(url=url, api_key_env="MINE"))
    assert (address.url, address.local) == (base, local)
    assert ("without encryption" in address.concern) == (not local and base.startswith("http:"))
    Endpoint(EndpointSettings(url=url, api_key_env="MINE"))
    assert ("The key in MINE and all texts go to" in caplog.text) == bool(address.concern)


def test_proxies_of_the_environment_are_not_for_this_machine(server, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    assert asked(server, "Hi")[0].text == "You said: Hi"


def test_names_of_models():
    same = [
        ("gpt-4o", "gpt-4o-2024-08-06"),
        ("gpt-4", "gpt-4-0613"),
        ("llama3", "llama3:latest"),
        ("/models/tiny", "/models/tiny@main"),
        ("tiny.gguf", "/models/tiny.gguf"),
        ("openai/gpt-4o", "gpt-4o"),
        ("Qwen/Qwen3-8B", "qwen/qwen3-8b"),
    ]
    other = [
        ("gpt-4o", "gpt-4o-mini"),
        ("qwen3-8b", "qwen3-4b"),
        ("/a/model", "/b/model"),
        ("me/tiny", "you/tiny"),
        ("a", ""),
    ]
    assert [pair for pair in same if not is_same(*pair)] == []
    assert [pair for pair in other if is_same(*pair)] == []


def test_a_server_that_serves_another_model_says_so(server):
    server.model = "other-model"
    server.models = [{"id": "other-model", "root": "/weights/other", "max_model_len": 512, "permission": [1]}]
    one = endpoint(server)
    one.answers(["Hi", "Ho"], quiet=True)
    identity = one.identity()
    assert identity.answered == {"other-model": 2}
    lists, named = identity.concerns
    assert (
        lists == "The server lists other-model, and not tiny, which was asked for: what replied may be another model."
    )
    assert named == "2 of 2 replies came under another name than tiny: other-model (2)."
    only = endpoint(server, model="")
    assert only.identity().record == {
        "url": f"{server.url}/v1",
        "asked": "other-model",
        "listed": ["other-model"],
        "entry": {"root": "/weights/other", "max_model_len": 512},
        "answered": {},
        "fingerprints": {},
        "concerns": [],
    }
    server.plan = {"a": [Says({"content": "1"}, body={"model": "tiny-0613"})]}
    server.model = "tiny"
    one = endpoint(server)
    one.answers(["a", "b"], quiet=True)
    assert "Replies came under several names: tiny (1), tiny-0613 (1)" in one.identity().concerns[1]


def test_a_server_with_several_models_needs_a_name(server):
    server.models = [{"id": "one"}, {"id": "two\x1b[31m"}]
    with pytest.raises(UserError, match=r"It lists one, two \[31m\. Set the endpoint's model"):
        asked(server, "Hi", model="")
    assert asked(server, "Hi", model="two")[0].text
    server.models = None
    with pytest.raises(UserError, match="It lists none"):
        asked(server, "Hi", model="")
    assert endpoint(server).identity().listed is None
    assert len([path for path in server.paths if path == "/v1/models"]) == 3  # none was asked twice


def test_a_server_that_is_not_there():
    gone = Endpoint(EndpointSettings.of({"url": "http://127.0.0.1:9", **QUICK}))
    with pytest.raises(
        UserError, match="was asked which models it serves, and the connection failed .*Check the address"
    ):
        gone.identity()
    assert {one.kind for one in gone.answers(["Hi", "Ho"], quiet=True)} == {Fault.CONNECTION}


def test_what_the_server_did_to_replies_is_a_concern(server):
    server.plan = {
        "a": [Says({"content": "one two"}, "length")],
        "b": [Says({"content": "one two three four five"}, body={"system_fingerprint": "x"})],
        "c": [Says({"content": "one"}, body={"system_fingerprint": "y", "model": ""})],
    }
    one = endpoint(server, max_tokens=4, concurrency=1)
    one.answers(["a", "b", "c"], quiet=True)
    said = " ".join(one.identity().concerns)
    assert "configuration changed between replies: x, y" in said
    assert "cut one reply before the limit" in said
    assert "One reply went beyond the limit" in said


def test_a_server_whose_context_is_too_small(server):
    """As Ollama's, which cuts a long conversation without a word, or leaves no room for a reply."""
    few = {"usage": {"prompt_tokens": 100, "completion_tokens": 1}}
    server.plan["x" * 3000] = [Says({"content": "Yes"}, body=few)]
    server.plan["full"] = [Says({"content": ""}, "length", body=few)]
    one = endpoint(server)
    first, second, third = one.answers(["x" * 3000, "full", "y" * 3000], quiet=True)
    assert (first.text, first.prompt_tokens, third.prompt_tokens) == ("Yes", 100, 751)
    assert (second.kind, second.attempts) == (Fault.REJECTED, 1)
    assert second.fault == "the server had no room for a reply: it ended for its length after 1 of 256 tokens"
    assert any("counted so few tokens of one long conversation that" in said for said in one.identity().concerns)


def test_a_reply_of_the_whole_limit_has_not_ended(server):
    """Some gateways say "stop" for every end."""
    server.says = lambda messages: "one two three"
    assert [asked(server, "Hi", max_tokens=n)[0].ended for n in (3, 4)] == [False, True]


def test_an_interrupted_run_asks_only_what_is_missing(server, tmp_path):
    folder = DiskFolder(tmp_path)
    server.plan = {"b": [Status(500)] * 3}
    first = endpoint(server).answers(["a", "b", "a"], quiet=True, ledger=Ledger.open(folder, "kept.jsonl"))
    assert [one.text for one in first] == ["You said: a", None, "You said: a"]
    server.asked.clear()
    again = endpoint(server).answers(["a", "b", "a", "c"], quiet=True, ledger=Ledger.open(folder, "kept.jsonl"))
    assert sorted(server.prompts) == ["b", "c"]
    assert again[0] == first[0]
    server.asked.clear()
    other = endpoint(server, max_tokens=5)  # another question
    other.answers(["a"], quiet=True, ledger=Ledger.open(folder, "kept.jsonl"))
    assert server.prompts == ["a"]


def test_conversations_and_system_prompts(server):
    talk = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "Go on"},
    ]
    own = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    asked(server, talk, own, concurrency=1, system_prompt="Speak of jazz.")
    assert server.asked[0]["messages"] == [{"role": "system", "content": "Speak of jazz."}, *talk]
    assert server.asked[1]["messages"] == own
    with pytest.raises(UserError, match="ends with a message of the assistant"):
        asked(server, talk[:2])


def test_extra_fields_are_sent(server):
    asked(server, "Hi", extra='{"chat_template_kwargs": {"enable_thinking": false}}', seed=None)
    assert server.asked[0]["chat_template_kwargs"] == {"enable_thinking": False}
    assert "seed" not in server.asked[0]


def test_inside_of_an_event_loop(server):
    async def notebook():
        return asked(server, "Hi")

    assert asyncio.run(notebook())[0].text == "You said: Hi"


def test_answers_are_kept_as_rows():
    answer = Answer(None, fault="no", kind=Fault.BUSY)
    assert Answer.of(json.loads(json.dumps(answer.row)) | {"later": 1}) == answer
    open_thought = Answer("", thought="<think>Hm", thought_ended=False)
    assert open_thought.completion == {"response": "", "thought": "<think>Hm", "thought_ended": False}
    assert dataclasses.replace(open_thought, text="Yes.", thought="", thought_ended=True).completion == {
        "response": "Yes."
    }


def test_without_the_client(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'refusal-jax\[endpoints\]'"):
        Endpoint(EndpointSettings(url="http://localhost:1"))


def test_several_servers_at_once():
    with serving(model="x") as one, serving() as two:
        assert [asked(server, "Hi")[0].model for server in (one, two)] == ["x", "tiny"]
