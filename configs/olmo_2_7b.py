"""OLMo 2 7B Instruct.

Command:   hf download allenai/OLMo-2-1124-7B-Instruct --local-dir hf/olmo_2_7b
           refusal-jax study --config=configs/olmo_2_7b.py --model=hf/olmo_2_7b --workdir=runs/olmo_2_7b
Prompts:   bundled; the paper's splits: --config.data.harmful_train=FILE, and so on for all six sets
Hardware:  TPU v5e-4 (4 x 16 GB); weights 14.6 GB in bfloat16, 3.6 GB a chip
"""

from refusal_jax.study.config import get_config as base


def get_config():
    config = base()
    return config
