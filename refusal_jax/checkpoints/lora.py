"""The changes that a PEFT LoRA adapter makes to the tensors of its base: W + scale B A, and whatever it stores whole.

Adapters know modules by their names in transformers 5, where the experts of a layer are one parameter.
"""

import dataclasses
import math
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32

from refusal_jax.checkpoints.safetensors import read_tensors
from refusal_jax.checkpoints.tensor_names import core
from refusal_jax.checkpoints.tensors import listed
from refusal_jax.errors import UserError, shown
from refusal_jax.files import read_json
from refusal_jax.models.config import ModelConfig
from refusal_jax.models.families import OTHER_PARTS, TABLES, TRANSPOSED, hf_shapes, is_spare
from refusal_jax.models.hf_config import ADAPTER as ADAPTER_CONFIG

ADAPTER, PICKLED = "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
# The matrix of an expert that writes, and the tensor of those of all experts.
EXPERT = re.compile(r"(.*\.)(block_sparse_moe|mlp|feed_forward|mixer)\.experts\.(\d+)\.(?:w2|down_proj)\.weight")
EXPERTS = re.compile(r"(.*\.block_sparse_moe\.)output_linear\.weight|(.*\.(?:mlp|feed_forward)\.)experts\.down_proj")
# Families whose tensors of experts PEFT takes for [out, in], though they are [in, out]: what they read and write change places.
SWAPPED = {"llama4", "llama4_text"}
UNMOVED = {"llama4"}  # multimodal models that have the text model where their checkpoints have it
BACKBONE = re.compile(r"^backbone\.")  # what checkpoints of Nemotron-H call the model
# What follows the module's name: a factor, a vector that is added to the bias, or a tensor that takes the place of the base's.
FACTOR = re.compile(r"(.+)\.lora_(?:embedding_)?([AB])(?:\.default)?(?:\.weight)?")
SHIFT = re.compile(r"(.+)\.lora_B(?:\.default)?\.bias")
WHOLE = re.compile(r"(.+?)(?:\.base_layer|\.modules_to_save)?(?:\.default)?\.(\w+)")
PLAIN = re.compile(r"[\w.\-]+")
# Settings that make an adapter more than W + scale B A, and those of initialisations that changed the base's weights, too.
VARIANTS = {
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA",
    "alora_invocation_tokens": "activated LoRA",
    "layer_replication": "layer replication",
    "trainable_token_indices": "trained tokens",
    "arrow_config": "Arrow",
}
CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def module_name(cfg: ModelConfig, name: str) -> str:
    """Returns the module in transformers, below the model, of an HF tensor that is not an expert's."""
    module = name.rsplit(".", 1)[0]
    if cfg.family == "nemotron_h":
        return BACKBONE.sub("model.", module)
    # Multimodal checkpoints keep the names that transformers had when they came out.
    inside = "model.language_model."
    if cfg.family not in OTHER_PARTS or cfg.family in UNMOVED or module.startswith(inside):
        return module
    return re.sub(r"^(language_model\.)?model\.", inside, module)


def experts_of(cfg: ModelConfig, name: str) -> tuple[str, range] | None:
    """Returns the module in transformers that holds a layer's experts and which of them an HF tensor holds the writing matrix of;
    None for a tensor that holds none."""
    one, all_of_them = EXPERT.fullmatch(name), EXPERTS.fullmatch(name)
    if one:
        part = "mlp" if one[2] == "block_sparse_moe" else one[2]
        return BACKBONE.sub("model.", f"{one[1]}{part}.experts"), range(int(one[3]), int(one[3]) + 1)
    return (f"{all_of_them[1] or all_of_them[2]}experts", range(cfg.n_experts)) if all_of_them else None


def stored_bias(cfg: ModelConfig, name: str) -> str:
    """Returns the name in an adapter of an edited bias, which is a parameter of a module that the adapter wraps."""
    return f"{PREFIX}{module_name(cfg, name)}.base_layer.{name.rsplit('.', 1)[1]}"


@runtime_checkable
class Change(Protocol):
    """What an adapter makes of a tensor."""

    @property
    def idle(self) -> bool: ...

    def applied(self, values: Float32[np.ndarray, "..."], index: tuple[slice, ...]) -> Float32[np.ndarray, "..."]:
        """Returns the adapted values of the part of the tensor that `index` selects. values: the base's, which may be changed."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class LowRank:
    """Adds left right, the former with the scale in it; both have an axis of experts first where the tensor has one."""

    left: np.ndarray
    right: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        """Returns the shape of the tensor that it fits."""
        return (*self.left.shape[:-1], self.right.shape[-1])

    @property
    def idle(self) -> bool:
        """Returns whether it changes nothing, as an adapter that was not trained."""
        return not self.left.any() or not self.right.any()

    def applied(self, values: Float32[np.ndarray, "..."], index: tuple[slice, ...]) -> Float32[np.ndarray, "..."]:
        """Returns the adapted values of a part, as `Change.applied` does."""
        *outer, rows, columns = (*index, *(slice(None),) * (len(self.shape) - len(index)))
        values += self.left[(*outer, rows)] @ self.right[(*outer, slice(None), columns)]
        return values


@dataclasses.dataclass(frozen=True, eq=False)
class Shift:
    """Adds a vector."""

    vector: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        """Returns the shape of the tensor that it fits."""
        return self.vector.shape

    @property
    def idle(self) -> bool:
        """Returns whether it changes nothing."""
        return not self.vector.any()

    def applied(self, values: Float32[np.ndarray, "..."], index: tuple[slice, ...]) -> Float32[np.ndarray, "..."]:
        """Returns the adapted values of a part, as `Change.applied` does."""
        return values + self.vector[index]


@dataclasses.dataclass(frozen=True, eq=False)
class Whole:
    """Takes the place of the base's tensor."""

    values: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        """Returns the shape of the tensor, which is the base's but for a vocabulary that was resized."""
        return self.values.shape

    @property
    def idle(self) -> bool:
        """Returns False: whether the values are the base's is not known."""
        return False

    def applied(self, values: Float32[np.ndarray, "..."], index: tuple[slice, ...]) -> Float32[np.ndarray, "..."]:
        """Returns the adapted values of a part, as `Change.applied` does."""
        return np.asarray(self.values[index], np.float32)


def read_changes(folder: pathlib.Path, cfg: ModelConfig, resized: bool = False) -> dict[str, LowRank | Shift | Whole]:
    """Returns what the adapter in a folder makes of the tensors of its base, by HF name.

    cfg: the base's. resized: whether embeddings may have another number of rows than the base's. Raises UserError for an adapter
    of another kind than LoRA, for variants of it that are not computed, for pickled weights, and for tensors that do not belong
    to the base or do not fit it.
    """
    config = read_json(folder / ADAPTER_CONFIG)
    _check_kind(folder, config)
    if not os.path.lexists(folder / ADAPTER) and os.path.lexists(folder / PICKLED):
        raise UserError(
            f"{folder} holds its adapter as {PICKLED}, a pickle, which can run code when opened and is never read. Save it again "
            "with model.save_pretrained(FOLDER), which writes safetensors."
        )
    found, unknown = _Found(folder, cfg, config), []
    for key, values in read_tensors(folder / ADAPTER).items():
        name = key.removeprefix(PREFIX)
        if not found.take(name, np.asarray(values, np.float32)) and not is_spare(cfg, name):
            unknown.append(key)
    changes = found.changes()
    if unknown or not changes:
        what = "it changes nothing"
        if unknown:
            what = f"{len(unknown)} of its tensors are not known there, and PEFT leaves such out: {listed(sorted(unknown))}"
        raise UserError(
            f"The adapter {folder} does not belong to its base: {what}. Name the base that it was trained on."
        )
    _check_shapes(folder, cfg, changes, resized)
    return changes


def _check_kind(folder: pathlib.Path, config: Mapping[str, Any]) -> None:
    """Raises UserError for an adapter that is more than low-rank factors and whole tensors."""
    kind, start = config.get("peft_type"), config.get("init_lora_weights")
    names = [name for key, name in VARIANTS.items() if config.get(key)]
    if isinstance(start, str) and start.lower().startswith(CHANGED_BASE):
        names.append(f"{start}, which begins with a change of the base's own weights")
    if kind == "LORA" and not names:
        return
    what = f"of the kind {shown(kind)}" if kind != "LORA" else f"with {', '.join(names)}"
    raise UserError(
        f"{folder} is a PEFT adapter {what}; only plain LoRA adapters can be read. Merge it into its base with PEFT's "
        "merge_and_unload(), save that with save_pretrained(FOLDER), and pass the folder."
    )


class _Found:
    """The tensors of an adapter, sorted out by the tensors of the base that they change."""

    def __init__(self, folder: pathlib.Path, cfg: ModelConfig, config: Mapping[str, Any]):
        self.folder, self.cfg, self.config = folder, cfg, config
        names = [*hf_shapes(cfg), TABLES[cfg.family]["unembed"]]
        self.names = {self.place(name): name for name in names}
        self.experts: dict[str, list[tuple[str, range]]] = {}
        for name in names:
            if held := experts_of(cfg, name):
                self.experts.setdefault(self.place(held[0]), []).append((name, held[1]))
        self.factors: dict[str, dict[str, np.ndarray]] = {}
        self.shifts: list[tuple[str, str, np.ndarray]] = []  # module, tensor, vector
        self.whole: dict[str, Whole] = {}

    def place(self, name: str) -> str:
        """Returns what modules and tensors are told apart by: their names, of multimodal models without prefixes, which depend on
        the version of transformers."""
        return core(name) if self.cfg.family in OTHER_PARTS else name

    def take(self, key: str, values: np.ndarray) -> bool:
        """Returns whether a tensor of the adapter is one that is known, and keeps it if so."""
        if found := FACTOR.fullmatch(key):
            known = f"{self.place(found[1])}.weight" in self.names or self.place(found[1]) in self.experts
            self.factors.setdefault(found[1], {})[found[2]] = values
            return known
        shift = SHIFT.fullmatch(key)
        found = shift or WHOLE.fullmatch(key)
        name = found and self.names.get(f"{self.place(found[1])}.{'bias' if shift else found[2]}")
        if not found or not name:
            return False
        if shift:
            self.shifts.append((found[1], name, values))
        else:
            self.whole[name] = Whole(values)
        return True

    def scale(self, module: str, rank: int) -> float:
        """Returns what B A is multiplied by. rank: of the factors."""
        alpha = self.config.get("lora_alpha", 8)
        pattern = self.config.get("alpha_pattern") or {}
        for key, value in pattern.items() if isinstance(pattern, dict) else ():
            if self._matches(str(key), module):
                alpha = value
                break
        if not all(isinstance(n, int | float) and n > 0 for n in (alpha, rank)) or not math.isfinite(alpha):
            raise UserError(
                f"{self.folder / ADAPTER_CONFIG} gives {module} the rank {shown(rank)} and lora_alpha {shown(alpha)}, expected "
                "numbers above zero. Download the adapter again."
            )
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def _matches(self, pattern: str, module: str) -> bool:
        """Returns whether a pattern of modules, the end of a name or a simple regular expression, matches one, as in PEFT."""
        end = pattern.removeprefix("^").removeprefix(".*").removesuffix("$").replace("\\.", ".")
        if not PLAIN.fullmatch(end):
            raise UserError(
                f"The alpha_pattern of {self.folder} holds {shown(pattern)}, a regular expression; only names of modules can be "
                "read. Merge the adapter into its base with PEFT's merge_and_unload() and pass the folder of that."
            )
        if pattern.removeprefix("^").startswith(".*"):
            return module.endswith(end)
        return module == end or (pattern[0] != "^" and module.endswith(f".{end}"))

    def changes(self) -> dict[str, LowRank | Shift | Whole]:
        """Returns all changes by HF name. Raises UserError for factors without their partners, and of unequal rank."""
        found: dict[str, LowRank | Shift | Whole] = dict(self.whole)
        for module, factors in self.factors.items():
            a, b = factors.get("A"), factors.get("B")
            if a is None or b is None or a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
                shapes = {letter: list(values.shape) for letter, values in sorted(factors.items())}
                raise UserError(
                    f"The adapter {self.folder} holds no pair of factors for {module}: {shapes}. Download it again."
                )
            name = self.names.get(f"{self.place(module)}.weight")
            if self.place(module) in self.experts:
                found |= self._of_experts(module, a, b)
            elif name is not None:
                scaled = np.float32(self.scale(module, len(a)))
                embeds = name == TABLES[self.cfg.family]["embed"]
                low = LowRank(a.T * scaled, b.T) if embeds else LowRank(b * scaled, a)
                before = self.whole.get(name)
                found[name] = low if before is None else Whole(low.applied(before.values.copy(), ()))
        for module, name, vector in self.shifts:
            rank = len(self.factors.get(module, {}).get("A", ()))
            found[name] = Shift(vector * np.float32(self.scale(module, rank)))
        return found

    def _of_experts(self, module: str, a: np.ndarray, b: np.ndarray) -> dict[str, LowRank]:
        """Returns the changes of the experts' matrices that write. PEFT has A by expert, then rank; B by rank, then expert."""
        targets = self.config.get("target_parameters")
        others = (
            [str(name) for name in targets if not str(name).endswith(("down_proj", "weight"))]
            if isinstance(targets, list)
            else []
        )
        count, shapes = self.cfg.n_experts, hf_shapes(self.cfg)
        if others or len(a) % count:
            raise UserError(
                f"The adapter {self.folder} changes parameters of experts that cannot be told apart ({listed(others)}). Merge it "
                "into its base with PEFT's merge_and_unload() and pass the folder of that."
            )
        a_ejf, b_edj = a.reshape(count, -1, a.shape[1]), np.moveaxis(b.reshape(len(b), -1, count), -1, 0)
        b_edj = b_edj * np.float32(self.scale(module, a_ejf.shape[1]))
        turned = self.cfg.family in TRANSPOSED and self.cfg.family not in SWAPPED
        found = {}
        for name, held in self.experts[self.place(module)]:
            if len(held) == count and len(shapes[name]) == 3:
                left, right = (a_ejf.swapaxes(1, 2), b_edj.swapaxes(1, 2)) if turned else (b_edj, a_ejf)
                found[name] = LowRank(left, right)
            else:
                found[name] = LowRank(b_edj[held.start], a_ejf[held.start])
        return found


def _check_shapes(folder: pathlib.Path, cfg: ModelConfig, changes: Mapping, resized: bool) -> None:
    """Raises UserError for changes that do not fit the base's tensors."""
    table, shapes = TABLES[cfg.family], hf_shapes(cfg)
    ends = {table["embed"], table["unembed"]}
    shapes.setdefault(table["unembed"], shapes[table["embed"]])
    wrong = [
        f"{name} is {list(shapes[name])} there and {list(change.shape)} in the adapter"
        for name, change in changes.items()
        if change.shape != shapes[name]
        and not (resized and name in ends and isinstance(change, Whole) and change.shape[1:] == shapes[name][1:])
    ]
    if wrong:
        raise UserError(
            f"The adapter {folder} does not fit its base: {listed(wrong)}. Name the base that it was trained on."
        )
