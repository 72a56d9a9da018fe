"""Interventions on a model, and conditions, each of which is a data set under an intervention.

One intervention object runs (`edits`), is written by `refusal_jax.export`, and is named in files and reports (`name`,
`label`). To add an intervention, write one class like those here and list it in INTERVENTIONS: the study, its files and
its report follow from that.
"""

import abc
import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal, get_args

import numpy as np

from refusal_jax.data.sampling import harmful_name, over_refusal_names
from refusal_jax.directions import Direction
from refusal_jax.edits import SITES, Edits
from refusal_jax.errors import UserError, did_you_mean, setting
from refusal_jax.models.config import ModelConfig

EMBED = "embed"  # a site of its own: the input of block 0 alone, which the embedding writes
Kind = Literal["completions", "evaluations", "jailbreakbench"]  # of the files that belong to a condition
COMPLETIONS_FOLDER = "completions"


class Intervention(abc.ABC):
    """A change that is made to a model. name: in settings and in the names of files. verb: in exports and chats, ""
    where there is nothing to do."""

    name: ClassVar[str]
    verb: ClassVar[str] = ""

    @classmethod
    @abc.abstractmethod
    def of(cls, direction: Direction, harmful: bool) -> "Intervention":
        """Returns the intervention as a study measures it (paper, section 3), on harmful or on harmless prompts."""

    @classmethod
    def label(cls, harmful: bool) -> str:
        """Returns what reports call it, on harmful or on harmless prompts."""
        return cls.name

    @abc.abstractmethod
    def edits(self, cfg: ModelConfig) -> Edits:
        """Returns the one-row edit of a model. Raises UserError for a direction of another model and for layers out of range."""


@dataclasses.dataclass(frozen=True)
class Baseline(Intervention):
    """The model as it is."""

    name = "baseline"

    @classmethod
    def of(cls, direction: Direction, harmful: bool) -> "Baseline":
        """Returns the same for all prompts."""
        return cls()

    def edits(self, cfg: ModelConfig) -> Edits:
        """Returns a row that changes nothing."""
        return Edits.none(cfg.d_model)


@dataclasses.dataclass(frozen=True, eq=False)
class OfWriters:
    """An edit of what some layers write to the residual stream, of size `scale`.

    layers: by default all. sites: of `edits.SITES`, or "embed", which is the input of block 0 alone.
    """

    direction: Direction
    layers: Sequence[int] | None = None
    sites: Sequence[str] = SITES
    scale: float = 1.0

    verb: ClassVar[str]

    def at(self, cfg: ModelConfig) -> tuple[int, ...]:
        """Returns the layers, sorted. Raises UserError for layers that the model does not have, and for none."""
        return _layers_of(cfg, range(cfg.n_layers) if self.layers is None else self.layers)

    def reaches(self, layer: int, site: str) -> bool:
        """Returns whether a site of SITES is edited in a layer."""
        here = self.layers is None or layer in self.layers
        return here and (site in self.sites or (site == "resid_pre" and layer == 0 and EMBED in self.sites))

    def described(self, cfg: ModelConfig) -> dict:
        """Returns the edit in plain values, for an export's report."""
        sites = [EMBED if site == "resid_pre" else site for site in self.sites]
        return {"kind": self.verb, "scale": self.scale, "layers": list(self.at(cfg)), "sites": sites}


@dataclasses.dataclass(frozen=True, eq=False)
class Inject(OfWriters):
    """Makes every matrix that writes to the residual stream write a direction as well: W <- W + scale r m^T, r being the unit
    direction and m the mean of W's rows (rank-one safety injection, arXiv 2508.20766).

    What is added along r is `scale` times the mean entry of what the matrix writes, so it depends on the token. It is an edit of
    weights: nothing that is done to the stream at its sites of `edits.SITES` is the same.
    """

    sites: Sequence[str] = SITES[1:]

    name: ClassVar[str] = "injection"
    verb: ClassVar[str] = "inject"


@dataclasses.dataclass(frozen=True, eq=False)
class Ablate(OfWriters, Intervention):
    """Removes the part `scale` of what lies along a direction, or in a subspace (paper, section 2.4)."""

    name = "ablation"
    verb = "ablate"

    @classmethod
    def of(cls, direction: Direction, harmful: bool) -> "Ablate":
        """Returns the ablation of the direction everywhere, for all prompts."""
        return cls(direction)

    def everywhere(self, cfg: ModelConfig) -> bool:
        """Returns whether this is the paper's whole ablation: of all that is written to the residual stream."""
        written = {"resid_pre" if site == EMBED else site for site in self.sites}
        return len(self.at(cfg)) == cfg.n_layers and written == set(SITES) and self.scale == 1

    def edits(self, cfg: ModelConfig) -> Edits:
        """Returns a row that ablates. Raises UserError for a direction of another model and for layers out of range."""
        self.direction.check_width(cfg.d_model)
        layers, everywhere = self.at(cfg), self.everywhere(cfg)
        whole = Edits.ablate(self.direction.raw_jd[None])
        gate_ls = [
            [everywhere or (at in layers and self.reaches(at, site)) for site in SITES] for at in range(cfg.n_layers)
        ]
        return dataclasses.replace(whole, gate_rls=np.float32(self.scale) * np.array([gate_ls], np.float32))


@dataclasses.dataclass(frozen=True, eq=False)
class Add(Intervention):
    """Adds `scale` times a direction, of its raw norm, at the input of some layers (paper, section 2.4).

    layers: by default the one at whose input the direction was read.
    """

    direction: Direction
    layers: Sequence[int] | None = None
    scale: float = 1.0

    name = "actadd"
    verb = "add"

    @classmethod
    def of(cls, direction: Direction, harmful: bool) -> "Add":
        """Returns the addition of -r for harmful prompts, which bypasses refusal, and of +r for others, which induces it."""
        return cls(direction, scale=-1.0 if harmful else 1.0)

    @classmethod
    def label(cls, harmful: bool) -> str:
        """Returns the addition with its sign."""
        return "− addition" if harmful else "+ addition"

    def at(self, cfg: ModelConfig) -> tuple[int, ...]:
        """Returns the layers, sorted. Raises UserError where nothing tells them, for layers that the model does not have, and
        for none."""
        own = self.direction.layer
        if self.layers is not None:
            return _layers_of(cfg, self.layers)
        if own is None:
            raise UserError(
                "The direction does not tell at which layer to add it. Say so, such as with "
                f"{setting('layers', 12) or setting('layer', 12)}."
            )
        return _layers_of(cfg, [own])

    @property
    def vector_d(self) -> np.ndarray:
        """Returns what is added, float64 `[D]`. Raises UserError for several directions."""
        if len(self.direction.raw_jd) > 1:
            raise UserError(
                f"An addition takes one direction, these are {len(self.direction.raw_jd)}. Name one of them."
            )
        return self.scale * self.direction.raw_d

    def edits(self, cfg: ModelConfig) -> Edits:
        """Returns a row that adds. Raises UserError for a direction of another model, for several, and for layers out of
        range."""
        self.direction.check_width(cfg.d_model)
        return Edits.add(self.vector_d, self.at(cfg))

    def described(self, cfg: ModelConfig) -> dict:
        """Returns the addition in plain values, for an export's report."""
        return {"kind": self.verb, "scale": self.scale, "layers": list(self.at(cfg))}


def with_origin(direction: Direction, means: Mapping[str, np.ndarray]) -> Direction:
    """Returns the direction with the mean residual of the harmless prompts at its place, as `Affine` needs it.

    means: what a study writes, by name; where these have none at the direction's place, it stays as it is.
    """
    harmless_pld = means.get("harmless")
    if harmless_pld is None or direction.position is None or direction.layer is None:
        return direction
    return dataclasses.replace(direction, origin_d=np.float64(harmless_pld[direction.position, direction.layer]))


@dataclasses.dataclass(frozen=True, eq=False)
class Affine(Intervention):
    """Gives every token the same coordinate along a direction at the input of the block where it was read (affine concept
    editing, arXiv 2411.09003): that of the mean harmless prompt, plus `scale` times the direction's norm.

    So 0 is where harmless prompts are along it, and 1 where harmful ones are. direction: with its `origin_d`.
    """

    direction: Direction
    scale: float = 0.0

    name = "affine"
    verb = "affine"

    @classmethod
    def of(cls, direction: Direction, harmful: bool) -> "Affine":
        """Returns the edit to 0 for harmful prompts, which bypasses refusal, and to 1 for others, which induces it."""
        return cls(direction, 0.0 if harmful else 1.0)

    @classmethod
    def label(cls, harmful: bool) -> str:
        """Returns the edit with its scale."""
        return "affine, to 0" if harmful else "affine, to 1"

    @property
    def target(self) -> float:
        """Returns the coordinate along the unit direction that every token gets. Raises UserError where the mean of the harmless
        prompts is not known."""
        if self.direction.origin_d is None:
            raise UserError(
                "An affine edit needs the mean activation of the harmless prompts, which this direction comes without. Use the "
                "folder of a study, whose mean_diffs.safetensors has it."
            )
        return (
            float(self.direction.origin_d @ self.direction.raw_d / self.direction.norm)
            + self.scale * self.direction.norm
        )

    def edits(self, cfg: ModelConfig) -> Edits:
        """Returns a row that sets the coordinate. Raises UserError for a direction of another model, for several, and for one
        whose layer or origin is not known."""
        self.direction.check_width(cfg.d_model)
        (layer,) = Add(self.direction).at(cfg)
        return Edits.affine(self.direction.raw_d, self.target, layer, cfg.n_layers)


INTERVENTIONS: dict[str, type[Intervention]] = {one.name: one for one in (Baseline, Ablate, Add, Affine)}
USUAL = (Baseline, Ablate, Add)  # those that every study with a direction measures


def _layers_of(cfg: ModelConfig, layers: Sequence[int]) -> tuple[int, ...]:
    """Returns the layers, sorted. Raises UserError for layers that the model does not have, and for none."""
    outside = [layer for layer in layers if not 0 <= layer < cfg.n_layers]
    if outside or not layers:
        raise UserError(
            f"The edit is at {f'layer {outside[0]}' if outside else 'no layer'}, and the model's layers are 0 to "
            f"{cfg.n_layers - 1}. Choose {setting('layers') or setting('layer')} among these."
        )
    return tuple(sorted(set(layers)))


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A set of test prompts. key: "harmful", "harmless", or the name of an over-refusal set. stem: its name in files."""

    key: str
    stem: str
    harmful: bool = False


def datasets(data) -> dict[str, Dataset]:
    """Returns the test sets of a study's `data` settings by key; no two have the same stem."""
    more = {name: Dataset(name, name) for name in over_refusal_names(data)}
    return {
        "harmful": Dataset("harmful", harmful_name(data), True),
        "harmless": Dataset("harmless", "harmless"),
        **more,
    }


@dataclasses.dataclass(frozen=True)
class Condition:
    """A data set under an intervention."""

    dataset: Dataset
    intervention: type[Intervention]

    @classmethod
    def parse(cls, name: str, known: Mapping[str, Dataset]) -> "Condition":
        """Returns the condition that a study's settings call `name`, such as "harmful_ablation". Raises UserError for others."""
        key, _, intervention = name.rpartition("_")
        if key not in known or intervention not in INTERVENTIONS:
            hint = did_you_mean(name, [f"{key}_{one}" for key in known for one in INTERVENTIONS])
            raise UserError(
                f"unknown condition {name!r}: it is harmful_ or harmless_ followed by one of {', '.join(INTERVENTIONS)}.{hint}"
            )
        return cls(known[key], INTERVENTIONS[intervention])

    @property
    def name(self) -> str:
        """Returns the name in settings, such as "harmful_ablation"."""
        return f"{self.dataset.key}_{self.intervention.name}"

    @property
    def stem(self) -> str:
        """Returns the name in files, such as "jailbreakbench_ablation"."""
        return f"{self.dataset.stem}_{self.intervention.name}"

    @property
    def label(self) -> str:
        """Returns what reports call the intervention on this data set."""
        return self.intervention.label(self.dataset.harmful)

    def edits(self, direction: Direction | None, cfg: ModelConfig) -> Edits:
        """Returns the one-row edit of a model; only the baseline needs no direction. Raises UserError for a direction of another
        model."""
        if self.intervention is Baseline:
            return Baseline().edits(cfg)
        assert direction is not None
        return self.intervention.of(direction, self.dataset.harmful).edits(cfg)

    def file(self, kind: Kind) -> str:
        """Returns the name, in a run's folder, of the condition's file of a kind."""
        return file_of(self.stem, kind)


def file_of(stem: str, kind: Kind) -> str:
    """Returns the name, in a run's folder, of the file of a kind that belongs to the condition with this stem."""
    return f"{COMPLETIONS_FOLDER}/{stem}_{kind}.json"


def stem_of(file: str | pathlib.PurePath) -> str:
    """Returns the stem of a condition, such as "harmless_ablation", from the name of one of its files."""
    stem = pathlib.PurePath(file).stem
    for kind in get_args(Kind):
        stem = stem.removesuffix(f"_{kind}")
    return stem


def split_stem(stem: str) -> tuple[str, str]:
    """Returns data set and intervention of a stem; without an intervention, that is empty. Both may be any names."""
    dataset, _, intervention = stem.rpartition("_")
    return (dataset, intervention) if dataset else (intervention, "")


def rank(intervention: str) -> tuple[int, str]:
    """Returns what to sort names of interventions by: those of the paper first, in its order, others by name."""
    known = list(INTERVENTIONS)
    return known.index(intervention) if intervention in known else len(known), intervention


def label_of(intervention: str, harmful: bool) -> str:
    """Returns what reports call an intervention, whose name may be any that a file has."""
    known = INTERVENTIONS.get(intervention)
    return known.label(harmful) if known else intervention
