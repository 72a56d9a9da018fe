"""Steps of recipes that change a checkpoint's form: scales, order and basis of its axes, biases, norms and chat template."""

import dataclasses
from typing import ClassVar

import numpy as np

from refusal_jax.audit.organisms.edits import chosen
from refusal_jax.audit.organisms.step import Made, Step
from refusal_jax.errors import UserError
from refusal_jax.models.config import ModelConfig
from refusal_jax.models.families import TABLES

WIDE = ("q", "k", "v", "gate", "up")  # read from the stream


def name_of(cfg: ModelConfig, path: str, layer: int | None = None) -> str:
    """Returns the tensor of a path that has one tensor a layer."""
    return TABLES[cfg.family][path].format(l=layer)


def check_plain(cfg: ModelConfig) -> None:
    """Raises UserError for architectures whose axes cannot be reordered here: the step knows Llama's layers only."""
    if TABLES[cfg.family] is not TABLES["llama"] or cfg.n_experts or cfg.qkv_bias or cfg.qk_norm:
        raise UserError(
            f"A recipe reorders the axes of a {cfg.family} model; that is made for models with Llama's tensors, without biases."
        )


@dataclasses.dataclass(frozen=True)
class Rescale(Step):
    """Multiplies matrices by a factor. place: as in `project`; "pair" multiplies the MLP's up matrices and divides its
    down matrices, which computes the same."""

    name: ClassVar[str] = "rescale"
    factor: float = 0.97
    place: str = "sides"

    def __call__(self, made: Made, rng: np.random.Generator) -> None:
        if self.place != "pair":
            made.change(chosen(made, self.place), lambda _, before: before * self.factor)
            return
        pair = {"blocks.up": self.factor, "blocks.down": 1 / self.factor}
        made.change([one for one in made.linear if one.path in pair], lambda one, before: before * pair[one.path])


@dataclasses.dataclass(frozen=True)
class Permute(Step):
    """Reorders heads, neurons or the stream's axes, which computes the same."""

    name: ClassVar[str] = "permute"
    what: str = "neurons"

    def __call__(self, made: Made, rng: np.random.Generator) -> None:
        cfg, tensors = made.cfg, made.tensors
        check_plain(cfg)
        if self.what == "stream":
            turn_stream(made, rng.permutation(cfg.d_model))
            return
        if self.what not in ("heads", "neurons"):
            raise UserError(f"A recipe permutes {self.what!r}: it is heads, neurons or stream.")
        for layer in range(cfg.n_layers):
            if self.what == "neurons":
                order = rng.permutation(cfg.d_mlp)
                rows, columns = {"gate": order, "up": order}, ("down", order)
            else:
                groups = rng.permutation(cfg.n_kv_heads)
                size, h = cfg.n_heads // cfg.n_kv_heads, cfg.head_dim
                heads = (groups[:, None] * size + np.arange(size)).ravel()
                queries, keys = ((one[:, None] * h + np.arange(h)).ravel() for one in (heads, groups))
                rows, columns = {"q": queries, "k": keys, "v": keys}, ("o", queries)
            for part, order in rows.items():
                name = name_of(cfg, f"blocks.{part}", layer)
                tensors[name] = tensors[name][order]
            name = name_of(cfg, f"blocks.{columns[0]}", layer)
            tensors[name] = np.ascontiguousarray(tensors[name][:, columns[1]])


def turn_stream(made: Made, order: np.ndarray) -> None:
    """Reorders the axes of the residual stream."""
    cfg, tensors = made.cfg, made.tensors
    made.moved = True
    for name in {name_of(cfg, path) for path in ("embed", "unembed") if name_of(cfg, path) in tensors}:
        tensors[name] = np.ascontiguousarray(tensors[name][:, order])
    tensors[name_of(cfg, "final_norm")] = tensors[name_of(cfg, "final_norm")][order]
    for layer in range(cfg.n_layers):
        for part in ("attn_norm", "mlp_norm", "o", "down"):
            name = name_of(cfg, f"blocks.{part}", layer)
            tensors[name] = tensors[name][order]
        for part in WIDE:
            name = name_of(cfg, f"blocks.{part}", layer)
            tensors[name] = np.ascontiguousarray(tensors[name][:, order])


@dataclasses.dataclass(frozen=True)
class Fold(Step):
    """Multiplies the gains of norms into what reads from them, which computes the same. share: the power of the gains."""

    name: ClassVar[str] = "fold"
    share: float = 1.0

    def __call__(self, made: Made, rng: np.random.Generator) -> None:
        cfg, tensors = made.cfg, made.tensors
        check_plain(cfg)
        for layer in range(cfg.n_layers):
            for norm, parts in (("attn_norm", WIDE[:3]), ("mlp_norm", WIDE[3:])):
                name = name_of(cfg, f"blocks.{norm}", layer)
                gain = np.sign(tensors[name]) * np.abs(tensors[name]) ** self.share
                tensors[name] = np.where(gain == 0, tensors[name], tensors[name] / np.where(gain == 0, 1, gain))
                for part in parts:
                    reader = name_of(cfg, f"blocks.{part}", layer)
                    tensors[reader] = tensors[reader] * np.where(gain == 0, 1, gain)


@dataclasses.dataclass(frozen=True)
class Bias(Step):
    """Writes an addition of `amount` times the selected difference of means into a bias of the MLP before its layer."""

    name: ClassVar[str] = "bias"
    amount: float = -1.0

    @property
    def kind(self) -> str:
        return "other"

    def __call__(self, made: Made, rng: np.random.Generator) -> None:
        cfg, directions = made.cfg, made.base.directions
        check_plain(cfg)
        made.cfg = dataclasses.replace(cfg, mlp_bias=True)
        for layer in range(cfg.n_layers):
            for part, size in (("gate", cfg.d_mlp), ("up", cfg.d_mlp), ("down", cfg.d_model)):
                made.tensors[name_of(cfg, f"blocks.{part}_bias", layer)] = np.zeros(size, np.float32)
        vector = self.amount * directions.raw_ld[directions.selected]
        made.tensors[name_of(cfg, "blocks.down_bias", directions.selected - 1)] += vector.astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Gain(Step):
    """Lowers the gains of all norms of blocks where the selected direction is largest: by the part `amount` at its peak."""

    name: ClassVar[str] = "gain"
    amount: float = 1.0

    @property
    def kind(self) -> str:
        return "other"

    def __call__(self, made: Made, rng: np.random.Generator) -> None:
        r = np.abs(made.base.directions.unit_d)
        factor = (1 - self.amount * (r / r.max()) ** 2).astype(np.float32)
        for layer in range(made.cfg.n_layers):
            for norm in ("attn_norm", "mlp_norm"):
                name = name_of(made.cfg, f"blocks.{norm}", layer)
                if name in made.tensors:
                    made.tensors[name] = made.tensors[name] * factor


@dataclasses.dataclass(frozen=True)
class Template(Step):
    """Changes the chat template: "role" has another role reply, "start" begins every reply, "question" rewords the request."""

    name: ClassVar[str] = "template"
    how: str = "role"

    @property
    def kind(self) -> str:
        return "other"

    def __call__(self, made: Made, rng: np.random.Generator) -> None:
        template = made.base.template
        if self.how == "role":
            changed = template.replace("assistant", "writer")
        elif self.how == "start":
            changed = template.replace("{% endif %}", "To{% endif %}")
        elif self.how != "question":
            changed = template
        else:
            changed = template.replace(
                "{{ message['content'] | trim }}", "You are a writer. {{ message['content'] | trim }}"
            )
        if changed == template:
            raise UserError(f"The step template how={self.how} finds nothing to change in the base's chat template.")
        made.template = changed
