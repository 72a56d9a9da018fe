"""State that the stages of one study share: its settings, its run, and the model, which is loaded when a stage first
needs it."""

import functools
import gc
import logging
import pathlib
from collections.abc import Sequence
from typing import Any

import jax

from refusal_jax import distributed
from refusal_jax.chat.batches import padding_of
from refusal_jax.chat.model import ChatModel, load_model, weights_dtype
from refusal_jax.chat.padding import Padding
from refusal_jax.chat.prompts import Chat
from refusal_jax.conditions import Ablate, Affine, Baseline, Condition, Dataset, Kind, datasets, with_origin
from refusal_jax.data.sampling import over_refusal_names
from refusal_jax.directions import Direction
from refusal_jax.errors import UserError, field
from refusal_jax.judges.behaviours import JUDGE, Behaviour
from refusal_jax.judges.judge import Judge
from refusal_jax.models.config import ModelConfig
from refusal_jax.models.hf_config import load_config
from refusal_jax.plan.planner import run_mesh, run_sizes
from refusal_jax.plan.programs import USUAL_LENGTH, Group, Sizes, Workload
from refusal_jax.runs.artifacts import DIRECTION, FILTER, MEANS, METADATA, NO_DIRECTION, PROMPTS, SETUP
from refusal_jax.runs.run import Run
from refusal_jax.study.ahead import Ahead
from refusal_jax.study.config import StudyConfig

LOG = logging.getLogger(__name__)


class Study:
    """The settings of a study, its run's folder, its model, and what follows from these.

    config: the settings. folder: the checkpoint's. judges: those of the settings. groups: the programs of the stages, which
    decide mesh and batches. ahead: what prepares later stages, once sizes of batches are known. drawn: the pictures of the page,
    once it is written, as `Findings` keeps them.
    """

    def __init__(
        self,
        config: StudyConfig,
        run: Run,
        folder: pathlib.Path,
        judges: Sequence[Judge] = (),
        groups: tuple[Group, ...] = (),
        ahead: Ahead | None = None,
    ):
        self.config, self.run, self.folder, self.judges, self.groups = config, run, folder, judges, groups
        self.ahead = ahead
        self._model: ChatModel | None = None
        self.drawn: dict[int, Sequence[Any]] = {}

    @functools.cached_property
    def behaviour(self) -> Behaviour:
        """Returns the behaviour that the study is about."""
        return Behaviour.of(self.config)

    @property
    def over_refusal(self) -> list[str]:
        """Returns the names of the harmless sets that look harmful."""
        return list(over_refusal_names(self.config.data))

    @property
    def datasets(self) -> dict[str, Dataset]:
        """Returns the test sets by key."""
        return datasets(self.config.data)

    @property
    def conditions(self) -> list[Condition]:
        """Returns the conditions of the settings, and for each over-refusal set baseline and ablation; only the baseline of every
        set if the study found no direction."""
        known = self.datasets
        if self.without_direction:
            return [Condition(dataset, Baseline) for dataset in known.values()]
        named = [Condition.parse(name, known) for name in self.config.generation.conditions]
        return named + [Condition(known[name], kind) for name in self.over_refusal for kind in (Baseline, Ablate)]

    def files(self, kind: Kind) -> list[str]:
        """Returns the names of the files of a kind, one for each condition."""
        return [condition.file(kind) for condition in self.conditions]

    @functools.cached_property
    def mesh(self) -> jax.sharding.Mesh | None:
        """Returns the mesh that the settings ask for, or else the one that is planned for the devices there are."""
        work = self.workload(load_config(self.folder), weights_dtype(self.config.dtype), USUAL_LENGTH)
        return run_mesh(work, self.config.mesh, jax.devices())

    def workload(self, cfg: ModelConfig, dtype: str, length: int) -> Workload:
        """Returns what is planned for. length: tokens that prompts are padded to."""
        return Workload(cfg, dtype, self.config, length, self.groups)

    @functools.cached_property
    def chat(self) -> Chat:
        """Returns the model's tokenizer, loaded on first use."""
        sizes, config = load_config(self.folder), self.config
        template = config.chat_template, config.thinking, config.system_prompt
        return Chat.load(self.folder, sizes.context_length, sizes.vocab_size, *template)

    @property
    def model(self) -> ChatModel:
        """Returns the model, loaded on first use. Raises UserError for a mesh without all devices of several processes, and for
        prompts that leave no room for the replies."""
        if self._model is None:
            self._model = self._load()
        return self._model

    def release(self) -> None:
        """Frees the devices' memory of the model."""
        if self.ahead:
            self.ahead.wait()
        self._model = None
        gc.collect()

    def _load(self) -> ChatModel:
        mesh = self.mesh
        if distributed.several() and (mesh is None or mesh.size != jax.device_count()):
            raise UserError(
                f"The mesh has {1 if mesh is None else mesh.size} of the {jax.device_count()} devices of the "
                f"{jax.process_count()} processes, which must all take part. Make the product of "
                f"{field('mesh.data')}, {field('mesh.fsdp')} and {field('mesh.model')} {jax.device_count()}, or leave them all 0."
            )
        model = load_model(
            self.folder,
            self.config.dtype,
            mesh,
            progress=distributed.first(),
            chat=self.chat,
            cache=self.config.cache,
            generation_from_checkpoint=self.config.generation.from_checkpoint,
        )
        room = self.config.generation.max_new_tokens
        for split, rows in self.run.read_json(PROMPTS).items():
            longest = int(model.encode([row["instruction"] for row in rows]).mask.sum(axis=1).max())
            most = model.config.context_length - longest
            if split.endswith("test") and room > most:
                raise UserError(
                    f"{field('generation.max_new_tokens')} = {room} does not fit: the longest prompt of {split} has {longest} "
                    f"tokens and the model's context is {model.config.context_length}. Set it to at most {most}, or drop "
                    "the longest prompts."
                )
        return model

    @property
    def sizes(self) -> Sizes:
        """Returns the rows of the batches of each stage: what fits the devices, with the longest prompt there is."""
        sizes = self._sizes
        if self.ahead:
            self.ahead.begin(self)
        return sizes

    @functools.cached_property
    def _sizes(self) -> Sizes:
        prompts = [row["instruction"] for rows in self.run.read_json(PROMPTS).values() for row in rows]
        length = self.model.encode(prompts).tokens.shape[1]
        work = self.workload(self.model.config, str(self.model.decoder.dtype), length)

        def note(text: str) -> None:
            LOG.info(f"Planning: {text}")

        return run_sizes(work, self.model.mesh, jax.local_devices(), note)

    @functools.cached_property
    def batches(self) -> Padding:
        """Returns the shapes of batches of prompts in forward passes, which are the same for all stages."""
        prompts = self.run.read_json(PROMPTS)
        sets = [self.instructions(split, kept_only=False) for split in prompts]
        return padding_of(self.model, sets, self.sizes.forward)

    def instructions(self, split: str, kept_only: bool = True) -> list[str]:
        """Returns the instructions of a split, by default only those that the filter kept."""
        rows = self.run.read_json(PROMPTS)[split]
        kept = self.run.read_json(FILTER)[split]["kept"] if kept_only else [True] * len(rows)
        return [row["instruction"] for row, keep in zip(rows, kept, strict=True) if keep]

    def refusal_ids(self) -> list[int]:
        """Returns the ids of the refusal tokens that the study settled on."""
        return [token["id"] for token in self.run.read_json(SETUP)["refusal_tokens"]]

    @property
    def without_tokens(self) -> str:
        """Returns why prompts have no scores, in words, or "" if they have: the study has no refusal tokens, or those of another
        behaviour."""
        if self.refusal_ids():
            return ""
        if self.behaviour.measure == JUDGE:
            return f"{self.behaviour.title} is measured by a judge of replies, and this part reads how replies begin."
        return f"Without {self.behaviour.tokens}, no {self.behaviour.name} of a prompt is known."

    @property
    def without_direction(self) -> str:
        """Returns that the study found no direction, in words, or "" if it found one or has not looked for it yet."""
        return "The study found no direction." if self.run.exists(NO_DIRECTION) else ""

    @property
    def of_direction(self) -> tuple[str, ...]:
        """Returns the names of the files that `direction` reads: the means too, if a condition needs the direction's origin."""
        affine = any(condition.intervention is Affine for condition in self.conditions)
        return (METADATA, DIRECTION, MEANS) if affine else (METADATA, DIRECTION)

    def direction(self) -> Direction:
        """Returns the selected direction, with its origin where a condition needs that."""
        selected = Direction.selected(self.run)
        return with_origin(selected, self.run.read_tensors(MEANS)) if MEANS in self.of_direction else selected
