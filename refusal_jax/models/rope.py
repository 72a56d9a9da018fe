"""Rotary position embeddings: their bases, their rescalings for long contexts, and how HF configs spell them.

Each rescaling changes the angle per token of every rotated pair, and some also lengthen the rotated vectors. Two of
them, "dynamic" and "longrope", depend on how long the text is: as in transformers, on the longest row of the batch.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from refusal_jax.axes import Array
from refusal_jax.errors import shown

# Keys of an HF rope specification by kind, beyond those that every kind may have.
COMMON_KEYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
SPAN = "original_max_position_embeddings"
GROWTH = "llama_4_scaling_beta"
KEYS = {
    "default": set(),
    "linear": {"factor"},
    "proportional": {"factor"},
    "dynamic": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", SPAN},
    "yarn": {"factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate", SPAN},
    "longrope": {"factor", "attention_factor", "short_factor", "long_factor", SPAN},
}
# Keys of a specification that its kind does not read: those of other kinds, and what is known to change nothing in transformers.
# (vLLM multiplies by `attn_factor`. The sections of "mrope" are for images; text has the same position in all of them.)
UNREAD = set().union(*KEYS.values()) | {"finetuned", "attn_factor", "max_position_embeddings"}
UNREAD |= {"mrope_section", "mrope_interleaved"}
MOST_CONTEXT = 1 << 40  # tokens; beyond any model, within what numbers hold
RENAMED = {"su": "longrope"}
NONE = "none"  # the kind of a rope that turns nothing, which no HF config spells
FLOATS = (1e-37, 1e37)  # what float32 holds


def is_number(value) -> bool:
    """Returns whether a JSON value is a positive number that float32 holds."""
    return isinstance(value, int | float) and not isinstance(value, bool) and FLOATS[0] <= value <= FLOATS[1]


@dataclasses.dataclass(frozen=True)
class Rope:
    """One rotary embedding.

    theta: the base. dims: how many leading entries of a head are rotated, in pairs. kind: a key of `KEYS`, or NONE.
    original_context: tokens of the context before rescaling. attention_factor: scales cosines and sines.
    interleaved: pairs are neighbours (2i, 2i + 1) instead of (i, i + dims / 2). query_growth: by how much queries grow with the
    logarithm of how many original contexts are before them, the first token being number `query_first`. The rest belongs to
    single kinds.
    """

    theta: float
    dims: int
    kind: str = "default"
    factor: float = 1.0
    original_context: int = 0
    attention_factor: float = 1.0
    interleaved: bool = False
    query_growth: float = 0.0
    query_first: int = 0
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 1.0
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0
    truncate: bool = True
    turned: int = 0  # proportional: how many of the pairs, the fastest, are rotated at all
    short_factors: tuple[float, ...] = ()  # longrope
    long_factors: tuple[float, ...] = ()

    def off(self) -> "Rope":
        """Returns the rope of layers without one, as wide as this one, so that both run through the same scanned body."""
        return Rope(self.theta, self.dims, NONE, interleaved=self.interleaved)

    def inverse_frequencies(self, length) -> Float[jax.Array, " n"]:
        """Returns radians per token of each rotated pair, float32 `[dims / 2]`; length: tokens of the longest row (traced)."""
        powers = np.arange(0, self.dims, 2) / self.dims
        plain = self.theta**-powers
        if self.kind == "dynamic":
            grown = self.factor * jnp.maximum(length, self.original_context) / self.original_context - self.factor + 1
            theta = self.theta * grown ** (self.dims / (self.dims - 2))
            return theta ** jnp.asarray(-powers, jnp.float32)
        if self.kind == "longrope":
            short, long = (
                jnp.asarray(plain / np.asarray(f), jnp.float32) for f in (self.short_factors, self.long_factors)
            )
            return jnp.where(length > self.original_context, long, short)
        scaled = {"default": plain, "linear": plain / self.factor, NONE: 0 * plain}
        scaled["proportional"] = np.where(np.arange(len(plain)) < self.turned, plain / self.factor, 0)
        if self.kind in ("llama3", "yarn"):
            keep = self._kept_by_wavelength(plain) if self.kind == "llama3" else self._kept_by_pair()
            scaled[self.kind] = keep * plain + (1 - keep) * plain / self.factor
        return jnp.asarray(scaled[self.kind], jnp.float32)

    def _kept_by_wavelength(self, plain: np.ndarray) -> np.ndarray:
        """Returns Llama 3.1's choice (section 3.3.2) for each pair, by its full turns in the old context: 0 slows it by
        `factor`, 1 keeps it."""
        turns = self.original_context * plain / (2 * math.pi)
        low, high = self.low_freq_factor, self.high_freq_factor
        return np.where(turns < low, 0.0, 1.0) if low == high else np.clip((turns - low) / (high - low), 0, 1)

    def _kept_by_pair(self) -> np.ndarray:
        """Returns YaRN's choice (arXiv:2309.00071, section 3.2) in the same form: linear in the pair's index between
        two numbers of turns."""

        def pair(turns):
            return self.dims * math.log(self.original_context / (turns * 2 * math.pi)) / (2 * math.log(self.theta))

        low, high = pair(self.beta_fast), pair(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.dims - 1)
        return 1 - np.clip((np.arange(self.dims // 2) - low) / (high - low or 0.001), 0, 1)

    def tables(self, positions_bt: Int[Array, "B T"]) -> tuple[Float[jax.Array, "B T n"], Float[jax.Array, "B T n"]]:
        """Returns cosines and sines of the tokens' angles."""
        inverse = self.inverse_frequencies(jnp.max(positions_bt) + 1)
        angles = positions_bt[..., None].astype(jnp.float32) * inverse
        return jnp.cos(angles) * self.attention_factor, jnp.sin(angles) * self.attention_factor

    def query_scales(self, positions_bt: Int[Array, "B T"]) -> Float[jax.Array, "B T"] | None:
        """Returns what multiplies the queries of tokens at these positions, None for nothing."""
        if not self.query_growth:
            return None
        whole = (positions_bt + self.query_first) // self.original_context
        return 1 + self.query_growth * jnp.log1p(whole.astype(jnp.float32))


def rotate(
    x_btnh: Float[jax.Array, "B T N H"],
    cos_btr: Float[jax.Array, "B T n"],
    sin_btr: Float[jax.Array, "B T n"],
    interleaved: bool,
) -> Float[jax.Array, "B T N H"]:
    """Returns `x` with as many leading entries rotated as the tables have pairs; float32 inside, the dtype of x outside."""
    dims = 2 * cos_btr.shape[-1]
    x, rest = x_btnh[..., :dims].astype(jnp.float32), x_btnh[..., dims:]
    a, b = (x[..., 0::2], x[..., 1::2]) if interleaved else (x[..., : dims // 2], x[..., dims // 2 :])
    cos, sin = cos_btr[:, :, None], sin_btr[:, :, None]
    pair = a * cos - b * sin, b * cos + a * sin
    turned = jnp.stack(pair, -1).reshape(x.shape) if interleaved else jnp.concatenate(pair, -1)
    return jnp.concatenate([turned.astype(x_btnh.dtype), rest], -1)


def _kind(spec: dict) -> str:
    kind = spec.get("rope_type") or spec.get("type") or "default"
    kind = RENAMED.get(kind, kind) if isinstance(kind, str) else kind
    if not isinstance(kind, str) or kind not in KEYS:
        raise ValueError(f" type {shown(kind)} is not supported ({', '.join(KEYS)} are)")
    return kind


def unread_parts(spec: dict) -> list[str]:
    """Returns the keys of an HF rope specification that its kind does not read; raises ValueError for an unknown kind."""
    return sorted(k for k in UNREAD - COMMON_KEYS - KEYS[_kind(spec)] if spec.get(k) is not None)


def rope_from_hf(
    spec: dict, *, theta: float, head_dim: int, context: int, partial: float | None = None, **settings
) -> Rope:
    """Returns the `Rope` of an HF rope specification (a `rope_scaling` or `rope_parameters` object, possibly empty).

    theta, partial: defaults where the specification has none; partial None: the architecture rotates whole heads.
    context: max_position_embeddings. settings: further fields of `Rope`. Raises ValueError with what is wrong, to
    follow "rope_scaling" in a message.
    """
    kind = _kind(spec)
    unknown = sorted(k for k in set(spec) - COMMON_KEYS - KEYS[kind] - UNREAD if spec[k] is not None)
    if unknown:
        found = "." + ", ".join(f"{k} = {shown(spec[k])}" for k in unknown)
        raise ValueError(f"{found} is not supported with type {kind!r}")

    def number(name: str, default: float | int | None = None) -> float:
        value = spec.get(name)
        value = default if value is None else value
        if value is None or not is_number(value):
            raise ValueError(
                f" of type {kind!r} lacks or misstates {name} = {shown(value)} (must be a positive number)"
            )
        return float(value)

    share = number("partial_rotary_factor", partial or 1.0)
    spread = kind == "proportional"  # over the whole head, of which the rest stays as it is
    if partial is None and share != 1 and not spread:
        raise ValueError(f".partial_rotary_factor = {share} is not supported by this architecture")
    dims = 2 * int(share * head_dim // 2) if spread else int(head_dim * share)
    if dims % 2 or (spread and head_dim % 2) or not 0 < dims <= head_dim or (kind == "dynamic" and dims == 2):
        raise ValueError(f" rotates {dims} of head_dim = {head_dim} entries, rotary embeddings need pairs")
    theta = number("rope_theta", theta)
    if theta <= 1:
        raise ValueError(f" of type {kind!r} has rope_theta = {theta}, expected more than 1")
    if spread:
        return Rope(theta, head_dim, kind, number("factor", 1.0), turned=dims // 2, **settings)
    rope = Rope(theta, dims, kind, original_context=context, **settings)
    if kind == "default":
        return dataclasses.replace(rope, original_context=0)
    span = number(SPAN, context) if SPAN in KEYS[kind] else context
    if span < 2:
        raise ValueError(f" of type {kind!r} has {SPAN} = {span}, expected a number of tokens")
    stretch = number("factor", context / span if kind in ("yarn", "longrope") else None)
    if stretch * span > MOST_CONTEXT:
        raise ValueError(
            f" of type {kind!r} stretches {span} tokens {stretch} times, expected fewer than {MOST_CONTEXT}"
        )
    rope = dataclasses.replace(rope, factor=stretch, original_context=int(span))
    return _FINISH.get(kind, lambda rope, *_: rope)(rope, spec, number)


def _llama3(rope: Rope, spec: dict, number) -> Rope:
    low, high = number("low_freq_factor"), number("high_freq_factor")
    if low > high:
        raise ValueError(f" of type 'llama3' has low_freq_factor = {low} (must not be over high_freq_factor = {high})")
    return dataclasses.replace(rope, low_freq_factor=low, high_freq_factor=high)


def growth(factor: float, weight: float) -> float:
    """Returns what YaRN multiplies vectors with where it stretches the context `factor` times; weight: how much of it."""
    return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0


def _yarn(rope: Rope, spec: dict, number) -> Rope:
    attention = growth(rope.factor, 1.0)
    if spec.get("mscale") and spec.get("mscale_all_dim"):
        attention = growth(rope.factor, number("mscale")) / growth(rope.factor, number("mscale_all_dim"))
    return dataclasses.replace(
        rope,
        attention_factor=number("attention_factor", attention),
        beta_fast=number("beta_fast", 32.0),
        beta_slow=number("beta_slow", 1.0),
        truncate=spec.get("truncate") is not False,
    )


def _longrope(rope: Rope, spec: dict, number) -> Rope:
    factors = []
    for name in ("short_factor", "long_factor"):
        values = spec.get(name)
        if not isinstance(values, list) or len(values) != rope.dims // 2 or not all(map(is_number, values)):
            raise ValueError(
                f" of type 'longrope' lacks or misstates {name} (must be {rope.dims // 2} positive numbers)"
            )
        factors.append(tuple(map(float, values)))
    grown = 1 + math.log(rope.factor) / math.log(rope.original_context) if rope.factor > 1 else 1.0
    attention = number("attention_factor", math.sqrt(grown))
    return dataclasses.replace(rope, attention_factor=attention, short_factors=factors[0], long_factors=factors[1])


_FINISH = {"llama3": _llama3, "yarn": _yarn, "longrope": _longrope}
