"""Granite 3.1 8B Instruct.

Command:   hf download ibm-granite/granite-3.1-8b-instruct --local-dir hf/granite_3_1_8b
           refusal-jax study --config=configs/granite_3_1_8b.py --model=hf/granite_3_1_8b --workdir=runs/granite_3_1_8b
Prompts:   bundled; the paper's splits: --config.data.harmful_train=FILE, and so on for all six sets
Template:  its own adds a system prompt with the day's date, so runs of different days differ
Hardware:  TPU v5e-4 (4 x 16 GB); weights 16.3 GB in bfloat16, 4.1 GB a chip
"""

from refusal_jax.study.config import get_config as base


def get_config():
    config = base()
    return config
