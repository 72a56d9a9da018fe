"""Judges the chosen traces: at once by rules, or in a thread of its own by a model, while more is read."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from refusal_jax.errors import UserError
from refusal_jax.judges.choice import WITHOUT_MODEL, parse_judges
from refusal_jax.judges.judge import Judge, Outcome, Verdict
from refusal_jax.judges.scores import REFUSAL_SCORE
from refusal_jax.monitor.settings import MonitorSettings
from refusal_jax.monitor.traces import Trace


def outcome_of(judge: Judge, verdict: Verdict) -> Outcome | None:
    """Returns what a reply does, as far as the judge can tell: one that only knows success does not tell a refusal from another
    failure."""
    if verdict.outcome is not None:
        return verdict.outcome
    if verdict.label:
        return Outcome.COMPLIES
    return Outcome.REFUSES if judge.of_refusals else None


class Judging:
    """A judge and, where it is a model, the thread that it works in."""

    def __init__(self, judge: Judge):
        self.judge = judge
        self.held: Judge | None = None  # with its model, from the first replies on
        self.needs_prompt = judge.name not in WITHOUT_MODEL
        self.thread = ThreadPoolExecutor(1, "judge") if self.needs_prompt else None

    @classmethod
    def of(cls, settings: MonitorSettings) -> "Judging":
        """Returns the judge that the settings name. Raises UserError as `parse_judges` does, and for one that judges no text."""
        if settings.judge == REFUSAL_SCORE:
            raise UserError(
                f"The judge {REFUSAL_SCORE} reads a model's probabilities, which logs do not have. Choose rules."
            )
        (judge,) = parse_judges([settings.judge], settings.judge_batch)
        return cls(judge)

    def submit(self, traces: Sequence[Trace]) -> "Future[list[Verdict | None]]":
        """Begins to judge traces, and returns what will hold their verdicts in order."""
        if self.thread is not None and traces:
            return self.thread.submit(self._judge, traces)
        done: Future[list[Verdict | None]] = Future()
        done.set_result(self._judge(traces) if traces else [])
        return done

    def _judge(self, traces: Sequence[Trace]) -> list[Verdict | None]:
        if self.held is None:
            self.held = self.judge.held()
        return self.held.judge([trace.row for trace in traces])

    def close(self) -> None:
        """Ends the thread, after what it has begun."""
        if self.thread is not None:
            self.thread.shutdown(wait=True, cancel_futures=True)
