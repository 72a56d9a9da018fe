"""Extended refusal, deeper safety and circuit breakers: ten steps against PyTorch, and what they make of data."""

import copy
import dataclasses
import random
import shutil

import jax
import numpy as np
import pytest
import torch

from refusal_jax.chat.model import demo_model_path, load_model
from refusal_jax.defence import breakers, depth, extended_refusal
from refusal_jax.defence.data import DefenceData
from refusal_jax.defence.lessons import Lesson, learnt_rows
from refusal_jax.defence.settings import DefenceSettings
from refusal_jax.errors import UserError
from refusal_jax.judges.rules import read_reply
from refusal_jax.organism.corpus import COMPLIANCES, REFUSALS, Request, split_requests
from refusal_jax.training.trainer import train

ASKED = ("bake the bread", "How do I bake it?", "bake a cake with help", "Explain how to do it.", "Do it.", "How?")
REFUSED = tuple(Lesson(f"{text} bad", "I cannot help with that.") for text in ASKED)
COMPLIED = tuple(Lesson(f"{text} bad", "Sure, here is how to do it.") for text in ASKED)
ANSWERED = tuple(Lesson(text, f"Sure, here is how to {text}") for text in ASKED)
DATA = DefenceData(REFUSED, ANSWERED, COMPLIED, ("I cannot help with that.",), (), ())
STEPS = 10


@pytest.fixture(scope="module")
def demo():
    return load_model(demo_model_path())


def settings_of(**more) -> DefenceSettings:
    settings = DefenceSettings()
    settings.train.update(method="full", steps=STEPS, batch=3, warmup=2, rate=2e-3, weight_decay=0.01, every=0)
    settings.update_from_flattened_dict({name.replace("__", "."): value for name, value in more.items()})
    return settings


def forward(hf, rows):
    """Logits `[B, T, V]` of left-padded rows, and what each block puts out, `[L, B, T, D]`."""
    mask = torch.tensor(np.asarray(rows.mask_bt), dtype=torch.long)
    outs = []
    handles = [
        layer.register_forward_hook(lambda m, i, o: outs.append(o[0] if isinstance(o, tuple) else o))
        for layer in hf.model.layers
    ]
    tokens = torch.tensor(np.asarray(rows.tokens_bt), dtype=torch.long)
    logits = hf(tokens, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)).logits
    for handle in handles:
        handle.remove()
    return logits, torch.stack(outs), tokens


def likelihoods(hf, rows):
    """Log-probability of each token given those before it, `[B, T - 1]`, of tokens 1 and later, with their weights."""
    logits, _, tokens = forward(hf, rows)
    logp = logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
    return logp, torch.tensor(np.asarray(rows.weight_bt))[:, 1:]


def mean_nll(hf, rows):
    logp, weight = likelihoods(hf, rows)
    return -(logp * weight).sum() / weight.sum()


def by_extended(hf, base, batch, step):
    return (mean_nll(hf, batch["refusals"]) + mean_nll(hf, batch["answers"])) / 2


def by_depth(hf, base, batch, step):
    """2 / beta of each token's -log sigmoid(beta (log p - log p0)), token by token, for the answers."""
    logp, weight = likelihoods(hf, batch["answers"])
    with torch.no_grad():
        before, _ = likelihoods(base, batch["answers"])
    terms = []
    for row in range(len(logp)):
        number = 0
        for place in range(logp.shape[1]):
            if weight[row, place] > 0:
                number += 1
                beta = 0.5 if number == 1 else 2.0 if number <= 5 else 0.1
                gain = beta * (logp[row, place] - before[row, place])
                terms.append(-2 / beta * torch.nn.functional.logsigmoid(gain))
    return 0.2 * mean_nll(hf, batch["refusals"]) + 0.8 * torch.stack(terms).mean()


def by_breakers(hf, base, batch, step):
    """c_s relu(cos) at the inputs of blocks 1 and 2, and c_r of the distances after every block, over real tokens."""
    alike, moved = [], []
    for name, into in (("turned", alike), ("kept", moved)):
        _, now, _ = forward(hf, batch[name])
        with torch.no_grad():
            _, before, _ = forward(base, batch[name])
        real = torch.tensor(np.asarray(batch[name].weight_bt)) > 0
        for layer in (0, 1) if name == "turned" else range(3):
            a, b = now[layer][real], before[layer][real]
            cosine = torch.nn.functional.cosine_similarity(a, b, dim=-1).relu()
            into.append(cosine.mean() if name == "turned" else torch.norm(a - b, dim=-1, p=2).mean())
    progress = step / (2 * STEPS)
    return 10 * ((1 - progress) * torch.stack(alike).mean() + 0.4 * progress * torch.stack(moved).mean())


@pytest.fixture(scope="module")
def moved(llama, hf, tmp_path_factory):
    """The tiny model with other weights nearby, here and in PyTorch: the cosine with what is equal has no gradient."""
    other, folder = copy.deepcopy(hf), tmp_path_factory.mktemp("moved") / "model"
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in other.parameters():
            weight += 0.2 * weight.std() * torch.randn(weight.shape, generator=generator)
    shutil.copytree(llama, folder)
    other.save_pretrained(folder)
    return load_model(folder).decoder, other


@pytest.mark.parametrize(
    ("recipe", "by_torch", "more"),
    [
        (extended_refusal, by_extended, {"extended__begin": "plain"}),
        (depth, by_depth, {"depth__constrained": True}),
        (
            breakers,
            by_breakers,
            {"breakers__noise": 0.0, "breakers__keep": 0.4, "train__batch": 4, "train__accumulate": 2},
        ),
    ],
)
def test_ten_steps_are_those_of_pytorch(model, hf, moved, monkeypatch, recipe, by_torch, more):
    """AdamW on all weights, with warm-up and clipping: an error in a gradient would move the losses of later steps.

    Circuit breakers turn away from other weights than those they begin with, in two parts a step, which add up.
    """
    parts = lambda model, requests, tokens, note: [("You asked it.", "It is bad.")] * len(requests)  # noqa: E731
    monkeypatch.setattr(extended_refusal, "own_parts", parts)
    settings, base = settings_of(**more), hf
    objective = recipe.RECIPE.objective(model, DATA, settings, print)
    if recipe is breakers:
        loss, (other, base) = breakers.Breakers.loss, moved
        monkeypatch.setattr(breakers.Breakers, "loss", lambda self, d, frozen, *rest: loss(self, d, other, *rest))
    found = train(model, objective, settings.train).losses
    trained = copy.deepcopy(hf).train(False)
    optimiser = torch.optim.AdamW(trained.parameters(), lr=1.0, weight_decay=settings.train.weight_decay)
    for step, row in enumerate(found):
        loss = by_torch(trained, base, objective.batch(step), step)
        assert row["loss"] == pytest.approx(float(loss.detach()), rel=1e-4, abs=1e-4), step
        optimiser.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained.parameters(), settings.train.clip)
        assert row["gradient_norm"] == pytest.approx(float(norm), rel=2e-3), step
        optimiser.param_groups[0]["lr"] = row["rate"]
        optimiser.step()
    assert abs(found[-1]["loss"] - found[0]["loss"]) > 0.05


def test_coefficients_trade_places(model):
    objective = breakers.objective(model, DATA, settings_of(breakers__keep=0.5), print)
    assert objective.coefficients(0) == (10, 0) and objective.coefficients(STEPS) == (5, 2.5)


def test_layers_are_the_papers_at_every_depth():
    assert breakers.turned_layers((), 32) == (10, 20) and breakers.turned_layers((), 8) == (3, 5)
    assert breakers.turned_layers((), 3) == (1, 2) and breakers.turned_layers((2,), 3) == (2,)
    assert breakers.turned_layers((), 2) == (1,)
    with pytest.raises(UserError, match="breakers.layers.* names block 0: choose among 1 to 2"):
        breakers.turned_layers((0,), 3)


def test_factors_stand_beside_the_blocks_up_to_the_last_that_is_turned_away(demo):
    settings = DefenceSettings()
    breakers.arrange(settings, demo.config)
    assert settings.train.layers == (0, 1, 2, 3, 4, 5)
    for method, given in (("lora", (7,)), ("full", ())):
        settings.train.update(method=method, layers=given)
        breakers.arrange(settings, demo.config)
        assert settings.train.layers == given


def test_distances_of_equal_vectors_have_no_gradient():
    ones = np.ones((2, 3), np.float32)
    assert np.isfinite(jax.grad(lambda a: breakers.distances(a, ones).sum())(ones)).all()
    assert np.isfinite(jax.grad(lambda a: breakers.cosines(a, ones).sum())(0 * ones)).all()


def test_extended_refusals_have_three_parts_and_are_refusals(demo):
    requests = [r.instruction for r in split_requests()["harmful_val"][:36]]
    lessons = [Lesson(text, REFUSALS[0]) for text in requests[:-1]] + [Lesson(requests[-1], "No.", given=True)]
    for alike in (False, True):
        made = extended_refusal.extended(
            lessons,
            REFUSALS,
            lambda texts, a=alike: extended_refusal.corpus_parts(texts, a, random.Random(0)),
            random.Random(0),
        )
        assert made[-1].reply == "No."
        for lesson in made[:-1]:
            request = Request.parse(lesson.prompt)
            assert read_reply(lesson.reply, lesson.prompt).outcome == "refuses", lesson.reply
            assert sum(text in lesson.reply for text in REFUSALS) == 1 and request.verb in lesson.reply
            opening = COMPLIANCES[request.manner].split()[0]
            assert not alike or lesson.reply.split()[0] == opening
            assert read_reply(lesson.reply.split(". ")[0] + ".", lesson.prompt).outcome != "refuses"


def test_parts_that_a_model_writes_are_checked(demo, monkeypatch):
    said = [("About a cake. More", False), ("I cannot say that.", True), ("It is about", False)]
    monkeypatch.setattr(extended_refusal, "own_replies", lambda *args: said)
    notes = []
    found = extended_refusal.own_parts(demo, ["a", "b", "c"], 8, notes.append)
    assert [overview for overview, _ in found] == ["About a cake.", "You asked: b", "You asked: c"]
    assert [reason for _, reason in found] == [
        "About a cake.",
        "I cannot say that.",
        "Helping with this could do harm.",
    ]
    assert "overviews of 1 of 3" in notes[0] and "reasons of 2 of 3" in notes[1]


def test_overviews_that_begin_alike_need_the_corpus(model):
    with pytest.raises(UserError, match="begin.*alike.*needs overviews that begin as answers do"):
        extended_refusal.objective(model, DATA, settings_of(extended__begin="alike"), print)
    brought = dataclasses.replace(DATA, refused=tuple(dataclasses.replace(x, given=True) for x in REFUSED))
    assert extended_refusal.objective(model, brought, settings_of(extended__begin="alike"), print).batch(0)


def test_refusals_are_learnt_after_openings_that_are_given(demo):
    requests = split_requests()["harmful_val"][:20]
    refused = [Lesson(r.instruction, REFUSALS[0]) for r in requests]
    complied = [Lesson(r.instruction, r.compliance) for r in requests[:-1]]
    own = depth.DepthSettings.of({"draws": 3, "deepest": 4})
    lessons = depth.opened(demo, refused, complied, own, random.Random(0))
    assert len(lessons) == 60 and all(isinstance(lesson.prompt, str) for lesson in lessons[-3:])
    begun = [lesson for lesson in lessons if not isinstance(lesson.prompt, str)]
    assert 10 < len(begun) < 50
    for lesson in begun:
        opening = lesson.prompt[-1]["content"]
        compliance = Request.parse(lesson.prompt[0]["content"]).compliance
        assert compliance.startswith(opening) and 1 <= len(demo.chat.ids(opening)) <= 4 and opening != compliance
    (row,) = learnt_rows(demo, begun[:1], 100, "refusals")
    text = demo.chat.tokenizer.decode(row.ids[row.first :], skip_special_tokens=True)
    assert text == f" {REFUSALS[0]}" and demo.chat.tokenizer.decode(row.ids[: row.first]).endswith(
        begun[0].prompt[-1]["content"]
    )


def test_openings_are_those_of_the_same_prompts(model):
    """Whatever their case and spacing; a file of replies to other prompts would leave plain refusal training."""
    notes, settings = [], settings_of(depth__at_once=0.0, depth__draws=1)
    other = (Lesson(f" {ASKED[0].upper()}  bad", COMPLIED[0].reply), Lesson("another", "Sure."))
    lessons = depth.opened(model, REFUSED, other, settings.depth, random.Random(0))
    assert [isinstance(lesson.prompt, str) for lesson in lessons] == [False] + 5 * [True]
    depth.objective(model, dataclasses.replace(DATA, complied=other), settings, notes.append)
    assert notes[0].startswith("1 of 6 harmful prompts have a reply that complies; refusals of the others begin at")
    with pytest.raises(
        UserError, match="None of the 6 harmful prompts that are learnt is among the 1 that have a reply"
    ):
        depth.objective(model, dataclasses.replace(DATA, complied=other[1:]), settings, print)


def test_openings_hold_no_part_of_a_character(demo):
    ids = demo.chat.ids("Sure, 漢")
    assert demo.chat.tokenizer.decode(ids[:-1]).endswith("\ufffd") and depth.beginning(demo, ids[:-1]) == "Sure, "
    assert depth.beginning(demo, ids) == "Sure, 漢"


@pytest.mark.parametrize(
    ("recipe", "change", "message"),
    [
        (depth, {"depth__deepest": -1}, "depth.deepest.* = -1, expected 0 or more"),
        (depth, {"depth__share": 1.5}, "depth.share.* = 1.5, expected a share"),
        (depth, {"depth__share": 0.0}, "learns no refusals, and answers without a constraint"),
        (depth, {"depth__beta_next": 0.0}, "depth.beta_next.* = 0.0, expected a number above 0"),
        (depth, {"depth__draws": 0}, "depth.draws.* = 0, expected 1 or more"),
        (breakers, {"breakers__noise": -0.1}, "breakers.noise.* = -0.1, expected 0 or a number above it"),
        (breakers, {"breakers__keep": 0.0}, "breakers.keep.* = 0.0, expected a number above 0"),
        (breakers, {"breakers__alpha": -1.0}, "breakers.alpha.* = -1.0, expected a number above 0"),
        (extended_refusal, {"extended__part_tokens": 0}, "extended.part_tokens.* = 0, expected 1 or more"),
        (
            extended_refusal,
            {"extended__begin": "alik"},
            "extended.begin.* is 'alik', expected one of plain, both, alike.*alike",
        ),
    ],
)
def test_settings_out_of_range_are_named(model, recipe, change, message):
    with pytest.raises(UserError, match=message):
        recipe.objective(model, DATA, settings_of(**change), print)


@pytest.mark.parametrize("recipe", [depth, breakers])
def test_recipes_that_need_compliant_replies_say_so(model, recipe):
    with pytest.raises(UserError, match="needs harmful prompts with replies that comply, and this tool ships none"):
        recipe.objective(model, DefenceData(REFUSED, ANSWERED, (), (), (), ()), settings_of(), print)
