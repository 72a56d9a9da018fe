"""Interventions and conditions: what they do to a model, what they are called, and that they export as they run."""

import numpy as np
import pytest

from refusal_jax import Edits, UserError
from refusal_jax.conditions import (
    INTERVENTIONS,
    Ablate,
    Add,
    Affine,
    Baseline,
    Condition,
    datasets,
    label_of,
    rank,
    split_stem,
    stem_of,
    with_origin,
)
from refusal_jax.directions import Direction
from refusal_jax.export.tensor_edits import WEIGHT_SITES, check_edit
from refusal_jax.models.hf_config import load_config
from refusal_jax.study.config import get_config

ROWS = np.random.default_rng(0).normal(size=(2, 32))
ONE, SPAN = Direction.of(ROWS[0], layer=1, position=-1), Direction.of(ROWS)


@pytest.fixture(scope="module")
def cfg(llama):
    return load_config(llama)


def same(edits: Edits, others: Edits, cfg) -> bool:
    """Returns whether two edits of one row are equal in the form that programs take."""
    forms = [one.for_batch(1, cfg.n_layers, cfg.d_model) for one in (edits, others)]
    fields = ("ablate_rjd", "gate_rls", "add_rd", "layer_ra")
    return all(np.array_equal(getattr(forms[0], name), getattr(forms[1], name)) for name in fields)


def test_interventions_run_as_edits(cfg):
    assert same(Baseline().edits(cfg), Edits.none(32), cfg)
    assert same(Ablate(ONE).edits(cfg), Edits.ablate(ROWS[0]), cfg)
    assert same(Ablate(SPAN).edits(cfg), Edits.ablate(ROWS[None]), cfg)
    assert same(Ablate(ONE, scale=0.5).edits(cfg), Edits.ablate(ROWS[0], scale=0.5), cfg)
    assert same(Ablate(ONE, sites=WEIGHT_SITES).edits(cfg), Edits.ablate(ROWS[0]), cfg)  # all that is ever written
    assert same(Add(ONE, scale=-2.0).edits(cfg), Edits.add(ROWS[0], 1, -2.0), cfg)
    assert same(Add(ONE, [2, 0]).edits(cfg), Edits.add(ROWS[0], [0, 2]), cfg)
    gates = Ablate(ONE, [0, 2], ["embed", "mlp_out"], 0.5).edits(cfg).gate_rls[0]
    np.testing.assert_array_equal(gates, [[0.5, 0, 0.5], [0, 0, 0], [0, 0, 0.5]])


def test_what_runs_can_be_exported(cfg):
    for edit in (Ablate(ONE), Ablate(SPAN), Ablate(ONE, sites=WEIGHT_SITES, scale=0.5), Add(ONE)):
        check_edit(cfg, edit)
    assert Ablate(SPAN).described(cfg) == Ablate(SPAN, sites=WEIGHT_SITES).described(cfg)
    with pytest.raises(UserError, match="what weights write is embed, attn_out, mlp_out"):
        check_edit(cfg, Ablate(ONE, scale=0.5))  # the input of a block is no weight's alone


def test_conditions_are_named_once():
    known = datasets(get_config().data)
    ablated, added = (Condition.parse(name, known) for name in ("harmful_ablation", "harmless_actadd"))
    assert (ablated.intervention, ablated.name, ablated.label) == (Ablate, "harmful_ablation", "ablation")
    assert ablated.file("completions") == f"completions/{ablated.stem}_completions.json"
    assert added.file("evaluations") == "completions/harmless_actadd_evaluations.json" and added.label == "+ addition"
    assert Condition(known["harmful"], Add).label == label_of("actadd", True) == "− addition"
    assert label_of("prompted", True) == "prompted" and tuple(INTERVENTIONS) == (
        "baseline",
        "ablation",
        "actadd",
        "affine",
    )
    for kind in ("completions", "evaluations", "jailbreakbench"):
        assert stem_of(ablated.file(kind)) == ablated.stem
    assert split_stem("jailbreakbench_ablation") == ("jailbreakbench", "ablation") and split_stem("mine") == (
        "mine",
        "",
    )
    assert sorted(["other", "actadd", "baseline", "ablation"], key=rank) == ["baseline", "ablation", "actadd", "other"]
    for name in ("harmful", "harmful_other", "benign_ablation", "ablation"):
        with pytest.raises(
            UserError, match=f"unknown condition '{name}': it is harmful_ or harmless_ followed by one of"
        ):
            Condition.parse(name, known)


def test_affine_edits_go_to_where_harmless_or_harmful_prompts_are(cfg):
    harmless_pld = np.random.default_rng(1).normal(size=(2, 3, 32))
    direction = with_origin(ONE, {"harmless": harmless_pld})
    unit, norm = ROWS[0] / np.linalg.norm(ROWS[0]), np.linalg.norm(ROWS[0])
    harmless, harmful = harmless_pld[-1, 1] @ unit, (harmless_pld[-1, 1] + ROWS[0]) @ unit
    known = datasets(get_config().data)
    for side, target in (("harmful", harmless), ("harmless", harmful)):
        condition = Condition.parse(f"{side}_affine", known)
        assert same(condition.edits(direction, cfg), Edits.affine(ROWS[0], target, 1, 3), cfg)
    assert Affine(direction, 0.5).target == pytest.approx(harmless + norm / 2)
    assert [Condition(known[side], Affine).label for side in known] == ["affine, to 0", "affine, to 1"]
    assert with_origin(ONE, {}) is ONE and with_origin(SPAN, {"harmless": harmless_pld}) is SPAN
    with pytest.raises(UserError, match="needs the mean activation of the harmless prompts.*Use the folder of a study"):
        Affine(ONE).edits(cfg)
    with pytest.raises(UserError, match="does not tell at which layer"):
        Affine(Direction.of(ROWS[0])).edits(cfg)


def test_addition_is_subtracted_on_the_harmful_side(cfg):
    known = datasets(get_config().data)
    harmful, harmless = (Condition(known[side], Add).edits(ONE, cfg) for side in ("harmful", "harmless"))
    np.testing.assert_array_equal(harmful.add_rd, -harmless.add_rd)
    assert harmful.layer_ra == harmless.layer_ra == 1
