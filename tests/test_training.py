"""Training: as PyTorch and peft do it, on any mesh the same, and gone on with bit for bit."""

import jax
import numpy as np
import peft
import pytest
import torch
from tiny import load_hf, tiny_llama
from transformers import get_cosine_schedule_with_warmup

from refusal_jax import load_model
from refusal_jax.chat.loss_rows import LossRow
from refusal_jax.checkpoints.lora import PREFIX
from refusal_jax.models.decoder import Decoder
from refusal_jax.training.lora import fresh_factors, scaled
from refusal_jax.training.objective import NextToken, cross_entropy
from refusal_jax.training.rows import Share
from refusal_jax.training.settings import TARGETS, TrainSettings
from refusal_jax.training.trainer import train

STEPS, LENGTH, ROWS = 10, 16, 8
MODULES = dict(zip(TARGETS, (f"self_attn.{n}_proj" for n in "qkvo"), strict=False)) | {
    name: f"mlp.{name}_proj" for name in TARGETS[4:]
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def model(folder):
    return load_model(folder)


def settings_of(**more) -> TrainSettings:
    common = {
        "steps": STEPS,
        "batch": 4,
        "rank": 4,
        "alpha": 6.0,
        "rate": 3e-3,
        "warmup": 3,
        "weight_decay": 0.1,
        "clip": 0.5,
    }
    return TrainSettings.of(common | more)


def next_token(model, settings) -> NextToken:
    """Rows of different lengths, of which some tokens count."""
    rng = np.random.default_rng(0)
    rows = [
        LossRow(rng.integers(0, model.config.vocab_size, n).tolist(), int(first))
        for n, first in zip(rng.integers(6, LENGTH + 1, ROWS), rng.integers(1, 5, ROWS), strict=True)
    ]
    return NextToken(Share.of(model.chat, rows, LENGTH, settings))


def theirs(folder, settings: TrainSettings, objective: NextToken, factors):
    """The same training in PyTorch: losses, norms of gradients, trained tensors by name, and the gradients of the first step."""
    model = load_hf(folder)
    if settings.method == "lora":
        more = {"layers_to_transform": list(settings.layers)} if settings.layers else {}
        names = [MODULES[target].rpartition(".")[2] for target in settings.targets]
        config = peft.LoraConfig(
            r=settings.rank, lora_alpha=settings.alpha, target_modules=names, use_rslora=settings.rslora, **more
        )
        model = peft.get_peft_model(model, config)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "lora_A" in name:
                    layer, module = int(name.split(".")[4]), ".".join(name.split(".")[5:7])
                    target = next(t for t, known in MODULES.items() if known == module)
                    weight.copy_(torch.tensor(np.asarray(factors[f"blocks.{target}_right"][layer])))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimiser = torch.optim.AdamW(
        trained.values(), settings.rate, (settings.beta1, settings.beta2), settings.epsilon, settings.weight_decay
    )
    schedule = get_cosine_schedule_with_warmup(optimiser, settings.warmup, settings.steps)
    losses, norms, first = [], [], {}
    for step in range(settings.steps):
        rows = objective.batch(step)
        tokens, attended = torch.tensor(rows.tokens_bt).long(), torch.tensor(rows.mask_bt).long()
        positions = (attended.cumsum(-1) - 1).clamp(min=0)
        logits = model(tokens, attention_mask=attended, position_ids=positions).logits
        nll = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")
        loss = (nll * torch.tensor(rows.weight_bt[:, 1:])).sum()
        optimiser.zero_grad()
        loss.backward()
        first = first or {name: p.grad.numpy().copy() for name, p in trained.items()}
        norms.append(float(torch.nn.utils.clip_grad_norm_(trained.values(), settings.clip)))
        losses.append(float(loss.detach()))
        optimiser.step()
        schedule.step()
    return losses, norms, {name: p.detach().numpy() for name, p in trained.items()}, first


def by_their_name(ours, layers):
    """Our factors as peft names them."""
    found = {}
    for path, array in ours.items():
        target, letter = path.removeprefix("blocks.").rsplit("_", 1)
        for layer in layers:
            name = (
                f"{PREFIX}model.layers.{layer}.{MODULES[target]}.lora_{'B' if letter == 'left' else 'A'}.default.weight"
            )
            found[name] = np.asarray(array[layer])
    return found


@pytest.mark.parametrize("more", [{}, {"targets": ("q", "o", "down"), "layers": (1, 2), "rslora": True}])
def test_lora_equals_peft(folder, model, more):
    settings = settings_of(**more)
    objective, fresh = next_token(model, settings), fresh_factors(model.config, settings, None)
    losses, norms, trained, first = theirs(folder, settings, objective, fresh)
    rows, weights = objective.batch(0), model.decoder.weights()

    def loss(factors):
        return cross_entropy(Decoder(model.config, weights | scaled(factors, settings.scale)), rows)

    layers = settings.layers or range(model.config.n_layers)
    found = train(model, objective, settings)
    for name, grad in by_their_name(jax.jit(jax.grad(loss))(fresh), layers).items():
        np.testing.assert_allclose(grad, first[name], atol=1e-5)
    np.testing.assert_allclose([row["loss"] for row in found.losses], losses, rtol=1e-5)
    np.testing.assert_allclose([row["gradient_norm"] for row in found.losses], norms, rtol=1e-4)
    ours = by_their_name(found.factors, layers)
    assert ours.keys() == trained.keys()
    for name, values in ours.items():
        np.testing.assert_allclose(values, trained[name], atol=1e-4, err_msg=name)
    without = sorted({*range(model.config.n_layers)} - {*layers})
    assert not any(np.asarray(array)[without].any() for array in found.factors.values())


def test_full_training_equals_pytorch(folder, model):
    settings = settings_of(method="full", rate=1e-3)
    objective = next_token(model, settings)
    losses, norms, trained, _ = theirs(folder, settings, objective, None)
    found = train(model, objective, settings)
    np.testing.assert_allclose([row["loss"] for row in found.losses], losses, rtol=1e-5)
    np.testing.assert_allclose([row["gradient_norm"] for row in found.losses], norms, rtol=1e-4)
    weights = found.decoder.weights()
    for layer in range(model.config.n_layers):
        for target, module in MODULES.items():
            want = trained[f"model.layers.{layer}.{module}.weight"]
            np.testing.assert_allclose(weights[f"blocks.{target}"][layer], want, atol=1e-4)
    np.testing.assert_allclose(weights["embed"], trained["model.embed_tokens.weight"], atol=1e-4)
    np.testing.assert_allclose(weights["final_norm"], trained["model.norm.weight"], atol=1e-4)
