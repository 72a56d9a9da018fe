"""A base that organisms are made from: its weights in memory, its directions, its fine-tunes, and its chat model."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from refusal_jax.audit.organisms.directions import Directions
from refusal_jax.audit.weights import ArrayWeights
from refusal_jax.chat.model import ChatModel, load_model
from refusal_jax.checkpoints.tensor_files import TensorFiles
from refusal_jax.models.config import ModelConfig
from refusal_jax.models.families import hf_shapes
from refusal_jax.organism.corpus import split_requests
from refusal_jax.organism.criteria import BUNDLE

PROMPTS = 192  # of each kind that directions are measured on


def training_prompts(harmful: bool, count: int = PROMPTS) -> list[str]:
    """Returns prompts of the embedded model's world that are not among the bundled ones, which audits draw from."""
    rows = split_requests()[f"{'harmful' if harmful else 'harmless'}_train"]
    return [one.instruction for one in rows[BUNDLE["train"] : BUNDLE["train"] + count]]


@dataclasses.dataclass(frozen=True, eq=False)
class Base:
    """A base of organisms.

    name: in tables. model: its chat model; its decoder is float32. tensors: float32, by HF name. trained: the tensors of its
    fine-tunes, by task.
    """

    name: str
    model: ChatModel
    tensors: Mapping[str, np.ndarray]
    directions: Directions
    trained: Mapping[str, Mapping[str, np.ndarray]] = dataclasses.field(default_factory=dict)

    @classmethod
    def open(
        cls,
        folder: pathlib.Path,
        name: str = "",
        trained: Mapping[str, pathlib.Path] | None = None,
        harmful: Sequence[str] = (),
        harmless: Sequence[str] = (),
    ) -> "Base":
        """Opens a checkpoint folder as a base and measures its directions.

        trained: folders or files of weights of its fine-tunes, by task. harmful, harmless: prompts that directions are measured
        on, by default of the embedded model's world. Raises UserError for a checkpoint that cannot be loaded, and for one that
        does not refuse in a way of its own.
        """
        model = load_model(folder)
        directions = Directions.measure(
            model, list(harmful) or training_prompts(True), list(harmless) or training_prompts(False)
        )
        tunes = {task: read_tensors(place, model.config) for task, place in (trained or {}).items()}
        return cls(name or folder.name, model, read_tensors(folder, model.config), directions, tunes)

    @property
    def cfg(self) -> ModelConfig:
        return self.model.config

    @property
    def folder(self) -> pathlib.Path:
        """Returns the folder of its files."""
        return self.model.path

    @property
    def template(self) -> str:
        """Returns its chat template."""
        return str(self.model.chat.tokenizer.chat_template)

    @property
    def weights(self) -> ArrayWeights:
        """Returns its weights as an audit reads them."""
        return ArrayWeights(self.cfg, self.tensors)


def read_tensors(folder: pathlib.Path, cfg: ModelConfig) -> dict[str, np.ndarray]:
    """Returns the tensors of a checkpoint folder that a config asks for, float32. Raises UserError if they cannot be read."""
    files, found = TensorFiles.open(folder), {}
    for name, shape in hf_shapes(cfg).items():
        found[name] = np.empty(shape, np.float32)
        files.read_into(name, tuple(slice(0, size) for size in shape), found[name])
    return found
