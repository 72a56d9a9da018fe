"""The resistance tests, in the order in which they are done and shown. A new one is a file in `attacks/` and a line here."""

from refusal_jax.resistance.attack import Attack
from refusal_jax.resistance.attacks import (
    addition,
    affine,
    directions,
    fine_tune,
    prefill,
    rank_assisted,
    rdo,
    reselected,
    selected,
    stripped,
    suffix,
)

ATTACKS: tuple[Attack, ...] = (
    selected.ATTACK,
    reselected.ATTACK,
    directions.ATTACK,
    rdo.ATTACK,
    affine.ATTACK,
    addition.ATTACK,
    stripped.ATTACK,
    prefill.ATTACK,
    rank_assisted.ATTACK,
    suffix.ATTACK,
    fine_tune.ATTACK,
)
BY_NAME = {attack.name: attack for attack in ATTACKS}
