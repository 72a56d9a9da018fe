"""Is the export what the study measured? Its logits against inference-time ablation on the original."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from refusal_jax.chat import Chat
from refusal_jax.chat_model import ChatModel
from refusal_jax.edits import SITES, Edits
from refusal_jax.export.rank_one import rank_one, unit_direction
from refusal_jax.models.config import ModelConfig
from refusal_jax.models.decoder import Decoder
from refusal_jax.models.families import WRITER_BIASES, WRITERS
from refusal_jax.models.load import load_decoder
from refusal_jax.study.scores import kl_divergence
from refusal_jax.taps import Taps

READ = (*SITES, "resid_post")


def compare(
    source: pathlib.Path, target: pathlib.Path, direction_d: np.ndarray, chat: Chat, instructions: list[str]
) -> dict:
    """How far the exported checkpoint `target` is from ablating `direction_d` in `source`, in float32.

    Compared are the last tokens of the instructions' chat prompts; the models are loaded one after the other.
    max_logit_difference and mean_logit_difference: absolute; mean_kl: nats, ablation against what is compared with it;
    projection: the largest |x . r| / |x| of each site over all layers and prompts. original_*: the same of the unedited
    source, for scale. orthogonalised_*: the same of plain orthogonalisation, W - r r^T W, of families with a norm after W,
    where the export is another edit. Raises UserError for checkpoints that do not load and prompts that do not fit.
    """
    batch = chat.encode(instructions)
    result = {"prompts": len(instructions)}
    original = load_decoder(source)
    unit_d = unit_direction(direction_d, original.cfg.d_model)

    def run(decoder: Decoder, edits: Edits | None = None) -> tuple[np.ndarray, dict[str, float]]:
        taps = ChatModel(decoder, chat, source).taps(batch.tokens, batch.mask, Taps(READ, 1), edits)
        logits = decoder.logits(taps["resid_post"][-1])[:, 0]
        return np.asarray(logits, np.float64), {
            s: projection(np.asarray(x, np.float64), unit_d) for s, x in taps.items()
        }

    ablated = run(original, Edits.ablate(direction_d))[0]

    def note(prefix: str, decoder: Decoder) -> None:
        logits, projections = run(decoder)
        gap = np.abs(ablated - logits)
        result[f"{prefix}max_logit_difference"] = float(gap.max())
        result[f"{prefix}mean_logit_difference"] = float(gap.mean())
        result[f"{prefix}mean_kl"] = float(np.mean(kl_divergence(ablated, logits)))
        result[f"{prefix}projection"] = projections

    note("original_", original)
    cfg, weights = original.cfg, original.weights()
    del original  # now `weights` alone holds them, one of which at a time is there twice
    if cfg.post_norm:
        note("orthogonalised_", orthogonalised(cfg, weights, unit_d))
    weights.clear()
    note("", load_decoder(target))
    return result


def projection(x: np.ndarray, unit_d: np.ndarray) -> float:
    """The largest |x . r| / |x| over vectors on the last axis of `x`; zero vectors count as 0."""
    return float(np.max(np.abs(x @ unit_d) / np.maximum(np.linalg.norm(x, axis=-1), np.finfo(np.float64).tiny)))


def orthogonalised(cfg: ModelConfig, weights: dict[str, jax.Array], unit_d: np.ndarray) -> Decoder:
    """The decoder of float32 `weights`, edited in place: W <- W - r r^T W for all that writes to the stream, whatever norms
    follow. The unembedding stays as it was, if it was the embedding too."""
    weights.setdefault("unembed", weights["embed"])
    for path in weights.keys() & (WRITERS | WRITER_BIASES):
        weights[path] = jnp.asarray(rank_one(path, unit_d)(np.asarray(weights[path])))
    return Decoder(dataclasses.replace(cfg, tied_embeddings=False), weights)
