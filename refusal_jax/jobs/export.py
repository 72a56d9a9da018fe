"""Writes a checkpoint whose weights no longer express a study's direction, for PyTorch and JAX users alike.

  refusal-jax export --direction=runs/mine --out=DIR             # the model and direction of a finished study
  refusal-jax export --model=DIR --direction=runs/mine --out=DIR
  refusal-jax export --direction=runs/mine --out=DIR --tied=keep

The direction is taken out of what every matrix writes to the residual stream (embedding, attention output, MLP output of
each expert). Where a norm follows the matrix (Gemma 2 and 3, OLMo 2, GLM-4) the edit allows for its scale. Where the
embedding is also the unembedding, --tied says what becomes of the latter: "untie" writes it as a tensor of its own, as it
was, which is what ablation at inference time computes and costs the bytes of one more embedding; "keep" lets the edit
change both; "skip" edits neither, and the direction stays in the embedding's part of the stream.

Tensors are streamed one by one, so the export needs the memory of the largest; untouched tensors and files are copied byte
for byte; `transformers` loads the result as it loads the original. The export ends with a measured comparison against
ablation at inference time, printed and written to OUT/export.json; for it the two models are loaded in float32, one after
the other.
"""

import dataclasses
import json
import pathlib
from collections import Counter

import numpy as np
from absl import flags
from safetensors import SafetensorError
from safetensors.numpy import load_file

from refusal_jax.chat import Chat
from refusal_jax.errors import UserError
from refusal_jax.export.hf import TIED, Export, export_hf
from refusal_jax.export.verify import compare
from refusal_jax.models.config import load_config
from refusal_jax.models.hf_attributes import read_json
from refusal_jax.runs import (
    MANIFEST,
    checkpoint_fingerprint,
    file_hash,
    read_manifest,
    to_json,
    write_atomically,
)
from refusal_jax.study.pipeline import DIRECTION, PROMPTS, SETUP

VAL = ("harmful_val", "harmless_val")
MODEL = flags.DEFINE_string("model", None, "HF checkpoint folder. Default: the model that the study ran on.")
STUDY = flags.DEFINE_string("direction", None, "Folder of a finished study.")
OUT = flags.DEFINE_string("out", None, "New folder for the edited checkpoint.")
TIE = flags.DEFINE_enum("tied", "untie", TIED, "What becomes of an unembedding that is the embedding.")
PROMPT_COUNT = flags.DEFINE_integer("prompts", 16, "Prompts of each side for the closing comparison.", lower_bound=1)


@dataclasses.dataclass(frozen=True)
class Study:
    """What an export needs of a finished study. model: the checkpoint that it ran on. prompts: instructions for the
    comparison. config: its settings."""

    direction_d: np.ndarray
    prompts: list[str]
    model: pathlib.Path
    config: dict
    fingerprint: str | None

    @classmethod
    def read(cls, folder: pathlib.Path, prompts: int) -> "Study":
        """Raises UserError for a folder that is no finished study, or a damaged one."""
        for name in (DIRECTION, PROMPTS, SETUP, MANIFEST):
            if not (folder / name).is_file():
                raise UserError(
                    f"{folder} holds no {name}, so it is not a finished study. Run `refusal-jax study "
                    f"--workdir={folder}` first."
                )
        manifest = read_manifest(folder / MANIFEST)
        try:
            rows = json.loads((folder / PROMPTS).read_text(encoding="utf-8"))
            return cls(
                load_file(folder / DIRECTION)["direction"],
                [row["instruction"] for side in VAL for row in rows[side][:prompts]],
                pathlib.Path(read_json(folder / SETUP)["model"]),
                manifest["config"],
                manifest["inputs"].get("model"),
            )
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"The study in {folder} is damaged ({error}). Run it again with the same settings: it redoes what is "
                "damaged."
            ) from None


def main(argv) -> None:
    for flag in (STUDY, OUT):
        if not flag.value:
            raise UserError(
                f"--{flag.name} is missing. Example: refusal-jax export --direction=runs/demo --out=edited."
            )
    folder, out = pathlib.Path(STUDY.value), pathlib.Path(OUT.value)
    study = Study.read(folder, PROMPT_COUNT.value)
    source = pathlib.Path(MODEL.value) if MODEL.value else study.model
    cfg = load_config(source)
    if not MODEL.value and checkpoint_fingerprint(source) != study.fingerprint:
        raise UserError(
            f"{source} is not the checkpoint that {folder} was made from: it has changed since. Name the model with --model "
            "if the direction should be applied all the same."
        )
    template = {name: study.config[name] for name in ("chat_template", "thinking") if name in study.config}
    chat = Chat.load(source, cfg.context_length, cfg.vocab_size, **template)
    chat.encode(study.prompts)  # what cannot be compared is better known before the export
    export = export_hf(source, out, study.direction_d, TIE.value)
    result = compare(source, out, study.direction_d, chat, study.prompts)
    report = {
        "edit": "ablate",
        "source": str(source),
        "direction_sha256": file_hash(folder / DIRECTION),
        "tied": export.tied,
        "added_bytes": export.added_bytes,
        "edited_tensors": {name: edit.kind for name, edit in export.edits.items()},
        "kinds": Counter(edit.kind for edit in export.edits.values()),
        "largest_amplification": export.largest_amplification,
        "comparison": result,
    }
    write_atomically(out / "export.json", to_json(report))
    print(summary(out, export, result))


# By value of --tied, what became of a tied embedding.
COST = {
    "untie": "its unembedding is now a tensor of its own, the embedding as it was ({bytes:,} bytes more)",
    "keep": "its unembedding was edited with it, which the logits below show",
    "skip": "it was not edited, so the direction stays in what it writes",
}


def summary(out: pathlib.Path, export: Export, result: dict) -> str:
    """What was done and how close it comes to ablation, for the terminal."""
    kinds = ", ".join(f"{n} {kind}" for kind, n in Counter(e.kind for e in export.edits.values()).most_common())
    lines = [
        f"{len(export.edits)} tensors edited ({kinds}; largest amplification {export.largest_amplification:.2f}), "
        f"everything else copied: {out.resolve()}"
    ]
    if export.tied:
        lines.append(f"The embedding was tied: {COST[export.tied].format(bytes=export.added_bytes)}.")
    lines += ["", f"On {result['prompts']} prompts, float32, last-token logits against inference-time ablation:"]
    names = {"": "export", "orthogonalised_": "plain orthogonalisation", "original_": "original"}
    for prefix, name in names.items():
        if f"{prefix}mean_kl" in result:
            site, most = max(result[f"{prefix}projection"].items(), key=lambda item: item[1])
            lines.append(
                f"  {name}: max |difference| {result[f'{prefix}max_logit_difference']:.2e}, mean "
                f"{result[f'{prefix}mean_logit_difference']:.2e}, KL {result[f'{prefix}mean_kl']:.2e}; largest projection "
                f"on the direction {most:.2e} of the norm, at {site}"
            )
    return "\n".join(lines)
