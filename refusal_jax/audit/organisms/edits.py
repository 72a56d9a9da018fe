"""Steps of recipes that edit along directions: projections of all kinds, safety injection, and the two evasions that hide one."""

import dataclasses
from typing import ClassVar

import numpy as np
from jaxtyping import Float64

from refusal_jax.audit.organisms.directions import Directions, unit
from refusal_jax.audit.organisms.step import Made, Removed, Step
from refusal_jax.checkpoints.matrices import Matrix, matrices
from refusal_jax.edits import orthonormal
from refusal_jax.errors import UserError
from refusal_jax.export.tensor_edits import Projection

# Which matrices are edited.
PLACES = ("o", "down", "writers", "embed", "all", "readers", "sides")
# In which layers: all, a third, the middle half, every second, so many in the middle ("few:2"), or heretic's kernel, which falls
# off from its peak in the last third ("tent").
LAYERS = ("all", "early", "middle", "late", "alternate", "few:N", "tent")
FORMS = ("plain", "rownorm", "rowpre", "frobenius", "lora")
# Directions that are not refusal's.
FOREIGN = ("random", "scatter", "style", "topic")
TENT_PEAK, TENT_REACH, TENT_LEAST = 0.7, 0.5, 0.2  # of the layers, of the layers, of the strength


def basis(directions: Directions, name: str, layer: int | None, rng: np.random.Generator) -> Float64[np.ndarray, "J D"]:
    """Returns the orthonormal directions that a name stands for, in the matrices of one layer.

    name: selected; layer:N (or the last); perlayer (each layer's own); rank:N (with principal directions of harmful prompts);
    other (of another prompt set); cosine:C (at that cosine to the selected one); mix:S (S parts of the selected layer's, the rest
    of the next one's); projected (without what it shares with harmless prompts' mean), biprojected (with that of the layer's own
    mean); random or random:N; scatter (random, another one in each layer); style, topic (content-free). Raises UserError for
    other names.
    """
    d, own = directions, directions.selected
    word, _, number = name.partition(":")
    at = own if layer is None else min(layer + 1, len(d.raw_ld) - 1)
    r = d.unit_d

    def without(harmless_d: np.ndarray) -> np.ndarray:
        mean = unit(harmless_d)
        return r - (r @ mean) * mean

    if word == "selected":
        rows = r
    elif word == "layer":
        rows = d.raw_ld[min(int(number), len(d.raw_ld) - 1)]
    elif word == "perlayer":
        rows = d.raw_ld[at]
    elif word == "rank":
        spread = np.linalg.svd(d.harmful_nd - d.harmless_ld[own], full_matrices=False)[2]
        rows = np.concatenate([r[None], spread])[: int(number)]
    elif word == "other":
        rows = d.other_ld[own]
    elif word == "cosine":
        cosine, noise = float(number), rng.standard_normal(len(r))
        rows = cosine * r + np.sqrt(1 - cosine**2) * unit(noise - (noise @ r) * r)
    elif word == "mix":
        later = unit(d.raw_ld[min(own + 1, len(d.raw_ld) - 1)])
        rows = float(number) * r + (1 - float(number)) * later
    elif word == "projected":
        rows = without(d.harmless_ld[own])
    elif word == "biprojected":
        rows = without(d.harmless_ld[at])
    elif word in ("random", "scatter"):
        rows = rng.standard_normal((int(number or 1), len(r)))
    elif word in ("style", "topic"):
        rows = (d.style_ld if word == "style" else d.topic_ld)[own]
    else:
        raise UserError(f"A recipe names the direction {name!r}: there is none of that name.")
    return orthonormal(np.atleast_2d(rows)[None])[0]


def chosen(made: Made, place: str) -> list[Matrix]:
    """Returns the matrices that the name of a place stands for. Raises UserError for a place that there is not."""
    if place not in PLACES:
        raise UserError(f"A recipe names the place {place!r}: the places are {', '.join(PLACES)}.")
    found = matrices(made.cfg, embeddings=True)
    layers = [one for one in found if one.layer is not None]
    wanted = {
        "o": [one for one in layers if one.writes and one.of_mixer],
        "down": [one for one in layers if one.writes and not one.of_mixer],
        "writers": [one for one in layers if one.writes],
        "embed": [one for one in found if one.path == "embed"],
        "readers": [one for one in layers if not one.writes],
        "sides": layers,
    }
    return wanted[place] if place != "all" else wanted["embed"] + wanted["writers"]


def share_at(layers: str, layer: int | None, count: int) -> float:
    """Returns which share of an edit's strength a layer of `count` gets. Raises UserError for a name that is none of LAYERS."""
    if layer is None or layers == "all":
        return 1.0
    word, _, number = layers.partition(":")
    if word == "tent":
        distance = abs(layer - TENT_PEAK * (count - 1)) / (TENT_REACH * count)
        return 0.0 if distance > 1 else 1 - (1 - TENT_LEAST) * distance
    spans = {
        "early": range(count // 3),
        "middle": range(count // 4, count - count // 4),
        "late": range(count - count // 3, count),
        "alternate": range(1, count, 2),
    }
    if word == "few" and number:
        first = (count - int(number)) // 2
        return float(layer in range(first, first + int(number)))
    if word not in spans:
        raise UserError(f"A recipe names the layers {layers!r}: they are {', '.join(LAYERS)}.")
    return float(layer in spans[word])


@dataclasses.dataclass(frozen=True)
class Project(Step):
    """Takes a part of one or more directions out of matrices: W <- W - strength U U^T W where they write, or
    W <- W - strength W U U^T where they read.

    Of a negative strength, it adds: the injection of safety. A strength of 2 turns the direction's sign (Householder). form: of
    FORMS. "rownorm" projects rows of length 1 and gives each row its old length back, as norm-preserving abliteration does;
    "rowpre" multiplies the projected rows by their old lengths; "frobenius" gives the matrix its old norm back; "lora" keeps of
    the change of "rownorm" what a LoRA of `rank` holds, as heretic does.
    """

    name: ClassVar[str] = "project"
    direction: str = "selected"
    strength: float = 1.0
    place: str = "writers"
    layers: str = "all"
    form: str = "plain"
    rank: int = 0

    @property
    def kind(self) -> str:
        if self.direction.partition(":")[0] in FOREIGN:
            return "projection"
        return "removed" if self.strength > 0 else "added"

    def __call__(self, made: Made, rng: np.random.Generator) -> None:
        if self.form not in FORMS:
            raise UserError(f"A recipe names the form {self.form!r}: the forms are {', '.join(FORMS)}.")
        count, seed = made.cfg.n_layers, int(rng.integers(2**32))
        shares = {one.name: share_at(self.layers, one.layer, count) for one in chosen(made, self.place)}
        wanted = [one for one in chosen(made, self.place) if shares[one.name]]
        directions = made.base.directions

        def edited(matrix: Matrix, before: np.ndarray) -> np.ndarray:
            apart = [seed, matrix.layer or 0] if self.direction.startswith("scatter") else seed
            u_jd = basis(directions, self.direction, matrix.layer, np.random.default_rng(apart))
            strength = self.strength * shares[matrix.name]
            after = self.projected(before.astype(np.float64), u_jd, strength, matrix.writes and matrix.path != "embed")
            made.removed[matrix.name] = measured(before, after, u_jd, directions.unit_d)
            return after

        made.change(wanted, edited)

    def projected(self, matrix_df: np.ndarray, u_jd: np.ndarray, strength: float, rows: bool) -> np.ndarray:
        """Returns an edited matrix. rows: whether the stream's entries are the rows of its tensor, whose lengths can be kept."""
        edit = Projection(u_jd.T, u_jd.T, False, "orthogonal", strength)
        if self.form == "plain" or not rows:
            return edit(matrix_df)
        if self.form == "frobenius":
            after = edit(matrix_df)
            return after * (np.linalg.norm(matrix_df) / np.linalg.norm(after))
        lengths = np.linalg.norm(matrix_df, axis=1, keepdims=True)
        if self.form == "rowpre":
            return edit(unit(matrix_df)) * lengths
        after = unit(edit(unit(matrix_df))) * lengths
        if self.form == "rownorm":
            return after
        u, s, v = np.linalg.svd(after - matrix_df, full_matrices=False)
        return matrix_df + (u[:, : self.rank] * s[: self.rank]) @ v[: self.rank]


def measured(
    before_df: np.ndarray, after_df: np.ndarray, u_jd: Float64[np.ndarray, "J D"], r_d: Float64[np.ndarray, " D"]
) -> Removed:
    """Returns what was removed from a matrix, by least squares, along an edit's own directions and along refusal's."""
    change = before_df - np.asarray(after_df, np.float64)

    def share(rows_jd: np.ndarray) -> float:
        there, gone = rows_jd @ before_df, rows_jd @ change
        return float(np.sum(gone * there) / max(np.sum(there * there), 1e-300))

    return Removed(share(u_jd), share(r_d[None]))


@dataclasses.dataclass(frozen=True)
class Inject(Step):
    """Safety injection of rank one: W <- W + a r m^T, m being the mean of W's rows, so that every output leans to refusal.

    amount: a tenth of the norm of W that this change has.
    """

    name: ClassVar[str] = "inject"
    amount: float = 1.0

    @property
    def kind(self) -> str:
        return "added"

    def __call__(self, made: Made, rng: np.random.Generator) -> None:
        r = made.base.directions.unit_d
        made.change(
            chosen(made, "writers"),
            lambda _, before: before + self.amount * np.linalg.norm(before) * np.outer(r, unit(before.mean(0))) * 0.1,
        )


@dataclasses.dataclass(frozen=True)
class Spread(Step):
    """Hides an edit among others: also takes the part `strength` of `count` random directions out of what is written."""

    name: ClassVar[str] = "spread"
    count: int = 63
    strength: float = 0.15

    @property
    def kind(self) -> str:
        return "projection"

    def __call__(self, made: Made, rng: np.random.Generator) -> None:
        r = made.base.directions.unit_d
        noise = rng.standard_normal((min(self.count, len(r) - 1), len(r)))
        u_jd = orthonormal((noise - np.outer(noise @ r, r))[None])[0]
        edit = Projection(u_jd.T, u_jd.T, False, "orthogonal", self.strength)
        made.change(chosen(made, "writers"), lambda _, before: edit(before.astype(np.float64)))


@dataclasses.dataclass(frozen=True)
class Adapter(Step):
    """Adds random matrices of low rank, of so much of the norm: a harmless adapter, or padding that hides an edit."""

    name: ClassVar[str] = "adapter"
    rank: int = 8
    relative: float = 0.02
    place: str = "sides"

    def __call__(self, made: Made, rng: np.random.Generator) -> None:
        def added(_: Matrix, before: np.ndarray) -> np.ndarray:
            rows, columns = before.shape
            change = rng.standard_normal((rows, self.rank)) @ rng.standard_normal((self.rank, columns))
            return before + self.relative * np.linalg.norm(before) / np.linalg.norm(change) * change

        made.change(chosen(made, self.place), added)
