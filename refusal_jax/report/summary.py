"""The numbers of a run as its report shows them: refusal rates of each condition with intervals, losses and other damage."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

from refusal_jax.chat.thoughts import is_unfinished
from refusal_jax.conditions import INTERVENTIONS, Ablate, Baseline, file_of, label_of, rank, split_stem, stem_of
from refusal_jax.judges.behaviours import REFUSAL, Behaviour
from refusal_jax.judges.evaluations import judges_in
from refusal_jax.judges.judge import Outcome
from refusal_jax.judges.statistics import Rate
from refusal_jax.judges.text import PAPERS
from refusal_jax.runs.artifacts import DAMAGE, SETUP, loss_name
from refusal_jax.runs.run import Run

REFUSAL_JUDGE = PAPERS.name
LARGE_LOSS = 0.2  # nats; the published runs' ablations stay under 0.06


@dataclasses.dataclass(frozen=True)
class JudgedCondition:
    """The completions of one data set under one intervention, as judged: the content of an evaluations file.

    rates: the refusal rate by each judge that judged it, or that of another behaviour. over_refusal: whether it is a set of
    harmless prompts that look harmful. behaviour: which the run is about, with the names of the sides.
    """

    dataset: str
    intervention: str
    rates: dict[str, Rate]
    completions: list[dict]
    over_refusal: bool = False
    behaviour: Behaviour = REFUSAL

    @classmethod
    def of(
        cls,
        dataset: str,
        intervention: str,
        evaluations: Mapping,
        over_refusal: bool = False,
        behaviour: Behaviour = REFUSAL,
    ) -> "JudgedCondition":
        """Returns the condition of an evaluations file in the published format."""
        condition = cls(dataset, intervention, {}, evaluations["completions"], over_refusal, behaviour)
        for judge in sorted(judges_in(evaluations)):
            condition.rates[judge] = Rate.of(condition.refusals(judge).values())
        return condition

    @property
    def harmless(self) -> bool:
        return self.dataset == "harmless" or self.over_refusal

    @property
    def label(self) -> str:
        return label_of(self.intervention, not self.harmless)

    @property
    def name(self) -> str:
        """Returns the data set and the intervention, if there is one, in words."""
        return f"{self.shown}, {self.label}" if self.label else self.shown

    @property
    def shown(self) -> str:
        """Returns what reports call the data set: of another behaviour than refusal, the name of the side."""
        return self.dataset if self.behaviour.is_refusal or self.over_refusal else self.behaviour.side(self.harmless)

    @property
    def unfinished(self) -> int:
        """Returns how many completions never left their thought, so that no judge saw them."""
        return sum(map(is_unfinished, self.completions))

    def failures(self, judge: str) -> dict[int, int]:
        """Returns 1 for what is no success and 0 for what is, by the completion's number, for those that the judge judged."""
        labels = ((i, c.get(f"is_jailbreak_{judge}")) for i, c in enumerate(self.completions))
        return {i: int(not label) for i, label in labels if label is not None}

    def refusals(self, judge: str) -> dict[int, int]:
        """Returns 1 for refused and 0 for not, by the completion's number, for those that the judge judged: by their outcome, or
        of a judge that knows none, by its failures."""
        outcomes = [c.get(f"outcome_{judge}") for c in self.completions]
        found = self.failures(judge)
        return {i: failed if outcomes[i] in (None, Outcome.REFUSES) else 0 for i, failed in found.items()}


def read_conditions(run: Run) -> list[JudgedCondition]:
    """Returns the conditions of the evaluations files that a run has recorded and that exist: harmful sets first, then by data
    set and intervention."""
    conditions, setup = [], run.read_json(SETUP) if run.exists(SETUP) else {}
    behaviour = Behaviour.of(run.manifest["config"])
    for name in [name for stage in run.manifest["stages"].values() for name in stage.get("writes", ())]:
        stem = stem_of(name)
        if name != file_of(stem, "evaluations") or not run.exists(name):
            continue
        dataset, intervention = split_stem(stem)
        over_refusal = dataset in setup.get("over_refusal", ())
        conditions.append(JudgedCondition.of(dataset, intervention, run.read_json(name), over_refusal, behaviour))

    def order(c: JudgedCondition):
        return c.harmless, c.over_refusal, c.dataset, rank(c.intervention)

    return sorted(conditions, key=order)


def judges_of(conditions: Sequence[JudgedCondition]) -> list[str]:
    """Returns every judge of any condition, the substring judge first."""
    return sorted({judge for c in conditions for judge in c.rates}, key=lambda judge: (judge != REFUSAL_JUDGE, judge))


def read_losses(run: Run) -> dict[str, dict[str, dict]]:
    """Returns `{data set: {intervention: {"ce_loss", "perplexity", "n_tokens"}}}` of the loss files that exist."""
    losses: dict[str, dict[str, dict]] = {}
    for intervention in INTERVENTIONS:
        name = loss_name(intervention)
        if run.exists(name):
            for dataset, values in run.read_json(name).items():
                losses.setdefault(dataset, {})[intervention] = values
    return losses


def read_damage(run: Run) -> dict[str, dict]:
    """Returns `{intervention: {"kl_per_token", "n_tokens", "per_row"}}`, the KL divergence from baseline on harmless prompts."""
    return run.read_json(DAMAGE)["kl"] if run.exists(DAMAGE) else {}


def loss_change(by_intervention: dict[str, dict], intervention: str) -> float | None:
    """Returns the cross-entropy under an intervention minus baseline, in nats per token; None if either was not measured."""
    if not {Baseline.name, intervention} <= by_intervention.keys():
        return None
    return by_intervention[intervention]["ce_loss"] - by_intervention[Baseline.name]["ce_loss"]


def damage_in_words(losses: dict[str, dict[str, dict]], behaviour: Behaviour = REFUSAL) -> str:
    """Returns what ablation costs on other text, the largest change of the loss, in words."""
    changes = {name: loss_change(by, Ablate.name) for name, by in losses.items()}
    changes = {name: change for name, change in changes.items() if change is not None}
    if not changes:
        return "What ablation costs on other text was not measured."
    broken = [name for name, change in changes.items() if not math.isfinite(change)]
    if broken:
        return f"Under ablation the loss on {broken[0]} is not a finite number: the edited model is damaged."
    worst = max(changes, key=lambda name: changes[name])
    text = f"The price: ablation changes the cross-entropy on {worst} by {signed(changes[worst])} nats per token"
    text += f", the most of {len(changes)} data sets." if len(changes) > 1 else "."
    if changes[worst] > LARGE_LOSS:
        text += (
            f" That is much: part of the missing {behaviour.plural} may be damage rather than removed {behaviour.name}."
        )
    return text


def signed(value: float, digits: int = 3) -> str:
    """Returns a difference with its sign, and a true minus."""
    return f"{value:+.{digits}f}".replace("-", "−")


def with_interval(row: dict, digits: int = 3) -> str:
    """Returns a mean with its interval, as `{"mean", "low", "high"}`, in words; the bounds may be None."""
    if row["mean"] is None:
        return "not measured"
    bounds = [row["low"], row["high"]]
    if None in bounds:
        return signed(row["mean"], digits)
    return f"{signed(row['mean'], digits)} ({' to '.join(signed(bound, digits) for bound in bounds)})"
