"""Gemma 7B It (the first Gemma), as in the paper.

Command:   hf download google/gemma-7b-it --local-dir hf/gemma_7b --exclude '*.gguf'
           refusal-jax study --config=configs/gemma_7b.py --model=hf/gemma_7b --workdir=runs/gemma_7b
Access:    gated; accept the licence on the hub first
Prompts:   bundled; the paper's splits: --config.data.harmful_train=FILE, and so on for all six sets
Hardware:  TPU v5e-4 (4 x 16 GB); weights 17.1 GB in bfloat16, 4.3 GB a chip
Expected:  position -1, layer 14, bypass -12.239, induce 6.851, KL 0.091
           (paper, Table 5: its splits, bfloat16 on GPUs; on other hardware within 0.61, 0.33 and 0.008)
"""

from refusal_jax.study.config import get_config as base


def get_config():
    config = base()
    config.chat_template = "gemma"
    config.refusal_tokens = (235285,)  # "I"
    return config
