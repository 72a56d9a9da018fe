"""Reads where a grid ablates: names of places, such as `written@0%-25%`, which settle sites and layers for any model.

A place is SITES@LAYERS. SITES is `all` (the paper's three sites), `written` (what attention and MLP write, which an edit of their
weights changes, too), or names of sites joined by +. LAYERS is `all`, a band `FIRST-LAST`, or `tent:POSITION:DISTANCE`, whose
strength falls linearly from its greatest at a position to none at a distance from there; with a fourth number, LEAST, it falls to
that part of its greatest. A number counts layers from 0, or is a share of the depth in percent.
"""

import dataclasses
import logging
import re
from collections.abc import Sequence

import numpy as np

from refusal_jax.damage.partial import WRITTEN, Kernel, Partial, spread
from refusal_jax.edits import SITES
from refusal_jax.errors import UserError, did_you_mean, field

LOG = logging.getLogger(__name__)
GROUPS = {"all": SITES, "written": WRITTEN}
NUMBER = r"(\d+(?:\.\d+)?)(%?)"
BAND = re.compile(rf"{NUMBER}-{NUMBER}")
TENT = re.compile(rf"tent:{NUMBER}:{NUMBER}(?::(\d+(?:\.\d+)?))?")


@dataclasses.dataclass(frozen=True)
class Place:
    """Tells where a direction is ablated in a model of a known depth: sites, and a kernel of strength 1 over the layers.

    name: as the settings spell it. label: in words, for tables and figures.
    """

    name: str
    label: str
    sites: tuple[str, ...]
    kernel: Kernel

    def at(self, strength: float) -> Partial:
        """Returns the ablation of this strength there."""
        kernel = dataclasses.replace(self.kernel, most=strength * self.kernel.most, least=strength * self.kernel.least)
        return Partial({site: kernel for site in self.sites})

    @classmethod
    def parse(cls, name: str, n_layers: int, of: str = "grid.places") -> "Place":
        """Returns the place of a name. of: the setting that names it. Raises UserError for one that cannot be read, and for
        layers that the model lacks."""
        sites, at, layers = name.partition("@")
        chosen = GROUPS.get(sites) or tuple(sites.split("+"))
        for site in chosen:
            if site not in SITES:
                known = (*GROUPS, *SITES)
                raise UserError(
                    f"{field(of)} names {name!r}, and {site!r} is no site.{did_you_mean(site, known)} Write "
                    f"SITES@LAYERS, with sites among {', '.join(known)}, several of them joined by +."
                )
        kernel, where = _kernel(name, layers if at else "all", n_layers, of)
        what = {"all": "all sites", "written": "written"}.get(sites, "+".join(chosen))
        return cls(name, f"{what}, {where}", chosen, kernel)


def _kernel(name: str, layers: str, n_layers: int, of: str) -> tuple[Kernel, str]:
    """Returns the kernel of a place's layers, and what they are in words."""
    last = n_layers - 1
    if layers == "all":
        return Kernel.band(1.0, 0, last), "all layers"
    if found := BAND.fullmatch(layers):
        ends = [float(found[1]), float(found[3])]
        if found[2] != found[4]:
            raise _unreadable(name, "one end of its band is a share of the depth and the other is not", n_layers, of)
        if found[2]:
            first, end = spread(n_layers, ends[0] / 100, ends[1] / 100)
        else:
            first, end = int(ends[0]), int(ends[1])
        if not 0 <= first <= end <= last or ends[0] > ends[1] or (found[2] and ends[1] > 100):
            raise _unreadable(name, "its band is empty or ends outside of the model", n_layers, of)
        return Kernel.band(1.0, first, end), f"layer {first}" if first == end else f"layers {first} to {end}"
    if found := TENT.fullmatch(layers):
        numbers = (found.groups()[:2], found.groups()[2:4])
        position, distance = (float(number) * (last / 100 if percent else 1.0) for number, percent in numbers)
        least = float(found[5] or 0.0)
        if position > last or float(found[3]) == 0:
            raise _unreadable(name, "its tent stands outside of the model or has no width", n_layers, of)
        falls = f", to {least:g} of it" if least else ""
        return Kernel(1.0, position, least, distance), f"tent at {position:.3g} ± {distance:.3g}{falls}"
    raise _unreadable(name, f"{layers!r} are no layers", n_layers, of)


def _unreadable(name: str, why: str, n_layers: int, of: str) -> UserError:
    return UserError(
        f"{field(of)} names {name!r}, and {why}. The model's layers are 0 to {n_layers - 1}. Write SITES@all, "
        "SITES@FIRST-LAST or SITES@tent:POSITION:DISTANCE, with numbers of layers or with shares of the depth such as 25%."
    )


def places_of(names: Sequence[str], n_layers: int) -> list[Place]:
    """Returns the places of some names, in order. In a model of few layers two names may be one place, and a narrow tent may
    reach no layer: such ones are left out, which is logged.

    Raises UserError for names that cannot be read, and if no place is left.
    """
    found: list[Place] = []
    for place in (Place.parse(name, n_layers) for name in names):
        strengths_ls = place.at(1.0).strengths(n_layers)
        same = [one.name for one in found if np.array_equal(one.at(1.0).strengths(n_layers), strengths_ls)]
        if same:
            LOG.info(f"The place {place.name} is left out: in a model of {n_layers} layers it is {same[0]}.")
        elif not strengths_ls.any():
            LOG.info(f"The place {place.name} is left out: in a model of {n_layers} layers it reaches none of them.")
        else:
            found.append(place)
    if not found:
        raise UserError(
            f"{field('grid.places')} names no place at which anything is removed from a model of {n_layers} layers. Name at "
            "least one, such as all@all."
        )
    return found
