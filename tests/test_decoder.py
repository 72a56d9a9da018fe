"""The decoder beyond one forward pass (test_families.py has that, for every family): decoding, padding, dtypes, ranges."""

import dataclasses

import families
import jax
import numpy as np
import pytest
import tiny
import torch

from refusal_jax import ChatModel, Edits, Taps, UserError, load_model
from refusal_jax.chat.padding import TokenBatch
from refusal_jax.models.attention import Context
from refusal_jax.models.decoder import Decoder
from refusal_jax.models.rope import Rope

LENGTHS = (3, 40, 17, 1)  # of the rows of a batch: the shortest is all padding but its last token


def close(ours, theirs, tolerance=1e-4):
    np.testing.assert_allclose(np.asarray(ours), theirs, rtol=tolerance, atol=tolerance)


def test_taps_of_the_last_positions(model):
    tokens, mask = tiny.left_padded((6, 9), model.config.vocab_size)
    whole = model.taps(tokens, mask, Taps(("resid_mid", "mlp_out")))
    cut = model.taps(tokens, mask, Taps(("resid_mid", "mlp_out"), last=3))
    for site, values in cut.items():
        assert values.shape == (model.config.n_layers, 2, 3, model.config.d_model)
        np.testing.assert_array_equal(np.asarray(values), np.asarray(whole[site])[:, :, -3:])


def test_unknown_tap_site():
    with pytest.raises(UserError, match=r"unknown tap sites \['resid'\]; the sites are resid_pre, attn_out"):
        Taps(("resid_pre", "resid"))


def test_padding_changes_nothing(model):
    tokens, mask = tiny.left_padded(LENGTHS, model.config.vocab_size, seed=2)
    together = np.asarray(model.logits(tokens, mask))
    for row, length in enumerate(LENGTHS[:3]):
        alone = model.logits(tokens[row : row + 1, -length:], mask[row : row + 1, -length:])
        close(together[row], alone[0], 1e-5)


def test_positions_other_than_last_or_all(model):
    with pytest.raises(ValueError, match="positions must be 'last' or 'all', not 'first'"):
        model.logits(*tiny.left_padded((4,), 9), positions="first")


def test_llama3_rope_blends_between_its_two_wavelengths():
    rope = Rope(1000.0, 32, "llama3", 8.0, 16, low_freq_factor=1.0, high_freq_factor=4.0)
    plain, scaled = (np.asarray(r.inverse_frequencies(1), np.float64) for r in (Rope(1000.0, 32), rope))
    ratios, turns = scaled / plain, 16 * plain / (2 * np.pi)
    np.testing.assert_allclose(ratios[turns < 1], 1 / 8, rtol=1e-6)
    assert not (turns > 4).any() and ((ratios > 1 / 8) & (ratios < 1)).any()
    long = dataclasses.replace(rope, original_context=10**6).inverse_frequencies(1)
    np.testing.assert_allclose(np.asarray(long), plain, rtol=1e-6)


def uncached_greedy(model: ChatModel, tokens, mask, steps: int, edits=None) -> np.ndarray:
    """Greedy tokens `[B, steps]` by running the whole prompt again for every token, in one fixed shape."""
    rows, width = tokens.shape
    grown, real = np.zeros((rows, width + steps), np.int32), np.zeros((rows, width + steps), bool)
    grown[:, -width:], real[:, -width:] = tokens, mask
    for _ in range(steps):
        token = np.asarray(model.logits(grown, real, edits)).argmax(-1)
        grown = np.concatenate([grown[:, 1:], token[:, None].astype(np.int32)], axis=1)
        real = np.concatenate([real[:, 1:], np.ones((rows, 1), bool)], axis=1)
    return grown[:, -steps:]


def with_eos(model: ChatModel, *eos_ids: int) -> ChatModel:
    return dataclasses.replace(model, chat=dataclasses.replace(model.chat, eos_ids=eos_ids))


def hf_greedy(hf, tokens, mask, steps: int, eos_ids, pad_id: int) -> np.ndarray:
    out = hf.generate(
        torch.tensor(tokens, dtype=torch.long),
        attention_mask=torch.tensor(mask, dtype=torch.long),
        max_new_tokens=steps,
        do_sample=False,
        eos_token_id=list(eos_ids),
        pad_token_id=pad_id,
    ).numpy()[:, tokens.shape[1] :]
    return np.pad(out, ((0, 0), (0, steps - out.shape[1])), constant_values=pad_id)


GREEDY = [
    ("llama", "gqa"),
    ("llama", "rope-llama3"),
    ("qwen", "mha"),
    ("gemma3_text", "gqa"),
    ("gemma4_text", "gqa"),
    ("phi3", "longrope"),  # whose angles change when the longest row has 20 tokens
    ("mixtral", "gqa"),
]


@pytest.mark.parametrize("family,variant", GREEDY)
def test_cached_decoding_equals_uncached_and_transformers(family, variant, tmp_path):
    folder = families.tiny_model(tmp_path, family, variant)
    model, hf, steps = load_model(folder), families.reference(folder), 12
    lengths = (3, 15, 9, 1) if variant == "longrope" else LENGTHS
    tokens, mask = tiny.left_padded(lengths, model.config.vocab_size, seed=3)
    never, pad = 10**6, model.chat.pad_id
    free = np.asarray(with_eos(model, never).generate_ids(TokenBatch(tokens, mask), steps))
    assert free.shape == (len(LENGTHS), steps) and free.dtype == np.int32
    np.testing.assert_array_equal(free, uncached_greedy(model, tokens, mask, steps))
    np.testing.assert_array_equal(free, hf_greedy(hf, tokens, mask, steps, (never,), pad))

    stops = int(free[1, 4]), int(free[2, 7])  # two rows now end early, the others may go on
    ended = np.asarray(with_eos(model, *stops).generate_ids(TokenBatch(tokens, mask), steps))
    np.testing.assert_array_equal(ended, hf_greedy(hf, tokens, mask, steps, stops, pad))
    if variant == "longrope":  # the longest row ends at once, and still says how long the text is
        stop = (int(free[1, 0]),)
        ended_first = np.asarray(with_eos(model, *stop).generate_ids(TokenBatch(tokens, mask), steps))
        np.testing.assert_array_equal(ended_first, hf_greedy(hf, tokens, mask, steps, stop, pad))
    first = np.isin(free, stops).argmax(1)
    assert (ended[1, first[1] + 1 :] == pad).all() and (ended[1] != free[1]).any()


def test_ropes_of_the_longest_row_hold_for_all_rows(tmp_path):
    """A prompt beyond the first context changes the angles of the short ones beside it, in whatever rows they are read."""
    model, steps = load_model(families.tiny_model(tmp_path, "phi3", "longrope")), 4
    model = with_eos(model, 10**6)
    tokens, mask = tiny.left_padded((40, 5, 6, 7), model.config.vocab_size, seed=3)
    expected = uncached_greedy(model, tokens, mask, steps)
    np.testing.assert_array_equal(model.generate_ids(TokenBatch(tokens, mask), steps), expected)
    found = dict(
        pair
        for done, texts in model.replies(TokenBatch(tokens, mask), steps, rows=4)
        for pair in zip(done, texts, strict=True)
    )
    assert [found[i] for i in range(4)] == model.chat.decode(expected)


def test_decoding_ends_once_every_row_has_ended(model):
    tokens, mask = tiny.left_padded((5, 9), model.config.vocab_size, seed=4)
    batch = TokenBatch(tokens, mask)
    first = np.asarray(with_eos(model, 10**6).generate_ids(batch, 1))[:, 0]
    ended = np.asarray(with_eos(model, *map(int, first)).generate_ids(batch, 6))
    np.testing.assert_array_equal(ended[:, 0], first)
    assert (ended[:, 1:] == model.chat.pad_id).all()


@pytest.mark.parametrize("wanted", [0, 250])
def test_new_tokens_that_do_not_fit_the_context(model, wanted):
    batch = TokenBatch(*tiny.left_padded((5, 9), model.config.vocab_size))
    with pytest.raises(UserError, match=rf"max_new_tokens = {wanted} does not fit.*Choose 1 to {256 - 9}\."):
        model.generate_ids(batch, wanted)


@pytest.mark.usefixtures("unchecked")
def test_edits_in_the_place_of_the_number_of_tokens(model):
    with pytest.raises(UserError, match="max_new_tokens is Edits, not a number: pass edits as edits="):
        model.generate(["help"], Edits.none(model.config.d_model))


def test_text_in_text_out(model):
    instructions = ["How do I bake the bread?", "help"]
    replies = model.generate(instructions, max_new_tokens=6)
    ids = model.generate_ids(model.encode(instructions), 6)
    assert replies == model.chat.decode(ids) and len(replies) == 2


def test_run_layers_equals_the_scan(model):
    cfg = model.config
    tokens, mask = tiny.left_padded((4, 11), cfg.vocab_size, seed=5)
    direction = np.random.default_rng(0).normal(size=cfg.d_model)
    edits = [Edits.none(cfg.d_model), Edits.concat([Edits.ablate(direction), Edits.add(direction, 1)])]

    @jax.jit
    def both(decoder: Decoder, tokens, mask, edits, start, stop):
        ctx, x = Context.of_prompt(cfg, mask), decoder.embed_tokens(tokens)
        out = decoder.run(x, ctx, edits, Taps(("resid_post",)))
        before, _ = decoder.run_layers(x, ctx, edits, 0, start)
        after, _ = decoder.run_layers(before, ctx, edits, start, stop)
        return out.resid_btd, out.taps["resid_post"], before.x_btd, after.x_btd

    for edit in edits:
        edit = edit.for_batch(2, cfg.n_layers, cfg.d_model)
        for start, stop in ((1, 2), (1, 3), (2, 3), (0, 3)):
            out, posts, before, after = both(model.decoder, tokens, mask, edit, start, stop)
            close(np.asarray(after)[mask], np.asarray(posts[stop - 1])[mask], 1e-5)
            if start:
                close(np.asarray(before)[mask], np.asarray(posts[start - 1])[mask], 1e-5)
        close(np.asarray(after)[mask], np.asarray(out)[mask], 1e-5)


@pytest.mark.parametrize("dtype,near", [("bfloat16", 0.15), ("float16", 0.02)])
def test_half_precision(llama, hf, dtype, near):
    model = load_model(llama, dtype)
    assert {str(a.dtype) for a in model.decoder.weights().values()} == {dtype}
    tokens, mask = tiny.left_padded(LENGTHS, model.config.vocab_size, seed=6)
    ours = np.asarray(model.logits(tokens, mask))
    theirs = tiny.hf_forward(tiny.load_hf(llama, dtype), tokens, mask).logits.float().numpy()[:, -1]
    exact = tiny.hf_forward(hf, tokens, mask).logits.numpy()[:, -1]
    assert np.isfinite(ours).all() and ours.dtype == np.float32
    assert np.abs(ours - theirs).max() < near
    assert np.abs(ours - exact).max() < 2 * np.abs(theirs - exact).max()  # no worse than transformers at this dtype


@pytest.mark.parametrize("rows", [1, 3, 4, 12])
def test_rows_that_are_refilled_reply_as_if_alone(rows, model):
    """Prompts of other lengths, with their own edits, in rows that others have left: the ring has wrapped by then."""
    rng = np.random.default_rng(3)
    prompts = ["bake the bread"[i % 7 :] + " help" * (i % 4) + str(i) for i in range(12)]
    direction = rng.normal(size=model.config.d_model)
    edits = Edits.concat([Edits.none(model.config.d_model), Edits.ablate(direction)]).take([0, 1] * 6)
    batch = model.encode(prompts)
    ids = model.generate_ids(batch, 20, edits)
    eos = tuple({int(ids[0, 12]), int(ids[3, 5])})  # so that replies end, at different lengths
    ending = dataclasses.replace(model, chat=dataclasses.replace(model.chat, eos_ids=eos))
    lengths = {next((n for n, token in enumerate(row) if token in eos), 20) for row in ids.tolist()}
    assert len(lengths) > 3 and 20 in lengths
    expected = ending.chat.decode(ids)
    replies, seen = {}, []
    for done, texts in ending.replies(batch, 20, edits, rows=rows):
        replies |= dict(zip(done, texts, strict=True))
        seen += done
    assert sorted(seen) == list(range(12)) and [replies[i] for i in range(12)] == expected
