"""The settings of the recipes that train nothing: an injection, a conditional steering, and a calibration of false refusals."""

import dataclasses
import math

from refusal_jax.chat.conditional import POOLS
from refusal_jax.errors import UserError, did_you_mean, field
from refusal_jax.settings import Settings, option

DIRECTION = option(
    "",
    "Refusal direction: the folder of a study of this model, or a file; '' selects one by the paper's rule from the prompts that "
    "are learnt",
)


@dataclasses.dataclass
class SearchSettings(Settings, path="search"):
    """Tells how recipes without training choose: they try values on prompts of the training part that they do not learn from."""

    n_fit: int = option(128, "Number of prompts of each side that directions are computed from, at most")
    n_val: int = option(64, "Number of other prompts of each side that values are tried on, at most")
    most_lost: float = option(
        0.05,
        "Largest share of the harmless prompts that may be answered no more, on the prompts that values are tried on",
    )
    most_kl: float = option(
        0.2, "Largest mean KL divergence, nats, of the next token after harmless prompts, on the same prompts"
    )

    def check(self) -> None:
        """Raises UserError for settings that are out of range."""
        for name, least in (("n_fit", 2), ("n_val", 1)):
            if self[name] < least:
                raise UserError(f"{field(f'search.{name}')} = {self[name]}, expected {least} or more.")
        if not 0 <= self.most_lost <= 1:
            raise UserError(f"{field('search.most_lost')} = {self.most_lost}, expected a share from 0 to 1.")
        check_positive("search.most_kl", self.most_kl)


@dataclasses.dataclass
class InjectionSettings(Settings, path="injection"):
    """Tells how much of the refusal direction the writers of layers are made to write (arXiv 2508.20766)."""

    direction: str = DIRECTION
    sizes: tuple[float, ...] = option(
        (0.01, 0.02, 0.05, 0.1, 0.2, 0.3),
        "Sizes of the change that are tried, as shares of the matrices' norm, in the median over them; each with both signs, as "
        "the mean entry of what a matrix writes may be of either sign",
    )
    layers: tuple[int, ...] = option((), "Layers that are edited, counted from 0; () is all of them")

    def check(self) -> None:
        """Raises UserError for settings that are out of range."""
        check_tried("injection.sizes", self.sizes)


@dataclasses.dataclass
class ConditionalSettings(Settings, path="conditional"):
    """Holds what a conditional steering adds, and when (arXiv 2409.05907)."""

    direction: str = DIRECTION
    pools: tuple[str, ...] = option(
        POOLS,
        f"What of a prompt the condition may read, of which the best is taken: {', '.join(POOLS)}, the mean over its tokens or "
        "its last one",
    )
    most_layers: int = option(
        1, "Layers that may be read together at most; a prompt that meets it at any of them meets it"
    )
    strengths: tuple[float, ...] = option(
        (0.25, 0.5, 0.75, 1.0, 1.5, 2.0), "Multiples of the direction that are tried as what is added"
    )

    def check(self) -> None:
        """Raises UserError for settings that are out of range."""
        for pool in self.pools:
            if pool not in POOLS:
                raise UserError(
                    f"{field('conditional.pools')} names {pool!r}, expected some of {', '.join(POOLS)}."
                    f"{did_you_mean(pool, POOLS)}"
                )
        if not self.pools:
            raise UserError(f"{field('conditional.pools')} is empty: name some of {', '.join(POOLS)}.")
        if not 1 <= self.most_layers <= 3:
            raise UserError(
                f"{field('conditional.most_layers')} = {self.most_layers}, expected 1 to 3: all sets of so many layers are tried."
            )
        check_tried("conditional.strengths", self.strengths)


@dataclasses.dataclass
class CalibrationSettings(Settings, path="calibration"):
    """Tells how refusals of harmless prompts that look harmful are taken away (arXiv 2410.03415)."""

    direction: str = DIRECTION
    pseudo_harmful: str = option(
        "",
        "Harmless prompts that look harmful, of which those that the model refuses are used: a file, fetched data such as "
        "xstest, or a data set on the hub; '' takes the harmless prompts that the model refuses",
    )
    strengths: tuple[float, ...] = option(
        (0.6, 0.7, 0.8, 0.9, 1.0),
        "Shares of the refusal direction that are taken out of the direction of false refusal before that is ablated: the dial, "
        "of which higher values keep more of the refusal of harmful prompts",
    )

    def check(self) -> None:
        """Raises UserError for settings that are out of range."""
        check_tried("calibration.strengths", self.strengths)
        if max(self.strengths) > 1:
            raise UserError(f"{field('calibration.strengths')} has {max(self.strengths)}: 1 takes out all there is.")


def check_positive(name: str, value: float) -> None:
    """Raises UserError for what is no finite number above 0. name: of the setting."""
    if not (math.isfinite(value) and value > 0):
        raise UserError(f"{field(name)} = {value}, expected a number above 0.")


def check_tried(name: str, values: tuple[float, ...]) -> None:
    """Raises UserError where nothing is tried, and for values that are no finite numbers above 0."""
    if not values:
        raise UserError(f"{field(name)} is empty, so that nothing would be tried.")
    for value in values:
        check_positive(name, value)
