"""Llama 2 13B Chat, as in the paper.

Command:   hf download meta-llama/Llama-2-13b-chat-hf --local-dir hf/llama_2_13b --exclude '*.bin'
           refusal-jax study --config=configs/llama_2_13b.py --model=hf/llama_2_13b --workdir=runs/llama_2_13b
Access:    gated; accept the licence on the hub first
Prompts:   bundled; the paper's splits: --config.data.harmful_train=FILE, and so on for all six sets
Hardware:  TPU v5e-8 (8 x 16 GB); weights 26.0 GB in bfloat16, 3.3 GB a chip
Expected:  position -1, layer 26, bypass -4.377, induce 2.794, KL 0.092
           (paper, Table 5: its splits, float16 on GPUs; on other hardware within 0.61, 0.33 and 0.008)
"""

from refusal_jax.study.config import get_config as base


def get_config():
    config = base()
    config.chat_template = "llama-2"
    config.refusal_tokens = (306,)  # "I"
    return config
