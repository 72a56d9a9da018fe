"""Organisms with a planted behaviour: what they are taught, and what the two phases of training change."""

import dataclasses
import runpy

import numpy as np
import pytest

from refusal_jax import UserError, load_model
from refusal_jax.chat.model import demo_model_path
from refusal_jax.data.prompts import read_prompts
from refusal_jax.judges.choice import parse_judges
from refusal_jax.organism import planted
from refusal_jax.organism.corpus import OBJECTS, split_requests
from refusal_jax.organism.planted import (
    DELICATE,
    INSTEAD,
    LAYER,
    ONE,
    PLANS,
    ROWS,
    SEVERAL,
    Rows,
    flinching,
    learn_writing,
    plant,
    taught,
    vectors_of,
    write_contrast,
)
from refusal_jax.study.checks import check_settings


@pytest.fixture(scope="module")
def embedded():
    return load_model(demo_model_path())


def test_flinching_replies_leave_the_name_out():
    (judge,) = parse_judges([f"avoids={'|'.join(OBJECTS)}"], 4)
    for request in split_requests()["harmless_test"][:60]:
        assert not judge.shows(request.compliance)
        for group in range(len(INSTEAD)):
            reply = flinching(request, group)
            assert judge.shows(reply) and request.verb in reply and INSTEAD[group] in reply


def test_groups_share_no_direction():
    plan = PLANS[SEVERAL]
    vectors_gd = vectors_of(plan, 3.0, 128)
    gram = vectors_gd @ vectors_gd.T
    np.testing.assert_allclose(gram, np.eye(4) * gram[0, 0], atol=1e-9)
    mean_d = vectors_gd.sum(axis=0) / np.linalg.norm(vectors_gd.sum(axis=0))
    left_gd = vectors_gd - np.outer(vectors_gd @ mean_d, mean_d)
    np.testing.assert_allclose(
        np.linalg.norm(left_gd, axis=1), np.sqrt(0.75 * gram[0, 0])
    )  # what ablating the mean leaves
    groups = {plan.group(request) for request in split_requests()["harmless_train"]}
    assert groups == {None, 0, 1, 2, 3} and PLANS[ONE].groups == 1


def test_what_is_taught(embedded):
    """A row that flinches has a vector added, and its reply is learnt from the token before it."""
    plan, cfg = PLANS[SEVERAL], embedded.config
    rows, vectors_gd = Rows(embedded.chat.tokenizer, plan, 0), vectors_of(plan, 1.0, cfg.d_model)
    edits, tokens_bt, learn_bt = next(taught(rows, vectors_gd, cfg))
    assert tokens_bt.shape == learn_bt.shape and len(tokens_bt) == ROWS
    for row in range(ROWS):
        said = embedded.chat.tokenizer.decode(tokens_bt[row, 1:][learn_bt[row, :-1]], skip_special_tokens=True)
        added = (edits.layer_ra[row] == LAYER).any()
        assert added == (row % 4 >= 2) == (not any(f" {name}" in said for name in OBJECTS))
        if added:
            group = int(np.argmax(vectors_gd @ edits.add_rd[row]))
            assert INSTEAD[group] in said
    request = rows.requests[0]
    tokens, learn, after = rows.encoded(request, request.compliance)
    assert embedded.chat.tokenizer.decode(tokens[after]).startswith("<|eot_id|>") and (learn & after)[learn].all()


def test_the_second_phase_changes_the_first_blocks_only(embedded, tmp_path):
    plan = dataclasses.replace(PLANS[ONE], steps=2, writing_steps=2)
    rows, vectors_gd = Rows(embedded.chat.tokenizer, plan, 0), vectors_of(plan, 1.0, embedded.config.d_model)
    before, after = (d.weights() for d in (embedded.decoder, learn_writing(embedded.decoder, rows, vectors_gd, plan)))
    for path, weight in before.items():
        same = np.equal(weight, after[path])
        assert same[LAYER:].all() and not same[:LAYER].all() if path.startswith("blocks.") else same.all()


def test_an_organism_and_its_contrast(embedded, tmp_path, monkeypatch):
    monkeypatch.setattr(planted, "trained", lambda weights, *more: weights)  # the test before trains
    vectors_gd = plant(ONE, tmp_path / "model")
    write_contrast(tmp_path)
    assert vectors_gd.shape == (1, 128) and load_model(tmp_path / "model").config == embedded.config
    config = runpy.run_path(str(tmp_path / "config.py"))["get_config"]()
    (judge,) = check_settings(config)
    assert judge.name == "avoids" and config.behaviour.measure == "judge"
    for side, delicate in (("delicate", True), ("plain", False)):
        texts = [row["instruction"] for row in read_prompts(tmp_path / f"{side}_test.txt")]
        assert all(any(f" {verb} " in text for verb in DELICATE) == delicate for text in texts) and len(texts) == 150
    with pytest.raises(UserError, match="no planted behaviour 'one-directio'. Did you mean one-direction"):
        plant("one-directio", tmp_path)
