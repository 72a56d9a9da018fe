"""Interventions: against forward hooks in torch, as rows of one batch, through one compiled program."""

import contextlib
import dataclasses

import jax
import numpy as np
import oracle
import pytest
import tiny
import torch

from refusal_jax import Edits, Taps
from refusal_jax.chat.padding import TokenBatch
from refusal_jax.edits import SITES
from refusal_jax.models.predict import predict

LENGTHS = (4, 15, 9)


@pytest.fixture(scope="module")
def batch(model):
    return tiny.left_padded(LENGTHS, model.config.vocab_size, seed=7)


@pytest.fixture(scope="module")
def direction(model):
    return 3.0 * np.random.default_rng(1).normal(size=model.config.d_model)


@contextlib.contextmanager
def hooked(model, direction, *, ablate=(), add_at=None, scale=1.0):
    """torch forward hooks that ablate `direction` at the (layer, site) pairs of `ablate`, and add it before a block."""
    raw = torch.tensor(direction, dtype=torch.float32)
    unit = raw / raw.norm()

    def without(x):
        return x - scale * (x @ unit)[..., None] * unit

    def before(layer):
        def hook(module, args):
            x = without(args[0]) if (layer, "resid_pre") in ablate else args[0]
            return (x + scale * raw if layer == add_at else x, *args[1:])

        return hook

    def after(layer, site):
        def hook(module, args, out):
            if (layer, site) not in ablate:
                return out
            return (without(out[0]), *out[1:]) if isinstance(out, tuple) else without(out)

        return hook

    hooks = []
    for index, layer in enumerate(model.model.layers):
        hooks.append(layer.register_forward_pre_hook(before(index)))
        hooks.append(layer.self_attn.register_forward_hook(after(index, "attn_out")))
        hooks.append(layer.mlp.register_forward_hook(after(index, "mlp_out")))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def every(layers, sites=SITES):
    return {(layer, site) for layer in layers for site in sites}


ABLATIONS = {
    "everywhere": ({}, every(range(3)), 1.0),
    "one-layer": ({"layers": [1], "n_layers": 3}, every([1]), 1.0),
    "input-only": ({"sites": ["resid_pre"]}, every(range(3), ["resid_pre"]), 1.0),
    "attention-only": ({"sites": ["attn_out"]}, every(range(3), ["attn_out"]), 1.0),
    "mlp-of-two": ({"layers": (0, 2), "n_layers": 3, "sites": ("mlp_out",)}, every([0, 2], ["mlp_out"]), 1.0),
    "half": ({"scale": 0.5}, every(range(3)), 0.5),
}


@pytest.mark.parametrize("name", ABLATIONS)
def test_ablation_equals_torch_hooks(name, model, hf, batch, direction):
    options, where, scale = ABLATIONS[name]
    tokens, mask = batch
    plain = tiny.hf_forward(hf, tokens, mask).logits.numpy()[mask]
    with hooked(hf, direction, ablate=where, scale=scale):
        theirs = tiny.hf_forward(hf, tokens, mask).logits.numpy()[mask]
    assert np.abs(theirs - plain).max() > 1e-2  # the edit does something
    ours = np.asarray(model.logits(tokens, mask, Edits.ablate(direction, **options), positions="all"))[mask]
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layer,scale", [(0, 1.0), (1, -1.0), (2, 0.25)])
def test_addition_equals_torch_hooks(layer, scale, model, hf, batch, direction):
    tokens, mask = batch
    plain = tiny.hf_forward(hf, tokens, mask).logits.numpy()[mask]
    with hooked(hf, direction, add_at=layer, scale=scale):
        theirs = tiny.hf_forward(hf, tokens, mask).logits.numpy()[mask]
    assert np.abs(theirs - plain).max() > 1e-2
    ours = np.asarray(model.logits(tokens, mask, Edits.add(direction, layer, scale), positions="all"))[mask]
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_a_row_may_ablate_and_add(model, hf, batch, direction):
    tokens, mask = batch
    ablate, add = Edits.ablate(direction), Edits.add(direction, 1)
    both = ablate.adding(add)
    with hooked(hf, direction, ablate=every(range(3)), add_at=1):
        theirs = tiny.hf_forward(hf, tokens, mask).logits.numpy()[:, -1]
    np.testing.assert_allclose(np.asarray(model.logits(tokens, mask, both)), theirs, rtol=1e-4, atol=1e-4)


def test_taps_see_the_edited_residual(model, batch, direction):
    tokens, mask = batch
    unit = direction / np.linalg.norm(direction)
    ablated = model.taps(tokens, mask, Taps(SITES), Edits.ablate(direction))
    plain = model.taps(tokens, mask, Taps(SITES))
    for site in SITES:
        along = np.abs(np.asarray(ablated[site])[:, mask] @ unit)
        assert along.max() < 1e-4 < 1e-1 < np.abs(np.asarray(plain[site])[:, mask] @ unit).max()
    added = np.asarray(model.taps(tokens, mask, Taps(SITES), Edits.add(direction, 1))["resid_pre"])
    np.testing.assert_array_equal(added[0], np.asarray(plain["resid_pre"])[0])
    rows = np.asarray(plain["resid_pre"])[1] + direction.astype(np.float32)
    np.testing.assert_allclose(added[1][mask], rows[mask], rtol=1e-5, atol=1e-5)


def test_rows_of_one_batch_equal_each_row_alone(model, direction):
    tokens, mask = tiny.left_padded((12,) * 5, model.config.vocab_size, seed=8)
    other = np.random.default_rng(2).normal(size=len(direction))
    parts = [
        Edits.none(len(direction)),
        Edits.ablate(direction),
        Edits.ablate(other, layers=[1], n_layers=3, sites=["attn_out"]),
        Edits.add(direction, 2),
        Edits.add(other, 0, -2.0),
    ]
    together = np.asarray(model.logits(tokens, mask, Edits.concat(parts)))
    for row, edits in enumerate(parts):
        alone = np.asarray(model.logits(tokens[row : row + 1], mask[row : row + 1], edits))
        np.testing.assert_allclose(together[row], alone[0], rtol=1e-4, atol=2e-5)
    shuffled = np.asarray(model.logits(tokens, mask, Edits.concat(parts).take([4, 3, 2, 1, 0])))
    assert np.abs(shuffled - together)[[0, 1, 3, 4]].max(axis=1).min() > 1e-2  # each row follows its own edit


def test_directions_of_several_rows_are_normalised_one_by_one():
    rows = np.array([[3.0, 4.0], [0.0, -0.1], [0.0, 0.0]])
    np.testing.assert_allclose(Edits.ablate(rows).ablate_rjd[:, 0], [[0.6, 0.8], [0.0, -1.0], [0.0, 0.0]], atol=1e-6)
    added = Edits.add(rows, 1, -2.0)
    np.testing.assert_allclose(added.add_rd, -2 * rows, rtol=1e-6)
    assert added.rows == 3 and added.layer_ra.tolist() == [[1], [1], [1]] and not added.gate_rls.any()


def test_a_subspace_is_ablated_whole(model, batch, direction):
    tokens, mask = batch
    rows = np.stack([direction, direction + np.random.default_rng(4).normal(size=len(direction))])
    edits = Edits.ablate(rows[None])
    assert edits.rows == 1 and edits.ablate_rjd.shape == (1, 2, len(direction))
    basis = edits.ablate_rjd[0].astype(np.float64)
    np.testing.assert_allclose(basis @ basis.T, np.eye(2), atol=1e-6)
    tapped = model.taps(tokens, mask, Taps(SITES), edits)
    for site in SITES:
        values = np.asarray(tapped[site])[:, mask]
        assert np.abs(values @ (rows / np.linalg.norm(rows, axis=1, keepdims=True)).T).max() < 1e-4
    # Rows of several directions and of one go together; what does not span more adds nothing.
    parts = [Edits.ablate(direction), edits, Edits.add(direction, 1)]
    together = np.asarray(model.logits(np.repeat(tokens[:1], 3, 0), np.repeat(mask[:1], 3, 0), Edits.concat(parts)))
    for row, part in enumerate(parts):
        alone = np.asarray(model.logits(tokens[:1], mask[:1], part))[0]
        np.testing.assert_allclose(together[row], alone, rtol=1e-4, atol=2e-5)
    for more in (2 * direction, 0 * direction):
        same = np.asarray(model.logits(tokens, mask, Edits.ablate(np.stack([direction, more])[None])))
        np.testing.assert_allclose(same, np.asarray(model.logits(tokens, mask, parts[0])), rtol=1e-4, atol=2e-5)


def test_an_addition_at_several_layers_equals_torch_hooks(model, hf, batch, direction):
    tokens, mask = batch
    with hooked(hf, direction, add_at=0, scale=0.5), hooked(hf, direction, add_at=2, scale=0.5):
        theirs = tiny.hf_forward(hf, tokens, mask).logits.numpy()[:, -1]
    edits = Edits.concat([Edits.add(direction, [0, 2], 0.5), Edits.add(direction, 1)]).take([0] * len(tokens))
    np.testing.assert_allclose(np.asarray(model.logits(tokens, mask, edits)), theirs, rtol=1e-4, atol=1e-4)


def test_affine_edits_equal_torch_hooks(model, hf, batch, direction):
    """At the input of a block, and nowhere else, every token gets one coordinate, whatever it had; rows have their own."""
    tokens, mask = batch
    unit = torch.tensor(direction / np.linalg.norm(direction), dtype=torch.float32)
    targets = np.array([2.5, -1.0, 0.0])

    def hook(module, args):
        x = args[0]
        along = torch.tensor(targets, dtype=torch.float32)[:, None, None] - (x @ unit)[..., None]
        return (x + along * unit, *args[1:])

    handle = hf.model.layers[1].register_forward_pre_hook(hook)
    try:
        theirs = tiny.hf_forward(hf, tokens, mask).logits.numpy()[:, -1]
    finally:
        handle.remove()
    edits = Edits.affine(np.stack([direction] * 3), targets, 1, 3)
    np.testing.assert_allclose(np.asarray(model.logits(tokens, mask, edits)), theirs, rtol=1e-4, atol=1e-4)
    tapped = model.taps(tokens, mask, Taps(("resid_pre",)), edits)["resid_pre"]
    along = np.asarray(tapped)[1] @ (direction / np.linalg.norm(direction))
    np.testing.assert_allclose(along, np.broadcast_to(targets[:, None], along.shape), atol=1e-4)
    alone = Edits.affine(direction, -1.0, 1, 3)
    np.testing.assert_array_equal(alone.take([0]).add_rd, edits.take([1]).add_rd)


@pytest.mark.parametrize("own,tokenwise", [(True, False), (False, True), (True, True)])
def test_directions_of_layers_and_gates_of_tokens_equal_torch_hooks(own, tokenwise, model, hf, batch, direction):
    tokens, mask = batch
    rng, (rows, length) = np.random.default_rng(5), tokens.shape
    gates_rls = rng.integers(0, 2, (rows, 3, len(SITES))).astype(np.float32)
    token_gates = rng.integers(0, 2, (rows, 3, len(SITES), length)).astype(np.float32)
    units_ld = rng.normal(size=(3, len(direction))) if own else np.tile(direction, (3, 1))
    units_ld = units_ld / np.linalg.norm(units_ld, axis=1, keepdims=True)
    edits = dataclasses.replace(
        Edits.ablate(direction),
        gate_rls=gates_rls if not tokenwise else np.ones_like(gates_rls),
        layer_ablate_rljd=units_ld[None, :, None].astype(np.float32) if own else None,
        token_gate_rlst=token_gates if tokenwise else None,
    )
    edits = edits.for_batch(rows, 3, len(direction))
    gates = token_gates if tokenwise else np.broadcast_to(gates_rls[..., None], token_gates.shape)
    with oracle.hooked(oracle.gated_ablation(hf.model.layers, units_ld, np.moveaxis(gates, 0, 2))):
        theirs = tiny.hf_forward(hf, tokens, mask).logits.numpy()[mask]
    ours = np.asarray(model.logits(tokens, mask, edits, positions="all"))[mask]
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_gates_of_tokens_belong_to_one_batch(model, batch, direction):
    tokens, mask = batch
    drawn = np.ones((len(tokens), 3, len(SITES), tokens.shape[1] + 1), np.float32)
    edits = dataclasses.replace(Edits.ablate(direction), token_gate_rlst=drawn)
    with pytest.raises(
        ValueError, match="the edit has gates for rows and tokens .3, 16., the batch has .3, 15.: gates of each"
    ):
        model.logits(tokens, mask, dataclasses.replace(edits, gate_rls=np.repeat(edits.gate_rls, 3, 0)))
    with pytest.raises(
        ValueError, match="directions of each layer or gates of each token cannot be joined with others"
    ):
        Edits.concat([Edits.ablate(direction), edits])
    assert edits.take([0]).at_layer(1).token_gate_rlst.shape == (1, 1, len(SITES), 16)


def test_edits_at_one_layer():
    edits = Edits.ablate(np.ones(4), layers=[1], n_layers=3).adding(Edits.add(np.ones(4), 2))
    gates = [edits.at_layer(layer).gate_rls.any() for layer in range(3)]
    layers = [edits.at_layer(layer).layer_ra.tolist() for layer in range(3)]
    assert gates == [False, True, False] and layers == [[[-1]], [[-1]], [[0]]]


def test_zero_direction_changes_no_bit(model, batch):
    tokens, mask = batch
    zero = np.zeros(model.config.d_model)
    plain = np.asarray(model.logits(tokens, mask))
    for edits in (Edits.ablate(zero), Edits.add(zero, 1), Edits.none(len(zero), len(tokens))):
        np.testing.assert_array_equal(np.asarray(model.logits(tokens, mask, edits)), plain)


def test_no_layers_is_no_edit(model, batch, direction):
    tokens, mask = batch
    edits = Edits.ablate(direction, layers=[], n_layers=3)
    np.testing.assert_array_equal(np.asarray(model.logits(tokens, mask, edits)), np.asarray(model.logits(tokens, mask)))


def test_one_compile_serves_all_edits(model, direction):
    tokens, mask = tiny.left_padded((6, 6), model.config.vocab_size)
    compiles = []

    def count(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiles.append(event)

    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        model.logits(tokens, mask)
        assert compiles  # the listener works: a new shape compiles
        before = predict._cache_size()
        compiles.clear()
        for edits in (
            Edits.ablate(direction),
            Edits.ablate(direction, layers=[1], n_layers=3),
            Edits.ablate(np.stack([direction, -direction]), sites=["mlp_out"]),
            Edits.add(direction, 2),
            Edits.concat([Edits.none(len(direction)), Edits.add(direction, 0)]),
        ):
            model.logits(tokens, mask, edits)
        assert not compiles and predict._cache_size() == before
    finally:
        jax.monitoring.unregister_event_duration_listener(count)


def test_edits_hold_for_generated_tokens(model, hf, direction):
    steps, never, pad = 6, 10**6, model.chat.pad_id
    tokens, mask = tiny.left_padded((9, 5), model.config.vocab_size, seed=9)
    free = dataclasses.replace(model, chat=dataclasses.replace(model.chat, eos_ids=(never,)))
    plain = np.asarray(free.generate_ids(TokenBatch(tokens, mask), steps))
    for edits, hooks in (
        (Edits.ablate(direction), {"ablate": every(range(3))}),
        (Edits.add(direction, 1), {"add_at": 1}),
    ):
        ours = np.asarray(free.generate_ids(TokenBatch(tokens, mask), steps, edits))
        with hooked(hf, direction, **hooks):
            theirs = hf.generate(
                torch.tensor(tokens, dtype=torch.long),
                attention_mask=torch.tensor(mask, dtype=torch.long),
                max_new_tokens=steps,
                do_sample=False,
                eos_token_id=never,
                pad_token_id=pad,
            )
        np.testing.assert_array_equal(ours, theirs.numpy()[:, tokens.shape[1] :])
        assert (ours != plain).any()


def test_ablation_in_bfloat16_projects_in_float32(direction):
    x = np.random.default_rng(3).normal(size=(2, 5, len(direction))).astype(jax.numpy.bfloat16)
    edits = jax.tree.map(jax.numpy.asarray, Edits.ablate(direction).for_batch(2, 1, len(direction)))
    out = edits.ablated(jax.numpy.asarray(x), jax.numpy.ones(2))
    unit = direction / np.linalg.norm(direction)
    exact = x.astype(np.float64) - (x.astype(np.float64) @ unit)[..., None] * unit
    assert out.dtype == jax.numpy.bfloat16
    np.testing.assert_allclose(np.asarray(out, np.float64), exact, rtol=2**-8, atol=1e-6)  # one rounding, no more


BAD_CALLS = {
    "rank": (
        lambda: Edits.ablate(np.zeros((1, 2, 3, 4))),
        r"must have shape .* directions, d_model\], this one has \(1, 2, 3, 4\)",
    ),
    "empty": (lambda: Edits.add(np.zeros(0), 1), r"must have shape .* this one has \(0,\)"),
    "nan": (lambda: Edits.ablate([1.0, np.nan, np.inf]), "holds 2 values that are NaN or infinite"),
    "site": (
        lambda: Edits.ablate(np.ones(4), sites=["resid_post", "attn_out"]),
        r"unknown sites \['resid_post'\]; the sites are",
    ),
    "no-n-layers": (lambda: Edits.ablate(np.ones(4), layers=[1]), "layers= needs n_layers="),
    "layer-too-high": (
        lambda: Edits.ablate(np.ones(4), layers=[3], n_layers=3),
        "layer 3 is out of range; layers count from 0 to 2",
    ),
    "layer-negative": (lambda: Edits.add(np.ones(4), -1), "layer -1 is out of range; layers count from 0$"),
    "width": (lambda: Edits.none(4).for_batch(2, 3, 5), "has 4 entries, the model's residual stream has 5"),
    "rows": (lambda: Edits.none(4, rows=3).for_batch(2, 3, 4), "the edit has 3 rows, the batch has 2"),
    "gates": (
        lambda: Edits.ablate(np.ones(4), layers=[1], n_layers=2).for_batch(1, 3, 4),
        "has gates for 2 layers, the model has 3",
    ),
    "affine-zero": (lambda: Edits.affine(np.zeros(4), 1.0, 0, 3), "needs a direction that is not zero and a target"),
    "affine-nan": (lambda: Edits.affine(np.ones(4), np.nan, 0, 3), "and a target that is a finite number"),
    "affine-above": (lambda: Edits.affine(np.ones(4), 1.0, 3, 3), "layer 3 is out of range; layers count from 0 to 2"),
    "add-above": (
        lambda: Edits.add(np.ones(4), 3).for_batch(1, 3, 4),
        "adds at layer 3, the model's layers are 0 to 2",
    ),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_edits(name):
    call, message = BAD_CALLS[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_bad_edits_are_refused_by_the_model(model, batch):
    with pytest.raises(ValueError, match="it belongs to another model"):
        model.logits(*batch, Edits.ablate(np.ones(5)))
    with pytest.raises(ValueError, match="pass one row, or one for each"):
        model.taps(*batch, Taps(("resid_pre",)), Edits.none(model.config.d_model, rows=2))
