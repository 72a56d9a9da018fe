"""Tensor names of other ages and wrappers: what transformers takes is taken, and exports keep the checkpoint's own names."""

import re
import shutil

import families
import numpy as np
import pytest
import tiny
from exports import exported, tensors_of
from safetensors.numpy import load_file, save_file

from refusal_jax import Edits
from refusal_jax.checkpoints.load import load_decoder
from refusal_jax.checkpoints.tensor_files import SINGLE
from refusal_jax.models.predict import predict
from refusal_jax.taps import NO_TAPS


def nested(name: str) -> str:
    """The name that transformers 5 has for a tensor of a multimodal model."""
    core = re.sub(r"^(model\.|language_model\.)+", "", name)
    first = core.partition(".")[0]
    return (
        name
        if first == "lm_head" and core == name
        else core
        if first == "lm_head"
        else f"model.{OUTER.get(first, '')}{core}"
    )


OUTER = dict.fromkeys(("layers", "embed_tokens", "norm"), "language_model.")


def flat(name: str) -> str:
    """The name that Qwen's first VL checkpoints have for it."""
    return re.sub(r"^model\.(language_model\.(?=[len])|(?=visual))", lambda m: "model." if m[1] else "", name)


def older(name: str) -> str:
    """The name that transformers 4 had for it in models made like Llava."""
    core = nested(name).removeprefix("model.")
    return (
        f"language_model.{core}"
        if core.startswith("lm_head")
        else core.replace("language_model.", "language_model.model.", 1)
    )


SCHEMES = {
    ("llama", "gqa", "without the head's wrapper"): lambda name: name.removeprefix("model."),
    ("llama", "tied", "wrapped"): lambda name: f"model.{name}",
    ("gemma3", "gqa", "5"): nested,
    ("mistral3", "gqa", "5"): nested,
    ("mistral3", "gqa", "4"): older,
    ("kimi_k25", "mha", "5"): nested,
    ("kimi_k25", "mha", "as saved"): lambda name: name.replace(
        "language_model.model.layers", "language_model.model.blocks"
    ),
    ("qwen2_5_vl", "gqa", "5"): nested,
    ("qwen2_vl", "mha", "5"): nested,
    ("qwen2_vl", "mha", "flat"): flat,
}


@pytest.mark.parametrize("case", SCHEMES, ids="-".join)
def test_names_that_transformers_takes(case, tmp_path):
    source = families.tiny_model(tmp_path / "source", *case[:2])
    folder = shutil.copytree(source, tmp_path / "renamed")
    tensors = load_file(source / SINGLE)
    renamed = {SCHEMES[case](name): tensor for name, tensor in tensors.items()}
    assert len(renamed) == len(tensors)
    save_file(renamed, folder / SINGLE, metadata={"format": "pt"})
    ours = load_decoder(folder)
    tokens, mask = tiny.left_padded((9, 4), ours.cfg.vocab_size)
    edits = Edits.none(ours.cfg.d_model).for_batch(2, ours.cfg.n_layers, ours.cfg.d_model)
    logits = np.asarray(predict(ours, tokens, mask, edits, taps=NO_TAPS, last=False).logits)
    theirs = tiny.hf_forward(families.reference(folder), tokens, mask).logits.numpy()
    np.testing.assert_allclose(logits[mask], theirs[mask], rtol=1e-4, atol=1e-4)
    exported(folder, tmp_path / "out", verify=False)
    written = tensors_of(tmp_path / "out")
    assert renamed.keys() <= written.keys() <= renamed.keys() | {"lm_head.weight"}
    edited = np.asarray(predict(load_decoder(tmp_path / "out"), tokens, mask, edits, taps=NO_TAPS, last=False).logits)
    theirs = tiny.hf_forward(families.reference(tmp_path / "out"), tokens, mask).logits.numpy()
    np.testing.assert_allclose(edited[mask], theirs[mask], rtol=1e-4, atol=1e-4)
    assert np.abs(edited - logits)[mask].max() > 0.05
