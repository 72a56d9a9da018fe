"""HF `config.json` to `ModelConfig`: a config that loads is a config that is computed correctly (see hf_attributes.py)."""

import os
import pathlib

from refusal_jax.errors import UserError, did_you_mean, shown
from refusal_jax.files import read_json
from refusal_jax.models.config import ModelConfig
from refusal_jax.models.hf_attributes import Reader
from refusal_jax.models.hf_readers import READERS
from refusal_jax.models.quantisation import quantisation_of, without_quantisation
from refusal_jax.models.readers.multimodal import PARTS, text_part

ADAPTER = "adapter_config.json"
MERGE = """

    from peft import AutoPeftModelForCausalLM
    from transformers import AutoTokenizer

    model = AutoPeftModelForCausalLM.from_pretrained({folder!r}, dtype="auto").merge_and_unload()
    model.save_pretrained({target!r})
    AutoTokenizer.from_pretrained({base}).save_pretrained({target!r})
"""


def from_hf(hf: dict, where: str = "config.json") -> ModelConfig:
    """Returns the `ModelConfig` of an HF config given as a dict.

    Of a multimodal config (one with a `text_config`) the text model is read. Raises UserError that lists everything
    wrong at once: missing or malformed attributes, and non-default attributes that this code does not handle; before that, for an
    unknown architecture and for weights quantised by a method that cannot be read.
    """
    model_type = hf.get("model_type")
    if not isinstance(model_type, str) or model_type not in READERS:
        raise UserError(
            f"{where} says model_type = {shown(model_type)}, which is not supported. Supported: "
            f"{', '.join(sorted(READERS))}.{did_you_mean(model_type, READERS)} "
            "Use a checkpoint of one of these architectures, or add this one: see docs/extending.md."
        )
    quantisation_of(hf)
    hf = without_quantisation(hf)
    hf, beside = text_part(hf, where) if model_type in PARTS else (hf, {})
    read = Reader(hf, where)
    config = READERS[model_type](read)
    read.only("is_causal", True)
    read.finish(beside, known=model_type not in ITS_OWN_CODE)
    return config


# Types that transformers does not implement: their checkpoints' code may read any key.
ITS_OWN_CODE = {"qwen", "kimi_k2"}


def load_config(folder: str | pathlib.Path) -> ModelConfig:
    """Returns the `ModelConfig` of the checkpoint in `folder`; raises UserError if there is none or it is not supported."""
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise UserError(
            f"{folder} is not a folder. Pass the folder of a Hugging Face checkpoint (config.json, "
            "*.safetensors, tokenizer files); download one with `hf download NAME --local-dir DIR`."
        )
    if not os.path.lexists(folder / "config.json"):
        adapter = adapter_advice(folder)
        if adapter:
            raise UserError(adapter)
        try:
            found = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
        except OSError as error:
            raise UserError(f"{folder} could not be read ({error.strerror}). Check that you may read it.") from None
        raise UserError(
            f"{folder} is not a Hugging Face checkpoint: it has no config.json (found: {found}). Pass the "
            "folder that holds config.json, *.safetensors and the tokenizer files."
        )
    return from_hf(read_json(folder / "config.json"), str(folder / "config.json"))


def adapter_advice(folder: pathlib.Path) -> str:
    """Returns what to do about a folder that holds a PEFT adapter and no model, "" if it holds none."""
    if not os.path.lexists(folder / ADAPTER):
        return ""
    base = read_json(folder / ADAPTER).get("base_model_name_or_path")
    code = MERGE.format(
        folder=str(folder), target=f"{folder}-merged", base=repr(base if isinstance(base, str) else "BASE")
    )
    return f"{folder} holds a PEFT adapter of {shown(base or 'a base model')}, not a model. Merge the two:{code}"
