"""Tokens that all prompts begin with, computed once for each edit, change no score."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import hf_config

from refusal_jax import load_model
from refusal_jax.chat import prefix
from refusal_jax.chat.padding import Prices
from refusal_jax.chat.prefix import PROGRAMS, common, shared_tokens
from refusal_jax.chat.prompts import PROBES
from refusal_jax.edits import Edits
from refusal_jax.models.cache import map_memory
from refusal_jax.models.decoder import Decoder
from refusal_jax.models.hf_config import from_hf
from refusal_jax.models.prefix import begun, joined, picked, shareable, taken
from refusal_jax.models.sharding import make_mesh
from refusal_jax.study import scoring

# Windows that end within the prefix, sinks and experts, norms after the branch, fused heads of many queries.
FAMILIES = {
    "llama": "gqa",
    "gemma2": "gqa",
    "gpt_oss": "gqa",
    "olmo2": "gqa",
    "qwen3_moe": "gqa",
    "deepseek_v3": "grouped",
}
SHARED, LENGTHS = 11, (5, 2, 7, 1)


def prompts(vocab: int) -> list[list[int]]:
    rng = np.random.default_rng(0)
    first = rng.integers(1, vocab, SHARED).tolist()
    return [first + rng.integers(1, vocab, n).tolist() for n in LENGTHS]


def padded(rows):
    width = max(map(len, rows))
    tokens = np.array([[0] * (width - len(row)) + row for row in rows], np.int32)
    return tokens, np.array([[False] * (width - len(row)) + [True] * len(row) for row in rows])


def both_ways(decoder, rows, edits):
    """Logits from whole prompts, and from prompts whose first tokens are shared."""
    whole = scoring.last_logits(decoder, None, *padded(rows), edits)
    before = begun(decoder, decoder.embed_tokens(np.int32([rows[0][:SHARED]])), edits, 0)
    return whole, scoring.last_logits(decoder, before, *padded([row[SHARED:] for row in rows]), edits)


@pytest.mark.parametrize("family", FAMILIES)
def test_shared_tokens_change_nothing(family):
    cfg = from_hf(hf_config(family, FAMILIES[family]))
    decoder, rows = Decoder.init(cfg, jax.random.key(0)), prompts(cfg.vocab_size)
    directions = np.random.default_rng(1).standard_normal((2, cfg.d_model))
    edits = Edits.concat([Edits.ablate(directions[:1]), Edits.add(directions[1], 1)])
    edits = jax.tree.map(jnp.asarray, edits.for_batch(2, cfg.n_layers, cfg.d_model))
    (whole, _), (shared, finite) = both_ways(decoder, rows, edits)
    assert np.asarray(finite).all()
    np.testing.assert_allclose(shared, whole, rtol=1e-4, atol=1e-4 * float(np.abs(whole).max()))


def test_shared_tokens_on_a_mesh():
    cfg = from_hf(hf_config("llama"))
    one, rows = Decoder.init(cfg, jax.random.key(0)), prompts(cfg.vocab_size)
    many = Decoder(cfg, one.weights(), make_mesh(2, 2, 2))
    edits = jax.tree.map(jnp.asarray, Edits.none(cfg.d_model).for_batch(1, cfg.n_layers, cfg.d_model))
    (expected, _), _ = both_ways(one, rows, edits)
    np.testing.assert_allclose(both_ways(many, rows, edits)[1][0], expected, rtol=1e-4, atol=1e-4)


def test_rows_of_a_cache_are_those_of_their_edits():
    cfg = from_hf(hf_config("llama"))
    decoder, directions = (
        Decoder.init(cfg, jax.random.key(0)),
        np.random.default_rng(1).standard_normal((3, cfg.d_model)),
    )
    edits, shared = (
        Edits.ablate(directions).for_batch(3, cfg.n_layers, cfg.d_model),
        decoder.embed_tokens(np.int32([[1, 2, 3]])),
    )
    some = taken(begun(decoder, shared, edits, 0), 1, 2)
    alone = begun(decoder, shared, edits.take(np.arange(1, 3)), 0)
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6), some, alone)


def test_how_many_tokens_are_shared(model, monkeypatch):
    written = common([model.chat.prompt_ids(probe) for probe in PROBES])
    rows = [[*written, 1, 2], [*written, 3]]
    # Reading them takes less time than compiling what they need, up to a number of prompts.
    least = PROGRAMS * Prices.of(model.decoder).program / len(written)
    assert shared_tokens(model, rows, 0.9 * least) == [] and shared_tokens(model, rows, 1.1 * least) == written
    assert shared_tokens(model, rows, 1.1 * least, last=2) == []  # those that are read stay, and one less is too few
    assert shared_tokens(model, rows, 2 * least, last=2) == written[:-1]
    assert shared_tokens(model, [*rows, [9, 9]], np.inf) == shared_tokens(model, [], np.inf) == []
    scaled = from_hf(hf_config("llama", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}))
    assert not shareable(scaled)  # its angles depend on how long the whole row is
    never = dataclasses.replace(model, decoder=Decoder.abstract(scaled, jnp.float32, None))
    assert shared_tokens(never, rows, np.inf) == []
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert shared_tokens(model, rows, np.inf) == written[: len(written) // 8 * 8]


@pytest.mark.parametrize("family", ["gemma2", "deepseek_v3", "qwen3_next"])
def test_memory_of_whole_rows_from_its_two_parts(family):
    """Keys, latents and states of rows that go on from one of two edits' memory, in another order."""
    cfg = from_hf(hf_config(family, FAMILIES.get(family, "gqa")))
    decoder, rows = Decoder.init(cfg, jax.random.key(0)), prompts(cfg.vocab_size)
    direction, number_r = np.random.default_rng(1).standard_normal(cfg.d_model), np.array([1, 0, 0, 1])
    two = Edits.concat([Edits.none(cfg.d_model), Edits.ablate(direction)]).for_batch(2, cfg.n_layers, cfg.d_model)
    of_rows, (tokens, mask) = two.take(number_r), padded(rows)
    whole = decoder.forward(tokens, jnp.asarray(mask), of_rows, keep=True)
    before = begun(decoder, decoder.embed_tokens(jnp.asarray([rows[0][:SHARED]])), jax.tree.map(jnp.asarray, two), 0)
    own, (rest, rest_mask) = picked(None, before, number_r), padded([row[SHARED:] for row in rows])
    after = decoder.forward(rest, jnp.asarray(rest_mask), of_rows, cache=own, keep=True)
    found = joined(own, after.memory, jnp.asarray(mask))
    real = lambda a: jnp.where(mask[None, :, None, :, None], a, 0.0)  # noqa: E731
    found, wanted = (map_memory(real, lambda a: a, memory) for memory in (found, whole.memory))
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)  # noqa: E731
    jax.tree.map(close, found, wanted)


@pytest.mark.parametrize("mesh", [None, {"data": 2, "model": 4}], ids=["one device", "mesh"])
def test_replies_that_begin_together_are_those_read_in_whole(mesh, llama, monkeypatch):
    """Prompts of three edits in rows that others have left, which the ring has wrapped by then."""
    model = load_model(llama, mesh=None if mesh is None else make_mesh(**mesh))
    texts = ["bake the bread"[i % 7 :] + " help" * (i % 4) + str(i) for i in range(12)]
    direction = np.random.default_rng(3).normal(size=model.config.d_model)
    kinds = [Edits.none(model.config.d_model), Edits.ablate(direction), Edits.add(direction, 1)]
    edits, batch, count = Edits.concat(kinds).take([0, 1, 2] * 4), model.encode(texts), []
    begin = prefix.begin
    monkeypatch.setattr(prefix, "begin", lambda *args: (count.append(args[2].rows), begin(*args))[1])
    found = []
    for programs in (np.inf, 0):
        monkeypatch.setattr(prefix, "PROGRAMS", programs)
        ended = list(model.reply_ids(batch, 8, edits, rows=4))
        found.append({n: row.tolist() for index, ids in ended for n, row in zip(index, ids, strict=True)})
    assert count == [4] and found[0] == found[1] and len(found[0]) == 12
