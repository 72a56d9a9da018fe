"""Conditional steering: the condition is IBM's formula, decided once on the prompt; only prompts that meet it change."""

import dataclasses
import json

import numpy as np
import oracle
import pytest
import torch

from refusal_jax import Edits, UserError
from refusal_jax.chat.conditional import RECORD, VECTORS, Condition, Conditional, check_weights
from refusal_jax.checkpoints.fingerprint import checkpoint_fingerprint
from refusal_jax.directions import Direction
from refusal_jax.harness.edited import read_arguments
from refusal_jax.terminal.session import Session

TEXTS = [
    "How do I bake the bread?",
    "Bake.",
    "I want to mend a coat. What should I do about the bread on the table?",
    "help",
]
RNG = np.random.default_rng(5)
VECTORS_CD = RNG.normal(size=(2, 32)).astype(np.float32)
BEHAVIOUR = 4 * RNG.normal(size=32).astype(np.float32)


def hidden(whole: oracle.Oracle, text: str, layer: int) -> torch.Tensor:
    """The residual stream [T, D] at a block's input, of one prompt alone."""
    caught = []
    with oracle.hooked([(whole.layers[layer], "input", lambda x: caught.append(x) or x)]):
        whole.logits([text])
    return caught[0][0].double()


def their_cosine(h: torch.Tensor, vector: np.ndarray, pool: str) -> float:
    """As IBM's LeashLayer computes it: a projector from an outer product, tanh, and a cosine."""
    h = h.mean(0) if pool == "mean" else h[-1]
    c = torch.tensor(vector, dtype=torch.float64)
    bent = torch.tanh((torch.outer(c, c) / torch.dot(c, c)) @ h)
    return float(torch.dot(h, bent) / (h.norm() * bent.norm()))


@pytest.fixture(scope="module")
def whole(llama):
    return oracle.Oracle(str(llama))


def steering(pool="mean", threshold=0.0, above=True, layers=(1, 2), at=(1,)) -> Conditional:
    return Conditional(Condition(layers, VECTORS_CD[: len(layers)], threshold, above, pool), BEHAVIOUR, at)


@pytest.mark.parametrize("pool", ["mean", "last"])
def test_the_condition_is_theirs(model, whole, pool):
    batch = model.encode(TEXTS)
    ours = steering(pool).condition.cosines(model.decoder, model.put, batch.tokens, batch.mask)
    theirs = [
        [their_cosine(hidden(whole, text, layer), VECTORS_CD[i], pool) for i, layer in enumerate((1, 2))]
        for text in TEXTS
    ]
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    middle = float(np.median(np.max(theirs, axis=1)))
    for above in (True, False):
        condition = steering(pool, middle, above).condition
        side = np.array(theirs) > middle if above else np.array(theirs) < middle
        assert (condition.met_by(model.decoder, model.put, batch.tokens, batch.mask) == side.any(axis=1)).all()


def test_prompts_that_meet_it_are_steered_and_others_are_not(model, whole, tmp_path):
    batch = model.encode(TEXTS)
    cosines = steering().condition.cosines(model.decoder, model.put, batch.tokens, batch.mask).max(axis=1)
    one = steering(threshold=float(np.sort(cosines)[1:3].mean()))  # which two of the four meet
    met = cosines > one.condition.threshold
    assert met.sum() == 2
    added = oracle.addition(whole.layers, BEHAVIOUR, 1)
    plain, steered = whole.logits(TEXTS), whole.logits(TEXTS, added)
    expected = torch.where(torch.tensor(met)[:, None], steered, plain)
    np.testing.assert_allclose(model.logits(batch.tokens, batch.mask, one), expected, atol=1e-4, rtol=1e-4)
    # Replies too: it is decided on the prompt, and what is generated does not change it.
    theirs = np.where(met, model.generate(TEXTS, 6, Edits.add(BEHAVIOUR, 1)), model.generate(TEXTS, 6))
    assert model.generate(TEXTS, 6, one) == theirs.tolist()
    found = dict(
        pair for index, texts in model.replies(batch, 6, one, rows=2) for pair in zip(index, texts, strict=True)
    )
    assert [found[i] for i in range(4)] == theirs.tolist()
    *_, last = model.stream(batch, 6, one, probe=BEHAVIOUR)
    assert model.chat.decode(last.ids) == theirs.tolist()
    one.write(tmp_path)
    assert model.generate(TEXTS, 6, Conditional.read(tmp_path)) == theirs.tolist()


def test_what_is_written_is_read_and_nothing_else(tmp_path, model):
    one = steering("last", 0.25, False, at=(0, 2))
    one = Conditional(one.condition, one.vector_d, one.layers, {"f1": 0.9})
    assert [path.name for path in one.write(tmp_path)] == [VECTORS, RECORD]
    read = Conditional.read(tmp_path)
    assert (read.condition.layers, read.condition.threshold, read.condition.above) == ((1, 2), 0.25, False)
    assert (read.condition.pool, read.layers, read.about) == ("last", (0, 2), {"f1": 0.9})
    np.testing.assert_array_equal(read.vector_d, BEHAVIOUR)
    np.testing.assert_array_equal(read.condition.vectors_cd, VECTORS_CD)
    with pytest.raises(UserError, match="is no edit of weights"):
        check_weights(tmp_path)
    check_weights(tmp_path / "elsewhere")
    record = json.loads((tmp_path / RECORD).read_text())
    for damage in ({"schema": "other/1"}, {"condition": {"layers": [1]}}, {"behaviour": 3}):
        (tmp_path / RECORD).write_text(json.dumps(record | damage))
        with pytest.raises(UserError, match="is damaged"):
            Conditional.read(tmp_path)
    with pytest.raises(UserError, match=f"holds no {RECORD}"):
        Conditional.read(tmp_path / "elsewhere")


def test_what_cannot_be(model):
    with pytest.raises(UserError, match="A condition needs a vector"):
        Condition((1, 2), VECTORS_CD[:1], 0.0)
    with pytest.raises(UserError, match="A condition needs a vector"):
        Condition((1,), np.zeros((1, 32), np.float32), 0.0)
    with pytest.raises(UserError, match="the pools are mean, last"):
        steering("first")
    with pytest.raises(UserError, match="adds one finite vector of the condition's width"):
        Conditional(steering().condition, BEHAVIOUR[:4], (1,))
    for other in (
        steering(layers=(1, 3)),
        Conditional(Condition((1,), np.eye(2, dtype=np.float32)[:1], 0.0), np.ones(2, np.float32), (1,)),
    ):
        with pytest.raises(UserError, match="It belongs to another model"):
            model.generate(TEXTS, 2, other)


def test_the_harness_and_the_chat_take_its_folder(llama, model, tmp_path):
    batch = model.encode(TEXTS)
    cosines = steering().condition.cosines(model.decoder, model.put, batch.tokens, batch.mask).max(axis=1)
    one = steering(threshold=float(np.sort(cosines)[1:3].mean()))
    named = {"model": {"name": str(llama), "fingerprint": checkpoint_fingerprint(llama)}}
    dataclasses.replace(one, about=named).write(tmp_path)
    edited = read_arguments(steer=str(tmp_path))  # the model is told by the file
    ids = [model.chat.prompt_ids(text) for text in TEXTS]
    wanted = model.generate(TEXTS, 6, one)
    assert [reply.text for reply in edited.replies(ids, 6, [[]] * 4, 4)] == wanted
    rows = edited.decided(ids, batch.tokens.shape[1], 6)
    assert (rows.layer_ra[:4, 0] >= 0).tolist() == (cosines > one.condition.threshold).tolist() and rows.rows == 6
    assert edited.about["steer"]["condition"]["layers"] == [1, 2]
    with pytest.raises(UserError, match="whose strength is in its file"):
        read_arguments(steer=str(tmp_path), ablate="x")
    session = Session(model, Direction.of(BEHAVIOUR, 1), 6, conditional=one)
    assert session.titles == ["baseline", "conditional steering"] and "conditional" in session.command("/steer")
    steered = int(np.flatnonzero(cosines > one.condition.threshold)[0])
    *_, turn = session.say(TEXTS[steered])
    assert "".join(piece.text for piece in turn.pieces[1]).strip() == wanted[steered].strip()
    with pytest.raises(UserError, match="There is no conditional steering"):
        Session(model, Direction.of(BEHAVIOUR, 1), 6).command("/steer")
    dataclasses.replace(one, about=named | {"model": {"name": str(llama), "fingerprint": "0"}}).write(tmp_path)
    with pytest.raises(UserError, match="is not the checkpoint that the conditional steering was made for"):
        read_arguments(steer=str(tmp_path))
    one.write(tmp_path)
    with pytest.raises(UserError, match="does not name the model that it was made for"):
        read_arguments(steer=str(tmp_path))
