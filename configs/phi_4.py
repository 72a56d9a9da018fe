"""Phi 4 (14B).

Command:   hf download microsoft/phi-4 --local-dir hf/phi_4
           refusal-jax study --config=configs/phi_4.py --model=hf/phi_4 --workdir=runs/phi_4
Prompts:   bundled; the paper's splits: --config.data.harmful_train=FILE, and so on for all six sets
Hardware:  TPU v5e-4 (4 x 16 GB); weights 29.3 GB in bfloat16, 7.3 GB a chip
"""

from refusal_jax.study.config import get_config as base


def get_config():
    config = base()
    return config
