"""Qwen 1.8B Chat, as in the paper.

Command:   hf download Qwen/Qwen-1_8B-Chat --local-dir hf/qwen_1_8b
           refusal-jax study --config=configs/qwen_1_8b.py --model=hf/qwen_1_8b --workdir=runs/qwen_1_8b
Prompts:   bundled; the paper's splits: --config.data.harmful_train=FILE, and so on for all six sets
Hardware:  TPU v5e-1 (1 x 16 GB); weights 3.7 GB in bfloat16
Expected:  position -1 (-2 in the published run), layer 15, bypass -4.415, induce 1.641, KL 0.077
           (paper, Table 5: its splits, float16 on GPUs; on other hardware within 0.61, 0.33 and 0.008)
"""

from refusal_jax.study.config import get_config as base


def get_config():
    config = base()
    config.chat_template = "chatml"
    config.refusal_tokens = (40, 2121)  # "I", "As"
    return config
