"""State that the stages of the mechanism share: the finished study, and their settings."""

from refusal_jax.study.further import FurtherStudy
from refusal_jax.study.mechanism.settings import MechanismSettings

SUFFIX_TOKENS = 20  # of a usual suffix, as in the paper


class MechanismStudy(FurtherStudy[MechanismSettings]):
    """A finished study whose mechanism is looked at."""

    room = SUFFIX_TOKENS
