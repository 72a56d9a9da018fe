"""Tells the embedded model from others by its weights, for what is done on it alone."""

import hashlib
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

from refusal_jax.chat.model import ChatModel, demo_model_path, load_model
from refusal_jax.chat.tokenizers import load_tokenizer
from refusal_jax.errors import UserError
from refusal_jax.models.config import ModelConfig
from refusal_jax.models.hf_config import load_config


def weights_fingerprint(model: ChatModel) -> str:
    """Returns the sha256, in hex, of a model's weights as they are in memory, with their names, types and shapes."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.decoder.weights().items()):
        values = np.asarray(weight)
        digest.update(f"{name}\0{values.dtype}\0{values.shape}\0".encode())
        digest.update(values.tobytes())
    return digest.hexdigest()


def is_embedded(model: ChatModel, trained: str = "") -> bool:
    """Returns whether a model's weights are those of the embedded model, or have the fingerprint `trained`."""
    shipped = load_model(demo_model_path())
    if model.config != shipped.config:
        return False
    return weights_fingerprint(model) in (weights_fingerprint(shipped), trained)


def of_embedded_family(model: ChatModel) -> bool:
    """Returns whether a model has the embedded model's tokenizer and width, as whatever is trained from it has: it speaks of
    the same world."""
    return _same_world(model.config, lambda: model.chat.tokenizer)


def is_of_embedded_family(folder: pathlib.Path) -> bool:
    """Returns what `of_embedded_family` does, for the checkpoint in a folder."""
    return _same_world(load_config(folder), lambda: load_tokenizer(folder))


def _same_world(cfg: ModelConfig, tokenizer: Callable[[], Any]) -> bool:
    sizes = load_config(demo_model_path())
    if (cfg.vocab_size, cfg.d_model) != (sizes.vocab_size, sizes.d_model):
        return False
    shipped: Any = load_tokenizer(demo_model_path())
    return tokenizer().get_vocab() == shipped.get_vocab()


def check_embedded(model: ChatModel, trained: str = "") -> None:
    """Raises UserError for a model that is not the embedded one.

    trained: the fingerprint of the weights of a model that the same recipe trained just now, which is taken, too.
    """
    if not is_embedded(model, trained):
        raise UserError(
            f"{model.path} is not the embedded model: its weights are others. Suffixes are searched on the embedded model only, "
            "whose replies to harmful requests are sentences without content. For another model, give the suffix study a file of "
            "suffixes that you have: refusal-jax mechanism --suffix=FILE."
        )
