"""Recognises tensor names that do not fit a model, because they show how a checkpoint was saved and how to repair it.

Wrappers of a model (PEFT, torch.compile, data parallelism, a multimodal model around a text model) put prefixes before the
names of its tensors, and saving a part of a model leaves them out. Those that transformers takes when it loads are taken
here, too, and an export writes the names that it has read. For others there is advice.
"""

import pathlib
import re
from collections.abc import Collection

from refusal_jax.models.config import ModelConfig
from refusal_jax.models.families import OTHER_PARTS, OTHER_SPELLINGS, TABLES, hf_shapes, is_spare

PREFIX = re.compile(r"^(?:(?:model|backbone|language_model|base_model|module|_orig_mod|transformer|text_model|llm)\.)+")
WRAPPER = re.compile(
    r"(?<=\.)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)  # around a part of a model
UNMERGED = re.compile(
    r"\.(?:lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector|base_layer|modules_to_save|original_module)\b"
)
# What stands before the text part's names in multimodal checkpoints of different ages, and before all names of a family in files
# of one origin or another.
MULTIMODAL = {"", "model.", "language_model.", "model.language_model.", "language_model.model."}
ROOTS = dict.fromkeys(OTHER_PARTS, MULTIMODAL) | {"nemotron_h": {"", "model.", "backbone."}}
ROOTS |= dict.fromkeys(("qwen3_5_text", "qwen3_5_moe_text"), MULTIMODAL)  # taken out of a multimodal model as they were
PLAIN = re.compile(r"[\w.]+")  # the names that a checkpoint's code for users may hold
RENAME = """

    import json, pathlib, re, shutil
    from safetensors.numpy import load_file, save_file

    folder = pathlib.Path(shutil.copytree({folder!r}, {target!r}))

    def new(name):
{steps}
        return name

    for file in folder.glob("*.safetensors"):
        save_file({{new(name): tensor for name, tensor in load_file(file).items()}}, file, {{"format": "pt"}})
    for file in folder.glob("*.safetensors.index.json"):
        index = json.loads(file.read_text())
        index["weight_map"] = {{new(name): where for name, where in index["weight_map"].items()}}
        file.write_text(json.dumps(index))
"""


def core(name: str) -> str:
    """Returns a tensor's name without the prefixes that wrappers put before it or before a part of it."""
    return PREFIX.sub("", WRAPPER.sub("", name))


def accepted(cfg: ModelConfig, stored: Collection[str]) -> dict[str, str]:
    """Returns the stored names that transformers takes for those of the family's table, by the latter.

    Of a family in `ROOTS` these are all forms that versions of transformers wrote; of others, names with one "model." more or
    less, as when the model was saved without its head or in a wrapper.
    """
    names = [*hf_shapes(cfg), TABLES[cfg.family]["unembed"]]
    wanted, found = {core(name): name for name in names}, {}
    other, meant = OTHER_SPELLINGS.get(cfg.family, ("", ""))
    wanted |= {
        other + name.removeprefix(meant): new for name, new in wanted.items() if other and name.startswith(meant)
    }
    for old in stored:
        new = wanted.get(core(old), old)
        if new in stored or is_spare(cfg, old):
            continue
        roots = ROOTS.get(cfg.family)
        whole = roots and old.removesuffix(core(old)) in roots and old.endswith(core(old))
        if whole if roots else new in (f"model.{old}", old.removeprefix("model.")):
            found.setdefault(new, []).append(old)
    return {new: olds[0] for new, olds in found.items() if len(olds) == 1}


def renamed(cfg: ModelConfig, unknown: Collection[str], missing: Collection[str]) -> dict[str, str]:
    """Returns the unknown names that differ from those of missing or spare tensors by known prefixes only, each with the name
    that is expected. A name that two tensors would get is not among them."""
    wanted = {core(name): name for name in missing}
    found = {}
    for name in filter(PLAIN.fullmatch, unknown):
        new = wanted.get(core(name)) or (core(name) if is_spare(cfg, core(name)) else None)
        if new and new != name:
            found.setdefault(new, []).append(name)
    return {names[0]: new for new, names in found.items() if len(names) == 1}


def rename_advice(folder: pathlib.Path, names: dict[str, str]) -> str:
    """Returns what is wrong with the names of `renamed` and code that mends it, for a message."""
    steps, pairs = [], {}
    if any(WRAPPER.search(name) for name in names):
        steps.append(f'name = re.sub(r"{WRAPPER.pattern}", "", name)')
    for old, new in names.items():
        old, rest = WRAPPER.sub("", old), core(old)
        pair = old.removesuffix(rest), new.removesuffix(rest)
        if pair[0] != pair[1]:
            pairs.setdefault(pair, set()).add(rest.split(".")[0])
    for (before, after), firsts in pairs.items():
        pattern = f"^{re.escape(before)}(?=(?:{'|'.join(sorted(firsts))})\\.)"
        steps.append(f'name = re.sub(r"{pattern}", "{after}", name)')
    told = dict.fromkeys(
        f"{repr(found) if found else 'missing'} where {repr(expected) if expected else 'none'} is expected"
        for found, expected in map(_differing, pairs)
    )
    old, new = next(iter(names.items()))
    code = RENAME.format(
        folder=str(folder), target=f"{folder}-renamed", steps="\n".join(" " * 8 + step for step in steps)
    )
    return (
        f"{len(names)} tensors are called otherwise, such as {old}, expected {new}"
        f"{': the prefix is ' + ', and '.join(told) if told else ''}. The checkpoint was saved from a wrapped model or from a "
        f"part of one. Save it again from the model itself with save_pretrained, or make a copy with the expected names:{code}"
    )


def _differing(pair: tuple[str, str]) -> tuple[str, str]:
    """Returns two prefixes without the parts that both end in."""
    found, expected = (prefix.split(".")[:-1] for prefix in pair)
    while found and expected and found[-1] == expected[-1]:
        found, expected = found[:-1], expected[:-1]
    return "".join(f"{part}." for part in found), "".join(f"{part}." for part in expected)


def unmerged_advice(names: Collection[str]) -> str:
    """Returns what to do about tensors of a PEFT adapter among a model's, "" if there are none."""
    found = sorted(name for name in names if UNMERGED.search(name))
    if not found:
        return ""
    return (
        f"It was saved from a PEFT model whose adapter is not merged: {len(found)} tensors are the adapter's or wrapped by it, "
        f"such as {found[0]}. Load the model as it was saved, then call model = model.merge_and_unload() and "
        "model.save_pretrained(FOLDER)."
    )
