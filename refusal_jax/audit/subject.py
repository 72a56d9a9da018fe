"""Defines what an audit looks at: the candidate, its base if there is one, and the prompts. Everything is opened when a lane
first asks for it."""

import dataclasses
import functools
import logging
import pathlib
from typing import Any

import jax

from refusal_jax.audit.broken import finding_damage
from refusal_jax.audit.settings import AuditSettings
from refusal_jax.audit.weights import StoredWeights
from refusal_jax.chat.model import ChatModel, load_model
from refusal_jax.checkpoints.adapters import is_adapter, named_base
from refusal_jax.checkpoints.matrices import Weights
from refusal_jax.checkpoints.opened import model_folder
from refusal_jax.checkpoints.remote import checkpoint_folder
from refusal_jax.data.sampling import SPLITS, sample_prompts
from refusal_jax.data.settings import DataSettings

LOG = logging.getLogger(__name__)


class Opened:
    """One checkpoint, the candidate or the base: its folder, its weights, and its chat model.

    name: what the user calls it. settings: the audit's. mesh: the devices that its model is on.
    """

    def __init__(self, name: str, settings: AuditSettings, mesh: jax.sharding.Mesh | None = None):
        self.name, self.settings, self.mesh = name, settings, mesh

    @functools.cached_property
    def folder(self) -> pathlib.Path:
        """Returns the folder on this machine; of an adapter, the mirror that makes it a checkpoint on its base.

        Raises UserError if there is nothing by that name, and for an adapter without its base, BrokenCheckpoint for a damaged
        file.
        """
        with finding_damage():
            return model_folder(self.name, self.settings.base)

    @functools.cached_property
    def adapter_base(self) -> str:
        """Returns the base that an adapter is read on, "" for a checkpoint that is no adapter: the one of the settings, or the
        one that it names if that is on this machine. Raises UserError for an adapter without either."""
        folder = checkpoint_folder(self.name, adapters=True)
        return (self.settings.base or named_base(folder)) if is_adapter(folder) else ""

    @functools.cached_property
    def weights(self) -> Weights:
        """Returns the weights. Raises UserError and BrokenCheckpoint as `StoredWeights.open` does."""
        return StoredWeights.open(self.folder)

    @functools.cached_property
    def model(self) -> ChatModel:
        """Returns the chat model. Raises UserError as `load_model` does."""
        s = self.settings
        return load_model(
            self.folder,
            s.dtype,
            self.mesh,
            progress=True,
            chat_template=s.chat_template,
            thinking=s.thinking,
            system_prompt=s.system_prompt,
        )

    def release(self) -> None:
        """Frees the memory of the model."""
        self.__dict__.pop("model", None)


@dataclasses.dataclass
class Subject:
    """The candidate and its base, if one is given, with the audit's settings.

    shared: values that one lane leaves for the next, such as the base's directions, by name.
    """

    settings: AuditSettings
    candidate: Any  # an `Opened`, or a stand-in of it in the benchmark of detectors
    base: Any = None
    shared: dict[str, Any] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def prompts(self) -> dict[str, list[str]]:
        """Returns `{harmful_fit, harmless_fit, harmful_test, harmless_test}`, which share no prompt. Raises UserError as
        `sample_prompts` does."""
        return draw_prompts(self.settings)


def draw_prompts(settings: AuditSettings) -> dict[str, list[str]]:
    """Returns the prompts of an audit as `{harmful_fit, harmless_fit, harmful_test, harmless_test}`.

    Raises UserError for prompt files that cannot be used.
    """
    data = DataSettings()
    for split in SPLITS:
        data[split] = getattr(settings, split.partition("_")[0])
    data.update(n_train=settings.n_fit, n_val=1, n_test=settings.n_test, seed=settings.seed)
    drawn = sample_prompts(data, LOG.info)
    return {
        f"{side}_{part}": [row["instruction"] for row in drawn[f"{side}_{split}"]]
        for side in ("harmful", "harmless")
        for part, split in (("fit", "train"), ("test", "test"))
    }
