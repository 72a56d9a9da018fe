"""Every family and variant against transformers: logits, taps, edits and cached decoding, on tiny random models."""

import dataclasses
import itertools
import pathlib
from functools import partial

import families
import jax
import numpy as np
import oracle
import pytest
import tiny
import torch
from compile_times import lowered
from safetensors.torch import load_file

from refusal_jax import Edits, Taps
from refusal_jax.checkpoints.load import load_decoder, save_weights
from refusal_jax.checkpoints.tensor_files import SINGLE
from refusal_jax.mechanism.attribution import SITES, check_sum, parts_of, scales_after
from refusal_jax.models.cache import Cache
from refusal_jax.models.decoder import Decoder
from refusal_jax.models.mixers.both import Both
from refusal_jax.models.predict import predict
from refusal_jax.models.structure import structure
from refusal_jax.models.weights import weight_table
from refusal_jax.taps import NO_TAPS, RESIDUAL_SITES, TAP_AXES

LENGTHS = (3, 40, 17, 1)  # of the rows of a batch: the shortest is all padding but its last token
ADDED_AT = 1
NUMBERS = itertools.count(1)  # of cases


@dataclasses.dataclass
class Case:
    """One checkpoint in both implementations, a batch, a direction, and our outputs: rows unedited, ablated, added to."""

    folder: pathlib.Path
    decodes: bool
    ours: Decoder
    theirs: object
    tokens: np.ndarray
    mask: np.ndarray
    direction: np.ndarray
    along: np.ndarray
    logits: np.ndarray
    taps: dict[str, np.ndarray]

    def rows(self, of: int) -> slice:
        return slice(of * len(LENGTHS), (of + 1) * len(LENGTHS))


@pytest.fixture(scope="module", params=[c for c in families.CASES if c[0] not in families.OF_KINDS], ids="-".join)
def case(request, tmp_path_factory):
    yield from made(request.param, tmp_path_factory)


def made(param: tuple[str, str], tmp_path_factory):
    """Yields a tiny model of a family's variant, with what is computed once for all tests."""
    folder = families.tiny_model(tmp_path_factory.mktemp("-".join(param)), *param)
    ours = load_decoder(folder)
    tokens, mask = tiny.left_padded(LENGTHS, ours.cfg.vocab_size)
    direction = np.random.default_rng(0).normal(size=ours.cfg.d_model)
    kinds = Edits.concat([Edits.none(ours.cfg.d_model), Edits.ablate(direction), Edits.add(direction, ADDED_AT)])
    edits = kinds.take(np.repeat(range(3), len(LENGTHS))).for_batch(12, ours.cfg.n_layers, ours.cfg.d_model)
    taps = Taps(tuple(TAP_AXES), along=np.random.default_rng(1).normal(size=ours.cfg.d_model)).for_batch(
        12, ours.cfg.d_model
    )
    out = predict(ours, np.tile(tokens, (3, 1)), np.tile(mask, (3, 1)), edits, taps=taps, last=False)
    out = jax.tree.map(np.asarray, out)
    assert out.finite_b.all()
    decodes = families.decodes_differently(*param)
    yield Case(
        folder, decodes, ours, families.reference(folder), tokens, mask, direction, taps.along[0], out.logits, out.taps
    )
    if not next(NUMBERS) % 20:
        jax.clear_caches()  # see conftest.py


def close(ours, theirs, tolerance=1e-4):
    np.testing.assert_allclose(np.asarray(ours), theirs, rtol=tolerance, atol=tolerance)


def test_logits(case):
    theirs = tiny.hf_forward(case.theirs, case.tokens, case.mask).logits.numpy()
    assert theirs[case.mask].std() > 0.3  # else the tolerance would say nothing
    close(case.logits[case.rows(0)][case.mask], theirs[case.mask])


def test_taps(case):
    theirs = families.hf_taps(case.theirs, case.tokens, case.mask)
    for site in RESIDUAL_SITES:
        ours = case.taps[site][:, case.rows(0)]
        assert ours.shape == theirs[site].shape
        close(ours[:, case.mask], theirs[site][:, case.mask])
        assert theirs[site][:, case.mask].std() > 0.1
    states = tiny.hf_forward(case.theirs, case.tokens, case.mask, output_hidden_states=True).hidden_states
    for layer, state in enumerate(states[:-1]):  # the last has gone through the final norm
        close(case.taps["resid_pre"][layer, case.rows(0)][case.mask], state.numpy()[case.mask])


def test_edits(case):
    layers = families.text_model(case.theirs).layers
    both = oracle.ablation(layers, case.direction), oracle.addition(layers, case.direction, ADDED_AT)
    for row, hooks in enumerate(both, 1):
        with oracle.hooked(hooks):
            theirs = tiny.hf_forward(case.theirs, case.tokens, case.mask).logits.numpy()
        close(case.logits[case.rows(row)][case.mask], theirs[case.mask])
        assert np.abs(theirs - case.logits[case.rows(0)])[case.mask].max() > 0.1
    unit = case.direction / np.linalg.norm(case.direction)
    for site in RESIDUAL_SITES:
        along = case.taps[site][:, case.rows(1)][:, case.mask] @ unit
        assert np.abs(along).max() < 1e-4


def layers_with_heads(cfg) -> np.ndarray:
    """Which layers have attention heads, bool `[L]`."""
    form = structure(cfg)
    return np.array([(mixer := form.mixers[index]) is not None and mixer.has_heads for index in form.mixer_l])


def by_head(case, z_lbtnh, out_lbtd) -> np.ndarray:
    """Each head's part of `attn_out . along` in an unedited model, `[L, B, T, N]`, float64, from its output and o_proj's; of
    layers with heads."""
    cfg, weights = case.ours.cfg, case.ours.weights()
    o_ldnh, has_heads = np.zeros((cfg.n_layers, cfg.d_model, *z_lbtnh.shape[3:])), layers_with_heads(cfg)
    for path, weight in weight_table(cfg).items():
        writes = path.endswith(("blocks.o", "_o")) and path != "blocks.ssm_o" and has_heads[list(weight.layers)].all()
        for layer, o_df in zip(weight.layers, weights[path] if writes else (), strict=False):
            o_dnh = np.asarray(o_df).reshape(cfg.d_model, cfg.n_heads, -1)
            o_ldnh[layer, ..., : o_dnh.shape[-1]] = o_dnh
    scale = cfg.residual_scale * getattr(next(iter(cfg.mixers), None), "out_scale", 1.0)
    along_ld = np.tile(scale * case.along.astype(np.float64), (cfg.n_layers, 1))
    scale_lbt = np.ones(out_lbtd.shape[:3])
    if cfg.post_norm:
        along_ld *= cfg.norm_offset + np.asarray(weights["blocks.attn_post_norm"], np.float64)
        scale_lbt = (np.square(out_lbtd, dtype=np.float64).mean(axis=-1) + cfg.norm_eps) ** -0.5
    return np.einsum("lbtnh,ldnh,ld,lbt->lbtn", z_lbtnh, o_ldnh[has_heads], along_ld[has_heads], scale_lbt)


def test_head_taps(case):
    """Head outputs and patterns as transformers computes them, edited and not, and what heads write along a direction."""
    layers, cfg = families.text_model(case.theirs).layers, case.ours.cfg
    has_heads = layers_with_heads(cfg)
    hooks = [], oracle.ablation(layers, case.direction), oracle.addition(layers, case.direction, ADDED_AT)
    for row, edited in enumerate(hooks):
        taps = {site: case.taps[site][:, case.rows(row)] for site in TAP_AXES}
        whole = (taps["attn_out"] @ case.along)[:, case.mask]
        close((taps["result_along"].sum(axis=-1) + taps["o_bias_along"])[:, case.mask], whole)
        assert not any(taps[site][~has_heads].any() for site in ("z", "pattern", "result_along"))
        taps = {site: values[has_heads] for site, values in taps.items()}
        with oracle.hooked(edited):
            theirs = families.hf_heads(case.theirs, case.tokens, case.mask)
        z_lbtnh = theirs["z"]
        close(taps["z"][:, case.mask], z_lbtnh[:, case.mask])
        for name, patterns in (("ours", taps["pattern"]), ("theirs", theirs["pattern"])):
            theirs[name] = patterns.transpose(0, 1, 3, 2, 4)[:, case.mask]  # queries before heads
        close(theirs["ours"], theirs["theirs"])
        assert theirs["ours"].dtype == np.float32 and (theirs["ours"] == 0).any()
        close(taps["result_along_by_source"].sum(axis=-1)[:, case.mask], taps["result_along"][:, case.mask])
        if not edited:
            close(taps["result_along"][:, case.mask], by_head(case, z_lbtnh, theirs["out"])[:, case.mask])
    beside = any(isinstance(mixer, Both) for mixer in cfg.mixers)
    assert (cfg.o_bias or beside) == bool(np.abs(case.taps["o_bias_along"][has_heads]).max())


def test_attribution(case):
    """Parts of the last token along a direction sum to the residual, as transformers computes both; heads are tested above."""
    theirs, unit = families.hf_taps(case.theirs, case.tokens, case.mask), case.along / np.linalg.norm(case.along)
    rows, last = case.rows(0), {site: values[:, :, -1].astype(np.float64) @ unit for site, values in theirs.items()}
    tapped = {site: case.taps[site][:, rows, -1] for site in SITES}
    for site in ("result_along", "o_bias_along"):
        tapped[site] = tapped[site] / np.linalg.norm(case.along)
    units = np.tile(unit, (len(LENGTHS), 1)).astype(np.float32)
    scale_l = np.asarray(scales_after(case.ours))
    found, spread = parts_of(tapped, case.taps["resid_post"][-1, rows, -1], units, scale_l)
    close(found.embed, last["resid_pre"][0] * scale_l[0])
    close(np.asarray(found.heads).sum(axis=2) + found.bias, last["attn_out"].T * scale_l)
    close(found.mlp, last["mlp_out"].T * scale_l)
    close(found.along, np.concatenate([last["resid_pre"], last["resid_post"][-1:]]).T)
    close(found.norm[:, 1:], np.linalg.norm(theirs["resid_post"][:, :, -1], axis=-1).T)
    check_sum(found, np.asarray(spread), case.ours.dtype)
    assert np.abs(found.off).max() < 1e-4 < np.abs(found.heads).max()


@partial(jax.jit, static_argnames="prefix")
def decoded(decoder: Decoder, tokens_bt, mask_bt, edits, prefix: int):
    """Logits of the tokens after `prefix`, one decode step each with a cache, `[B, T - prefix, V]`."""
    kv = decoder.forward(tokens_bt[:, :prefix], mask_bt[:, :prefix], edits, keep=True).memory
    cache = Cache.of_prompt(kv, mask_bt[:, :prefix], tokens_bt.shape[1])

    def step(cache, column):
        token_b, mask_b = column
        out = decoder.forward(token_b[:, None], mask_b[:, None], edits, cache=cache)
        return cache.append(out.memory, mask_b[:, None]), decoder.logits(out.resid_btd)[:, 0]

    return jax.lax.scan(step, cache, (tokens_bt[:, prefix:].T, mask_bt[:, prefix:].T))[1].swapaxes(0, 1)


def test_last_logits_and_cached_decode_equal_the_whole(case):
    if not case.decodes:
        pytest.skip("It decodes as the family's first variant does.")
    cfg, prefix = case.ours.cfg, 24
    edits = Edits.concat([Edits.none(cfg.d_model)] * 3 + [Edits.ablate(case.direction)])
    edits = edits.for_batch(4, cfg.n_layers, cfg.d_model)
    tokens, mask = case.tokens, case.mask
    whole = np.stack([*case.logits[:3], case.logits[case.rows(1)][3]])
    last = predict(case.ours, tokens, mask, edits, taps=NO_TAPS, last=True).logits
    assert last.shape == (len(LENGTHS), cfg.vocab_size) and last.dtype == np.float32
    close(last, whole[:, -1])
    if any(kind.rope.kind in ("dynamic", "longrope") for kind in cfg.kinds):
        # The angles of these change with the length: those of cached tokens hold as long as it is within the first context.
        prefix, width = 9, min(kind.rope.original_context for kind in cfg.kinds)
        tokens, mask = tokens[:, -width:], mask[:, -width:]
        whole = np.asarray(predict(case.ours, tokens, mask, edits, taps=NO_TAPS, last=False).logits)
    real = mask[:, prefix:]
    assert real[1].sum() > 10
    close(np.asarray(decoded(case.ours, tokens, mask, edits, prefix))[real], whole[:, prefix:][real])


def test_saving_is_loading_backwards(case, tmp_path):
    """Tells what transformers wrote, byte for byte; and what we wrote, again."""
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
        (folder / "config.json").write_bytes((case.folder / "config.json").read_bytes())
    save_weights(case.ours, first)
    save_weights(load_decoder(first), second)
    assert (first / SINGLE).read_bytes() == (second / SINGLE).read_bytes()
    theirs, ours = load_file(case.folder / SINGLE), load_file(first / SINGLE)
    assert set(ours) <= set(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert all("visual" in name or "vision" in name or "projector" in name for name in set(theirs) - set(ours))


@pytest.mark.parametrize("family", families.FAMILIES)
def test_programs_do_not_grow_with_layers(family):
    """As they would if layers were unrolled; `python tests/compile_times.py` has the seconds."""
    few, many = (len(lowered(family, layers).as_text().splitlines()) for layers in (12, 80))
    assert many == few
