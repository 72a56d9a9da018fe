"""Writes a checkpoint whose weights no longer express a study's direction, for PyTorch and JAX users alike.

  refusal-jax export --direction=runs/mine --out=DIR             # the model and direction of a finished study
  refusal-jax export --model=DIR --direction=runs/mine --out=DIR

Every matrix that writes to the residual stream (embedding, attention output, MLP output) is made orthogonal to the
direction. Tensors are streamed one by one, so the export needs the memory of the largest; untouched tensors and files are
copied byte for byte; `transformers` loads the result as it loads the original. The export ends with a measured
comparison against ablation at inference time, printed and written to OUT/export.json; for it the two models are loaded
in float32, one after the other.
"""

import json
import pathlib

from absl import flags
from safetensors import SafetensorError
from safetensors.numpy import load_file

from refusal_jax.errors import UserError
from refusal_jax.export.verify import compare
from refusal_jax.export.weights import Orthogonalise, export_hf
from refusal_jax.models.config import load_config, read_json
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
PROMPT_COUNT = flags.DEFINE_integer("prompts", 16, "Prompts of each side for the closing comparison.", lower_bound=1)


def main(argv) -> None:
    for flag in (STUDY, OUT):
        if not flag.value:
            raise UserError(
                f"--{flag.name} is missing. Example: refusal-jax export --direction=runs/demo --out=edited."
            )
    study, out = pathlib.Path(STUDY.value), pathlib.Path(OUT.value)
    for name in (DIRECTION, PROMPTS, SETUP, MANIFEST):
        if not (study / name).is_file():
            raise UserError(
                f"{study} holds no {name}, so it is not a finished study. Run `refusal-jax study "
                f"--workdir={study}` first."
            )
    try:
        direction = load_file(study / DIRECTION)["direction"]
        prompts = json.loads((study / PROMPTS).read_text(encoding="utf-8"))
        studied = pathlib.Path(read_json(study / SETUP)["model"])
        texts = [row["instruction"] for side in VAL for row in prompts[side][: PROMPT_COUNT.value]]
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"The study in {study} is damaged ({error}). Run it again with the same settings: it redoes what is damaged."
        ) from None
    source = pathlib.Path(MODEL.value) if MODEL.value else studied
    load_config(source)
    fingerprint = read_manifest(study / MANIFEST)["inputs"].get("model")
    if not MODEL.value and checkpoint_fingerprint(source) != fingerprint:
        raise UserError(
            f"{source} is not the checkpoint that {study} was made from: it has changed since. Name the model with --model "
            "if the direction should be applied all the same."
        )
    names = export_hf(source, out, Orthogonalise.along(direction))
    result = compare(source, out, direction, texts)
    write_atomically(
        out / "export.json",
        to_json(
            {
                "edit": "orthogonalise",
                "source": str(source),
                "direction_sha256": file_hash(study / DIRECTION),
                "edited_tensors": names,
                "comparison": result,
            }
        ),
    )
    print(f"{len(names)} tensors edited, everything else copied: {out.resolve()}\n")
    print(f"On {result['prompts']} prompts, float32, last-token logits:")
    print(
        f"  export against inference-time ablation: max |difference| {result['max_logit_difference']:.2e}, mean "
        f"{result['mean_logit_difference']:.2e}, KL {result['mean_kl']:.2e}"
    )
    print(
        f"  original against inference-time ablation: max |difference| {result['original_max_logit_difference']:.2e}, "
        f"KL {result['original_mean_kl']:.2e}"
    )
    print(
        f"  largest projection of the residual on the direction: {result['max_projection']:.2e} of its norm (original "
        f"{result['original_max_projection']:.2e})"
    )
