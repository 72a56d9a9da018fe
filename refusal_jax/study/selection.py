"""Which candidate direction mediates refusal best (paper, section 2.3), evaluated lazily and exactly.

The rule filters candidates by layer, induce score and KL divergence, then takes the lowest bypass score. So pruned
layers are never run; *induce* runs first and only from the candidate's layer on, from a residual that is carried up the
layers; KL runs for those that pass; bypass for those that pass both. The pick is the full grid's.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from refusal_jax.chat.model import ChatModel
from refusal_jax.edits import Edits
from refusal_jax.errors import UserError, field, setting
from refusal_jax.models.attention import Context
from refusal_jax.models.decoder import Decoder
from refusal_jax.models.finite import check_finite
from refusal_jax.models.scores import kl_divergence, refusal_score
from refusal_jax.models.sharding import constrain, put, replicate, sharding_of
from refusal_jax.progress import Progress
from refusal_jax.study.activations import length_batches

SAVED = 8  # candidates, at least, that are scored between two writes to the ledger


@dataclasses.dataclass(frozen=True)
class Rule:
    """The filter: thresholds as in `config.select`, and the model's number of layers."""

    n_layers: int
    kl_threshold: float = 0.1
    induce_threshold: float = 0.0
    prune_fraction: float = 0.2

    @property
    def layer_limit(self) -> int:
        """Candidates at this layer or above are pruned."""
        return int(self.n_layers * (1.0 - self.prune_fraction))

    def verdict(self, row: dict) -> str:
        """Why the rule discards a candidate: "layer", "nan", "induce", "kl"; or "" if it passes.

        row: published-format scores; those not evaluated are None and pass.
        """
        scores = [row[key] for key in ("steering_score", "kl_div_score", "refusal_score") if row[key] is not None]
        if row["layer"] >= self.layer_limit:
            return "layer"
        if any(math.isnan(score) for score in scores):
            return "nan"
        if row["steering_score"] is not None and row["steering_score"] < self.induce_threshold:
            return "induce"
        return "kl" if row["kl_div_score"] is not None and row["kl_div_score"] > self.kl_threshold else ""


def pick(rows: list[dict], rule: Rule) -> dict:
    """The selected candidate among published-format rows: lowest `refusal_score` of those that pass the rule.

    Ties go to the first in the published order (position, then layer). Raises UserError that says which filter removed
    how many, and how near the nearest came, if none passes.
    """
    rows = sorted(rows, key=lambda row: (row["position"], row["layer"]))
    passing = [row for row in rows if not rule.verdict(row) and row["refusal_score"] is not None]
    if passing:
        return min(passing, key=lambda row: row["refusal_score"])
    counts = {why: sum(rule.verdict(row) == why for row in rows) for why in ("layer", "nan", "induce", "kl")}
    by_kl = [row for row in rows if rule.verdict(row) == "kl"]
    by_induce = [row for row in rows if rule.verdict(row) == "induce"]
    nearest = min(by_kl, key=lambda r: r["kl_div_score"], default=None) or max(
        by_induce, key=lambda r: r["steering_score"], default=None
    )
    nearby = (
        ""
        if nearest is None
        else (
            f" Nearest: position {nearest['position']}, layer {nearest['layer']}, "
            f"induce {nearest['steering_score']:.3f}"
            + ("" if nearest["kl_div_score"] is None else f", KL {nearest['kl_div_score']:.4f}")
            + "."
        )
    )
    grid = setting("config.select.full_grid", True)
    raise UserError(
        f"No candidate direction passes the filter: of {len(rows)}, {counts['layer']} are at layer {rule.layer_limit} "
        f"or above, {counts['nan']} have NaN scores, {counts['induce']} have an induce score under "
        f"{rule.induce_threshold}, {counts['kl']} of the rest a KL over {rule.kl_threshold}.{nearby} This model's refusal "
        f"may not be a single direction; to look further, raise {field('select.kl_threshold')} or lower "
        f"{field('select.induce_threshold')}{f', or see all scores with {grid}' if grid else ''}."
    )


def _for_each(edits: Edits, tree, prompts: int):
    """Every edit with every prompt, as rows of one batch: edits and prompts' arrays, edit by edit."""
    tiled = jax.tree.map(lambda a: jnp.tile(a, (edits.rows, *(1,) * (a.ndim - 1))), tree)
    return jax.tree.map(lambda a: jnp.repeat(a, prompts, axis=0), edits), tiled


@jax.jit
def last_logits(decoder: Decoder, tokens_bt, mask_bt, edits: Edits):
    """Logits at the last token, float32 `[B, V]`, V as stored, and whether they are finite, bool `[B]`."""
    logits_bv, finite_b = decoder.next_logits(decoder.forward(tokens_bt, mask_bt, edits).resid_btd)
    return constrain(decoder.mesh, logits_bv, "batch", "vocab"), replicate(decoder.mesh, finite_b)


@jax.jit
def score_edits(decoder: Decoder, tokens_bt, mask_bt, edits: Edits, base_bv, refusal_ids):
    """Refusal scores and KLs against the baseline logits `base_bv` of B prompts under R edits, two `[R, B]`."""
    shape = edits.rows, len(tokens_bt)
    edits, (tokens, mask, base) = _for_each(edits, (tokens_bt, mask_bt, base_bv), len(tokens_bt))
    logits, _ = last_logits(decoder, constrain(decoder.mesh, tokens, "batch"), mask, edits)
    scores = refusal_score(logits, refusal_ids), kl_divergence(base, logits)
    return replicate(decoder.mesh, tuple(x.reshape(shape) for x in scores))


@jax.jit
def score_from_layer(decoder: Decoder, x_btd, mask_bt, edits: Edits, layer, refusal_ids):
    """Refusal scores `[R, B]` of B prompts whose residual at the input of block `layer` is `x_btd`, under R edits."""
    shape = edits.rows, len(x_btd)
    edits, (x, mask) = _for_each(edits, (x_btd, mask_bt), len(x_btd))
    x = decoder.run_layers(x, Context.of_prompt(decoder.cfg, mask), edits, layer, decoder.cfg.n_layers)
    return replicate(decoder.mesh, refusal_score(decoder.logits(x[:, -1:])[:, 0], refusal_ids).reshape(shape))


@partial(jax.jit, donate_argnames="x_btd")
def advance(decoder: Decoder, x_btd, mask_bt, edits: Edits, layer):
    """The residual after block `layer`, from the one before it."""
    return decoder.run_layers(x_btd, Context.of_prompt(decoder.cfg, mask_bt), edits, layer, layer + 1)


@jax.jit
def embed(decoder: Decoder, tokens_bt):
    return decoder.embed_tokens(tokens_bt)


@dataclasses.dataclass
class PromptScorer:
    """Val prompts of one side as device batches, with their baseline logits; scores edits as means over prompts.

    at_once: how many edits are scored together, as rows of one batch with every prompt.
    """

    model: ChatModel
    batches: list  # (valid rows, tokens, mask, no edits, baseline logits), on the devices
    refusal_ids: np.ndarray
    at_once: int

    @classmethod
    def build(cls, model: ChatModel, instructions: list[str], refusal_ids, batch_size: int) -> "PromptScorer":
        """Raises UserError if baseline logits are not finite."""
        batches, finite, ids = [], [], np.asarray(refusal_ids, np.int32)
        size = min(batch_size, -(-len(instructions) // 8) * 8)
        for index, batch in length_batches(model, instructions, size):
            placed = model.put(batch.tokens, batch.mask)
            logits, finite_b = last_logits(model.decoder, *placed)
            batches.append((len(index), *placed, logits))
            finite.append(finite_b)
        # Of the last batch, the rows beyond the prompts are repeats of the last.
        check_finite(np.concatenate(jax.device_get(finite)), model.decoder.dtype, "Selection has no baseline")
        return cls(model, batches, ids, max(batch_size // size, 1))

    def _means(self, edits: Edits, at_once: int, score: Callable[[Edits, int], object]):
        """Float64 means over prompts, `[C]`, of each array that `score(edits, number of batch)` returns as `[R, B]`.

        edits: C rows, which go to `score` `at_once` at a time, so that one compiled program serves them; all results cross
        to the host together.
        """
        edits = edits.for_batch(edits.rows, self.model.config.n_layers, self.model.config.d_model)
        groups = -(-edits.rows // at_once)
        index = np.minimum(np.arange(groups * at_once), edits.rows - 1).reshape(groups, at_once)
        parts = [put(edits.take(rows), sharding_of(self.model.mesh, None)) for rows in index]
        out = jax.device_get([[score(part, number) for number in range(len(self.batches))] for part in parts])

        def mean(*values_rb):  # of one group, from each batch
            valid = [np.asarray(v, np.float64)[:, :n] for v, (n, *_) in zip(values_rb, self.batches, strict=True)]
            return np.concatenate(valid, axis=1).mean(axis=1)

        means = [jax.tree.map(mean, *group) for group in out]
        return jax.tree.map(lambda *groups: np.concatenate(groups)[: edits.rows], *means)

    def ablated(self, directions_cd) -> tuple[np.ndarray, np.ndarray]:
        """Mean refusal scores `[C]` and mean KLs `[C]` under ablation of each direction."""

        def score(edits, number):
            _, tokens, mask, _, base = self.batches[number]
            return score_edits(self.model.decoder, tokens, mask, edits, base, self.refusal_ids)

        return self._means(Edits.ablate(directions_cd), self.at_once, score)

    def climb(self, layers: int, positions: int) -> Iterable[tuple[int, Callable[[np.ndarray], np.ndarray]]]:
        """Yields (layer, induce) upwards; `induce(directions_cd)` gives mean scores `[C]` when each is added there.

        positions: the usual C, which is divided evenly.
        """
        decoder = self.model.decoder
        residuals = [embed(decoder, tokens) for _, tokens, *_ in self.batches]
        at_once = -(-positions // -(-positions // self.at_once))

        def induce(directions_cd):
            def score(edits, number):
                mask = self.batches[number][2]
                return score_from_layer(decoder, residuals[number], mask, edits, layer, self.refusal_ids)

            return self._means(Edits.add(directions_cd, layer), at_once, score)

        for layer in range(layers):
            yield layer, induce
            residuals = [
                advance(decoder, x, mask, none, layer)
                for x, (_, _, mask, none, _) in zip(residuals, self.batches, strict=True)
            ]


def evaluate_candidates(
    model: ChatModel,
    directions_lpd: np.ndarray,
    harmful: list[str],
    harmless: list[str],
    refusal_ids,
    rule: Rule,
    *,
    full_grid: bool,
    batch_size: int,
    known: Sequence[dict] = (),
    save: Callable[[list[dict]], None] = lambda rows: None,
) -> list[dict]:
    """Published-format scores of the candidates; those that the rule makes unnecessary are None unless `full_grid`.

    directions_lpd: `[L, P, D]`, candidate (position p - P, layer l). known: rows of an interrupted run, later ones
    superseding earlier ones; save: called with rows as they gain scores.
    """
    n_layers, positions, _ = directions_lpd.shape
    known = {(row["position"], row["layer"]): row for row in known}
    rows = [
        known.get((p - positions, layer))
        or {
            "position": p - positions,
            "layer": layer,
            "refusal_score": None,
            "steering_score": None,
            "kl_div_score": None,
        }
        for layer in range(n_layers)
        for p in range(positions)
    ]
    for row in rows:
        if not np.isfinite(directions_lpd[row["layer"], row["position"]]).all():  # float16 overflowed: discarded
            row.update(refusal_score=math.nan, steering_score=math.nan, kl_div_score=math.nan)
    layers = n_layers if full_grid else min(rule.layer_limit, n_layers)
    harmless_val = PromptScorer.build(model, harmless, refusal_ids, batch_size)
    harmful_val = PromptScorer.build(model, harmful, refusal_ids, batch_size)

    def fill(key, rows, score):
        """Scores those rows that are still wanted and lack `key`."""
        rows = [row for row in rows if row[key] is None and (full_grid or not rule.verdict(row))]
        if rows:
            values = score(np.stack([directions_lpd[row["layer"], row["position"]] for row in rows]))
            for row, value in zip(rows, values, strict=True):
                row[key] = float(value)
            save(rows)

    asked = rows[: layers * positions]
    with Progress("selection", 3 * len(asked), "score") as bar:
        for layer, induce in harmless_val.climb(layers, positions):
            fill("steering_score", asked[layer * positions : (layer + 1) * positions], induce)
            bar.update(positions)
        for key, scorer, which in (("kl_div_score", harmless_val, 1), ("refusal_score", harmful_val, 0)):
            wanted = [row for row in asked if row[key] is None and (full_grid or not rule.verdict(row))]
            bar.update(len(asked) - len(wanted))
            step = scorer.at_once * -(-SAVED // scorer.at_once)
            for start in range(0, len(wanted), step):
                part = wanted[start : start + step]
                fill(key, part, lambda directions, scorer=scorer, which=which: scorer.ablated(directions)[which])
                bar.update(len(part))
    return sorted(rows, key=lambda row: (row["position"], row["layer"]))
