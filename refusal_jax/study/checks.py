"""Checks of a study's settings before any work is done."""

from refusal_jax.chat.messages import system_text
from refusal_jax.chat.model import weights_dtype
from refusal_jax.chat.templates import named_template
from refusal_jax.checkpoints.load import check_dtype
from refusal_jax.conditions import Condition, datasets
from refusal_jax.data.prompts import read_chat_pairs, read_prompts, resolve
from refusal_jax.errors import UserError, field
from refusal_jax.judges.choice import parse_judges
from refusal_jax.judges.judge import Judge
from refusal_jax.plan.planner import ON_CPU
from refusal_jax.study.config import StudyConfig


def check_settings(config: StudyConfig) -> list[Judge]:
    """Returns the judges, which are checked with the rest.

    Raises UserError for settings and files that cannot work with any model.
    """
    check_dtype(weights_dtype(config.dtype))
    if config.chat_template:
        named_template(config.chat_template)
    system_text(config.system_prompt)
    if not config.generation.conditions:
        raise UserError(f"{field('generation.conditions')} is empty: name at least one, such as harmful_baseline.")
    for read, files in ((read_prompts, config.loss.text_files), (read_chat_pairs, config.loss.chat_files)):
        for file in (resolve(file, "loss") for file in files):
            read(file)
    known = {key: dataset for key, dataset in datasets(config.data).items() if key in ("harmful", "harmless")}
    for condition in config.generation.conditions:
        Condition.parse(condition, known)
    check_numbers(config)
    return parse_judges(config.judges, config.batch_size or ON_CPU.forward, config.dtype, cache=config.cache)


def check_numbers(config: StudyConfig) -> None:
    """Raises UserError for a number that is too small."""
    numbers = {
        "batch_size": config.batch_size,
        "select.batch_size": config.select.batch_size,
        **{f"mesh.{name}": size for name, size in dict(config.mesh).items()},
        **{f"data.{name}": config.data[name] for name in ("n_train", "n_val", "n_test")},
        **{f"generation.{name}": config.generation[name] for name in ("max_new_tokens", "batch_size")},
        **{f"loss.{name}": config.loss[name] for name in ("text_tokens", "batch_size")},
    }
    for name, value in numbers.items():
        least = 0 if name.endswith("batch_size") or name.startswith("mesh") else 1
        if value < least:
            raise UserError(f"{field(name)} = {value}, expected at least {least}.")
