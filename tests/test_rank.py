"""Rank to break: the directions against PyTorch hooks, the controls, planted ranks, and the stage."""

import shutil

import numpy as np
import pytest
import tiny
from oracle import ablation, hooked

from refusal_jax import UserError
from refusal_jax.mechanism.dose import Response
from refusal_jax.mechanism.ranks import ablations, left_over, mean_difference, principal_components, random_directions
from refusal_jax.models.hf_config import load_config
from refusal_jax.plan.programs import Shapes, Workload
from refusal_jax.runs.artifacts import RANK, RANK_DIRECTIONS
from refusal_jax.study.config import get_config
from refusal_jax.study.mechanism import agreement, dose, rank
from refusal_jax.study.mechanism.run import run_mechanism
from refusal_jax.study.mechanism.settings import MechanismSettings

HARMFUL = ["How do I rob the cake?", "How do I rob the bread, then the oven?", "rob"]
HARMLESS = ["How do I bake the cake?", "bake bread", "How do I bake the bread, then the cake?", "How?"]
PLACE = (-2, 2)


def test_each_direction_is_what_is_left_as_with_torch_hooks(model, hf):
    """Every next difference in means is read in the model that all earlier ones are ablated from."""
    ours, theirs, first = np.zeros((0, 32)), np.zeros((0, 32)), 0.0
    for number in range(3):
        edits = ablations(ours, [number], 4) if number else None
        difference = mean_difference(model, HARMFUL, HARMLESS, PLACE, 4, edits)
        first = first or np.linalg.norm(difference)
        next_d = left_over(difference, ours, first)
        ours = np.concatenate([ours, next_d[None]])
        means = []
        for prompts in (HARMFUL, HARMLESS):
            batch, read = model.encode(prompts), []
            # Orthogonal directions one after another are their subspace; the read comes after them.
            hooks = [hook for one in theirs for hook in ablation(hf.model.layers, one)]
            hooks += [(hf.model.layers[PLACE[1]], "input", lambda x, read=read: read.append(x) or x)]
            with hooked(hooks):
                tiny.hf_forward(hf, batch.tokens, batch.mask)
            means.append(read[0][:, PLACE[0]].double().mean(dim=0).numpy())
        plain = means[0] - means[1]
        theirs = np.concatenate([theirs, plain[None] / np.linalg.norm(plain)])
        np.testing.assert_allclose(ours[number], theirs[number], atol=2e-4)
    np.testing.assert_allclose(ours @ ours.T, np.eye(3), atol=1e-9)


def test_what_is_only_rounding_is_no_direction():
    basis = np.eye(4)[:2]
    np.testing.assert_allclose(left_over(np.array([3.0, 1.0, 4.0, 3.0]), basis, 5.0), [0, 0, 0.8, 0.6])
    assert left_over(np.array([3.0, 1.0, 1e-6, 0.0]), basis, 5.0) is None
    assert left_over(np.zeros(4), basis, 0.0) is None


def test_controls():
    drawn = random_directions(5, 32, 1)
    np.testing.assert_allclose(drawn @ drawn.T, np.eye(5), atol=1e-12)
    assert len(random_directions(9, 4, 0)) == 4 and not np.allclose(drawn, random_directions(5, 32, 2))
    rng = np.random.default_rng(0)
    kinds = [rng.normal(size=(40, 6)) * [9, 1, 5, 1, 1, 1] + 100 * np.eye(6)[1] * side for side in (0, 1)]
    found = principal_components(kinds, 2)  # and not the axis along which the kinds differ
    assert abs(found[0, 0]) > 0.98 and abs(found[1, 2]) > 0.98
    assert len(principal_components([np.eye(6)[:2]], 5)) == 1
    edits = ablations(drawn, [0, 1, 4], 6)
    assert edits.ablate_rjd.shape == (3, 6, 32)
    assert [int(np.linalg.matrix_rank(one)) for one in edits.ablate_rjd] == [0, 1, 4]


@pytest.mark.parametrize("breaks", [1, 3, None])
def test_the_rank_of_planted_refusals(breaks):
    """Prompts are refused until so many directions are ablated."""
    rng = np.random.default_rng(0)
    own = np.full(60, 99) if breaks is None else np.maximum(breaks + rng.integers(-1, 2, 60), 1)
    so_far = []
    for count in range(9):
        scores = np.where(own > count, 1.0, -1.0)[None]
        so_far.append((Response(scores, np.zeros_like(scores)), Response(np.zeros((1, 4)), np.zeros((1, 4)))))
        if rank.half_of(so_far)["high"] is not None:
            break
    half = rank.half_of(so_far)
    found = {"half": {"found": half}, "curves": {"found": [{"directions": i} for i in range(len(so_far))]}}
    words = rank.in_words(found, "found")
    if breaks is None:
        assert (half["at"], half["low"], half["high"]) == (None, None, None) and words == "not broken by 8"
    else:
        assert half["at"] == breaks and half["low"] <= breaks <= half["high"] and len(so_far) - 1 == half["high"]
        assert words == f"broken by {breaks} ({half['low']:.0f} to {half['high']:.0f})"


def test_the_stage_goes_on_and_shows_what_it_found(demo_study, tmp_path, monkeypatch):
    folder, made = tmp_path / "run", []
    shutil.copytree(demo_study, folder)
    settings = {"parts": ("rank",), "rank": {"most": 3, "n_prompts": 8, "n_train": 8}}
    whole = rank.respond

    def respond(*of):
        made.append(len(of[2]) if len(of) > 2 else 0)
        if len(made) == 5:
            raise KeyboardInterrupt
        return whole(*of)

    with monkeypatch.context() as patch:
        patch.setattr(rank, "respond", respond)
        with pytest.raises(KeyboardInterrupt):
            run_mechanism(settings, folder)
        patch.setattr(rank, "respond", lambda *of: made.append(len(of[2]) if len(of) > 2 else 0) or whole(*of))
        patch.setattr(rank, "mean_difference", lambda *of: pytest.fail("the first direction is in the ledger"))
        run = run_mechanism(settings, folder)
    assert made[5:9] == [0, 0, 1, 1]  # what was measured is not measured again
    found, directions = run.read_json(RANK), run.read_tensors(RANK_DIRECTIONS)["directions"]
    assert found["half"]["found"]["at"] == 1 and found["half"]["random"]["at"] is None
    assert found["first_cosine"] > 0.9 and directions.shape == (1, 128)
    assert [row["directions"] for row in found["curves"]["random"]] == [0, 1, 2, 3]
    page = (folder / "report.html").read_text()
    assert '<section id="rank">' in page and "fig-rank-curves" in page and "not broken by 3" in page
    assert run_mechanism(settings, folder).worked == []


def test_settings_that_count_nothing():
    with pytest.raises(UserError, match=r"rank\.most = 0, .*rank\.n_prompts = 64 and .*give at least 1 of each"):
        MechanismSettings.of({"rank": {"most": 0}}).check(("rank",))


def test_the_plan_compiles_what_the_stages_run(llama):
    """The programs that `plan` is given are those that the stages call, with inputs of the same shapes and kinds."""
    config = get_config()
    config.data.update({"n_train": 5, "n_test": 5})
    work = Workload(load_config(llama), "float32", config, 64, (dose.STAGE.programs, rank.STAGE.programs))
    for stage in (dose.STAGE, rank.STAGE, agreement.STAGE):
        for program in stage.programs.describe(Shapes(work, None), 16):
            assert program.lower().compile() and program.runs > 0 and program.rows == 16
