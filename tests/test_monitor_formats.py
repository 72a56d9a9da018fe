"""Tests what the monitor reads from a line, in every format that it knows: shapes that users of these tools have reported."""

import json

import pytest

from refusal_jax.monitor.formats.draft import Malformed, seconds
from refusal_jax.monitor.formats.lines import read_line
from refusal_jax.monitor.traces import Place, Trace, Unjudged

REQUEST = {
    "model": "toy",
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "First?"},
        {"role": "assistant", "content": "Yes."},
        {
            "role": "user",
            "content": [{"type": "text", "text": "Hello"}, {"type": "image_url", "image_url": {"url": "x"}}],
        },
    ],
}
MESSAGE = {"role": "assistant", "content": "Hi!"}


def completion(message=MESSAGE, reason="stop", **more) -> dict:
    choice = {"index": 0, "message": message, "finish_reason": reason}
    return {
        "id": "c-1",
        "object": "chat.completion",
        "created": 1764000000,
        "model": "toy-1",
        "choices": [choice],
        **more,
    }


def chunk(delta: dict, reason=None) -> dict:
    choice = {"index": 0, "delta": delta, "finish_reason": reason}
    return {
        "id": "c-9",
        "object": "chat.completion.chunk",
        "created": 1764000000,
        "model": "toy-1",
        "choices": [choice],
    }


def traces(record, field: str = "") -> list[Trace]:
    line = record if isinstance(record, str) else json.dumps(record)
    return [draft.trace(Place("log", 1), 0.0, "unknown") for draft in read_line(line, field)]


def one(record, field: str = "") -> Trace:
    (found,) = traces(record, field)
    return found


def otel(attributes: dict, events=(), **more) -> dict:
    def wrapped(of: dict) -> list[dict]:
        return [{"key": k, "value": v if isinstance(v, dict) else {"stringValue": v}} for k, v in of.items()]

    span = {
        "traceId": "t",
        "spanId": "s",
        "startTimeUnixNano": "1764000000000000000",
        "attributes": wrapped(attributes),
    }
    span |= {"events": [{"name": name, "attributes": wrapped(of)} for name, of in events], **more}
    return {"resourceSpans": [{"resource": {}, "scopeSpans": [{"spans": [span]}]}]}


ASKED = [{"role": "system", "parts": [{"type": "text", "content": "Be brief."}]}]
ASKED += [{"role": "user", "parts": [{"type": "text", "content": "Hello"}]}]
ANSWERED = [
    {
        "role": "assistant",
        "parts": [{"type": "reasoning", "content": "hm"}, {"type": "text", "content": "Hi!"}],
        "finish_reason": "stop",
    }
]
CHAT = {"gen_ai.operation.name": "chat", "gen_ai.request.model": "toy-1"}
STRUCTURED = {
    "arrayValue": {
        "values": [
            {
                "kvlistValue": {
                    "values": [
                        {"key": "role", "value": {"stringValue": "assistant"}},
                        {
                            "key": "parts",
                            "value": {
                                "arrayValue": {
                                    "values": [
                                        {
                                            "kvlistValue": {
                                                "values": [
                                                    {"key": "type", "value": {"stringValue": "text"}},
                                                    {"key": "content", "value": {"stringValue": "Hi!"}},
                                                ]
                                            }
                                        }
                                    ]
                                }
                            },
                        },
                    ]
                }
            }
        ]
    }
}
LITELLM = {
    "id": "c-1",
    "call_type": "acompletion",
    "status": "success",
    "startTime": 1764000000.0,
    "model": "toy-1",
    "messages": REQUEST["messages"],
    "response": completion(),
}
RESPONSES = {
    "id": "r-1",
    "model": "toy-1",
    "status": "completed",
    "output": [
        {"type": "reasoning", "summary": []},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Hi!"}]},
    ],
}
JUDGED = {
    "request and response": {"request": REQUEST, "response": completion()},
    "bodies as text": {
        "request": {"body": json.dumps(REQUEST)},
        "response": {"status_code": 200, "body": json.dumps(completion())},
    },
    "other names": {"request_body": REQUEST, "response_body": completion()},
    "all in one": {**REQUEST, **completion()},
    "conversation": {"model": "toy-1", "messages": [*REQUEST["messages"], MESSAGE]},
    "chunks": {
        "request": REQUEST,
        "response": [
            chunk({"role": "assistant", "content": ""}),
            chunk({"content": "Hi"}),
            chunk({"content": "!"}, "stop"),
        ],
    },
    "sse": {
        "request": REQUEST,
        "response": "".join(f"data: {json.dumps(c)}\n\n" for c in (chunk({"content": "Hi!"}), chunk({}, "stop")))
        + "data: [DONE]",
    },
    "responses api": {
        "request": {"model": "toy-1", "instructions": "Be brief.", "input": "Hello"},
        "response": RESPONSES,
    },
    # BerriAI/litellm#36361: the reply to a streamed request is in the `response` of the last event
    "responses stream": {
        "request": {"instructions": "Be brief.", "input": "Hello"},
        "response": {"type": "response.completed", "response": RESPONSES},
    },
    "responses events": {
        "request": {"instructions": "Be brief.", "input": "Hello"},
        "response": [
            {"type": "response.output_text.delta", "delta": "Hi"},
            {"type": "response.output_text.delta", "delta": "!"},
            {"type": "response.completed", "response": {**RESPONSES, "model": "toy-1"}},
        ],
    },
    "litellm": LITELLM,
    "litellm callback": {"kwargs": {"standard_logging_object": LITELLM}},
    "anthropic": {
        "request": {"model": "toy", "system": "Be brief.", "messages": REQUEST["messages"][1:]},
        "response": {
            "type": "message",
            "model": "toy-1",
            "role": "assistant",
            "content": [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "Hi!"}],
            "stop_reason": "end_turn",
        },
    },
    "langfuse": {
        "id": "o",
        "type": "GENERATION",
        "startTime": "2026-11-01T10:00:00Z",
        "model": "toy-1",
        "input": REQUEST["messages"],
        "output": MESSAGE,
    },
    "ollama": {
        "model": "toy-1",
        "created_at": "2026-11-01T10:00:00Z",
        "message": MESSAGE,
        "done_reason": "stop",
        "messages": REQUEST["messages"],
    },
    "thought": {"request": REQUEST, "response": completion({"role": "assistant", "content": "<think>hm</think>Hi!"})},
    "otel": otel({**CHAT, "gen_ai.input.messages": json.dumps(ASKED), "gen_ai.output.messages": json.dumps(ANSWERED)}),
    "otel structured": otel({**CHAT, "gen_ai.input.messages": json.dumps(ASKED), "gen_ai.output.messages": STRUCTURED}),
    "otel instructions": otel(
        {
            **CHAT,
            "gen_ai.system_instructions": json.dumps(ASKED[0]["parts"]),
            "gen_ai.input.messages": json.dumps(ASKED[1:]),
            "gen_ai.output.messages": json.dumps(ANSWERED),
        }
    ),
    "openllmetry": otel(
        {
            **CHAT,
            "gen_ai.prompt.0.role": "system",
            "gen_ai.prompt.0.content": "Be brief.",
            "gen_ai.prompt.1.role": "user",
            "gen_ai.prompt.1.content": "Hello",
            "gen_ai.completion.0.role": "assistant",
            "gen_ai.completion.0.content": "Hi!",
        }
    ),
    "openinference": otel(
        {
            "openinference.span.kind": "LLM",
            "llm.model_name": "toy-1",
            "llm.input_messages.0.message.role": "system",
            "llm.input_messages.0.message.content": "Be brief.",
            "llm.input_messages.1.message.role": "user",
            "llm.input_messages.1.message.content": "Hello",
            "llm.output_messages.0.message.role": "assistant",
            "llm.output_messages.0.message.content": "Hi!",
        }
    ),
    "vercel": otel(
        {
            "ai.operationId": "ai.streamText.doStream",
            "ai.model.id": "toy-1",
            "ai.prompt.messages": json.dumps(
                [
                    {"role": "system", "content": "Be brief."},
                    {"role": "user", "content": [{"type": "text", "text": "Hello"}]},
                ]
            ),
            "ai.response.text": "Hi!",
        }
    ),
    "otel events": otel(
        CHAT,
        [
            ("gen_ai.system.message", {"content": "Be brief."}),
            ("gen_ai.user.message", {"content": "Hello"}),
            ("gen_ai.choice", {"finish_reason": "stop", "message": json.dumps(MESSAGE)}),
        ],
    ),
    "otel oldest events": otel(
        CHAT,
        [
            ("gen_ai.content.prompt", {"gen_ai.prompt": json.dumps(REQUEST["messages"])}),
            ("gen_ai.content.completion", {"gen_ai.completion": json.dumps([MESSAGE])}),
        ],
    ),
    "printed span": {
        "name": "chat",
        "context": {"trace_id": "0x1", "span_id": "0x2"},
        "start_time": "2026-11-01T10:00:00Z",
        "attributes": {
            **CHAT,
            "gen_ai.input.messages": json.dumps(ASKED),
            "gen_ai.output.messages": json.dumps(ANSWERED),
        },
    },
}


@pytest.mark.parametrize("name", JUDGED)
def test_reads(name):
    trace = one(JUDGED[name])
    assert (trace.system, trace.prompt, trace.response, trace.fault) == ("Be brief.", "Hello", "Hi!", None)
    assert trace.model == "toy-1" and trace.finish_reason in ("stop", None)


def test_refusal_in_a_field_of_its_own():
    assert (
        one({"request": REQUEST, "response": completion({"content": None, "refusal": "I can't."})}).response
        == "I can't."
    )


def test_every_choice_is_a_trace():
    choices = [{"index": i, "message": {"content": text}, "finish_reason": "stop"} for i, text in enumerate("ab")]
    found = traces({"request": REQUEST, "response": completion(choices=choices)})
    assert [(trace.id, trace.response) for trace in found] == [("c-1", "a"), ("c-1#1", "b")]


UNJUDGED = {
    "error": [
        {"request": REQUEST, "response": {"status_code": 500, "body": {"error": {"message": "x"}}}},
        {"request": REQUEST, "response": None, "error": "timeout"},
        {**LITELLM, "status": "failure", "response": {}, "error_str": "x"},
        otel({**CHAT, "error.type": "timeout"}),
        {"id": "o", "type": "GENERATION", "input": "Hello", "output": None, "level": "ERROR"},
        {"id": "b", "custom_id": "1", "response": None, "error": {"code": "batch_expired"}},
    ],
    "no_reply": [
        {"request": REQUEST, "response": None},
        # langfuse/langfuse#5245: the output of a stream is null
        {"id": "o", "type": "GENERATION", "input": REQUEST["messages"], "output": None},
        {"model": "toy", "messages": REQUEST["messages"]},
    ],
    "no_text": [
        {**LITELLM, "response": completion({"content": "redacted-by-litellm"})},
        {
            "request_id": "1",
            "call_type": "acompletion",
            "startTime": "2026-11-01 10:00:00",
            "messages": "{}",
            "response": "{}",
        },
        otel(CHAT),
    ],
    "cut": [
        # langfuse/langfuse#6517: exporters cut long attributes in the middle of their JSON
        otel({**CHAT, "gen_ai.output.messages": json.dumps(ANSWERED)[:60]}),
        otel({"ai.operationId": "ai.generateText.doGenerate", "ai.response.text": '[{"type": "text", "te'}),
        # BerriAI/litellm#14637: long texts are cut in their middle
        {**LITELLM, "response": completion({"content": "I'm ... (litellm_truncated 900 chars) ... end"})},
        {"request": REQUEST, "response": [chunk({"content": "Hi"})]},
    ],
    "tool_call": [
        {"request": REQUEST, "response": completion({"content": None, "tool_calls": [{"id": "1"}]}, "tool_calls")},
        {"request": {"input": "Hello"}, "response": {"output": [{"type": "function_call", "name": "f"}]}},
        otel(
            {
                **CHAT,
                "gen_ai.output.messages": json.dumps(
                    [{"role": "assistant", "parts": [{"type": "tool_call", "name": "f"}]}]
                ),
            }
        ),
    ],
    "thought": [
        {"request": REQUEST, "response": completion({"content": "<think>hm"}, "length")},
        {"request": REQUEST, "response": completion({"content": None, "reasoning_content": "hm"}, "length")},
    ],
    "filtered": [
        {"request": REQUEST, "response": completion({"content": ""}, "content_filter")},
        {"request": REQUEST, "response": {"error": {"code": "content_filter", "message": "x"}}},
        {**LITELLM, "status": "failure", "response": {}, "status_fields": {"guardrail_status": "guardrail_intervened"}},
    ],
}


@pytest.mark.parametrize("fault, number", [(fault, i) for fault, of in UNJUDGED.items() for i in range(len(of))])
def test_what_has_no_reply_to_judge(fault, number):
    trace = one(UNJUDGED[fault][number])
    assert (trace.fault, trace.response) == (Unjudged(fault), None)


@pytest.mark.parametrize(
    "record",
    [
        {**LITELLM, "call_type": "aembedding"},
        {"id": "o", "type": "SPAN", "input": "a", "output": "b"},
        otel({"gen_ai.operation.name": "invoke_agent", "gen_ai.output.messages": json.dumps(ANSWERED)}),
        otel({"ai.operationId": "ai.generateText", "ai.response.text": "repeats the span in it"}),
        otel({"http.method": "GET"}),
        'INFO:     10.0.0.1:51408 - "POST /v1/chat/completions HTTP/1.1" 200 OK',
        "(APIServer pid=1) INFO 11-20 15:10:57 [loggers.py:257] Engine 000: Avg prompt throughput: 0.8 tokens/s",
        "INFO 11-20 15:10:58 [logger.py:71] Generated response c (streaming delta): output: 'x', finish_reason: None",
    ],
)
def test_lines_about_other_things(record):
    assert traces(record) == []


def joined(*records) -> list[Trace]:
    draft = None
    for record in records:
        (found,) = read_line(record if isinstance(record, str) else json.dumps(record))
        draft = draft.joined(found) if draft else found
    assert draft.key and draft.ended
    return draft.trace(Place("log", 1), 0.0, "unknown")


def test_vllm():
    """vllm-project/vllm#30322 logs pieces of a stream and the whole; #29885 and #34503 log no prompt at the level INFO."""
    received = (
        "(APIServer pid=1) INFO 11-20 15:10:57 [logger.py:47] Received request c-1: prompt: "
        "'<|im_start|>system\\nBe brief.<|im_end|>\\n<|im_start|>user\\nWhat\\'s up?<|im_end|>\\n<|im_start|>assistant\\n', "
        "params: SamplingParams(n=1), lora_request: None."
    )
    said = (
        'INFO 11-20 15:10:58 [logger.py:71] Generated response c-1 (streaming complete): output: "I\'m fine\\n", '
        "output_token_ids: None, finish_reason: stop"
    )
    trace = joined(received, said)
    assert (trace.system, trace.prompt, trace.response) == ("Be brief.", "What's up?", "I'm fine\n")
    without = (
        "INFO 11-20 15:10:57 [logger.py:47] Received request c-1: params: SamplingParams(n=1), lora_request: None."
    )
    assert joined(without, said).prompt == ""
    details = "DEBUG 11-20 15:10:57 [logger.py:40] Request c-1 details: prompt: 'Hello', prompt_token_ids: [1]."
    assert joined(details, without, said).prompt == "Hello"
    structured = {"timestamp": "2026-11-20T15:10:58Z", "level": "INFO", "message": said.split("] ", 1)[1]}
    assert joined(structured).time == seconds("2026-11-20T15:10:58Z")


def test_streams_batches_and_events_are_joined():
    assert joined(chunk({"content": "Hi"}), chunk({"content": "!"}), chunk({}, "stop")).response == "Hi!"
    asked = {"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": REQUEST}
    answered = {"id": "b-1", "custom_id": "1", "response": {"status_code": 200, "body": completion()}, "error": None}
    trace = joined(asked, answered)
    assert (trace.id, trace.prompt, trace.response) == ("b-1", "Hello", "Hi!")
    body = {
        "kvlistValue": {
            "values": [
                {
                    "key": "message",
                    "value": {"kvlistValue": {"values": [{"key": "content", "value": {"stringValue": "Hi!"}}]}},
                }
            ]
        }
    }
    entry = {"traceId": "t", "spanId": "s", "eventName": "gen_ai.choice", "body": body}
    events = {"resourceLogs": [{"scopeLogs": [{"logRecords": [entry]}]}]}
    (early,), (span,) = read_line(json.dumps(events)), read_line(json.dumps(otel(CHAT)))
    assert not early.ended and not span.ended
    trace = span.joined(early).trace(Place("log", 1), 0.0, "unknown")
    assert (trace.model, trace.response, trace.fault) == ("toy-1", "Hi!", None)


def test_category_of_a_field_whose_names_have_dots():
    assert one({**LITELLM, "metadata": {"a.b": {"c": "toys"}}}, "metadata.a.b.c").category == "toys"
    assert one(otel({**CHAT, "app.topic": "toys"}), "app.topic").category == "toys"
    assert one({**LITELLM, "request_tags": ["toys", "x"]}, "request_tags").category == "toys"


@pytest.mark.parametrize(
    "value",
    [
        1764000000,
        1764000000.0,
        1764000000000,
        "1764000000000000",
        "1764000000000000000",
        "2025-11-24T16:00:00Z",
        "2025-11-24T17:00:00+01:00",
        "2025-11-24 16:00:00",
    ],
)
def test_times(value):
    assert seconds(value) == 1764000000


@pytest.mark.parametrize("value", [None, True, "soon", float("nan"), -1, 10**30, {}])
def test_what_is_no_time(value):
    assert seconds(value) is None


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"a": 1', "it is no JSON"),
        ("hello", "neither JSON nor a line of vLLM's log"),
        ("[" * 100_000, "nested too deeply"),
        ("[1]", "JSON of a int, expected an object"),
        ('{"x": 1}', "neither a request nor a reply under any usual name: it has x"),
        (json.dumps({"object": "chat.completion.chunk", "choices": []}), "an event of a stream without an id"),
        (json.dumps({"standard_logging_object": [1]}), "standard_logging_object is no mapping"),
        (json.dumps({"resourceSpans": [{"scopeSpans": 5}]}), "not of the kinds that any format has"),
    ],
)
def test_malformed(line, message):
    with pytest.raises(Malformed, match=message):
        read_line(line)


def test_half_characters():
    assert one('{"prompt": "a\\ud800", "response": "b\\udfff"}').response == "b?"
