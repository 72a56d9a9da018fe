"""PEFT adapters read on their base: the merged weights and logits are those of PEFT."""

import json
import pathlib
import shutil

import jax.numpy as jnp
import numpy as np
import peft
import pytest
import tiny
import torch
from safetensors.numpy import load_file, save_file

from refusal_jax import UserError, load_model
from refusal_jax.audit.weights import StoredWeights
from refusal_jax.checkpoints.adapters import adapter_mirror, adapter_parts, is_adapter, named_base
from refusal_jax.checkpoints.fingerprint import checkpoint_fingerprint
from refusal_jax.checkpoints.lora import read_changes
from refusal_jax.models.hf_config import load_config

LINEAR = ["q_proj", "v_proj", "o_proj", "down_proj"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.tiny_llama(tmp_path_factory.mktemp("base"), layers=2, attention_bias=True)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def save_adapter(base, folder, **config):
    """Makes a random adapter with PEFT, saves it, and returns the folder and the merged model's weights by HF name."""
    torch.manual_seed(3)
    model = peft.get_peft_model(tiny.load_hf(base), peft.LoraConfig(**({"r": 4, "target_modules": LINEAR} | config)))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name or weight.requires_grad:
                weight.copy_(weight * 0 + 0.2 * torch.randn(weight.shape))
    model.save_pretrained(folder)
    merged = model.merge_and_unload()
    return pathlib.Path(folder), merged


def check(base, adapter, merged):
    """Compares all weights and the logits of the adapter's mirror with the merged model's."""
    mirror = adapter_mirror(adapter, pathlib.Path(base))
    weights = StoredWeights.open(mirror)
    state = {name: value.detach().numpy() for name, value in merged.state_dict().items()}
    for name in weights.files.tensors:
        np.testing.assert_allclose(weights.rows(name), state[name], atol=2e-6, err_msg=name)
        np.testing.assert_array_equal(weights.rows(name, 1, 3), weights.rows(name)[1:3], err_msg=name)
    tokens, mask = tiny.left_padded([5, 9], 200)
    model = load_model(mirror)
    with torch.no_grad():
        expected = merged(torch.tensor(tokens), attention_mask=torch.tensor(mask).long()).logits[:, -1].numpy()
    np.testing.assert_allclose(model.logits(jnp.asarray(tokens), jnp.asarray(mask)), expected, atol=2e-4)
    return mirror


CASES = {
    "rslora, patterns": {
        "use_rslora": True,
        "lora_alpha": 3,
        "rank_pattern": {"o_proj": 2},
        "alpha_pattern": {"layers.1.self_attn.q_proj": 7},
    },
    "biases": {"bias": "all", "fan_in_fan_out": True},
    "bias of B": {"lora_bias": True, "target_modules": ["q_proj", "o_proj"]},
    "embedding": {"target_modules": ["embed_tokens", "o_proj"]},
    "modules to save": {"modules_to_save": ["lm_head", "norm"]},
}


@pytest.mark.parametrize("name", CASES)
def test_adapters_are_read_as_peft_merges_them(name, base, tmp_path):
    adapter, merged = save_adapter(base, tmp_path / "adapter", **CASES[name])
    mirror = check(base, adapter, merged)
    assert is_adapter(adapter) and not is_adapter(mirror)
    assert adapter_parts(mirror) == (adapter, pathlib.Path(base))
    assert named_base(adapter) == str(base)


def test_a_tied_embedding_is_untied_by_an_adapter_of_one_use(tmp_path):
    base = tiny.tiny_llama(tmp_path / "tied", layers=1, tied=True)
    adapter, _ = save_adapter(base, tmp_path / "adapter", target_modules=["embed_tokens"], r=2)
    mirror = adapter_mirror(adapter, base)
    assert not load_config(mirror).tied_embeddings
    weights, before = StoredWeights.open(mirror), StoredWeights.open(base)
    np.testing.assert_array_equal(weights.rows("lm_head.weight"), before.rows("model.embed_tokens.weight"))
    changes = read_changes(adapter, load_config(base))
    expected = changes["model.embed_tokens.weight"].applied(before.rows("model.embed_tokens.weight"), ())
    np.testing.assert_allclose(weights.rows("model.embed_tokens.weight"), expected)


def test_a_resized_vocabulary_is_read(base, tmp_path):
    adapter, _ = save_adapter(base, tmp_path / "adapter")
    rows = load_config(base).vocab_size + 5
    tensors = load_file(adapter / "adapter_model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[f"base_model.model.{name}"] = np.ones((rows, 32), np.float32)
    save_file(tensors, adapter / "adapter_model.safetensors")
    mirror = adapter_mirror(adapter, pathlib.Path(base))
    assert load_config(mirror).vocab_size == rows
    assert StoredWeights.open(mirror).rows("lm_head.weight").shape == (rows, 32)


def test_the_fingerprint_tells_adapters_and_bases_apart(base, tmp_path):
    adapter, _ = save_adapter(base, tmp_path / "adapter")
    first = checkpoint_fingerprint(adapter_mirror(adapter, pathlib.Path(base)))
    other = tiny.tiny_llama(tmp_path / "other", layers=2, attention_bias=True, seed=5)
    assert checkpoint_fingerprint(adapter_mirror(adapter, other)) != first
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file({name: 2 * value for name, value in tensors.items()}, adapter / "adapter_model.safetensors")
    assert checkpoint_fingerprint(adapter_mirror(adapter, pathlib.Path(base))) != first


def edit_config(adapter, **new):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | new))


@pytest.mark.parametrize(
    ("new", "message"),
    [
        ({"use_dora": True}, "with DoRA; only plain LoRA"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4, which begins with a change of the base's own weights"),
        ({"peft_type": "IA3"}, "of the kind 'IA3'; only plain LoRA"),
        ({"alpha_pattern": {".*(a|b)+$": 2}}, "a regular expression; only names of modules"),
        ({"lora_alpha": "much"}, "lora_alpha 'much', expected numbers above zero"),
    ],
)
def test_adapters_that_are_more_than_low_rank_are_refused(new, message, base, tmp_path):
    adapter, _ = save_adapter(base, tmp_path / "adapter")
    edit_config(adapter, **new)
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        adapter_mirror(adapter, pathlib.Path(base))


def test_adapters_of_another_base_are_refused(base, tmp_path):
    adapter, _ = save_adapter(base, tmp_path / "adapter")
    wide = tiny.tiny_llama(tmp_path / "wide", layers=2, d_model=16, attention_bias=True)
    with pytest.raises(UserError, match=r"does not fit its base: .* is \[.*\] there and \[.*\] in the adapter"):
        adapter_mirror(adapter, wide)
    short = tiny.tiny_llama(tmp_path / "short", layers=1, attention_bias=True)
    with pytest.raises(
        UserError,
        match="does not belong to its base: .* tensors are not known there, and PEFT leaves such out: base_model.*layers.1",
    ):
        adapter_mirror(adapter, short)
    with pytest.raises(UserError, match="does not belong to its base: it changes nothing"):
        save_file({}, adapter / "adapter_model.safetensors")
        adapter_mirror(adapter, pathlib.Path(base))
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    save_file({name: np.ones((2, 32), np.float32)}, adapter / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"holds no pair of factors for .*q_proj: \{'A': \[2, 32\]\}"):
        adapter_mirror(adapter, pathlib.Path(base))
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(UserError, match="holds its adapter as adapter_model.bin, a pickle"):
        adapter_mirror(adapter, pathlib.Path(base))


def test_an_adapter_without_its_base_asks_for_it(base, tmp_path):
    adapter, _ = save_adapter(base, tmp_path / "adapter")
    edit_config(adapter, base_model_name_or_path="someone/their-model")
    with pytest.raises(UserError, match="a PEFT adapter of 'someone/their-model', which is not on this machine"):
        named_base(adapter)
    edit_config(adapter, base_model_name_or_path=None)
    with pytest.raises(UserError, match="a base model that it does not name"):
        named_base(adapter)


def test_a_damaged_stub_is_named(base, tmp_path):
    adapter, _ = save_adapter(base, tmp_path / "adapter")
    mirror = adapter_mirror(adapter, pathlib.Path(base))
    (mirror / ".adapter.json").write_text('{"adapter": 3}')
    with pytest.raises(UserError, match="names no folders"):
        adapter_parts(mirror)
    copy = tmp_path / "copy"
    shutil.copytree(mirror, copy)
    assert adapter_parts(copy) is None  # a stub in a download names nothing


def test_names_that_peft_would_not_apply_are_no_adapter_of_the_base(base, tmp_path):
    """As in huggingface/peft#1579: an adapter of the model without its head lacks a prefix, and PEFT would leave it out."""
    adapter, _ = save_adapter(base, tmp_path / "adapter")
    tensors = load_file(adapter / "adapter_model.safetensors")
    short = {name.replace("base_model.model.model.", "base_model.model."): value for name, value in tensors.items()}
    save_file(short, adapter / "adapter_model.safetensors")
    with pytest.raises(UserError, match="PEFT leaves such out: base_model.model.layers.0"):
        adapter_mirror(adapter, pathlib.Path(base))


def test_an_adapter_on_a_tied_base_with_another_vocabulary(tmp_path):
    """As in huggingface/peft#2415 and autotrain-advanced#790: both embeddings are stored, with fewer rows than the base's."""
    base = tiny.tiny_llama(tmp_path / "tied", layers=1, tied=True)
    adapter, _ = save_adapter(base, tmp_path / "adapter")
    tensors = load_file(adapter / "adapter_model.safetensors")
    for name, value in (("model.embed_tokens.weight", 1), ("lm_head.modules_to_save.default.weight", 2)):
        tensors[f"base_model.model.{name}"] = np.full((300, 32), value, np.float32)
    save_file(tensors, adapter / "adapter_model.safetensors")
    weights = StoredWeights.open(adapter_mirror(adapter, base))
    assert not weights.cfg.tied_embeddings and weights.cfg.vocab_size == 300
    assert weights.rows("model.embed_tokens.weight").max() == 1 and weights.rows("lm_head.weight").min() == 2


def test_an_adapters_own_tokenizer_and_template_count(base, tmp_path):
    adapter, _ = save_adapter(base, tmp_path / "adapter")
    template = tiny.TEMPLATE.replace("assistant", "helper")
    config = json.loads((pathlib.Path(base) / "tokenizer_config.json").read_text())
    (adapter / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
    mirror = adapter_mirror(adapter, pathlib.Path(base))
    assert not (mirror / "chat_template.jinja").exists() and (mirror / "tokenizer.json").exists()
    tiny.tiny_tokenizer(adapter, template, extra=("<new>",))
    mirror = adapter_mirror(adapter, pathlib.Path(base))
    assert (mirror / "tokenizer.json").resolve() == adapter / "tokenizer.json"
    assert (mirror / "chat_template.jinja").resolve() == adapter / "chat_template.jinja"


def test_an_adapter_on_the_hub_is_a_candidate(hub, base, tmp_path, monkeypatch):
    from refusal_jax.audit.settings import AuditSettings
    from refusal_jax.audit.subject import Opened
    from refusal_jax.checkpoints.remote import checkpoint_folder

    adapter, merged = save_adapter(base, tmp_path / "adapter")
    hub.add("org/base", pathlib.Path(base))
    hub.add("org/adapter", adapter)
    settings = AuditSettings(candidate="org/adapter", base="org/base")
    opened = Opened("org/adapter", settings)
    name = "model.layers.0.self_attn.o_proj.weight"
    np.testing.assert_allclose(opened.weights.rows(name), merged.state_dict()[name].numpy(), atol=2e-6)
    with pytest.raises(UserError, match="is a PEFT adapter of"):
        checkpoint_folder("org/adapter")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert Opened("org/adapter", settings).folder == opened.folder
    edit_config(adapter, base_model_name_or_path="org/base")
    assert named_base(adapter) == "hf:org/base"
