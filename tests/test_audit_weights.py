"""The lane "weights": doses of known edits of the embedded model, and what must not be taken for one."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

from refusal_jax.audit.base_directions import BaseDirections, check_memory
from refusal_jax.audit.dose import weight_statistics
from refusal_jax.audit.lanes.weights import LANE
from refusal_jax.audit.null import rounded
from refusal_jax.audit.settings import AuditSettings
from refusal_jax.audit.storage import storage
from refusal_jax.audit.subject import Subject, draw_prompts
from refusal_jax.audit.weights import ArrayWeights
from refusal_jax.chat.model import demo_model_path, load_model
from refusal_jax.checkpoints.matrices import Matrix, check_comparable, matrices
from refusal_jax.checkpoints.spectra import separable_rank
from refusal_jax.checkpoints.tensor_files import TensorFiles
from refusal_jax.errors import UserError
from refusal_jax.models.families import hf_shapes


@pytest.fixture(scope="module")
def demo():
    """The embedded model: its chat model, weights, prompts, and directions."""
    model, files = load_model(demo_model_path()), TensorFiles.open(demo_model_path())
    base = ArrayWeights(model.config, {name: files.read(name).astype(np.float32) for name in hf_shapes(model.config)})
    prompts = draw_prompts(AuditSettings())
    directions = BaseDirections.measure(model, prompts["harmful_fit"], prompts["harmless_fit"])
    return SimpleNamespace(model=model, base=base, prompts=prompts, directions=directions, shared={})


def unit(values):
    return values / np.linalg.norm(values)


@pytest.fixture(scope="module")
def refusal(demo):
    """A refusal direction of other prompts than the audit's, of the middle layers."""
    rows = [
        i for i, layer in enumerate(demo.directions.layers_n) if layer == 4 and demo.directions.positions_n[i] == -1
    ]
    noise = np.random.default_rng(5).standard_normal(demo.base.cfg.d_model)
    r = unit(demo.directions.refusal_nd[rows[0]])
    return unit(r + 0.15 * unit(noise - (noise @ r) * r))


def changed(base, change, wanted=None):
    """Weights whose matrices are `change(matrix, values [D, F])`, for those that are wanted."""
    tensors = dict(base.tensors)
    for matrix in matrices(base.cfg, embeddings=True) if wanted is None else wanted:
        values = np.asarray(change(matrix, matrix.read(base).astype(np.float64)), np.float32)
        tensors[matrix.piece.name] = (
            values if matrix.writes and matrix.path != "embed" else np.ascontiguousarray(values.T)
        )
    return ArrayWeights(base.cfg, tensors)


def side(cfg, writes=True, layers=None) -> list[Matrix]:
    return [one for one in matrices(cfg) if one.writes == writes and (layers is None or one.layer in layers)]


def ablated(base, u, strength=1.0, wanted=None, row_norms=False):
    """Weights from which `strength` of the orthonormal columns or the vector u was removed."""

    def edit(matrix, w):
        q = (u(matrix) if callable(u) else u).reshape(w.shape[0], -1)
        share = strength(matrix) if callable(strength) else strength
        if not row_norms:
            return w - share * q @ (q.T @ w)
        lengths = np.linalg.norm(w, axis=1, keepdims=True)
        turned = w / lengths - share * q @ (q.T @ (w / lengths))
        return turned / np.linalg.norm(turned, axis=1, keepdims=True) * lengths

    return changed(base, edit, side(base.cfg) if wanted is None else wanted)


def stored(weights, bits):
    linear = matrices(weights.cfg)
    return changed(
        weights,
        lambda m, w: rounded(w.astype(np.float32), bits) if m.writes else rounded(w.T.astype(np.float32), bits).T,
        linear,
    )


def tuned(base, size=0.08, seed=1):
    """A stand-in of a fine-tune: each matrix gets a change of falling singular values, of `size` of its norm."""
    rng = np.random.default_rng(seed)

    def add(matrix, w):
        k = 24
        left, right = rng.standard_normal((w.shape[0], k)), rng.standard_normal((k, w.shape[1]))
        change = left / np.arange(1, k + 1) @ right + 0.2 * rng.standard_normal(w.shape)
        return w + size * np.linalg.norm(w) / np.linalg.norm(change) * change

    return changed(base, add, matrices(base.cfg))


def mixed(one, other, share):
    tensors = {name: share * one.tensors[name] + (1 - share) * other.tensors[name] for name in one.tensors}
    return ArrayWeights(one.cfg, tensors)


def tent(matrix):
    distance = abs(matrix.layer - 5) / 4
    return 0.0 if distance > 1 else (0.84 if matrix.path == "blocks.o" else 1.15) * (1 - 0.8 * distance)


def by_rows(r, strength):
    """An oblique edit: the direction is taken out of rows of length 1, whose lengths are then given back."""

    def edit(matrix, w):
        lengths = np.linalg.norm(w, axis=1, keepdims=True)
        return w - strength * lengths * np.outer(r, r @ (w / lengths))

    return edit


def edits(demo, refusal):
    """Name -> (candidate, true median dose)."""
    base, d = demo.base, demo.directions
    r, cfg = refusal, base.cfg
    noise = np.random.default_rng(3).standard_normal(len(r))
    far = unit(0.7 * r + 0.714 * unit(noise - (noise @ r) * r))
    per_layer = {int(l): unit(v) for l, v, p in zip(d.layers_n, d.refusal_nd, d.positions_n, strict=True) if p == -1}
    spread = np.linalg.qr(np.stack([r, *np.random.default_rng(4).standard_normal((2, len(r)))], 1))[0]
    full = ablated(base, r)
    tents = [tent(one) for one in side(cfg) if tent(one)]
    return {
        "full": (full, 1.0),
        "a tenth": (ablated(base, r, 0.1), 0.1),
        "a third": (ablated(base, r, 0.3), 0.3),
        "attention of two layers": (ablated(base, r, 1.0, [m for m in side(cfg, layers=(3, 4)) if m.path == "blocks.o"]), 1.0),
        "embedding": (ablated(base, r, 0.5, [m for m in matrices(cfg, True) if m.path == "embed"]), 0.5),
        "per layer": (ablated(base, lambda m: per_layer[min(m.layer + 1, cfg.n_layers - 1)]), 1.0),
        "far direction": (ablated(base, far), 1.0),
        "tent": (ablated(base, r, tent), float(np.median(tents))),
        "rows keep their lengths": (ablated(base, r, row_norms=True), 0.99),
        "an adapter for rows of length 1": (changed(base, by_rows(r, 0.6), side(cfg)), 0.6),
        "reflection": (ablated(base, r, 2.0), 2.0),
        "rank 3": (ablated(base, spread), 1.0),
        "readers": (ablated(base, r, 0.6, side(cfg, writes=False)), 0.6),
        "added": (ablated(base, r, -0.3), -0.3),
        "int4": (stored(ablated(base, r, 0.5), 4), 0.5),
        "tuned after": (mixed(ablated(tuned(base), r, 0.5), tuned(base), 1.0), 0.5),
        "half merged, int4": (stored(mixed(full, tuned(base), 0.5), 4), 0.5),
        "smaller as a whole": (changed(ablated(base, r, 0.5), lambda m, w: 0.97 * w, side(cfg)), 0.5),
    }  # fmt: skip


def test_doses_are_recovered(demo, refusal):
    missed = {}
    for name, (candidate, true) in edits(demo, refusal).items():
        found = weight_statistics(demo.base, candidate, demo.directions)
        dose = found.dose
        if not found.dosed or abs(dose.value - true) > 0.02 or not dose.low - 1e-3 <= true <= dose.high + 1e-3:
            missed[name] = (true, dose)
    assert missed == {}


def harmless(demo):
    base, cfg = demo.base, demo.base.cfg
    rng = np.random.default_rng(2)
    width = cfg.d_model

    def adapter(rank, size):
        def add(matrix, w):
            change = rng.standard_normal((w.shape[0], rank)) @ rng.standard_normal((rank, w.shape[1]))
            return w + size * np.linalg.norm(w) / np.linalg.norm(change) * change

        return changed(base, add, matrices(cfg))

    style = unit(demo.directions.control_nd[0])
    return {
        "noise": changed(base, lambda m, w: w + 0.03 * w.std() * rng.standard_normal(w.shape)),
        "int8": stored(base, 8),
        "int4": stored(base, 4),
        "pruned": changed(base, lambda m, w: np.where(np.abs(w) < np.quantile(np.abs(w), 0.3), 0, w), matrices(cfg)),
        "smaller": changed(base, lambda m, w: 0.9 * w, matrices(cfg)),
        "adapter of rank 1": adapter(1, 0.05),
        "adapter of rank 16": adapter(16, 0.05),
        "fine-tune": tuned(base),
        "random direction": ablated(base, unit(rng.standard_normal(width))),
        "content-free direction": ablated(base, style),
    }


def test_harmless_changes_have_no_dose(demo):
    found = {name: weight_statistics(demo.base, weights, demo.directions) for name, weights in harmless(demo).items()}
    assert {name: one.dosed for name, one in found.items() if one.dosed} == {}
    assert found["adapter of rank 1"].rank == 1 and found["adapter of rank 16"].rank == 16
    assert found["noise"].rank == 0 and found["fine-tune"].rank == 0
    assert len(found["random direction"].projected) == 16 and not found["fine-tune"].projected
    assert not found["smaller"].projected and all(
        row.fit.scale == pytest.approx(0.1, abs=1e-3) for row in found["smaller"].changed
    )


def reordered(base, what):
    """A model that computes the same in another order of its neurons or of the stream's entries."""
    rng, tensors, cfg = np.random.default_rng(0), dict(base.tensors), base.cfg
    stream = rng.permutation(cfg.d_model)
    for name, values in tensors.items():
        if what == "stream":
            own = "o_proj" in name or "down_proj" in name or values.ndim == 1
            tensors[name] = values[stream] if own else np.ascontiguousarray(values[:, stream])
    for layer in range(cfg.n_layers) if what == "neurons" else ():
        order, mlp = rng.permutation(cfg.d_mlp), f"model.layers.{layer}.mlp."
        tensors |= {f"{mlp}{part}_proj.weight": tensors[f"{mlp}{part}_proj.weight"][order] for part in ("gate", "up")}
        tensors[f"{mlp}down_proj.weight"] = np.ascontiguousarray(tensors[f"{mlp}down_proj.weight"][:, order])
    return ArrayWeights(cfg, tensors)


@pytest.mark.parametrize("what", ("neurons", "stream"))
def test_another_order_hides_nothing(demo, refusal, what):
    same = weight_statistics(demo.base, reordered(demo.base, what), demo.directions)
    assert all(row.fit is None for row in same.rows) and same.comparison.turned == (what == "stream")
    found = weight_statistics(demo.base, reordered(ablated(demo.base, refusal, 0.5), what), demo.directions)
    assert found.dose.value == pytest.approx(0.5, abs=1e-3) and len(found.dosed) == 16


def test_gains_that_were_multiplied_into_readers_are_no_change(demo):
    tensors = dict(demo.base.tensors)
    for layer in range(demo.base.cfg.n_layers):
        start = f"model.layers.{layer}."
        gain = tensors[f"{start}input_layernorm.weight"]
        tensors[f"{start}input_layernorm.weight"] = np.ones_like(gain)
        for part in "qkv":
            name = f"{start}self_attn.{part}_proj.weight"
            tensors[name] = tensors[name] * gain
    found = weight_statistics(demo.base, ArrayWeights(demo.base.cfg, tensors), demo.directions)
    assert not found.changed and not found.comparison.vectors and sum(row.folded for row in found.rows) == 24


def run_lane(demo, candidate, base=None, **settings):
    chosen = AuditSettings(**{"null_size": 16, **settings})
    opened = [SimpleNamespace(weights=one, model=demo.model) for one in (candidate, base or demo.base)]
    return LANE.run(Subject(chosen, *opened, demo.shared))


def test_lane_tells_dose_method_and_layers(demo, refusal):
    found = run_lane(demo, ablated(demo.base, refusal, tent))
    facts = found.facts
    assert facts["kind"] == "removed" and facts["side"] == "writers" and facts["dosed_layers"] == [1, 2, 3, 4, 5, 6, 7]
    assert "rise and fall" in facts["method"] and "one direction" in facts["method"]
    assert facts["dose_p"] == pytest.approx(1 / 17) and facts["alignment"] > 0.95 and facts["directions"]
    assert {row["layer"] for row in facts["layers"]} >= {None, *range(8)} and found.evidence[0].statistic == "dose"
    assert found.record["facts"]["dose"] == pytest.approx(facts["dose"])
    assert run_lane(demo, demo.base).facts["kind"] == "identical"
    assert run_lane(demo, stored(demo.base, 4)).facts["kind"] == "rounded"
    assert run_lane(demo, changed(demo.base, lambda m, w: 1.1 * w)).facts["kind"] == "equivalent"


def test_lane_tells_biases_and_gains(demo, refusal):
    raw = demo.directions.refusal_nd[(demo.directions.layers_n == 4) & (demo.directions.positions_n == -1)][0]
    cfg = dataclasses.replace(demo.base.cfg, mlp_bias=True)
    tensors = dict(demo.base.tensors)
    for layer in range(cfg.n_layers):
        for part, size in (("gate", cfg.d_mlp), ("up", cfg.d_mlp), ("down", cfg.d_model)):
            tensors[f"model.layers.{layer}.mlp.{part}_proj.bias"] = np.zeros(size, np.float32)
    tensors["model.layers.3.mlp.down_proj.bias"] = -raw.astype(np.float32)
    found = run_lane(demo, ArrayWeights(cfg, tensors)).facts
    assert found["kind"] == "bias" and found["bias_shift"] == pytest.approx(-1, abs=0.05) and not found["dosed"]
    gains = dict(demo.base.tensors)
    r = np.abs(refusal) / np.abs(refusal).max()
    gains |= {name: v * (1 - 0.9 * r**2).astype(np.float32) for name, v in gains.items() if "layernorm" in name}
    found = run_lane(demo, ArrayWeights(demo.base.cfg, gains)).facts
    assert found["kind"] == "gains" and found["gain_dose"] > 0.1 and not found["identical"]


def test_what_no_matrix_shows_is_no_identity(demo):
    """A gain, and an unembedding that the candidate has not: nothing is taken for equal that was not compared."""
    name = "model.layers.2.input_layernorm.weight"
    facts = run_lane(
        demo, ArrayWeights(demo.base.cfg, demo.base.tensors | {name: demo.base.tensors[name] * 1.0001})
    ).facts
    assert facts["kind"] == "changed" and not facts["identical"] and facts["changed_vectors"] == 1
    tied = {name: values for name, values in demo.base.tensors.items() if name != "lm_head.weight"}
    tied_weights = ArrayWeights(dataclasses.replace(demo.base.cfg, tied_embeddings=True), tied)
    assert run_lane(demo, tied_weights).facts["matrices"] == len(matrices(demo.base.cfg, embeddings=True)) - 1


def test_some_heads_alone(demo, refusal):
    """An edit of the columns of one head: the dose is that of what was edited."""
    r = refusal[:, None]

    def edit(matrix, w):
        w = w.copy()
        w[:, 32:64] -= 0.7 * r @ (r.T @ w[:, 32:64])
        return w

    heads = changed(demo.base, edit, [one for one in side(demo.base.cfg) if one.path == "blocks.o"])
    found = weight_statistics(demo.base, heads, demo.directions)
    assert found.dose.value == pytest.approx(0.7, abs=1e-3) and len(found.dosed) == 8
    assert found.dosed[0].fit.changed == pytest.approx(0.25)


class Unrunnable:
    """A checkpoint whose weights can be read, and whose model cannot be loaded."""

    def __init__(self, weights):
        self.weights = weights

    @property
    def model(self):
        raise UserError("There is no tokenizer.")


def test_lane_without_a_model_still_tells_what_no_prompt_is_needed_for(demo, refusal):
    candidate = ablated(demo.base, refusal, 0.5)
    opened = [Unrunnable(one) for one in (candidate, demo.base)]
    found = LANE.run(Subject(AuditSettings(null_size=16), *opened, {}))
    assert found.facts["kind"] == "projection" and found.facts["blind_strength"] == pytest.approx(0.5, abs=1e-3)
    assert "dose" not in found.facts and found.evidence[0].value == "not measured"


def test_a_base_that_does_not_fit_into_memory_is_not_run(demo, tmp_path):
    (tmp_path / "meminfo").write_text("MemTotal:  8192 kB\nMemAvailable:  4096 kB\n")
    with pytest.raises(UserError, match="take 0 GiB in memory, and 0 GiB are free. Audit where it can be run"):
        check_memory(demo.base.cfg, "float32", tmp_path / "meminfo")
    check_memory(demo.base.cfg, "float32")
    check_memory(demo.base.cfg, "float32", tmp_path / "none")


def test_lane_says_when_nothing_can_be_told(demo):
    rng = np.random.default_rng(0)
    turn = np.linalg.qr(rng.standard_normal((demo.base.cfg.d_model,) * 2))[0]
    found = run_lane(demo, changed(demo.base, lambda m, w: turn @ w)).facts
    assert found["kind"] == "moved" and found["basis_changed"] and not found["dosed"]


def test_refusal_directions_need_prompts(demo):
    with pytest.raises(UserError, match="there are 1 harmful and 2 harmless"):
        BaseDirections.measure(demo.model, demo.prompts["harmful_fit"][:1], demo.prompts["harmless_fit"][:2])


def test_checkpoints_of_other_shapes_are_not_compared(demo):
    other = dataclasses.replace(demo.base.cfg, d_mlp=128)
    with pytest.raises(UserError, match="cannot be compared with the base's"):
        check_comparable(demo.base.cfg, other)
    check_comparable(demo.base.cfg, dataclasses.replace(demo.base.cfg, vocab_size=720, family="mistral"))


def test_a_resized_vocabulary_leaves_the_layers_comparable(demo, refusal):
    candidate = ablated(demo.base, refusal)
    tensors = {
        name: np.concatenate([v, v[:21]]) if name in ("model.embed_tokens.weight", "lm_head.weight") else v
        for name, v in candidate.tensors.items()
    }
    grown = ArrayWeights(dataclasses.replace(demo.base.cfg, vocab_size=720), tensors)
    assert weight_statistics(demo.base, grown, demo.directions).dose.value == pytest.approx(1, abs=1e-3)


def test_storage_is_told_from_values():
    rng = np.random.default_rng(0)
    w = rng.standard_normal((64, 256)).astype(np.float32)
    assert (storage(w, w).form, storage(w, w + 1e-3).form) == ("identical", "float32")
    for form, values in (
        ("float16", w.astype(np.float16).astype(np.float32)),
        ("8 bits", rounded(w, 8)),
        ("4 bits", rounded(w, 4)),
    ):
        assert storage(w, values).form == form and storage(w, values).explained
    moved = rounded(w + 0.5 * w.std() * rng.standard_normal(w.shape).astype(np.float32), 4)
    assert storage(w, moved).form == "4 bits" and not storage(w, moved).explained


def test_rank_of_a_change():
    rng = np.random.default_rng(0)
    for rank in (1, 8, 32):
        low = (rng.standard_normal((128, rank)) @ rng.standard_normal((rank, 96))).astype(np.float32)
        assert separable_rank(0 * low, low) == rank
        assert separable_rank(low, 2 * low + 1e-3 * rng.standard_normal(low.shape).astype(np.float32)) == rank
    full = rng.standard_normal((128, 96)).astype(np.float32)
    assert separable_rank(0 * full, full) == 0
