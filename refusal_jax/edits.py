"""Interventions on the residual stream, as data.

An `Edits` is a pytree that enters the jitted forward as an argument. Each of its rows describes what happens to one
row of the batch, so that baseline, ablation, addition and every candidate direction run together through one
compiled program. Axis letters: R edit rows (1, or the batch's B), L layers (1 means "every layer"), S sites, D d_model.

The sites are where the paper edits: a block's input (`resid_pre`), and what attention and MLP add to the residual
(`attn_out`, `mlp_out`). The embedding output is the input of block 0.
"""

import dataclasses
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

SITES = ("resid_pre", "attn_out", "mlp_out")
EPS = 1e-8  # of r / (|r| + EPS): a zero direction stays zero instead of becoming 0 / 0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Edits:
    """One intervention a row: ablate a unit direction at gated layers and sites, then add a vector at one layer.

    ablate_rd: float32 [R, D], unit direction, or zero for none; x <- x - (x . d) d.
    gate_rls: float32 [R, 1 or L, S], 1 where the row is ablated; values between scale the projection removed.
    add_rd: float32 [R, D], added to every token's residual at the input of block `layer_r`.
    layer_r: int32 [R], or -1 for no addition.
    """

    ablate_rd: jax.Array | np.ndarray
    gate_rls: jax.Array | np.ndarray
    add_rd: jax.Array | np.ndarray
    layer_r: jax.Array | np.ndarray

    @classmethod
    def none(cls, d_model: int, rows: int = 1) -> "Edits":
        """`rows` rows that change nothing."""
        zero = np.zeros((rows, d_model), np.float32)
        return cls(zero, np.zeros((rows, 1, len(SITES)), np.float32), zero, np.full(rows, -1, np.int32))

    @classmethod
    def ablate(
        cls,
        direction,
        *,
        layers: Iterable[int] | None = None,
        n_layers: int | None = None,
        sites: Sequence[str] = SITES,
        scale: float = 1.0,
    ) -> "Edits":
        """Directional ablation (paper, section 2.4): removes `direction` `[D]` (any norm; zero: no edit) or `[R, D]`.

        By default at every layer, site and token. `layers` restricts it and then needs `n_layers`, the model's
        number of layers. Raises ValueError for a direction that is not finite or of another rank, an unknown site
        or a layer out of range.
        """
        rows = _rows(direction)
        unknown = sorted(set(sites) - set(SITES))
        if unknown:
            raise ValueError(f"unknown sites {unknown}; the sites are {SITES}")
        gate = np.zeros((1, 1 if layers is None else _known(n_layers), len(SITES)), np.float32)
        where = range(1) if layers is None else [_in_range(layer, n_layers) for layer in layers]
        for layer in where:
            gate[0, layer, [SITES.index(site) for site in sites]] = scale
        unit = rows / (np.linalg.norm(rows, axis=-1, keepdims=True) + EPS)
        return dataclasses.replace(
            cls.none(rows.shape[1], len(rows)),
            ablate_rd=unit.astype(np.float32),
            gate_rls=np.repeat(gate, len(rows), axis=0),
        )

    @classmethod
    def add(cls, direction, layer: int, scale: float = 1.0) -> "Edits":
        """Activation addition (paper, section 2.4): adds `scale` x `direction` (its raw norm), `[D]` or `[R, D]`, to
        every token at the input of block `layer`. Raises ValueError for a bad direction or a negative layer.
        """
        rows = _rows(direction)
        return dataclasses.replace(
            cls.none(rows.shape[1], len(rows)),
            add_rd=(scale * rows).astype(np.float32),
            layer_r=np.full(len(rows), _in_range(layer, None), np.int32),
        )

    @classmethod
    def concat(cls, parts: Sequence["Edits"]) -> "Edits":
        """The rows of all `parts`, in order."""
        n_layers = max(part.gate_rls.shape[1] for part in parts)
        gates = [np.broadcast_to(p.gate_rls, (p.rows, n_layers, len(SITES))) for p in parts]
        return cls(
            np.concatenate([p.ablate_rd for p in parts]),
            np.concatenate(gates),
            np.concatenate([p.add_rd for p in parts]),
            np.concatenate([p.layer_r for p in parts]),
        )

    @property
    def rows(self) -> int:
        return self.layer_r.shape[0]

    @property
    def in_force_r(self) -> np.ndarray:
        """Returns whether each row edits anything, bool `[R]`."""
        return (np.asarray(self.layer_r) >= 0) | (np.asarray(self.gate_rls) != 0).any(axis=(1, 2))

    def take(self, rows) -> "Edits":
        """The rows of the given indices, repeats allowed."""
        rows = np.asarray(rows)
        return jax.tree.map(lambda a: np.asarray(a)[rows], self)

    def for_batch(self, batch: int, n_layers: int, d_model: int) -> "Edits":
        """The normal form that jitted programs take: R = batch and L = n_layers, float32.

        Raises ValueError if the rows are neither 1 nor `batch`, or if width or layers do not fit the model.
        """
        if self.ablate_rd.shape[1] != d_model:
            raise ValueError(
                f"the edit's direction has {self.ablate_rd.shape[1]} entries, the model's residual "
                f"stream has {d_model}: it belongs to another model"
            )
        if self.rows not in (1, batch):
            raise ValueError(f"the edit has {self.rows} rows, the batch has {batch}: pass one row, or one for each")
        if self.gate_rls.shape[1] not in (1, n_layers):
            raise ValueError(f"the edit has gates for {self.gate_rls.shape[1]} layers, the model has {n_layers}")
        if np.max(self.layer_r) >= n_layers:
            raise ValueError(
                f"the edit adds at layer {np.max(self.layer_r)}, the model's layers are 0 to {n_layers - 1}"
            )
        return Edits(
            np.broadcast_to(self.ablate_rd, (batch, d_model)).astype(np.float32),
            np.broadcast_to(self.gate_rls, (batch, n_layers, len(SITES))).astype(np.float32),
            np.broadcast_to(self.add_rd, (batch, d_model)).astype(np.float32),
            np.broadcast_to(self.layer_r, (batch,)).astype(np.int32),
        )

    def layer_gates(self, n_layers: int) -> tuple[jax.Array, jax.Array]:
        """What a scan over layers takes: ablation gates `[L, R, S]` and addition gates `[L, R]`, float32."""
        gate_lrs = jnp.swapaxes(jnp.broadcast_to(self.gate_rls, (self.rows, n_layers, len(SITES))), 0, 1)
        return gate_lrs, (self.layer_r[None, :] == jnp.arange(n_layers)[:, None]).astype(jnp.float32)

    def ablated(self, x_btd: jax.Array, gate_r: jax.Array) -> jax.Array:
        """`x_btd` less its gated projection on each row's direction; float32 inside, the dtype of x outside."""
        x = x_btd.astype(jnp.float32)
        gated_rd = gate_r[:, None] * self.ablate_rd  # not `along_bt` later: that would be a step of its own
        along_bt = jnp.einsum("btd,bd->bt", x, gated_rd, precision="highest")
        return (x - along_bt[..., None] * self.ablate_rd[:, None]).astype(x_btd.dtype)

    def added(self, x_btd: jax.Array, gate_r: jax.Array) -> jax.Array:
        """`x_btd` plus each row's gated vector, at every token."""
        return (x_btd.astype(jnp.float32) + (gate_r[:, None] * self.add_rd)[:, None]).astype(x_btd.dtype)


def _rows(direction) -> np.ndarray:
    """The direction(s) as float64 `[R, D]`."""
    rows = np.asarray(direction, np.float64)
    if rows.ndim not in (1, 2) or rows.size == 0:
        raise ValueError(f"a direction must have shape [d_model] or [rows, d_model], this one has {rows.shape}")
    if not np.isfinite(rows).all():
        raise ValueError(f"the direction holds {int((~np.isfinite(rows)).sum())} values that are NaN or infinite")
    return np.atleast_2d(rows)


def _known(n_layers: int | None) -> int:
    if n_layers is None:
        raise ValueError("layers= needs n_layers=, the model's number of layers")
    return n_layers


def _in_range(layer: int, n_layers: int | None) -> int:
    if layer < 0 or (n_layers is not None and layer >= n_layers):
        raise ValueError(
            f"layer {layer} is out of range; layers count from 0"
            + (f" to {n_layers - 1}" if n_layers is not None else "")
        )
    return int(layer)
