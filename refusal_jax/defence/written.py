"""Writes a defended model: as a Hugging Face checkpoint or as a PEFT adapter, with its card and where it comes from."""

import dataclasses
import pathlib
import shutil
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

import refusal_jax
from refusal_jax import distributed
from refusal_jax.chat.messages import Prompt, as_messages
from refusal_jax.chat.model import ChatModel
from refusal_jax.checkpoints.rewrite import Checkpoint
from refusal_jax.defence.recipe import Recipe
from refusal_jax.errors import UserError, field
from refusal_jax.export.card import licence_files, write_sections
from refusal_jax.export.changed import changed_plan, write_low_rank
from refusal_jax.export.finished import FinishedStudy
from refusal_jax.export.provenance import base_model, write_provenance
from refusal_jax.export.run import Request, export
from refusal_jax.export.staging import UNVERIFIED, staged
from refusal_jax.export.tensor_edits import Edit
from refusal_jax.models.sharding import replicate
from refusal_jax.training.changes import low_rank_changes, whole_changes
from refusal_jax.training.trainer import Trained

MODEL, ADAPTER = "model", "adapter"  # folders of the results, beside that of a steering
FORMS = {MODEL: "hf", ADAPTER: "lora"}
CHECKED = 4  # held-out prompts of each side on which the result is compared with what was trained
USE = {
    MODEL: "`transformers` loads this folder as it loads the base model.",
    ADAPTER: "An adapter for `peft`: `PeftModel.from_pretrained(base, folder)`.",
}
SAFETY = """This model was trained to keep refusing where its refusals are attacked. No defence is known to hold against everyone
who has the weights: `refusal-jax resist` measures what this one holds against. What it writes was not reviewed."""


@dataclasses.dataclass(frozen=True)
class Origin:
    """Holds what a result's card and record say of where it comes from. name: of the base model on the hub, "" for what its
    folder tells. template: settings of the chat template, as `Chat.load` takes them. command: that makes the result again."""

    recipe: Recipe
    source: pathlib.Path
    command: str = ""
    name: str = ""
    template: dict[str, Any] = dataclasses.field(default_factory=dict)


def outputs_of(output: str, method: str) -> list[str]:
    """Returns the folders that the setting `output` asks for. Raises UserError for an adapter of fully trained weights."""
    if output != MODEL and method == "full":
        raise UserError(
            f"{field('output')} = {output}: an adapter holds low-rank factors, and {field('train.method')} = full trains all "
            f"weights. Write a model, or train with {field('train.method')} = lora."
        )
    return [MODEL, ADAPTER] if output == "both" else [output]


def write_trained(origin: Origin, trained: Trained, target: pathlib.Path, kind: str) -> None:
    """Writes what was trained to a new folder, which appears once it is whole, with the marker UNVERIFIED, which `mark_verified`
    takes away once the files were read back. kind: MODEL or ADAPTER.

    All processes must call it; process 0 writes. Raises UserError for a disk that refuses, and for values that are not finite in
    the source's dtype.
    """
    checkpoint = Checkpoint.open(origin.source)
    cfg, rank, scale = checkpoint.cfg, trained.settings.rank, trained.settings.scale
    base = base_model(origin.source, origin.name)
    low = low_rank_changes(cfg, trained)
    changes = low or whole_changes(cfg, trained)
    plan = changed_plan(checkpoint, changes) if kind == MODEL else None
    if not distributed.first():
        return
    hashes: dict[str, str] = {}
    with staged(target, plan.size if plan else 0) as folder:
        if plan is not None:
            hashes = plan.write(folder).hashes
        else:
            write_low_rank(cfg, folder, low, base["name"], rank, scale)
            for path in licence_files(origin.source):
                shutil.copyfile(path, folder / path.name)
        write_sections(folder, origin.source, base, FORMS[kind], _sections(origin, base, trained, kind, len(changes)))
        record = {
            "format": FORMS[kind],
            "edit": {"kind": "defence", "recipe": origin.recipe.name, "method": trained.settings.method},
            "base": base,
            "tied": None,
            "verified": True,  # once the marker is gone
            "command": origin.command,
        }
        if checkpoint.quantisation is not None:
            record["dequantised"] = checkpoint.quantisation.note
        (folder / UNVERIFIED).write_text("The files have not been read back yet.\n", encoding="utf-8")
        write_provenance(folder, record, hashes)


def mark_verified(folder: pathlib.Path) -> None:
    """Takes the marker from a result that was read back and is what was trained."""
    if distributed.first():
        (folder / UNVERIFIED).unlink(missing_ok=True)


def is_exact(source: pathlib.Path) -> bool:
    """Returns whether a checkpoint's files hold all its weights in float32, as a result's then do."""
    checkpoint = Checkpoint.open(source)
    return checkpoint.quantisation is None and all(tensor.dtype == "F32" for tensor in checkpoint.tensors.values())


def _sections(origin: Origin, base: dict, trained: Trained, kind: str, tensors: int) -> list[str]:
    """Returns the sections of the card."""
    settings, recipe = trained.settings, origin.recipe
    what = f"low-rank factors of rank {settings.rank} beside" if settings.method == "lora" else "all of"
    source = f" ([arXiv:{recipe.source}](https://arxiv.org/abs/{recipe.source}))" if recipe.source else ""
    revision = f", revision `{base['revision']}`" if base["revision"] else ""
    return [
        f"# {base['name']}, defended by {recipe.name}",
        f"{recipe.about.rstrip('.')}{source}. The training changed {tensors} tensors, by {what} the base's weights, in "
        f"{settings.steps} steps.",
        USE[kind],
        "## Safety\n\n" + SAFETY,
        "## Measured\n\n`defence.json`, beside this folder, has what was measured before and after.",
        f"## Where it comes from\n\nBase model: {base['name']}{revision} (fingerprint `{base['fingerprint'][:16]}…`). Made by "
        f"refusal_jax {refusal_jax.__version__}:\n\n```\n{origin.command}\n```",
    ]


def write_edited(
    origin: Origin, edit: Edit, prompts: dict[str, tuple[Prompt, ...]], target: pathlib.Path, kind: str
) -> dict[str, Any]:
    """Writes a model whose weights were edited, verified as every export, and returns the verification. kind: MODEL or ADAPTER.

    prompts: by side, some of which verify the files; of conversations their last message does. Raises UserError as `export` does.
    """
    texts = {side: [as_messages(p)[-1]["content"] for p in held[: 4 * CHECKED]] for side, held in prompts.items()}
    study = dataclasses.replace(
        FinishedStudy.none(CHECKED),
        prompts=[*texts["harmful"], *texts["harmless"]],
        harmless=[(text, "") for text in texts["harmless"]],
        template=origin.template,
    )
    found = {}
    if distributed.first():
        request = Request(origin.source, target, edit, study, FORMS[kind], base=origin.name, command=origin.command)
        found = export(request)["verification"] or {}
    return distributed.share_json(found)


def last_logits(model: ChatModel, prompts: dict[str, tuple[Prompt, ...]]) -> Float[np.ndarray, "n V"]:
    """Returns the logits after some of the held-out prompts, float32, whole in every process."""
    asked = [prompt for held in prompts.values() for prompt in held[:CHECKED]]
    batch = model.encode(asked)
    logits_bv = model.logits(batch.tokens, batch.mask)
    whole = jax.jit(lambda x: replicate(model.mesh, x))(logits_bv)
    return np.asarray(whole, np.float32)[:, : model.config.vocab_size]
