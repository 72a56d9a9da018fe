"""Rank-one safety injection (ROSI, arXiv 2508.20766): every matrix that writes to the residual stream in layers is made to write
the refusal direction r as well, W <- W + a r m^T, where m is the mean of W's rows.

What is added along r is a times the mean entry of what W writes. That entry is of no particular sign or size, so a is searched on
both sides of 0, in steps that are shares of the matrices' norm.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from refusal_jax.axes import Array
from refusal_jax.chat.model import ChatModel
from refusal_jax.conditions import Inject
from refusal_jax.defence.data import DefenceData
from refusal_jax.defence.lessons import Note
from refusal_jax.defence.recipe import Change, Recipe
from refusal_jax.defence.settings import DefenceSettings
from refusal_jax.defence.trials import Bench, Parts, chosen, direction_of
from refusal_jax.errors import UserError
from refusal_jax.export.tensor_edits import check_edit
from refusal_jax.models.decoder import Decoder
from refusal_jax.models.families import WRITERS
from refusal_jax.models.weights import weight_table

PATHS = tuple(path for path in WRITERS if path != "embed")


@partial(jax.jit, static_argnames="layers")
def injected(decoder: Decoder, unit_d: Float[Array, " D"], scale: Float[Array, ""], layers: tuple[int, ...]) -> Decoder:
    """Returns a decoder whose writers in some layers write a unit direction as well. scale: a of the formula."""
    weights, table = decoder.weights(), weight_table(decoder.cfg)
    for path in (path for path in PATHS if path in weights):
        w = weights[path].astype(jnp.float32)  # [L, D, F], or with an axis of experts before D
        mean = w.mean(axis=-2, keepdims=True)
        here = np.isin(table[path].layers, layers).astype(np.float32).reshape(-1, *[1] * (w.ndim - 1))
        weights[path] = (w + here * scale * unit_d[:, None] * mean).astype(weights[path].dtype)
    return Decoder(decoder.cfg, weights, decoder.mesh)


@jax.jit
def norms(decoder: Decoder) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Returns of every writer the norm of its matrix and that of the mean of its rows, by path."""
    found = {}
    for path, w in decoder.weights().items():
        if path in PATHS:
            x = w.astype(jnp.float32)
            found[path] = jnp.linalg.norm(x, axis=(-2, -1)), jnp.linalg.norm(x.mean(axis=-2), axis=-1)
    return found


def unit_size(decoder: Decoder, layers: tuple[int, ...]) -> float:
    """Returns the scale whose change is as large as the matrix, in the median over the writers in some layers. Raises UserError
    if the mean rows are zero."""
    table, ratios = weight_table(decoder.cfg), []
    for path, (whole, mean) in jax.device_get(norms(decoder)).items():
        here = np.isin(table[path].layers, layers)
        ratios += (np.asarray(whole)[here] / np.maximum(np.asarray(mean)[here], 1e-30)).ravel().tolist()
    size = float(np.median(ratios))
    if not 0 < size < 1e6:
        raise UserError(
            "What the matrices write has a mean entry of zero, so that an injection, which adds a multiple of it, changes "
            "nothing. Use another recipe."
        )
    return size


def edit(model: ChatModel, data: DefenceData, settings: DefenceSettings, note: Note) -> Change:
    """Returns the injection of the scale that the rule of `trials` chooses. Raises UserError if none strengthens refusal within
    the bounds, and as `direction_of` does."""
    own, parts, cfg = settings.injection, Parts.of(data, settings.search), model.config
    bench = Bench.of(model, parts, settings)
    direction = direction_of(own.direction, bench, parts)
    check_edit(cfg, Inject(direction, own.layers or None))
    layers = own.layers or tuple(range(cfg.n_layers))
    whole, unit_d = unit_size(model.decoder, layers), direction.basis_jd[0]
    before, trials = bench.tried({"size": 0.0, "scale": 0.0}), []
    for size in sorted(own.sizes):
        for scale in (size * whole, -size * whole):
            decoder = injected(model.decoder, np.float32(unit_d), np.float32(scale), layers)
            changed = dataclasses.replace(model, decoder=decoder)
            trials.append(bench.tried({"size": size, "scale": scale}, changed))
    best = chosen(trials, before, settings.search, "sizes of the injection")
    note(
        f"The injection has the scale {best.about['scale']:.4g}, {best.about['size']:g} of the matrices' norm: on validation "
        f"prompts {best.refused.count} of {best.refused.n} harmful ones are refused, and {before.refused.count} without it."
    )
    found = {
        "direction": {"layer": direction.layer, "position": direction.position, "sha256": direction.sha256},
        "chosen": best.record,
        "before": before.record,
        "tried": [one.record for one in trials],
    }
    return Change(edit=Inject(direction, own.layers or None, scale=best.about["scale"]), found=found)


RECIPE = Recipe(
    name="injection",
    about="Rank-one safety injection: what writes to the residual stream is made to write the refusal direction as well.",
    source="2508.20766",
    edit=edit,
)
