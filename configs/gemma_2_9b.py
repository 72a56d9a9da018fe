"""Gemma 2 9B It.

Command:   hf download google/gemma-2-9b-it --local-dir hf/gemma_2_9b
           refusal-jax study --config=configs/gemma_2_9b.py --model=hf/gemma_2_9b --workdir=runs/gemma_2_9b
Access:    gated; accept the licence on the hub first
Prompts:   bundled; the paper's splits: --config.data.harmful_train=FILE, and so on for all six sets
Hardware:  TPU v5e-4 (4 x 16 GB); weights 18.5 GB in bfloat16, 4.6 GB a chip
"""

from refusal_jax.study.config import get_config as base


def get_config():
    config = base()
    return config
