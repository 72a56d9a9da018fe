"""Mixtral 8x7B Instruct v0.1.

Command:   hf download mistralai/Mixtral-8x7B-Instruct-v0.1 --local-dir hf/mixtral_8x7b --exclude 'consolidated*'
           refusal-jax study --config=configs/mixtral_8x7b.py --model=hf/mixtral_8x7b --workdir=runs/mixtral_8x7b
Prompts:   bundled; the paper's splits: --config.data.harmful_train=FILE, and so on for all six sets
Hardware:  TPU v6e-8 (8 x 32 GB); weights 93.4 GB in bfloat16, 11.7 GB a chip
"""

from refusal_jax.study.config import get_config as base


def get_config():
    config = base()
    return config
