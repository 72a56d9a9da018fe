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
class DamageSettings(FurtherSettings):
    """Every setting of what is measured about damage, with a section for each part that has settings of its own."""

    of_what = "the damage"

    grid: GridSettings = section(GridSettings, "The grid of partial ablations")
    replies: ReplySettings = section(ReplySettings, "The settings of the grid at which replies are written")

    def check(self, known: tuple[str, ...]) -> None:
        """Raises UserError for a part that is not among the `known` ones, and for settings that leave nothing to do."""
        self.grid.check()
        self.replies.check()
        super().check(known)
