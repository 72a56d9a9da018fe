"""DeepRefusal (arXiv 2509.15202): the model learns to rebuild its refusal after it was taken away at random places.

The refusal direction is ablated from every row, harmful or harmless, at sites and tokens that are drawn anew at each step. The
sites are a block's input, and what attention and MLP add. Some of the harmful rows have a reply that has begun to comply, after
which the refusal is learnt. The loss is .8 x the cross-entropy of answers + .2 x that of refusals.

Two details differ from the authors' code: it draws a site for a whole batch, where each row draws its own here, and it sums the
losses of a row's tokens, where they are averaged here, so that the losses' weights do not depend on the replies' lengths.
"""

import dataclasses

import jax
import numpy as np
from jaxtyping import Float

from refusal_jax.chat.model import ChatModel
from refusal_jax.defence.adversarial_settings import DeepRefusalSettings
from refusal_jax.defence.draws import ablated_tokens, gates
from refusal_jax.defence.two_kinds import KindRows, TwoKinds
from refusal_jax.models.decoder import Decoder


@dataclasses.dataclass(frozen=True, eq=False)
class TokenAblation:
    """The objective. basis_jd: what is ablated, orthonormal directions, of which there usually is one. refresh: the number of all
    steps, as the directions are put on the devices once."""

    kinds: TwoKinds
    basis_jd: Float[np.ndarray, "J D"]
    settings: DeepRefusalSettings
    refresh: int
    needs_frozen: bool = False

    def batch(self, step: int) -> KindRows:
        """Returns the rows of a step."""
        return self.kinds.batch(step)

    def refreshed(self, model: ChatModel, step: int) -> dict[str, np.ndarray]:
        """Returns the directions, which stay those of the model before the training."""
        return {"basis_jd": self.basis_jd.astype(np.float32)}

    def loss(self, decoder: Decoder, frozen, batch: KindRows, extra, key) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Returns both losses, each by its weight, while the directions are ablated at drawn places."""
        rows, tokens = batch.rows.tokens_bt.shape
        chances = self.settings.site_probability, self.settings.token_probability
        edits = ablated_tokens(key, extra["basis_jd"], gates(decoder.cfg.n_layers, 0), rows, tokens, *chances)
        return self.kinds.losses(decoder, batch, edits)
