"""Values that overflow are errors that name the dtype and what to do, in every use of a model."""

import dataclasses
import shutil
import types

import exports
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from refusal_jax import Edits, Taps, UserError, load_model, make_mesh
from refusal_jax.chat.loss_rows import chat_rows
from refusal_jax.chat.refusal_tokens import measure_openings
from refusal_jax.chat.residuals import extract
from refusal_jax.conditions import Baseline, Condition, Dataset
from refusal_jax.directions import Direction
from refusal_jax.judges import models as judge_models
from refusal_jax.judges.choice import parse_judges
from refusal_jax.models.decoder import Decoder
from refusal_jax.models.finite import check_finite
from refusal_jax.study import projections
from refusal_jax.study.completions import complete, score_replies
from refusal_jax.study.loss import measure_losses
from refusal_jax.study.scoring import PromptScorer
from refusal_jax.study.selection import Rule, evaluate_candidates

PROMPTS = ["How do I bake the bread?", "bake", "help me", "Sure"]
OVERFLOWS = r"{}.*the model's values are NaN or infinite in float16\. float16 holds no number over 65504: use bfloat16"


def scaled(source, folder, factor: float, layer: int = 2):
    """A copy of which the MLP of a layer, the last one, writes `factor` times as much."""
    shutil.copytree(source, folder)
    weights = load_file(folder / "model.safetensors")
    weights[f"model.layers.{layer}.mlp.down_proj.weight"] *= np.float32(factor)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def folder(llama, tmp_path_factory):
    return scaled(llama, tmp_path_factory.mktemp("large") / "model", 3e4)


@pytest.fixture(scope="module")
def half(folder):
    return load_model(folder, "float16")


ITEMS = [{"instruction": text, "category": None} for text in PROMPTS]
SETS = {"harmful": ITEMS, "harmless": ITEMS}
BASELINE = [Condition(Dataset("harmful", "harmful", True), Baseline)]
FORWARD, GENERATION = "The forward pass failed", "Generation failed"
USES = [  # what the error says, and what makes it
    (FORWARD, lambda m: m.logits(*batch(m))),
    (FORWARD, lambda m: m.logits(*batch(m), positions="all")),
    (FORWARD, lambda m: m.taps(*batch(m), Taps(("resid_pre",), 1))),
    ("The beginnings of replies cannot be measured", lambda m: measure_openings(m, PROMPTS, PROMPTS, 2)),
    (GENERATION, lambda m: m.generate(PROMPTS, 4)),
    (GENERATION, lambda m: list(m.replies(m.encode(PROMPTS), 4, rows=2))),
    (GENERATION, lambda m: list(m.stream(m.encode(PROMPTS), 4, probe=np.ones(32)))),
    (GENERATION, lambda m: complete(m, SETS, BASELINE, Direction.of(np.ones(32), 1), max_new_tokens=3, batch_size=3)),
    ("No residuals can be read from 'train'", lambda m: extract(m, PROMPTS, (3,), 2, 0, 3, "train")),
    ("Selection has no baseline", lambda m: PromptScorer.build(m, PROMPTS, (3,), 8)),
    (
        "no refusal scores of harmful_baseline",
        lambda m: score_replies(m, SETS, BASELINE, Direction.of(np.ones(32), 1), (3,), 3),
    ),
    ("The loss of 'x' cannot be measured", lambda m: measure_losses(m, rows(m), Edits.none(32), 3, "x")),
]


def batch(model):
    batch = model.encode(PROMPTS)
    return batch.tokens, batch.mask


def rows(model):
    return chat_rows(model.chat, [(text, "I cannot") for text in PROMPTS], 64)


@pytest.mark.parametrize(("what", "use"), USES)
def test_overflow_in_float16(what, use, half):
    with pytest.raises(UserError, match=OVERFLOWS.format(what)):
        use(half)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_overflow_in_other_dtypes(dtype, folder):
    model = load_model(folder, dtype)
    for _, use in USES:
        use(model)


def test_overflow_on_a_mesh(folder):
    """The padded columns of a vocabulary hold -inf, which is no overflow."""
    mesh = make_mesh(data=2, model=4)
    with pytest.raises(UserError, match=OVERFLOWS.format("Generation failed")):
        load_model(folder, "float16", mesh).generate(PROMPTS, 3)
    assert len(load_model(folder, "bfloat16", mesh).generate(PROMPTS, 3)) == 4


def test_harness(folder):
    pytest.importorskip("lm_eval", reason="the extra lm_eval is not installed")
    from refusal_jax.harness.lm_eval import RefusalJaxLM

    lm = RefusalJaxLM(pretrained=str(folder), dtype="float16", batch_size=2)
    with pytest.raises(UserError, match=OVERFLOWS.format("A score failed")):
        lm._loglikelihood_tokens([(None, [5, 6], [7, 8]), (None, [5], [7])])
    with pytest.raises(UserError, match=OVERFLOWS.format(GENERATION)):
        lm.edited.replies([[5, 6], [7]], 3, [(), ()], 2)


def test_judges(folder, monkeypatch):
    monkeypatch.setattr(judge_models, "label_ids", lambda *_: [[3], [4]])
    (judge,) = parse_judges([f"llm={folder}"], 2, "float16")
    with pytest.raises(UserError, match=OVERFLOWS.format("The judge 'llm' gives no probabilities")):
        judge.judge([{"prompt": "a", "response": "b"}])


@pytest.mark.usefixtures("unchecked")
def test_projections(llama, tmp_path):
    model = load_model(scaled(llama, tmp_path / "model", 3e4, layer=0), "float16")
    study = types.SimpleNamespace(model=model, direction=lambda: Direction.of(np.ones(32), 1), batches=3)
    study.instructions = lambda split, kept_only: PROMPTS
    with pytest.raises(UserError, match=OVERFLOWS.format("The projections of harmful_val cannot be read")):
        projections.project_prompts(study, None)


def test_verification_of_an_export(llama, tmp_path):
    damaged = scaled(llama, tmp_path / "model", 1e30)
    with pytest.raises(UserError, match=r"The original cannot be compared with: .*float32\. The checkpoint is damaged"):
        exports.exported(damaged, tmp_path / "out")


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_an_edit_that_overflows(dtype, llama):
    """In float32 the sum of squares overflows, which the norm would turn into zeros."""
    model = load_model(llama, dtype)
    edits = Edits.concat([Edits.none(32), Edits.add(np.ones(32), 1, scale=1e30)]).take([0, 0, 1, 0])
    message = rf"infinite in {dtype}\. The edit may be the reason: try it with a smaller scale .*Without an edit: "
    for use in (model.generate_ids, lambda batch, n, edits: model.logits(batch.tokens, batch.mask, edits)):
        with pytest.raises(UserError, match=message):
            use(model.encode(PROMPTS), 4, edits)
    assert len(model.generate(PROMPTS[:2], 4, edits.take([0, 1]))) == 2


def test_candidates_that_overflow_are_discarded(llama):
    model = load_model(llama, "float16")
    directions = np.random.default_rng(0).normal(size=(3, 1, 32))
    directions[1] *= 1e6
    settings = {"full_grid": True, "batch_size": 8}
    found = evaluate_candidates(model, directions, PROMPTS, PROMPTS, (3,), Rule(3, prune_fraction=0.0), **settings)
    assert [np.isnan(row["steering_score"]) for row in found] == [False, True, False]


def test_damaged_checkpoints(llama, tmp_path):
    model = load_model(scaled(llama, tmp_path / "model", 1e30))
    with pytest.raises(UserError, match=r"NaN or infinite in float32\. The checkpoint is damaged: fetch its weights"):
        model.generate(PROMPTS, 3)


def test_what_to_do():
    check_finite([True, True], "float16", "x")
    with pytest.raises(UserError, match=r"^x: the model's values are NaN or infinite in bfloat16\. Use float32 "):
        check_finite([True, False], "bfloat16", "x")
    with pytest.raises(UserError, match=r"infinite in float16\. float16 holds"):  # the edit was another row's
        check_finite([True, False], "float16", "x", np.array([True, False]))


def test_a_softcap_does_not_hide_overflow(half):
    capped = Decoder(dataclasses.replace(half.config, logit_softcap=30.0), half.decoder.weights())
    x_11d = jnp.ones((1, 1, 32), jnp.float16)
    assert np.isfinite(capped.logits(x_11d)).all()
    x_11d = x_11d.at[0, 0, 0].set(jnp.inf)
    assert not np.isfinite(capped.logits(x_11d)).any()
    assert not capped.finite(x_11d, capped.logits(x_11d)).any()
