"""Qwen 2.5 7B Instruct.

Command:   hf download Qwen/Qwen2.5-7B-Instruct --local-dir hf/qwen2_5_7b
           refusal-jax study --config=configs/qwen2_5_7b.py --model=hf/qwen2_5_7b --workdir=runs/qwen2_5_7b
Prompts:   bundled; the paper's splits: --config.data.harmful_train=FILE, and so on for all six sets
Template:  its own adds a short system prompt; --config.chat_template=chatml leaves that out
Hardware:  TPU v5e-4 (4 x 16 GB); weights 15.2 GB in bfloat16, 3.8 GB a chip
"""

from refusal_jax.study.config import get_config as base


def get_config():
    config = base()
    return config
