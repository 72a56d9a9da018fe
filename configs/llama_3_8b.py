"""Llama 3 8B Instruct, as in the paper.

Command:   hf download meta-llama/Meta-Llama-3-8B-Instruct --local-dir hf/llama_3_8b --exclude 'original/*'
           refusal-jax study --config=configs/llama_3_8b.py --model=hf/llama_3_8b --workdir=runs/llama_3_8b
Access:    gated; accept the licence on the hub first
Prompts:   bundled; the paper's splits: --config.data.harmful_train=FILE, and so on for all six sets
Template:  the published run's had a stray quote and BOS twice: --config.chat_template=llama-3-published
Hardware:  TPU v5e-4 (4 x 16 GB); weights 16.1 GB in bfloat16, 4.0 GB a chip
Expected:  position -5, layer 12, bypass -9.715, induce 7.681, KL 0.064
           (paper, Table 5: its splits, bfloat16 on GPUs; on other hardware within 0.61, 0.33 and 0.008)
"""

from refusal_jax.study.config import get_config as base


def get_config():
    config = base()
    config.chat_template = "llama-3"
    config.refusal_tokens = (40,)  # "I"
    return config
