"""Finds the edit of each tensor of a checkpoint, so that what it writes to the residual stream loses a subspace, or gains a
vector.

Ablation: W <- W - left right^T W, of rank J, the number of directions. Without a norm after W both are the orthonormal
directions U. With one, what reaches the stream is s * norm(W x + b), s being the norm's scale, so the directions leave it
where U * s leaves W x + b:

- oblique: left = U / s, right = U * s. Before the norm's division this is ablation, so that the layer's output differs
  from the ablated one by that scalar only, one for each token.
- projected: left = right = U * s, made orthonormal. Removes the directions as exactly, but moves the output in others too;
  stable where s has entries near zero, which U / s would blow up.

Addition: bias <- bias + vector, at the MLP output of the block before.

Injection: W <- W + scale r m^T, m being the mean of W's rows. m is 1/D 1^T W, so this has the form above: left = r, and right =
1/D in every entry, with the sign turned. What a norm after W makes of it is left as it is, as in the paper.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Float32, Float64

from refusal_jax.checkpoints.rewrite import Blocks, Checkpoint
from refusal_jax.conditions import EMBED, Ablate, Add, Inject
from refusal_jax.errors import UserError, setting
from refusal_jax.models.config import ModelConfig
from refusal_jax.models.families import TABLES, WRITER_BIASES, WRITERS, norms_after, pieces
from refusal_jax.models.weights import weight_table

Edit = Ablate | Add | Inject  # what exports write
WEIGHT_SITES = (EMBED, "attn_out", "mlp_out")  # that weights write to

# The largest |left right^T| of an oblique edit: it is the operator norm of I - left right^T, so of an output whose cosine
# with r * s is c, the edit changes no more than 10 c times its length. So a layer with c = 0.1, which is a lot for one that
# is not about r, at most doubles before the norm divides by its length, and what it writes else is at least halved, not
# more. Scales that vary as a log-normal of standard deviation 1 come to e^2 = 7.4; beyond 10 a few entries rule.
MOST_AMPLIFICATION = 10.0


NO_WEIGHTS = (
    "An affine edit sets a coordinate at the input of one block and leaves it as it was for the blocks before, which read what "
    "the same weights have written. So no weights and biases hold it exactly. Export an ablation, or edit at inference time "
    "with refusal_jax.Edits.affine."
)


def check_edit(cfg: ModelConfig, edit: Edit) -> None:
    """Raises UserError for a direction of another width, a scale of zero, sites that no weight writes to, layers out of range, an
    addition or injection of several directions, and an addition whose layer nothing tells."""
    edit.direction.check_width(cfg.d_model)
    if not np.isfinite(edit.scale) or edit.scale == 0:
        raise UserError(f"{setting('scale', edit.scale)} leaves nothing to do: give a number that is not zero.")
    sites = edit.sites if isinstance(edit, Ablate) and not edit.everywhere(cfg) else WEIGHT_SITES
    if not sites or set(sites) - set(WEIGHT_SITES):
        raise UserError(
            f"{setting('sites', ','.join(sites) or 'nothing')}: what weights write is {', '.join(WEIGHT_SITES)}. A block's "
            "input is what all writers before it wrote, so edit those."
        )
    if not isinstance(edit, Inject):
        edit.edits(cfg)
        return
    edit.at(cfg)
    if len(edit.direction.raw_jd) > 1 or not set(edit.sites) or set(edit.sites) - set(Inject.sites):
        raise UserError(
            f"An injection makes matrices of layers write one direction, at {', '.join(Inject.sites)}; these are "
            f"{len(edit.direction.raw_jd)} directions, at {', '.join(edit.sites) or 'no sites'}. Name one direction, and choose "
            f"{setting('sites')} among those."
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Projection:
    """W <- W - scale left right^T W. left_dj, right_dj: float64 `[D, J]`. by_rows: whether the stream is the tensor's last
    axis (embedding, biases), and else its last but one. kind: "orthogonal", "oblique" or "projected"."""

    left_dj: np.ndarray
    right_dj: np.ndarray
    by_rows: bool
    kind: str
    scale: float = 1.0

    @property
    def amplification(self) -> float:
        """Returns the operator norm of I - left right^T: 1 for orthogonal projections."""
        return float(np.linalg.norm(np.linalg.qr(self.left_dj)[1] @ np.linalg.qr(self.right_dj)[1].T, 2))

    @property
    def factors(self) -> tuple[Float32[np.ndarray, "D J"], Float32[np.ndarray, "D J"]]:
        """Returns the two factors of what is subtracted: left times the scale, and right."""
        return (self.scale * self.left_dj).astype(np.float32), self.right_dj.astype(np.float32)

    def along(self, blocks: Blocks) -> Float32[np.ndarray, "J _"]:
        """Returns right^T W of a matrix `[D, …]` that is given in blocks of rows, each with its first row."""
        right = self.factors[1]
        total = sum(
            np.einsum("dj,df->jf", right[at : at + len(block)], block).astype(np.float64) for at, block in blocks
        )
        return np.asarray(total, np.float32)

    def blocks(self, blocks: Callable[[], Blocks]) -> Blocks:
        """Edits in place, and yields, the blocks of rows of a tensor, float32. The function `blocks` gives them, and is called
        twice if the stream is not the tensor's last axis.

        This uses einsum, because J is small and BLAS would start threads of its own inside each of ours.
        """
        left, right = self.factors
        if self.by_rows:
            for start, block in blocks():
                block -= np.einsum("...j,dj->...d", np.einsum("...d,dj->...j", block, right), left)
                yield start, block
            return
        along = None
        for start, block in blocks():
            if block.ndim > 2:  # a tensor of all experts, each with a matrix of its own
                block -= np.einsum("dj,ejf->edf", left, np.einsum("dj,edf->ejf", right, block))
            else:
                along = self.along(blocks()) if along is None else along
                block -= np.einsum("dj,jf->df", left[start : start + len(block)], along)
            yield start, block

    def __call__(self, tensor: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
        """Returns the edited tensor; axes before those of the matrix (layers, experts) may lead."""
        left, right = self.factors
        rows = tensor if self.by_rows else np.swapaxes(tensor, -1, -2)
        edited = rows - (rows @ right) @ left.T
        return edited if self.by_rows else np.swapaxes(edited, -1, -2)


@dataclasses.dataclass(frozen=True, eq=False)
class Injection(Projection):
    """W <- W - scale left right^T W, where left and right make no projection: what is added may be of any size."""

    @property
    def amplification(self) -> float:
        """Returns the operator norm of I - scale left right^T, which acts in the plane of the two vectors."""
        basis_dj = np.linalg.qr(np.concatenate([self.left_dj, self.right_dj], axis=1))[0]
        left, right = basis_dj.T @ self.left_dj, basis_dj.T @ self.right_dj
        return float(np.linalg.norm(np.eye(len(left)) - self.scale * left @ right.T, 2))


@dataclasses.dataclass(frozen=True, eq=False)
class Addition:
    """bias <- bias + vector; vector_d: float64 `[D]`."""

    vector_d: np.ndarray
    by_rows = True
    kind = "addition"
    amplification = 1.0

    def blocks(self, blocks: Callable[[], Blocks]) -> Blocks:
        """Yields the edited blocks, as `Projection.blocks` does."""
        return ((start, self(block)) for start, block in blocks())

    def __call__(self, tensor: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
        """Returns the edited tensor."""
        return tensor + self.vector_d.astype(np.float32)


def projection(
    path: str,
    basis_jd: Float64[np.ndarray, "J D"],
    scale_d: Float64[np.ndarray, " D"] | None = None,
    scale: float = 1.0,
    transposed: bool = False,
) -> Projection | None:
    """Returns the edit that takes the orthonormal `basis_jd` out of what the weight `path` writes.

    scale_d: what a norm after it multiplies by (None: there is no norm). scale: which part of what is there is removed.
    transposed: whether its tensor is `[in, out]`. Returns None where the norm lets nothing of the directions through.
    """
    by_rows, basis_dj = transposed or path == "embed" or path in WRITER_BIASES, basis_jd.T
    if scale_d is None:
        return Projection(basis_dj, basis_dj, by_rows, "orthogonal", scale)
    seen_dj = basis_dj * scale_d[:, None]
    if not seen_dj.any():
        return None
    with np.errstate(divide="ignore", over="ignore"):
        left_dj = np.divide(basis_dj, scale_d[:, None], where=basis_dj != 0, out=np.zeros_like(basis_dj))
    if np.isfinite(left_dj).all():
        oblique = Projection(left_dj, seen_dj, by_rows, "oblique", scale)
        if oblique.amplification <= MOST_AMPLIFICATION:
            return oblique
    span_dj, sizes, _ = np.linalg.svd(seen_dj, full_matrices=False)
    span_dj = span_dj[:, sizes > 1e-12 * sizes[0]]
    return Projection(span_dj, span_dj, by_rows, "projected", scale)


def injection(edit: Inject, transposed: bool = False) -> Injection:
    """Returns the edit that makes a matrix write the direction as well. transposed: whether its tensor is `[in, out]`."""
    left_dj = edit.direction.basis_jd.T
    return Injection(left_dj, np.full_like(left_dj, 1 / len(left_dj)), transposed, edit.name, -edit.scale)


def tensor_edits(checkpoint: Checkpoint, edit: Ablate | Inject) -> dict[str, Projection]:
    """Returns the edit, by HF name, of every tensor that writes to the residual stream (paper, section 4.1) where `edit` asks for
    it: embedding, attention output, MLP output of each expert, and, for an ablation, their biases.

    Raises ValueError for a family whose table fuses such a tensor with another, which nothing here could edit.
    """
    cfg, edits = checkpoint.cfg, {}
    all_pieces = pieces(cfg)
    uses = Counter(name for name, _ in {(piece.name, piece.path) for piece in all_pieces})
    for piece in all_pieces:
        site = (WRITERS | WRITER_BIASES).get(piece.path)
        if site is None or not edit.reaches(piece.layer or 0, site):
            continue
        if uses[piece.name] > 1:
            raise ValueError(f"{piece.name} holds {piece.path} fused with other weights; teach `Projection` its rows")
        if isinstance(edit, Inject):
            if piece.path in WRITERS:
                edits[piece.name] = injection(edit, piece.transposed)
            continue
        scale_d = scale_after(checkpoint, piece.path, piece.layer)
        one = projection(piece.path, edit.direction.basis_jd, scale_d, edit.scale, piece.transposed)
        if one is not None:
            edits[piece.name] = one
    return edits


def scale_after(weights, path: str, layer: int | None) -> Float64[np.ndarray, " D"] | None:
    """Returns what the norms between a writer and the stream multiply by, None without one. weights: `forward.Weights`."""
    names = [TABLES[weights.cfg.family][norm].format(l=layer) for norm in norms_after(weights.cfg, path)]
    scales = [weights.cfg.norm_offset + weights.rows(name).astype(np.float64) for name in names]
    return np.prod(scales, axis=0) if scales else None


def wanted_edits(checkpoint: Checkpoint, edit: Ablate | Inject, tied: str | None) -> dict[str, Projection]:
    """Returns `tensor_edits` without that of an embedding that is to be left (tied="skip"). Raises UserError if none remain."""
    edits = tensor_edits(checkpoint, edit)
    if tied == "skip":
        edits.pop(TABLES[checkpoint.cfg.family]["embed"])
    if not edits:
        raise UserError(
            "Nothing is left to edit: at these sites no weight writes in these layers (the embedding belongs to layer 0, and "
            f"{setting('tied', 'skip')} leaves it). Name more of them."
        )
    return edits


# Families whose MLP may have biases, with the attribute of config.json that says so, for checkpoints that have none.
BIAS_SWITCHES = dict.fromkeys(("llama", "granite", "seed_oss", "cwm", "falcon_h1"), ("mlp_bias", True)) | {
    "qwen": ("no_bias", False)
}


def bias_additions(cfg: ModelConfig, edit: Add) -> dict[str, Addition]:
    """Returns the edits, by HF name, of the MLP biases that hold the addition `edit`: of block l - 1 for the input of block l.

    Raises UserError where the architecture or a block has no such bias, and for layer 0, which no block precedes.
    """
    bias = weight_table(cfg).get("blocks.down_bias")
    if bias is None and cfg.family not in BIAS_SWITCHES:
        raise UserError(
            f"The MLP of a {cfg.family} model has no bias, so an addition cannot be written into its weights. Use "
            f"{setting('format', 'gguf')}, a control vector for llama.cpp, or add at inference time with refusal_jax.Edits.add."
        )
    layers = edit.at(cfg)
    if 0 in layers:
        raise UserError(
            "No block comes before layer 0 whose bias could hold an addition at its input. Choose "
            f"{setting('layers')} from 1 to {cfg.n_layers - 1}."
        )
    without = [layer for layer in layers if bias and layer - 1 not in bias.layers]
    if bias and without:
        raise UserError(
            f"Block {without[0] - 1} has no MLP whose bias could hold an addition at the input of layer {without[0]}. Choose "
            f"{setting('layers')} among {', '.join(str(layer + 1) for layer in bias.layers)}, or add at inference time."
        )
    scale = cfg.residual_scale * cfg.mlp_scales[1]
    name, vector_d = TABLES[cfg.family]["blocks.down_bias"], edit.vector_d / scale
    return {name.format(l=layer - 1): Addition(vector_d) for layer in layers}
