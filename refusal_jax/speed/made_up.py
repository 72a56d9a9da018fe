"""Makes a model of a published shape with random weights: its time is that of the real one, without a download."""

import jax
import jax.numpy as jnp

from refusal_jax.chat.model import ChatModel, demo_model_path
from refusal_jax.chat.prompts import Chat
from refusal_jax.checkpoints.load import DTYPES
from refusal_jax.models.config import ModelConfig
from refusal_jax.models.decoder import Decoder
from refusal_jax.models.sharding import split_for, weight_place
from refusal_jax.models.weight import Weight
from refusal_jax.models.weights import weight_table
from refusal_jax.plan.known import NAMES, config_of


def shape_of(name: str) -> ModelConfig | None:
    """Returns the config of a model that `refusal-jax plan` knows by the name of its settings, None for any other: a name on the
    hub is a checkpoint."""
    return config_of(name) if name in NAMES else None


def made_up(cfg: ModelConfig, dtype: str, mesh: jax.sharding.Mesh | None) -> ChatModel:
    """Returns a model of this shape with the tokenizer of the embedded one. Weights are made on their devices."""
    mesh, table = split_for(mesh, cfg.n_kv_heads), weight_table(cfg)

    def make(weight: Weight, key: jax.Array) -> jax.Array:
        shape, sharding = weight_place(mesh, weight)
        stored = weight.stored_as(DTYPES[dtype])

        def fill(key):
            if weight.std is None:
                return jnp.full(shape, 1 if weight.as_is else 1 - cfg.norm_offset, stored)
            return (weight.std * jax.random.normal(key, shape, jnp.bfloat16)).astype(stored)

        return jax.jit(fill, out_shardings=sharding)(key)

    keys = jax.random.split(jax.random.key(0), len(table))
    weights = {path: make(weight, key) for (path, weight), key in zip(table.items(), keys, strict=True)}
    demo = demo_model_path()
    chat = Chat.load(demo, cfg.context_length, cfg.vocab_size)
    return ChatModel(Decoder(cfg, weights, mesh), chat, demo)
