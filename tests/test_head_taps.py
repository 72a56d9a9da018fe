"""Taps of heads beyond their values (test_families.py has those, for every family): requests, cost, and meshes."""

import dataclasses
import re

import families
import jax
import numpy as np
import pytest
import tiny

from refusal_jax import Edits, Taps, UserError, load_model, make_mesh
from refusal_jax.models.decoder import Decoder
from refusal_jax.models.hf_config import from_hf
from refusal_jax.models.mixers.attention import Attention
from refusal_jax.models.predict import predict
from refusal_jax.plan.hlo import collectives
from refusal_jax.taps import ALONG_SITES, HEAD_SITES, NO_TAPS, TAP_AXES

LENGTHS = (3, 23, 9, 1)


@pytest.fixture(scope="module")
def grouped(tmp_path_factory):
    """A tiny model with fewer key/value heads than the widest mesh has ways."""
    folder = tmp_path_factory.mktemp("grouped")
    return tiny.tiny_llama(folder, kv_heads=2, heads=8, mlp=64, layers=2, attention_bias=True)


def directions(rows: int, d_model: int) -> np.ndarray:
    return np.random.default_rng(7).normal(size=(rows, d_model)).astype(np.float32)


def test_the_last_positions_of_heads(model):
    tokens, mask = tiny.left_padded(LENGTHS, model.config.vocab_size)
    along = directions(4, model.config.d_model)
    whole = model.taps(tokens, mask, Taps(HEAD_SITES, along=along))
    cut = model.taps(tokens, mask, Taps(HEAD_SITES, last=2, along=along))
    assert set(cut) == set(HEAD_SITES)
    for site, values in cut.items():
        axis = re.search("[PQ]", TAP_AXES[site]).start()
        assert values.ndim == len(TAP_AXES[site]) and values.shape[axis] == 2
        expected = np.take(np.asarray(whole[site]), (-2, -1), axis)
        np.testing.assert_allclose(np.asarray(values), expected, rtol=1e-5, atol=1e-5)
    one = model.taps(tokens, mask, Taps(ALONG_SITES, last=2, along=along[3]))
    for site in ALONG_SITES:  # one direction for all rows is each row's
        np.testing.assert_allclose(np.asarray(one[site])[:, 3], np.asarray(cut[site])[:, 3], rtol=1e-5, atol=1e-6)


def test_patterns_are_zero_where_nothing_is_attended_to(model):
    tokens, mask = tiny.left_padded(LENGTHS, model.config.vocab_size)
    pattern = np.asarray(model.taps(tokens, mask, Taps(("pattern",)))["pattern"])
    width = mask.shape[1]
    allowed = np.tril(np.ones((width, width), bool)) & mask[:, None, :]
    assert (pattern == 0)[:, ~np.broadcast_to(allowed[:, None], pattern.shape[1:])].all()
    total = pattern.sum(axis=-1).transpose(1, 3, 0, 2)
    np.testing.assert_allclose(total[mask], 1, rtol=1e-5)
    assert (total[~mask] == 0).all()


@pytest.mark.parametrize(
    "along,message",
    [
        (None, r"result_along, o_bias_along: pass the direction to read along"),
        (
            np.ones(7),
            r"along has the shape \[7\]; pass one direction, \[32\], or one for each row of the batch, \[4, 32\]",
        ),
        (np.full(32, np.nan), r"along holds 32 values that are NaN or infinite"),
    ],
)
def test_directions_that_do_not_fit(model, along, message):
    tokens, mask = tiny.left_padded(LENGTHS, model.config.vocab_size)
    with pytest.raises(UserError, match=message):
        model.taps(tokens, mask, Taps(("z", "result_along", "o_bias_along"), along=along))


def test_values_that_are_not_finite_are_found():
    mask = np.array([[False, True], [True, True]])
    pattern = np.ones((1, 2, 3, 2, 2), np.float32)
    pattern[0, 0, 1, 0, 1] = np.nan  # of a padding query
    assert Taps(("pattern",)).finite({"pattern": pattern}, mask).tolist() == [True, True]
    pattern[0, 1, 1, 0, 1] = np.nan
    assert Taps(("pattern",)).finite({"pattern": pattern}, mask).tolist() == [True, False]


def test_one_compile_serves_all_directions(model):
    tokens, mask = tiny.left_padded(LENGTHS, model.config.vocab_size)
    first, second = directions(2, model.config.d_model)
    one = model.taps(tokens, mask, Taps(("result_along",), 1, first))["result_along"]
    before = predict._cache_size()
    other = model.taps(tokens, mask, Taps(("result_along",), 1, second))["result_along"]
    assert predict._cache_size() == before and not np.allclose(np.asarray(one), np.asarray(other))


def compiled(model, tokens, mask, taps: Taps) -> str:
    inputs = model.put(tokens, mask, Edits.ablate(directions(1, model.config.d_model)))
    taps = taps.for_batch(len(tokens), model.config.d_model)
    return predict.lower(model.decoder, *inputs, taps=taps, last=True).compile().as_text()


def test_patterns_of_one_query_hold_no_square(model):
    """No array of tokens by tokens that the forward pass does not have anyway."""
    tokens, mask = tiny.left_padded(LENGTHS, model.config.vocab_size)
    along = directions(1, model.config.d_model)[0]
    square = re.compile(r"\w+\[(?:\d+,)*23,23(?:,\d+)*\]")
    plain, one = (
        set(square.findall(compiled(model, tokens, mask, taps))) for taps in (NO_TAPS, Taps(HEAD_SITES, 1, along))
    )
    assert plain and one <= plain
    every = compiled(model, tokens, mask, Taps(("pattern",)))
    n = model.config.n_heads
    assert f"[{model.config.n_layers},{len(LENGTHS)},{n},23,23]" in every


@pytest.mark.parametrize("mesh", [(2, 2, 2), (1, 1, 8)])
def test_heads_stay_divided(grouped, mesh):
    """The same values on a mesh, each chip holding its heads'. A few numbers a token are exchanged besides and, where weights are
    stored in parts, the weight of the output projection once more."""
    single, meshed = load_model(grouped), load_model(grouped, mesh=make_mesh(*mesh))
    cfg, ways, last = single.config, mesh[2], 3
    tokens, mask = tiny.left_padded(LENGTHS, cfg.vocab_size)
    taps, edits = Taps(HEAD_SITES, last, directions(4, cfg.d_model)), Edits.ablate(directions(1, cfg.d_model)[0])
    expected, found = (model.taps(tokens, mask, taps, edits) for model in (single, meshed))
    for site, values in found.items():
        real = np.asarray(mask[:, -last:])
        axis = re.search("[PQ]", TAP_AXES[site]).start()
        ours, theirs = (np.moveaxis(np.asarray(x), axis, 2)[:, real] for x in (values, expected[site]))
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)
        if "N" in TAP_AXES[site]:
            at = TAP_AXES[site].index("N")
            assert values.sharding.shard_shape(values.shape)[at] == cfg.n_heads // ways, (site, values.sharding)
    plain, tapped = (
        sum(i.bytes * i.times for i in collectives(compiled(meshed, tokens, mask, request)))
        for request in (NO_TAPS, taps)
    )
    small = 4 * len(tokens) * (tokens.shape[1] + 2 * cfg.d_model)
    projection = (
        4 * cfg.d_model * cfg.n_heads * cfg.head_dim // ways if mesh[1] > 1 else 0
    )  # weights are stored in parts
    assert tapped - plain <= cfg.n_layers * (small + projection)


@dataclasses.dataclass(frozen=True)
class Headless(Attention):
    """Attention that does not tell its heads."""

    prefix: str = "plain_"
    has_heads = False

    def mix(self, here, h_btd, ctx, past):
        return dataclasses.replace(super().mix(here, h_btd, ctx, past), heads=None)


@pytest.mark.parametrize("kinds", [(Attention(), Headless(), None), (Headless(), None)])
def test_what_is_added_without_heads_is_the_rest(kinds):
    """Tells that heads and rest sum to what a layer adds, whatever its mixer is, and that layers without heads tell none."""
    cfg = from_hf(families.hf_config("llama", num_hidden_layers=5, attention_bias=True))
    cfg = dataclasses.replace(cfg, mixers=kinds, layer_mixers=tuple(layer % len(kinds) for layer in range(5)))
    decoder, rng = Decoder.init(cfg, jax.random.key(0)), np.random.default_rng(0)
    tokens, mask = tiny.left_padded((9, 4), cfg.vocab_size)
    along = rng.normal(size=cfg.d_model)
    edits = Edits.ablate(rng.normal(size=cfg.d_model)).take([0, 0]).for_batch(2, 5, cfg.d_model)
    taps = Taps(("attn_out", *HEAD_SITES), 3, along).for_batch(2, cfg.d_model)
    found = jax.tree.map(np.asarray, predict(decoder, tokens, mask, edits, taps=taps, last=True).taps)
    heads = cfg.n_heads if Attention() in kinds else 0
    assert found["z"].shape == (5, 2, 3, heads, cfg.head_dim) and found["pattern"].shape[:3] == (5, 2, heads)
    whole = found["attn_out"] @ along.astype(np.float32)
    np.testing.assert_allclose(found["result_along"].sum(axis=-1) + found["o_bias_along"], whole, atol=1e-4)
    np.testing.assert_allclose(found["result_along_by_source"].sum(axis=-1), found["result_along"], atol=1e-4)
    for layer in range(5):
        kind = kinds[layer % len(kinds)]
        assert bool(np.abs(found["result_along"][layer]).sum()) == (kind == Attention())
        assert bool(np.abs(found["o_bias_along"][layer]).sum()) == (kind is not None and kind != Attention())
