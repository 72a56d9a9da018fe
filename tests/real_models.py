"""The `config.json` of real checkpoints, as the hub has them, and how many parameters each has.

Attributes are given in the hub's spelling, quirks included, because readers must cope with them: Gemma 3's multimodal
configs leave most of their text part to the defaults of its config class, Qwen 1 counts both MLP branches in
`intermediate_size`, Phi-3 has a sliding window of 2047. Left out are token ids, versions and the like, which nothing
computes with. Counts include embeddings, and a tied matrix once.
"""

from typing import NamedTuple


class Real(NamedTuple):
    """A checkpoint: hub repository, config and the number of parameters that we load.

    The published count, except where a multimodal checkpoint is read for its language model only: then that part's.
    """

    repo: str
    parameters: int
    config: dict


def shape(hidden, layers, heads, kv_heads, mlp, vocab, context, **more) -> dict:
    """The attributes that nearly every config names alike, and `more`."""
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": mlp,
        "vocab_size": vocab,
        "max_position_embeddings": context,
        **more,
    }


def family(model_type: str, architecture: str, **more) -> dict:
    """What the configs of a family share: its names, attributes that all of them carry, and `more`."""
    return {
        "model_type": model_type,
        "architectures": [architecture],
        "initializer_range": 0.02,
        "use_cache": True,
        "torch_dtype": "bfloat16",
        **more,
    }


# --- Qwen 1: its own names, its own code; no kv heads, biases on q, k and v only -------------------------------------


def qwen_1(hidden, layers, mlp_of_both_branches, vocab, context, trained_on, rope_base=10000, stretch=True) -> dict:
    shared = family("qwen", "QWenLMHeadModel", tokenizer_class="QWenTokenizer")
    del shared["torch_dtype"]  # given by the three switches below
    return shared | {
        "auto_map": {
            "AutoConfig": "configuration_qwen.QWenConfig",
            "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel",
        },
        "attn_dropout_prob": 0.0,
        "bf16": False,
        "emb_dropout_prob": 0.0,
        "fp16": False,
        "fp32": False,
        "hidden_size": hidden,
        "intermediate_size": mlp_of_both_branches,
        "kv_channels": 128,
        "layer_norm_epsilon": 1e-6,
        "max_position_embeddings": context,
        "no_bias": True,
        "num_attention_heads": hidden // 128,
        "num_hidden_layers": layers,
        "onnx_safe": None,
        "rotary_emb_base": rope_base,
        "rotary_pct": 1.0,
        "scale_attn_weights": True,
        "seq_length": trained_on,
        "softmax_in_fp32": False,
        "tie_word_embeddings": False,
        "use_cache_kernel": False,
        "use_cache_quantization": False,
        "use_dynamic_ntk": stretch,
        "use_flash_attn": "auto",
        "use_logn_attn": stretch,
        "vocab_size": vocab,
    }


QWEN_1 = {
    "Qwen-1_8B-Chat": Real("Qwen/Qwen-1_8B-Chat", 1_836_828_672, qwen_1(2048, 24, 11008, 151936, 8192, 8192)),
    "Qwen-7B-Chat": Real("Qwen/Qwen-7B-Chat", 7_721_324_544, qwen_1(4096, 32, 22016, 151936, 32768, 8192)),
    "Qwen-14B-Chat": Real("Qwen/Qwen-14B-Chat", 14_167_290_880, qwen_1(5120, 40, 27392, 152064, 8192, 2048)),
    "Qwen-72B-Chat": Real(
        "Qwen/Qwen-72B-Chat",
        72_287_920_128,
        qwen_1(8192, 80, 49152, 152064, 32768, 32768, rope_base=1000000, stretch=False),
    ),
}

# --- Llama and those that use its architecture -----------------------------------------------------------------------

LLAMA = family("llama", "LlamaForCausalLM", hidden_act="silu", rms_norm_eps=1e-5, pretraining_tp=1)
LLAMA |= {"rope_scaling": None, "tie_word_embeddings": False}
LLAMA_2 = LLAMA | {"torch_dtype": "float16"}
LLAMA_3 = LLAMA | {"attention_bias": False, "attention_dropout": 0.0, "rope_theta": 500000.0}
LLAMA_3_1_ROPE = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
LLAMA_3_1 = LLAMA_3 | {"mlp_bias": False, "rope_scaling": LLAMA_3_1_ROPE}
LLAMA_3_2 = LLAMA_3_1 | {"rope_scaling": LLAMA_3_1_ROPE | {"factor": 32.0}, "tie_word_embeddings": True}
YI = LLAMA | {"rope_theta": 5000000.0, "attention_bias": False, "pad_token_id": 0}

LLAMAS = {
    "Yi-6B-Chat": Real("01-ai/Yi-6B-Chat", 6_061_035_520, YI | shape(4096, 32, 32, 4, 11008, 64000, 4096)),
    "Yi-34B-Chat": Real("01-ai/Yi-34B-Chat", 34_388_917_248, YI | shape(7168, 60, 56, 8, 20480, 64000, 4096)),
    "Llama-2-7b-chat": Real(
        "meta-llama/Llama-2-7b-chat-hf", 6_738_415_616, LLAMA_2 | shape(4096, 32, 32, 32, 11008, 32000, 4096)
    ),
    "Llama-2-13b-chat": Real(
        "meta-llama/Llama-2-13b-chat-hf", 13_015_864_320, LLAMA_2 | shape(5120, 40, 40, 40, 13824, 32000, 4096)
    ),
    "Llama-2-70b-chat": Real(
        "meta-llama/Llama-2-70b-chat-hf", 68_976_648_192, LLAMA_2 | shape(8192, 80, 64, 8, 28672, 32000, 4096)
    ),
    "Meta-Llama-3-8B-Instruct": Real(
        "meta-llama/Meta-Llama-3-8B-Instruct", 8_030_261_248, LLAMA_3 | shape(4096, 32, 32, 8, 14336, 128256, 8192)
    ),
    "Meta-Llama-3-70B-Instruct": Real(
        "meta-llama/Meta-Llama-3-70B-Instruct", 70_553_706_496, LLAMA_3 | shape(8192, 80, 64, 8, 28672, 128256, 8192)
    ),
    "Llama-3.1-8B-Instruct": Real(
        "meta-llama/Llama-3.1-8B-Instruct", 8_030_261_248, LLAMA_3_1 | shape(4096, 32, 32, 8, 14336, 128256, 131072)
    ),
    "Llama-3.1-70B-Instruct": Real(
        "meta-llama/Llama-3.1-70B-Instruct", 70_553_706_496, LLAMA_3_1 | shape(8192, 80, 64, 8, 28672, 128256, 131072)
    ),
    "Llama-3.2-1B-Instruct": Real(
        "meta-llama/Llama-3.2-1B-Instruct",
        1_235_814_400,
        LLAMA_3_2 | shape(2048, 16, 32, 8, 8192, 128256, 131072, head_dim=64),
    ),
    "Llama-3.2-3B-Instruct": Real(
        "meta-llama/Llama-3.2-3B-Instruct",
        3_212_749_824,
        LLAMA_3_2 | shape(3072, 28, 24, 8, 8192, 128256, 131072, head_dim=128),
    ),
    "Llama-3.3-70B-Instruct": Real(
        "meta-llama/Llama-3.3-70B-Instruct", 70_553_706_496, LLAMA_3_1 | shape(8192, 80, 64, 8, 28672, 128256, 131072)
    ),
}

# --- Gemma -----------------------------------------------------------------------------------------------------------

# The 2B says "gelu" and means the tanh approximation, as every Gemma does.
GEMMA = family("gemma", "GemmaForCausalLM", rms_norm_eps=1e-6, rope_theta=10000.0, rope_scaling=None, pad_token_id=0)
GEMMA |= {"attention_bias": False, "attention_dropout": 0.0, "head_dim": 256}
GEMMA_2 = family("gemma2", "Gemma2ForCausalLM", rms_norm_eps=1e-6, rope_theta=10000.0, pad_token_id=0)
GEMMA_2 |= {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "cache_implementation": "hybrid",
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "sliding_window": 4096,
}


def gemma_3(**text) -> dict:
    """A multimodal Gemma 3: what its text part leaves out, its config class supplies."""
    return family("gemma3", "Gemma3ForConditionalGeneration") | {
        "boi_token_index": 255999,
        "eoi_token_index": 256000,
        "eos_token_id": [1, 106],
        "image_token_index": 262144,
        "mm_tokens_per_image": 256,
        "text_config": {
            "model_type": "gemma3_text",
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
            **text,
        },
        "vision_config": {
            "hidden_size": 1152,
            "image_size": 896,
            "intermediate_size": 4304,
            "model_type": "siglip_vision_model",
            "num_attention_heads": 16,
            "num_hidden_layers": 27,
            "patch_size": 14,
            "vision_use_head": False,
        },
    }


GEMMAS = {
    "gemma-2b-it": Real(
        "google/gemma-2b-it", 2_506_172_416, GEMMA | shape(2048, 18, 8, 1, 16384, 256000, 8192, hidden_act="gelu")
    ),
    "gemma-7b-it": Real(
        "google/gemma-7b-it",
        8_537_680_896,
        GEMMA
        | shape(3072, 28, 16, 16, 24576, 256000, 8192)
        | {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"},
    ),
    "gemma-2-2b-it": Real(
        "google/gemma-2-2b-it",
        2_614_341_888,
        GEMMA_2 | shape(2304, 26, 8, 4, 9216, 256000, 8192, head_dim=256, query_pre_attn_scalar=256),
    ),
    "gemma-2-9b-it": Real(
        "google/gemma-2-9b-it",
        9_241_705_984,
        GEMMA_2
        | shape(3584, 42, 16, 8, 14336, 256000, 8192, head_dim=256, query_pre_attn_scalar=256)
        | {"sliding_window_size": 4096},  # the same again
    ),
    "gemma-2-27b-it": Real(
        "google/gemma-2-27b-it",
        27_227_128_320,
        GEMMA_2
        | shape(4608, 46, 32, 16, 36864, 256000, 8192, head_dim=128, query_pre_attn_scalar=144)
        | {"sliding_window_size": 4096, "_attn_implementation": "eager"},
    ),
    "gemma-3-1b-it": Real(
        "google/gemma-3-1b-it",
        999_885_952,
        family("gemma3_text", "Gemma3ForCausalLM")
        | shape(1152, 26, 4, 1, 6912, 262144, 32768, head_dim=256, query_pre_attn_scalar=256)
        | {
            "attention_bias": False,
            "attention_dropout": 0.0,
            "attn_logit_softcapping": None,
            "bos_token_id": 2,
            "cache_implementation": "hybrid",
            "eos_token_id": [1, 106],
            "final_logit_softcapping": None,
            "hidden_activation": "gelu_pytorch_tanh",
            "pad_token_id": 0,
            "rms_norm_eps": 1e-6,
            "rope_local_base_freq": 10000,
            "rope_scaling": None,
            "rope_theta": 1000000,
            "sliding_window": 512,
            "sliding_window_pattern": 6,
        },
    ),
    # With the vision tower and its projector: 4,300,079,472, 12,187,325,040 and 27,432,406,640.
    "gemma-3-4b-it": Real(
        "google/gemma-3-4b-it",
        3_880_263_168,
        gemma_3(hidden_size=2560, intermediate_size=10240, num_hidden_layers=34),
    ),
    "gemma-3-12b-it": Real(
        "google/gemma-3-12b-it",
        11_766_034_176,
        gemma_3(
            hidden_size=3840,
            intermediate_size=15360,
            num_hidden_layers=48,
            num_attention_heads=16,
            num_key_value_heads=8,
        ),
    ),
    "gemma-3-27b-it": Real(
        "google/gemma-3-27b-it",
        27_009_346_304,
        gemma_3(
            hidden_size=5376,
            intermediate_size=21504,
            num_hidden_layers=62,
            num_attention_heads=32,
            num_key_value_heads=16,
            head_dim=128,
            query_pre_attn_scalar=168,
        ),
    ),
}

# --- Gemma 4 ---------------------------------------------------------------------------------------------------------


def gemma_4_text(hidden, layers, heads, kv_heads, mlp, context, every, window, **more) -> dict:
    """The text part of a Gemma 4. every: the layers between which others have a window."""
    return shape(hidden, layers, heads, kv_heads, mlp, 262144, context) | {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attention_k_eq_v": False,
        "enable_moe_block": False,
        "final_logit_softcapping": 30.0,
        "global_head_dim": 512,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size_per_layer_input": 0,
        "layer_types": ["sliding_attention" if (layer + 1) % every else "full_attention" for layer in range(layers)],
        "model_type": "gemma4_text",
        "moe_intermediate_size": None,
        "num_experts": None,
        "num_global_key_value_heads": None,
        "num_kv_shared_layers": 0,
        "pad_token_id": 0,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {
            "full_attention": {"partial_rotary_factor": 0.25, "rope_theta": 1000000.0, "rope_type": "proportional"},
            "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
        },
        "sliding_window": window,
        "tie_word_embeddings": True,
        "top_k_experts": None,
        "use_bidirectional_attention": None,
        "use_double_wide_mlp": False,
        "vocab_size_per_layer_input": 262144,
        **more,
    }


def gemma_4(text: dict) -> dict:
    """A multimodal Gemma 4 around its text part."""
    return family("gemma4", "Gemma4ForConditionalGeneration") | {
        "audio_config": None,
        "audio_token_id": 258881,
        "boa_token_id": 256000,
        "boi_token_id": 255999,
        "eoa_token_id": 258883,
        "eoa_token_index": 258883,
        "eoi_token_id": 258882,
        "eos_token_id": [1, 106],
        "image_token_id": 258880,
        "text_config": text,
        "tie_word_embeddings": True,
        "video_token_id": 258884,
        "vision_config": {"model_type": "gemma4_vision"},
        "vision_soft_tokens_per_image": 280,
    }


PER_LAYER = {"hidden_size_per_layer_input": 256}
LARGE = {"attention_k_eq_v": True, "use_bidirectional_attention": "vision"}
E2B = gemma_4_text(1536, 35, 8, 1, 6144, 131072, 5, 512, num_kv_shared_layers=20, use_double_wide_mlp=True, **PER_LAYER)
E4B = gemma_4_text(2560, 42, 8, 2, 10240, 131072, 6, 512, num_kv_shared_layers=18, **PER_LAYER)
GEMMA_4 = {
    "gemma-4-E4B-text": Real("google/gemma-4-E4B-it", 7_463_013_418, E4B | {"architectures": ["Gemma4ForCausalLM"]}),
    "gemma-4-12b-it": Real(
        "google/gemma-4-12B-it",
        11_907_350_320,
        gemma_4(gemma_4_text(3840, 48, 16, 8, 15360, 262144, 6, 1024, num_global_key_value_heads=1, **LARGE))
        | family("gemma4_unified", "Gemma4UnifiedForConditionalGeneration")
        | {"vision_config": {"model_type": "gemma4_unified_vision"}, "audio_config": {"audio_embed_dim": 640}},
    ),
    "gemma-4-E2B-it": Real("google/gemma-4-E2B-it", 4_628_569_379, gemma_4(E2B)),
    "gemma-4-31B-it": Real(
        "google/gemma-4-31B-it",
        30_697_345_340,
        gemma_4(gemma_4_text(5376, 60, 32, 16, 21504, 262144, 6, 1024, num_global_key_value_heads=4, **LARGE)),
    ),
    "gemma-4-26B-A4B-it": Real(
        "google/gemma-4-26B-A4B-it",
        25_233_141_790,
        gemma_4(
            gemma_4_text(
                2816,
                30,
                16,
                8,
                2112,
                262144,
                6,
                1024,
                num_global_key_value_heads=2,
                enable_moe_block=True,
                moe_intermediate_size=704,
                num_experts=128,
                top_k_experts=8,
                **LARGE,
            )
        ),
    ),
}
GEMMA_4["gemma-4-12b-it"].config["text_config"]["model_type"] = "gemma4_unified_text"

# --- Qwen 2, 2.5 and 3 -----------------------------------------------------------------------------------------------

# A window is given and switched off; the layers from max_window_layers on would have it.
QWEN_2 = family("qwen2", "Qwen2ForCausalLM", hidden_act="silu", attention_dropout=0.0, rms_norm_eps=1e-6)
QWEN_2 |= {"rope_theta": 1000000.0, "use_sliding_window": False, "tie_word_embeddings": False}
QWEN_3 = family("qwen3", "Qwen3ForCausalLM", hidden_act="silu", attention_bias=False, attention_dropout=0.0)
QWEN_3 |= {
    "head_dim": 128,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "use_sliding_window": False,
    "tie_word_embeddings": False,
}

QWENS = {
    "Qwen2-7B-Instruct": Real(
        "Qwen/Qwen2-7B-Instruct",
        7_615_616_512,
        QWEN_2 | shape(3584, 28, 28, 4, 18944, 152064, 32768, sliding_window=131072, max_window_layers=28),
    ),
    "Qwen2.5-0.5B-Instruct": Real(
        "Qwen/Qwen2.5-0.5B-Instruct",
        494_032_768,
        QWEN_2
        | shape(896, 24, 14, 2, 4864, 151936, 32768, sliding_window=32768, max_window_layers=21)
        | {"tie_word_embeddings": True},
    ),
    "Qwen2.5-7B-Instruct": Real(
        "Qwen/Qwen2.5-7B-Instruct",
        7_615_616_512,
        QWEN_2 | shape(3584, 28, 28, 4, 18944, 152064, 32768, sliding_window=131072, max_window_layers=28),
    ),
    "Qwen2.5-72B-Instruct": Real(
        "Qwen/Qwen2.5-72B-Instruct",
        72_706_203_648,
        QWEN_2 | shape(8192, 80, 64, 8, 29568, 152064, 32768, sliding_window=131072, max_window_layers=70),
    ),
    "Qwen3-0.6B": Real(
        "Qwen/Qwen3-0.6B",
        596_049_920,
        QWEN_3 | shape(1024, 28, 16, 8, 3072, 151936, 40960, max_window_layers=28, tie_word_embeddings=True),
    ),
    "Qwen3-8B": Real(
        "Qwen/Qwen3-8B", 8_190_735_360, QWEN_3 | shape(4096, 36, 32, 8, 12288, 151936, 40960, max_window_layers=36)
    ),
    "Qwen3-32B": Real(
        "Qwen/Qwen3-32B", 32_762_123_264, QWEN_3 | shape(5120, 64, 64, 8, 25600, 151936, 40960, max_window_layers=64)
    ),
}

# --- Mistral ---------------------------------------------------------------------------------------------------------

MISTRAL = family("mistral", "MistralForCausalLM", hidden_act="silu", attention_dropout=0.0, rms_norm_eps=1e-5)
MISTRAL |= {"tie_word_embeddings": False}

MISTRALS = {
    "Mistral-7B-Instruct-v0.1": Real(
        "mistralai/Mistral-7B-Instruct-v0.1",
        7_241_732_096,
        MISTRAL | shape(4096, 32, 32, 8, 14336, 32000, 32768, sliding_window=4096, rope_theta=10000.0),
    ),
    "Mistral-7B-Instruct-v0.3": Real(
        "mistralai/Mistral-7B-Instruct-v0.3",
        7_248_023_552,
        MISTRAL | shape(4096, 32, 32, 8, 14336, 32768, 32768, sliding_window=None, rope_theta=1000000.0),
    ),
    # 32 heads of 128 are less than its width of 5120.
    "Mistral-Nemo-Instruct-2407": Real(
        "mistralai/Mistral-Nemo-Instruct-2407",
        12_247_782_400,
        MISTRAL
        | shape(5120, 40, 32, 8, 14336, 131072, 131072, head_dim=128, sliding_window=None, rope_theta=1000000.0),
    ),
}

# --- Phi: fused projections, a window that is longer than the context or ends just short of it, longrope -------------

PHI_3 = family("phi3", "Phi3ForCausalLM", hidden_act="silu", attention_bias=False, attention_dropout=0.0)
PHI_3 |= {"embd_pdrop": 0.0, "resid_pdrop": 0.0, "rms_norm_eps": 1e-5, "rope_theta": 10000.0}
PHI_3 |= {
    "auto_map": {
        "AutoConfig": "configuration_phi3.Phi3Config",
        "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM",
    },
    "original_max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
# fmt: off
PHI_3_LONG = [
    1.0700000524520874, 1.1200000047683716, 1.149999976158142, 1.4199999570846558, 1.5699999332427979,
    1.7999999523162842, 2.129999876022339, 2.129999876022339, 3.009999990463257, 5.910000324249268, 6.950000286102295,
    9.070000648498535, 9.930000305175781, 10.710000038146973, 11.130000114440918, 14.609999656677246,
    15.409998893737793, 19.809999465942383, 37.279998779296875, 38.279998779296875, 38.599998474121094,
    40.12000274658203, 46.20000457763672, 50.940006256103516, 53.66000747680664, 54.9373893737793, 56.89738845825195,
    57.28738784790039, 59.98738479614258, 60.86738586425781, 60.887386322021484, 61.71739196777344, 62.91739273071289,
    62.957393646240234, 63.41739273071289, 63.8173942565918, 63.83739471435547, 63.897396087646484, 63.93739700317383,
    64.06739807128906, 64.11434936523438, 64.12435150146484, 64.15435028076172, 64.19435119628906, 64.24435424804688,
    64.57435607910156, 64.69000244140625, 64.76000213623047,
]
PHI_3_SHORT = [
    *[1.1] * 3, 1.3000000000000003, *[1.3500000000000003] * 2, 1.4000000000000004, 1.5500000000000005,
    *[2.000000000000001] * 17, *[2.0500000000000007] * 6, *[2.1000000000000005] * 2, 2.1500000000000004, *[2.25] * 5,
    2.3999999999999995, 2.4499999999999993, 2.499999999999999, *[2.6999999999999984] * 2, 2.7499999999999982,
    2.799999999999998, 2.8999999999999977, 3.049999999999997,
]
PHI_4_MINI_LONG = [
    1, 1.118320672, 1.250641126, 1.398617824, 1.564103225, 1.74916897, 1.956131817, 2.187582649, 2.446418898,
    2.735880826, 3.059592084, 3.421605075, 3.826451687, 4.279200023, 4.785517845, 5.351743533, 5.984965424,
    6.693110555, 7.485043894, 8.370679318, 9.36110372, 10.4687158, 11.70738129, 13.09260651, 14.64173252, 16.37415215,
    18.31155283, 20.47818807, 22.90118105, 25.61086418, 28.64115884, 32.03, 32.1, 32.13, 32.23, 32.6, 32.61, 32.64,
    32.66, 32.7, 32.71, 32.93, 32.97, 33.28, 33.49, 33.5, 44.16, 47.77,
]
# fmt: on

PHIS = {
    "Phi-3-mini-4k-instruct": Real(
        "microsoft/Phi-3-mini-4k-instruct",
        3_821_079_552,
        PHI_3 | shape(3072, 32, 32, 32, 8192, 32064, 4096, rope_scaling=None, sliding_window=2047),
    ),
    "Phi-3-mini-128k-instruct": Real(
        "microsoft/Phi-3-mini-128k-instruct",
        3_821_079_552,
        PHI_3
        | shape(3072, 32, 32, 32, 8192, 32064, 131072, sliding_window=262144)
        | {"rope_scaling": {"long_factor": PHI_3_LONG, "short_factor": PHI_3_SHORT, "type": "longrope"}},
    ),
    "phi-4": Real(
        "microsoft/phi-4",
        14_659_507_200,
        {key: value for key, value in PHI_3.items() if key != "auto_map"}
        | shape(5120, 40, 40, 10, 17920, 100352, 16384, rope_scaling=None, rope_theta=250000, sliding_window=None)
        | {"original_max_position_embeddings": 16384},
    ),
    # It rotates 96 of the 128 numbers of a head, so each list has 48 factors.
    "Phi-4-mini-instruct": Real(
        "microsoft/Phi-4-mini-instruct",
        3_836_021_760,
        PHI_3
        | shape(3072, 32, 24, 8, 8192, 200064, 131072, sliding_window=262144, partial_rotary_factor=0.75)
        | {"rope_scaling": {"long_factor": PHI_4_MINI_LONG, "short_factor": [1.0] * 48, "type": "longrope"}}
        | {"tie_word_embeddings": True, "mlp_bias": False, "lm_head_bias": False}
        | {"full_attn_mod": 1, "interpolate_factor": 1},  # nothing reads these two
    ),
}

# --- OLMo, Granite, GLM ----------------------------------------------------------------------------------------------

OLMO_2 = family("olmo2", "Olmo2ForCausalLM", hidden_act="silu", attention_bias=False, attention_dropout=0.0)
OLMO_2 |= {"rms_norm_eps": 1e-6, "rope_scaling": None, "rope_theta": 500000, "tie_word_embeddings": False}
GRANITE = family("granite", "GraniteForCausalLM", hidden_act="silu", attention_bias=False, attention_dropout=0.1)
GRANITE |= {
    "embedding_multiplier": 12.0,
    "mlp_bias": False,
    "residual_multiplier": 0.22,
    "rms_norm_eps": 1e-5,
    "rope_scaling": None,
    "tie_word_embeddings": True,
}
GLM = family("glm", "GlmForCausalLM", hidden_act="silu", attention_bias=True, attention_dropout=0.0, head_dim=128)
GLM |= {"pad_token_id": 151329, "tie_word_embeddings": False}
GLM |= shape(4096, 40, 32, 2, 13696, 151552, 131072)

OTHERS = {
    "OLMo-2-1124-7B-Instruct": Real(
        "allenai/OLMo-2-1124-7B-Instruct", 7_298_617_344, OLMO_2 | shape(4096, 32, 32, 32, 11008, 100352, 4096)
    ),
    "OLMo-2-1124-13B-Instruct": Real(
        "allenai/OLMo-2-1124-13B-Instruct", 13_716_198_400, OLMO_2 | shape(5120, 40, 40, 40, 13824, 100352, 4096)
    ),
    "granite-3.1-8b-instruct": Real(
        "ibm-granite/granite-3.1-8b-instruct",
        8_170_848_256,
        GRANITE
        | shape(4096, 40, 32, 8, 12800, 49155, 131072, rope_theta=10000000.0)
        | {"attention_multiplier": 0.0078125, "logits_scaling": 16.0},
    ),
    "granite-3.1-2b-instruct": Real(
        "ibm-granite/granite-3.1-2b-instruct",
        2_533_531_648,
        GRANITE
        | shape(2048, 40, 32, 8, 8192, 49155, 131072, rope_theta=5000000.0)
        | {"attention_multiplier": 0.015625, "logits_scaling": 8.0},
    ),
    # The older GLM leaves partial_rotary_factor to its class, which says one half.
    "glm-4-9b-chat-hf": Real(
        "zai-org/glm-4-9b-chat-hf", 9_399_951_360, GLM | {"rms_norm_eps": 1.5625e-07, "rope_theta": 5000000.0}
    ),
    "GLM-4-9B-0414": Real(
        "zai-org/GLM-4-9B-0414",
        9_400_279_040,
        GLM
        | {"model_type": "glm4", "architectures": ["Glm4ForCausalLM"], "partial_rotary_factor": 0.5}
        | {"max_position_embeddings": 32768, "rms_norm_eps": 1e-5, "rope_theta": 10000.0},
    ),
}

# --- Llama's relatives with windows or biases of their own ----------------------------------------------------------

OLMO_3_ROPE = {"attention_factor": 1.2079441541679836, "beta_fast": 32, "beta_slow": 1, "factor": 8.0}
OLMO_3_ROPE |= {"original_max_position_embeddings": 8192, "rope_type": "yarn"}
OLMO_3 = OLMO_2 | {"model_type": "olmo3", "architectures": ["Olmo3ForCausalLM"], "rope_scaling": OLMO_3_ROPE}
OLMO_3 |= {"sliding_window": 4096}
CWM_ROPE = LLAMA_3_1_ROPE | {"factor": 16.0}

RELATIVES = {
    "Olmo-3-7B-Instruct": Real(
        "allenai/Olmo-3-7B-Instruct",
        7_298_011_136,
        OLMO_3
        | shape(4096, 32, 32, 32, 11008, 100278, 65536)
        | {"layer_types": ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"] * 8},
    ),
    "Olmo-3.1-32B-Instruct": Real(
        "allenai/Olmo-3.1-32B-Instruct", 32_233_522_176, OLMO_3 | shape(5120, 64, 40, 8, 27648, 100278, 65536)
    ),
    "Seed-OSS-36B-Instruct": Real(
        "ByteDance-Seed/Seed-OSS-36B-Instruct",
        36_151_104_512,
        family("seed_oss", "SeedOssForCausalLM", hidden_act="silu", attention_bias=True, attention_out_bias=False)
        | shape(5120, 64, 80, 8, 27648, 155136, 524288, head_dim=128, rope_theta=10000000.0)
        | {
            "attention_dropout": 0.1,
            "mlp_bias": False,
            "residual_dropout": 0.1,
            "rms_norm_eps": 1e-6,
            "rope_scaling": {"rope_type": "default"},
            "tie_word_embeddings": False,
        },
    ),
    "ERNIE-4.5-0.3B-PT": Real(
        "baidu/ERNIE-4.5-0.3B-PT",
        360_748_032,
        family("ernie4_5", "Ernie4_5ForCausalLM", hidden_act="silu", head_dim=128, rms_norm_eps=1e-5)
        | shape(1024, 18, 16, 2, 3072, 103424, 131072, rope_theta=500000.0, tie_word_embeddings=True, use_bias=False),
    ),
    "cwm": Real(
        "facebook/cwm",
        32_581_097_472,
        family("cwm", "CwmForCausalLM", hidden_act="silu", head_dim=128, rms_norm_eps=1e-5, mlp_bias=False)
        | shape(6144, 64, 48, 8, 21504, 128256, 131072, rope_theta=1000000.0, rope_scaling=CWM_ROPE)
        | {"sliding_window": 8192, "tie_word_embeddings": False},
    ),
}

# --- Families in which some layers have no rope ----------------------------------------------------------------------

SMOLLM_3 = family("smollm3", "SmolLM3ForCausalLM", hidden_act="silu", attention_bias=False, attention_dropout=0.0)
SMOLLM_3 |= {
    "layer_types": ["full_attention"] * 36,
    "max_window_layers": 28,
    "mlp_bias": False,
    "no_rope_layer_interval": 4,
    "no_rope_layers": [1, 1, 1, 0] * 9,
    "pretraining_tp": 2,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 5000000.0,
    "sliding_window": None,
    "use_sliding_window": False,
}
EXAONE_4 = family("exaone4", "Exaone4ForCausalLM", hidden_act="silu", attention_dropout=0.0, rms_norm_eps=1e-5)
EXAONE_4 |= {"head_dim": 128, "rope_scaling": LLAMA_3_1_ROPE | {"factor": 16.0}, "rope_theta": 1000000}

ROPELESS = {
    "SmolLM3-3B": Real(
        "HuggingFaceTB/SmolLM3-3B", 3_075_098_624, SMOLLM_3 | shape(2048, 36, 16, 4, 11008, 128256, 65536)
    ),
    "EXAONE-4.0-1.2B": Real(
        "LGAI-EXAONE/EXAONE-4.0-1.2B",
        1_279_391_488,
        EXAONE_4
        | shape(2048, 30, 32, 8, 4096, 102400, 65536, head_dim=64, tie_word_embeddings=True)
        | {"layer_types": ["full_attention"] * 30, "sliding_window": None, "sliding_window_pattern": None},
    ),
    "EXAONE-4.0-32B": Real(
        "LGAI-EXAONE/EXAONE-4.0-32B",
        32_003_216_384,
        EXAONE_4
        | shape(5120, 64, 40, 8, 27392, 102400, 131072, tie_word_embeddings=False)
        | {
            "layer_types": (["sliding_attention"] * 3 + ["full_attention"]) * 16,
            "sliding_window": 4096,
            "sliding_window_pattern": "LLLG",
        },
    ),
}

COHERE = family("cohere", "CohereForCausalLM", hidden_act="silu", attention_bias=False, attention_dropout=0.0)
COHERE |= {"layer_norm_eps": 1e-5, "torch_dtype": "float16"}
COHERE_2 = COHERE | {"model_type": "cohere2", "architectures": ["Cohere2ForCausalLM"], "torch_dtype": "bfloat16"}
COHERE_2 |= {
    "cache_implementation": "hybrid",
    "head_dim": 128,
    "layer_switch": 4,
    "order_of_interleaved_layers": "local_attn_first",
    "position_embedding_type": "rope_gptj",
    "rope_scaling": None,
    "rope_theta": 50000,
    "rotary_pct": 1.0,
    "sliding_window": 4096,
    "sliding_window_pattern": 4,
    "use_embedding_sharing": True,
    "use_gated_activation": True,
    "use_parallel_block": True,
    "use_parallel_embedding": False,
}

COHERES = {
    "c4ai-command-r-v01": Real(
        "CohereLabs/c4ai-command-r-v01",
        34_980_831_232,
        COHERE
        | shape(8192, 40, 64, 64, 22528, 256000, 8192, logit_scale=0.0625, rope_theta=8000000.0)
        | {"model_max_length": 131072, "use_qk_norm": False},
    ),
    "c4ai-command-r-plus": Real(
        "CohereLabs/c4ai-command-r-plus",
        103_810_674_688,
        COHERE
        | shape(12288, 64, 96, 8, 33792, 256000, 131072, logit_scale=0.8333333333333334, rope_theta=75000000.0)
        | {"use_qk_norm": True},
    ),
    "aya-expanse-8b": Real(
        "CohereLabs/aya-expanse-8b",
        8_028_033_024,
        COHERE
        | shape(4096, 32, 32, 8, 14336, 256000, 8192, logit_scale=0.125, rope_theta=10000)
        | {"model_max_length": 8192, "use_qk_norm": False},
    ),
    "c4ai-command-r7b-12-2024": Real(
        "CohereLabs/c4ai-command-r7b-12-2024",
        8_028_033_024,
        COHERE_2 | shape(4096, 32, 32, 8, 14336, 256000, 132096, logit_scale=0.25),
    ),
    "c4ai-command-a-03-2025": Real(
        "CohereLabs/c4ai-command-a-03-2025",
        111_057_580_032,
        COHERE_2 | shape(12288, 64, 96, 8, 36864, 256000, 131072, logit_scale=0.25),
    ),
}
HUNYUAN = family("hunyuan_v1_dense", "HunYuanDenseV1ForCausalLM", hidden_act="silu", rms_norm_eps=1e-5)
HUNYUAN |= {
    "add_classification_head": False,
    "attention_bias": False,
    "attention_dropout": 0.1,
    "attention_head_dim": 128,
    "cla_share_factor": 2,
    "class_num": 0,
    "head_dim": 128,
    "mlp_bias": False,
    "norm_type": "rms",
    "pool_type": "last",
    "position_embedding_xdrope": False,
    "pretraining_tp": 1,
    "rope_scaling": {
        "alpha": 1000.0,
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 0.0,
        "type": "dynamic",
    },
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "use_cla": False,
    "use_qk_norm": True,
    "use_rotary_pos_emb": True,
}
HUNYUANS = {
    "Hunyuan-0.5B-Instruct": Real(
        "tencent/Hunyuan-0.5B-Instruct",
        539_010_048,
        HUNYUAN | shape(1024, 24, 16, 8, 3584, 120818, 262144),
    ),
    "Hunyuan-7B-Instruct": Real(
        "tencent/Hunyuan-7B-Instruct",
        7_504_568_320,
        HUNYUAN | shape(4096, 32, 32, 8, 14336, 128167, 262144, org_vocab_size=128167),
    ),
}

# --- Mixtures of experts ---------------------------------------------------------------------------------------------

MIXTRAL = family("mixtral", "MixtralForCausalLM", hidden_act="silu", attention_dropout=0.0, rms_norm_eps=1e-5)
MIXTRAL |= {
    "num_experts_per_tok": 2,
    "num_local_experts": 8,
    "output_router_logits": False,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
}
QWEN_3_MOE = QWEN_3 | {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"]}
QWEN_3_MOE |= {
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
}

QWEN_2_MOE = family("qwen2_moe", "Qwen2MoeForCausalLM", hidden_act="silu", attention_dropout=0.0, rms_norm_eps=1e-6)
QWEN_2_MOE |= {
    "decoder_sparse_step": 1,
    "norm_topk_prob": False,
    "output_router_logits": False,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.001,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
}
GLM_4_MOE = family("glm4_moe", "Glm4MoeForCausalLM", hidden_act="silu", attention_bias=True, attention_dropout=0.0)
GLM_4_MOE |= {
    "head_dim": 128,
    "n_group": 1,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_experts_per_tok": 8,
    "num_nextn_predict_layers": 1,
    "pad_token_id": 151329,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-5,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "tie_word_embeddings": False,
    "topk_group": 1,
}
GRANITE_MOE = GRANITE | {"model_type": "granitemoe", "architectures": ["GraniteMoeForCausalLM"]}
GRANITE_MOE |= {"attention_multiplier": 0.015625, "logits_scaling": 6.0, "num_experts_per_tok": 8}
GRANITE_MOE |= {"output_router_logits": False, "router_aux_loss_coef": 0.0, "rope_theta": 10000000.0}
del GRANITE_MOE["mlp_bias"]

GPT_OSS = family("gpt_oss", "GptOssForCausalLM", hidden_act="silu", attention_bias=True, attention_dropout=0.0)
GPT_OSS |= {
    "experts_per_token": 4,
    "head_dim": 64,
    "initial_context_length": 4096,
    "num_experts_per_tok": 4,
    "output_router_logits": False,
    "rms_norm_eps": 1e-5,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    },
    "rope_theta": 150000,
    "router_aux_loss_coef": 0.9,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
}
GPT_OSS |= {"layer_types": ["sliding_attention", "full_attention"] * 12}

MIXTURES = {
    "Qwen1.5-MoE-A2.7B-Chat": Real(
        "Qwen/Qwen1.5-MoE-A2.7B-Chat",
        14_315_784_192,
        QWEN_2_MOE
        | shape(2048, 24, 16, 16, 5632, 151936, 8192, sliding_window=32768, max_window_layers=21)
        | {"moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632}
        | {"num_experts": 60, "num_experts_per_tok": 4},
    ),
    "Qwen2-57B-A14B-Instruct": Real(
        "Qwen/Qwen2-57B-A14B-Instruct",
        57_408_658_944,
        QWEN_2_MOE
        | shape(3584, 28, 28, 4, 18944, 151936, 32768, sliding_window=65536, max_window_layers=28)
        | {"moe_intermediate_size": 2560, "shared_expert_intermediate_size": 20480}
        | {"num_experts": 64, "num_experts_per_tok": 8},
    ),
    # Both without the layer that guesses tokens ahead, which the hub counts and transformers does not load.
    "GLM-4.5": Real(
        "zai-org/GLM-4.5",
        352_797_829_024,
        GLM_4_MOE
        | shape(5120, 92, 96, 8, 12288, 151552, 131072, moe_intermediate_size=1536, n_routed_experts=160)
        | {"first_k_dense_replace": 3, "routed_scaling_factor": 2.5, "use_qk_norm": True},
    ),
    "GLM-4.5-Air": Real(
        "zai-org/GLM-4.5-Air",
        106_852_251_264,
        GLM_4_MOE
        | shape(4096, 46, 96, 8, 10944, 151552, 131072, moe_intermediate_size=1408, n_routed_experts=128)
        | {"first_k_dense_replace": 1, "routed_scaling_factor": 1.0, "use_qk_norm": False},
    ),
    "granite-3.1-1b-a400m-instruct": Real(
        "ibm-granite/granite-3.1-1b-a400m-instruct",
        1_334_628_352,
        GRANITE_MOE | shape(1024, 24, 16, 8, 512, 49155, 131072, num_local_experts=32),
    ),
    "granite-3.1-3b-a800m-instruct": Real(
        "ibm-granite/granite-3.1-3b-a800m-instruct",
        3_298_793_472,
        GRANITE_MOE | shape(1536, 32, 24, 8, 512, 49155, 131072, num_local_experts=40),
    ),
    "moe-7b-1b-active-shared-experts": Real(
        "ibm-research/moe-7b-1b-active-shared-experts",
        6_370_887_168,
        GRANITE_MOE
        | {"model_type": "granitemoeshared", "architectures": ["GraniteMoeSharedForCausalLM"]}
        | shape(1536, 40, 24, 8, 512, 49152, 4096, num_local_experts=62, shared_intermediate_size=1024),
    ),
    # Published in fp8; these are the numbers of its config without that.
    "MiniMax-M2": Real(
        "MiniMaxAI/MiniMax-M2",
        228_689_764_864,
        family("minimax_m2", "MiniMaxM2ForCausalLM", hidden_act="silu", attention_dropout=0.0)
        | shape(3072, 62, 48, 8, 1536, 200064, 196608, head_dim=128, rotary_dim=64)
        | {
            "attn_type_list": [1] * 62,
            "layernorm_full_attention_beta": 1.0,
            "layernorm_linear_attention_beta": 1.0,
            "layernorm_mlp_beta": 1.0,
            "mlp_intermediate_size": 8192,
            "mtp_transformer_layers": 1,
            "num_experts_per_tok": 8,
            "num_local_experts": 256,
            "num_mtp_modules": 3,
            "output_router_logits": False,
            "qk_norm_type": "per_layer",
            "rms_norm_eps": 1e-6,
            "rope_theta": 5000000,
            "router_aux_loss_coef": 0.001,
            "router_jitter_noise": 0.0,
            "scoring_func": "sigmoid",
            "shared_intermediate_size": 0,
            "shared_moe_mode": "sigmoid",
            "sliding_window": None,
            "tie_word_embeddings": False,
            "use_mtp": True,
            "use_qk_norm": True,
            "use_routing_bias": True,
        },
    ),
    "Mixtral-8x7B-Instruct-v0.1": Real(
        "mistralai/Mixtral-8x7B-Instruct-v0.1",
        46_702_792_704,
        MIXTRAL | shape(4096, 32, 32, 8, 14336, 32000, 32768, router_aux_loss_coef=0.02),
    ),
    "Mixtral-8x22B-Instruct-v0.1": Real(
        "mistralai/Mixtral-8x22B-Instruct-v0.1",
        140_630_071_296,
        MIXTRAL | shape(6144, 56, 48, 8, 16384, 32768, 65536, router_aux_loss_coef=0.001, router_jitter_noise=0.0),
    ),
    "Qwen3-30B-A3B": Real(
        "Qwen/Qwen3-30B-A3B",
        30_532_122_624,
        QWEN_3_MOE | shape(2048, 48, 32, 4, 6144, 151936, 40960, moe_intermediate_size=768, max_window_layers=48),
    ),
    "Qwen3-235B-A22B": Real(
        "Qwen/Qwen3-235B-A22B",
        235_093_634_560,
        QWEN_3_MOE | shape(4096, 94, 64, 4, 12288, 151936, 40960, moe_intermediate_size=1536, max_window_layers=94),
    ),
    "gpt-oss-20b": Real(
        "openai/gpt-oss-20b",
        20_914_757_184,
        GPT_OSS | shape(2880, 24, 64, 8, 2880, 201088, 131072, num_local_experts=32),
    ),
    "gpt-oss-120b": Real(
        "openai/gpt-oss-120b",
        116_829_156_672,
        GPT_OSS
        | shape(2880, 36, 64, 8, 2880, 201088, 131072, num_local_experts=128)
        | {"layer_types": ["sliding_attention", "full_attention"] * 18},
    ),
    "OLMoE-1B-7B-0924-Instruct": Real(
        "allenai/OLMoE-1B-7B-0924-Instruct",
        6_919_161_856,
        family("olmoe", "OlmoeForCausalLM", hidden_act="silu", attention_bias=False, attention_dropout=0.0)
        | shape(2048, 16, 16, 16, 1024, 50304, 4096)
        | {
            "clip_qkv": None,
            "norm_topk_prob": False,
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "output_router_logits": False,
            "rms_norm_eps": 1e-5,
            "rope_scaling": None,
            "rope_theta": 10000.0,
            "router_aux_loss_coef": 0.01,
            "tie_word_embeddings": False,
        },
    ),
}

# --- Text parts of multimodal models: the counts are without the vision tower and its projector ---------------------

MROPE = {"mrope_section": [16, 24, 24], "type": "mrope"}
QWEN_VL = family("qwen2_vl", "Qwen2VLForConditionalGeneration", hidden_act="silu", attention_dropout=0.0)
QWEN_VL |= {
    "image_token_id": 151655,
    "max_window_layers": 28,
    "rms_norm_eps": 1e-6,
    "rope_scaling": MROPE,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "video_token_id": 151656,
    "vision_config": {"hidden_size": 3584, "in_chans": 3, "spatial_patch_size": 14},
    "vision_end_token_id": 151653,
    "vision_start_token_id": 151652,
    "vision_token_id": 151654,
}
PIXTRAL = {"model_type": "pixtral", "hidden_size": 1024, "num_hidden_layers": 24, "patch_size": 14}
MISTRAL_3 = family("mistral3", "Mistral3ForConditionalGeneration") | {
    "image_token_index": 10,
    "multimodal_projector_bias": False,
    "projector_hidden_act": "gelu",
    "spatial_merge_size": 2,
    "vision_config": PIXTRAL,
    "vision_feature_layer": -1,
}
MINISTRAL_3 = shape(4096, 34, 32, 8, 14336, 131072, 262144, head_dim=128) | {
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "model_type": "ministral3",
    "rms_norm_eps": 1e-5,
    "rope_parameters": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 16.0,
        "llama_4_scaling_beta": 0.1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 16384,
        "rope_theta": 1000000.0,
        "rope_type": "yarn",
        "type": "yarn",
    },
    "sliding_window": None,
}

MULTIMODAL = {
    "Qwen2-VL-7B-Instruct": Real(
        "Qwen/Qwen2-VL-7B-Instruct", 7_615_616_512, QWEN_VL | shape(3584, 28, 28, 4, 18944, 152064, 32768)
    ),
    "Qwen2.5-VL-7B-Instruct": Real(
        "Qwen/Qwen2.5-VL-7B-Instruct",
        7_615_616_512,
        QWEN_VL
        | shape(3584, 28, 28, 4, 18944, 152064, 128000)
        | {"model_type": "qwen2_5_vl", "architectures": ["Qwen2_5_VLForConditionalGeneration"]},
    ),
    "Qwen3-VL-8B-Instruct": Real(
        "Qwen/Qwen3-VL-8B-Instruct",
        8_190_735_360,
        family("qwen3_vl", "Qwen3VLForConditionalGeneration")
        | {
            "image_token_id": 151655,
            "text_config": shape(4096, 36, 32, 8, 12288, 151936, 262144, head_dim=128)
            | {
                "attention_bias": False,
                "attention_dropout": 0.0,
                "dtype": "bfloat16",
                "hidden_act": "silu",
                "model_type": "qwen3_vl_text",
                "rms_norm_eps": 1e-6,
                "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
                "rope_theta": 5000000,
            },
            "tie_word_embeddings": False,
            "vision_config": {"depth": 27, "hidden_size": 1152, "model_type": "qwen3_vl", "out_hidden_size": 4096},
        },
    ),
    # It leaves out whether its embeddings are tied, and has an unembedding of its own.
    "Mistral-Small-3.1-24B-Instruct-2503": Real(
        "mistralai/Mistral-Small-3.1-24B-Instruct-2503",
        23_572_403_200,
        MISTRAL_3
        | {
            "text_config": shape(5120, 40, 32, 8, 32768, 131072, 131072, head_dim=128)
            | {
                "attention_dropout": 0.0,
                "hidden_act": "silu",
                "model_type": "mistral",
                "rms_norm_eps": 1e-5,
                "rope_theta": 1000000000.0,
                "sliding_window": None,
            }
        },
    ),
    "Ministral-3-8B-Instruct-2512": Real(
        "mistralai/Ministral-3-8B-Instruct-2512-BF16",
        8_489_553_920,
        MISTRAL_3 | {"text_config": MINISTRAL_3, "tie_word_embeddings": False},
    ),
    "Ministral-3-8B-Instruct-2512, text part": Real(
        "a copy of its text part", 8_489_553_920, MINISTRAL_3 | {"tie_word_embeddings": False}
    ),
}

# --- Latent attention: all without the layer that guesses tokens ahead, which the hub counts --------------------------


def latent(model_type, architecture, hidden, layers, heads, mlp, vocab, context, of_experts, experts, shared, **more):
    """Lists what configs of models with latent attention have; DeepSeek's own keys among them are those of its own code."""
    shared = family(model_type, architecture, hidden_act="silu", attention_bias=False, attention_dropout=0.0) | {
        "kv_lora_rank": 512,
        "moe_intermediate_size": of_experts,
        "n_routed_experts": experts,
        "n_shared_experts": shared,
        "pretraining_tp": 1,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "v_head_dim": 128,
    }
    return shared | shape(hidden, layers, heads, heads, mlp, vocab, context) | more


def stretched(factor, mscale, fast=32) -> dict:
    """DeepSeek's YaRN."""
    spec = {"beta_fast": fast, "beta_slow": 1, "factor": factor, "mscale": mscale, "mscale_all_dim": mscale}
    return spec | {"original_max_position_embeddings": 4096, "type": "yarn"}


OF_V2 = {"norm_topk_prob": False, "scoring_func": "softmax", "aux_loss_alpha": 0.001, "seq_aux": True}
OF_V2 |= {"moe_layer_freq": 1, "num_experts_per_tok": 6, "rope_scaling": stretched(40, 0.707), "rope_theta": 10000}
OF_V3 = {"norm_topk_prob": True, "scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1}
OF_V3 |= {"num_experts_per_tok": 8, "q_lora_rank": 1536}
LATENTS = {
    "DeepSeek-V2-Chat": Real(
        "deepseek-ai/DeepSeek-V2-Chat",
        235_741_434_880,
        latent("deepseek_v2", "DeepseekV2ForCausalLM", 5120, 60, 128, 12288, 102400, 163840, 1536, 160, 2)
        | OF_V2
        | {"ep_size": 1, "first_k_dense_replace": 1, "n_group": 8, "q_lora_rank": 1536, "routed_scaling_factor": 16.0}
        | {"topk_group": 3, "topk_method": "group_limited_greedy"},
    ),
    "DeepSeek-V2-Lite-Chat": Real(
        "deepseek-ai/DeepSeek-V2-Lite-Chat",
        15_706_484_224,
        latent("deepseek_v2", "DeepseekV2ForCausalLM", 2048, 27, 16, 10944, 102400, 163840, 1408, 64, 2)
        | OF_V2
        | {"first_k_dense_replace": 1, "n_group": 1, "q_lora_rank": None, "routed_scaling_factor": 1.0}
        | {"topk_group": 1, "topk_method": "greedy"},
    ),
    "Moonlight-16B-A3B-Instruct": Real(
        "moonshotai/Moonlight-16B-A3B-Instruct",
        15_960_110_208,
        latent("deepseek_v3", "DeepseekV3ForCausalLM", 2048, 27, 16, 11264, 163840, 8192, 1408, 64, 2)
        | OF_V3
        | {"aux_loss_alpha": 0.001, "ep_size": 1, "first_k_dense_replace": 1, "n_group": 1, "num_experts_per_tok": 6}
        | {"num_nextn_predict_layers": 0, "q_lora_rank": None, "rms_norm_eps": 1e-5, "rope_theta": 50000.0}
        | {"routed_scaling_factor": 2.446, "seq_aux": True, "topk_group": 1},
    ),
    # Published in fp8, as are the next; these are the numbers of its config without that.
    "DeepSeek-V3": Real(
        "deepseek-ai/DeepSeek-V3",
        671_026_419_200,
        latent("deepseek_v3", "DeepseekV3ForCausalLM", 7168, 61, 128, 18432, 129280, 163840, 2048, 256, 1)
        | OF_V3
        | {"ep_size": 1, "first_k_dense_replace": 3, "n_group": 8, "num_nextn_predict_layers": 1, "topk_group": 4}
        | {"rope_scaling": stretched(40, 1.0), "rope_theta": 10000, "routed_scaling_factor": 2.5},
    ),
    "Kimi-K2-Instruct": Real(
        "moonshotai/Kimi-K2-Instruct",
        1_026_408_232_448,
        latent("kimi_k2", "DeepseekV3ForCausalLM", 7168, 61, 64, 18432, 163840, 131072, 2048, 384, 1)
        | OF_V3
        | {"aux_loss_alpha": 0.001, "first_k_dense_replace": 1, "n_group": 1, "num_nextn_predict_layers": 0}
        | {"rope_scaling": stretched(32.0, 1.0, 1.0), "rope_theta": 50000.0, "routed_scaling_factor": 2.827}
        | {
            "auto_map": {
                "AutoConfig": "configuration_deepseek.DeepseekV3Config",
                "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM",
            },
            "seq_aux": True,
            "topk_group": 1,
        },
    ),
    # Its text part, published in int4.
    "Kimi-K2.5": Real(
        "moonshotai/Kimi-K2.5",
        1_026_408_232_448,
        family("kimi_k25", "KimiK25ForConditionalGeneration")
        | {
            "ignore_index": -100,
            "media_placeholder_token_id": 163605,
            "text_config": latent("kimi_k2", "DeepseekV3ForCausalLM", 7168, 61, 64, 18432, 163840, 262144, 2048, 384, 1)
            | OF_V3
            | {"aux_loss_alpha": 0.001, "ep_size": 1, "first_k_dense_replace": 1, "n_group": 1, "seq_aux": True}
            | {"num_nextn_predict_layers": 0, "rms_norm_eps": 1e-5, "rope_scaling": stretched(64.0, 1.0, 32.0)}
            | {"rope_theta": 50000.0, "routed_scaling_factor": 2.827, "topk_group": 1},
            "tie_word_embeddings": False,
            "use_unified_vision_chunk": True,
            "video_placeholder": "<|kimi_k25_video_placeholder|>",
            "vision_config": {"hidden_size": 1152, "patch_size": 14, "vt_num_hidden_layers": 27},
        },
    ),
    "GLM-4.7-Flash": Real(
        "zai-org/GLM-4.7-Flash",
        29_943_393_920,
        latent("glm4_moe_lite", "Glm4MoeLiteForCausalLM", 2048, 47, 20, 10240, 154880, 202752, 1536, 64, 1)
        | OF_V3
        | {"first_k_dense_replace": 1, "n_group": 1, "num_experts_per_tok": 4, "num_nextn_predict_layers": 1}
        | {"partial_rotary_factor": 1.0, "q_lora_rank": 768, "qk_nope_head_dim": 192, "rms_norm_eps": 1e-5}
        | {
            "rope_scaling": None,
            "rope_theta": 1000000,
            "routed_scaling_factor": 1.8,
            "topk_group": 1,
            "v_head_dim": 256,
        },
    ),
}

DELTA = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "full_attention_interval": 4,
    "head_dim": 256,
    "hidden_act": "silu",
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_value_head_dim": 128,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
DELTA_MIXTURE = DELTA | {
    "linear_num_value_heads": 32,
    "moe_intermediate_size": 512,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
    "shared_expert_intermediate_size": 512,
}
QWEN_3_5 = {
    "attn_output_gate": True,
    "dtype": "bfloat16",
    "mamba_ssm_dtype": "float32",
    "mtp_num_hidden_layers": 1,
    "mtp_use_dedicated_embeddings": False,
    "rope_parameters": {
        "mrope_interleaved": True,
        "mrope_section": [11, 11, 10],
        "partial_rotary_factor": 0.25,
        "rope_theta": 10000000,
        "rope_type": "default",
    },
}
QWEN_3_5_VISION = {"depth": 27, "hidden_size": 1152, "num_heads": 16, "patch_size": 16}


def qwen_3_5(model_type: str, text: dict) -> dict:
    """The config of a Qwen 3.5 around its text part, whose layers it lists."""
    count = text["num_hidden_layers"]
    types = ["full_attention" if (layer + 1) % 4 == 0 else "linear_attention" for layer in range(count)]
    name = "Qwen3_5MoeForConditionalGeneration" if "moe" in model_type else "Qwen3_5ForConditionalGeneration"
    return family(model_type, name, image_token_id=248056, video_token_id=248057, tie_word_embeddings=False) | {
        "text_config": text | {"layer_types": types, "model_type": f"{model_type}_text"},
        "vision_config": QWEN_3_5_VISION | {"model_type": model_type},
        "vision_end_token_id": 248054,
        "vision_start_token_id": 248053,
    }


QWEN_3_5_9B = QWEN_3_5 | DELTA | shape(4096, 32, 16, 4, 12288, 248320, 262144, linear_num_value_heads=32)
QWEN_3_6_27B = QWEN_3_5 | DELTA | shape(5120, 64, 24, 4, 17408, 248320, 262144, linear_num_value_heads=48)
QWEN_3_5_35B = QWEN_3_5 | DELTA_MIXTURE | shape(2048, 40, 16, 2, 0, 248320, 262144)
QWEN_3_5_35B |= {"num_experts": 256, "num_experts_per_tok": 8}
del QWEN_3_5_35B["intermediate_size"]
# Besides these parameters, all have a layer that guesses tokens ahead, and all but the first a vision part.
HYBRIDS = {
    "Qwen3-Next-80B-A3B-Instruct": Real(
        "Qwen/Qwen3-Next-80B-A3B-Instruct",
        79_674_391_296,
        family("qwen3_next", "Qwen3NextForCausalLM")
        | DELTA_MIXTURE
        | shape(2048, 48, 16, 2, 5120, 151936, 262144)
        | {"decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True, "num_experts": 512}
        | {"num_experts_per_tok": 10, "partial_rotary_factor": 0.25, "rope_scaling": None, "rope_theta": 10000000},
    ),
    "Qwen3.5-9B": Real("Qwen/Qwen3.5-9B", 8_953_803_264, qwen_3_5("qwen3_5", QWEN_3_5_9B)),
    "Qwen3.6-27B": Real(
        "Qwen/Qwen3.6-27B", 26_895_998_464, qwen_3_5("qwen3_5", QWEN_3_6_27B | {"output_gate_type": "swish"})
    ),
    "Qwen3.5-35B-A3B": Real("Qwen/Qwen3.5-35B-A3B", 34_660_610_688, qwen_3_5("qwen3_5_moe", QWEN_3_5_35B)),
    "Qwen3.5-9B, text part": Real(
        "a copy of its text part", 8_953_803_264, family("qwen3_5_text", "Qwen3_5ForCausalLM") | QWEN_3_5_9B
    ),
    "Qwen3.5-35B-A3B, text part": Real(
        "a copy of its text part", 34_660_610_688, family("qwen3_5_moe_text", "Qwen3_5MoeForCausalLM") | QWEN_3_5_35B
    ),
}
# --- Llama 4: the counts are without the vision tower, too; MobileLLM-R1 is the text model without experts --------------

LLAMA_4 = shape(5120, 48, 40, 8, 8192, 202048, 10485760) | {
    "attention_bias": False,
    "attention_chunk_size": 8192,
    "attention_dropout": 0.0,
    "attn_scale": 0.1,
    "attn_temperature_tuning": True,
    "floor_scale": 8192,
    "for_llm_compressor": False,
    "head_dim": 128,
    "hidden_act": "silu",
    "interleave_moe_layer_step": 1,
    "intermediate_size_mlp": 16384,
    "model_type": "llama4_text",
    "no_rope_layers": [],
    "num_experts_per_tok": 1,
    "num_local_experts": 16,
    "output_router_logits": False,
    "rms_norm_eps": 1e-5,
    "rope_scaling": {
        "factor": 16.0,
        "high_freq_factor": 1.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "router_aux_loss_coef": 0.001,
    "router_jitter_noise": 0.0,
    "use_qk_norm": True,
}
MAVERICK = {"interleave_moe_layer_step": 2, "max_position_embeddings": 1048576, "num_local_experts": 128}
MAVERICK |= {"rope_scaling": None, "use_qk_norm": False}
WHOLE_LLAMA_4 = family("llama4", "Llama4ForConditionalGeneration") | {
    "boi_token_index": 200080,
    "eoi_token_index": 200081,
    "image_token_index": 200092,
    "tie_word_embeddings": False,
    "vision_config": {"hidden_size": 1408, "image_size": 336, "model_type": "llama4_vision_model", "patch_size": 14},
}
LLAMA_4S = {
    "Llama-4-Scout-17B-16E-Instruct": Real(
        "meta-llama/Llama-4-Scout-17B-16E-Instruct", 107_769_861_120, WHOLE_LLAMA_4 | {"text_config": LLAMA_4}
    ),
    "Llama-4-Maverick-17B-128E-Instruct": Real(
        "meta-llama/Llama-4-Maverick-17B-128E-Instruct",
        400_711_848_960,
        WHOLE_LLAMA_4 | {"text_config": LLAMA_4 | MAVERICK},
    ),
    "MobileLLM-R1-950M": Real(
        "facebook/MobileLLM-R1-950M",
        949_685_760,
        LLAMA_4
        | shape(1536, 22, 24, 6, 6144, 128256, 32768, head_dim=64, intermediate_size_mlp=6144)
        | {"interleave_moe_layer_step": 0, "moe_layers": [], "num_local_experts": 0, "num_experts_per_tok": 0}
        | {"attn_temperature_tuning": False, "no_rope_layers": [1] * 22, "rope_scaling": None}
        | {"tie_word_embeddings": True},
    ),
}

# --- LFM2: the first ones name their layers with attention, later ones the kind of each layer -------------------------------

LFM_2 = family("lfm2", "Lfm2ForCausalLM") | {
    "block_auto_adjust_ff_dim": True,
    "block_ffn_dim_multiplier": 1.0,
    "block_mlp_init_scale": 1.0,
    "block_multiple_of": 256,
    "block_norm_eps": 1e-5,
    "block_out_init_scale": 1.0,
    "block_use_swiglu": True,
    "block_use_xavier_init": True,
    "conv_L_cache": 3,
    "conv_bias": False,
    "conv_use_xavier_init": True,
    "full_attn_idxs": [2, 5, 8, 10, 12, 14],
    "norm_eps": 1e-5,
    "rope_theta": 1000000.0,
    "use_pos_enc": True,
}


def lfm_2(hidden, heads, mlp, layers=16, width="block_ff_dim", **more) -> dict:
    """The config of an LFM2, with its sizes under their older names, too. width: what the MLP's is called."""
    found = LFM_2 | shape(hidden, layers, heads, 8, None, 65536, 128000, num_heads=heads)
    del found["intermediate_size"]
    return found | {"block_dim": hidden, "conv_dim": hidden, "conv_dim_out": hidden, width: mlp} | more


def lfm_types(attending: list[int], layers: int) -> list[str]:
    """The kind of each layer, of which these have attention."""
    return ["full_attention" if layer in attending else "conv" for layer in range(layers)]


LFM_2S = {
    "LFM2-350M": Real("LiquidAI/LFM2-350M", 354_483_968, lfm_2(1024, 16, 6656)),
    "LFM2-700M": Real("LiquidAI/LFM2-700M", 742_489_344, lfm_2(1536, 24, 10240)),
    "LFM2-2.6B": Real(
        "LiquidAI/LFM2-2.6B",
        2_569_272_320,
        lfm_2(2048, 32, 10752, 30, block_auto_adjust_ff_dim=False, full_attn_idxs=None)
        | {"layer_types": lfm_types([2, 5, 9, 12, 15, 18, 21, 24], 30), "tie_embedding": True},
    ),
    "LFM2.5-1.2B-Instruct": Real(
        "LiquidAI/LFM2.5-1.2B-Instruct",
        1_170_340_608,
        lfm_2(2048, 32, 12288, width="intermediate_size", full_attn_idxs=None)
        | {"layer_types": lfm_types([2, 5, 8, 10, 12, 14], 16), "tie_embedding": True},
    ),
    "LFM2-8B-A1B": Real(
        "LiquidAI/LFM2-8B-A1B",
        8_339_930_560,
        family("lfm2_moe", "Lfm2MoeForCausalLM")
        | shape(2048, 24, 32, 8, 7168, 65536, 128000, moe_intermediate_size=1792)
        | {
            "conv_L_cache": 3,
            "conv_bias": False,
            "layer_types": lfm_types([2, 6, 10, 14, 18, 21], 24),
            "norm_eps": 1e-5,
            "norm_topk_prob": True,
            "num_dense_layers": 2,
            "num_experts": 32,
            "num_experts_per_tok": 4,
            "rope_theta": 1000000.0,
            "routed_scaling_factor": 1.0,
            "tie_embedding": True,
            "use_expert_bias": True,
        },
    ),
}

REAL_MODELS = (
    QWEN_1
    | LLAMAS
    | GEMMAS
    | GEMMA_4
    | QWENS
    | MISTRALS
    | PHIS
    | OTHERS
    | RELATIVES
    | ROPELESS
    | COHERES
    | HUNYUANS
    | MULTIMODAL
    | MIXTURES
    | LATENTS
    | HYBRIDS
    | LLAMA_4S
    | LFM_2S
)

# --- Granite 4: state spaces and attention, with experts or without -------------------------------------------------

GRANITE_4 = GRANITE | {"model_type": "granitemoehybrid", "architectures": ["GraniteMoeHybridForCausalLM"]}
GRANITE_4 |= {
    "init_method": "mup",
    "mamba_chunk_size": 256,
    "mamba_conv_bias": True,
    "mamba_d_conv": 4,
    "mamba_d_state": 128,
    "mamba_expand": 2,
    "mamba_n_groups": 1,
    "mamba_proj_bias": False,
    "normalization_function": "rmsnorm",
    "output_router_logits": False,
    "position_embedding_type": "nope",
    "rope_theta": 10000,
    "router_aux_loss_coef": 0.0,
}
del GRANITE_4["mlp_bias"]


def granite_4(
    heads: int, head_dim: int, attention: tuple[int, ...], experts: int, chosen: int, shared: int, size: dict
):
    """A config of Granite 4: heads of its state spaces, the layers that attend, its experts, the MLP of all tokens."""
    types = ["attention" if layer in attention else "mamba" for layer in range(size["num_hidden_layers"])]
    return (
        GRANITE_4
        | size
        | {"mamba_n_heads": heads, "mamba_d_head": head_dim, "layer_types": types, "num_local_experts": experts}
        | {"num_experts_per_tok": chosen, "shared_intermediate_size": shared}
    )


TENTHS = (5, 15, 25, 35)
REAL_MODELS |= {
    "granite-4.0-micro": Real(
        "ibm-granite/granite-4.0-micro",
        3_402_836_480,
        granite_4(128, 40, tuple(range(40)), 0, 0, 8192, shape(2560, 40, 40, 8, 8192, 100352, 131072))
        | {"attention_multiplier": 0.015625, "logits_scaling": 10, "position_embedding_type": "rope"}
        | {"rope_theta": 10000000},
    ),
    "granite-4.0-h-micro": Real(
        "ibm-granite/granite-4.0-h-micro",
        3_191_396_096,
        granite_4(64, 64, TENTHS, 0, 0, 8192, shape(2048, 40, 32, 8, 8192, 100352, 131072))
        | {"attention_multiplier": 0.015625, "logits_scaling": 8},
    ),
    "granite-4.0-h-350m": Real(
        "ibm-granite/granite-4.0-h-350m",
        340_332_224,
        granite_4(48, 32, (10, 13, 17, 27), 0, 0, 2048, shape(768, 32, 12, 4, 2048, 100352, 32768))
        | {"attention_multiplier": 0.015625, "logits_scaling": 3},
    ),
    "granite-4.0-h-small": Real(
        "ibm-granite/granite-4.0-h-small",
        32_207_337_984,
        granite_4(128, 64, TENTHS, 72, 10, 1536, shape(4096, 40, 32, 8, 768, 100352, 131072))
        | {"attention_multiplier": 0.0078125, "logits_scaling": 16},
    ),
    "granite-4.0-h-tiny": Real(
        "ibm-granite/granite-4.0-h-tiny",
        6_939_037_248,
        granite_4(48, 64, TENTHS, 64, 6, 1024, shape(1536, 40, 12, 4, 512, 100352, 131072))
        | {"attention_multiplier": 0.0078125, "logits_scaling": 6},
    ),
}

# --- State spaces beside attention, and layers of one part ------------------------------------------------------------

NEMOTRON_H = family("nemotron_h", "NemotronHForCausalLM", chunk_size=128, conv_kernel=4, expand=2) | {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "head_dim": 128,
    "layer_norm_epsilon": 1e-5,
    "mamba_hidden_act": "silu",
    "mamba_proj_bias": False,
    "mlp_bias": False,
    "mlp_hidden_act": "relu2",
    "n_groups": 8,
    "num_logits_to_keep": 1,
    "rescale_prenorm_residual": True,
    "sliding_window": None,
    "ssm_state_size": 128,
    "tie_word_embeddings": False,
    "time_step_floor": 0.0001,
    "time_step_max": 0.1,
    "time_step_min": 0.001,
    "use_bias": False,
    "use_conv_bias": True,
    "use_mamba_kernels": True,
}
REAL_MODELS |= {
    "Falcon-H1-0.5B-Instruct": Real(
        "tiiuae/Falcon-H1-0.5B-Instruct",
        521_411_104,
        family("falcon_h1", "FalconH1ForCausalLM", hidden_act="silu", head_dim=64, rms_norm_eps=1e-5)
        | shape(1024, 36, 8, 2, 2048, 32784, 16384)
        | {
            "attention_bias": False,
            "attention_dropout": 0.0,
            "attention_in_multiplier": 1.0,
            "attention_out_multiplier": 0.9375,
            "attn_layer_indices": None,
            "embedding_multiplier": 5.656854249492381,
            "key_multiplier": 0.39062499999999994,
            "lm_head_multiplier": 0.0390625,
            "mamba_chunk_size": 128,
            "mamba_conv_bias": True,
            "mamba_d_conv": 4,
            "mamba_d_head": 64,
            "mamba_d_ssm": 1536,
            "mamba_d_state": 128,
            "mamba_expand": 2,
            "mamba_n_groups": 1,
            "mamba_n_heads": 24,
            "mamba_norm_before_gate": False,
            "mamba_proj_bias": False,
            "mamba_rms_norm": False,
            "mamba_use_mlp": True,
            "mlp_bias": False,
            "mlp_expansion_factor": 8,
            "mlp_multipliers": [0.8838834764831844, 0.5859375],
            "num_logits_to_keep": 1,
            "projectors_bias": False,
            "rope_scaling": None,
            "rope_theta": 100000000000.0,
            "ssm_in_multiplier": 1.25,
            "ssm_multipliers": [0.3535533905932738, 0.25, 0.3535533905932738, 0.5, 0.3535533905932738],
            "ssm_out_multiplier": 0.23570226039551587,
            "tie_word_embeddings": False,
        },
    ),
    "NVIDIA-Nemotron-Nano-9B-v2": Real(
        "nvidia/NVIDIA-Nemotron-Nano-9B-v2",
        8_888_227_328,
        NEMOTRON_H
        | shape(4480, 56, 40, 8, 15680, 131072, 131072, mamba_num_heads=128, mamba_head_dim=80)
        | {
            "hybrid_override_pattern": "M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-",
            "residual_in_fp32": False,
            "rms_norm_eps": 1e-5,
        },
    ),
    "NVIDIA-Nemotron-3-Nano-30B-A3B": Real(
        "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16",
        31_577_940_288,  # as published, and the constants that correct the router's choice
        NEMOTRON_H
        | shape(2688, 52, 32, 2, 1856, 131072, 262144, mamba_num_heads=64, mamba_head_dim=64)
        | {
            "hybrid_override_pattern": "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
            "mamba_ssm_cache_dtype": "float32",
            "moe_intermediate_size": 1856,
            "moe_shared_expert_intermediate_size": 3712,
            "n_group": 1,
            "n_routed_experts": 128,
            "n_shared_experts": 1,
            "norm_eps": 1e-5,
            "norm_topk_prob": True,
            "num_experts_per_tok": 6,
            "partial_rotary_factor": 1.0,
            "residual_in_fp32": False,
            "rope_theta": 10000,
            "routed_scaling_factor": 2.5,
            "topk_group": 1,
        },
    ),
}
