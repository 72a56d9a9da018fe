"""The paper's settings, field by field in refusal_jax/study/config.py; the start of every other config.

refusal-jax study --config=configs/base.py --model=DIR --workdir=DIR
"""

from refusal_jax.study.config import get_config

__all__ = ["get_config"]
