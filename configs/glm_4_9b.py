"""GLM 4 9B (0414).

Command:   hf download zai-org/GLM-4-9B-0414 --local-dir hf/glm_4_9b
           refusal-jax study --config=configs/glm_4_9b.py --model=hf/glm_4_9b --workdir=runs/glm_4_9b
Prompts:   bundled; the paper's splits: --config.data.harmful_train=FILE, and so on for all six sets
Hardware:  TPU v5e-4 (4 x 16 GB); weights 18.8 GB in bfloat16, 4.7 GB a chip
"""

from refusal_jax.study.config import get_config as base


def get_config():
    config = base()
    return config
