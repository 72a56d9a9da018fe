"""Tells what replies do by any judge, whether it knows outcomes or tells success from failure alone."""

from collections.abc import Sequence

from refusal_jax import distributed
from refusal_jax.judges.degenerate import is_broken
from refusal_jax.judges.folded_text import folded
from refusal_jax.judges.judge import Judge
from refusal_jax.judges.judge import Outcome as Did


def judged(judge: Judge, rows: Sequence[dict]) -> list[Did | None]:
    """Returns what each reply does, `[{"prompt", "response", …}]`; None where the judge cannot tell. A judge that knows
    success from failure alone is believed but for broken text."""
    found = []
    for row, verdict in zip(rows, judge.judge(rows), strict=True):
        if verdict is None or verdict.outcome is not None:
            found.append(verdict and verdict.outcome)
        elif is_broken(folded(row["response"])):
            found.append(Did.BROKEN)
        else:
            found.append(Did.COMPLIES if verdict.label else Did.REFUSES)
    return found


def judged_once(judge: Judge, rows: Sequence[dict]) -> list[Did | None]:
    """Returns what `judged` does, the same in all processes, which must all call it: a judge that uses none of their devices,
    and may cost money, is asked by one of them alone."""
    everywhere = judge.uses_devices and not judge.elsewhere
    found = judged(judge, rows) if everywhere or distributed.first() else []
    return [one and Did(one) for one in distributed.share_json([one and str(one) for one in found])]
