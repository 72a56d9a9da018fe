"""OLMoE 1B-7B Instruct, a mixture of 64 experts of which each token uses 8.

Command:   hf download allenai/OLMoE-1B-7B-0924-Instruct --local-dir hf/olmoe_1b_7b
           refusal-jax study --config=configs/olmoe_1b_7b.py --model=hf/olmoe_1b_7b --workdir=runs/olmoe_1b_7b
Prompts:   bundled; the paper's splits: --config.data.harmful_train=FILE, and so on for all six sets
Hardware:  TPU v5e-4 (4 x 16 GB); weights 13.8 GB in bfloat16, 3.5 GB a chip
"""

from refusal_jax.study.config import get_config as base


def get_config():
    config = base()
    return config
