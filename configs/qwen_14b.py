"""Qwen 14B Chat, as in the paper.

Command:   hf download Qwen/Qwen-14B-Chat --local-dir hf/qwen_14b
           refusal-jax study --config=configs/qwen_14b.py --model=hf/qwen_14b --workdir=runs/qwen_14b
Prompts:   bundled; the paper's splits: --config.data.harmful_train=FILE, and so on for all six sets
Hardware:  TPU v5e-8 (8 x 16 GB); weights 28.3 GB in bfloat16, 3.5 GB a chip
Expected:  position -1, layer 23, bypass -5.085, induce 1.606, KL 0.014
           (paper, Table 5: its splits, float16 on GPUs; on other hardware within 0.61, 0.33 and 0.008)
"""

from refusal_jax.study.config import get_config as base


def get_config():
    config = base()
    config.chat_template = "chatml"
    config.refusal_tokens = (40, 2121)  # "I", "As"
    return config
