"""Training: as PyTorch and peft do it, on any mesh the same, and gone on with bit for bit."""

import contextlib
import dataclasses
import json
import pathlib

import jax
import numpy as np
import peft
import pytest
import torch
from families import hf_config
from several_training import next_token
from test_processes import Pair
from tiny import load_hf, tiny_llama
from transformers import get_cosine_schedule_with_warmup

from refusal_jax import UserError, load_model, make_mesh
from refusal_jax.checkpoints.lora import PREFIX
from refusal_jax.models.decoder import Decoder
from refusal_jax.models.hf_config import from_hf
from refusal_jax.training import objective as objectives
from refusal_jax.training.checkpoints import LOSSES, STATES
from refusal_jax.training.lora import fresh_factors, scaled
from refusal_jax.training.objective import NextToken, cross_entropy, divergence, outputs, token_kl, token_losses
from refusal_jax.training.rows import TrainRows, drawn
from refusal_jax.training.settings import TARGETS, TrainSettings
from refusal_jax.training.trainer import train

STEPS = 10
SEVERAL = pathlib.Path(__file__).parent / "several_training.py"
MODULES = dict(zip(TARGETS, (f"self_attn.{n}_proj" for n in "qkvo"), strict=False)) | {
    name: f"mlp.{name}_proj" for name in TARGETS[4:]
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("tiny") / "model", layers=3)


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


def test_lora_equals_peft(folder, model):
    settings = settings_of(layers=(1, 2), rslora=True)
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


def trained_on(folder, settings, mesh=None, dtype="float32", parts=None):
    """A short training on a mesh."""
    model = load_model(folder, dtype, mesh)
    return train(model, parts or next_token(model, settings), settings)


def test_a_mesh_of_eight_devices_and_parts_of_a_batch_change_nothing(folder):
    short = {"steps": 3, "warmup": 1}
    alone = trained_on(folder, settings_of(**short))
    several = trained_on(folder, settings_of(**short, accumulate=2), make_mesh(data=2, fsdp=2, model=2))
    np.testing.assert_allclose(
        [row["loss"] for row in several.losses], [row["loss"] for row in alone.losses], rtol=1e-5
    )
    want = alone.decoder.weights()
    for path, values in several.decoder.weights().items():
        np.testing.assert_allclose(np.asarray(values)[: len(want[path])], want[path], atol=2e-5, err_msg=path)
    assert several.factors["blocks.o_left"].sharding.spec[1] == "fsdp"
    assert several.factors["blocks.o_right"].sharding.spec[2] == ("kv", "q")


def test_bfloat16_weights_have_float32_factors_and_no_other_state(folder):
    found = trained_on(folder, settings_of(steps=2, warmup=1), dtype="bfloat16")
    assert {a.dtype for a in found.factors.values()} == {np.dtype("float32")}
    assert found.decoder.dtype == "bfloat16" and np.isfinite(found.losses[-1]["loss"])


@dataclasses.dataclass(frozen=True)
class Drawing:
    """Plain fine-tuning whose loss also has what is drawn by the key, what was refreshed, and the frozen decoder."""

    plain: NextToken
    stop: int = -1
    refresh: int = 2
    needs_frozen: bool = True

    def batch(self, step: int) -> TrainRows:
        if step == self.stop:
            raise InterruptedError
        return self.plain.batch(step)

    def refreshed(self, model, step: int) -> dict:
        return {"now": {"embed": np.float32(step) + np.asarray(model.decoder.weights()["blocks.o"])[0, 0]}}

    def loss(self, decoder, frozen, batch, extra, key):
        value = cross_entropy(decoder, batch)
        kl = divergence(decoder, frozen, batch)
        drawn = jax.random.normal(key, (2,)).sum() * decoder.blocks.weight("o").sum() + extra["now"]["embed"].sum()
        return value + kl + 1e-3 * drawn, {"cross_entropy": value, "kl": kl, "drawn": drawn}


@pytest.mark.parametrize("stop", [5])  # after a state and a refresh, and between them
def test_a_training_that_was_stopped_goes_on_bit_for_bit(folder, model, tmp_path, monkeypatch, stop):
    monkeypatch.setattr(
        "refusal_jax.checkpoints.copies.AT_A_TIME", 1
    )  # arrays are larger than that, as those of real models are
    settings = settings_of(steps=6, warmup=1, every=2, targets=("o",))
    plain = next_token(model, settings)
    whole = train(model, Drawing(plain), settings)
    with pytest.raises(InterruptedError):
        train(model, Drawing(plain, stop), settings, tmp_path, given={"data": "a"})
    (tmp_path / STATES / "9.orbax-checkpoint-tmp-1").mkdir()  # of a process that was killed while it wrote
    with open(tmp_path / LOSSES, "a") as file:
        file.write('{"step": 4, "lo')
    again = train(model, Drawing(plain), settings, tmp_path, given={"data": "a"})
    assert again.losses == whole.losses
    for path, values in whole.factors.items():
        np.testing.assert_array_equal(again.factors[path], values)
    assert [json.loads(line) for line in (tmp_path / LOSSES).read_text().splitlines()] == whole.losses
    assert sorted(p.name for p in (tmp_path / STATES).iterdir()) == ["4", "6"]
    done = train(model, Drawing(plain, 0), settings, tmp_path, given={"data": "a"})  # no batch is asked for
    assert done.losses == whole.losses
    for change, given in (({"rate": 0.5}, {"data": "a"}), ({}, {"data": "b"})):
        with pytest.raises(
            UserError, match=r"holds the state of another training: (train.rate was 0.003|data was 'a')"
        ):
            train(model, Drawing(plain), TrainSettings.of({**settings, **change}), tmp_path, given=given)


def test_two_processes_go_on_after_one_was_killed_and_equal_one(folder, model, tmp_path):
    def pair(kills: int) -> Pair:
        return Pair(lambda i, port: (SEVERAL, folder, tmp_path / "out", f"127.0.0.1:{port}", i, kills), tmp_path).wait()

    killed = pair(1)
    assert killed.codes[1] == -9 and (tmp_path / "out" / STATES / "2").is_dir(), killed.err
    whole = pair(-1)
    assert whole.codes == [0, 0], whole.err
    told = [out[out.index('{"losses"') :] for out in whole.out]  # after what Gloo says
    assert told[0] == told[1]
    found = json.loads(told[0])
    settings = settings_of(steps=4, rank=2, alpha=32.0, weight_decay=0.0, clip=1.0, warmup=1)
    alone = train(model, next_token(model, settings), settings)
    np.testing.assert_allclose([r["loss"] for r in found["losses"]], [r["loss"] for r in alone.losses], rtol=1e-5)
    for path, values in alone.factors.items():
        np.testing.assert_allclose(found["sums"][path], np.abs(values).sum(), rtol=1e-4)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": "dora"}, r"train.method names 'dora', expected one of lora, full"),
        ({"rank": 0}, r"train.rank = 0, expected 1 or more"),
        ({"rate": 0.0}, r"train.rate = 0.0, expected a number above 0"),
        ({"clip": -1.0}, r"train.clip = -1.0, expected 0 or a number above it"),
        ({"beta2": 1.0}, r"train.beta2 = 1.0, expected a number from 0 to below 1"),
        ({"batch": 6, "accumulate": 4}, r"train.batch = 6 cannot be cut into .*train.accumulate = 4 equal parts"),
        ({"steps": 5, "warmup": 5}, r"train.warmup = 5 steps leave none of .*train.steps = 5"),
        ({"steps": 1}, r"train.warmup = 10 steps leave none of .*train.steps = 1"),
        ({"targets": ()}, r"train.targets is empty"),
        ({"targets": ("qq",)}, r"train.targets names 'qq', expected one of q, k"),
        ({"layers": (9,)}, r"train.layers names block 9; the model's blocks are 0 to 2"),
    ],
)
def test_settings_that_cannot_be_say_why(model, given, message):
    with pytest.raises(UserError, match=message):
        TrainSettings.of(given).check(model.config)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"targets": ("up", "q"), "layers": (0,)}, ""),
        (
            {"targets": ("q", "o"), "layers": (0, 1)},
            r"train.layers names blocks that have none of q, o: .* the blocks 3, or",
        ),
        ({"targets": ("delta_o", "q"), "layers": (0,)}, ""),
        ({"targets": ("ssm_o",)}, r"train.targets names 'ssm_o', expected one of q, k, .*delta_o"),
    ],
)
def test_blocks_that_have_no_target_are_not_trained(given, message):
    cfg = from_hf(hf_config("qwen3_5_text"))  # the last of its four blocks has attention
    with pytest.raises(UserError, match=message) if message else contextlib.nullcontext():
        TrainSettings.of(given).check(cfg)


def test_models_that_have_no_target_are_not_trained(model):
    cfg = dataclasses.replace(model.config, mixers=(None,), layer_mixers=(0,) * model.config.n_layers)
    with pytest.raises(
        UserError, match=r"train.targets names q, o, of which this model's blocks have none. Name some of "
    ):
        TrainSettings(targets=("q", "o")).check(cfg)


def test_mixtures_of_experts_cannot_be_trained(model):
    """JAX has no gradient of a loop whose number of turns is known at run time only, as that over experts is."""
    cfg = dataclasses.replace(model.config, n_experts=4)
    for settings in (TrainSettings(targets=("q", "o")), TrainSettings(method="full")):
        with pytest.raises(UserError, match=r"is a mixture of experts, and the loop over its experts has no gradient"):
            settings.check(cfg)


def test_losses_that_are_not_finite_end_the_training(model):
    settings = settings_of(steps=2, warmup=0, rate=1e30, clip=0.0, targets=("o",))
    with pytest.raises(UserError, match=r"At step 2 the losses are .* not all finite. Lower .*train.rate"):
        train(model, next_token(model, settings), settings)


def test_rows_that_parts_do_not_divide_are_an_error(model):
    settings = settings_of(steps=1, warmup=0, accumulate=2)
    odd = dataclasses.replace(next_token(model, settings).rows, size=3)
    with pytest.raises(UserError, match=r"A batch has 3 rows of a kind, which .*train.accumulate = 2 equal parts"):
        train(model, NextToken(odd), settings)


def test_every_row_is_seen_before_any_is_seen_again():
    seen = np.concatenate([drawn(7, 3, (0, 1), step) for step in range(14)])
    assert all(sorted(seen[start : start + 7]) == list(range(7)) for start in range(0, 42, 7))
    assert (drawn(7, 3, (0, 1), 5) == seen[15:18]).all() and (drawn(7, 9, (0, 1), 1) == seen[9:18]).all()
    assert any((seen[:7] != seen[start : start + 7]).any() for start in (7, 14))


def test_losses_of_few_positions_at_a_time_are_those_of_all(model, monkeypatch):
    rows = next_token(model, settings_of()).batch(0)
    other = model.decoder.weights() | {"final_norm": 1.1 * model.decoder.final_norm[...]}
    decoder, frozen = model.decoder, Decoder(model.config, other)

    @jax.jit
    def values():
        x, base = (outputs(d, rows).resid_btd for d in (decoder, frozen))
        logits = decoder.logits(x), frozen.logits(base)
        return token_losses(decoder, x, rows.tokens_bt), token_kl(decoder, x, frozen, base), logits

    nll, kl, logits = values()
    monkeypatch.setattr(objectives, "LOGITS_AT_ONCE", 4 * model.config.vocab_size * 4)
    jax.clear_caches()
    for found, want in zip(values()[:2], (nll, kl), strict=True):
        np.testing.assert_allclose(found, want, atol=1e-5)
    ours, base = (torch.log_softmax(torch.tensor(np.asarray(one)), -1) for one in logits)
    np.testing.assert_allclose(kl[:, 1:], (base.exp() * (base - ours)).sum(-1)[:, :-1], atol=1e-4)


def test_blocks_that_do_not_learn_stay_as_they_are(model):
    settings = settings_of(method="full", layers=(1,), steps=1, warmup=0)
    trained = train(model, next_token(model, settings), settings)
    before, after = (d.weights() for d in (model.decoder, trained.decoder))
    assert trained.parameters == sum(a[1].size for path, a in after.items() if path.startswith("blocks."))
    for path, values in after.items():
        same = np.asarray(values == before[path])
        assert same.all() or (path.startswith("blocks.") and same[[0, 2]].all() and not same[1].all())
