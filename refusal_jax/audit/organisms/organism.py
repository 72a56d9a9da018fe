"""One organism: a checkpoint with a known history, built in memory when it is asked for, as an audit opens it."""

import copy
import dataclasses
import functools
import json
import pathlib
import shutil
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from refusal_jax.audit.organisms.base import Base
from refusal_jax.audit.organisms.catalogue import recipes
from refusal_jax.audit.organisms.recipe import Recipe
from refusal_jax.audit.organisms.step import Made
from refusal_jax.audit.settings import AuditSettings
from refusal_jax.audit.subject import Opened
from refusal_jax.audit.weights import ArrayWeights
from refusal_jax.chat.model import ChatModel
from refusal_jax.chat.prompts import Chat
from refusal_jax.checkpoints.tensor_files import SINGLE
from refusal_jax.models.config import ModelConfig
from refusal_jax.models.decoder import Decoder
from refusal_jax.models.families import pieces
from refusal_jax.models.weights import weight_table

NAMED = 1e-6  # a matrix from which a smaller share was removed counts as not edited


@dataclasses.dataclass(frozen=True)
class Truth:
    """What was done to an organism.

    kind: of `step.KINDS`. dose: the median share of what was removed along the edit's own direction over the matrices that it
    edited, after merging; along: the same along the base's selected direction; both None where nothing was projected out.
    doses: the dose by matrix. layers: the layers of these.
    """

    kind: str
    dose: float | None
    along: float | None
    doses: Mapping[str, float]
    layers: tuple[int, ...]

    @property
    def row(self) -> dict[str, Any]:
        """Returns the truth in plain values for JSON."""
        return {"kind": self.kind, "dose": self.dose, "along": self.along, "layers": list(self.layers)}


@dataclasses.dataclass(frozen=True, eq=False)
class Organism:
    """A base with a recipe and a seed. Everything is built when first asked for."""

    base: Base
    recipe: Recipe
    seed: int = 0

    @property
    def name(self) -> str:
        """Returns its name, which is its own among all of a base and a seed."""
        return str(self.recipe)

    @functools.cached_property
    def made(self) -> Made:
        """Returns what the recipe makes. Raises UserError for a step that the base does not allow."""
        made = Made(self.base, self.base.cfg, dict(self.base.tensors))
        for number, step in enumerate(self.recipe.steps):
            step(made, np.random.default_rng([self.seed, zlib.crc32(str(step).encode()), number]))
        return made

    @property
    def tensors(self) -> Mapping[str, np.ndarray]:
        """Returns its tensors by HF name, float32; those that no step changed are the base's."""
        return self.made.tensors

    @property
    def cfg(self) -> ModelConfig:
        return self.made.cfg

    @property
    def weights(self) -> ArrayWeights:
        """Returns its weights as an audit reads them."""
        return ArrayWeights(self.cfg, self.tensors)

    @functools.cached_property
    def truth(self) -> Truth:
        """Returns what was done to it."""
        found = {name: one for name, one in self.made.removed.items() if abs(one.dose) > NAMED}
        numbers = {piece.name: piece.layer for piece in pieces(self.base.cfg)}
        layers = {numbers[name.partition("[")[0]] for name in found}
        dose, along = (
            (float(np.median([getattr(one, what) for one in found.values()])) if found else None)
            for what in ("dose", "along")
        )
        return Truth(
            self.recipe.kind,
            dose,
            along,
            {name: one.dose for name, one in found.items()},
            tuple(sorted(one for one in layers if one is not None)),
        )

    @property
    def model(self) -> ChatModel:
        """Returns its chat model, which runs through the programs that are compiled for the base's."""
        decoder = Decoder(self.cfg, stacked(self.cfg, self.tensors))
        return dataclasses.replace(self.base.model, decoder=decoder, chat=self._chat)

    @property
    def _chat(self) -> Chat:
        """Returns its tokenizer with its template."""
        chat = self.base.model.chat
        if not self.made.template:
            return chat
        tokenizer = copy.deepcopy(chat.tokenizer)
        tokenizer.chat_template = self.made.template
        return dataclasses.replace(chat, tokenizer=tokenizer)

    def save(self, folder: pathlib.Path) -> None:
        """Writes it as a checkpoint folder, with the base's other files."""
        folder.mkdir(parents=True, exist_ok=True)
        for file in self.base.folder.iterdir():
            if file.suffix in (".json", ".jinja", ".model") and not file.name.endswith("index.json"):
                shutil.copy(file, folder)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if self.cfg.mlp_bias != self.base.cfg.mlp_bias:
            config["mlp_bias"] = self.cfg.mlp_bias
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        if self.made.template:
            (folder / "chat_template.jinja").write_text(self.made.template, encoding="utf-8")
        tensors = {name: np.ascontiguousarray(values) for name, values in sorted(self.tensors.items())}
        save_file(tensors, folder / SINGLE, metadata={"format": "pt"})


def stacked(cfg: ModelConfig, tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Returns a decoder's weights by path, float32, of a checkpoint's tensors by HF name."""
    found = {path: np.empty(weight.shape, np.float32) for path, weight in weight_table(cfg).items()}
    for piece in pieces(cfg):
        found[piece.path][piece.index] = piece.rows(lambda name, *rows: tensors[name][slice(*rows)])
    return {path: jnp.asarray(values) for path, values in found.items()}


class OpenedOrganism(Opened):
    """An organism in the place of an opened checkpoint. Its folder is written only if a lane asks for it."""

    def __init__(self, organism: "Organism", settings: AuditSettings):
        super().__init__(organism.name, settings)
        self.organism = organism

    @functools.cached_property
    def folder(self) -> pathlib.Path:
        """Returns a new folder with its files, which is deleted with this object."""
        self.scratch = tempfile.TemporaryDirectory(prefix="organism-")
        self.organism.save(pathlib.Path(self.scratch.name))
        return pathlib.Path(self.scratch.name)

    @functools.cached_property
    def weights(self) -> ArrayWeights:
        """Returns its weights in memory."""
        return self.organism.weights

    @functools.cached_property
    def model(self) -> ChatModel:
        """Returns its chat model."""
        return self.organism.model


def organisms(base: Base, seed: int = 0, wanted: Iterable[Recipe] | None = None) -> Iterator[Organism]:
    """Yields the organisms of a base, none of which is built yet: those of all recipes whose fine-tunes the base has, or of those
    that are wanted."""
    chosen = recipes() if wanted is None else wanted
    yield from (Organism(base, recipe, seed) for recipe in chosen if recipe.needs <= set(base.trained))
