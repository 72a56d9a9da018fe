"""Gemma 2B It (the first Gemma), as in the paper.

Command:   hf download google/gemma-2b-it --local-dir hf/gemma_2b --exclude '*.gguf'
           refusal-jax study --config=configs/gemma_2b.py --model=hf/gemma_2b --workdir=runs/gemma_2b
Access:    gated; accept the licence on the hub first
Prompts:   bundled; the paper's splits: --config.data.harmful_train=FILE, and so on for all six sets
Hardware:  TPU v5e-1 (1 x 16 GB); weights 5.0 GB in bfloat16
Expected:  position -2, layer 10, bypass -14.435, induce 6.709, KL 0.067
           (paper, Table 5: its splits, bfloat16 on GPUs; on other hardware within 0.61, 0.33 and 0.008)
"""

from refusal_jax.study.config import get_config as base


def get_config():
    config = base()
    config.chat_template = "gemma"
    config.refusal_tokens = (235285,)  # "I"
    return config
