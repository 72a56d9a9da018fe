"""Yi 6B Chat, as in the paper.

Command:   hf download 01-ai/Yi-6B-Chat --local-dir hf/yi_6b
           refusal-jax study --config=configs/yi_6b.py --model=hf/yi_6b --workdir=runs/yi_6b
Prompts:   bundled; the paper's splits: --config.data.harmful_train=FILE, and so on for all six sets
Hardware:  TPU v5e-4 (4 x 16 GB); weights 12.1 GB in bfloat16, 3.0 GB a chip
Expected:  position -5, layer 20, bypass -6.693, induce 1.968, KL 0.046
           (paper, Table 5: its splits, float16 on GPUs; on other hardware within 0.61, 0.33 and 0.008)
"""

from refusal_jax.study.config import get_config as base


def get_config():
    config = base()
    config.chat_template = "chatml"
    config.refusal_tokens = (59597,)  # "I"
    return config
