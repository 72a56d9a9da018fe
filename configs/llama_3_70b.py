"""Llama 3 70B Instruct, as in the paper.

Command:   hf download meta-llama/Meta-Llama-3-70B-Instruct --local-dir hf/llama_3_70b --exclude 'original/*'
           refusal-jax study --config=configs/llama_3_70b.py --model=hf/llama_3_70b --workdir=runs/llama_3_70b
Access:    gated; accept the licence on the hub first
Prompts:   bundled; the paper's splits: --config.data.harmful_train=FILE, and so on for all six sets
Template:  as in llama_3_8b.py
Hardware:  TPU v6e-8 (8 x 32 GB); weights 141.1 GB in bfloat16, 17.6 GB a chip
Expected:  position -5, layer 25, bypass -7.839, induce 0.126, KL 0.021
           (paper, Table 5: its splits, bfloat16 on GPUs; on other hardware within 0.61, 0.33 and 0.008)
"""

from refusal_jax.study.config import get_config as base


def get_config():
    config = base()
    config.chat_template = "llama-3"
    config.refusal_tokens = (40,)  # "I"
    return config
