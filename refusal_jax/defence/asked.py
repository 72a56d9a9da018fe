"""The defences that a call asks for: each recipe with its settings and judge, checked before any work is done."""

import dataclasses
import logging
import pathlib
from collections.abc import Mapping
from typing import Any

from refusal_jax.defence.catalogue import ALL, named
from refusal_jax.defence.data import none_comply
from refusal_jax.defence.recipe import Recipe
from refusal_jax.defence.settings import DefenceSettings
from refusal_jax.defence.written import outputs_of
from refusal_jax.errors import UserError
from refusal_jax.judges.choice import parse_judges
from refusal_jax.judges.judge import Judge
from refusal_jax.models.hf_config import load_config
from refusal_jax.organism.identity import is_of_embedded_family
from refusal_jax.plan.planner import ON_CPU

LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Asked:
    """One defence that is asked for. judge: of replies. name: of its folder in that of the call, "" for that folder itself."""

    recipe: Recipe
    settings: DefenceSettings
    judge: Judge
    name: str = ""


def asked_for(given: Mapping[str, Any], source: pathlib.Path) -> list[Asked]:
    """Returns the defences of the recipes that `given` names, for a checkpoint folder. Of "all", recipes that need replies that
    comply are left out, with a warning, where there are none.

    Raises UserError for settings that are out of range or that the model does not fit, and for a recipe by name that needs such
    replies.
    """
    names = str(given.get("recipe", ""))
    recipes, cfg, family, found = named(names), load_config(source), is_of_embedded_family(source), []
    for recipe in recipes:
        settings = settings_for(recipe, given, family)
        if recipe.objective is not None:
            settings.train.check(cfg)
        what = recipe.compliant(settings)
        if what and not family and not settings.data.compliant:
            if names.strip() != ALL:
                raise UserError(none_comply(what))
            LOG.warning(f"The recipe {recipe.name} is left out. {none_comply(what)}")
            continue
        if recipe.arrange is not None:
            recipe.arrange(settings, cfg)
        outputs_of(settings.output, settings.train.method)
        (judge,) = parse_judges([settings.judge], settings.batch_size or ON_CPU.forward, settings.dtype)
        found.append(Asked(recipe, settings, judge, recipe.name if len(recipes) > 1 else ""))
    return found


def settings_for(recipe: Recipe, given: Mapping[str, Any], embedded: bool) -> DefenceSettings:
    """Returns the settings of a recipe: what is given, else what the recipe has for the model, else the defaults.

    given: a nested mapping, of which every value counts as given. embedded: whether the model is of the embedded family.
    """
    settings = DefenceSettings()
    settings.update_from_flattened_dict({**recipe.defaults, **(recipe.embedded if embedded else {})})
    settings.update(given)
    settings.recipe = recipe.name
    settings.check()
    return settings
