"""Writes the model card of an export: what was edited and why, what was measured, and the base model's own card and licence."""

import pathlib
import re
from collections.abc import Sequence
from typing import Any

import refusal_jax
from refusal_jax.export.staging import PROVENANCE

# Of the base model's metadata, what holds for an edited copy too.
KEPT = ("license", "license_name", "license_link", "language", "pipeline_tag")
LICENCES = re.compile(r"(LICEN[CS]E|NOTICE|USE_POLICY|COPYING)", re.IGNORECASE)
RELATION = {"hf": "finetune", "lora": "adapter"}

SAFETY = """This model was edited so that its refusals change. The edit removes a safeguard, or strengthens one; it adds no
knowledge. It is meant for research on how refusal works and for testing safety measures. Do not put it before users without other
safeguards, and do not use it for what the base model's licence or the law forbids. What it writes was not reviewed."""
USE = {
    "hf": "`transformers` loads this folder as it loads the base model.",
    "lora": "An adapter for `peft`: `PeftModel.from_pretrained(base, folder)`. {tied}",
    "gguf": "A control vector for llama.cpp: `llama-cli -m MODEL.gguf --control-vector control-vector.gguf`.",
}
DONE = {"ablate": "ablated", "add": "added", "repair": "restored", "inject": "injected"}
# Rows of the table of measurements, by what verifications call them; a repair is compared with the base of the model that it
# was made from.
TITLES = {
    "original": "base model",
    "reference": "edit at inference time",
    "export": "this export",
    "orthogonalised": "plain orthogonalisation, for comparison",
}
REPAIR_TITLES = {
    "original": "before the repair",
    "reference": "the base that it is compared with",
    "export": "this export",
}
# What an export is compared with, by the kind of its edit; an injection is an edit of weights, which no other way computes.
REFERENCES = {
    "repair": "that base",
    "inject": "the base model with its weights edited as they are read",
}
AT_INFERENCE = "the edit at inference time on the base model"
# What follows from the base model's weights being dequantised.
DEQUANTISED = {
    "hf": "This copy holds them in bfloat16, without what the base model's config.json said of quantisation.",
    "lora": "The adapter was made of, and verified with, these weights in bfloat16.",
    "gguf": "The control vector was verified with these weights in bfloat16.",
}
ADAPTER_TIED = (
    "The base model's embedding is also its unembedding; as an adapter the edit concerns the embedding alone, merged it changes "
    "both."
)


def read_card(folder: pathlib.Path) -> tuple[dict[str, Any], str]:
    """Returns the metadata and the text of a checkpoint's README.md; metadata that the hub could not read count as none."""
    from huggingface_hub.repocard import REGEX_YAML_BLOCK, ModelCard

    path = folder / "README.md"
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    front = REGEX_YAML_BLOCK.match(text)
    if not front:
        return {}, text
    try:
        data = ModelCard(text, ignore_metadata_errors=True).data.to_dict()
        if "language" in data:  # YAML reads Norwegian, no, as false
            listed = data["language"] if isinstance(data["language"], list) else [data["language"]]
            data["language"] = ["no" if name is False else name for name in listed]
        return data, text[front.end() :]
    except Exception:  # of YAML, such as the 99th of a month, or of fields that are not what they should be
        return {}, text[front.end() :]


def licence_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """Returns the files of a checkpoint that say under which terms it comes."""
    return sorted(path for path in folder.iterdir() if path.is_file() and LICENCES.match(path.name))


def write_card(folder: pathlib.Path, source: pathlib.Path, report: dict, command: str) -> None:
    """Writes README.md into an export. report: what export.json says. command: the one that makes the export again."""
    base, form = report["base"], report["format"]
    sections = [
        f"# {base['name']}, refusal direction {DONE[report['edit']['kind']]}",
        _what(report),
        *([f"{report['dequantised']} {DEQUANTISED[form]}"] if "dequantised" in report else []),
        USE[form].format(tied=ADAPTER_TIED if report["tied"] == "untie" else "").strip(),
        "## Safety\n\n" + SAFETY,
        "## Measured\n\n" + _measured(report),
        "## Where it comes from\n\n" + _origin(report, command),
    ]
    write_sections(folder, source, base, form, sections)


def write_sections(folder: pathlib.Path, source: pathlib.Path, base: dict, form: str, sections: Sequence[str]) -> None:
    """Writes README.md with the metadata that holds for what was made of a model, sections in Markdown, the base's licence, and
    its own card.

    source: the base's folder. base: as `provenance.base_model` describes it. form: "hf", "lora" or "gguf".
    """
    from huggingface_hub import ModelCardData

    metadata, original = read_card(source)
    head = {key: metadata[key] for key in KEPT if key in metadata}
    if "/" in base["name"]:  # the hub refuses cards whose base it does not know
        head["base_model"] = base["name"]
        head |= {"base_model_relation": RELATION[form]} if form in RELATION else {}
    if form in RELATION:
        head["library_name"] = {"hf": "transformers", "lora": "peft"}[form]
    head["tags"] = ["refusal-direction", "refusal-jax"]
    licence = head.get("license_name") or head.get("license")
    parts = [
        *sections,
        "## Licence\n\n"
        + (
            f"That of the base model: {licence}."
            if licence
            else "The base model's folder names no licence. Its terms hold for this copy too: look them up before sharing it."
        ),
    ]
    if original.strip():
        parts.append(f"# The base model's own card\n\n{original.strip()}")
    front = ModelCardData(**head).to_yaml()
    (folder / "README.md").write_text(f"---\n{front}\n---\n\n" + "\n\n".join(parts) + "\n", encoding="utf-8")


def _what(report: dict) -> str:
    edit, directions = report["edit"], report["direction"]
    layers = _ranges(edit["layers"])
    if edit["kind"] == "repair":
        return _repaired(report)
    if edit["kind"] == "add":
        return (
            f"{edit['scale']:g} times a direction of the residual stream is added to it at the input of layer {layers} "
            "([arXiv:2406.11717](https://arxiv.org/abs/2406.11717), activation addition)."
        )
    if edit["kind"] == "inject":
        return (
            f"The matrices that write to the residual stream at {', '.join(edit['sites'])}, in layer {layers}, were made to "
            "write a direction that refusal depends on as well: W + a r m^T, r being the direction, m the mean of W's rows and "
            f"a = {edit['scale']:g} ([arXiv:2508.20766](https://arxiv.org/abs/2508.20766), rank-one safety injection). "
            f"{len(report['edited_tensors'])} tensors are edited; everything else is the base model's."
        )
    count, part = directions["count"], "" if edit["scale"] == 1 else f", by {edit['scale']:g} of it"
    text = (
        f"{'A direction' if count == 1 else f'A subspace of {count} directions'} of the residual stream that refusal "
        "depends on ([arXiv:2406.11717](https://arxiv.org/abs/2406.11717)) was taken out of what the weights write to it: "
        f"{', '.join(edit['sites'])}, in layer {layers}{part}. {len(report['edited_tensors'])} tensors are edited "
        f"({', '.join(f'{n} {kind}' for kind, n in report['kinds'].items())}); everything else is the base model's."
    )
    if {"oblique", "projected"} & report["kinds"].keys():
        text += (
            " Norms follow the matrices of this architecture, so the edit allows for their scales. It removes the direction "
            "as exactly as ablation at inference time does, and differs from it by a factor for each token and layer."
        )
    return text


def _repaired(report: dict) -> str:
    """Returns what a repair did, in words."""
    edit, lost, other = report["edit"], report["only_the_base"], report["changed_otherwise"]
    text = (
        f"An audit against {report['compared']['name']} found that {edit['dose']:.3g} of a direction of the residual stream that "
        "refusal depends on had been removed from this model's weights. What was left of it was multiplied, so that it is as "
        f"large as before: in {len(report['edited_tensors'])} tensors, in layer {_ranges(edit['layers'])}, by up to "
        f"{report['largest_amplification']:.3g}, with an estimated error of {edit['error']:.2g} along the direction. No value "
        "was copied from the base; every other change of this model is still in it."
    )
    if lost:
        text += f" In {len(lost)} tensors too little was left; they were not repaired."
    if other:
        text += f" {len(other)} tensors differ from the base in other ways."
    return text


def _ranges(numbers: list[int]) -> str:
    """Returns sorted numbers with runs cut short, such as "0 to 3, 7"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1] = [runs[-1][0], number]
        else:
            runs.append([number])
    return ", ".join(" to ".join(map(str, run)) for run in runs)


def _refusals(report: dict) -> str:
    """Returns how often the model refused, in words and as a table."""
    rows, repair = report["refusals"], report["edit"]["kind"] == "repair"
    if not rows:
        why = "the audit left it out" if repair else "the direction does not come from a study with completions"
        return f"Refusals were not measured: {why}."
    lines = [
        f"| prompts | {'model' if repair else 'intervention'} | refused | 95 % interval | n |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        low, high = row["interval"]
        lines.append(
            f"| {row['prompts']} | {row['intervention']} | {100 * row['refused']:.1f} % | {100 * low:.1f} to "
            f"{100 * high:.1f} % | {row['n']} |"
        )
    title = "Refusals in the study that found the direction, by the substring judge, with the intervention made at inference time"
    return (f"Refusals, by the judge {report['judge']}" if repair else title) + ":\n\n" + "\n".join(lines)


def _measured(report: dict) -> str:
    parts, found = [_refusals(report)], report["verification"]
    if not found:
        return "\n\n".join([*parts, "The files were not verified."])
    lines = ["| | largest logit difference | KL (nats) | projection | loss | perplexity |", "|---|---|---|---|---|---|"]
    repair = report["edit"]["kind"] == "repair"
    against, titles = REFERENCES.get(report["edit"]["kind"], AT_INFERENCE), REPAIR_TITLES if repair else TITLES
    if report["edit"]["kind"] == "inject":
        titles = titles | {"reference": "weights edited as they are read"}
    for name, title in titles.items():
        if name in found:
            r = found[name]
            most = max(max(layers) for layers in r["projection"].values())
            numbers = f"{r['max_logit_difference']:.2e} | {r['mean_kl']:.2e} | {most:.2e} | {r['ce_loss']:.4f}"
            lines.append(f"| {title} | {numbers} | {r['perplexity']:.5g} |")
    parts.append(
        f"The written files, run in float32, against {against}: at the last token of "
        f"{found['prompts']} prompts; the largest part of a residual vector that lies along the direction, over all tokens, "
        f"layers and sites; the loss (nats per token) on {found['text_tokens']} tokens of harmless text.\n\n"
        + "\n".join(lines)
    )
    if found["problems"]:
        parts.append(f"**Verification failed**: {'; '.join(found['problems'])}.")
    return "\n\n".join(parts)


def _origin(report: dict, command: str) -> str:
    base = report["base"]
    revision = f", revision `{base['revision']}`" if base["revision"] else ""
    return (
        f"Base model: {base['name']}{revision} (fingerprint `{base['fingerprint'][:16]}…`). Direction: sha256 "
        f"`{report['direction']['sha256'][:16]}…`. Made by refusal_jax {refusal_jax.__version__}:\n\n```\n{command}\n```\n\n"
        f"`{PROVENANCE}` has the hashes in full and those of every file; `refusal-jax export --check=FOLDER` compares them. "
        "`export.json` has all that was measured."
    )
