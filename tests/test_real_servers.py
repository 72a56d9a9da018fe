"""Endpoints against servers that others wrote: their replies are ours, and what they are not asked for is told."""

import json
import shutil

import pytest
from gguf_files import write_gguf
from real_servers import llama_server, llama_serving, transformers_serving

from refusal_jax import load_model
from refusal_jax.chat.model import demo_model_path
from refusal_jax.data.prompts import BUNDLED, read_prompts
from refusal_jax.data.sources import resolve
from refusal_jax.endpoints.client import Endpoint
from refusal_jax.endpoints.endpoint import EndpointSettings, Fault
from refusal_jax.errors import UserError

TOKENS = 32


@pytest.fixture(scope="module")
def model():
    return load_model(demo_model_path())


@pytest.fixture(scope="module")
def conversations(model):
    """Bundled prompts of both kinds, one with a system prompt, and one of several turns."""
    sides = [read_prompts(resolve(BUNDLED, f"{side}_test"))[:10] for side in ("harmful", "harmless")]
    prompts = [[{"role": "user", "content": row["instruction"]}] for side in sides for row in side]
    turns = [*prompts[-1], {"role": "assistant", "content": "Sure."}, *prompts[0]]
    return [*prompts, [{"role": "system", "content": "Be brief."}, *prompts[1]], turns]


def check_equal(url, name, model, conversations, **settings):
    """Asks a server, in parallel, and compares its replies with ours."""
    ours = model.generate(conversations, TOKENS)
    endpoint = Endpoint(EndpointSettings(url=url, model=name, max_tokens=TOKENS, **settings))
    answers = endpoint.answers(conversations, quiet=True)
    assert [answer.text for answer in answers] == ours
    assert len(set(ours)) > 4
    assert {(answer.ended, answer.kind, answer.attempts) for answer in answers} == {(True, None, 1)}
    assert [answer.tokens for answer in answers] == [answer.tokens for answer in answers if answer.tokens]
    return endpoint


def test_transformers_serve(model, conversations, tmp_path):
    name, other = str(demo_model_path()), "no-such-folder"
    with transformers_serving(tmp_path / "log") as url:
        for stream in (False, True):
            endpoint = check_equal(url, name, model, conversations, stream=stream)
            identity = endpoint.identity()
            assert identity.answered == {name: len(conversations)}
        assert identity.concerns == ()
        (cut,) = endpoint.answers(conversations[-1:], 2, quiet=True)
        assert (cut.ended, cut.finish_reason, cut.tokens) == (False, "length", 2)
        wrong = Endpoint(EndpointSettings(url=url, model=other, retries=0, concurrency=1))
        (answer,) = wrong.answers(["Hi"], quiet=True)
        assert answer.kind is Fault.SERVER
        unknown = Endpoint(EndpointSettings(url=url, model=name, extra='{"top_k": 5}'))
        (answer,) = unknown.answers(["Hi"], quiet=True)
        assert answer.kind is Fault.REJECTED
        assert "Unexpected fields in the request: {'top_k'}" in answer.fault


@pytest.mark.skipif(llama_server() is None, reason="needs llama.cpp's server: set LLAMA_SERVER to the program")
def test_llama_server(model, conversations, tmp_path, monkeypatch):
    folder = shutil.copytree(demo_model_path(), tmp_path / "copy")
    template = (folder / "chat_template.jinja").read_text()
    gguf = write_gguf(folder, tmp_path / "demo.gguf", **{"tokenizer.chat_template": template})
    monkeypatch.setenv("LLAMA_KEY", "key-of-this-test")
    with llama_serving(gguf, tmp_path / "log", "--alias", "demo", "--api-key", "key-of-this-test") as url:
        for stream in (False, True):
            endpoint = check_equal(url, "demo", model, conversations, stream=stream, api_key_env="LLAMA_KEY")
        identity = endpoint.identity()
        assert (identity.concerns, identity.listed) == ((), ("demo",))
        assert identity.entry["meta"]["n_params"] == 1_753_984
        (long,) = endpoint.answers(["word " * 2000], quiet=True)
        assert long.kind is Fault.REJECTED
        assert "context" in long.fault
        only = Endpoint(EndpointSettings(url=url, api_key_env="LLAMA_KEY", max_tokens=4))
        assert only.answers(["Hi"], quiet=True)[0].model == only.name == "demo"
        monkeypatch.setenv("LLAMA_KEY", "another-key-of-this-test")
        with pytest.raises(UserError, match="does not let us in") as error:
            Endpoint(EndpointSettings(url=url, model="demo", api_key_env="LLAMA_KEY")).answers(["Hi"])
        assert "another-key" not in str(error.value)
    assert json.dumps(identity.record)
