"""Weight orthogonalisation and HF export: exact, byte-preserving, loadable by transformers, and refused when it can't be."""

import hashlib
import json
import pathlib
import shutil

import numpy as np
import pytest
import tiny
import torch
from safetensors.numpy import load_file

from refusal_jax import Edits, UserError, load_model
from refusal_jax.export import weights
from refusal_jax.export.verify import compare
from refusal_jax.export.weights import Orthogonalise, export_hf

TEXTS = ["How do I bake the bread?", "Bake.", "I want to mend a coat. What should I do about the bread on the table?"]


@pytest.fixture(scope="module")
def direction():
    return np.random.default_rng(3).normal(size=32).astype(np.float32)


def digest(path: pathlib.Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("settings", [
    {}, {"attention_bias": True, "mlp_bias": True}, {"shards": "20KB"}, {"dtype": "bfloat16"}, {"heads": 4, "kv_heads": 1},
])  # fmt: skip
def test_export_equals_ablation_and_transformers_agrees(tmp_path, direction, settings):
    source = tiny.tiny_llama(tmp_path / "source", **settings)
    names = export_hf(source, tmp_path / "out", Orthogonalise.along(direction))
    original, exported = load_model(source), load_model(tmp_path / "out")
    result = compare(source, tmp_path / "out", direction, TEXTS)
    exact = settings.get("dtype") is None
    assert result["max_logit_difference"] <= (1e-3 if exact else 0.5)
    assert result["max_projection"] <= (1e-5 if exact else 1e-2)
    assert result["original_max_logit_difference"] > 10 * result["max_logit_difference"]
    assert len(names) == 1 + 3 * (4 if settings.get("mlp_bias") else 2)

    batch = original.encode(TEXTS)
    with torch.no_grad():
        theirs = tiny.load_hf(tmp_path / "out").float()(
            torch.from_numpy(batch.tokens).long(), attention_mask=torch.from_numpy(batch.mask).long()
        ).logits[:, -1].numpy()  # fmt: skip
    np.testing.assert_allclose(exported.logits(batch.tokens, batch.mask), theirs, atol=1e-4, rtol=1e-4)


def test_untouched_tensors_and_files_are_copied_byte_for_byte(tmp_path, direction):
    source = tiny.tiny_llama(tmp_path / "source", shards="20KB")
    (source / "extra").mkdir()
    (source / "extra" / "note.txt").write_text("kept")
    (source / "pytorch_model.bin").write_bytes(b"pickled weights of the unedited model")
    names = set(export_hf(source, tmp_path / "out", Orthogonalise.along(direction)))
    ours = {str(p.relative_to(tmp_path / "out")): p for p in (tmp_path / "out").rglob("*") if p.is_file()}
    theirs = {str(p.relative_to(source)): p for p in source.rglob("*") if p.is_file()}
    assert set(theirs) - set(ours) == {"pytorch_model.bin"} and set(ours) <= set(theirs)
    for name, path in ours.items():
        if path.suffix != ".safetensors":
            assert digest(path) == digest(theirs[name]), name
            continue
        before, after = load_file(theirs[name]), load_file(path)
        header = int.from_bytes(path.read_bytes()[:8], "little")
        assert path.read_bytes()[: 8 + header] == theirs[name].read_bytes()[: 8 + header]
        for tensor in before:
            assert (tensor in names) != np.array_equal(before[tensor], after[tensor]), tensor
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1


def test_links_are_followed_and_never_written_through(tmp_path, direction):
    blobs = tiny.tiny_llama(tmp_path / "blobs")
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(path)
    before = {p.name: digest(p) for p in blobs.iterdir()}
    export_hf(snapshot, tmp_path / "out", Orthogonalise.along(direction))
    assert {p.name: digest(p) for p in blobs.iterdir()} == before
    assert not any(p.is_symlink() for p in (tmp_path / "out").iterdir())
    assert compare(snapshot, tmp_path / "out", direction, TEXTS)["max_logit_difference"] < 1e-3


def test_an_export_of_a_zero_edit_row_equals_the_original(llama, model):
    batch = model.encode(TEXTS)
    none = model.logits(batch.tokens, batch.mask, Edits.ablate(np.zeros(32)))
    np.testing.assert_array_equal(none, model.logits(batch.tokens, batch.mask))


@pytest.mark.parametrize("direction", [np.zeros(32), np.full(32, np.nan), np.ones((2, 32))])
def test_unusable_directions_are_refused(direction):
    with pytest.raises(UserError, match="must be a vector of finite numbers that is not zero"):
        Orthogonalise.along(direction)


def test_targets_and_sources_that_cannot_be(llama, tmp_path, direction):
    edit = Orthogonalise.along(direction)
    with pytest.raises(UserError, match="has 7 entries, the residual stream of .* has 32"):
        export_hf(llama, tmp_path / "out", Orthogonalise.along(np.ones(7)))
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="exists already"):
        export_hf(llama, tmp_path / "there", edit)
    with pytest.raises(UserError, match="lies inside the source checkpoint"):
        export_hf(llama, llama / "inside", edit)
    with pytest.raises(UserError, match="ties its unembedding to its embedding"):
        export_hf(tiny.tiny_llama(tmp_path / "tied", tied=True), tmp_path / "out", edit)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("when", ["copy", "rewrite"])
def test_a_full_disk_leaves_nothing_behind(llama, tmp_path, direction, monkeypatch, when):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(*((shutil, "copyfile") if when == "copy" else (weights, "rewrite")), full)
    with pytest.raises(UserError, match="could not be written: No space left on device"):
        export_hf(llama, tmp_path / "out", Orthogonalise.along(direction))
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_export_has_no_folder(llama, tmp_path, direction, monkeypatch):
    calls = []

    class Stopping(Orthogonalise):
        def __call__(self, path, tensor):
            calls.append(path)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return super().__call__(path, tensor)

    with pytest.raises(KeyboardInterrupt):
        export_hf(llama, tmp_path / "out", Stopping.along(direction))
    assert list(tmp_path.iterdir()) == []
    export_hf(llama, tmp_path / "out", Orthogonalise.along(direction))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["hidden_size"] == 32
