"""Is the export what the study measured? Its logits against inference-time ablation on the original."""

import pathlib

import numpy as np

from refusal_jax.chat_model import ChatModel, load_model
from refusal_jax.edits import EPS, Edits
from refusal_jax.study.scores import kl_divergence
from refusal_jax.taps import Taps


def compare(source: pathlib.Path, target: pathlib.Path, direction_d: np.ndarray, instructions: list[str]) -> dict:
    """How far the exported checkpoint `target` is from ablating `direction_d` in `source`, in float32.

    Compared are the prompts' last-token logits; the models are loaded one after the other. max_logit_difference and
    mean_logit_difference: absolute; mean_kl: nats, ablation against export; max_projection: the largest |x . r| / |x| of
    the export's residual stream over all layers and prompts; original_*: the same of the unedited source, for scale.
    """
    original = load_model(source)
    batch = original.encode(instructions)
    unit = direction_d / (np.linalg.norm(direction_d) + EPS)

    def read(model: ChatModel) -> tuple[np.ndarray, float]:
        taps = model.taps(batch.tokens, batch.mask, Taps(("resid_post",), 1))["resid_post"]
        resid = np.asarray(taps, np.float64)
        projection = float(np.max(np.abs(resid @ unit) / np.linalg.norm(resid, axis=-1)))
        return np.asarray(model.logits(batch.tokens, batch.mask)), projection

    ablated = np.asarray(original.logits(batch.tokens, batch.mask, Edits.ablate(direction_d)))
    baseline = read(original)
    del original
    result = {"prompts": len(instructions)}
    for prefix, (logits, projection) in (("", read(load_model(target))), ("original_", baseline)):
        gap = np.abs(ablated.astype(np.float64) - logits)
        result |= {
            f"{prefix}max_logit_difference": float(gap.max()),
            f"{prefix}mean_logit_difference": float(gap.mean()),
            f"{prefix}mean_kl": float(np.mean(kl_divergence(ablated, logits))),
            f"{prefix}max_projection": projection,
        }
    return result
