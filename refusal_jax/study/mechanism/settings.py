"""The settings of the mechanism's parts, what each means, and their defaults."""

import dataclasses

from refusal_jax.errors import UserError, did_you_mean, field
from refusal_jax.settings import Settings, option, section


@dataclasses.dataclass
class SuffixSettings(Settings, path="suffixes"):
    """The prompts of the suffix study."""

    n_prompts: int = option(128, "Largest number of refused harmful prompts, and of harmless ones, to look at")
    seed: int = option(0, "Seed of the random suffixes")


@dataclasses.dataclass
class AttributionSettings(Settings, path="attribution"):
    """What is attributed to heads and MLPs."""

    heads: int = option(8, "Number of heads to look at, those that write most along the direction for harmful prompts")


@dataclasses.dataclass
class MechanismSettings(Settings):
    """Every setting of the mechanism, with a section for each part that has settings of its own."""

    parts: tuple[str, ...] = option((), "Parts to do, of those that are listed below; () does all of them")
    suffix: str = option(
        "",
        "File of suffixes for the study of what a suffix does: a .txt, .json, .jsonl or .csv file with one suffix for all "
        "harmful test prompts, one for each of them, or rows of an instruction and its suffix; '' is the suffix that the study "
        "was given before, and for the embedded model the one that comes with it",
    )
    suffixes: SuffixSettings = section(SuffixSettings, "The prompts of the suffix study")
    attribution: AttributionSettings = section(AttributionSettings, "What is attributed to heads and MLPs")

    def check(self, known: tuple[str, ...]) -> None:
        """Raises UserError for a part that is not among the `known` ones."""
        for part in self.parts:
            if part not in known:
                raise UserError(
                    f"{field('parts')} names {part!r}, which is no part of the mechanism.{did_you_mean(part, known)} The "
                    f"parts are {', '.join(known)}."
                )
