"""Verifies that an export computes what the study measured: the written files, run by our own decoder, are compared
with the edit at inference time on the original. All models pass through the layers together, so that one block of one
of them is in memory at a time. Those that need none of the written files run while these are written."""

import dataclasses
import pathlib
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import jax.numpy as jnp
import numpy as np

from refusal_jax.chat.loss_rows import LossRow, chat_rows, text_rows
from refusal_jax.chat.padding import bucket
from refusal_jax.chat.prompts import Chat
from refusal_jax.checkpoints.lora import ADAPTER
from refusal_jax.checkpoints.rewrite import Checkpoint
from refusal_jax.conditions import Ablate, Inject
from refusal_jax.errors import UserError
from refusal_jax.export.forward import EditedWeights, Readings, Stream, Weights, read_logits, run_streams
from refusal_jax.export.gguf import CONTROL_VECTOR, read_gguf
from refusal_jax.export.hf import TIED, Written
from refusal_jax.export.lora import AdaptedWeights
from refusal_jax.export.tensor_edits import Edit, projection, tensor_edits
from refusal_jax.models.families import TABLES, WRITER_BIASES, WRITERS, pieces
from refusal_jax.models.finite import check_finite
from refusal_jax.models.scores import kl_divergence
from refusal_jax.progress import Progress

# What a passing export stays under, by whether all that it edits is stored in float32; of logits, or this part of the
# largest of them where that is more.
MOST_LOGIT_DIFFERENCE, PART_OF_LOGIT, MOST_KL = 1e-3, 1e-4, 1e-3
MOST_PROJECTION = {True: 1e-4, False: 1e-2}
TEXT_TOKENS = 96  # of each harmless text that counts for the perplexity
NOISE = 1e-6  # nats; a divergence under this is none


@dataclasses.dataclass(frozen=True, eq=False)
class Sample:
    """Tokenised inputs that an export is checked on: chat prompts, and rows of harmless text for the perplexity."""

    chat: Chat
    prompts: list[list[int]]
    texts: list[LossRow]

    @classmethod
    def of(cls, chat: Chat, instructions: Sequence[str], harmless: Sequence[tuple[str, str]]) -> "Sample":
        """Tokenises the texts that an export is checked on.

        harmless: pairs of instruction and reply; without a reply the instruction itself is the text. Raises UserError
        for prompts that the model cannot read completely.
        """
        chat.encode(instructions)
        longest = min(TEXT_TOKENS, chat.context_length)
        texts = chat_rows(chat, [pair for pair in harmless if pair[1]], longest)
        texts += text_rows(chat, [text for text, reply in harmless if not reply], longest)
        texts = [row for row in texts if len(row.ids) > row.first]
        if not texts:
            raise UserError("No harmless text is left to measure the perplexity on: all of it is empty or cut off.")
        return cls(chat, [chat.prompt_ids(text) for text in instructions], texts)

    def batch(self):
        """Returns all rows, left-padded, prompts first."""
        rows = [*self.prompts, *(row.ids for row in self.texts)]
        return self.chat.pad(rows, min(bucket(max(map(len, rows))), self.chat.context_length))

    def places(self, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns the rows and columns to read logits at, the prompts' last tokens first, and the tokens that follow
        the others."""
        at = [(row, width - 1) for row in range(len(self.prompts))]
        targets = []
        for row, text in enumerate(self.texts, len(self.prompts)):
            for index in range(text.first, len(text.ids)):
                at.append((row, width - len(text.ids) + index - 1))
                targets.append(text.ids[index])
        rows, columns = np.array(at).T
        return rows, columns, np.array(targets)


class Beside(Progress):
    """The progress of work beside a thread's, which ends with the thread's error if that fails."""

    def __init__(self, other: Future, *args: Any):
        super().__init__(*args)
        self.other = other

    def update(self, count: int = 1, note: str = "") -> None:
        super().update(count, note)
        if self.other.done():
            self.other.result()


def run_beside(writing: Future, streams: list[Stream], sample: Sample, edit: Edit) -> None:
    """Runs models of `originals` while files are written. Raises the error of the writing, once it has failed."""
    with Beside(writing, "running the original", streams[0].weights.cfg.n_layers, "layer") as bar:
        run_streams(streams, sample.batch(), edit.direction.basis_jd, bar)


def verify(
    checkpoint: Checkpoint,
    folder: pathlib.Path,
    edit: Edit,
    written: Written,
    sample: Sample,
    before: dict[str, Stream] | None = None,
) -> dict:
    """Measures how far the export in `folder` is from `edit` at inference time on `checkpoint`, in float32.

    The models are the export; the original, for scale; the reference, which is the original under the edit (of an injection, with
    its weights edited as they are read); and, where
    norms follow the edited weights, orthogonalised, which is W - r r^T W regardless of the norms. before: those of them that
    have been run, of `originals`. Each gets
    max_logit_difference and mean_logit_difference from the reference (absolute) and mean_kl (nats), both at the
    prompts' last tokens; ce_loss and perplexity of the harmless texts; and projection, `{site: [of each layer]}`, the
    largest |x . r| / |x| over all tokens. tied: what each choice costs, in bytes and against the reference. problems:
    why the export fails, if it does. Raises UserError for an export that does not load, and for an original whose
    values, with or without the edit, are not finite.
    """
    streams = (before or originals(checkpoint, edit)) | exported(checkpoint, folder, edit, written)
    batch = sample.batch()
    with Progress("verifying", checkpoint.cfg.n_layers, "layer") as bar:
        due = [stream for stream in streams.values() if stream.residuals is None]
        run_streams(due, batch, edit.direction.basis_jd, bar)
    rows, columns, targets = sample.places(batch.tokens.shape[1])
    base = read_logits(streams["reference"], rows, columns, len(sample.prompts), targets)
    found = {}
    for name, stream in streams.items():
        readings = base if name == "reference" else read_logits(stream, rows, columns, len(sample.prompts), targets)
        if name in ("original", "reference"):
            finite = [np.isfinite(readings.logits_pv).all(), np.isfinite(readings.nll_n).all()]
            check_finite(finite, "float32", f"The {name} cannot be compared with", name == "reference")
        found[name] = differences(base, readings) | {"projection": stream.projection()}
    result: dict[str, Any] = {"prompts": len(sample.prompts), "texts": len(sample.texts), "text_tokens": len(targets)}
    result |= {name: numbers for name, numbers in found.items() if name not in TIED}
    if written.tied:
        embedding = checkpoint.tensors[TABLES[checkpoint.cfg.family]["embed"]].size
        added = {"untie": 0 if folder_holds_unembedding(checkpoint) or is_adapter(folder) else embedding}
        costs = {name: found["export" if name == written.tied else name] for name in TIED}
        result["tied"] = {
            name: {"added_bytes": added.get(name, 0)} | {k: v for k, v in cost.items() if k != "projection"}
            for name, cost in costs.items()
        }
    largest = float(np.abs(base.logits_pv).max())
    result["problems"] = problems(checkpoint, edit, written, result, largest)
    return result


def folder_holds_unembedding(checkpoint: Checkpoint) -> bool:
    """Returns whether a tied checkpoint nevertheless stores an unembedding."""
    return TABLES[checkpoint.cfg.family]["unembed"] in checkpoint.tensors


def is_adapter(folder: pathlib.Path) -> bool:
    return (folder / ADAPTER).exists()


def originals(checkpoint: Checkpoint, edit: Edit) -> dict[str, Stream]:
    """Returns the models to compare with the export, by name, which need none of its files."""
    cfg = checkpoint.cfg
    if isinstance(edit, Inject):  # there is no such edit at inference time
        reference = Stream(EditedWeights(checkpoint, tensor_edits(checkpoint, edit)), unembed=checkpoint)
    else:
        reference = Stream(checkpoint, edit.edits(cfg))
    streams = {"original": Stream(checkpoint), "reference": reference}
    if isinstance(edit, Ablate) and cfg.post_norm:
        plain = EditedWeights(checkpoint, plain_edits(checkpoint, edit))
        streams["orthogonalised"] = Stream(plain, unembed=checkpoint)
    return streams


def exported(checkpoint: Checkpoint, folder: pathlib.Path, edit: Edit, written: Written) -> dict[str, Stream]:
    """Returns the export, and by the names in TIED the choices that were not made."""
    cfg, weights, streams = checkpoint.cfg, checkpoint, {}
    if (folder / CONTROL_VECTOR).exists():
        streams["export"] = Stream(checkpoint, read_gguf(folder / CONTROL_VECTOR))
    elif is_adapter(folder):
        weights = AdaptedWeights.open(checkpoint, folder)
        streams["export"] = Stream(weights, unembed=checkpoint)
    else:
        weights = Checkpoint.open(folder)
        streams["export"] = Stream(weights)
    if isinstance(edit, Ablate) and written.tied:
        embed = TABLES[cfg.family]["embed"]
        edited: Weights = EditedWeights(checkpoint, {embed: tensor_edits(checkpoint, edit)[embed]})
        ends = {"untie": (edited, checkpoint), "keep": (edited, edited), "skip": (checkpoint, checkpoint)}
        streams |= {
            name: Stream(weights, embed=ends[name][0], unembed=ends[name][1]) for name in TIED if name != written.tied
        }
    return streams


def plain_edits(checkpoint: Checkpoint, edit: Ablate) -> dict:
    """Returns the edits W - scale r r^T W, regardless of the norms that follow, where `edit` asks for an edit."""
    found = {}
    for piece in pieces(checkpoint.cfg):
        site = (WRITERS | WRITER_BIASES).get(piece.path)
        if site and edit.reaches(piece.layer or 0, site):
            basis_jd, turned = edit.direction.basis_jd, piece.transposed
            found[piece.name] = projection(piece.path, basis_jd, scale=edit.scale, transposed=turned)
    return found


def differences(base: Readings, other: Readings) -> dict[str, float]:
    """Compares last-token logits, and measures the loss of `other` on the harmless texts."""
    gap = np.abs(base.logits_pv.astype(np.float64) - other.logits_pv)
    loss = float(np.mean(other.nll_n))
    return {
        "max_logit_difference": float(gap.max()),
        "mean_logit_difference": float(gap.mean()),
        "mean_kl": float(
            np.mean(np.asarray(kl_divergence(jnp.asarray(base.logits_pv), jnp.asarray(other.logits_pv)), np.float64))
        ),
        "ce_loss": loss,
        "perplexity": float(np.exp(min(loss, 700.0))),
    }


def problems(checkpoint: Checkpoint, edit: Edit, written: Written, result: dict, largest_logit: float) -> list[str]:
    """Returns the reasons why an export is not what was asked for; empty if there are none.

    Where weights can express what the edit computes, logits must agree. Behind a norm they cannot; there the export
    must be nearer to the edit than the original is. With --tied=keep or skip, logits differ by choice. In all cases,
    whatever is to be removed completely must be gone.
    """
    export, found = result["export"], []
    exact = all(checkpoint.tensors[name].dtype == "F32" for name in written.edits if name in checkpoint.tensors)

    def at_most(what: str, value: float, limit: float) -> None:
        if not value <= limit:  # NaN fails
            found.append(f"{what} is {value:.2e}, over {limit:.0e}")

    chosen = written.tied in ("keep", "skip")
    if not isinstance(edit, Ablate) or not (checkpoint.cfg.post_norm or chosen):
        if exact:
            limit = max(MOST_LOGIT_DIFFERENCE, PART_OF_LOGIT * largest_logit)
            at_most("the largest difference of a logit", export["max_logit_difference"], limit)
        at_most("the mean KL divergence", export["mean_kl"], MOST_KL)
    elif not chosen:
        at_most("the mean KL divergence", export["mean_kl"], max(result["original"]["mean_kl"], NOISE))
    if isinstance(edit, Ablate) and edit.scale == 1:
        for site, layers in export["projection"].items():
            if site in ("resid_pre", "resid_post"):
                checked = range(len(layers)) if edit.everywhere(checkpoint.cfg) and written.tied != "skip" else ()
            else:
                checked = [layer for layer in range(len(layers)) if edit.reaches(layer, site)]
            worst = max(checked, key=lambda layer: np.nan_to_num(layers[layer], nan=np.inf), default=None)
            if worst is not None:
                name = f"what is left along the direction at {site} of layer {worst}, as a part of the whole,"
                at_most(name, layers[worst], MOST_PROJECTION[exact])
    return found
