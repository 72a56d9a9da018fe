"""Tests what answers cost under edits: sums against PyTorch hooks and NumPy, files of questions, intervals."""

import numpy as np
import pytest
import torch
from oracle import ablation, hooked

from refusal_jax import Edits
from refusal_jax.chat.loss_rows import LossRow, chat_rows
from refusal_jax.damage.answers import answer_rows
from refusal_jax.damage.edited_rows import EditedRows
from refusal_jax.data.prompts import read_prompts
from refusal_jax.data.questions import read_questions
from refusal_jax.data.sources import resolve
from refusal_jax.organism.corpus import Request

PAIRS = [
    ("How do I bake the bread?", "Sure, here is how to do it."),
    ("How do I rob the cake?", "I cannot help with that."),
    ("Bake?", "Sure, here is how to do it. " * 4),
]


def test_sums_of_answers_equal_torch_hooks(model, hf):
    """Cross-entropy and KL of each answer under each edit, of which several go together, padding and all."""
    rng = np.random.default_rng(3)
    direction, doses = rng.normal(size=model.config.d_model), (0.0, 0.7, 1.0)
    edits = Edits.concat([Edits.ablate(direction, scale=dose) for dose in doses])
    rows = [*chat_rows(model.chat, PAIRS, 256), LossRow([3, 4], 2)]
    read = EditedRows.build(model, rows, 16)
    assert read.at_once == 2 and read.tokens_n.tolist()[-1] == 0
    losses_mn, (_, kl_mn) = (
        read.losses(edits),
        read.compared(Edits.concat([Edits.none(model.config.d_model), edits]), ""),
    )
    kl_mn = kl_mn[1:]
    for number, dose in enumerate(doses):
        hooks = [
            (module, at, lambda x, edit=edit, dose=dose: x + dose * (edit(x) - x))
            for module, at, edit in ablation(hf.model.layers, direction)
        ]
        for place, row in enumerate(rows[:-1]):
            ids = torch.tensor([row.ids])
            with torch.no_grad():
                base = torch.log_softmax(hf(ids).logits[0].double(), -1)
                with hooked(hooks):
                    logp = torch.log_softmax(hf(ids).logits[0].double(), -1)
            at = range(row.first, len(row.ids))
            want = -sum(float(logp[i - 1, row.ids[i]]) for i in at)
            moved = sum(float((base[i - 1].exp() * (base[i - 1] - logp[i - 1])).sum()) for i in at)
            np.testing.assert_allclose([losses_mn[number, place], kl_mn[number, place]], [want, moved], atol=2e-3)
            assert read.tokens_n[place] == len(row.ids) - row.first
    assert (losses_mn[:, -1] == 0).all() and np.abs(kl_mn[0]).max() < 1e-5 < kl_mn[1, :-1].min()


def test_sums_by_answer_and_by_token():
    """Against plain NumPy: means by token and by answer, their exponentials, and a bootstrap of answers with another seed."""
    rng = np.random.default_rng(5)
    tokens = rng.integers(2, 30, 40)
    sums = np.stack([tokens * rng.gamma(2, 0.2, 40), tokens * rng.gamma(2, 0.3, 40)])
    rows = answer_rows(np.pad(sums, ((0, 0), (0, 1))), np.append(tokens, 0))  # the last one has no token
    means = sums.sum(axis=1) / tokens.sum()
    change = rows[1]["token"]["change"]
    assert rows[1]["token"]["mean"] == pytest.approx(means[1])
    assert rows[1]["answer"]["mean"] == pytest.approx(sums[1].mean()) and rows[1]["answer"]["n"] == 40
    assert change["mean"] == pytest.approx(means[1] - means[0])
    assert rows[1]["perplexity"]["mean"] == pytest.approx(np.exp(means[1]))
    assert rows[1]["perplexity"]["factor"]["mean"] == pytest.approx(np.exp(means[1] - means[0]))
    drawn = rng.integers(40, size=(4000, 40))
    ratios = (sums[:, drawn].sum(axis=2) / tokens[drawn].sum(axis=1))[1]
    np.testing.assert_allclose(
        [rows[1]["token"][end] for end in ("low", "high")], np.quantile(ratios, (0.025, 0.975)), atol=0.01
    )
    assert rows[0]["token"]["change"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
    (alone,) = answer_rows(sums[:1, :1], tokens[:1])
    assert alone["token"]["low"] is None and alone["perplexity"]["high"] is None


def test_bundled_answers_are_the_corpus():
    prompts = read_prompts(resolve("bundled", "harmless_test"))
    found = read_questions(resolve("bundled", "answers"))
    assert [question.prompt for question in found] == [row["instruction"] for row in prompts]
    requests = [Request.parse(question.prompt) for question in found]
    assert [question.answer for question in found] == [one and one.compliance for one in requests]
