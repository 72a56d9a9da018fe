"""Recipes that ablate refusal directions while they train: against PyTorch hooks with the same draws, and on eight devices."""

import dataclasses

import jax
import numpy as np
import oracle
import pytest
import tiny
import torch

from refusal_jax import UserError
from refusal_jax.chat.model import load_model
from refusal_jax.defence.adversarial_settings import DeepRefusalSettings, RefatSettings
from refusal_jax.defence.deep_refusal import TokenAblation
from refusal_jax.defence.draws import ablated_rows, ablated_tokens, gates
from refusal_jax.defence.refat import FeatureAblation, feature_directions
from refusal_jax.defence.two_kinds import TwoKinds
from refusal_jax.edits import SITES
from refusal_jax.models.decoder import Decoder
from refusal_jax.models.sharding import make_mesh
from refusal_jax.training.rows import Share, TrainRows
from refusal_jax.training.settings import TrainSettings
from refusal_jax.training.trainer import train

PROMPTS = (
    tuple(f"How do I rob the {thing}?" for thing in ("van", "bus", "tram", "boat")),
    ("Bake bread.", "Wash it.", "Sew."),
)
MATRICES = {
    "q": "self_attn.q_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}


def share(vocab: int, seed: int, lengths, size: int) -> Share:
    """Random rows whose last tokens are learnt."""
    tokens, mask = tiny.left_padded(lengths, vocab, seed)
    learnt = (np.arange(tokens.shape[1]) >= tokens.shape[1] - 3)[None] & mask
    return Share(TrainRows(tokens, mask, learnt.astype(np.float32)).balanced(), size, seed)


def two_kinds(vocab: int, weights=(0.2, 0.8), size: int = 3) -> TwoKinds:
    return TwoKinds(share(vocab, 1, (9, 12, 7, 12), size), share(vocab, 2, (12, 8, 11), size), *weights)


def objectives(model) -> dict:
    """Both objectives, with what each is given besides a batch."""
    rng, cfg = np.random.default_rng(3), model.config
    units = rng.normal(size=(cfg.n_layers, cfg.d_model))
    units = (units / np.linalg.norm(units, axis=1, keepdims=True)).astype(np.float32)
    settings = RefatSettings.of({"spared": 0.34, "sites": ("resid_pre", "mlp_out")})
    return {
        "refat": (FeatureAblation(two_kinds(cfg.vocab_size, (1.0, 1.5)), *PROMPTS, settings, 0), {"units_ld": units}),
        "deep": (
            TokenAblation(two_kinds(cfg.vocab_size), units[:1], DeepRefusalSettings(), 1),
            {"basis_jd": units[:1]},
        ),
    }


def drawn(name: str, key, objective, extra, batch, layers: int) -> tuple[np.ndarray, np.ndarray]:
    """The directions of each layer and the gates of each layer, site, row and token that a step draws."""
    rows, tokens = batch.rows.tokens_bt.shape
    if name == "refat":
        gate_ls = gates(layers, 1, objective.settings.sites)
        edits = ablated_rows(key, extra["units_ld"], gate_ls, batch.harmful_b, objective.settings.probability)
        gate_rlst = np.broadcast_to(np.asarray(edits.gate_rls)[..., None], (rows, layers, 3, tokens))
        return extra["units_ld"], np.moveaxis(gate_rlst, 0, 2)
    edits = ablated_tokens(key, extra["basis_jd"], gates(layers, 0), rows, tokens, 0.5, 0.5)
    return np.repeat(extra["basis_jd"], layers, 0), np.moveaxis(
        np.asarray(edits.gate_rls[..., None] * edits.token_gate_rlst), 0, 2
    )


@pytest.mark.parametrize("name", ["refat", "deep"])
def test_loss_and_gradients_equal_torch_with_hooks(name, model, llama):
    objective, extra = objectives(model)[name]
    cfg, key, batch = model.config, jax.random.key(5), objective.batch(2)

    def loss(weights, remat):
        return objective.loss(Decoder(cfg, weights, remat=remat), None, batch, extra, key)

    both = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)
    (ours, parts), grads = both(model.decoder.weights(), False)
    directions_ld, gates_lsbt = drawn(name, key, objective, extra, batch, cfg.n_layers)
    assert 0 < gates_lsbt.mean() < 1
    hf, rows = tiny.load_hf(llama), batch.rows
    hf.requires_grad_(True)
    with oracle.hooked(oracle.gated_ablation(hf.model.layers, directions_ld, gates_lsbt)):
        attended = torch.tensor(rows.mask_bt, dtype=torch.long)
        positions = (attended.cumsum(-1) - 1).clamp(min=0)
        tokens = torch.tensor(rows.tokens_bt, dtype=torch.long)
        logits = hf(input_ids=tokens, attention_mask=attended, position_ids=positions).logits
    nll = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")
    weighted = nll * torch.tensor(rows.weight_bt)[:, 1:]
    weighted.sum().backward()
    np.testing.assert_allclose(float(ours), weighted.sum().item(), rtol=1e-5)
    harmful, kinds = torch.tensor(batch.harmful_b), objective.kinds
    refusals = weighted[harmful].sum().item() / kinds.refusal_weight
    np.testing.assert_allclose(float(parts["refusals"]), refusals, rtol=1e-5)
    total = kinds.refusal_weight * parts["refusals"] + kinds.answer_weight * parts["answers"]
    np.testing.assert_allclose(float(total), float(ours), rtol=1e-5)
    for ours_name, theirs in MATRICES.items():
        for layer, block in enumerate(hf.model.layers):
            wanted = block.get_submodule(theirs).weight.grad.numpy()
            np.testing.assert_allclose(
                grads[f"blocks.{ours_name}"][layer], wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max()
            )
    np.testing.assert_allclose(grads["embed"], hf.model.embed_tokens.weight.grad.numpy(), rtol=1e-4, atol=1e-5)
    if name == "deep":  # a gradient that computes blocks anew sees the same draws
        _, recomputed = both(model.decoder.weights(), True)
        for path, grad in grads.items():
            np.testing.assert_allclose(recomputed[path], grad, rtol=1e-4, atol=1e-6)


def test_draws_have_their_probabilities_and_spare_what_they_must():
    key, harmful = jax.random.key(1), np.arange(400) % 2 == 0
    gate_ls = gates(4, 1, ("resid_pre", "mlp_out"))
    np.testing.assert_array_equal(gate_ls, [[0, 0, 0], [1, 0, 1], [1, 0, 1], [1, 0, 1]])
    edits = ablated_rows(key, np.eye(4, 8, dtype=np.float32), gate_ls, harmful, 0.3)
    gate_rls = np.asarray(edits.gate_rls)
    assert not gate_rls[~harmful].any() and 0.22 < gate_rls[harmful][:, 1, 0].mean() < 0.38
    np.testing.assert_array_equal(gate_rls[:, 2], gate_rls[:, 1, :1] * np.array([1, 0, 1]))
    tokens = ablated_tokens(key, np.eye(1, 8, dtype=np.float32), gates(4, 0), 100, 30, 0.5, 0.2)
    assert 0.45 < np.asarray(tokens.gate_rls).mean() < 0.55 and 0.18 < np.asarray(tokens.token_gate_rlst).mean() < 0.22
    other = ablated_tokens(jax.random.key(2), np.eye(1, 8, dtype=np.float32), gates(4, 0), 100, 30, 0.5, 0.2)
    assert (np.asarray(other.gate_rls) != np.asarray(tokens.gate_rls)).any()
    assert tokens.token_gate_rlst.shape == (100, 4, len(SITES), 30)


def test_feature_directions_are_differences_of_means(model, hf):
    found = feature_directions(model, *PROMPTS)
    means = []
    for prompts in PROMPTS:
        states = []
        for prompt in prompts:
            ids = torch.tensor([model.chat.prompt_ids(prompt)])
            with torch.no_grad():
                states.append([h[0, -1].double().numpy() for h in hf(ids, output_hidden_states=True).hidden_states])
        means.append(np.mean(states, axis=0)[: model.config.n_layers])
    wanted = means[0] - means[1]
    assert not found[0].any()  # the template's last token is the same after every prompt
    units = wanted[1:] / np.linalg.norm(wanted[1:], axis=1, keepdims=True)
    np.testing.assert_allclose(found[1:], units, rtol=1e-4, atol=1e-5)


def test_eight_devices_equal_one(model, llama):
    settings = TrainSettings.of({"steps": 2, "rank": 2, "batch": 4, "warmup": 0, "rate": 1e-3, "every": 0})
    eight = load_model(llama, mesh=make_mesh(2, 2, 2))
    kinds = two_kinds(model.config.vocab_size, (1.0, 1.0), 4)
    objective = FeatureAblation(kinds, *PROMPTS, RefatSettings.of({"every": 1}), 0)
    one, other = (train(here, objective, settings) for here in (model, eight))
    for mine, theirs in zip(one.losses, other.losses, strict=True):
        for part, value in mine.items():
            np.testing.assert_allclose(theirs[part], value, rtol=1e-4, err_msg=part)
    for path, factor in one.factors.items():
        np.testing.assert_allclose(
            np.asarray(other.factors[path]), np.asarray(factor), rtol=1e-3, atol=2e-5, err_msg=path
        )
    deep, extra = objectives(model)["deep"]
    batch, loss = dataclasses.replace(deep, kinds=kinds).batch(0), jax.jit(deep.loss)
    values = [float(loss(here.decoder, None, batch, extra, jax.random.key(4))[0]) for here in (model, eight)]
    np.testing.assert_allclose(values[1], values[0], rtol=1e-5)


def test_bad_settings():
    for values, message in (
        ({"probability": 1.5}, "probability = 1.5, expected a number from 0 to 1"),
        ({"every": 0}, "every = 0, expected 1 or more"),
        ({"spared": 1.0}, "spared = 1 spares all blocks: nothing would be ablated"),
        ({"sites": ("resid_per",)}, "sites names 'resid_per', expected some of resid_pre"),
        ({"sites": ()}, "sites is empty: nothing would be ablated. Name some of resid_pre"),
        ({"answer_weight": 0.0}, "answer_weight = 0.0, expected a number above 0"),
    ):
        with pytest.raises(UserError, match=message):
            RefatSettings.of(values).check()
    with pytest.raises(UserError, match="least_given = 9 and .*most_given = 8: a given beginning has 1 token or more"):
        DeepRefusalSettings.of({"least_given": 9, "most_given": 8}).check()
    RefatSettings().check()
    DeepRefusalSettings().check()
    assert dataclasses.asdict(DeepRefusalSettings())["refusal_weight"] == 0.2
