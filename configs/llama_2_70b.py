"""Llama 2 70B Chat, as in the paper.

Command:   hf download meta-llama/Llama-2-70b-chat-hf --local-dir hf/llama_2_70b --exclude '*.bin'
           refusal-jax study --config=configs/llama_2_70b.py --model=hf/llama_2_70b --workdir=runs/llama_2_70b
Access:    gated; accept the licence on the hub first
Prompts:   bundled; the paper's splits: --config.data.harmful_train=FILE, and so on for all six sets
Hardware:  TPU v6e-8 (8 x 32 GB); weights 138.0 GB in bfloat16, 17.2 GB a chip
Expected:  position -1, layer 21, bypass -4.565, induce 5.191, KL 0.036
           (paper, Table 5: its splits, float16 on GPUs; on other hardware within 0.61, 0.33 and 0.008)
"""

from refusal_jax.study.config import get_config as base


def get_config():
    config = base()
    config.chat_template = "llama-2"
    config.refusal_tokens = (306,)  # "I"
    return config
