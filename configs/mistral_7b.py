"""Mistral 7B Instruct v0.3.

Command:   hf download mistralai/Mistral-7B-Instruct-v0.3 --local-dir hf/mistral_7b --exclude 'consolidated*'
           refusal-jax study --config=configs/mistral_7b.py --model=hf/mistral_7b --workdir=runs/mistral_7b
Prompts:   bundled; the paper's splits: --config.data.harmful_train=FILE, and so on for all six sets
Hardware:  TPU v5e-4 (4 x 16 GB); weights 14.5 GB in bfloat16, 3.6 GB a chip
"""

from refusal_jax.study.config import get_config as base


def get_config():
    config = base()
    return config
