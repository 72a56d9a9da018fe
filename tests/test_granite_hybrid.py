"""Granite 4 beyond what every family is tested for: other ways to say its configs, meshes, padding, biases of projections."""

import families
import jax
import numpy as np
import pytest
import torch
from real_models import REAL_MODELS
from safetensors.torch import load_file, save_file
from test_families import close, decoded
from tiny import edit_json, hf_forward, left_padded

from refusal_jax import Edits, UserError, make_mesh
from refusal_jax.checkpoints.load import load_decoder
from refusal_jax.checkpoints.tensor_files import SINGLE
from refusal_jax.models.hf_config import from_hf
from refusal_jax.models.predict import predict
from refusal_jax.taps import NO_TAPS

CONFIG = REAL_MODELS["granite-4.0-h-tiny"].config
LENGTHS = (3, 40, 17, 1, 30, 2, 9, 25)


def read(**changes):
    return from_hf({name: value for name, value in (CONFIG | changes).items() if value is not None})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint whose states live long and whose convolutions weigh much: whatever leaks into either shows."""
    folder = families.tiny_model(tmp_path_factory.mktemp("granite"), "granitemoehybrid", mamba_proj_bias=True)
    model = families.reference(folder)
    for name, weight in model.named_parameters():
        if name.endswith("A_log"):
            weight.data.fill_(-4)
        elif "conv1d.weight" in name:
            weight.data.mul_(5)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def batch(folder):
    """A decoder, left-padded rows, no edits, and the logits of the rows."""
    decoder = load_decoder(folder)
    tokens, mask = left_padded(LENGTHS, decoder.cfg.vocab_size)
    edits = Edits.none(decoder.cfg.d_model).for_batch(len(LENGTHS), decoder.cfg.n_layers, decoder.cfg.d_model)
    logits = predict(decoder, tokens, mask, edits, taps=NO_TAPS, last=False).logits
    return decoder, tokens, mask, edits, np.asarray(logits)


def test_a_row_does_not_depend_on_its_padding(folder, batch):
    """As transformers computes each row alone; padded, it lets biases of the projection into the windows of first tokens."""
    _, tokens, mask, _, logits = batch
    model = families.reference(folder)
    for row, length in enumerate(LENGTHS):
        alone = hf_forward(model, tokens[row : row + 1, -length:], mask[row : row + 1, -length:]).logits.numpy()
        close(logits[row, -length:], alone[0])


def test_decoding_with_padding_between(batch):
    """Rows that begin after the prefix have a past of nothing."""
    prefix, (decoder, tokens, mask, edits, logits) = 28, batch
    real = mask[:, prefix:]
    close(np.asarray(decoded(decoder, tokens, mask, edits, prefix))[real], logits[:, prefix:][real])


@pytest.mark.parametrize("sides", [(1, 1, 8), (2, 2, 2)], ids=str)
def test_meshes(folder, batch, sides):
    _, tokens, mask, edits, logits = batch
    decoder = load_decoder(folder, mesh=make_mesh(*sides))
    kinds = {name: decoder.apart.weight(name).sharding.spec for name in ("ssm_x", "ssm_b", "ssm_o")}
    assert kinds["ssm_x"][1] == kinds["ssm_o"][2] == ("kv", "q") and "kv" in kinds["ssm_b"][1]
    on_mesh = predict(decoder, tokens, mask, edits, taps=NO_TAPS, last=False).logits
    close(np.asarray(on_mesh)[..., : logits.shape[-1]][mask], logits[mask])
    steps = np.asarray(decoded(decoder, tokens, mask, edits, 32))[..., : logits.shape[-1]]
    close(steps[mask[:, 32:]], logits[:, 32:][mask[:, 32:]])
    jax.clear_caches()


def test_experts_in_fp8(tmp_path):
    """All experts of a layer in one tensor, with a scale for each row, as llm-compressor writes the published fp8 models."""
    folder = families.tiny_model(tmp_path, "granitemoehybrid", dtype="bfloat16")
    tensors, meant = load_file(folder / SINGLE), {}
    for name in [name for name in tensors if name.endswith(("_linear.weight", "in_proj.weight", "out_proj.weight"))]:
        weight = tensors[name].float()
        scale = (weight.abs().amax(-1, keepdim=True) / 448).bfloat16()
        tensors[name] = (weight / scale.float()).clamp(-448, 448).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale"], meant[name] = (
            scale,
            (tensors[name].float() * scale.float()).numpy(),
        )
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    scheme = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False}
    groups = {"group_0": {"targets": ["Linear"], "weights": scheme, "input_activations": None}}
    edit_json(
        folder / "config.json",
        quantization_config={
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            "config_groups": groups,
        },
    )
    weights = {path: np.asarray(a, np.float32) for path, a in load_decoder(folder).weights().items()}
    prefix = "model.layers.2."
    np.testing.assert_array_equal(weights["blocks.down"][2], meant[f"{prefix}block_sparse_moe.output_linear.weight"])
    halves = np.split(meant[f"{prefix}block_sparse_moe.input_linear.weight"], 2, axis=1)
    for path, half in zip(("blocks.gate", "blocks.up"), halves, strict=True):
        np.testing.assert_array_equal(weights[path][2], half)
    np.testing.assert_array_equal(weights["blocks.ssm_o"][1], meant[f"{prefix}mamba.out_proj.weight"])


def test_other_ways_of_saying_it():
    """Names of layers and infinity as versions of transformers write them, and sizes that others give."""
    new = {"mamba": "linear_attention", "attention": "full_attention"}
    types = [new[kind] for kind in CONFIG["layer_types"]]
    limits = [0.0, {"__float__": "Infinity"}]
    assert read(layer_types=types) == read(layer_types=None, layers_block_type=types) == read()
    assert (
        read(time_step_limit=limits) == read(time_step_limit=[0, float("inf")]) == read(mamba_d_head="auto") == read()
    )
    assert read(position_embedding_type=None) == read() != read(position_embedding_type="rope")
    assert {kind.rope.kind for kind in read().kinds} == {"none"}
    assert read(layer_types=None).layer_mixers == (0,) * 40 and len(read(layer_types=None).mixers) == 1


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"layer_types": ["mamba"] * 3}, r"layer_types = .*, expected one of 'mamba', .* for each of 40 layers"),
        ({"layer_types": ["hyena"] * 40}, "layer_types = .* expected one of"),
        ({"layer_types": 3}, "layer_types = 3, expected one of"),
        ({"layers_block_type": ["mamba"] * 40}, "layer_types = .* and layers_block_type = .* disagree"),
        ({"position_embedding_type": "alibi"}, "position_embedding_type = 'alibi', expected 'rope', 'nope' or null"),
        ({"num_experts_per_tok": 65}, "num_experts_per_tok = 65, expected from 1 to the 64 experts"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok = 0, expected from 1 to the 64 experts"),
        (
            {"mamba_d_head": 63},
            "mamba_n_heads = 48 with mamba_d_head = 63 do not make up the 3072 entries inside the layer",
        ),
        ({"mamba_n_heads": 47, "mamba_d_head": "auto"}, "mamba_n_heads = 47 with mamba_d_head = 65 do not make up"),
        ({"mamba_d_head": "wide"}, "mamba_d_head = 'wide', expected a positive integer"),
        ({"mamba_n_groups": 5}, "mamba_n_heads = 48 is not a multiple of mamba_n_groups = 5"),
        *(
            ({"time_step_limit": limits}, "time_step_limit = .*, expected two numbers from 0 up, the smaller first")
            for limits in ([0.5, 0.1], [0.1], [-1.0, 1.0], ["0", 1.0], 3, [True, 1.0], [float("inf")] * 2, [{}, []])
        ),
        ({"normalization_function": "layernorm"}, "normalization_function = 'layernorm' is not supported"),
    ],
)
def test_problems(changes, message):
    with pytest.raises(UserError, match=message):
        read(**changes)
