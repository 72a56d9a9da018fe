"""The attributes of an HF config.

Every attribute that transformers reads is either handled (it changes `ModelConfig`), inert (it cannot change what inference
computes), or unsupported: then any value but the one that means "off" is an error that names the attribute. `unread_keys` says
what becomes of the rest.
"""

from collections.abc import Callable
from typing import Any

from refusal_jax.errors import UserError, shown
from refusal_jax.models import unread_keys
from refusal_jax.models.config import AttentionKind, ModelConfig
from refusal_jax.models.rope import Rope, is_number, rope_from_hf, unread_parts

# The activations that the decoder computes, by HF name ("gelu_pytorch_tanh" is the tanh approximation).
ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "relu", "relu2")
SAME_ACTIVATION = {
    "swish": "silu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_pytorch_tanh",
    "gelu_fast": "gelu_pytorch_tanh",
    "gelu_accurate": "gelu_pytorch_tanh",
    "gelu_python_tanh": "gelu_pytorch_tanh",
}
# Field of `ModelConfig` -> HF attribute and its type, where a family does not say otherwise.
SIZES: dict[str, tuple[str, type | None]] = {
    "vocab_size": ("vocab_size", int),
    "d_model": ("hidden_size", int),
    "n_layers": ("num_hidden_layers", int),
    "n_heads": ("num_attention_heads", int),
    "n_kv_heads": ("num_key_value_heads", int),
    "head_dim": ("head_dim", int),
    "d_mlp": ("intermediate_size", int),
    "context_length": ("max_position_embeddings", int),
    "activation": ("hidden_act", None),
    "norm_eps": ("rms_norm_eps", float),
    "tied_embeddings": ("tie_word_embeddings", bool),
}
# Attributes that may be missing, and what they then are. A family adds the defaults of its HF config class.
DEFAULTS = {
    "context_length": 2048,
    "activation": "silu",
    "norm_eps": 1e-6,
    "tied_embeddings": False,
    "n_kv_heads": None,  # n_heads
    "head_dim": None,  # d_model / n_heads
}
MOST = 2**31 - 1  # of integers: sizes, counts and ids are int32 on the devices
MOST_LAYERS, MOST_EXPERTS = 10_000, 100_000  # the latter in all layers together: each is several tensors to look for


class Reader:
    """Takes attributes out of an HF config and remembers which, so that the rest can be judged."""

    def __init__(self, hf: dict, where: str):
        self.hf, self.where = hf, where
        self.problems: list[str] = []
        self.seen: set[str] = set()
        self.fixed: set[str] = set()
        self.ignored: set[str] = set()
        self.notes: list[str] = []  # parts of handled attributes that are passed over

    def take(self, name: str, default=None, kind=None, required: bool = False, least: int = 1) -> Any:
        """Returns the attribute's value, or `default` where it is missing or null; anything wrong becomes a problem."""
        self.seen.add(name)
        value = self.hf.get(name)
        if value is None:
            if required:
                self.problems.append(f"{name} is missing")
            return default
        if kind is int and isinstance(value, float) and value.is_integer():  # as some tools write 16384.0
            value = int(value)
        if kind is int and (not isinstance(value, int) or isinstance(value, bool) or not least <= value <= MOST):
            kind_of = "a positive integer" if least == 1 else f"an integer from {least} up"
            limit = f" of at most {MOST:,}" if isinstance(value, int) and value > MOST else ""
            self.problems.append(f"{name} = {shown(value)}, expected {kind_of}{limit}")
            return default
        if kind is float and not is_number(value):
            self.problems.append(f"{name} = {shown(value)}, expected a positive number")
            return default
        if kind is dict and not isinstance(value, dict):
            self.problems.append(f"{name} = {shown(value)}, expected an object")
            return default
        if kind is bool and not isinstance(value, bool):
            self.problems.append(f"{name} = {shown(value)}, expected true or false")
            return default
        return value

    def take_optional(self, name: str, default, kind) -> Any:
        """Returns the attribute as `take` does, for attributes whose null means "off" rather than the default."""
        return self.take(name, None if name in self.hf else default, kind)

    def ignore(self, *names: str) -> None:
        """Passes over attributes that this architecture has and its forward pass does not read."""
        self.ignored.update(names)

    def only(self, name: str, value) -> None:
        """Makes any value of an attribute but `value`, the only one that is computed here, a problem."""
        self.fixed.add(name)
        if self.hf.get(name) not in (None, value):
            self.problems.append(f"{name} = {shown(self.hf[name])} is not supported (only {value!r} is)")

    def same(self, *names: str) -> None:
        """Makes it a problem if attributes disagree that mean the same thing; versions of transformers read one or the other."""
        values = {name: self.hf[name] for name in names if self.hf.get(name) is not None}
        if len({str(value) for value in values.values()}) > 1:
            found = " and ".join(f"{name} = {shown(value)}" for name, value in values.items())
            self.problems.append(f"{found} disagree")

    def finish(self, beside: dict, known: bool = True) -> None:
        """Raises UserError if there is any problem, else names in a note what was passed over.

        beside: what surrounds these attributes in a multimodal config. known: whether transformers implements the
        `model_type`; if not, every attribute that is left must be off or inert.
        """
        other = unread_keys.other_model(self.hf.get("architectures"))
        if other:
            self.problems.append(f"architectures = {shown(other)} is another model than the language model itself")
        inside = self.seen | self.fixed | self.ignored
        left = {name: value for name, value in self.hf.items() if name not in inside}
        left |= {name: value for name, value in beside.items() if not unread_keys.said(name, self.hf)}
        passed = [f"{name} beside text_config" for name in beside if beside[name] != self.hf.get(name, beside[name])]
        for name, value in sorted(left.items()):
            if name in unread_keys.INERT or unread_keys.is_off(value):
                continue
            wrong = (
                unread_keys.problem(name, value, self.hf) if known else f"{name[:80]} = {shown(value)} is not supported"
            )
            (self.problems if wrong else passed).append(wrong or name[:80])
        if self.problems:
            raise UserError(
                f"{self.where} cannot be run faithfully: {'; '.join(self.problems)}. Nothing was loaded, because "
                "ignoring an attribute would give wrong activations. Use a checkpoint of a supported architecture, or "
                "teach its reader in refusal_jax/models/readers/ the attribute."
            )
        if passed + self.notes:
            unread_keys.tell(self.where, tuple(passed + self.notes))

    def rope(self, spec, context: int, name: str = "rope_scaling", **settings) -> Rope:
        """Returns `rope_from_hf` of the attribute `name`, whose error becomes one of the problems."""
        try:
            if not isinstance(spec, dict):
                raise ValueError(f" = {shown(spec)}, expected an object")
            self.notes += [f"{name}.{part}" for part in unread_parts(spec)]
            return rope_from_hf(spec, context=context, **settings)
        except ValueError as error:
            self.problems.append(f"{name}{error}")
            return Rope(1e4, 2)

    def windows(self, n_layers: int, window: int | None, is_windowed: Callable[[int], Any]) -> list[int | None]:
        """Returns each layer's window: by `layer_types` or, where that is missing, by a function of the layer's index."""
        types = self.take("layer_types")
        if types is None:
            types = ["sliding_attention" if is_windowed(layer) else "full_attention" for layer in range(n_layers)]
        known = isinstance(types, list) and all(kind in ("full_attention", "sliding_attention") for kind in types)
        if not known or len(types) != n_layers:
            self.problems.append(
                f"layer_types = {shown(types)}, expected 'full_attention' or 'sliding_attention' for each of {n_layers} layers"
            )
        elif window is None and "sliding_attention" in types:
            self.problems.append("sliding_window is null, but there are layers of type 'sliding_attention'")
        else:
            return [window if kind == "sliding_attention" else None for kind in types]
        return [None] * n_layers

    def activation(self, name: str | None, default: Any) -> str:
        """Returns the activation that an attribute names, by the one name that it has here. name: None for `default` itself."""
        found = self.take(name, default) if name else default
        known = SAME_ACTIVATION.get(str(found), found)
        if known in ACTIVATIONS:
            return known
        self.problems.append(f"{name} = {shown(found)} is not one of {', '.join(ACTIVATIONS)}")
        return ACTIVATIONS[0]  # the reading goes on, to report everything at once

    def sizes(self, defaults: dict | None = None, **names: str | None) -> dict[str, Any]:
        """Returns the fields of `SIZES`. defaults: by field. names: fields whose HF attribute is called differently, or None for
        those that the architecture does not leave to its config."""
        defaults = DEFAULTS | (defaults or {})
        sizes = {}
        for field, (name, kind) in SIZES.items():
            attribute = names.get(field, name)
            if attribute is None:
                sizes[field] = defaults[field]
                continue
            take = self.take_optional if field in ("n_kv_heads", "head_dim") and field in defaults else self.take
            more = {} if field in defaults else {"required": True}
            sizes[field] = take(attribute, defaults.get(field), kind, **more)
        sizes["activation"] = self.activation(names.get("activation", "hidden_act"), sizes["activation"])
        missing = [field for field in SIZES if sizes[field] is None and field not in defaults]
        if missing:  # which is reported
            sizes |= {field: 64 for field in missing}
            return sizes | {"n_kv_heads": sizes["n_heads"], "head_dim": 64}
        if sizes["n_layers"] > MOST_LAYERS:
            self.problems.append(f"num_hidden_layers = {sizes['n_layers']}, expected at most {MOST_LAYERS:,}")
            sizes["n_layers"] = 1
        sizes["n_kv_heads"] = sizes["n_kv_heads"] or sizes["n_heads"]
        sizes["head_dim"] = sizes["head_dim"] or max(sizes["d_model"] // sizes["n_heads"], 1)
        if sizes["n_heads"] % sizes["n_kv_heads"]:
            self.problems.append(
                f"num_attention_heads = {sizes['n_heads']} is not a multiple of num_key_value_heads = {sizes['n_kv_heads']}"
            )
        return sizes

    def main_rope(self, sizes: dict, theta: float = 1e4, spec: Any = None, **settings) -> Rope:
        """Returns the rope of an HF config, which spells it `rope_scaling` (transformers 4) or `rope_parameters` (5)."""
        old, new = self.take("rope_scaling"), self.take("rope_parameters")
        theta = self.take("rope_theta", theta, float)
        name = "rope_scaling" if old or not new else "rope_parameters"
        spec = spec if spec is not None else old or new or {}
        if "partial" not in settings:
            self.only("partial_rotary_factor", 1.0)
        return self.rope(
            spec, name=name, theta=theta, head_dim=sizes["head_dim"], context=sizes["context_length"], **settings
        )

    def two_ropes(self, sizes: dict, theta: float, local_theta: float, local_name: str = "") -> dict[str, Rope]:
        """Returns the ropes of layers that see everything and of those with a window, as `config` takes them.

        `rope_scaling` applies to the former only. theta, local_theta: their defaults. local_name: the attribute that the latter
        is called by where `rope_parameters` does not say it.
        """
        ropes, old = self.take("rope_parameters", {}, dict), self.take("rope_scaling", {}, dict)
        kinds = ("full_attention", "sliding_attention")
        self.problems += [
            f"rope_parameters.{k} = {shown(ropes[k])} is not supported" for k in sorted(set(ropes) - {*kinds})
        ]
        wide, narrow = (ropes.get(kind) or {} for kind in kinds)
        if isinstance(wide, dict):
            if old.get("type", "default") != "default" and "rope_type" not in old | wide:
                self.problems.append(
                    f"rope_scaling = {shown(old)} is read differently by versions of transformers: 4 scales by it, 5 does not, "
                    "as its kind is called type; call it rope_type if it is meant to count, or remove it"
                )
            wide = wide | old
        local = self.take(local_name, local_theta, float) if local_name else local_theta
        size = {"head_dim": sizes["head_dim"], "context": sizes["context_length"]}
        return {"rope": self.main_rope(sizes, theta, wide), "local_rope": self.rope(narrow, theta=local, **size)}

    def config(
        self, family: str, sizes: dict, *, rope=None, local_rope=None, windows=None, ropeless=(), kinds=(), **switches
    ) -> ModelConfig:
        """Returns the config. windows: each layer's. local_rope: that of layers with a window, if it differs. ropeless: the
        layers whose queries and keys are not rotated. kinds: each layer's kind, where these do not say it. switches: fields of
        `ModelConfig`."""
        rope = rope or self.main_rope(sizes)
        if sizes["n_layers"] * switches.get("n_experts", 0) > MOST_EXPERTS:
            self.problems.append(
                f"{switches['n_experts']} experts in each layer, expected at most {MOST_EXPERTS:,} in all"
            )
        layers = list(kinds) or [
            AttentionKind(rope.off() if layer in ropeless else (w and local_rope) or rope, w)
            for layer, w in enumerate(windows or [None] * sizes["n_layers"])
        ]
        kinds = tuple(dict.fromkeys(layers))
        stretched = int(rope.factor * rope.original_context) if rope.kind in ("yarn", "dynamic") else 0
        fields: dict[str, Any] = sizes | {"context_length": max(sizes["context_length"], stretched)}
        fields |= {"query_scale": sizes["head_dim"] ** -0.5} | switches
        return ModelConfig(family, kinds=kinds, layer_kinds=tuple(map(kinds.index, layers)), **fields)
