"""Layers of several kinds in one model: picked, stacked, kept and shared as those of one kind are."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import FAMILIES, hf_config

from refusal_jax.checkpoints.matrices import matrices
from refusal_jax.edits import Edits
from refusal_jax.models.cache import Cache
from refusal_jax.models.decoder import Decoder
from refusal_jax.models.hf_config import from_hf
from refusal_jax.models.mixers.attention import Attention
from refusal_jax.models.prefix import begun
from refusal_jax.models.sharding import make_mesh
from refusal_jax.models.weights import mixers_of, weight_table
from refusal_jax.study import scoring
from refusal_jax.taps import Taps

LAYERS, KINDS = 5, (0, 1, 1, 0, 1)  # which of two kinds of attention a layer has
SITES = ("resid_pre", "attn_out", "mlp_out", "pattern", "result_along")


@pytest.fixture(scope="module")
def models() -> tuple[Decoder, Decoder]:
    """Returns a model whose layers are all alike, and one of the same weights whose layers are of two kinds."""
    cfg = from_hf(hf_config("llama", num_hidden_layers=LAYERS))
    alike = Decoder.init(cfg, jax.random.key(0))
    mixed = dataclasses.replace(cfg, mixers=(Attention(), Attention(prefix="other_")), layer_mixers=KINDS)
    weights = alike.weights()
    for name in Attention().weights(cfg):
        whole = weights.pop(f"blocks.{name}")
        for kind, prefix in enumerate(("", "other_")):
            weights[f"blocks.{prefix}{name}"] = whole[np.flatnonzero(np.equal(KINDS, kind))]
    return alike, Decoder(mixed, weights)


def prompts(cfg, width: int = 12):
    """Returns left-padded tokens, their mask, and edits of two rows."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, cfg.vocab_size, (2, width)).astype(np.int32)
    mask = np.arange(width) >= np.array([[0], [5]])
    edits = Edits.concat([Edits.none(cfg.d_model), Edits.ablate(rng.standard_normal(cfg.d_model))])
    return tokens, mask, jax.tree.map(jnp.asarray, edits.for_batch(2, cfg.n_layers, cfg.d_model))


def close(found, wanted):
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4 * float(np.abs(wanted).max()))


@partial(jax.jit, static_argnames="prefix")
def run(decoder, tokens_bt, mask_bt, edits, along_bd, prefix: int):
    """Returns taps of whole prompts, and the logits of the tokens after `prefix`, decoded one by one."""
    whole = decoder.forward(tokens_bt, mask_bt, edits, Taps(SITES, along=along_bd))
    before = decoder.forward(tokens_bt[:, :prefix], mask_bt[:, :prefix], edits, keep=True)
    cache, logits = Cache.of_prompt(before.memory, mask_bt[:, :prefix], tokens_bt.shape[1]), []
    for at in range(prefix, tokens_bt.shape[1]):
        column = mask_bt[:, at : at + 1]
        out = decoder.forward(tokens_bt[:, at : at + 1], column, edits, cache=cache)
        cache = cache.append(out.memory, column)
        logits.append(decoder.logits(out.resid_btd)[:, 0])
    return whole.taps, decoder.logits(whole.resid_btd)[:, prefix:], jnp.stack(logits, axis=1)


def real(site, taps, mask):
    """Returns what was tapped of real tokens; queries come before heads."""
    values = np.asarray(taps[site])
    return (values.swapaxes(2, 3) if site == "pattern" else values)[:, mask]


@pytest.mark.parametrize("way", ["one device", "mesh"])
def test_two_kinds_equal_one(models, way):
    alike, mixed = models
    if way == "mesh":
        mixed = Decoder(mixed.cfg, mixed.weights(), make_mesh(2, 2, 2))
    args = *prompts(alike.cfg), np.random.default_rng(1).standard_normal((2, alike.cfg.d_model)).astype(np.float32)
    wanted, found = run(alike, *args, prefix=9), run(mixed, *args, prefix=9)
    for site in SITES:
        close(real(site, found[0], args[1]), real(site, wanted[0], args[1]))
    close(found[1], wanted[1])
    close(found[2], wanted[1])


def test_shared_prefixes_of_two_kinds(models):
    """Tells that tokens which all prompts begin with can be run first, in layers of two kinds."""
    alike, mixed = models
    tokens, mask, edits = prompts(alike.cfg)
    prefix = np.arange(1, 9, dtype=np.int32)
    wanted, _ = scoring.last_logits(alike, None, *joined(prefix, tokens, mask), edits)
    before = begun(mixed, mixed.embed_tokens(prefix[None]), edits, 0)
    found, finite = scoring.last_logits(mixed, before, tokens, mask, edits)
    assert np.asarray(finite).all()
    close(found, wanted)


def joined(prefix, tokens, mask):
    """Returns left-padded rows that each begin with the prefix."""
    rows = [np.concatenate([prefix, row[real]]) for row, real in zip(tokens, mask, strict=True)]
    width = max(map(len, rows))
    whole = np.stack([np.pad(row, (width - len(row), 0)) for row in rows])
    return whole, np.arange(width) >= np.array([[width - len(row)] for row in rows])


def sharing(cfg, **more):
    """Returns the config with queries only in the last two layers, whose keys and values are those of layer 2."""
    return dataclasses.replace(cfg, mixers=(Attention(), Attention(reads=0)), layer_mixers=(0, 0, 0, 1, 1), **more)


def test_layers_that_read_the_keys_of_another(models):
    """Tells by a change of the keys of layer 2, which layers 3 and 4 see, too."""
    cfg = sharing(models[0].cfg)
    decoder, args = Decoder.init(cfg, jax.random.key(2)), prompts(cfg)
    along = np.ones((2, cfg.d_model), np.float32)
    taps, whole, decoded = run(decoder, *args, along, prefix=9)
    close(decoded, whole)
    assert {path for path, w in weight_table(cfg).items() if w.layers == (0, 1, 2)} == {"blocks.k", "blocks.v"}
    changed = dict(decoder.weights())
    changed["blocks.k"] = changed["blocks.k"].at[2].add(1.0)
    after = run(Decoder(cfg, changed), *args, along, prefix=9)[0]["pattern"]
    moved_l = [float(np.abs(after[layer] - taps["pattern"][layer]).max()) for layer in range(LAYERS)]
    assert moved_l[:2] == [0.0, 0.0] and min(moved_l[2:]) > 1e-3


def test_scores_of_layers_that_share(models):
    """Tells that a model whose layers share keys is scored alike with a prefix that all prompts share."""
    cfg = sharing(models[0].cfg)
    decoder, (tokens, mask, edits), prefix = (
        Decoder.init(cfg, jax.random.key(2)),
        prompts(cfg),
        np.int32([1, 2, 3, 4, 5]),
    )
    whole_tokens, whole_mask = joined(prefix, tokens, mask)
    before = begun(decoder, decoder.embed_tokens(prefix[None]), edits, 0)
    logits, _ = scoring.last_logits(decoder, before, tokens, mask, edits)
    repeated = jax.tree.map(lambda a: jnp.repeat(a, len(tokens), axis=0), edits)
    whole = decoder.forward(np.tile(whole_tokens, (2, 1)), np.tile(whole_mask, (2, 1)), repeated)
    close(logits, decoder.logits(whole.resid_btd)[:, -1])


def test_layers_without_one_of_the_two():
    """Tells that a layer without a mixer adds nothing at its site, and has no weights for it."""
    cfg = from_hf(hf_config("llama", num_hidden_layers=LAYERS))
    kinds = {"mixers": (Attention(), None), "layer_mixers": (0, 1, 0, 1, 0), "without_mlp": (0, 4)}
    cfg = dataclasses.replace(cfg, **kinds)
    table = weight_table(cfg)
    assert table["blocks.attn_norm"].layers == table["blocks.q"].layers == (0, 2, 4)
    assert table["blocks.mlp_norm"].layers == table["blocks.down"].layers == (1, 2, 3)
    decoder, along = Decoder.init(cfg, jax.random.key(0)), np.ones((2, cfg.d_model), np.float32)
    args = *prompts(cfg), along
    taps, whole, decoded = run(decoder, *args, prefix=9)
    close(decoded, whole)
    for site, without in (("attn_out", [1, 3]), ("mlp_out", [0, 4]), ("result_along", [1, 3])):
        zero_l = ~np.asarray(taps[site]).any(axis=tuple(range(1, taps[site].ndim)))
        assert np.flatnonzero(zero_l).tolist() == without


@pytest.mark.parametrize("family", FAMILIES)
def test_which_matrices_belong_to_a_sequence_mixer(family):
    """Tells that what audits compare by sides of a block is sorted by the mixers' own weights."""
    cfg = from_hf(hf_config(family, next(iter(FAMILIES[family]))))
    own = {f"blocks.{name}" for mixer in mixers_of(cfg) if mixer is not None for name in mixer.weights(cfg)}
    within = {"blocks.latent_q_up", "blocks.latent_kv_up"}  # which read what the mixer itself has made
    assert all(one.of_mixer == (one.path in own - within) for one in matrices(cfg))


def test_random_weights_begin_with_norms_that_change_nothing():
    cfg = from_hf(hf_config("qwen3_next"))
    weights = Decoder.init(cfg, jax.random.key(0), jnp.bfloat16).weights()
    assert cfg.norm_offset == 1  # but the norm of a delta rule multiplies as it is
    assert (weights["blocks.delta_norm"] == 1).all() and (weights["blocks.attn_norm"] == 0).all()
    cfg = from_hf(hf_config("granitemoehybrid"))
    skip = Decoder.init(cfg, jax.random.key(0), jnp.bfloat16).weights()["blocks.ssm_skip"]
    assert (skip == 1).all() and skip.dtype == jnp.float32
