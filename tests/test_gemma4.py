"""Gemma 4, beyond what is tested of every family: tensors that files of different ages hold, and layers that use others' keys."""

import families
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from refusal_jax import Edits, UserError, load_model
from refusal_jax.checkpoints.load import load_decoder
from refusal_jax.checkpoints.tensor_files import SINGLE
from refusal_jax.models.hf_config import from_hf
from refusal_jax.models.scores import refusal_score
from refusal_jax.models.structure import structure
from refusal_jax.study.scoring import PromptScorer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return families.tiny_model(tmp_path_factory.mktemp("gemma4"), "gemma4")


def changed(folder, target, change):
    """A copy of a checkpoint whose tensors `change` has changed."""
    target.mkdir()
    for path in folder.iterdir():
        if path.name != SINGLE:
            (target / path.name).write_bytes(path.read_bytes())
    save_file(change(load_file(folder / SINGLE)), target / SINGLE, {"format": "pt"})
    return target


def same_weights(one, other) -> bool:
    """Tells whether two decoders have the same weights."""
    ours, theirs = one.weights(), other.weights()
    return set(ours) == set(theirs) and all(np.array_equal(ours[path], theirs[path]) for path in ours)


def test_later_layers_use_keys_of_their_kind(folder):
    form = structure(load_decoder(folder).cfg)
    assert form.shares and form.source_l == (None, None, None, 1, 1, 2)


def test_keys_that_no_layer_uses_and_other_parts_may_be_there(folder, tmp_path):
    """As in the first releases; those of layers that need them must be."""
    more = {
        f"model.language_model.layers.{l}.self_attn.{n}_proj.weight": np.ones((16, 32), "f")
        for l in (3, 5)
        for n in "kv"
    }
    more["model.language_model.layers.4.self_attn.k_norm.weight"] = np.ones(8, "f")
    more["model.audio_tower.layers.0.weight"] = more["model.embed_audio.projection.weight"] = np.ones(3, "f")
    first = changed(folder, tmp_path / "first", lambda tensors: tensors | more)
    assert same_weights(load_decoder(first), load_decoder(folder))
    needed = "model.language_model.layers.2.self_attn.v_proj.weight"
    lost = changed(folder, tmp_path / "lost", lambda tensors: {n: t for n, t in tensors.items() if n != needed})
    with pytest.raises(UserError, match=f"1 missing: {needed}"):
        load_decoder(lost)
    extra = changed(
        folder, tmp_path / "extra", lambda tensors: tensors | {needed.replace("v_proj", "w_proj"): np.ones(3, "f")}
    )
    with pytest.raises(UserError, match="1 unknown: .*w_proj"):
        load_decoder(extra)


def test_names_of_other_ages(folder, tmp_path):
    def old(tensors):
        return {
            name.replace("model.language_model.", "language_model.model."): tensor for name, tensor in tensors.items()
        }

    assert same_weights(load_decoder(changed(folder, tmp_path / "old", old)), load_decoder(folder))


def test_scores_of_additions_where_layers_use_the_memory_of_others(folder):
    """Selection runs such a model from its first layer on, whatever layer a direction is added at."""
    model, prompts, ids = load_model(folder), ["How do I bake the bread?", "help", "Sure, here is how"], [3, 7]
    directions_md = np.random.default_rng(0).normal(size=(2, model.config.d_model))
    scorer = PromptScorer.build(model, prompts, ids, 8)
    batch = model.encode(prompts)
    for layer, induce in scorer.climb(model.config.n_layers, 2):
        expected = [
            refusal_score(model.logits(batch.tokens, batch.mask, Edits.add(d, layer)), np.asarray(ids)).mean()
            for d in directions_md
        ]
        np.testing.assert_allclose(induce(directions_md), expected, atol=1e-4)


def test_sizes_of_full_layers_are_read_in_all_spellings():
    """As in published files, as newer versions of transformers write them, and as these write them for every layer."""
    old = families.hf_config("gemma4_text", "experts")
    full = old.pop("per_layer_config")
    every = {f"{layer:02}": full.get(str(layer), {"head_dim": 8, "num_key_value_heads": 2}) for layer in range(6)}
    first = from_hf(old | {"global_head_dim": 16, "num_global_key_value_heads": 1})
    assert first == from_hf(old | {"per_layer_config": full}) == from_hf(old | {"per_layer_config": every})
    assert {mixer.sizes(first) for mixer in first.mixers} == {(4, 2, 8), (4, 1, 16)}
