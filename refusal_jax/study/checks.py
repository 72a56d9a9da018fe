"""Checks of a study's settings before any work is done."""

import re

from refusal_jax.chat.messages import system_text
from refusal_jax.chat.model import weights_dtype
from refusal_jax.chat.templates import named_template
from refusal_jax.checkpoints.load import check_dtype
from refusal_jax.conditions import Condition, datasets
from refusal_jax.data.prompts import BUNDLED, read_chat_pairs, read_prompts
from refusal_jax.data.sampling import STAGES
from refusal_jax.data.sources import resolve
from refusal_jax.errors import UserError, did_you_mean, field
from refusal_jax.judges.behaviours import JUDGE, REFUSAL, TOKENS, Behaviour
from refusal_jax.judges.choice import parse_judges
from refusal_jax.judges.judge import Judge
from refusal_jax.judges.rules import RULES
from refusal_jax.judges.scores import REFUSAL_SCORE
from refusal_jax.judges.text import TEXT_JUDGES
from refusal_jax.plan.planner import ON_CPU
from refusal_jax.study.config import StudyConfig

NAME = re.compile(r"[^\W_](?:[\w -]{0,38}[^\W_])?")  # of a behaviour and of its sides


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
    judges = parse_judges(config.judges, config.batch_size or ON_CPU.forward, config.dtype, cache=config.cache)
    check_behaviour(config, judges)
    return judges


def check_behaviour(config: StudyConfig, judges: list[Judge]) -> None:
    """Raises UserError for a behaviour whose names, sides, measure or judge cannot be."""
    behaviour, names = Behaviour.of(config), [judge.name for judge in judges]
    for name in ("name", "present", "absent"):
        if not NAME.fullmatch(config.behaviour[name]):
            raise UserError(
                f"{field(f'behaviour.{name}')} = {config.behaviour[name]!r}, expected a word or a few, of at most 40 letters, "
                "digits, blanks and hyphens, which the report calls it by."
            )
    if behaviour.present.casefold() == behaviour.absent.casefold():
        raise UserError(
            f"{field('behaviour.present')} and {field('behaviour.absent')} are both {behaviour.present!r}. Give the two sides of "
            "the contrast different names."
        )
    if behaviour.measure not in (TOKENS, JUDGE):
        raise UserError(
            f"{field('behaviour.measure')} = {behaviour.measure!r}, expected {TOKENS!r} or {JUDGE!r}."
            f"{did_you_mean(behaviour.measure, (TOKENS, JUDGE))}"
        )
    if config.behaviour.judge and config.behaviour.judge not in names:
        raise UserError(
            f"{field('behaviour.judge')} = {config.behaviour.judge!r}, and the judges are {', '.join(names)}. Name one of them, "
            f"or add it to {field('judges')}."
        )
    if behaviour.is_refusal:
        return
    check_judge(behaviour)
    check_sides(config, behaviour)


def check_judge(behaviour: Behaviour) -> None:
    """Raises UserError for a judge that cannot tell the behaviour."""
    if behaviour.name != REFUSAL.name and behaviour.judge in (*TEXT_JUDGES, RULES):
        raise UserError(
            f"The judge {behaviour.judge!r} looks for refusals, and the behaviour is {behaviour.name!r}. Name a judge of it "
            f"first in {field('judges')}: ('uses=WORD|WORD',) or ('avoids=WORD|WORD',), words in its replies; "
            f"('{REFUSAL_SCORE}',), its opening tokens; or a judge model with a question of yours, ('llm=MODEL@TEMPLATE.txt',), "
            "whose no is the behaviour."
        )
    if behaviour.measure == JUDGE and behaviour.judge == REFUSAL_SCORE:
        raise UserError(
            f"The judge {REFUSAL_SCORE!r} reads opening tokens and no replies. Set {field('behaviour.measure', TOKENS)}, or name "
            f"another judge in {field('behaviour.judge')}."
        )


def check_sides(config: StudyConfig, behaviour: Behaviour) -> None:
    """Raises UserError for sides that are the package's own prompts, or that hold the same prompts."""
    for part in STAGES:
        sources = [config.data[f"{side}_{part}"] for side in ("harmful", "harmless")]
        for source, side in zip(sources, ("harmful", "harmless"), strict=True):
            if source == BUNDLED:
                raise UserError(
                    f"{field(f'data.{side}_{part}')} is {BUNDLED!r}: these prompts are made for refusal. Name a file of "
                    f"{behaviour.side(side == 'harmless')} prompts; one file may serve training, validation and test, and is "
                    "then shared out among them."
                )
        texts = [
            {row["instruction"].strip().casefold() for row in read_prompts(resolve(s, f"{side}_{part}"))}
            for s, side in zip(sources, ("harmful", "harmless"), strict=True)
        ]
        if texts[0] <= texts[1] or texts[1] <= texts[0]:
            raise UserError(
                f"All prompts of one side are on the other, too: {field(f'data.harmful_{part}')} = {sources[0]!r} and "
                f"{field(f'data.harmless_{part}')} = {sources[1]!r}. A contrast needs prompts that show {behaviour.name} "
                f"({behaviour.present}) and others that do not ({behaviour.absent})."
            )


def check_numbers(config: StudyConfig) -> None:
    """Raises UserError for a number that is too small."""
    numbers = {
        "batch_size": config.batch_size,
        "select.batch_size": config.select.batch_size,
        **{f"mesh.{name}": size for name, size in dict(config.mesh).items()},
        **{f"data.{name}": config.data[name] for name in ("n_train", "n_val", "n_test")},
        **{f"generation.{name}": config.generation[name] for name in ("max_new_tokens", "batch_size")},
        **{f"behaviour.{name}": config.behaviour[name] for name in ("reply_tokens", "candidates")},
        **{f"loss.{name}": config.loss[name] for name in ("text_tokens", "batch_size")},
    }
    for name, value in numbers.items():
        least = 0 if name.endswith("batch_size") or name.startswith("mesh") else 1
        if value < least:
            raise UserError(f"{field(name)} = {value}, expected at least {least}.")
