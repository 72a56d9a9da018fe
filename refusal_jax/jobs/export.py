"""Writes what a study found into files that PyTorch and llama.cpp load directly, and verifies them.

  refusal-jax export --direction=runs/mine --out=DIR                  # the model and direction of a finished study
  refusal-jax export --model=DIR --direction=direction.pt --out=DIR   # a direction from elsewhere
  refusal-jax export --model=DIR --direction=rows.pt --layer=12 --out=DIR    # one row of [layers, D]; --subspace: all
  refusal-jax export --direction=runs/mine --format=lora --out=DIR    # a PEFT adapter of the same edit
  refusal-jax export --direction=runs/mine --edit=add --format=gguf --out=DIR    # a control vector for llama.cpp
  refusal-jax export --check=DIR                                      # check that its files are as they were verified

--edit=ablate removes the direction from what every matrix writes to the residual stream (embedding, attention output,
MLP output of each expert). Where a norm follows the matrix (Gemma 2 and 3, OLMo 2, GLM-4), the edit accounts for its
scale. Several directions, --direction=a,b, are removed as the subspace that they span. Where the embedding is also the
unembedding, --tied decides what happens to the latter: "untie" writes it unchanged as a separate tensor, which matches
ablation at inference time and costs the bytes of one more embedding; "keep" lets the edit change both; "skip" edits
neither, so that the direction stays in what the embedding writes. --edit=add writes the direction into the MLP bias of
the preceding block, where the architecture has one. --edit=inject makes the matrices of attention and MLP write the
direction as well (rank-one safety injection); `refusal-jax defend --recipe=injection` finds the scale for it.

Tensors are streamed in blocks, so an export needs little memory and no accelerator; untouched tensors and files are
copied byte for byte. Before the folder appears under its name, the written files are run block by block and compared
with the edit at inference time on the original; the measurements are in OUT/export.json and in the model card. If the
check fails, the folder appears with the marker .unverified and the exit code is 3.
"""

import dataclasses
import pathlib
import re
import shlex

from absl import flags

from refusal_jax.chat.conditional import check_weights
from refusal_jax.checkpoints.fingerprint import checkpoint_fingerprint
from refusal_jax.checkpoints.mirrors import on_the_hub
from refusal_jax.checkpoints.remote import checkpoint_folder
from refusal_jax.conditions import Ablate, Add, Affine, Inject
from refusal_jax.directions import direction_file, read_direction
from refusal_jax.errors import UserError, VerificationError
from refusal_jax.export.finished import FinishedStudy
from refusal_jax.export.hf import TIED
from refusal_jax.export.hub import push
from refusal_jax.export.provenance import check
from refusal_jax.export.run import FORMATS, Request, export
from refusal_jax.export.tensor_edits import NO_WEIGHTS, WEIGHT_SITES
from refusal_jax.files import local_path
from refusal_jax.jobs import common
from refusal_jax.models.hf_config import load_config

EXAMPLE = ". Example: refusal-jax export --direction=runs/demo --out=edited."
MODEL = flags.DEFINE_string("model", None, f"{common.CHECKPOINT} Default: the model that the study ran on.")
DIRECTION = flags.DEFINE_list(
    "direction",
    None,
    "Folder of a finished study, or a .npy, .safetensors or .pt file of a direction [D], of several [J, D], or of mean "
    "differences [positions, layers, D]. Several, separated by commas, stand for the subspace that they span.",
)
SUBSPACE = flags.DEFINE_bool(
    "subspace", False, "Use all rows of a file [J, D] as a subspace, even if J is the model's number of layers."
)
POSITION = flags.DEFINE_integer(
    "position", None, "Which position of mean differences to use, counted from -1 backwards."
)
LAYER = flags.DEFINE_integer(
    "layer",
    None,
    "Layer at whose input the direction was read. For mean differences or a file with a row per layer: which one to use.",
)
OUT = flags.DEFINE_string("out", None, "New folder for the export.")
FORMAT = flags.DEFINE_enum(
    "format",
    "hf",
    FORMATS,
    "What to write: an edited checkpoint, a LoRA adapter for PEFT, or a control vector for llama.cpp.",
)
EDIT = flags.DEFINE_enum(
    "edit",
    Ablate.verb,
    (Ablate.verb, Add.verb, Inject.verb, Affine.verb),
    "Whether to remove the direction, add it, or have the writers of layers write it as well, which strengthens refusal. No "
    "weights hold an affine edit, which is refused.",
)
SCALE = flags.DEFINE_float(
    "scale",
    1.0,
    "Fraction of the direction to remove, multiple of it to add (-1 subtracts it), or how much of it to inject for a mean entry "
    "of 1 in what a matrix writes.",
)
LAYERS = flags.DEFINE_string(
    "layers",
    None,
    "Layers to edit, such as 12 or 0-9,14, or all. Default: all for an ablation (the embedding belongs to layer 0), the "
    "direction's own layer for an addition; for a control vector `all` is 2 to the last.",
)
SITES = flags.DEFINE_list(
    "sites",
    None,
    f"Where an ablation or an injection edits what is written to the residual stream. Default: {','.join(WEIGHT_SITES)}, for an "
    f"injection {','.join(Inject.sites)}.",
)
TIE = flags.DEFINE_enum("tied", "untie", TIED, "How to treat an unembedding that is tied to the embedding.")
PROMPTS = flags.DEFINE_integer(
    "prompts", 16, "Number of harmful and of harmless prompts to verify with.", lower_bound=1
)
VERIFY = flags.DEFINE_bool("verify", True, "Verify the export; --noverify leaves the marker .unverified in it.")
CHAT_TEMPLATE = flags.DEFINE_string(
    "chat_template", "", "Chat template, as in a study's config, for a direction from a file."
)
SYSTEM_PROMPT = flags.DEFINE_string(
    "system_prompt", "", "System prompt of the verification, as in a study's config, for a direction from a file."
)
BASE = flags.DEFINE_string(
    "base_model", "", "The model's name on the hub, for the card. Default: the name that its folder records."
)
CHECK = flags.DEFINE_string("check", None, "Folder of an export whose files are to be compared with its record.")
PUSH = flags.DEFINE_string("push_to_hub", None, "Private repository (USER/NAME) to upload the verified export to.")
PUBLIC = flags.DEFINE_bool("public", False, "Upload to a public repository instead.")


def main(argv) -> None:
    if CHECK.value:
        folder = local_path(CHECK.value)
        record = check(folder)
        print(f"{folder}: all {len(record['files'])} files are as they were exported and verified.")
        if PUSH.value:
            print(push(folder, PUSH.value, PUBLIC.value))
        return
    for flag in (DIRECTION, OUT):
        common.required(flag, EXAMPLE)
    if PUSH.value and not VERIFY.value:
        raise UserError("Only verified exports are pushed: leave out --noverify or --push_to_hub.")
    request = read_request(argv)
    report = export(request)
    print(f"Exported: {request.edit.direction.summary}.")
    print(summary(request.target, report))
    failed = report["verification"] and report["verification"]["problems"]
    if failed:
        raise VerificationError(
            f"The verification of {request.target} failed: {'; '.join(failed)}. The files are there, with the marker "
            ".unverified and all numbers in export.json. Do not rely on them to do what the study measured."
        )
    if PUSH.value:
        print(push(request.target, PUSH.value, PUBLIC.value))


def read_request(argv) -> Request:
    """Returns what the flags ask for. Raises UserError for a direction or model that does not exist, or that do not
    belong together."""
    if EDIT.value == Affine.verb:
        raise UserError(NO_WEIGHTS)
    paths = [local_path(path) for path in common.required(DIRECTION, EXAMPLE)]
    for path in paths:
        check_weights(path)
    folders = [path for path in paths if path.is_dir() or not path.suffix]
    study = (
        FinishedStudy.read(folders[0], PROMPTS.value)
        if folders
        else FinishedStudy.none(PROMPTS.value, CHAT_TEMPLATE.value, SYSTEM_PROMPT.value)
    )
    source = checkpoint_folder(MODEL.value) if MODEL.value else study.checkpoint()
    if source is None:
        for path in paths:
            direction_file(path)
        raise UserError("--model is missing: a direction from a file does not tell which model it belongs to.")
    if study.model is not None and checkpoint_fingerprint(source) != study.fingerprint:
        if not MODEL.value:
            raise UserError(
                f"{study.model} is not the checkpoint that {folders[0]} was made from: it has changed since. Name the model with "
                "--model if the direction should be applied all the same."
            )
        study = dataclasses.replace(study, conditions=[], losses={})  # which were measured on another model
    n_layers = load_config(source).n_layers
    direction = read_direction(paths, POSITION.value, LAYER.value, n_layers, SUBSPACE.value)
    adds, layers = EDIT.value == Add.verb, None
    if LAYERS.value and (adds or LAYERS.value != "all"):
        layers = parse_layers(LAYERS.value, n_layers)
    if adds:
        edit = Add(direction, layers, SCALE.value)
    elif EDIT.value == Inject.verb:
        edit = Inject(direction, layers, SITES.value or Inject.sites, SCALE.value)
    else:
        edit = Ablate(direction, layers, SITES.value or WEIGHT_SITES, SCALE.value)
    return Request(
        source,
        local_path(common.required(OUT, EXAMPLE)),
        edit,
        study,
        FORMAT.value,
        TIE.value,
        VERIFY.value,
        BASE.value,
        command(argv, source),
    )


def parse_layers(text: str, n_layers: int) -> list[int]:
    """Returns the layers that --layers names; `all` stands for those that a control vector can add at. Raises UserError
    for anything else."""
    if text == "all":
        return list(range(2, n_layers))
    layers = []
    for part in text.split(","):
        found = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", part.strip())
        if not found:
            raise UserError(f"--layers = {text}: write numbers and ranges, such as 12 or 0-9,14.")
        layers += range(int(found[1]), int(found[2] or found[1]) + 1)
    return layers


def command(argv, source: pathlib.Path) -> str:
    """Returns the command that makes the export again, with names instead of this machine's paths, and the commit of a model
    on the hub."""
    named = on_the_hub(source)
    words = []
    for word in argv:
        name, equals, value = word.partition("=")
        if equals and name.lstrip("-") in ("model", "direction", "out"):
            names = ",".join(pathlib.PurePath(path).name for path in value.split(","))
            value = str(named) if named and name.lstrip("-") == "model" else names
        words.append(shlex.quote(f"{name}{equals}{value}"))
    return " ".join(["refusal-jax", "export", *words])


# By value of --tied, what became of a tied embedding.
COST = {
    "untie": "its unembedding stays as it was",
    "keep": "its unembedding was edited with it",
    "skip": "it was not edited, so the direction stays in what it writes",
}
NAMES = {"export": "export", "orthogonalised": "plain orthogonalisation", "original": "original"}


def summary(out: pathlib.Path, report: dict) -> str:
    """Returns a summary for the terminal: what was done, and how close it comes to the edit at inference time."""
    kinds = ", ".join(f"{n} {kind}" for kind, n in report["kinds"].items())
    edited = f"{len(report['edited_tensors'])} tensors edited ({kinds}; largest amplification "
    edited += f"{report['largest_amplification']:.2f}): " if report["kinds"] else ""
    written = f"written in {report['seconds']['write']:.1f} s"
    lines = [f"{edited if report['kinds'] else 'Control vector: '}{out.resolve()}, {written}"]
    result = report["verification"]
    if report["tied"]:
        lines.append(f"The embedding is tied: {COST[report['tied']]}.")
    if result is None:
        return "\n".join([*lines, "Not verified."])
    for name, cost in result.get("tied", {}).items():
        lines.append(
            f"  --tied={name}: {cost['added_bytes']:,} bytes more, max |difference| {cost['max_logit_difference']:.2e}, "
            f"KL {cost['mean_kl']:.2e}"
        )
    injected = report["edit"]["kind"] == Inject.verb
    against = "the weights edited as they are read" if injected else "the edit at inference time"
    lines += ["", f"On {result['prompts']} prompts, float32, last-token logits against {against}:"]
    for key, name in NAMES.items():
        if key in result:
            r = result[key]
            site, most = max(
                ((site, max(layers)) for site, layers in r["projection"].items()), key=lambda item: item[1]
            )
            lines.append(
                f"  {name}: max |difference| {r['max_logit_difference']:.2e}, mean {r['mean_logit_difference']:.2e}, KL "
                f"{r['mean_kl']:.2e}; largest projection on the direction {most:.2e} of the norm, at {site}"
            )
    before, reference, after = (result[key]["perplexity"] for key in ("original", "reference", "export"))
    lines.append(
        f"Perplexity on {result['text_tokens']} tokens of harmless text: {before:.5g} before, {after:.5g} after; with "
        f"{against} {reference:.5g}."
    )
    return "\n".join(lines)
