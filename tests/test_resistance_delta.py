"""Removal of a checkpoint's low-rank change from its base, against NumPy's singular values."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from refusal_jax.chat.model import load_model
from refusal_jax.checkpoints import spectra
from refusal_jax.checkpoints.load import load_decoder
from refusal_jax.checkpoints.spectra import leading_part
from refusal_jax.errors import UserError
from refusal_jax.models.sharding import make_mesh
from refusal_jax.resistance.delta import strip
from tests.tiny import tiny_llama


def changed(base, folder, change, **config):
    """Writes a copy of a checkpoint of one file with some tensors changed. change: from a name and its tensor to the new one."""
    shutil.copytree(base, folder)
    tensors = {name: change(name, tensor) for name, tensor in load_file(base / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    if config:
        whole = json.loads((folder / "config.json").read_text()) | config
        (folder / "config.json").write_text(json.dumps(whole))
    return folder


def low_rank(rank: int, noise: float = 0.0, only: str = "_proj"):
    """Returns a change of `changed` that adds a product of a rank, and noise, to the matrices with a word in their names."""
    rng = np.random.default_rng(1)

    def change(name: str, tensor: np.ndarray) -> np.ndarray:
        if only not in name:
            return tensor
        left, right = rng.standard_normal((tensor.shape[0], rank)), rng.standard_normal((rank, tensor.shape[1]))
        return (tensor + 0.1 * left @ right + noise * rng.standard_normal(tensor.shape)).astype(np.float32)

    return change


def furthest(decoder, other) -> float:
    """Returns the largest difference of two decoders' weights."""
    ours, theirs = decoder.weights(), other.weights()
    return max(float(np.abs(np.asarray(ours[path]) - np.asarray(theirs[path])).max()) for path in ours)


@pytest.mark.parametrize("exact", [512, 0])
def test_a_leading_part_is_that_of_numpy(monkeypatch, exact):
    monkeypatch.setattr(spectra, "EXACT", exact)
    rng = np.random.default_rng(0)
    matrix = rng.standard_normal((40, 6)) @ rng.standard_normal((6, 90)) + 0.01 * rng.standard_normal((40, 90))
    matrix = matrix.astype(np.float32)
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    ours = np.matmul(*leading_part(matrix, 4))
    np.testing.assert_allclose(ours, (left[:, :4] * values[:4]) @ right[:4], atol=1e-3)
    np.testing.assert_allclose(np.matmul(*leading_part(matrix, 99)), matrix, atol=1e-4)


@pytest.mark.parametrize("mesh", [False, True])
def test_a_merged_adapter_is_taken_out(llama, tmp_path, mesh):
    candidate = changed(llama, tmp_path / "candidate", low_rank(3, noise=1e-4))
    places = make_mesh(model=2) if mesh else None
    model = load_model(candidate, mesh=places)
    found = strip(model, llama, rank=0, otherwise=16)
    base = load_decoder(llama)
    assert furthest(found.model.decoder, base) < 2e-3 < 0.1 < furthest(model.decoder, base)
    assert {one.rank for one in found.taken} == {3} and all(one.separable for one in found.taken)
    assert found.record["separable_tensors"] == found.record["changed_tensors"] == 7 * 3
    for path, weight in found.model.decoder.weights().items():
        assert weight.sharding.is_equivalent_to(model.decoder.weights()[path].sharding, weight.ndim)


def test_a_change_of_full_rank_loses_its_leading_part(llama, tmp_path):
    name = "model.layers.1.mlp.down_proj.weight"
    candidate = changed(llama, tmp_path / "candidate", low_rank(40, only="layers.1.mlp.down"))
    found = strip(load_model(candidate), llama, rank=0, otherwise=5)
    before, after = (load_file(folder / "model.safetensors")[name] for folder in (llama, candidate))
    left, values, right = np.linalg.svd(after - before, full_matrices=False)
    expected = after - (left[:, :5] * values[:5]) @ right[:5]
    np.testing.assert_allclose(np.asarray(found.model.decoder.weights()["blocks.down"])[1], expected, atol=1e-4)
    [taken] = found.taken
    assert (taken.name, taken.rank, taken.separable) == (name, 5, False)
    assert taken.share == pytest.approx(np.sum(values[:5] ** 2) / np.sum(values**2), abs=1e-3)
    [given] = strip(load_model(candidate), llama, rank=2, otherwise=16).taken
    assert given.rank == 2


def test_norms_embeddings_and_other_vocabularies(tmp_path):
    """Covers tied embeddings of more tokens than the base has, a sharded base, and a norm's gain."""
    base = tiny_llama(tmp_path / "base", tied=True, shards="20KB", dtype="bfloat16")
    candidate = tiny_llama(tmp_path / "candidate", tied=True, extra=("<|more|>",), dtype="bfloat16")
    assert not (base / "model.safetensors").exists()
    tensors = load_file(candidate / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * 2
    save_file(tensors, candidate / "model.safetensors", metadata={"format": "pt"})
    model = load_model(candidate)
    found = strip(model, base, rank=4, otherwise=16).model.decoder.weights()
    ours, theirs = model.decoder.weights(), load_decoder(base).weights()
    np.testing.assert_allclose(np.asarray(found["final_norm"]), np.asarray(theirs["final_norm"]), atol=1e-5)
    common = len(theirs["embed"])
    np.testing.assert_array_equal(np.asarray(found["embed"])[common:], np.asarray(ours["embed"])[common:])


def test_checkpoints_that_cannot_be_compared(llama, tmp_path):
    other = tiny_llama(tmp_path / "other", layers=2)
    with pytest.raises(UserError, match="cannot be compared"):
        strip(load_model(llama), other, rank=0, otherwise=16)
