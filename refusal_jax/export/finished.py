"""Reads what an export takes from a finished study besides the direction: its model, its prompts and its
measurements."""

import dataclasses
import json
import pathlib

from refusal_jax.chat.messages import as_setting
from refusal_jax.checkpoints.remote import checkpoint_folder
from refusal_jax.conditions import Baseline
from refusal_jax.data.prompts import BUNDLED, read_prompts
from refusal_jax.data.sources import resolve
from refusal_jax.directions import DIRECTION, check_found
from refusal_jax.errors import UserError
from refusal_jax.files import read_json
from refusal_jax.report.summary import REFUSAL_JUDGE, JudgedCondition, read_conditions, read_losses
from refusal_jax.runs.artifacts import PROMPTS, SETUP
from refusal_jax.runs.run import MANIFEST, Run, read_manifest

VAL = ("harmful_val", "harmless_val")


@dataclasses.dataclass(frozen=True)
class FinishedStudy:
    """model: the checkpoint that it ran on, as `remote.checkpoint_folder` finds it, with its fingerprint. prompts: instructions,
    harmful ones first. harmless: pairs of a harmless instruction and the model's own reply, or "". template: settings of the
    chat template. conditions and losses: of `report.summary`, empty where nothing was measured."""

    model: str | pathlib.Path | None
    fingerprint: str | None
    prompts: list[str]
    harmless: list[tuple[str, str]]
    template: dict
    conditions: list[JudgedCondition]
    losses: dict

    @classmethod
    def read(cls, folder: pathlib.Path, count: int) -> "FinishedStudy":
        """Reads the folder of a finished study.

        count: number of prompts of each side, and of replies. Raises UserError if the folder is not a finished study, is
        damaged, or holds a study that found no direction.
        """
        check_found(folder)
        for name in (DIRECTION, PROMPTS, SETUP, MANIFEST):
            if not (folder / name).is_file():
                raise UserError(
                    f"{folder} holds no {name}, so it is not a finished study. Run `refusal-jax study "
                    f"--workdir={folder}` first."
                )
        manifest = read_manifest(folder / MANIFEST)
        run = Run(folder, manifest)
        try:
            setup = read_json(folder / SETUP)
            rows = json.loads((folder / PROMPTS).read_text(encoding="utf-8"))
            sides = [[row["instruction"] for row in rows[side][:count]] for side in VAL]
            conditions = read_conditions(run)
            own = [c.completions for c in conditions if c.harmless and c.intervention == Baseline.name]
            replies = [(c["prompt"], c["response"]) for found in own for c in found if c["response"]][:count]
            return cls(
                str(setup["model"]),
                manifest["inputs"].get("model"),
                sides[0] + sides[1],
                replies or [(text, "") for text in sides[1]],
                {name: manifest["config"][name] for name in ("chat_template", "thinking") if name in manifest["config"]}
                | {"system_prompt": as_setting(setup.get("system_prompt", ""))},
                conditions,
                read_losses(run),
            )
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"The study in {folder} is damaged ({error}). Run it again with the same settings: it redoes what is "
                "damaged."
            ) from None

    @classmethod
    def none(cls, count: int, chat_template: str = "", system_prompt: str = "") -> "FinishedStudy":
        """Returns a stand-in with the bundled prompts, for a direction that comes from elsewhere."""
        template = {"chat_template": chat_template, "system_prompt": system_prompt}
        sides = [[row["instruction"] for row in read_prompts(resolve(BUNDLED, side))[:count]] for side in VAL]
        return cls(None, None, sides[0] + sides[1], [(t, "") for t in sides[1]], template, [], {})

    def checkpoint(self) -> pathlib.Path | None:
        """Returns the folder of the checkpoint that it ran on, which is fetched if it is on the hub. Raises UserError as
        `remote.checkpoint_folder` does."""
        return None if self.model is None else checkpoint_folder(self.model)

    def refusals(self) -> list[dict]:
        """Returns how often each condition was refused, with the 95 % interval, in plain values."""
        found = []
        for condition in self.conditions:
            rate = condition.rates.get(REFUSAL_JUDGE)
            if rate and rate.n:
                row = {"prompts": condition.dataset, "intervention": condition.label, "refused": rate.rate}
                found.append(row | {"interval": list(rate.interval), "n": rate.n})
        return found
