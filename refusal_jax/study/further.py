"""Holds what the further stages of a finished study share, whatever they are about: the study, their settings and a judge of
replies."""

import dataclasses
import pathlib
from typing import ClassVar, Generic, TypeVar

from refusal_jax.chat.padding import bucket
from refusal_jax.errors import UserError, did_you_mean, field
from refusal_jax.judges.choice import REFUSAL_JUDGES, WITHOUT_MODEL, parse_judges
from refusal_jax.judges.judge import Judge
from refusal_jax.judges.scores import REFUSAL_SCORE
from refusal_jax.judges.text import EXTENDED, PAPERS
from refusal_jax.judges.words import WORD_JUDGES
from refusal_jax.mechanism.edited_prompts import EditedPrompts
from refusal_jax.models.config import ModelConfig
from refusal_jax.plan.programs import Group, Workload
from refusal_jax.runs.run import Run
from refusal_jax.settings import Settings, option
from refusal_jax.study.config import StudyConfig
from refusal_jax.study.shared import Study


@dataclasses.dataclass
class FurtherSettings(Settings):
    """The base of the settings of further stages, which are called parts. of_what: what they are parts of, in words."""

    of_what: ClassVar[str]
    parts: tuple[str, ...] = option((), "Names of the parts to do, with those that they read from; () does all of them")

    def check(self, known: tuple[str, ...]) -> None:
        """Raises UserError for a part that is not among the `known` ones, and for settings that leave nothing to do."""
        for part in self.parts:
            if part not in known:
                raise UserError(
                    f"{field('parts')} names {part!r}, which is no part of {self.of_what}.{did_you_mean(part, known)} The "
                    f"parts are {', '.join(known)}."
                )


T = TypeVar("T", bound=FurtherSettings)


class FurtherStudy(Study, Generic[T]):
    """A finished study to which stages are added. settings: those of the stages; `config` has those of the study.

    room: tokens that the stages put after a prompt.
    """

    room: ClassVar[int] = 0

    def __init__(
        self,
        settings: T,
        config: StudyConfig,
        run: Run,
        folder: pathlib.Path,
        groups: tuple[Group, ...] = (),
    ):
        super().__init__(config, run, folder, groups=groups)
        self.settings = settings

    def edited_prompts(self, split: str, most: int) -> EditedPrompts:
        """Returns the first prompts of a split, at most so many, to be read under edits."""
        texts = self.instructions(split, kept_only=False)[:most]
        return EditedPrompts.build(self.model, texts, self.sizes.select, self.refusal_ids())

    def reply_judge(self, usual: Judge) -> Judge | None:
        """Returns the judge of replies that need no model: for refusal the usual one, for another behaviour the one that decides
        about it; None if that one needs a model."""
        of = self.behaviour
        if of.is_refusal:
            return usual
        spec = next((spec for spec in self.config.judges if spec.partition("=")[0] == of.judge), "")
        alone = of.judge in WORD_JUDGES or (spec in WITHOUT_MODEL and spec != REFUSAL_SCORE)
        return parse_judges([spec], 1)[0] if alone else None

    @property
    def text_judge(self) -> Judge | None:
        """Returns the study's first judge of refusals that needs neither a model nor scores, or else the paper's; that of another
        behaviour, None if it needs a model."""
        known = [name for name in self.config.judges if name in REFUSAL_JUDGES and name != REFUSAL_SCORE]
        return self.reply_judge(WITHOUT_MODEL[known[0]] if known else PAPERS)

    @property
    def without_reply_judge(self) -> str:
        """Returns why a part cannot judge replies, in words, or "" if it can."""
        of = self.behaviour
        if self.reply_judge(EXTENDED):
            return ""
        return (
            f"The judge {of.judge} decides about {of.name}, and this part judges replies without a model. Make a judge of words "
            f"the one that decides, such as uses=WORD|WORD."
        )

    def workload(self, cfg: ModelConfig, dtype: str, length: int) -> Workload:
        """Returns what is planned for, with room for what the stages put after each prompt."""
        return self.planned(cfg, dtype, self.config, length, self.groups, self.settings)

    @classmethod
    def planned(
        cls, cfg: ModelConfig, dtype: str, config: StudyConfig, length: int, groups: tuple[Group, ...], settings: T
    ) -> Workload:
        """Returns the programs of the stages for a study, to be planned. config: of the study. length: tokens that its prompts
        are padded to, without what the stages put after them."""
        return Workload(cfg, dtype, config, bucket(length + cls.room), groups, further=settings)
