"""The settings of the recipes that teach other replies or other representations."""

import dataclasses
import math

from refusal_jax.errors import UserError, did_you_mean, field
from refusal_jax.settings import Settings, option

PLAIN, BOTH, ALIKE = BEGINNINGS = ("plain", "both", "alike")  # how extended refusals begin


@dataclasses.dataclass
class ExtendedSettings(Settings, path="extended"):
    """Tells how extended refusals are made where the file of harmful prompts brings none."""

    begin: str = option(
        PLAIN,
        "How refusals begin: 'plain' is an overview, which answers do not have; 'both' has answers begin with an overview "
        "too, so that no beginning tells whether a reply refuses, at the cost of a change of every answer; 'alike' has the "
        "overview begin as answers do, which is for the embedded model's corpus",
    )
    part_tokens: int = option(64, "Length in tokens of the overviews and reasons that the model writes itself, at most")

    def check(self) -> None:
        """Raises UserError for settings that are out of range."""
        at_least_one("extended.part_tokens", self.part_tokens)
        if self.begin not in BEGINNINGS:
            raise UserError(
                f"{field('extended.begin')} is {self.begin!r}, expected one of {', '.join(BEGINNINGS)}."
                f"{did_you_mean(self.begin, BEGINNINGS)}"
            )


@dataclasses.dataclass
class DepthSettings(Settings, path="depth"):
    """Tells how deep into a reply that complies refusals are learnt, and how answers are."""

    deepest: int = option(
        0,
        "Most tokens of a reply that complies after which the refusal is learnt; 0 goes as deep as its reply but for its end",
    )
    at_once: float = option(0.5, "Share of harmful prompts whose refusal begins at once, after no token")
    share: float = option(
        0.2,
        "Share of the loss that is of refusals; the rest is of answers. 0 learns answers only, which needs `constrained`",
    )
    draws: int = option(4, "Openings that are drawn for each harmful prompt")
    constrained: bool = option(
        False,
        "Learn answers by the token-wise constrained objective, which keeps their first tokens close to those of the model "
        "before training",
    )
    beta_first: float = option(0.5, "Strength of that constraint for the first token of a reply")
    beta_next: float = option(2.0, "Its strength for the tokens 2 to 5")
    beta_later: float = option(0.1, "Its strength for all later tokens")

    def check(self) -> None:
        """Raises UserError for settings that are out of range."""
        at_least_one("depth.draws", self.draws)
        if self.deepest < 0:
            raise UserError(f"{field('depth.deepest')} = {self.deepest}, expected 0 or more.")
        for name in ("at_once", "share"):
            if not 0 <= self[name] <= 1:
                raise UserError(f"{field(f'depth.{name}')} = {self[name]}, expected a share from 0 to 1.")
        for name in ("beta_first", "beta_next", "beta_later"):
            above_zero(f"depth.{name}", self[name])
        if self.share == 0 and not self.constrained:
            raise UserError(
                f"{field('depth.share', 0.0)} learns no refusals, and answers without a constraint: nothing would defend. "
                f"Set {field('depth.constrained', True)}, or a share above 0."
            )


@dataclasses.dataclass
class BreakerSettings(Settings, path="breakers"):
    """Tells which representations circuit breakers turn away, and how strongly."""

    layers: tuple[int, ...] = option(
        (),
        "Blocks at whose inputs the representations of replies that comply are turned away; () is about one third and two "
        "thirds of the depth: 10 and 20 of 32",
    )
    alpha: float = option(10.0, "Size of both losses' coefficients")
    keep: float = option(
        1.0,
        "Weight of the loss that keeps other representations, beside the one that turns some away; distances are in the residual "
        "stream's units, in which models differ",
    )
    noise: float = option(
        0.01,
        "Size of noise that is added to representations that are turned away, as a share of their norm: before training they "
        "are what they were, where the loss has no gradient",
    )
    prompts_too: bool = option(True, "Turn away the prompt's tokens as well as the reply's, and keep them alike")

    def check(self) -> None:
        """Raises UserError for settings that are out of range, whatever the model."""
        above_zero("breakers.alpha", self.alpha)
        above_zero("breakers.keep", self.keep)
        if not (math.isfinite(self.noise) and self.noise >= 0):
            raise UserError(f"{field('breakers.noise')} = {self.noise}, expected 0 or a number above it.")


def at_least_one(name: str, value: int) -> None:
    """Raises UserError for a setting below 1."""
    if value < 1:
        raise UserError(f"{field(name)} = {value}, expected 1 or more.")


def above_zero(name: str, value: float) -> None:
    """Raises UserError for a setting that is not a number above 0."""
    if not (math.isfinite(value) and value > 0):
        raise UserError(f"{field(name)} = {value}, expected a number above 0.")
