"""Llama 3.1 8B Instruct.

Command:   hf download meta-llama/Llama-3.1-8B-Instruct --local-dir hf/llama_3_1_8b --exclude 'original/*'
           refusal-jax study --config=configs/llama_3_1_8b.py --model=hf/llama_3_1_8b --workdir=runs/llama_3_1_8b
Access:    gated; accept the licence on the hub first
Prompts:   bundled; the paper's splits: --config.data.harmful_train=FILE, and so on for all six sets
Template:  its own adds a system prompt of two dates; --config.chat_template=llama-3 leaves that out
Hardware:  TPU v5e-4 (4 x 16 GB); weights 16.1 GB in bfloat16, 4.0 GB a chip
"""

from refusal_jax.study.config import get_config as base


def get_config():
    config = base()
    return config
