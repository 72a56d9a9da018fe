"""The paper's 13 models, each with its settings, hardware, and the numbers of the paper's Table 5.

Command:   hf download REPO --local-dir hf/NAME
           refusal-jax study --config=configs/paper.py:NAME --model=hf/NAME --workdir=runs/NAME
           python configs/paper.py NAME    prints both, filled in, with what is said below of NAME
Access:    checkpoints of meta-llama and google are gated; accept the licence on the hub first
Prompts:   bundled; for the paper's splits run `refusal-jax data fetch`, then add --config.data.harmful_train=paper, and
           so on for all six sets
Expected:  on the paper's splits, on GPUs and in the paper's precision; on other hardware within 0.61 (bypass), 0.33
           (induce) and 0.008 (KL)
"""

import dataclasses
import sys

from refusal_jax.settings import chosen
from refusal_jax.study.config import StudyConfig
from refusal_jax.study.config import get_config as base


@dataclasses.dataclass(frozen=True)
class Family:
    """The settings that a family's models share in the paper: chat template and refusal tokens ("I", for Qwen also "As").

    unneeded: files of the checkpoints that need not be downloaded.
    """

    template: str
    refusal_tokens: tuple[int, ...]
    dtype: str
    unneeded: str = ""


QWEN, YI = Family("chatml", (40, 2121), "float16"), Family("chatml", (59597,), "float16")
GEMMA = Family("gemma", (235285,), "bfloat16", "*.gguf")
LLAMA_2, LLAMA_3 = Family("llama-2", (306,), "float16", "*.bin"), Family("llama-3", (40,), "bfloat16", "original/*")


@dataclasses.dataclass(frozen=True)
class Model:
    """One model. hardware: TPU slice that holds it; gigabytes: of its weights in bfloat16; minutes: of the study there, a rough
    estimate from operations and bytes, without loading and compiling (`refusal-jax plan` compiles for a better one)."""

    title: str
    repo: str
    family: Family
    hardware: str
    gigabytes: float
    minutes: float


MODELS = {
    "qwen_1_8b": Model("Qwen 1.8B Chat", "Qwen/Qwen-1_8B-Chat", QWEN, "v5e-1", 3.7, 1.5),
    "qwen_7b": Model("Qwen 7B Chat", "Qwen/Qwen-7B-Chat", QWEN, "v5e-4", 15.4, 1.4),
    "qwen_14b": Model("Qwen 14B Chat", "Qwen/Qwen-14B-Chat", QWEN, "v5e-8", 28.3, 1.4),
    "qwen_72b": Model("Qwen 72B Chat", "Qwen/Qwen-72B-Chat", QWEN, "v6e-8", 144.6, 2.8),
    "yi_6b": Model("Yi 6B Chat", "01-ai/Yi-6B-Chat", YI, "v5e-4", 12.1, 0.7),
    "yi_34b": Model("Yi 34B Chat", "01-ai/Yi-34B-Chat", YI, "v5e-8", 68.8, 2.4),
    "gemma_2b": Model("Gemma 2B It (the first Gemma)", "google/gemma-2b-it", GEMMA, "v5e-1", 5.0, 0.8),
    "gemma_7b": Model("Gemma 7B It (the first Gemma)", "google/gemma-7b-it", GEMMA, "v5e-4", 17.1, 1.4),
    "llama_2_7b": Model("Llama 2 7B Chat", "meta-llama/Llama-2-7b-chat-hf", LLAMA_2, "v5e-4", 13.5, 1.4),
    "llama_2_13b": Model("Llama 2 13B Chat", "meta-llama/Llama-2-13b-chat-hf", LLAMA_2, "v5e-8", 26.0, 1.4),
    "llama_2_70b": Model("Llama 2 70B Chat", "meta-llama/Llama-2-70b-chat-hf", LLAMA_2, "v6e-8", 138.0, 2.1),
    "llama_3_8b": Model("Llama 3 8B Instruct", "meta-llama/Meta-Llama-3-8B-Instruct", LLAMA_3, "v5e-4", 16.1, 0.9),
    "llama_3_70b": Model("Llama 3 70B Instruct", "meta-llama/Meta-Llama-3-70B-Instruct", LLAMA_3, "v6e-8", 141.1, 2.1),
}


@dataclasses.dataclass(frozen=True)
class Expected:
    """The selected direction in the paper's Table 5."""

    position: int
    layer: int
    bypass: float
    induce: float
    kl: float


TABLE_5 = {
    "qwen_1_8b": Expected(-1, 15, -4.415, 1.641, 0.077),
    "qwen_7b": Expected(-1, 17, -5.355, 1.107, 0.069),
    "qwen_14b": Expected(-1, 23, -5.085, 1.606, 0.014),
    "qwen_72b": Expected(-1, 62, -4.246, 1.885, 0.034),
    "yi_6b": Expected(-5, 20, -6.693, 1.968, 0.046),
    "yi_34b": Expected(-1, 37, -11.14, 1.865, 0.069),
    "gemma_2b": Expected(-2, 10, -14.435, 6.709, 0.067),
    "gemma_7b": Expected(-1, 14, -12.239, 6.851, 0.091),
    "llama_2_7b": Expected(-1, 14, -5.295, 5.941, 0.073),
    "llama_2_13b": Expected(-1, 26, -4.377, 2.794, 0.092),
    "llama_2_70b": Expected(-1, 21, -4.565, 5.191, 0.036),
    "llama_3_8b": Expected(-5, 12, -9.715, 7.681, 0.064),
    "llama_3_70b": Expected(-5, 25, -7.839, 0.126, 0.021),
}
NOTES = {
    "qwen_1_8b": "The published run picked position -2.",
    "llama_3_8b": "The published run's template had a stray quote and BOS twice: --config.chat_template=llama-3-published.",
}


def get_config(name: str = "") -> StudyConfig:
    """Returns the settings of the study of one model. Raises UserError for a name that is not of MODELS."""
    model = chosen(name, MODELS, "configs/paper.py")
    config = base()
    config.chat_template, config.refusal_tokens = model.family.template, model.family.refusal_tokens
    return config


def described(name: str) -> str:
    """Returns the commands for a model, its hardware and what to expect."""
    model, table = chosen(name, MODELS, "configs/paper.py"), TABLE_5[name]
    exclude = f" --exclude '{model.family.unneeded}'" if model.family.unneeded else ""
    return f"""{model.title}, as in the paper
  hf download {model.repo} --local-dir hf/{name}{exclude}
  refusal-jax study --config=configs/paper.py:{name} --model=hf/{name} --workdir=runs/{name}
  Hardware: TPU {model.hardware}; weights {model.gigabytes} GB in bfloat16; the study takes roughly {model.minutes} minutes
  Expected: position {table.position}, layer {table.layer}, bypass {table.bypass}, induce {table.induce}, KL {table.kl}
            (paper, Table 5: {model.family.dtype} on GPUs)
  {NOTES.get(name, "")}""".rstrip()


if __name__ == "__main__":
    print("\n\n".join(map(described, sys.argv[1:] or MODELS)))
