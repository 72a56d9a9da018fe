"""Which edit takes a direction out of what each weight writes to the residual stream.

Every edit is of rank one: W <- W - left right^T W. Without a norm after W both are the unit direction r. With one, what
reaches the stream is s * norm(W x + b), s being the norm's scale, so r leaves it where r * s leaves W x + b:

- oblique: left = r / s, right = r * s. Before the norm's division this is ablation, so that the layer's output differs
  from the ablated one by that scalar only, one for each token.
- projected: left = right = r * s, made unit. Removes r as exactly, but moves the output in other directions too; stable
  where s has entries near zero, which r / s would blow up.
"""

import dataclasses
from collections import Counter

import numpy as np

from refusal_jax.edits import EPS
from refusal_jax.errors import UserError
from refusal_jax.models.config import ModelConfig
from refusal_jax.models.families import TABLES, WRITER_BIASES, WRITERS, pieces
from refusal_jax.models.load import TensorFiles

# The norm between a writer and the stream, in families that have one, by the site that the writer serves.
POST_NORMS = {"attn_out": "blocks.attn_post_norm", "mlp_out": "blocks.mlp_post_norm"}

# The largest |r / s| |r * s| of an oblique edit. It is the operator norm of I - left right^T: of an output whose cosine
# with r * s is c, the edit changes no more than 10 c times its length. So a layer with c = 0.1, which is a lot for one that
# is not about r, at most doubles before the norm divides by its length, and what it writes else is at least halved, not
# more. Scales that vary as a log-normal of standard deviation 1 come to e^2 = 7.4; beyond 10 a few entries rule.
MOST_AMPLIFICATION = 10.0


@dataclasses.dataclass(frozen=True, eq=False)
class RankOne:
    """The edit of one tensor. path: the decoder's, which tells the axis that lives in the stream. left_d, right_d: float64
    `[D]`. kind: "orthogonal", "oblique" or "projected"."""

    path: str
    left_d: np.ndarray
    right_d: np.ndarray
    kind: str

    @property
    def by_rows(self) -> bool:
        """Whether the stream is the tensor's last axis (embedding, biases), and else its last but one."""
        return self.path == "embed" or self.path in WRITER_BIASES

    @property
    def amplification(self) -> float:
        """The operator norm of I - left right^T: 1 for orthogonal projections."""
        return float(np.linalg.norm(self.left_d) * np.linalg.norm(self.right_d))

    def __call__(self, tensor: np.ndarray) -> np.ndarray:
        """The edited tensor, float32 in and out; axes before those of the matrix (layers, experts) may lead."""
        left, right = self.left_d.astype(np.float32), self.right_d.astype(np.float32)
        rows = tensor if self.by_rows else np.swapaxes(tensor, -1, -2)
        edited = rows - (rows @ right)[..., None] * left
        return edited if self.by_rows else np.swapaxes(edited, -1, -2)


def unit_direction(direction, d_model: int) -> np.ndarray:
    """`direction` `[D]`, of any norm, as a unit vector, float64.

    Raises UserError if it is zero, not finite, not a vector or of another width than the residual stream.
    """
    direction = np.asarray(direction, np.float64)
    if direction.ndim != 1 or not np.isfinite(direction).all() or not np.linalg.norm(direction) > 0:
        raise UserError(
            f"The direction (shape {list(direction.shape)}) must be a vector of finite numbers that is not zero. "
            "Export the direction of a finished study."
        )
    if direction.size != d_model:
        raise UserError(
            f"The direction has {direction.size} entries, the model's residual stream has {d_model}: it belongs to "
            "another model. Export with the model that the study ran on."
        )
    return direction / (np.linalg.norm(direction) + EPS)


def rank_one(path: str, unit_d: np.ndarray, scale_d: np.ndarray | None = None) -> RankOne | None:
    """The edit that takes `unit_d` out of what the weight `path` writes. scale_d: float64 `[D]`, what a norm after it
    multiplies by (None: there is no norm). None where the norm lets nothing of the direction through."""
    if scale_d is None:
        return RankOne(path, unit_d, unit_d, "orthogonal")
    seen_d = unit_d * scale_d
    if not seen_d.any():
        return None
    with np.errstate(divide="ignore", over="ignore"):
        left_d = np.divide(unit_d, scale_d, where=unit_d != 0, out=np.zeros_like(unit_d))
    oblique = RankOne(path, left_d, seen_d, "oblique")
    if oblique.amplification <= MOST_AMPLIFICATION:
        return oblique
    seen_d /= np.linalg.norm(seen_d)
    return RankOne(path, seen_d, seen_d, "projected")


def writer_edits(cfg: ModelConfig, files: TensorFiles, unit_d: np.ndarray) -> dict[str, RankOne]:
    """HF name -> edit, for every tensor of a checkpoint that writes to the residual stream (paper, section 4.1): embedding,
    attention output, MLP output of each expert, and their biases.

    Raises ValueError for a family whose table fuses such a tensor with another, which nothing here could edit.
    """
    edits, all_pieces = {}, pieces(cfg)
    uses = Counter(piece.name for piece in all_pieces)
    for piece in all_pieces:
        site = (WRITERS | WRITER_BIASES).get(piece.path)
        if site is None:
            continue
        if uses[piece.name] > 1:
            raise ValueError(f"{piece.name} holds {piece.path} fused with other weights; teach `RankOne` its rows")
        scale_d = None
        if cfg.post_norm and site in POST_NORMS:
            norm = TABLES[cfg.family][POST_NORMS[site]].format(l=piece.index[0])
            scale_d = cfg.norm_offset + files.read(norm).astype(np.float64)
        edit = rank_one(piece.path, unit_d, scale_d)
        if edit is not None:
            edits[piece.name] = edit
    return edits
