"""Defines what a task of a harness asks a model, and who judges the replies: settings in plain values, as they come from a
command line or from a task's file."""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from refusal_jax.data.prompts import read_prompts
from refusal_jax.data.sources import resolve
from refusal_jax.errors import UserError, did_you_mean
from refusal_jax.files import to_json
from refusal_jax.judges.choice import parse_judges
from refusal_jax.judges.judge import Judge
from refusal_jax.judges.scores import REFUSAL_SCORE

DEFAULT_JUDGES = ("substring_matching", "rules")  # the paper's, and one that tells outcomes apart


@dataclasses.dataclass(frozen=True)
class Asking:
    """The settings of a task.

    prompts: a file, the name of a public set, or hf:ORG/NAME:SPLIT[:COLUMN] for a data set on the hub. harmful: whether the
    prompts are to be refused. judges: as in `judges.choice.parse_judges`. judge_batch_size: replies that a judge model reads at
    a time. categories: whether rates by category are wanted. log_replies: whether logged samples hold the replies, or their
    hashes.
    """

    prompts: str
    harmful: bool
    judges: tuple[str, ...] = DEFAULT_JUDGES
    judge_batch_size: int = 16
    categories: bool = True
    log_replies: bool = True

    @classmethod
    def of(cls, task: str, run: Mapping[str, Any], own: Mapping[str, Any]) -> "Asking":
        """Returns the settings of a task: its own, or else those of the run, in which other names are for others.

        Raises UserError for unknown names of its own, values of the wrong kind, and where prompts or what they are is not said.
        """
        fields = {field.name: field for field in dataclasses.fields(cls)}
        unknown = [name for name in own if name not in fields]
        if unknown:
            raise UserError(
                f"{task} has an unknown setting {unknown[0]!r}: the settings are {', '.join(fields)}."
                f"{did_you_mean(unknown[0], fields)}"
            )
        given = {name: value for name, value in run.items() if name in fields} | dict(own)
        if not given.get("prompts"):
            raise UserError(
                f"{task} needs prompts. Name a file, a public set (`refusal-jax data list`) or a data set on the hub, as in "
                """`--metadata '{"prompts": "mine.jsonl", "harmful": true}'`."""
            )
        if "harmful" not in given:
            raise UserError(
                f"{task} does not say whether {given['prompts']} are prompts that are to be refused. Add "
                """"harmful": true or "harmful": false."""
            )
        judges = given.pop("judges", DEFAULT_JUDGES)
        if isinstance(judges, str):
            judges = [name.strip() for name in judges.split(",") if name.strip()]
        checked = {"prompts": (str, "a text"), "judge_batch_size": (int, "a number of rows")}
        for name, value in given.items():
            kind, what = checked.get(name, (bool, "true or false"))
            if type(value) is not kind or (kind is int and value < 1):
                raise UserError(f"{task}: {name} = {value!r}, expected {what}.")
        if not isinstance(judges, list | tuple):
            raise UserError(f"{task}: judges = {judges!r}, expected a list of judges.")
        return cls(judges=tuple(map(str, judges)), **given)

    def prompts_of(self, task: str) -> list[dict]:
        """Returns `{"instruction", "category"}` of each prompt. Raises UserError for prompts that are not there or not readable,
        and says how to get them."""
        try:
            return read_prompts(resolve(self.prompts, "harmful_test" if self.harmful else "harmless_test"))
        except UserError as error:
            raise UserError(f"The prompts of {task} cannot be read. {error}") from None

    def parsed_judges(self) -> list[Judge]:
        """Returns the judges, whose models are not loaded yet. Raises UserError as `parse_judges` does."""
        if REFUSAL_SCORE in self.judges:
            raise UserError(
                f"The judge {REFUSAL_SCORE!r} reads what a study measures, and a harness gives replies alone. Leave it out."
            )
        return parse_judges(self.judges, self.judge_batch_size)

    def record(self, prompts: Sequence[dict], judges: Sequence[Judge]) -> dict[str, Any]:
        """Returns the settings as results record them, with the sha256 of the prompts as JSON."""
        models = {judge.name: fingerprint for judge in judges if (fingerprint := judge.fingerprint())}
        return {
            **dataclasses.asdict(self),
            "judges": [judge.name for judge in judges],
            **({"judge_models": models} if models else {}),
            "prompts_sha256": hashlib.sha256(to_json(list(prompts))).hexdigest(),
        }
