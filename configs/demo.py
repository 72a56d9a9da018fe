"""The embedded demo model, whose replies are short: the whole study in about a minute.

Command:   refusal-jax study --config=configs/demo.py --workdir=runs/demo
Hardware:  any laptop, no accelerator
"""

from refusal_jax.study.config import get_config as base


def get_config():
    config = base()
    config.generation.max_new_tokens = 48  # its longest replies have about 30 tokens
    config.generation.batch_size = 100
    config.generation.conditions = (*config.generation.conditions, "harmless_ablation")
    return config
