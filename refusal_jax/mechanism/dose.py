"""Measures how refusal and damage depend on the dose of an intervention, and at which dose half of the prompts have changed.

A dose is the part of a direction that is ablated at every layer, site and token (1 is the paper's ablation), or the multiple of
it that is added at its layer. Every prompt meets every dose, so that all doses are compared in pairs.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Bool, Float

from refusal_jax.edits import Edits
from refusal_jax.judges.statistics import DRAWS, DRAWS_SEED, PairedRates, Rate, bounded, mean_interval, wilson_interval
from refusal_jax.mechanism.edited_prompts import EditedPrompts

HALF = 0.5


@dataclasses.dataclass(frozen=True)
class Response:
    """Holds what M edits of rising strength make of n prompts, at the prompt's last token, float64.

    scores_mn: refusal scores. kl_mn: KL divergences of the next token's distribution from the unedited one, in nats.
    """

    scores_mn: Float[np.ndarray, "M n"]
    kl_mn: Float[np.ndarray, "M n"]

    @property
    def refused_mn(self) -> Bool[np.ndarray, "M n"]:
        """Returns whether the refusal tokens together are more probable than all others, bool `[M, n]`."""
        return np.asarray(self.scores_mn > 0)


def respond(
    prompts: EditedPrompts,
    edits: Edits,
    known: Sequence[dict] = (),
    save: Callable[[list[dict]], None] = lambda rows: None,
) -> Response:
    """Returns what each of M edits makes of the prompts.

    known: rows that `save` got in an interrupted run, `{"edit", "scores", "kl"}`. As many edits go together as fill a batch.
    Raises UserError for values that are not finite.
    """
    done = {row["edit"]: row for row in known}
    left = [number for number in range(edits.rows) if number not in done]
    for start in range(0, len(left), prompts.at_once):
        part = left[start : start + prompts.at_once]
        found = prompts.read(edits.take(part))
        values = zip(part, found.scores_mn.tolist(), found.kl_mn.tolist(), strict=True)
        rows = [{"edit": number, "scores": scores, "kl": kl} for number, scores, kl in values]
        save(rows)
        done |= {row["edit"]: row for row in rows}
    scores, kl = (np.array([done[number][key] for number in range(edits.rows)]) for key in ("scores", "kl"))
    return Response(scores.reshape(edits.rows, -1), kl.reshape(edits.rows, -1))


def crossings(
    at_m: Float[np.ndarray, " M"], shares_rm: Float[np.ndarray, "R M"], between: bool = True
) -> Float[np.ndarray, " R"]:
    """Returns where each of R falling curves first reaches one half, infinity where it never does.

    at_m: the M places, rising. between: whether the curves are lines between the places; else it is the first place at which one
    half is reached.
    """
    reached_rm = shares_rm <= HALF
    first_r = reached_rm.argmax(axis=1)
    rows, before_r = np.arange(len(shares_rm)), np.maximum(first_r - 1, 0)
    found_r = at_m[first_r].astype(np.float64)
    if between:
        above_r, below_r = shares_rm[rows, before_r], shares_rm[rows, first_r]
        part_r = (above_r - HALF) / np.where(first_r > 0, above_r - below_r, 1.0)
        inside_r = at_m[before_r] + part_r * (at_m[first_r] - at_m[before_r])
        found_r = np.where(first_r > 0, inside_r, found_r)
    return np.where(reached_rm.any(axis=1), found_r, math.inf)


def half_place(at_m: Float[np.ndarray, " M"], kept_mn: Bool[np.ndarray, "M n"], between: bool = True) -> dict:
    """Returns where half of n prompts no longer are as they were, `{"at", "low", "high", "n"}`, None for a place beyond the last.

    at_m: the places, rising. kept_mn: at each of them, whether each prompt is as it was. between: as in `crossings`. The interval
    is the wider, on each side, of two: the 95 % percentile bootstrap over prompts, and the places at which the Wilson
    interval of the share holds one half. The bootstrap alone would have no width where all prompts agree, however few they are.
    """
    n = kept_mn.shape[1]
    if not n:
        return {"at": None, "low": None, "high": None, "n": 0}
    drawn_rn = np.random.default_rng(DRAWS_SEED).multinomial(n, np.full(n, 1 / n), size=DRAWS) / n
    found_r = crossings(at_m, np.asarray(drawn_rn @ kept_mn.T.astype(np.float64)), between)
    wilson = [wilson_interval(int(count), n) for count in kept_mn.sum(axis=1)]
    low, high = crossings(at_m, np.array(wilson).T, between)
    bounds = np.quantile(found_r, 0.025, method="lower"), np.quantile(found_r, 0.975, method="higher")
    at = crossings(at_m, kept_mn.mean(axis=1)[None], between)[0]
    row = {"at": float(at), "low": float(min(low, bounds[0])), "high": float(max(high, bounds[1])), "n": n}
    return bounded(row)


def dose_rows(doses_m: Float[np.ndarray, " M"], refused: Response, damage: Response) -> list[dict]:
    """Returns a row for each dose: "dose", "refused" (a rate with its Wilson interval), "change" (of that rate from the first
    dose, with its interval for pairs), "score" and "kl" (means with intervals). damage: the response whose KL is reported."""
    before, rows = refused.refused_mn[0].astype(int).tolist(), []
    for dose, now_n, score_n, kl_n in zip(doses_m, refused.refused_mn, refused.scores_mn, damage.kl_mn, strict=True):
        pairs = PairedRates.of(before, now_n.astype(int).tolist())
        low, high = pairs.interval
        rows.append(
            {
                "dose": float(dose),
                "refused": bounded(Rate.of(now_n.tolist()).row),
                "change": bounded({"mean": pairs.difference, "low": low, "high": high}),
                "score": bounded(mean_interval(score_n)),
                "kl": bounded(mean_interval(kl_n)),
            }
        )
    return rows


def removed_dose(doses_m: Float[np.ndarray, " M"], refused: Response, damage: Response) -> dict:
    """Returns the dose at which half of the prompts that the first dose leaves refused are no longer refused, as `half_place`
    does, with the mean KL of `damage` there as "kl"."""
    return _with_kl(doses_m, refused.refused_mn[:, refused.refused_mn[0]], damage)


def caused_dose(doses_m: Float[np.ndarray, " M"], refused: Response, damage: Response) -> dict:
    """Returns the dose at which half of the prompts that the first dose leaves answered are refused, as `removed_dose` does."""
    return _with_kl(doses_m, ~refused.refused_mn[:, ~refused.refused_mn[0]], damage)


def _with_kl(doses_m: np.ndarray, kept_mn: np.ndarray, damage: Response) -> dict:
    found = half_place(doses_m, kept_mn)
    kl = None if found["at"] is None else float(np.interp(found["at"], doses_m, damage.kl_mn.mean(axis=1)))
    return found | {"kl": kl}
