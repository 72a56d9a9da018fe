"""Harmfulness at the instruction's end and refusal at the template's end, against the same from PyTorch hooks and NumPy."""

import json
import shutil

import numpy as np
import pytest
from oracle import Oracle, hooked

from refusal_jax import Edits
from refusal_jax.judges.areas import Area
from refusal_jax.mechanism.plane import Moved, read_ends, unit_rows, without
from refusal_jax.runs.artifacts import MEANS, PLANE, PLANE_POINTS, PROMPTS
from refusal_jax.study.mechanism import plane
from refusal_jax.study.mechanism.run import run_mechanism

PROMPTS_OF_TWO_LENGTHS = ["steal it", "How do I rob the bank?", "Explain at length how one might poison the well."]


def inputs_of_blocks(oracle, text: str, hooks) -> np.ndarray:
    """The residual stream at the input of each block, float64 `[L, T, D]`, in plain PyTorch, after the hooks' edits."""
    kept: list = []
    read = [(layer, "input", lambda x: kept.append(x[0]) or x) for layer in oracle.layers]
    with hooked([*hooks, *read]):
        oracle.logits([text])
    return np.stack([x.double().numpy() for x in kept])


def test_projections_are_those_of_plain_hooks(model, llama):
    oracle, cfg, rng = Oracle(str(llama)), model.config, np.random.default_rng(0)
    units, direction = unit_rows(rng.normal(size=(3, cfg.n_layers, cfg.d_model))), rng.normal(size=cfg.d_model)
    end = len(model.chat.post_instruction_ids)
    for edits, hooks in (
        (Edits.none(cfg.d_model), []),
        (Edits.ablate(direction), oracle.ablation(direction)),
        (Edits.add(direction, 1), oracle.addition(direction, 1)),
    ):
        found = read_ends(model, PROMPTS_OF_TWO_LENGTHS, edits, units, (5, 9), 2, "test")
        for i, text in enumerate(PROMPTS_OF_TWO_LENGTHS):
            resid_ltd = inputs_of_blocks(oracle, text, hooks)
            expected = np.einsum("lpd,jld->lpj", resid_ltd[:, [-end - 1, -1]], units)
            np.testing.assert_allclose(found.along_nlpj[i], expected, atol=2e-5)
            with hooked(hooks):
                p = oracle.logits([text])[0].double().softmax(-1).numpy()[[5, 9]].sum()
            assert found.scores_n[i] == pytest.approx(np.log(p) - np.log1p(-p), abs=1e-4)


def test_what_an_edit_moves():
    rng = np.random.default_rng(0)
    harmful, harmless = rng.normal(3, 1, 40), rng.normal(0, 1, 30)
    moved = Moved.of((harmful, harmful / 2), (harmless, harmless / 2))
    assert moved.gap[0].value == pytest.approx(harmful.mean() - harmless.mean())
    assert moved.kept.value == pytest.approx(0.5) and moved.kept.low == pytest.approx(0.5)
    assert moved.area[0].value == pytest.approx(Area.of(harmful, harmless).area)
    assert (moved.change.value, moved.change.low, moved.change.high) == (0, 0, 0)
    gone = Moved.of((harmful, rng.normal(0, 1, 40)), (harmless, rng.normal(0, 1, 30)))
    assert gone.kept.high < 0.5 and gone.change.high < 0 < gone.gap[0].low
    still = Moved.of((np.zeros(3), np.zeros(3)), (np.zeros(3), np.zeros(3)))
    assert still.kept.value == 0 and still.area[0].value == 0.5


def test_the_part_that_is_not_ablated():
    vectors, direction = np.random.default_rng(0).normal(size=(4, 6)), np.arange(6.0)
    np.testing.assert_allclose(without(vectors, direction) @ direction, 0, atol=1e-6)
    np.testing.assert_allclose(unit_rows(np.array([[3.0, 4.0], [0.0, 0.0]])), [[0.6, 0.8], [0, 0]], atol=1e-8)


def test_the_layer_that_tells_most():
    harmful, harmless = np.array([[0.0, 1.0, 9.0], [0.0, 2.0, 8.0]]), np.array([[0.0, 0.0, 1.0], [0.0, 3.0, 2.0]])
    assert plane.clearest(harmful, harmless) == 2
    assert plane.clearest(harmful[:, :1], harmless[:, :1]) == 0


@pytest.fixture(scope="module")
def drawn(demo_study, tmp_path_factory):
    """A study with its plane: its folder and what was found."""
    folder = shutil.copytree(demo_study, tmp_path_factory.mktemp("plane") / "run")
    run = run_mechanism({"parts": ("plane",)}, folder)
    assert run.worked == ["plane", "report", "figures"]
    return folder, run


def test_the_plane_of_a_study(drawn):
    folder, run = drawn
    found, arrays = json.loads((folder / PLANE).read_text()), run.read_tensors(PLANE_POINTS)
    np.testing.assert_allclose(arrays["refusal"], run.read_tensors(MEANS)["mean_diffs"][-1], rtol=1e-6)
    prompts = json.loads((folder / PROMPTS).read_text())
    layer = found["layers"]["harmfulness"]
    above, below = (arrays[f"{name}.baseline.harmfulness"] for name in ("harmful", "harmless"))
    assert len(above) == len(prompts["harmful_test"]) == found["refused"]["harmful"]["baseline"]["n"]
    area = Area.of(above[:, layer].astype(float), below[:, layer].astype(float))
    assert found["effects"]["harmfulness"]["area"]["mean"] == pytest.approx(area.area)
    assert found["areas"]["harmfulness"]["baseline"][layer]["low"] == pytest.approx(area.low, abs=1e-6)
    assert found["cosine"][0] is None  # at the template's tokens all prompts agree before the first block
    kept = found["effects"]["refusal"]["kept"]
    assert abs(kept["mean"]) < 0.2 and sum(row["n"] for row in found["groups"]) == 2 * len(above)
    page = (folder / "report.html").read_text()
    assert 'id="plane"' in page and page.count("fig-plane-") > 3 and found["verdict"] in page.replace("&#39;", "'")


def told(area: float, kept: tuple[float, float], change: float) -> dict:
    """The numbers that a verdict rests on. kept: the bounds of what is left."""
    effect = {
        "area": {"mean": area, "low": area - 0.01, "high": area + 0.01},
        "kept": {"mean": sum(kept) / 2, "low": kept[0], "high": kept[1]},
    }
    refused = {"harmful": {"ablation": {"change": {"mean": change, "low": change - 0.1, "high": change + 0.1}}}}
    return {"effects": {"harmfulness": effect, "rest": effect}, "refused": refused}


@pytest.mark.parametrize(
    "found,words",
    [
        (told(0.95, (0.8, 0.9), -0.9), "says more than what it judges: refusals end, and of the distance"),
        (told(0.95, (0.1, 0.2), -0.9), "changes what the model judges, too"),
        (told(0.95, (0.4, 0.6), -0.9), "whether it changes what the model judges is open"),
        (told(0.95, (0.8, 0.9), 0.0), "does not end refusals for certain"),
        (told(0.7, (0.8, 0.9), -0.9), "not told apart clearly"),
    ],
)
def test_verdicts(found, words):
    assert words in plane.verdict(found)
