"""Repairs of partial edits: what was removed is measured exactly, what storage rounds away is estimated, and at full strength
only the base can restore it."""

import dataclasses
import json
import pathlib

import ml_dtypes
import numpy as np
import pytest
import real_candidates as made
import tiny
from exports import tensors_of

from refusal_jax import UserError
from refusal_jax.audit import removal
from refusal_jax.audit.audit import Audit
from refusal_jax.audit.removal import Removal, Unexplained
from refusal_jax.audit.repair import Repair, repair
from refusal_jax.audit.repairable import repair_facts, repairable
from refusal_jax.audit.settings import AuditSettings
from refusal_jax.audit.verdict import Verdict
from refusal_jax.audit.weights import ArrayWeights, StoredWeights
from refusal_jax.chat.model import demo_model_path, load_model
from refusal_jax.chat.residuals import extract
from refusal_jax.data.prompts import BUNDLED, read_prompts
from refusal_jax.data.sources import resolve
from refusal_jax.export.provenance import check

STRENGTHS = (0.1, 0.3, 0.5, 0.7, 0.85, 0.95)
LAYER = 4


def bfloat16(name, values):
    return values.astype(ml_dtypes.bfloat16).astype(np.float32)


@pytest.fixture(scope="module")
def base() -> ArrayWeights:
    stored = StoredWeights.open(demo_model_path())
    return ArrayWeights(stored.cfg, {name: stored.rows(name) for name in stored.files.tensors})


@pytest.fixture(scope="module")
def direction() -> np.ndarray:
    """The embedded model's difference in means."""
    model = load_model(demo_model_path())
    sides = [read_prompts(resolve(BUNDLED, f"{side}_train"))[:24] for side in ("harmful", "harmless")]
    means = [extract(model, [row["instruction"] for row in side], [0], 1, 0, 8, "").mean_lpd for side in sides]
    return (means[0] - means[1])[LAYER, -1]


def changed(base: ArrayWeights, *changes: made.Change) -> ArrayWeights:
    change = made.then(*changes)
    return ArrayWeights(base.cfg, {name: change(name, np.array(values)) for name, values in base.tensors.items()})


def everywhere(strength):
    return lambda layer, kind: strength


def distance(base, other, names) -> float:
    """The error of tensors relative to the base's, together."""
    gap = sum(float(np.sum((other.tensors[n] - base.tensors[n]) ** 2)) for n in names)
    return (gap / sum(float(np.sum(base.tensors[n] ** 2)) for n in names)) ** 0.5


def undone(plan: Repair, candidate: ArrayWeights) -> ArrayWeights:
    tensors = dict(candidate.tensors)
    for one in plan.restored:
        tensors[one.tensor] = one.undo(tensors[one.tensor])
    return ArrayWeights(candidate.cfg, tensors)


@pytest.mark.parametrize("storage", [made.kept, bfloat16, made.rounded(8, 0)], ids=["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("strength", STRENGTHS)
def test_partial_edits_are_restored_to_within_the_estimate(base, direction, strength, storage):
    """Of what was removed almost all comes back: storage is what limits it, and the estimate says by how much."""
    r = made.unit(direction)
    candidate = changed(base, made.projected(direction, everywhere(strength), strength), storage)
    plan = Repair.of(base, candidate)
    assert len(plan.removed) == 2 * base.cfg.n_layers + 1 and not plan.lost
    doses = np.array([one.doses[0] for one in plan.removed])
    exact = storage is made.kept
    assert abs(np.median(doses) - strength) < (1e-4 if exact else 5e-3)
    names = [one.tensor for one in plan.removed]
    restored = undone(plan, candidate)
    own, back, was = (
        np.concatenate([(r @ stream_first(w, n)).astype(np.float64) for n in names])
        for w in (base, restored, candidate)
    )
    error, before = (np.linalg.norm(x - own) / np.linalg.norm(own) for x in (back, was))
    assert before == pytest.approx(strength, abs=0.02)
    # The estimate is made with the directions that were found, which noise turns a little; the true one is looked at here.
    assert error < max(1.5 * plan.error, 1e-3), f"{error:.4f} where {plan.error:.4f} was estimated"
    assert plan.error < (1e-3 if exact else 0.35) and plan.evidence.value == plan.error
    rounding = distance(base, changed(base, storage), names)
    # Of the D directions of the stream one has the rounding amplified.
    amplified = rounding * (1 + plan.removed[0].amplification ** 2 / base.cfg.d_model) ** 0.5
    assert distance(base, restored, names) < max(1.2 * amplified, 1e-5)


def stream_first(weights: ArrayWeights, name: str) -> np.ndarray:
    values = weights.tensors[name]
    return values.T if name == made.EMBED else values


@pytest.mark.parametrize("storage", [made.kept, bfloat16, made.rounded(8, 0)], ids=["float32", "bfloat16", "int8"])
def test_only_the_base_restores_a_whole_removal(base, direction, storage):
    """In float32 too: what is left of the direction there is rounding."""
    candidate = changed(base, made.projected(direction, everywhere(1.0)), storage)
    plan = Repair.of(base, candidate)
    assert plan.removed and not plan.restored
    assert "Only the base can restore" in plan.evidence.meaning and plan.evidence.value == "by the base only"


def test_int4_rounds_away_what_little_is_left(base, direction):
    """At .95 a twentieth is left, and it comes back with the error of int4 twenty times as large; at .3 it is worth restoring."""
    most, less = (
        Repair.of(base, changed(base, made.projected(direction, everywhere(w)), made.rounded(4, 32)))
        for w in (0.97, 0.3)
    )
    assert len(most.lost) > len(most.restored)
    assert len(less.restored) > len(less.lost)


def test_tents_are_restored_layer_by_layer(base, direction):
    """Each tensor has a dose of its own; one with a peak of 1 is partly lost."""
    strength = made.tent({"o": 0.8, "down": 0.6}, 4.5, 0.2, 3.0)
    plan = Repair.of(base, changed(base, made.projected(direction, strength)))
    for one in plan.removed:
        assert one.doses[0] == pytest.approx(strength(*made.place(one.tensor)), abs=1e-4)
    assert not plan.lost and plan.error < 1e-3
    whole = made.tent({"o": 1.0, "down": 0.6}, 4.0, 0.2, 3.0)
    plan = Repair.of(base, changed(base, made.projected(direction, whole), bfloat16))
    assert [one.tensor for one in plan.lost] == ["model.layers.4.self_attn.o_proj.weight"]
    assert "1 more tensors can only be restored from the base" in plan.evidence.meaning


def test_a_reflection_is_its_own_inverse(base, direction):
    """Twice the direction removed, as some tools do, loses nothing."""
    candidate = changed(base, made.projected(direction, everywhere(2.0)), bfloat16)
    plan = Repair.of(base, candidate)
    assert not plan.lost and max(one.amplification for one in plan.removed) < 1.01
    assert distance(base, undone(plan, candidate), [one.tensor for one in plan.removed]) < 0.004


def test_edits_that_keep_the_lengths_of_rows(base, direction):
    """What each row was scaled by is not undone, so a strong edit is restored less well, and the estimate says so."""
    errors = {}
    for strength in (0.3, 0.5, 0.8):
        candidate = changed(base, made.row_normed(direction, everywhere(strength)), bfloat16)
        plan = Repair.of(base, candidate)
        names = [one.tensor for one in plan.removed]
        assert len(names) == 2 * base.cfg.n_layers
        errors[strength] = plan.error
        if strength < 0.8:
            assert not plan.lost
            was, now = distance(base, candidate, names), distance(base, undone(plan, candidate), names)
            assert now < 0.3 * was, (was, now)
    assert errors[0.3] < errors[0.5] < 0.15 < errors[0.8]


def test_several_directions_at_once(base, direction):
    rng = np.random.default_rng(1)
    rows = np.linalg.qr(np.stack([direction, *rng.standard_normal((2, len(direction)))]).T)[0].T.astype(np.float32)

    def change(name, values):
        if made.place(name) is None:
            return values
        return values - rows.T @ (np.array([[0.9], [0.6], [0.3]], np.float32) * (rows @ values))

    candidate = changed(base, change)
    plan = Repair.of(base, candidate)
    np.testing.assert_allclose(plan.removed[0].doses, [0.9, 0.6, 0.3], atol=1e-3)
    assert distance(base, undone(plan, candidate), [one.tensor for one in plan.removed]) < 1e-4


def test_what_else_was_changed_stays(base, direction):
    """A fine-tune after the edit is kept, and does not spoil the dose; one alone is no removal."""
    rng = np.random.default_rng(2)

    def tuned(name, values):
        if not made.MATRIX.fullmatch(name):
            return values
        left, right = (rng.standard_normal((n, 4)).astype(np.float32) for n in values.shape)
        return values + 0.02 * np.linalg.norm(values) / np.linalg.norm(left @ right.T) * (left @ right.T)

    alone = Repair.of(base, changed(base, tuned))
    assert not alone.removed and len(alone.unexplained) == 7 * base.cfg.n_layers
    assert alone.evidence.value == "nothing"
    rng = np.random.default_rng(2)
    both = Repair.of(base, changed(base, made.projected(direction, everywhere(0.5)), tuned))
    doses = [one.doses[0] for one in both.removed]
    assert len(doses) >= 2 * base.cfg.n_layers - 2 and np.median(doses) == pytest.approx(0.5, abs=0.02)
    rng = np.random.default_rng(2)
    only = changed(base, tuned)

    def more(name, values):
        return values + only.tensors[name] - base.tensors[name]

    candidate = changed(base, made.projected(direction, everywhere(0.5)), more)
    names = [one.tensor for one in both.removed]
    assert distance(only, undone(Repair.of(base, candidate), candidate), names) < 0.02


def test_added_directions_are_left_alone(base, direction):
    """A repair brings refusal back; it never takes away what was added."""
    plan = Repair.of(base, changed(base, made.projected(direction, everywhere(-0.5))))
    assert not plan.removed and len(plan.unexplained) == 2 * base.cfg.n_layers


def test_readers_are_restored_too(base, direction):
    u = made.unit(direction).astype(np.float32)

    def change(name, values):
        reads = name.endswith(("q_proj.weight", "up_proj.weight", "gate_proj.weight"))
        return values - 0.6 * np.outer(values @ u, u) if reads else values

    candidate = changed(base, change)
    plan = Repair.of(base, candidate)
    assert {one.doses[0].round(4) for one in plan.removed} == {0.6}
    assert distance(base, undone(plan, candidate), [one.tensor for one in plan.removed]) < 1e-5


def test_behind_a_norm_the_edit_is_oblique():
    """An export to a model with norms behind its writers removes along r / s what lies along r * s."""
    rng = np.random.default_rng(0)
    before = rng.standard_normal((32, 48)).astype(np.float32)
    scale, r = rng.uniform(0.5, 2, 32), made.unit(rng.standard_normal(32))
    after = (before - 0.6 * np.outer(r / scale, (r * scale) @ before)).astype(np.float32)
    matrix = removal.matrices(StoredWeights.open(demo_model_path()).cfg)[0]
    plain = removal.removal(matrix, before, after)
    found = removal.removal(dataclasses.replace(matrix, writes=True), before, after, scale)
    assert isinstance(found, Removal) and found.doses == pytest.approx([0.6], abs=1e-4)
    np.testing.assert_allclose(found.undo(after), before, atol=1e-4)
    assert isinstance(plain, Unexplained) or plain.explained < found.explained


@pytest.fixture(scope="module")
def repaired(direction, tmp_path_factory):
    """An edit of the embedded model, stored in bfloat16, its repair, and what is said of it."""
    folder = tmp_path_factory.mktemp("repair")
    made.rewrite(demo_model_path(), folder / "edited", made.projected(direction, everywhere(0.9), 0.9))
    settings = AuditSettings(
        candidate=str(folder / "edited"),
        base=str(demo_model_path()),
        lanes=("weights", "behaviour"),
        n_fit=4,
        n_test=16,
        max_new_tokens=8,
    )
    report = repair(audited(settings), folder / "out", "refusal-jax audit --repair=out")
    return folder, settings, report


def audited(settings: AuditSettings) -> Audit:
    return Audit(settings, [], Verdict("removed", "not_measured", "edited", []))


def test_a_repair_is_an_export_with_its_own_verification(repaired):
    folder, _, report = repaired
    found = report["verification"]
    assert found["problems"] == [] and not (folder / "out" / ".unverified").exists()
    assert report == json.loads((folder / "out" / "export.json").read_text())
    assert report["edit"]["kind"] == "repair" and report["edit"]["dose"] == pytest.approx(0.9, abs=0.01)
    assert report["largest_amplification"] == pytest.approx(10, rel=0.05)
    for one in found["tensors"].values():
        assert one["error_after"] < 0.01 < one["error_before"]
    assert found["export"]["mean_kl"] < 0.05 * found["original"]["mean_kl"]
    was, now, of_base = (
        next(r["refused"] for r in report["refusals"] if (r["prompts"], r["intervention"]) == ("harmful", name))
        for name in ("before the repair", "this export", "base")
    )
    assert was < 0.3 and now == of_base > 0.9
    assert check(folder / "out")["verified"]


def test_the_repair_says_what_it_is_in_its_card(repaired):
    folder, _, _ = repaired
    card = (folder / "out" / "README.md").read_text()
    assert "refusal direction restored" in card and "No value was copied from the base" in card
    assert "| before the repair |" in card and "by the judge substring_matching" in card
    names = set(tensors_of(folder / "out"))
    assert names == set(tensors_of(folder / "edited"))


def test_repairs_that_cannot_be_made(repaired, direction, tmp_path):
    folder, settings, _ = repaired

    def asked(**changes) -> Audit:
        return audited(AuditSettings(**{**settings, **changes}))

    with pytest.raises(UserError, match="A repair needs the base"):
        repair(asked(base=""), tmp_path / "out")
    with pytest.raises(UserError, match="There is nothing to repair"):
        repair(asked(candidate=str(demo_model_path())), tmp_path / "out")
    with pytest.raises(UserError, match="exists already"):
        repair(asked(), folder / "out")
    made.rewrite(demo_model_path(), tmp_path / "whole", made.projected(direction, everywhere(1.0)))
    with pytest.raises(UserError, match="Only the base can restore .*whole: 1 of the direction"):
        repair(asked(candidate=str(tmp_path / "whole")), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]


def test_biases_are_restored_with_their_matrices(tmp_path):
    """Of a model whose writers have biases."""
    source = tiny.tiny_llama(tmp_path / "base", attention_bias=True, mlp_bias=True)
    u = made.unit(np.random.default_rng(0).standard_normal(32)).astype(np.float32)

    def change(name, values):
        if name.endswith(("o_proj.bias", "down_proj.bias")):
            return values - 0.8 * u * (u @ values)
        return made.projected(u, everywhere(0.8))(name, values)

    made.rewrite(source, tmp_path / "edited", change, "F32")
    settings = AuditSettings(
        candidate=str(tmp_path / "edited"), base=str(source), lanes=("weights",), n_fit=4, n_test=4
    )
    report = repair(audited(settings), pathlib.Path(tmp_path / "out"))
    before, after = tensors_of(source), tensors_of(tmp_path / "out")
    assert "model.layers.0.mlp.down_proj.bias" in report["edited_tensors"] and not report["verification"]["problems"]
    for name in report["edited_tensors"]:
        np.testing.assert_allclose(after[name], before[name], atol=1e-4)


@pytest.mark.parametrize("strength", [0.3, 0.9])
def test_an_audit_estimates_the_repair_from_doses_and_fits(base, direction, strength):
    """What the lane of weights measures along the direction tells nearly the error that the repair itself finds."""
    u = made.unit(direction)
    candidate = changed(base, made.projected(direction, everywhere(strength)), made.rounded(8, 0))
    plan = Repair.of(base, candidate)
    found = []
    for one in plan.removed:
        own, after = (u @ w.tensors[one.tensor] for w in (base, candidate))
        lost = after - own
        found.append((-(lost @ own) / (own @ own), -(lost @ own) / np.linalg.norm(lost) / np.linalg.norm(own)))
    facts = repair_facts(*np.array(found).T)
    assert facts["repair_matrices"] == 16 and facts["repair_lost"] == 0
    assert facts["repair_error"] == pytest.approx(plan.error, rel=0.35)


def test_estimates_in_words():
    """A whole removal is lost, in float32 too; one with a peak in part."""
    whole = repair_facts(np.full(4, 1.0), np.full(4, 1.0))
    said = repairable(*whole.values())
    assert said.value == "by the base only" and "more than a million times" in said.meaning
    some = repair_facts(np.array([0.5, 1.0]), np.full(2, 0.9999))
    said = repairable(*some.values())
    assert some["repair_lost"] == 1 and "1 more tensors can only be restored from the base" in said.meaning
    exact = repair_facts(np.full(2, 0.5), np.full(2, 1.0))
    assert exact["repair_error"] < 1e-6 and "should then refuse as the base does" in repairable(*exact.values()).meaning
