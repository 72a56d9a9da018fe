"""Llama 2 7B Chat, as in the paper.

Command:   hf download meta-llama/Llama-2-7b-chat-hf --local-dir hf/llama_2_7b --exclude '*.bin'
           refusal-jax study --config=configs/llama_2_7b.py --model=hf/llama_2_7b --workdir=runs/llama_2_7b
Access:    gated; accept the licence on the hub first
Prompts:   bundled; the paper's splits: --config.data.harmful_train=FILE, and so on for all six sets
Hardware:  TPU v5e-4 (4 x 16 GB); weights 13.5 GB in bfloat16, 3.4 GB a chip
Expected:  position -1, layer 14, bypass -5.295, induce 5.941, KL 0.073
           (paper, Table 5: its splits, float16 on GPUs; on other hardware within 0.61, 0.33 and 0.008)
"""

from refusal_jax.study.config import get_config as base


def get_config():
    config = base()
    config.chat_template = "llama-2"
    config.refusal_tokens = (306,)  # "I"
    return config
