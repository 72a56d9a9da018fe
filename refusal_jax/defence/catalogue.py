"""All recipes of defences by name, in the order in which help texts list them."""

from refusal_jax.defence import (
    breakers,
    calibration,
    conditional,
    deep_refusal,
    depth,
    extended_refusal,
    injection,
    refat,
    sft,
)
from refusal_jax.defence.recipe import Recipe
from refusal_jax.errors import UserError, did_you_mean, field

ALL = "all"
RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        sft.RECIPE,
        extended_refusal.RECIPE,
        depth.RECIPE,
        breakers.RECIPE,
        refat.RECIPE,
        deep_refusal.RECIPE,
        injection.RECIPE,
        conditional.RECIPE,
        calibration.RECIPE,
    )
}


def named(names: str) -> list[Recipe]:
    """Returns the recipes of a name, of several separated by commas, or of "all". Raises UserError for an unknown or repeated
    name, and for none."""
    if names.strip() == ALL:
        return [recipe for recipe in RECIPES.values() if recipe.common]
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    if not wanted or len(set(wanted)) < len(wanted):
        what = f"names {wanted} twice or more" if wanted else "is missing"
        raise UserError(f"{field('recipe')} {what}: name each recipe once. The recipes are {', '.join(RECIPES)}.")
    for name in wanted:
        if name not in RECIPES:
            raise UserError(
                f"There is no recipe {name!r}.{did_you_mean(name, RECIPES)} The recipes are {', '.join(RECIPES)}, and "
                f"{ALL} is all of those that any model that refuses can be given to."
            )
    return [RECIPES[name] for name in wanted]
