"""Qwen 3 30B, a mixture of 128 experts of which each token uses 8.

Command:   hf download Qwen/Qwen3-30B-A3B --local-dir hf/qwen3_30b_a3b
           refusal-jax study --config=configs/qwen3_30b_a3b.py --model=hf/qwen3_30b_a3b --workdir=runs/qwen3_30b_a3b
Prompts:   bundled; the paper's splits: --config.data.harmful_train=FILE, and so on for all six sets
Template:  its own, which puts an empty thought before the reply (config.thinking is False)
Hardware:  TPU v6e-4 (4 x 32 GB); weights 61.1 GB in bfloat16, 15.3 GB a chip
"""

from refusal_jax.study.config import get_config as base


def get_config():
    config = base()
    return config
