"""Is the export what the study measured? Its logits against inference-time ablation on the original."""

import numpy as np

from refusal_jax.chat_model import ChatModel
from refusal_jax.edits import Edits
from refusal_jax.study.scores import kl_divergence
from refusal_jax.taps import Taps


def compare(original: ChatModel, exported: ChatModel, direction_d: np.ndarray, instructions: list[str]) -> dict:
    """How far the exported model is from ablating `direction_d` in the original, on the prompts' last-token logits.

    max_logit_difference and mean_logit_difference: absolute; mean_kl: nats, ablation against export; max_projection:
    the largest |x . r| / |x| of the export's residual stream over all layers and prompts; original_*: the same of the
    unedited original, for scale.
    """
    batch = original.encode(instructions)
    unit = direction_d / np.linalg.norm(direction_d)
    ablated = original.logits(batch.tokens, batch.mask, Edits.ablate(direction_d))
    baseline, edited = (model.logits(batch.tokens, batch.mask) for model in (original, exported))

    def projection(model):
        resid = np.asarray(model.taps(batch.tokens, batch.mask, Taps(("resid_post",), 1))["resid_post"], np.float64)
        return float(np.max(np.abs(resid @ unit) / np.linalg.norm(resid, axis=-1)))

    def differences(logits):
        gap = np.abs(np.asarray(ablated, np.float64) - np.asarray(logits, np.float64))
        return float(gap.max()), float(gap.mean()), float(np.mean(kl_divergence(ablated, logits)))

    keys = ("max_logit_difference", "mean_logit_difference", "mean_kl")
    return {
        "prompts": len(instructions),
        **dict(zip(keys, differences(edited), strict=True)),
        "max_projection": projection(exported),
        **{f"original_{k}": v for k, v in zip(keys, differences(baseline), strict=True)},
        "original_max_projection": projection(original),
    }
