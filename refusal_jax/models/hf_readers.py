"""All readers of HF configs, by `model_type`.

A reader takes HF's attributes and returns a `ModelConfig`. Each file of `readers/` has those of related families and lists
them in its own `READERS`.
"""

from collections.abc import Callable

from refusal_jax.models.config import ModelConfig
from refusal_jax.models.hf_attributes import Reader
from refusal_jax.models.readers import (
    deepseek,
    falcon_h1,
    gemma,
    gemma4,
    granite_hybrid,
    lfm2,
    llama,
    llama4,
    mixtures,
    multimodal,
    nemotron,
    qwen,
    qwen_hybrid,
    ropeless,
)

READERS: dict[str, Callable[[Reader], ModelConfig]] = (
    llama.READERS
    | qwen.READERS
    | gemma.READERS
    | gemma4.READERS
    | ropeless.READERS
    | mixtures.READERS
    | deepseek.READERS
    | granite_hybrid.READERS
    | multimodal.READERS
    | qwen_hybrid.READERS
    | llama4.READERS
    | lfm2.READERS
    | falcon_h1.READERS
    | nemotron.READERS
)
