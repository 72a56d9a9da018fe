"""Interventions on the residual stream, as data.

An `Edits` is a pytree that enters the jitted forward as an argument. Each of its rows describes what happens to one
row of the batch, so that baseline, ablation, addition and every candidate direction run together through one
compiled program. Axis letters are those of `axes.py`; R is 1 or the batch's B, and L is 1 where all layers are alike.

The sites are where the paper edits: a block's input (`resid_pre`), and what attention and MLP add to the residual
(`attn_out`, `mlp_out`). The embedding output is the input of block 0.
"""

import dataclasses
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from refusal_jax.axes import Array, EitherLeaf

SITES = ("resid_pre", "attn_out", "mlp_out")
EPS = 1e-8  # of r / (|r| + EPS): a zero direction stays zero instead of becoming 0 / 0
INDEPENDENT = 1e-6  # the least singular value of unit directions that are linearly independent


def orthonormal(rows_rjd: np.ndarray) -> np.ndarray:
    """Returns orthonormal bases, float64 `[R, J, D]`, of the spans of J directions each: from singular vectors of the unit
    directions, with zeros in place of what a dependent or zero direction would add."""
    norms = np.linalg.norm(rows_rjd, axis=-1, keepdims=True)
    units = np.divide(rows_rjd, norms, out=np.zeros_like(rows_rjd), where=norms > 0)
    _, sizes_rj, basis_rjd = np.linalg.svd(units, full_matrices=False)
    return basis_rjd * (sizes_rj > INDEPENDENT)[..., None]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Edits:
    """One intervention a row: ablate the span of directions at gated layers and sites, then add a vector at some layers.

    ablate_rjd: float32 `[R, J, D]`, orthonormal directions, zero for none; x <- x - sum over j of (x . d_j) d_j.
    gate_rls: float32 `[R, 1 or L, S]`, 1 where the row is ablated; values between scale the projection that is removed.
    add_rd: float32 `[R, D]`, added to every token's residual at the input of each block of `layer_ra`.
    layer_ra: int32 `[R, A]`, the layers of the addition, -1 for none.
    layer_ablate_rljd: None, or float32 `[R, L, J, D]`, directions of each layer, which then stand in place of `ablate_rjd`.
    token_gate_rlst: None, or float32 `[R, L, S, T]`, by which the gates are multiplied at each token.

    The last two are what adversarial training draws; where they are None, they are no part of the compiled program.
    """

    ablate_rjd: EitherLeaf
    gate_rls: EitherLeaf
    add_rd: EitherLeaf
    layer_ra: EitherLeaf
    layer_ablate_rljd: EitherLeaf | None = None
    token_gate_rlst: EitherLeaf | None = None

    @classmethod
    def none(cls, d_model: int, rows: int = 1) -> "Edits":
        """Returns `rows` rows that change nothing."""
        zero = np.zeros((rows, d_model), np.float32)
        gate = np.zeros((rows, 1, len(SITES)), np.float32)
        return cls(zero[:, None], gate, zero, np.full((rows, 1), -1, np.int32))

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
        """Returns directional ablation (paper, section 2.4): it removes `direction` at every layer, site and token.

        direction: `[D]`, of any norm, and zero for no edit; `[R, D]`, one direction a row; or `[R, J, D]`, which removes
        the whole span of J directions in each row. layers: restricts it, and then needs `n_layers`, the model's number of
        layers. Raises ValueError for directions that are not finite or of another rank, an unknown site or a layer out of
        range.
        """
        rows = _rows(direction, 3)
        if rows.ndim == 3 and rows.shape[1] > 1:
            basis_rjd = orthonormal(rows)
        else:
            rows = rows.reshape(len(rows), 1, -1)
            basis_rjd = rows / (np.linalg.norm(rows, axis=-1, keepdims=True) + EPS)
        unknown = sorted(set(sites) - set(SITES))
        if unknown:
            raise ValueError(f"unknown sites {unknown}; the sites are {SITES}")
        gate = np.zeros((1, 1 if layers is None else _known(n_layers), len(SITES)), np.float32)
        where = range(1) if layers is None else [_in_range(layer, n_layers) for layer in layers]
        for layer in where:
            gate[0, layer, [SITES.index(site) for site in sites]] = scale
        return dataclasses.replace(
            cls.none(rows.shape[-1], len(rows)),
            ablate_rjd=basis_rjd.astype(np.float32),
            gate_rls=np.repeat(gate, len(rows), axis=0),
        )

    @classmethod
    def add(cls, direction, layer: int | Sequence[int], scale: float = 1.0) -> "Edits":
        """Returns activation addition (paper, section 2.4): it adds `scale` x `direction` (its raw norm), `[D]` or `[R, D]`,
        to every token at the input of block `layer`, or of each of several blocks.

        Raises ValueError for a direction that is not finite or of another rank, and for a negative layer.
        """
        rows = np.atleast_2d(_rows(direction, 2))
        layers = [_in_range(one, None) for one in np.atleast_1d(layer).tolist()]
        return dataclasses.replace(
            cls.none(rows.shape[1], len(rows)),
            add_rd=(scale * rows).astype(np.float32),
            layer_ra=np.tile(np.array(layers or [-1], np.int32), (len(rows), 1)),
        )

    @classmethod
    def affine(cls, direction, target, layer: int, n_layers: int) -> "Edits":
        """Returns affine editing (arXiv 2411.09003): at the input of block `layer`, of `n_layers`, it gives every token the
        coordinate `target` along the unit direction, whatever it was: x <- x - (x . d) d + target d.

        direction: `[D]` or `[R, D]`, of any norm. target: in the residual stream's units, a number or one for each row, `[R]`.
        Raises ValueError for a direction or target that is not finite, for a zero direction and for a layer out of range.
        """
        rows, target_r = np.atleast_2d(_rows(direction, 2)), np.atleast_1d(np.asarray(target, np.float64))
        norms = np.linalg.norm(rows, axis=-1, keepdims=True)
        if not (norms > 0).all() or not np.isfinite(target_r).all():
            raise ValueError("an affine edit needs a direction that is not zero and a target that is a finite number")
        without = cls.ablate(rows, layers=[layer], n_layers=n_layers, sites=SITES[:1])
        return without.adding(cls.add(target_r[:, None] * rows / norms, layer))

    @classmethod
    def concat(cls, parts: Sequence["Edits"]) -> "Edits":
        """Returns the rows of all `parts`, in order, padded to the same number of directions, layers and additions.

        Raises ValueError for edits that have directions of each layer or gates of each token.
        """
        if any(p.layer_ablate_rljd is not None or p.token_gate_rlst is not None for p in parts):
            raise ValueError("edits with directions of each layer or gates of each token cannot be joined with others")
        n_layers = max(p.gate_rls.shape[1] for p in parts)
        directions = max(p.ablate_rjd.shape[1] for p in parts)
        additions = max(p.layer_ra.shape[1] for p in parts)

        def padded(array_rn, size: int, value=0):
            more = [(0, 0)] * np.ndim(array_rn)
            more[1] = 0, size - array_rn.shape[1]
            return np.pad(array_rn, more, constant_values=value)

        return cls(
            np.concatenate([padded(p.ablate_rjd, directions) for p in parts]),
            np.concatenate([np.broadcast_to(p.gate_rls, (p.rows, n_layers, len(SITES))) for p in parts]),
            np.concatenate([p.add_rd for p in parts]),
            np.concatenate([padded(p.layer_ra, additions, -1) for p in parts]),
        )

    def adding(self, addition: "Edits") -> "Edits":
        """Returns rows that ablate as these do and add as the rows of `addition` do."""
        return dataclasses.replace(self, add_rd=addition.add_rd, layer_ra=addition.layer_ra)

    @property
    def rows(self) -> int:
        """Returns the number of rows, R."""
        return self.layer_ra.shape[0]

    @property
    def in_force_r(self) -> np.ndarray:
        """Returns whether each row edits anything, bool `[R]`."""
        return (np.asarray(self.layer_ra) >= 0).any(axis=1) | (np.asarray(self.gate_rls) != 0).any(axis=(1, 2))

    def take(self, rows) -> "Edits":
        """Returns the rows of the given indices, repeats allowed."""
        rows = np.asarray(rows)
        return jax.tree.map(lambda a: np.asarray(a)[rows], self)

    def for_batch(self, batch: int, n_layers: int, d_model: int) -> "Edits":
        """Returns the normal form that jitted programs take: R = batch and L = n_layers, float32.

        Raises ValueError if the rows are neither 1 nor `batch`, or if width or layers do not fit the model.
        """
        if self.add_rd.shape[1] != d_model:
            raise ValueError(
                f"the edit's direction has {self.add_rd.shape[1]} entries, the model's residual "
                f"stream has {d_model}: it belongs to another model"
            )
        if self.rows not in (1, batch):
            raise ValueError(f"the edit has {self.rows} rows, the batch has {batch}: pass one row, or one for each")
        if self.gate_rls.shape[1] not in (1, n_layers):
            raise ValueError(f"the edit has gates for {self.gate_rls.shape[1]} layers, the model has {n_layers}")
        if np.max(self.layer_ra) >= n_layers:
            raise ValueError(
                f"the edit adds at layer {np.max(self.layer_ra)}, the model's layers are 0 to {n_layers - 1}"
            )
        return Edits(
            np.broadcast_to(self.ablate_rjd, (batch, *self.ablate_rjd.shape[1:])).astype(np.float32),
            np.broadcast_to(self.gate_rls, (batch, n_layers, len(SITES))).astype(np.float32),
            np.broadcast_to(self.add_rd, (batch, d_model)).astype(np.float32),
            np.broadcast_to(self.layer_ra, (batch, *self.layer_ra.shape[1:])).astype(np.int32),
            *(
                None if more is None else np.broadcast_to(more, (batch, n_layers, *more.shape[2:])).astype(np.float32)
                for more in (self.layer_ablate_rljd, self.token_gate_rlst)
            ),
        )

    def at_layer(self, layer: int) -> "Edits":
        """Returns what happens at one layer, for a model of that layer alone."""
        gate_rls = self.gate_rls if self.gate_rls.shape[1] == 1 else self.gate_rls[:, layer : layer + 1]
        layer_ra = np.where(np.asarray(self.layer_ra) == layer, 0, -1).astype(np.int32)
        more = {
            name: None if part is None else part[:, layer : layer + 1]
            for name, part in (("layer_ablate_rljd", self.layer_ablate_rljd), ("token_gate_rlst", self.token_gate_rlst))
        }
        return dataclasses.replace(self, gate_rls=gate_rls, layer_ra=layer_ra, **more)

    def layer_gates(self, n_layers: int) -> tuple[Float[jax.Array, "L R S *T"], Float[jax.Array, "L R"]]:
        """Returns what a scan over layers takes: the gates of ablation, and those of addition."""
        gate_lrs = jnp.swapaxes(jnp.broadcast_to(self.gate_rls, (self.rows, n_layers, len(SITES))), 0, 1)
        at_lr = (self.layer_ra[None] == jnp.arange(n_layers)[:, None, None]).any(axis=-1)
        if self.token_gate_rlst is not None:
            gate_lrs = gate_lrs[..., None] * jnp.swapaxes(self.token_gate_rlst, 0, 1)
        return gate_lrs, at_lr.astype(jnp.float32)

    def layer_directions(self) -> Float[jax.Array, "L R J D"] | None:
        """Returns the directions of each layer for a scan over layers, or None where all layers have the same."""
        return None if self.layer_ablate_rljd is None else jnp.swapaxes(self.layer_ablate_rljd, 0, 1)

    def with_directions(self, ablate_rjd: Float[Array, "R J D"] | None) -> "Edits":
        """Returns what one layer does that has these directions; None is what all layers have."""
        return self if ablate_rjd is None else dataclasses.replace(self, ablate_rjd=ablate_rjd)

    def ablated(
        self, x_btd: Float[Array, "B T D"], gate_r: Float[Array, " R"] | Float[Array, "R _"]
    ) -> Float[Array, "B T D"]:
        """Returns `x_btd` less its gated projection on the span of each row's directions; float32 inside, the dtype of x
        outside. gate_r: of each row, or of each token of each row.

        Raises ValueError for gates of other tokens than those of `x_btd`.
        """
        x = x_btd.astype(jnp.float32)
        if gate_r.ndim == 2:
            if gate_r.shape != x.shape[:2]:
                raise ValueError(
                    f"the edit has gates for rows and tokens {gate_r.shape}, the batch has {x.shape[:2]}: gates of each token "
                    "belong to one batch of whole rows"
                )
            along_btj = gate_r[..., None] * jnp.einsum("btd,bjd->btj", x, self.ablate_rjd, precision="highest")
            return (x - jnp.einsum("btj,bjd->btd", along_btj, self.ablate_rjd, precision="highest")).astype(x_btd.dtype)
        gated_rjd = gate_r[:, None, None] * self.ablate_rjd  # not `along` later: that would be a step of its own
        if (
            gated_rjd.shape[1] == 1
        ):  # an elementwise product, which fuses with its neighbours, in place of a second matmul
            along_bt = jnp.einsum("btd,bd->bt", x, gated_rjd[:, 0], precision="highest")
            return (x - along_bt[..., None] * self.ablate_rjd).astype(x_btd.dtype)
        along_btj = jnp.einsum("btd,bjd->btj", x, gated_rjd, precision="highest")
        return (x - jnp.einsum("btj,bjd->btd", along_btj, self.ablate_rjd, precision="highest")).astype(x_btd.dtype)

    def added(self, x_btd: Float[Array, "B T D"], gate_r: Float[Array, " R"]) -> Float[Array, "B T D"]:
        """Returns `x_btd` plus each row's gated vector, at every token."""
        return (x_btd.astype(jnp.float32) + (gate_r[:, None] * self.add_rd)[:, None]).astype(x_btd.dtype)


def _rows(direction, most_axes: int) -> np.ndarray:
    """Returns the direction(s) as float64 `[R, D]` or, where three axes are allowed, `[R, J, D]`."""
    rows = np.asarray(direction, np.float64)
    if not 1 <= rows.ndim <= most_axes or rows.size == 0:
        shapes = ["[d_model]", "[rows, d_model]", "[rows, directions, d_model]"][:most_axes]
        raise ValueError(f"a direction must have shape {' or '.join(shapes)}, this one has {rows.shape}")
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
