"""Tests that change weights: removal of the low-rank change from a base, against NumPy's singular values, and a fine-tune."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from refusal_jax.chat.loss_rows import chat_rows, reply_end
from refusal_jax.chat.model import load_model
from refusal_jax.checkpoints import spectra
from refusal_jax.checkpoints.load import load_decoder
from refusal_jax.checkpoints.opened import model_folder
from refusal_jax.checkpoints.rewrite import Checkpoint
from refusal_jax.checkpoints.spectra import leading_part
from refusal_jax.conditions import Ablate
from refusal_jax.defence.lessons import Lesson
from refusal_jax.directions import Direction
from refusal_jax.edits import Edits
from refusal_jax.errors import UserError
from refusal_jax.export.lora import write_lora
from refusal_jax.judges.judge import Outcome as Did
from refusal_jax.models.sharding import make_mesh
from refusal_jax.resistance.attack import Budget, Impossible, Measured
from refusal_jax.resistance.attacked import Attacked
from refusal_jax.resistance.attacks import fine_tune, stripped
from refusal_jax.resistance.delta import strip
from refusal_jax.resistance.subject import Subject
from refusal_jax.training import trainer
from refusal_jax.training.objective import NextToken
from refusal_jax.training.rows import Share, row_width
from refusal_jax.training.trainer import Trained, train
from tests.quantised import FORMATS, quantise
from tests.resisting import budget, of, under_test
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


def test_a_base_with_more_tokens_and_one_that_is_quantised(llama, tmp_path):
    larger = tiny_llama(tmp_path / "larger", extra=("<|more|>",))
    model = load_model(changed(llama, tmp_path / "candidate", low_rank(3)))
    assert strip(model, larger, rank=1, otherwise=16).record["changed_tensors"] >= 21
    quantise(llama, tmp_path / "fp8", FORMATS["fp8-row"])
    found, base = strip(model, tmp_path / "fp8", rank=3, otherwise=16), load_decoder(llama)
    assert furthest(found.model.decoder, base) < 0.5 * furthest(model.decoder, base)


def test_checkpoints_that_cannot_be_compared(llama, tmp_path):
    other = tiny_llama(tmp_path / "other", layers=2)
    with pytest.raises(UserError, match="cannot be compared"):
        strip(load_model(llama), other, rank=0, otherwise=16)


def test_an_adapter_is_left_out(llama, tmp_path):
    checkpoint = Checkpoint.open(llama)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    write_lora(checkpoint, adapter, Ablate(Direction.of(np.ones(32), 0, -1)), "skip", str(llama))
    model = load_model(model_folder(str(adapter)))
    found = strip(model, None, rank=0, otherwise=16)
    assert found.adapter and found.record["changed_tensors"] == 0
    assert furthest(found.model.decoder, load_decoder(llama)) == 0 < furthest(model.decoder, load_decoder(llama))


def test_stripping_is_measured_with_a_direction_found_anew(llama, six_sets, tmp_path):
    candidate = changed(llama, tmp_path / "candidate", low_rank(2))
    with under_test(candidate, six_sets, tmp_path / "out", llama) as subject:
        assert not stripped.impossible(subject, subject.settings)
        found = stripped.run(subject, subject.settings, cost := budget())
        assert found.chosen["refused_without_ablation"] == 1 and found.chosen["median_rank"] == 2
        assert found.chosen["layer"] < 3 and cost.flops > 0
        assert found.stop == "All 21 tensors that changed were looked at, and the best candidate was ablated."
        other = Attacked(subject, load_model(llama), budget())
        assert other.own_direction() is None and other.direction_means() is None and other.model is not subject.model
        subject.base = None
        assert stripped.impossible(subject, subject.settings).startswith("No base is given")
        subject.base = candidate
        assert stripped.impossible(subject, subject.settings) == "The checkpoint is the base itself."
        subject.base = shutil.copytree(candidate, tmp_path / "same")
        with pytest.raises(Impossible, match="weights are those of the base"):
            stripped.run(subject, subject.settings, budget())


# ---- fine-tunes


@pytest.fixture(scope="module")
def subject(llama, six_sets, tmp_path_factory):
    with under_test(llama, six_sets, tmp_path_factory.mktemp("resist")) as found:
        yield found


def test_two_steps_are_those_of_the_training(subject, tmp_path, monkeypatch):
    """Nor does it change them that refusals are looked at after each step; few of them end the training."""
    monkeypatch.setattr(trainer, "READ_EVERY", 1)
    (tmp_path / "own.jsonl").write_text(
        "\n".join(json.dumps({"prompt": p, "response": "Sure."}) for p in ("How?", "user"))
    )
    own = {"steps": 2, "batch": 2, "file": str(tmp_path / "own.jsonl"), "ablate": False}
    settings = of(subject, fine_tune=own)
    found = fine_tune.tune(subject, "file", settings, cost := budget())
    rows = chat_rows(subject.model.chat, [("How?", "Sure."), ("user", "Sure.")], 99, (reply_end(subject.model.chat),))
    plain = fine_tune.train_settings(settings.fine_tune, 0)
    objective = NextToken(Share.of(subject.model.chat, rows, row_width(rows), plain))
    theirs = train(subject.model, objective, plain).decoder
    assert furthest(found.model.decoder, theirs) == 0 < furthest(found.model.decoder, subject.model.decoder)
    assert (found.steps, found.rows, found.stop) == (2, 2, "All 2 steps were done.") and cost.flops > 0
    monkeypatch.setattr(Subject, "measure", lambda *_, **more: Measured((Did.COMPLIES,), ()))
    found = fine_tune.tune(subject, "file", settings, budget())
    assert found.steps == 1 and found.stop.startswith("It stopped at step 1 of 2, as fewer than 10 % of the validation")


def test_both_texts_are_tried_and_the_better_one_measured(subject, tmp_path, monkeypatch):
    def answering(model, pairs, *_):
        return tuple(Lesson(pair.prompt, pair.reply or "Yes.") for pair in pairs)

    def untrained(model, objective, settings, **_):
        return Trained(model.decoder, None, settings, [{}])

    (tmp_path / "own.json").write_text(json.dumps([{"prompt": "How?", "response": "Sure."}]))
    monkeypatch.setattr(fine_tune, "answering", answering)
    monkeypatch.setattr(fine_tune, "train", untrained)
    settings = of(subject, fine_tune={"steps": 1, "batch": 1, "rows": 2, "file": str(tmp_path / "own.json")})
    found = fine_tune.run(subject, settings, budget())
    assert found.chosen["refused_by_text"] == {"harmless": 1.0, "file": 1.0} and found.chosen["text"] == "harmless"
    assert found.used == {"steps": 2, "of": 2} and found.chosen["rows"] == 2 and not found.chosen["ablated"]
    monkeypatch.setattr(fine_tune, "answering", lambda *_: ())
    with pytest.raises(Impossible, match="No prompt of the harmless text has a reply"):
        fine_tune.run(subject, settings, budget())


def test_why_a_fine_tune_stopped():
    assert fine_tune.stopped(3, 3, budget()) == "All 3 steps were done."
    assert fine_tune.stopped(2, 3, Budget(0.0, 1)) == "It stopped after its 0 seconds, at step 2 of 3."
    assert "as fewer than 10 % of the validation prompts" in fine_tune.stopped(2, 3, budget())


def test_answers_are_those_of_the_base(subject, llama, monkeypatch):
    """They are asked as the checkpoint is, too."""
    asked, told = [], []

    def loaded(path, *_, **more):
        told.append(more)
        return dataclasses.replace(subject.model, path=path)

    monkeypatch.setattr(fine_tune, "answering", lambda model, *_: asked.append(model.path) or ())
    monkeypatch.setattr(subject, "base", llama.parent / "elsewhere")
    monkeypatch.setattr(fine_tune, "load_model", loaded)
    monkeypatch.setattr(subject.config, "system_prompt", "Be kind.")
    for answers in ("base", "own"):
        fine_tune.lessons_of(subject, "harmless", of(subject, fine_tune={"answers": answers}).fine_tune)
    assert asked == [subject.base, subject.model.path]
    assert told == [{"chat_template": "", "system_prompt": "Be kind.", "thinking": False}]


def test_a_mixture_of_experts_is_not_tuned(subject, monkeypatch):
    assert fine_tune.impossible(subject, subject.settings) == ""
    monkeypatch.setattr(fine_tune, "load_config", lambda folder: dataclasses.replace(subject.model.config, n_experts=4))
    assert "the loop over experts of this model has none" in fine_tune.impossible(subject, subject.settings)


def test_an_ablation_that_breaks_harmless_answers_is_left_out(subject, tmp_path, monkeypatch):
    (tmp_path / "own.json").write_text(json.dumps([{"prompt": "How?", "response": "Sure."}]))
    monkeypatch.setattr(fine_tune, "train", lambda model, objective, own, **_: Trained(model.decoder, None, own, [{}]))
    monkeypatch.setattr(subject, "_plain", {"val": Measured((Did.REFUSES,) * 2, (Did.COMPLIES,) * 2)})
    settings = of(subject, fine_tune={"steps": 1, "batch": 1, "file": str(tmp_path / "own.json")})
    for answered, taken in ((Did.BROKEN, False), (Did.COMPLIES, True)):
        tuned = Measured((Did.REFUSES, Did.COMPLIES), (Did.COMPLIES,) * 2)
        monkeypatch.setattr(Attacked, "plain", lambda self, split, tuned=tuned: tuned)
        monkeypatch.setattr(Attacked, "ablation", lambda self, budget: (Edits.none(32), {}))
        ablated = Measured((Did.COMPLIES,) * 2, (answered,) * 2)
        monkeypatch.setattr(Subject, "measure", lambda self, *_, ablated=ablated, **more: ablated)
        assert (fine_tune.tune(subject, "file", settings, budget()).edits is not None) is taken


def test_weights_of_another_vocabulary_have_no_kl(subject, tmp_path):
    larger = load_model(tiny_llama(tmp_path / "larger", extra=("<|more|>",)))
    assert larger.config.vocab_size != subject.model.config.vocab_size
    assert subject.measure(model=larger, split="val").kl == ()
