"""The settings of the two recipes that ablate refusal directions while they train."""

import dataclasses
import math

from refusal_jax.edits import SITES
from refusal_jax.errors import UserError, did_you_mean, field
from refusal_jax.settings import Settings, option


@dataclasses.dataclass
class RefatSettings(Settings, path="refat"):
    """Tells how refusal features are ablated from harmful rows (arXiv 2409.20089)."""

    probability: float = option(0.5, "Probability of the ablation in each harmful row")
    spared: float = option(0.25, "Share of the blocks, from the first on, where nothing is ablated")
    sites: tuple[str, ...] = option(
        SITES[:1],
        f"Places of a block where its direction is ablated, of {', '.join(SITES)}; the paper's is the block's input",
    )
    every: int = option(4, "Steps after which the directions are computed anew")
    prompts: int = option(32, "Prompts of each side that they are computed from, drawn anew each time")
    refusal_weight: float = option(1.0, "How much the cross-entropy of refusals counts")
    answer_weight: float = option(1.0, "How much that of answers to harmless prompts counts")

    def check(self) -> None:
        """Raises UserError for settings that are out of range."""
        check_shares(self, "refat", ("probability", "spared"))
        check_weights(self, "refat")
        for name in ("every", "prompts"):
            if self[name] < 1:
                raise UserError(f"{field(f'refat.{name}')} = {self[name]}, expected 1 or more.")
        if self.spared == 1:
            raise UserError(
                f"{field('refat.spared')} = 1 spares all blocks: nothing would be ablated. Choose less than 1."
            )
        if not self.sites:
            raise UserError(
                f"{field('refat.sites')} is empty: nothing would be ablated. Name some of {', '.join(SITES)}."
            )
        for site in self.sites:
            if site not in SITES:
                raise UserError(
                    f"{field('refat.sites')} names {site!r}, expected some of {', '.join(SITES)}.{did_you_mean(site, SITES)}"
                )


@dataclasses.dataclass
class DeepRefusalSettings(Settings, path="deep_refusal"):
    """Tells how the refusal direction is ablated from tokens of all rows (arXiv 2509.15202)."""

    direction: str = option(
        "",
        "Refusal direction: the folder of a study of this model, or a file; '' selects one by the paper's rule from the "
        "prompts that are learnt",
    )
    site_probability: float = option(
        0.5, "Probability with which each site of a block is drawn for a row: its input, and what attention and MLP add"
    )
    token_probability: float = option(0.5, "Probability with which each token is ablated at a site that is drawn")
    prefilled: float = option(
        0.5,
        "Share of the harmful rows whose reply begins by complying, which is given, before the refusal that is learnt; it "
        "needs harmful prompts with replies that comply",
    )
    least_given: int = option(20, "Tokens of a given beginning at least")
    most_given: int = option(25, "Tokens of a given beginning at most")
    refusal_weight: float = option(0.2, "How much the cross-entropy of refusals counts")
    answer_weight: float = option(0.8, "How much that of answers to harmless prompts counts")

    def check(self) -> None:
        """Raises UserError for settings that are out of range."""
        check_shares(self, "deep_refusal", ("site_probability", "token_probability", "prefilled"))
        check_weights(self, "deep_refusal")
        if not 1 <= self.least_given <= self.most_given:
            raise UserError(
                f"{field('deep_refusal.least_given')} = {self.least_given} and {field('deep_refusal.most_given')} = "
                f"{self.most_given}: a given beginning has 1 token or more, and the first number is not above the second."
            )


def check_shares(settings: Settings, path: str, names: tuple[str, ...]) -> None:
    """Raises UserError for fields of a section that are not from 0 to 1."""
    for name in names:
        if not 0 <= settings[name] <= 1:
            raise UserError(f"{field(f'{path}.{name}')} = {settings[name]}, expected a number from 0 to 1.")


def check_weights(settings: Settings, path: str) -> None:
    """Raises UserError for weights of the two losses that are not above 0."""
    for name in ("refusal_weight", "answer_weight"):
        if not (math.isfinite(settings[name]) and settings[name] > 0):
            raise UserError(f"{field(f'{path}.{name}')} = {settings[name]}, expected a number above 0.")
