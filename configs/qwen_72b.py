"""Qwen 72B Chat, as in the paper.

Command:   hf download Qwen/Qwen-72B-Chat --local-dir hf/qwen_72b
           refusal-jax study --config=configs/qwen_72b.py --model=hf/qwen_72b --workdir=runs/qwen_72b
Prompts:   bundled; the paper's splits: --config.data.harmful_train=FILE, and so on for all six sets
Hardware:  TPU v6e-8 (8 x 32 GB); weights 144.6 GB in bfloat16, 18.1 GB a chip
Expected:  position -1, layer 62, bypass -4.246, induce 1.885, KL 0.034
           (paper, Table 5: its splits, float16 on GPUs; on other hardware within 0.61, 0.33 and 0.008)
"""

from refusal_jax.study.config import get_config as base


def get_config():
    config = base()
    config.chat_template = "chatml"
    config.refusal_tokens = (40, 2121)  # "I", "As"
    return config
