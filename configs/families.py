"""A model of each other family, with its hardware; template and refusal tokens are left to the checkpoint and the data.

Command:   hf download REPO --local-dir hf/NAME
           refusal-jax study --config=configs/families.py:NAME --model=hf/NAME --workdir=runs/NAME
           python configs/families.py NAME    prints both, filled in, with what is said below of NAME
Access:    checkpoints of meta-llama, google and CohereLabs are gated; accept the licence on the hub first
Prompts:   bundled; for the paper's splits run `refusal-jax data fetch`, then add --config.data.harmful_train=paper, and
           so on for all six sets
"""

import dataclasses
import sys

from refusal_jax.settings import chosen
from refusal_jax.study.config import StudyConfig
from refusal_jax.study.config import get_config as base


@dataclasses.dataclass(frozen=True)
class Model:
    """One model. hardware: TPU slice that holds it; gigabytes: of its weights in bfloat16."""

    title: str
    repo: str
    hardware: str
    gigabytes: float


MODELS = {
    "llama_3_1_8b": Model("Llama 3.1 8B Instruct", "meta-llama/Llama-3.1-8B-Instruct", "v5e-4", 16.1),
    "qwen2_5_7b": Model("Qwen 2.5 7B Instruct", "Qwen/Qwen2.5-7B-Instruct", "v5e-4", 15.2),
    "qwen3_8b": Model("Qwen 3 8B", "Qwen/Qwen3-8B", "v5e-4", 16.4),
    "mistral_7b": Model("Mistral 7B Instruct v0.3", "mistralai/Mistral-7B-Instruct-v0.3", "v5e-4", 14.5),
    "smollm3_3b": Model("SmolLM3 3B", "HuggingFaceTB/SmolLM3-3B", "v5e-1", 6.2),
    "exaone_4_32b": Model("EXAONE 4.0 32B", "LGAI-EXAONE/EXAONE-4.0-32B", "v5e-8", 64.0),
    "aya_expanse_8b": Model("Aya Expanse 8B", "CohereLabs/aya-expanse-8b", "v5e-4", 16.1),
    "command_r7b": Model("Command R7B", "CohereLabs/c4ai-command-r7b-12-2024", "v5e-4", 16.1),
    "hunyuan_7b": Model("Hunyuan 7B Instruct", "tencent/Hunyuan-7B-Instruct", "v5e-4", 15.0),
    "gemma_2_9b": Model("Gemma 2 9B It", "google/gemma-2-9b-it", "v5e-4", 18.5),
    "gemma_3_4b": Model("Gemma 3 4B It, of which the language model is studied", "google/gemma-3-4b-it", "v5e-1", 7.8),
    "gemma_4_e2b": Model("Gemma 4 E2B It, its language model", "google/gemma-4-E2B-it", "v5e-4", 9.3),
    "gemma_4_26b_a4b": Model(
        "Gemma 4 26B A4B It (128 experts, 8 a token), its language model", "google/gemma-4-26B-A4B-it", "v5e-8", 50.5
    ),
    "gemma_4_12b": Model("Gemma 4 12B It, its language model", "google/gemma-4-12B-it", "v5e-4", 23.8),
    "qwen2_vl_7b": Model("Qwen 2 VL 7B, its language model", "Qwen/Qwen2-VL-7B-Instruct", "v5e-4", 15.2),
    "qwen2_5_vl_7b": Model("Qwen 2.5 VL 7B, its language model", "Qwen/Qwen2.5-VL-7B-Instruct", "v5e-4", 15.2),
    "qwen3_vl_8b": Model("Qwen 3 VL 8B, its language model", "Qwen/Qwen3-VL-8B-Instruct", "v5e-4", 16.4),
    "mistral_small_3_1_24b": Model(
        "Mistral Small 3.1 24B, its language model", "mistralai/Mistral-Small-3.1-24B-Instruct-2503", "v6e-4", 47.1
    ),
    "ministral_3_8b": Model(
        "Ministral 3 8B, its language model", "mistralai/Ministral-3-8B-Instruct-2512-BF16", "v5e-4", 17.0
    ),
    "phi_4": Model("Phi 4 (14B)", "microsoft/phi-4", "v5e-4", 29.3),
    "olmo_2_7b": Model("OLMo 2 7B Instruct", "allenai/OLMo-2-1124-7B-Instruct", "v5e-4", 14.6),
    "olmo_3_7b": Model("OLMo 3 7B Instruct", "allenai/Olmo-3-7B-Instruct", "v5e-4", 14.6),
    "seed_oss_36b": Model("Seed-OSS 36B Instruct", "ByteDance-Seed/Seed-OSS-36B-Instruct", "v6e-4", 72.3),
    "ernie_4_5_0_3b": Model("ERNIE 4.5 0.3B", "baidu/ERNIE-4.5-0.3B-PT", "v5e-1", 0.7),
    "cwm_32b": Model("Code World Model 32B", "facebook/cwm", "v6e-4", 65.2),
    "granite_3_1_8b": Model("Granite 3.1 8B Instruct", "ibm-granite/granite-3.1-8b-instruct", "v5e-4", 16.3),
    "granite_4_h_tiny": Model(
        "Granite 4.0 H Tiny (36 layers of state spaces, 4 of attention; 64 experts, 6 a token)",
        "ibm-granite/granite-4.0-h-tiny",
        "v5e-4",
        13.9,
    ),
    "granite_4_h_micro": Model(
        "Granite 4.0 H Micro (36 layers of state spaces, 4 of attention)",
        "ibm-granite/granite-4.0-h-micro",
        "v5e-1",
        6.4,
    ),
    "glm_4_9b": Model("GLM 4 9B (0414)", "zai-org/GLM-4-9B-0414", "v5e-4", 18.8),
    "falcon_h1_0_5b": Model("Falcon H1 0.5B Instruct", "tiiuae/Falcon-H1-0.5B-Instruct", "v5e-1", 1.0),
    "nemotron_3_nano_30b": Model(
        "Nemotron 3 Nano 30B (128 experts, 6 a token)", "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16", "v6e-4", 63.2
    ),
    "nemotron_nano_9b": Model("Nemotron Nano 9B v2", "nvidia/NVIDIA-Nemotron-Nano-9B-v2", "v5e-4", 17.8),
    "mixtral_8x7b": Model("Mixtral 8x7B Instruct v0.1", "mistralai/Mixtral-8x7B-Instruct-v0.1", "v6e-8", 93.4),
    "qwen3_30b_a3b": Model("Qwen 3 30B (128 experts, 8 a token)", "Qwen/Qwen3-30B-A3B", "v6e-4", 61.1),
    "gpt_oss_20b": Model(
        "gpt-oss 20B (32 experts, 4 a token), from a copy in bfloat16",
        "openai/gpt-oss-20b",
        "v5e-8",
        41.8,
    ),
    "qwen1_5_moe_a2_7b": Model(
        "Qwen 1.5 MoE A2.7B Chat (60 experts, 4 a token)", "Qwen/Qwen1.5-MoE-A2.7B-Chat", "v5e-4", 28.6
    ),
    "qwen2_57b_a14b": Model(
        "Qwen 2 57B Instruct (64 experts, 8 a token)", "Qwen/Qwen2-57B-A14B-Instruct", "v6e-8", 114.8
    ),
    "glm_4_5_air": Model("GLM 4.5 Air (128 experts, 8 a token)", "zai-org/GLM-4.5-Air", "v6e-16", 213.7),
    "glm_4_5": Model("GLM 4.5 (160 experts, 8 a token)", "zai-org/GLM-4.5", "v6e-32", 705.6),
    "granite_3_1_3b_a800m": Model(
        "Granite 3.1 3B Instruct (40 experts, 8 a token)", "ibm-granite/granite-3.1-3b-a800m-instruct", "v5e-1", 6.6
    ),
    "granite_moe_shared_7b": Model(
        "Granite 7B with shared experts (62 experts, 8 a token)",
        "ibm-research/moe-7b-1b-active-shared-experts",
        "v5e-4",
        12.7,
    ),
    "minimax_m2": Model("MiniMax M2 (256 experts, 8 a token)", "MiniMaxAI/MiniMax-M2", "v6e-32", 457.4),
    "qwen3_next_80b_a3b": Model(
        "Qwen 3 Next 80B Instruct (512 experts, 10 a token)", "Qwen/Qwen3-Next-80B-A3B-Instruct", "v6e-8", 159.3
    ),
    "qwen3_5_9b": Model("Qwen 3.5 9B, its language model", "Qwen/Qwen3.5-9B", "v5e-4", 17.9),
    "qwen3_6_27b": Model("Qwen 3.6 27B, its language model", "Qwen/Qwen3.6-27B", "v6e-4", 53.8),
    "qwen3_5_35b_a3b": Model(
        "Qwen 3.5 35B, its language model (256 experts, 8 a token)", "Qwen/Qwen3.5-35B-A3B", "v6e-4", 69.3
    ),
    "llama_4_scout": Model(
        "Llama 4 Scout (16 experts, 1 a token), its language model",
        "meta-llama/Llama-4-Scout-17B-16E-Instruct",
        "v6e-16",
        215.5,
    ),
    "llama_4_maverick": Model(
        "Llama 4 Maverick (128 experts, 1 a token), its language model",
        "meta-llama/Llama-4-Maverick-17B-128E-Instruct",
        "v6e-64",
        801.4,
    ),
    "mobilellm_r1_950m": Model(
        "MobileLLM-R1 950M, a Llama 4 without experts", "facebook/MobileLLM-R1-950M", "v5e-1", 1.9
    ),
    "lfm2_5_1_2b": Model("LFM2.5 1.2B Instruct", "LiquidAI/LFM2.5-1.2B-Instruct", "v5e-1", 2.3),
    "lfm2_8b_a1b": Model("LFM2 8B A1B (32 experts, 4 a token)", "LiquidAI/LFM2-8B-A1B", "v5e-4", 16.7),
    "olmoe_1b_7b": Model(
        "OLMoE 1B-7B Instruct (64 experts, 8 a token)",
        "allenai/OLMoE-1B-7B-0924-Instruct",
        "v5e-4",
        13.8,
    ),
}
MODELS |= {
    "deepseek_v2_lite": Model(
        "DeepSeek V2 Lite Chat (64 experts, 6 a token)", "deepseek-ai/DeepSeek-V2-Lite-Chat", "v5e-4", 31.4
    ),
    "moonlight_16b_a3b": Model(
        "Moonlight 16B Instruct (64 experts, 6 a token)", "moonshotai/Moonlight-16B-A3B-Instruct", "v5e-4", 31.9
    ),
    "deepseek_v3": Model("DeepSeek V3 (256 experts, 8 a token)", "deepseek-ai/DeepSeek-V3", "v5p-64", 1342.1),
    "kimi_k2": Model("Kimi K2 Instruct (384 experts, 8 a token)", "moonshotai/Kimi-K2-Instruct", "v5p-64", 2052.8),
    "kimi_k2_5": Model(
        "Kimi K2.5, its language model (384 experts, 8 a token)", "moonshotai/Kimi-K2.5", "v5p-64", 2052.8
    ),
    "glm_4_7_flash": Model("GLM 4.7 Flash (64 experts, 4 a token)", "zai-org/GLM-4.7-Flash", "v6e-4", 59.9),
}
UNNEEDED = {
    "llama_3_1_8b": "original/*",
    "mistral_7b": "consolidated*",
    "mixtral_8x7b": "consolidated*",
}
EMPTY_THOUGHT = "Its own template puts an empty thought before the reply, unless --config.thinking=True."
DATED = "Its own template adds a system prompt with the day's date, so runs of different days differ."
IN_FP8 = "Its weights are published in fp8, half of that; they are made bfloat16 as they are read."
NOTES = {
    "minimax_m2": IN_FP8,
    "deepseek_v3": IN_FP8,
    "kimi_k2": IN_FP8,
    "kimi_k2_5": "Its experts are published in int4, a quarter of that; they are made bfloat16 as they are read.",
    "llama_3_1_8b": "Its own template adds a system prompt of two dates; --config.chat_template=llama-3 leaves that out.",
    "qwen2_5_7b": "Its own template adds a short system prompt; --config.chat_template=chatml leaves that out.",
    "qwen3_8b": EMPTY_THOUGHT,
    "qwen3_30b_a3b": EMPTY_THOUGHT,
    "qwen3_5_9b": EMPTY_THOUGHT,
    "qwen3_6_27b": EMPTY_THOUGHT,
    "qwen3_5_35b_a3b": EMPTY_THOUGHT,
    "glm_4_5": EMPTY_THOUGHT,
    "glm_4_5_air": EMPTY_THOUGHT,
    "granite_3_1_8b": DATED,
    "granite_3_1_3b_a800m": DATED,
}


def get_config(name: str = "") -> StudyConfig:
    """Returns the settings of the study of one model. Raises UserError for a name that is not of MODELS."""
    chosen(name, MODELS, "configs/families.py")
    return base()


def described(name: str) -> str:
    """Returns the commands for a model and its hardware."""
    model = chosen(name, MODELS, "configs/families.py")
    exclude = f" --exclude '{UNNEEDED[name]}'" if name in UNNEEDED else ""
    return f"""{model.title}
  hf download {model.repo} --local-dir hf/{name}{exclude}
  refusal-jax study --config=configs/families.py:{name} --model=hf/{name} --workdir=runs/{name}
  Hardware: TPU {model.hardware}; weights {model.gigabytes} GB in bfloat16
  {NOTES.get(name, "")}""".rstrip()


if __name__ == "__main__":
    print("\n\n".join(map(described, sys.argv[1:] or MODELS)))
