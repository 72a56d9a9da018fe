"""Qwen 7B Chat, as in the paper.

Command:   hf download Qwen/Qwen-7B-Chat --local-dir hf/qwen_7b
           refusal-jax study --config=configs/qwen_7b.py --model=hf/qwen_7b --workdir=runs/qwen_7b
Prompts:   bundled; the paper's splits: --config.data.harmful_train=FILE, and so on for all six sets
Hardware:  TPU v5e-4 (4 x 16 GB); weights 15.4 GB in bfloat16, 3.9 GB a chip
Expected:  position -1, layer 17, bypass -5.355, induce 1.107, KL 0.069
           (paper, Table 5: its splits, float16 on GPUs; on other hardware within 0.61, 0.33 and 0.008)
"""

from refusal_jax.study.config import get_config as base


def get_config():
    config = base()
    config.chat_template = "chatml"
    config.refusal_tokens = (40, 2121)  # "I", "As"
    return config
