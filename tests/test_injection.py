"""Rank-one safety injection: the exporters write W + a r m^T, m being the mean of W's rows, and nothing else."""

import dataclasses
import json

import families
import numpy as np
import pytest
import torch
from exports import DIRECTION, STUDY, UNIT, differences, tensors_of
from peft import PeftModel

from refusal_jax import UserError
from refusal_jax.conditions import Inject
from refusal_jax.directions import Direction
from refusal_jax.export.run import Request, export

SCALE = 0.7


def injected(source, target, form="hf", direction=DIRECTION, **edit) -> dict:
    """Exports an injection; what its export.json says."""
    return export(Request(source, target, Inject(Direction.of(direction), **{"scale": SCALE} | edit), STUDY, form))


def by_hand(name: str, before: np.ndarray) -> np.ndarray:
    """The paper's formula, of a matrix [D, in]."""
    if not name.endswith(("o_proj.weight", "down_proj.weight")):
        return before
    return before + SCALE * np.outer(UNIT, before.mean(axis=0))


def test_the_exporters_write_the_papers_formula(llama, tmp_path):
    report = injected(llama, tmp_path / "hf")
    before, after = tensors_of(llama), tensors_of(tmp_path / "hf")
    for name, tensor in before.items():
        np.testing.assert_allclose(after[name], by_hand(name, tensor), atol=1e-6)
    assert differences(llama, tmp_path / "hf") == set(report["edited_tensors"]) and len(report["edited_tensors"]) == 6
    assert report["edit"] == {"kind": "inject", "scale": SCALE, "layers": [0, 1, 2], "sites": ["attn_out", "mlp_out"]}
    assert report["verification"]["problems"] == [] and report["kinds"] == {"injection": 6}
    norm = np.linalg.norm(np.eye(32) + SCALE * np.outer(UNIT, np.full(32, 1 / 32)), 2)
    assert report["largest_amplification"] == pytest.approx(norm, rel=1e-5)
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "a = 0.7" in card and "2508.20766" in card and "edited as they are read" in card


def test_an_adapter_of_it_is_the_same_model_in_peft(llama, hf, tmp_path):
    injected(llama, tmp_path / "hf")
    report = injected(llama, tmp_path / "lora", "lora")
    assert report["verification"]["problems"] == []
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["r"] == 1
    ids = torch.arange(9)[None]
    with torch.no_grad():
        whole = families.reference(tmp_path / "hf")(ids).logits
        adapted = PeftModel.from_pretrained(families.reference(llama), tmp_path / "lora")(ids).logits
    torch.testing.assert_close(adapted, whole, atol=1e-4, rtol=1e-4)
    assert (adapted - hf(ids).logits).abs().max() > 1e-3


def test_experts_whose_tensors_are_transposed_or_shared(tmp_path):
    """gpt-oss keeps all experts of a layer in one tensor, `[experts, in, out]`."""
    source = families.tiny_model(tmp_path / "source", "gpt_oss")
    report = injected(source, tmp_path / "hf", layers=[1], direction=DIRECTION)
    name = "model.layers.1.mlp.experts.down_proj"
    before, after = tensors_of(source)[name].astype(np.float64), tensors_of(tmp_path / "hf")[name]
    wanted = before + SCALE * before.mean(axis=-1, keepdims=True) * UNIT  # the stream is the last axis
    np.testing.assert_allclose(after, wanted, atol=1e-6)
    assert report["edited_tensors"].keys() == {name, "model.layers.1.self_attn.o_proj.weight"}
    assert report["verification"]["problems"] == []


@pytest.mark.parametrize(
    "form, edit, message",
    [
        (
            "hf",
            {"sites": ("embed",)},
            "An injection makes matrices of layers write one direction, at attn_out, mlp_out",
        ),
        ("hf", {"direction": np.eye(32)[:2]}, "these are 2 directions"),
        ("hf", {"layers": [7]}, "layer 7"),
        ("hf", {"scale": 0.0}, "leaves nothing to do"),
        ("gguf", {}, "an injection adds what depends on it"),
    ],
)
def test_what_no_injection_is(llama, tmp_path, form, edit, message):
    with pytest.raises(UserError, match=message):
        injected(llama, tmp_path / "out", form, **edit)
    assert dataclasses.is_dataclass(Inject) and not (tmp_path / "out").exists()
