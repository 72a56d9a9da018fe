"""The training loop: one jitted step over batches that an objective gives, with its state kept in a folder to go on from."""

import dataclasses
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from refusal_jax.chat.model import ChatModel
from refusal_jax.checkpoints.copies import largest_share
from refusal_jax.errors import UserError, field
from refusal_jax.models.decoder import Decoder
from refusal_jax.models.sharding import batch_sharding, put, sharding_of
from refusal_jax.models.weight import factor_names
from refusal_jax.models.weights import weight_table
from refusal_jax.progress import Progress
from refusal_jax.training.checkpoints import States
from refusal_jax.training.lora import Factors, fresh_factors
from refusal_jax.training.objective import Objective
from refusal_jax.training.optimiser import schedule
from refusal_jax.training.settings import TrainSettings
from refusal_jax.training.step import Step, state_shapes

READ_EVERY = 10  # steps after which losses are read from the devices, which would wait for them at every step


@dataclasses.dataclass(frozen=True)
class Trained:
    """The result of a training.

    decoder: with the trained weights; low-rank factors stand beside the frozen matrices, and `Decoder.weights` merges them.
    factors: the adapter's, float32, without the scale of `settings`; None where all weights were trained. losses: of each step,
    its number, "loss", the objective's parts, the norm of the gradients before clipping, and the learning rate.
    """

    decoder: Decoder
    factors: Factors | None
    settings: TrainSettings
    losses: list[dict[str, float]]

    @property
    def parameters(self) -> int:
        """Returns how many numbers were trained, without those of blocks that the settings leave as they were."""
        values, layers = self.factors or self.decoder.weights(), set(self.settings.layers)
        if not layers:
            return sum(a.size for a in values.values())
        having = {path: weight.layers for path, weight in weight_table(self.decoder.cfg).items()}
        having |= {factor: having[path] for path in list(having) for factor in factor_names(path)}
        return sum(a.size // len(a) * len(layers & set(having[path])) for path, a in values.items() if having[path])


def train(
    model: ChatModel,
    objective: Objective,
    settings: TrainSettings,
    folder: str | os.PathLike | None = None,
    *,
    title: str = "training",
    given: Mapping[str, Any] | None = None,
    until: Callable[[ChatModel], bool] | None = None,
) -> Trained:
    """Trains a model, or goes on with the training in `folder`, and returns what came of it; the model's own weights stay.

    folder: where the state is kept every `settings.every` steps, with each step's losses as losses.jsonl; None keeps nothing.
    given: what besides the settings decides the result, as JSON values, such as the hashes of model and data: a training in the
    folder is gone on with only if both are the same. until: is asked, each time losses are read, whether the model as it is now
    is trained enough, which then ends the training. All processes must call this. Raises UserError for settings that do not
    fit the model, for another training in the folder, and for a loss that is not finite.
    """
    settings.check(model.config)
    trainer = _Trainer(model.decoder, objective, settings, model)
    if folder is None:
        return trainer.run(title, until=until)
    kept = {name: value for name, value in settings.to_dict().items() if name != "every"}
    largest = largest_share(jax.tree.leaves((trainer.trained, trainer.state)))
    with States.of(folder, {"train": kept, **(given or {})}, largest) as states:
        return trainer.run(title, states, until)


def train_decoder(decoder: Decoder, objective: Objective, settings: TrainSettings, title: str = "training") -> Trained:
    """Trains a decoder as `train` does a model, on an objective that computes nothing outside the step, and keeps nothing."""
    settings.check(decoder.cfg)
    return _Trainer(decoder, objective, settings).run(title)


class _Trainer:
    """One training: its state, and the step that changes it. model: that the decoder is of, where the objective asks for it."""

    def __init__(self, decoder: Decoder, objective: Objective, settings: TrainSettings, model: ChatModel | None = None):
        self.model, self.objective, self.settings = model, objective, settings
        self.frozen, self.mesh = decoder, decoder.mesh
        self.schedule = schedule(settings)
        self.whole_step = Step(objective, settings, self.mesh)
        self.trained, optimiser = self._fresh(), self.whole_step.optimiser
        places = jax.tree.map(lambda a: a.sharding, state_shapes(optimiser, self.trained, self.mesh))
        self.state = jax.jit(optimiser.init, out_shardings=places)(self.trained)
        self.extra: Any = None
        self.step = self.whole_step.jitted(self.trained, self.state)

    def _fresh(self) -> dict[str, jax.Array]:
        """Returns what is trained, float32: fresh factors, or a copy of all weights."""
        if self.settings.method == "lora":
            return fresh_factors(self.frozen.cfg, self.settings, self.mesh)
        return {path: jnp.array(w, jnp.float32, copy=True) for path, w in self.frozen.weights().items()}

    def run(
        self, title: str, states: States | None = None, until: Callable[[ChatModel], bool] | None = None
    ) -> Trained:
        """Does the steps that are left, and returns the result. states: in which the state is kept, and may be found. until:
        as in `train`."""
        settings, first, losses, waiting = self.settings, 0, [], []
        if states is not None:
            first, losses = states.step, states.losses()
        if states is not None and first:
            (self.trained, self.state), self.extra = states.load((self.trained, self.state), self.mesh)
        with Progress(title, settings.steps, "step", done=first) as bar:
            for number in range(first, settings.steps):
                self._refresh(number)
                waiting.append((number, self._do(number)))
                done = number + 1
                due = states is not None and (done == settings.steps or (settings.every and done % settings.every == 0))
                if len(waiting) == READ_EVERY or done == settings.steps or due:
                    rows, waiting = self._read(waiting), []
                    losses += rows
                    if states is not None:
                        states.add_losses(rows)
                if states is not None and due:
                    states.save(done, (self.trained, self.state), self.extra)
                bar.update(note=_note(losses[-1]) if losses and not waiting else "")
                if until is not None and not waiting and done < settings.steps and until(self._now()):
                    break
        decoder = self.whole_step.decoder(self.frozen, self.trained)
        return Trained(decoder, self.trained if settings.method == "lora" else None, settings, losses)

    def _now(self) -> ChatModel:
        """Returns the model with the weights of now, of which the next step makes its own: it cannot be used any more then."""
        assert self.model is not None, "only a model's training asks for the model"
        return dataclasses.replace(self.model, decoder=self.whole_step.decoder(self.frozen, self.trained))

    def _refresh(self, number: int) -> None:
        """Computes anew what the objective keeps outside the step, when it is time."""
        if self.objective.refresh and number % self.objective.refresh == 0:
            found = self.objective.refreshed(self._now(), number)
            self.extra = put(jax.tree.map(np.asarray, found), sharding_of(self.mesh))

    def _do(self, number: int) -> dict[str, jax.Array]:
        """Does one step and returns its named losses, which may not be computed yet."""
        batch = self.objective.batch(number)
        self._check_rows(batch)
        batch = jax.tree.map(lambda a: put(a, batch_sharding(self.mesh, len(a))), batch)
        self.trained, self.state, named = self.step(
            self.trained, self.state, self.frozen, batch, self.extra, np.int32(number)
        )
        return named

    def _check_rows(self, batch) -> None:
        for leaf in jax.tree.leaves(batch):
            if len(leaf) % self.settings.accumulate:
                raise UserError(
                    f"A batch has {len(leaf)} rows of a kind, which {field('train.accumulate')} = {self.settings.accumulate} "
                    "equal parts cannot be made of. Choose a number of parts that divides it."
                )

    def _read(self, waiting: list[tuple[int, dict[str, jax.Array]]]) -> list[dict[str, float]]:
        """Returns the losses of steps as numbers. Raises UserError for one that is not finite."""
        rows = []
        for number, named in waiting:
            values = {name: float(value) for name, value in jax.device_get(named).items()}
            if not np.isfinite([*values.values()]).all():
                raise UserError(
                    f"At step {number + 1} the losses are {values}, which are not all finite. Lower {field('train.rate')} = "
                    f"{self.settings.rate}, or load the model in float32."
                )
            rows.append({"step": number + 1, **values, "rate": float(np.asarray(self.schedule(number)))})
        return rows


def _note(row: dict[str, float]) -> str:
    """Returns the last losses for people to see."""
    return ", ".join(
        f"{name}={value:.4g}" for name, value in row.items() if name not in ("step", "rate", "gradient_norm")
    )
