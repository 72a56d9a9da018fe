"""Refusal feature adversarial training (arXiv 2409.20089): the model learns to refuse while its refusal features are ablated.

The loss is E_harmful[-log p(refusal | h)] + E_harmless[-log p(answer)]. In each harmful row, with probability 1/2, the residual h
at the input of every block of the last three quarters is replaced with h less its projection on the block's own direction. The
directions are differences of means between harmful and harmless prompts at the last prompt token. They are computed anew every
few steps, from the weights of then, so that refusal cannot move aside.
"""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Float

from refusal_jax.chat.messages import Prompt
from refusal_jax.chat.model import ChatModel
from refusal_jax.defence.adversarial_settings import RefatSettings
from refusal_jax.defence.data import DefenceData
from refusal_jax.defence.draws import ablated_rows, gates
from refusal_jax.defence.lessons import Note
from refusal_jax.defence.recipe import Recipe
from refusal_jax.defence.settings import DefenceSettings
from refusal_jax.defence.sft import shares
from refusal_jax.defence.two_kinds import KindRows, TwoKinds
from refusal_jax.edits import EPS
from refusal_jax.mechanism.activations import activations
from refusal_jax.models.decoder import Decoder

LAST = -1  # the position, counted from the prompt's end, where features are read


def feature_directions(
    model: ChatModel, harmful: Sequence[Prompt], harmless: Sequence[Prompt]
) -> Float[np.ndarray, "L D"]:
    """Returns unit differences of means of harmful and harmless prompts at the last prompt token of each block's input, float32.

    They are zero where prompts do not differ, such as at the first block, where the template's last token is the same for
    all. Raises UserError for values that are not finite.
    """
    places = [(LAST, layer) for layer in range(model.config.n_layers)]
    means = [
        activations(model, prompts, places, len(prompts)).mean(axis=0, dtype=np.float64)
        for prompts in (harmful, harmless)
    ]
    differences_ld = means[0] - means[1]
    return (differences_ld / (np.linalg.norm(differences_ld, axis=1, keepdims=True) + EPS)).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class FeatureAblation:
    """The objective. harmful, harmless: prompts that directions are computed from. seed: what they are drawn by."""

    kinds: TwoKinds
    harmful: tuple[Prompt, ...]
    harmless: tuple[Prompt, ...]
    settings: RefatSettings
    seed: int
    needs_frozen: bool = False

    @property
    def refresh(self) -> int:
        """Returns after how many steps directions are computed anew."""
        return self.settings.every

    def batch(self, step: int) -> KindRows:
        """Returns the rows of a step."""
        return self.kinds.batch(step)

    def refreshed(self, model: ChatModel, step: int) -> dict[str, np.ndarray]:
        """Returns each block's direction, of the weights of now and of prompts that the step draws."""
        rng = np.random.default_rng((self.seed, step))
        some = [
            [prompts[i] for i in rng.choice(len(prompts), min(self.settings.prompts, len(prompts)), replace=False)]
            for prompts in (self.harmful, self.harmless)
        ]
        return {"units_ld": feature_directions(model, *some)}

    def loss(self, decoder: Decoder, frozen, batch: KindRows, extra, key) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Returns both losses, each by its weight, while the directions are ablated from some harmful rows."""
        layers = decoder.cfg.n_layers
        gate_ls = gates(layers, int(self.settings.spared * layers), self.settings.sites)
        edits = ablated_rows(key, extra["units_ld"], gate_ls, batch.harmful_b, self.settings.probability)
        return self.kinds.losses(decoder, batch, edits)


def objective(model: ChatModel, data: DefenceData, settings: DefenceSettings, note: Note) -> FeatureAblation:
    """Returns the objective of a model and its data. Raises UserError for settings that are out of range."""
    own = settings.refat
    own.check()
    kinds = TwoKinds(*shares(model, data.refused, data.answered, settings, note), own.refusal_weight, own.answer_weight)
    harmful, harmless = (tuple(one.prompt for one in lessons) for lessons in (data.refused, data.answered))
    return FeatureAblation(kinds, harmful, harmless, own, settings.train.seed)


RECIPE = Recipe(
    name="refat",
    about="Refusal feature adversarial training: refusals are learnt while the model's own refusal features are ablated.",
    source="2409.20089",
    objective=objective,
    embedded={"train.steps": 150, "train.rate": 2e-3, "train.batch": 16},
)
