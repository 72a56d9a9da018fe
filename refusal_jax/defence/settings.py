"""The settings of a defence, with a section for each recipe that has settings of its own."""

import dataclasses

from refusal_jax.chat.templates import BUILT_IN
from refusal_jax.defence.adversarial_settings import DeepRefusalSettings, RefatSettings
from refusal_jax.defence.data import PairSettings
from refusal_jax.defence.edit_settings import (
    CalibrationSettings,
    ConditionalSettings,
    InjectionSettings,
    SearchSettings,
)
from refusal_jax.defence.recipe_settings import BreakerSettings, DepthSettings, ExtendedSettings
from refusal_jax.errors import UserError, did_you_mean, field
from refusal_jax.judges.rules import RULES
from refusal_jax.settings import Settings, option, section
from refusal_jax.study.config import FITTING, MeshSettings
from refusal_jax.training.settings import TrainSettings

OUTPUTS = ("model", "adapter", "both")
OF_RECIPES = (
    "refat",
    "deep_refusal",
    "extended",
    "depth",
    "breakers",
    "injection",
    "conditional",
    "calibration",
)  # sections


@dataclasses.dataclass
class DefenceSettings(Settings):
    """Every setting of a defence."""

    recipe: str = option("", "Name of the recipe")
    model: str = option(
        "",
        "Checkpoint to defend: a folder, its name on the hub (ORG/NAME or ORG/NAME@REVISION), or its address "
        "(gs://BUCKET/FOLDER); '' is the embedded demo model",
    )
    output: str = option(
        "model",
        "What is written: 'model', a Hugging Face checkpoint with the defence in its weights; 'adapter', a PEFT adapter beside "
        "the base; or 'both'",
    )
    dtype: str = option("auto", "float32, bfloat16 or float16; auto is float32 on a CPU and bfloat16 elsewhere")
    batch_size: int = option(0, f"Replies that are decoded at a time when the defence is measured; {FITTING}")
    max_new_tokens: int = option(64, "Maximum length in tokens of the replies that the defence is measured by")
    judge: str = option(RULES, "Judge of these replies, as in a study's judges; it must know refusals from answers")
    keep_states: bool = option(False, "Keep the states of the training once the result is written")
    chat_template: str = option(
        "", f"Name of a built-in template ({', '.join(BUILT_IN)}) or a .jinja file; '' is the tokenizer's own"
    )
    system_prompt: str = option("", "System prompt: a text, a .txt file, or 'none'")
    thinking: bool = option(False, "Ask models that can think to do so")
    mesh: MeshSettings = section(MeshSettings, "The devices along each axis of the mesh")
    data: PairSettings = section(PairSettings, "The prompts and replies that are learnt, and those held out")
    train: TrainSettings = section(TrainSettings, "What is trained, by which optimiser, and for how long")
    refat: RefatSettings = section(RefatSettings, "The recipe refat: what is ablated from harmful rows")
    deep_refusal: DeepRefusalSettings = section(
        DeepRefusalSettings, "The recipe deep_refusal: what is ablated from tokens"
    )

    extended: ExtendedSettings = section(ExtendedSettings, "Extended refusals")
    depth: DepthSettings = section(DepthSettings, "Refusals after the beginning of a reply that complies")
    breakers: BreakerSettings = section(BreakerSettings, "Circuit breakers")
    search: SearchSettings = section(SearchSettings, "How recipes without training choose")
    injection: InjectionSettings = section(InjectionSettings, "A safety injection")
    conditional: ConditionalSettings = section(ConditionalSettings, "A conditional steering")
    calibration: CalibrationSettings = section(CalibrationSettings, "A calibration of false refusals")

    def check(self) -> None:
        """Raises UserError for settings that are out of range, but for those of sections that the model decides."""
        for name in ("data", "search", *OF_RECIPES):
            self[name].check()
        if self.output not in OUTPUTS:
            raise UserError(
                f"{field('output')} is {self.output!r}, expected {', '.join(OUTPUTS)}.{did_you_mean(self.output, OUTPUTS)}"
            )
        if self.max_new_tokens < 1 or self.batch_size < 0:
            raise UserError(
                f"{field('max_new_tokens')} = {self.max_new_tokens} and {field('batch_size')} = {self.batch_size}: replies have "
                "1 token or more, and a batch has 0 rows or more."
            )
