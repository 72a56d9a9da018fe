"""State that the stages of the mechanism share: the finished study, and their settings."""

import pathlib

from refusal_jax.chat.padding import bucket
from refusal_jax.judges.choice import WITHOUT_MODEL, parse_judges
from refusal_jax.judges.judge import Judge
from refusal_jax.judges.scores import REFUSAL_SCORE
from refusal_jax.judges.text import EXTENDED
from refusal_jax.judges.words import WORD_JUDGES
from refusal_jax.models.config import ModelConfig
from refusal_jax.plan.programs import Group, Workload
from refusal_jax.runs.run import Run
from refusal_jax.study.config import StudyConfig
from refusal_jax.study.mechanism.settings import MechanismSettings
from refusal_jax.study.shared import Study

SUFFIX_TOKENS = 20  # of a usual suffix, as in the paper


class MechanismStudy(Study):
    """A finished study whose mechanism is looked at. settings: those of the mechanism; `config` has those of the study."""

    def __init__(
        self,
        settings: MechanismSettings,
        config: StudyConfig,
        run: Run,
        folder: pathlib.Path,
        groups: tuple[Group, ...] = (),
    ):
        super().__init__(config, run, folder, groups=groups)
        self.settings = settings

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
        """Returns what is planned for, with room for a suffix after each prompt."""
        return mechanism_workload(cfg, dtype, self.config, length, self.groups, self.settings)


def mechanism_workload(
    cfg: ModelConfig,
    dtype: str,
    config: StudyConfig,
    length: int,
    groups: tuple[Group, ...],
    settings: MechanismSettings,
) -> Workload:
    """Returns the programs of the mechanism of a study, to be planned. config: of the study. length: tokens that its prompts are
    padded to, without a suffix."""
    return Workload(cfg, dtype, config, bucket(length + SUFFIX_TOKENS), groups, mechanism=settings)
