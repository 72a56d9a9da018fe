"""The settings of what is measured about the damage that removal does, what each means, and their defaults."""

import dataclasses

import numpy as np

from refusal_jax.errors import UserError, field
from refusal_jax.settings import Settings, option, section
from refusal_jax.study.further import FurtherSettings

PLACES = (
    "all@all",
    "written@all",
    "attn_out@all",
    "mlp_out@all",
    "written@0%-25%",
    "written@25%-50%",
    "written@50%-75%",
    "written@75%-100%",
    "written@tent:40%:40%",
    "written@tent:60%:40%",
    "written@tent:80%:40%",
    "written@tent:60%:20%",
)


@dataclasses.dataclass
class GridSettings(Settings, path="grid"):
    """The grid of partial ablations: every strength at every place."""

    most: float = option(1.25, "Largest strength: the part of the direction that is removed at a place; 1 is all of it")
    steps: int = option(5, "Number of equal steps from strength 0, which is the model as it is, to the largest")
    places: tuple[str, ...] = option(
        PLACES,
        "Where the direction is removed, as SITES@LAYERS: SITES are all, written, or names of sites joined by +; LAYERS are all, "
        "FIRST-LAST or tent:POSITION:DISTANCE, in numbers of layers or in shares of the depth such as 25%",
    )
    n_prompts: int = option(
        64, "Largest number of harmful test prompts, of harmless ones, and of those of each other set"
    )
    n_texts: int = option(64, "Largest number of rows of each text whose loss is measured")

    @property
    def strengths(self) -> np.ndarray:
        """Returns the strengths above 0, rising, float64."""
        return np.linspace(0.0, self.most, self.steps + 1)[1:]

    def check(self) -> None:
        """Raises UserError for settings that leave nothing to measure."""
        if not (np.isfinite(self.most) and self.most > 0 and self.steps >= 1):
            raise UserError(
                f"{field('grid.most')} = {self.most} in {field('grid.steps')} = {self.steps} steps are no strengths. Give a "
                "number above 0, and 1 step or more."
            )
        if self.n_prompts < 1 or self.n_texts < 1:
            raise UserError(
                f"{field('grid.n_prompts')} = {self.n_prompts} and {field('grid.n_texts')} = {self.n_texts}: give at least 1 of "
                "each."
            )


@dataclasses.dataclass
class ReplySettings(Settings, path="replies"):
    """The settings of the grid at which replies are written."""

    places: int = option(2, "Number of places of the grid, from the first, at whose strengths replies are written")
    n_prompts: int = option(16, "Largest number of harmful test prompts, and of harmless ones, that are replied to")
    max_new_tokens: int = option(48, "Maximum length of these replies in tokens")

    def check(self) -> None:
        """Raises UserError for settings that leave nothing to judge."""
        if min(self.places, self.n_prompts, self.max_new_tokens) < 1:
            raise UserError(
                f"{field('replies.places')} = {self.places}, {field('replies.n_prompts')} = {self.n_prompts} and "
                f"{field('replies.max_new_tokens')} = {self.max_new_tokens}: give at least 1 of each."
            )


@dataclasses.dataclass
class FrontSettings(Settings, path="front"):
    """The search for the best trade-offs of refusal and damage."""

    trials: int = option(200, "Number of partial ablations that are tried on validation prompts")
    batch: int = option(16, "Number of them that are proposed together, and run as rows of one program")
    start: int = option(40, "Number of first trials that do not learn from others")
    plain: int = option(
        12,
        "Number of equal steps, from 0 to the largest strength, of one strength at all layers and sites that weights write; "
        "these are tried first",
    )
    most: float = option(1.5, "Largest strength that is tried")
    levels: tuple[float, ...] = option(
        (0.5, 0.1), "Shares of refused prompts, at most, at which the least damage is told"
    )
    n_prompts: int = option(64, "Largest number of harmful validation prompts, and of harmless ones, of the search")
    seed: int = option(0, "Seed of the search")

    def check(self) -> None:
        """Raises UserError for settings that leave nothing to search."""
        if min(self.batch, self.start, self.plain, self.n_prompts) < 1 or not (
            np.isfinite(self.most) and self.most > 0
        ):
            raise UserError(
                f"{field('front.batch')} = {self.batch}, {field('front.start')} = {self.start}, {field('front.plain')} = "
                f"{self.plain}, {field('front.n_prompts')} = {self.n_prompts} and {field('front.most')} = {self.most}: give at "
                "least 1 of each, and a largest strength above 0."
            )
        if self.trials <= self.plain:
            raise UserError(
                f"{field('front.trials')} = {self.trials} leaves none to search after the {self.plain + 1} of one strength "
                f"everywhere. Give more, or make {field('front.plain')} smaller."
            )
        if not all(0 <= level < 1 for level in self.levels):
            raise UserError(
                f"{field('front.levels')} = {self.levels}: a level is a share of refused prompts, from 0 to below 1."
            )


@dataclasses.dataclass
class AnswerSettings(Settings, path="answers"):
    """The correct answers whose probability is measured at every setting of the grid."""

    sets: tuple[str, ...] = option(
        (),
        "Questions with correct answers: .json, .jsonl, .csv or .parquet files, fetched sets ('gsm8k', 'mbpp', 'mbpp_full'; "
        "`refusal-jax data fetch`), data sets on the hub ('hf:ORG/NAME:SPLIT'), or 'bundled', the embedded model's; () is "
        "'bundled' for the embedded model, and for others their own unedited answers to harmless prompts",
    )
    n_items: int = option(64, "Largest number of questions of each set, its first ones")

    def check(self) -> None:
        """Raises UserError for settings that leave nothing to measure."""
        if self.n_items < 1:
            raise UserError(f"{field('answers.n_items')} = {self.n_items}: give at least 1.")


@dataclasses.dataclass
class TextSettings(Settings, path="texts"):
    """The replies that are measured as texts: unedited, at the settings that are named, and at the best trade-offs found."""

    at: tuple[str, ...] = option(
        ("all@all=1",), "Settings to reply at, as PLACE=STRENGTH, with a place as in grid.places"
    )
    n_prompts: int = option(32, "Largest number of harmless test prompts, and of harmful ones, to reply to")
    max_new_tokens: int = option(128, "Maximum length of a reply in tokens, with its thought")
    keep: bool = option(
        False, "Write the replies themselves into the file, too; on a model of yours they may be harmful"
    )

    def check(self) -> None:
        """Raises UserError for settings that leave nothing to measure."""
        if min(self.n_prompts, self.max_new_tokens) < 1:
            raise UserError(
                f"{field('texts.n_prompts')} = {self.n_prompts} and {field('texts.max_new_tokens')} = "
                f"{self.max_new_tokens}: give at least 1 of each."
            )


@dataclasses.dataclass
class WeightSettings(Settings, path="weights"):
    """The settings whose edits are written into weights, to see whether the grid tells what edited weights do."""

    at: tuple[str, ...] = option(
        (
            "all@all=1",
            "all@all=0.5",
            "written@all=0.5",
            "written@50%-100%=1",
            "attn_out@all=1",
            "written@tent:60%:40%=1",
        ),
        "Settings to write, as PLACE=STRENGTH, with a place as in grid.places",
    )
    n_prompts: int = option(32, "Largest number of harmful test prompts, and of harmless ones, to compare")
    largest: float = option(8.0, "Size in GiB of weights above which none are written; each setting needs as much disk")

    def check(self) -> None:
        """Raises UserError for settings that leave nothing to compare."""
        if self.n_prompts < 1 or not self.largest >= 0:
            raise UserError(
                f"{field('weights.n_prompts')} = {self.n_prompts} and {field('weights.largest')} = {self.largest}: give at least "
                "1 prompt, and a size of 0 or more."
            )


@dataclasses.dataclass
class DamageSettings(FurtherSettings):
    """Every setting of what is measured about damage, with a section for each part that has settings of its own."""

    of_what = "the damage"

    grid: GridSettings = section(GridSettings, "The grid of partial ablations")
    replies: ReplySettings = section(ReplySettings, "The settings of the grid at which replies are written")
    front: FrontSettings = section(FrontSettings, "The search for the best trade-offs of refusal and damage")
    answers: AnswerSettings = section(AnswerSettings, "The correct answers whose probability is measured")
    texts: TextSettings = section(TextSettings, "The replies that are measured as texts")
    weights: WeightSettings = section(WeightSettings, "The settings whose edits are written into weights")

    def check(self, known: tuple[str, ...]) -> None:
        """Raises UserError for a part that is not among the `known` ones, and for settings that leave nothing to do."""
        for part in (self.grid, self.replies, self.front, self.answers, self.texts, self.weights):
            part.check()
        super().check(known)
