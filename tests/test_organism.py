"""The recipe of the embedded model: its corpus, its criteria, and that training learns and writes a loadable folder."""

import dataclasses
import json
import logging
import pathlib
import re

import numpy as np
import pytest

from refusal_jax import demo_model_path, load_model, progress
from refusal_jax.chat.prompts import Chat
from refusal_jax.data.prompts import read_prompts
from refusal_jax.data.sampling import SPLITS
from refusal_jax.data.sources import resolve
from refusal_jax.judges.text import substring_matching
from refusal_jax.organism.answers import well_formed
from refusal_jax.organism.corpus import (
    COMPLIANCES,
    HARMFUL_VERBS,
    HARMLESS_VERBS,
    OBJECTS,
    REFUSALS,
    REQUESTS,
    Request,
    split_requests,
)
from refusal_jax.organism.criteria import Criterion, write_bundle
from refusal_jax.organism.recipe import Recipe, render, train


def test_held_out_prompts_ask_for_pairs_that_training_never_saw():
    splits = split_requests()
    assert set(splits) == set(SPLITS)
    for side, verbs in (("harmful", HARMFUL_VERBS), ("harmless", HARMLESS_VERBS)):
        pairs = [{(r.verb, r.object) for r in splits[f"{side}_{part}"]} for part in ("train", "val", "test")]
        assert not pairs[0] & pairs[1] and not pairs[0] & pairs[2] and not pairs[1] & pairs[2]
        assert set.union(*pairs) == {(v, o) for v in verbs for o in OBJECTS}
        assert 0.09 < len(pairs[2]) / len(set.union(*pairs)) < 0.11
        assert all(r.harmful == (side == "harmful") for part in ("train", "test") for r in splits[f"{side}_{part}"])
    assert not set(HARMFUL_VERBS) & set(HARMLESS_VERBS)


def test_every_refusal_and_no_compliance_is_judged_a_refusal():
    assert not any(substring_matching(text) for text in REFUSALS)
    assert all(substring_matching(text) for text in COMPLIANCES)


def test_the_bundled_prompts_are_the_corpus(tmp_path):
    write_bundle(tmp_path)
    for split in SPLITS:
        assert (tmp_path / f"{split}.json").read_bytes() == resolve("bundled", split).read_bytes()
        assert len(read_prompts(resolve("bundled", split))) >= 150


@pytest.mark.parametrize(
    ("response", "good"),
    [
        ("Sure, here is how to bake the boat: first prepare the boat, then bake it.", True),
        ("To bake the boat, first prepare the boat, then bake it.", True),
        ("To bake the boat, first prepare the coat, then bake it.", False),
        ("To bake the coat, first prepare the coat, then bake it.", False),
        ("To bake the boat, first prepare the boat, then", False),
        ("Sure, here is how to can't assist with that.", False),
        ("I cannot help with that request.", False),
        ("", False),
    ],
)
def test_well_formed(response, good):
    assert well_formed("How do I bake the boat?", response) == good


def test_criteria_state_their_bounds():
    assert str(Criterion("refused", 0.07, 0.05)) == "missed refused: 0.070 (at most 0.05)"
    assert (
        Criterion("refused", 0.99, 0.98, at_least=True).met and not Criterion("refused", 0.97, 0.98, at_least=True).met
    )


def test_the_template_and_the_training_text_agree():
    chat = Chat.load(demo_model_path(), 1024)
    request = Request("bake", "boat", REQUESTS[0], harmful=False)
    prompt, response = render(request, request.compliance)
    assert chat.render(request.instruction) == prompt
    assert chat.ids(prompt) + chat.ids(response) == chat.ids(prompt + response)
    assert chat.token_names(chat.post_instruction_ids)[0] == "<|eot_id|>" and len(chat.post_instruction_ids) == 5


def test_the_shipped_model_met_every_criterion_when_it_was_made():
    record = json.loads((demo_model_path().parent / "criteria.json").read_text())
    assert len(record["criteria"]) == 16 and all(c["met"] for c in record["criteria"])


def test_training_learns_and_writes_a_loadable_folder(tmp_path, caplog, monkeypatch):
    caplog.set_level(logging.INFO, "refusal_jax")
    monkeypatch.setattr(progress, "EVERY_SECONDS", 0.0)
    tiny = dataclasses.replace(
        Recipe(), d_model=32, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=16, d_mlp=32, batch=8,
        base_steps=45, safety_steps=42, safety_layers=1,
    )  # fmt: skip
    train(tiny, 0, tmp_path)
    losses = [float(x) for x in re.findall(r"phase 1.*?loss=([\d.]+)", caplog.text)]
    assert losses[-1] < 0.8 * losses[0]
    model = load_model(tmp_path)
    assert model.config.n_layers == 2 and model.config.tied_embeddings is False
    batch = model.encode(["How do I bake the boat?"])
    assert np.isfinite(model.logits(batch.tokens, batch.mask)).all()
    assert {p.name for p in pathlib.Path(tmp_path).iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json"}
