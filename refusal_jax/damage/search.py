"""Searches the partial ablations of a direction for those that leave least refusal at least damage, by Optuna.

Trials are proposed in batches, so that a batch runs as rows of one compiled program. A proposal depends on the seed, the
number of trials before it and what these have shown, and on nothing else: whoever keeps the finished trials, as rows of
numbers, continues an interrupted search exactly, and no state of a sampler is stored.
"""

import dataclasses
import warnings
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float

from refusal_jax.damage.partial import Kernel, Partial
from refusal_jax.errors import UserError

EMBEDDED = "resid_pre"  # at layer 0 alone: what the embedding writes
LEAST_DISTANCE = 0.5  # in layers; a kernel of less reaches no layer but the nearest


@dataclasses.dataclass(frozen=True)
class Space:
    """The partial ablations that are searched: of each site that weights write, a kernel over the layers, and of the embedding a
    strength. Edited weights can hold all of them.

    n_layers: of the model. most: the largest strength.
    """

    n_layers: int
    most: float
    sites: tuple[str, ...] = ("attn_out", "mlp_out")

    @property
    def ranges(self) -> dict[str, tuple[float, float]]:
        """Returns the least and the greatest value of each parameter, by name. The least strength of a kernel is a share of its
        greatest."""
        found = {"embed.most": (0.0, self.most)}
        for site in self.sites:
            found |= {
                f"{site}.most": (0.0, self.most),
                f"{site}.position": (0.0, self.n_layers - 1.0),
                f"{site}.least": (0.0, 1.0),
                f"{site}.distance": (LEAST_DISTANCE, max(self.n_layers - 1.0, 2 * LEAST_DISTANCE)),
            }
        return found

    def partial(self, values: Mapping[str, float]) -> Partial:
        """Returns the ablation of a trial's parameters."""
        kernels = {EMBEDDED: Kernel.band(values["embed.most"], 0, 0)}
        for site in self.sites:
            most, position, least, distance = (
                values[f"{site}.{name}"] for name in ("most", "position", "least", "distance")
            )
            kernels[site] = Kernel(most, position, least * most, distance)
        return Partial({site: kernel for site, kernel in kernels.items() if kernel.most})

    def everywhere(self, strength: float) -> dict[str, float]:
        """Returns the parameters of one strength at all layers and sites; 1 is the paper's edit of weights."""
        middle = (self.n_layers - 1) / 2
        values = {"embed.most": strength}
        for site in self.sites:
            values |= {f"{site}.most": strength, f"{site}.position": middle, f"{site}.least": 1.0}
            values[f"{site}.distance"] = max(middle, LEAST_DISTANCE)
        return values


@dataclasses.dataclass(frozen=True)
class Trial:
    """A finished trial. values: its parameters by name. refused: the share of refused prompts. damage: in its own unit, 0 for
    none."""

    values: Mapping[str, float]
    refused: float
    damage: float

    @property
    def row(self) -> dict:
        """Returns the trial for a file."""
        return {"values": dict(self.values), "refused": self.refused, "damage": self.damage}


def check_optuna() -> str:
    """Returns why Optuna cannot be used, in words, or "" if it can."""
    try:
        import optuna  # noqa: F401
    except ImportError:
        return "The search needs Optuna, which is not installed: pip install 'refusal-jax[damage]'."
    return ""


def propose(space: Space, done: Sequence[Trial], count: int, seed: int, start: int) -> list[dict[str, float]]:
    """Returns the parameters of the next `count` trials, after those that are done.

    start: number of first trials that are random, from which the search learns. The sampler is Optuna's tree-structured Parzen
    estimator for two objectives, both to be made small; trials of one batch keep apart from each other. Raises UserError where
    Optuna is not installed.
    """
    if why := check_optuna():
        raise UserError(why)
    import optuna
    from optuna.distributions import BaseDistribution, FloatDistribution
    from optuna.trial import create_trial

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    ranges = space.ranges.items()
    known: dict[str, BaseDistribution] = {name: FloatDistribution(low, high) for name, (low, high) in ranges}
    own = int(np.random.SeedSequence([seed, len(done)]).generate_state(1)[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = optuna.samplers.TPESampler(seed=own, multivariate=True, constant_liar=True, n_startup_trials=start)
        study = optuna.create_study(directions=["minimize", "minimize"], sampler=sampler)
        study.add_trials(
            [create_trial(params=dict(t.values), distributions=known, values=[t.refused, t.damage]) for t in done]
        )
        return [study.ask(known).params for _ in range(count)]


def is_best(refused_m: Float[np.ndarray, " M"], damage_m: Float[np.ndarray, " M"]) -> Bool[np.ndarray, " M"]:
    """Returns whether no other trial leaves less refusal without more damage, or does less damage without more refusal."""
    no_worse_mm = (refused_m[None] <= refused_m[:, None]) & (damage_m[None] <= damage_m[:, None])
    better_mm = no_worse_mm & ((refused_m[None] < refused_m[:, None]) | (damage_m[None] < damage_m[:, None]))
    return np.asarray(~better_mm.any(axis=1))


def least_damage(trials: Sequence[Trial], level: float) -> int | None:
    """Returns the number of the trial that does least damage among those that leave at most the share `level` of prompts refused,
    None if there is none. Of equal ones it is that which leaves least, and then the first."""
    fitting = [number for number, trial in enumerate(trials) if trial.refused <= level]
    return min(fitting, key=lambda number: (trials[number].damage, trials[number].refused), default=None)
