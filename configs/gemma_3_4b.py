"""Gemma 3 4B It, of which the language model is studied.

Command:   hf download google/gemma-3-4b-it --local-dir hf/gemma_3_4b
           refusal-jax study --config=configs/gemma_3_4b.py --model=hf/gemma_3_4b --workdir=runs/gemma_3_4b
Access:    gated; accept the licence on the hub first
Prompts:   bundled; the paper's splits: --config.data.harmful_train=FILE, and so on for all six sets
Hardware:  TPU v5e-1 (1 x 16 GB); weights 7.8 GB in bfloat16
"""

from refusal_jax.study.config import get_config as base


def get_config():
    config = base()
    return config
