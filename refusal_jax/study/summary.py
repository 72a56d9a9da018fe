"""The study's results in a few lines, from the files of its folder."""

import dataclasses
import json
import pathlib

from refusal_jax.study.judges import wilson_interval

# What each condition does, in the order of the tables.
LABELS = {"baseline": "baseline", "ablation": "direction ablated", "actadd": "direction added"}


@dataclasses.dataclass(frozen=True)
class RefusalRate:
    """One cell of the summary: how often a condition's completions were judged refusals, with its 95 % interval."""

    dataset: str
    intervention: str
    judge: str
    refused: int
    n: int

    @property
    def rate(self) -> float:
        return self.refused / self.n

    @property
    def interval(self) -> tuple[float, float]:
        return wilson_interval(self.refused, self.n)

    @property
    def label(self) -> str:
        sign = {"actadd": "+r added" if self.dataset == "harmless" else "−r added"}
        return sign.get(self.intervention, LABELS[self.intervention])


def refusal_rates(folder: pathlib.Path) -> list[RefusalRate]:
    """All rates of a run's folder, harmful sets first, baseline first."""
    rates = []
    for path in (folder / "completions").glob("*_evaluations.json"):
        dataset, intervention = path.stem.removesuffix("_evaluations").rsplit("_", 1)
        found = json.loads(path.read_text(encoding="utf-8"))
        for judge in (key.removesuffix("_success_rate") for key in found if key.endswith("_success_rate")):
            verdicts = [completion[f"is_jailbreak_{judge}"] for completion in found["completions"]]
            rates.append(RefusalRate(dataset, intervention, judge, len(verdicts) - sum(verdicts), len(verdicts)))
    order = list(LABELS)
    return sorted(rates, key=lambda r: (r.dataset == "harmless", r.dataset, order.index(r.intervention), r.judge))


def picked_scores(folder: pathlib.Path) -> dict:
    """The selected candidate's row of direction_evaluations.json."""
    picked = json.loads((folder / "direction_metadata.json").read_text())
    rows = json.loads((folder / "direction_evaluations.json").read_text())
    return next(r for r in rows if (r["position"], r["layer"]) == (picked["pos"], picked["layer"]))


def text_summary(folder: pathlib.Path) -> str:
    """The tables that a finished study prints."""
    row = picked_scores(folder)
    lines = [
        f"Direction: position {row['position']}, layer {row['layer']}. Bypass {row['refusal_score']:.3f}, induce "
        f"{row['steering_score']:.3f}, KL {row['kl_div_score']:.4f}.",
        "",
        f"{'prompts':<16}{'intervention':<20}{'refused':>8}  {'95 % interval':<16}{'n':>4}",
    ]
    for rate in refusal_rates(folder):
        low, high = rate.interval
        lines.append(
            f"{rate.dataset:<16}{rate.label:<20}{rate.rate:>8.1%}  {f'{low:.1%} to {high:.1%}':<16}{rate.n:>4}"
        )
    losses = {
        name: json.loads((folder / "loss_evals" / f"{name}_loss_eval.json").read_text())
        for name in ("baseline", "ablation", "actadd")
    }
    lines += ["", f"{'cross-entropy on':<24}{'baseline':>10}{'ablated':>10}{'−r added':>10}{'tokens':>9}"]
    for name, base in losses["baseline"].items():
        lines.append(
            f"{name:<24}" + "".join(f"{losses[c][name]['ce_loss']:>10.3f}" for c in losses) + f"{base['n_tokens']:>9}"
        )
    return "\n".join(lines)
