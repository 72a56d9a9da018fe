"""Yi 34B Chat, as in the paper.

Command:   hf download 01-ai/Yi-34B-Chat --local-dir hf/yi_34b
           refusal-jax study --config=configs/yi_34b.py --model=hf/yi_34b --workdir=runs/yi_34b
Prompts:   bundled; the paper's splits: --config.data.harmful_train=FILE, and so on for all six sets
Hardware:  TPU v5e-8 (8 x 16 GB); weights 68.8 GB in bfloat16, 8.6 GB a chip
Expected:  position -1, layer 37, bypass -11.14, induce 1.865, KL 0.069
           (paper, Table 5: its splits, float16 on GPUs; on other hardware within 0.61, 0.33 and 0.008)
"""

from refusal_jax.study.config import get_config as base


def get_config():
    config = base()
    config.chat_template = "chatml"
    config.refusal_tokens = (59597,)  # "I"
    return config
