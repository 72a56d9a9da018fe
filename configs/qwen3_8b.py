"""Qwen 3 8B.

Command:   hf download Qwen/Qwen3-8B --local-dir hf/qwen3_8b
           refusal-jax study --config=configs/qwen3_8b.py --model=hf/qwen3_8b --workdir=runs/qwen3_8b
Prompts:   bundled; the paper's splits: --config.data.harmful_train=FILE, and so on for all six sets
Template:  its own, which puts an empty thought before the reply (config.thinking is False)
Hardware:  TPU v5e-4 (4 x 16 GB); weights 16.4 GB in bfloat16, 4.1 GB a chip
"""

from refusal_jax.study.config import get_config as base


def get_config():
    config = base()
    return config
