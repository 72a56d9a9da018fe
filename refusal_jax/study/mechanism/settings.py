"""The settings of the mechanism's parts, what each means, and their defaults."""

import dataclasses

import numpy as np

from refusal_jax.errors import UserError, field
from refusal_jax.settings import Settings, option, section
from refusal_jax.study.further import FurtherSettings


@dataclasses.dataclass
class SuffixSettings(Settings, path="suffixes"):
    """The prompts of the suffix study."""

    n_prompts: int = option(128, "Largest number of refused harmful prompts, and of harmless ones, to look at")
    seed: int = option(0, "Seed of the random suffixes")


@dataclasses.dataclass
class AttributionSettings(Settings, path="attribution"):
    """Tells what is attributed to heads and MLPs."""

    heads: int = option(8, "Number of heads to look at, those that write most along the direction for harmful prompts")


@dataclasses.dataclass
class CosmicSettings(Settings, path="cosmic"):
    """The selection without refusal tokens."""

    fraction: float = option(
        0.1,
        "Fraction of the layers, those where harmful and harmless prompts differ most, at which activations are compared",
    )


@dataclasses.dataclass
class MapSettings(Settings, path="som"):
    """The self-organising map of harmful activations."""

    side: int = option(4, "Number of nodes along each side of the map")
    steps: int = option(10000, "Number of steps of its training, each with one prompt")
    rate: float = option(0.01, "Learning rate of the first step")
    radius: float = option(0.3, "How far neighbours are moved along in the first step, in nodes")
    most: int = option(7, "Largest number of directions that are ablated together")
    seed: int = option(0, "Seed of the map")


@dataclasses.dataclass
class ConeSettings(Settings, path="cones"):
    """The cones that are trained by gradient."""

    dimensions: int = option(5, "Largest dimension that is tried; training ends before it at a cone that does not hold")
    steps: int = option(100, "Largest number of steps for each dimension")
    batch: int = option(0, "Prompts of each kind in a step; 0 is 16 as in the paper, and 4 on a CPU")
    samples: int = option(0, "Directions drawn from the cone in a step; 0 is 8 as in the paper, and 4 on a CPU")
    rate: float = option(0.01, "Learning rate; it is divided by 10 twice before training ends")
    patience: int = option(5, "Steps without a lower loss after which the rate is cut, or training ends")
    ablation: float = option(1.0, "Weight of the loss of compliant replies to harmful prompts under ablation")
    addition: float = option(0.2, "Weight of the loss of refusals of harmless prompts under addition")
    retain: float = option(1.0, "Weight of the KL divergence on harmless prompts under ablation")
    target_tokens: int = option(30, "Tokens of the replies that are learnt")
    drawn: int = option(16, "Directions drawn from a trained cone, to see whether each mediates refusal")
    seed: int = option(0, "Seed of the first directions, of the prompts' order and of what is drawn")


@dataclasses.dataclass
class AlternativeSettings(Settings, path="alternatives"):
    """The table that compares other directions with the study's."""

    max_new_tokens: int = option(32, "Tokens of the replies to test prompts, by which refusals are judged")


@dataclasses.dataclass
class DoseSettings(Settings, path="dose"):
    """Tells how much of the direction is ablated and added."""

    most: float = option(1.5, "Largest dose: the part of the direction that is ablated, and the multiple that is added")
    steps: int = option(12, "Number of equal steps from dose 0 to the largest")
    n_prompts: int = option(128, "Largest number of harmful test prompts, and of harmless ones, to look at")
    replies: int = option(16, "Number of harmful prompts that are replied to at a few doses of ablation; 0 is none")
    max_new_tokens: int = option(48, "Maximum length of these replies in tokens")

    @property
    def doses(self) -> np.ndarray:
        """Returns the doses, rising from 0, float64."""
        return np.linspace(0.0, self.most, self.steps + 1)

    def check(self) -> None:
        """Raises UserError for settings that leave nothing to measure."""
        if not (np.isfinite(self.most) and self.most > 0 and self.steps >= 1):
            raise UserError(
                f"{field('dose.most')} = {self.most} in {field('dose.steps')} = {self.steps} steps are no doses. Give a number "
                "above 0, and 1 step or more."
            )
        if self.n_prompts < 1 or self.replies < 0 or self.max_new_tokens < 1:
            raise UserError(
                f"{field('dose.n_prompts')} = {self.n_prompts}, {field('dose.replies')} = {self.replies} and "
                f"{field('dose.max_new_tokens')} = {self.max_new_tokens}: give at least 1 prompt, 0 replies and 1 token."
            )


@dataclasses.dataclass
class RankSettings(Settings, path="rank"):
    """Tells how many directions refusal takes to break."""

    most: int = option(16, "Largest number of directions that are ablated together")
    n_prompts: int = option(64, "Largest number of harmful test prompts, and of harmless ones, to look at")
    n_train: int = option(
        128, "Largest number of harmful training prompts, and of harmless ones, that make each direction"
    )
    seed: int = option(0, "Seed of the random directions")

    def check(self) -> None:
        """Raises UserError for settings that leave nothing to count."""
        if min(self.most, self.n_prompts, self.n_train) < 1:
            raise UserError(
                f"{field('rank.most')} = {self.most}, {field('rank.n_prompts')} = {self.n_prompts} and "
                f"{field('rank.n_train')} = {self.n_train}: give at least 1 of each."
            )


@dataclasses.dataclass
class AgreementSettings(Settings, path="agreement"):
    """Tells how far directions agree."""

    n_prompts: int = option(
        128, "Largest number of training prompts of each kind, and of prompts of each set, to look at"
    )
    sets: tuple[str, ...] = option(
        (), "Further sets of prompts whose directions are compared, as files or names of sets"
    )

    def check(self) -> None:
        """Raises UserError for settings that leave nothing to compare."""
        if self.n_prompts < 4:
            raise UserError(
                f"{field('agreement.n_prompts')} = {self.n_prompts}: give at least 4, so that there are halves."
            )


@dataclasses.dataclass
class ScatterSettings(Settings, path="scatter"):
    """The scatter of prompts by layer."""

    panels: int = option(6, "Number of layers to show, of which one is that of the study's direction")


@dataclasses.dataclass
class MatrixSettings(Settings, path="matrices"):
    """The comparison of directions of other prompts, such as other languages, and of other models."""

    sets: tuple[str, ...] = option(
        (),
        "Further sets of prompts, such as the same in other languages, as NAME=HARMFUL+HARMLESS, two files or other names of "
        "prompt sets",
    )
    directions: tuple[str, ...] = option(
        (),
        "Directions of other models or studies, as NAME=RUN or NAME=FILE, the folder of a study or a file of a direction",
    )
    n_prompts: int = option(
        128, "Largest number of harmful prompts of a set, and of harmless ones; half of them make its direction"
    )


@dataclasses.dataclass
class MechanismSettings(FurtherSettings):
    """Every setting of the mechanism, with a section for each part that has settings of its own."""

    of_what = "the mechanism"

    suffix: str = option(
        "",
        "File of suffixes for the study of what a suffix does: a .txt, .json, .jsonl or .csv file with one suffix for all "
        "harmful test prompts, one for each of them, or rows of an instruction and its suffix; '' is the suffix that the study "
        "was given before, and for the embedded model the one that comes with it",
    )
    suffixes: SuffixSettings = section(SuffixSettings, "The prompts of the suffix study")
    attribution: AttributionSettings = section(AttributionSettings, "What is attributed to heads and MLPs")
    cosmic: CosmicSettings = section(CosmicSettings, "The selection without refusal tokens")
    som: MapSettings = section(MapSettings, "The self-organising map of harmful activations")
    cones: ConeSettings = section(ConeSettings, "The cones that are trained by gradient")
    alternatives: AlternativeSettings = section(
        AlternativeSettings, "The comparison of other directions with the study's"
    )
    dose: DoseSettings = section(DoseSettings, "How much of the direction is ablated and added")
    agreement: AgreementSettings = section(AgreementSettings, "How far directions agree")
    rank: RankSettings = section(RankSettings, "How many directions refusal takes to break")
    scatter: ScatterSettings = section(ScatterSettings, "The scatter of prompts by layer")
    matrices: MatrixSettings = section(
        MatrixSettings, "The comparison of directions of other prompts and of other models"
    )

    def check(self, known: tuple[str, ...]) -> None:
        """Raises UserError for a part that is not among the `known` ones, and for settings that leave nothing to do."""
        self.dose.check()
        self.rank.check()
        self.agreement.check()
        super().check(known)
        for name, value in (
            ("suffixes.n_prompts", self.suffixes.n_prompts),
            ("attribution.heads", self.attribution.heads),
        ):
            if value < 1:
                raise UserError(f"{field(name)} = {value}, expected at least 1.")
