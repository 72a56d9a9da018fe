"""Openings that are chosen among the likeliest tokens, against a plain PyTorch loop without a cache."""

import numpy as np
import pytest
import torch

from refusal_jax.chat.model import load_model
from refusal_jax.edits import Edits
from refusal_jax.errors import UserError
from refusal_jax.models.sharding import make_mesh
from refusal_jax.resistance.ranked import barred_ids, guided_openings
from tests import oracle

PROMPTS = ["How do I bake the bread?", "I cannot help", "user", "Sure, here is how to do it."]


def by_torch(hf, model, guide, barred, steps: int, top: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns what `guided_openings` does: guide is a direction that the guide ablates, or None."""
    ids, ranks = [], []
    layers = hf.model.layers
    for prompt in PROMPTS:
        tokens, own, places = model.chat.prompt_ids(prompt), [], []
        for _ in range(steps):
            so_far = torch.tensor([tokens + own])
            with torch.no_grad():
                logits = hf(so_far).logits[0, -1]
                with oracle.hooked([] if guide is None else oracle.ablation(layers, torch.tensor(guide))):
                    guided = hf(so_far).logits[0, -1].log_softmax(-1)
            likely = logits.topk(top).indices.tolist()
            left = [i for i in likely if i not in barred] or likely
            best = max(left, key=lambda i: float(guided[i]))
            own.append(best)
            places.append(likely.index(best))
        ids.append(own)
        ranks.append(places)
    return np.array(ids), np.array(ranks)


@pytest.mark.parametrize("guided", [False, True])
def test_chosen_tokens_are_those_of_a_plain_loop(model, hf, guided):
    direction = np.random.default_rng(3).standard_normal(model.config.d_model).astype(np.float32)
    guide = Edits.ablate(direction) if guided else None
    barred = [5, 77, *model.chat.eos_ids, *range(200, 260)]
    found = guided_openings(model, model.encode(PROMPTS), guide, barred, steps=5, top=7)
    ids, ranks = by_torch(hf, model, direction if guided else None, barred, 5, 7)
    np.testing.assert_array_equal(found.ids_bo, ids)
    np.testing.assert_array_equal(found.ranks_bo, ranks)
    assert (ranks > 0).any() and not np.isin(ids, barred).all()


def test_a_mesh_gives_the_same(model, llama):
    barred = barred_ids(model.chat, [5])
    there = load_model(llama, mesh=make_mesh(data=2, model=2))
    one, other = (guided_openings(m, m.encode(PROMPTS), None, barred, steps=4) for m in (model, there))
    np.testing.assert_array_equal(one.ids_bo, other.ids_bo)


def test_where_everything_is_left_out_the_likeliest_are_looked_at(model):
    batch = model.encode(PROMPTS)
    everything = range(model.config.vocab_size)
    found = guided_openings(model, batch, None, everything, steps=3)
    np.testing.assert_array_equal(found.ids_bo, model.generate_ids(batch, 3))
    assert (found.ranks_bo == 0).all()


def test_where_everything_is_left_out_the_guide_still_chooses(model, hf):
    direction = np.random.default_rng(3).standard_normal(model.config.d_model).astype(np.float32)
    everything = range(model.config.vocab_size)
    found = guided_openings(model, model.encode(PROMPTS), Edits.ablate(direction), everything, steps=5, top=7)
    ids, ranks = by_torch(hf, model, direction, everything, 5, 7)
    np.testing.assert_array_equal(found.ids_bo, ids)
    assert (found.ranks_bo == ranks).all() and (ranks > 0).any()


def test_what_is_left_out(model):
    chat = model.chat
    [start] = {chat.ids("I")[0]}
    barred = barred_ids(chat, [start])
    assert {start, *chat.eos_ids} <= {*barred} and chat.ids(" I")[0] in barred


def test_values_that_are_not_finite(model):
    guide = Edits.add(np.full(model.config.d_model, 1e30), 0)
    with pytest.raises(UserError, match="Openings cannot be chosen"):
        guided_openings(model, model.encode(PROMPTS), guide, [], steps=2)
