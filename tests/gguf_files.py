"""Writes tiny HF checkpoints as GGUF files, as llama.cpp's converter does, with the gguf library's names of tensors."""

import json
import math
import pathlib

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from safetensors.numpy import load_file, save_file

ARCHITECTURES = {
    "gemma3_text": "gemma3",
    "llama4_text": "llama4",
    "mistral": "llama",
    "mixtral": "llama",
    "falcon_h1": "falcon-h1",
    "qwen3_moe": "qwen3moe",
    "gpt_oss": "gpt-oss",
    "lfm2_moe": "lfm2moe",
    "granitemoehybrid": "granitehybrid",
    "qwen3_5_text": "qwen35",
    "qwen3_5_moe_text": "qwen35moe",
    "gemma4_text": "gemma4",
    "deepseek_v2": "deepseek2",
    "deepseek_v3": "deepseek2",
    "glm4_moe_lite": "deepseek2",
}
# Of HF names that the library's table lacks, as converters merge experts under these.
MERGED = {"w1": "ffn_gate_exps", "w2": "ffn_down_exps", "w3": "ffn_up_exps"}
MERGED |= {"gate_proj": "ffn_gate_exps", "down_proj": "ffn_down_exps", "up_proj": "ffn_up_exps"}
PLAIN = (Type.F32, Type.F16, Type.BF16)


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of queries or keys with the two halves of each head in turn."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def raw(values: np.ndarray, kind: Type) -> np.ndarray:
    """Returns what a tensor's bytes are as this type, of which NumPy makes its own numbers where it has them."""
    return (
        values.astype({Type.F32: np.float32, Type.F16: np.float16}[kind])
        if kind in PLAIN[:2]
        else gguf.quantize(values, kind)
    )


def write_gguf(
    folder: pathlib.Path, path: pathlib.Path, kind: Type = Type.F32, split: int = 0, **changes
) -> pathlib.Path:
    """Writes the checkpoint in `folder` as GGUF and returns the file. Its matrices are stored as `kind`, and those of the folder
    become what that type holds. split: tensors of a file, 0 for one file. changes: of metadata; None leaves a key out.
    """
    hf, weights = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    family = hf["model_type"]
    arch = ARCHITECTURES.get(family, family)
    if kinds := hf.get("layers_block_type") if family == "nemotron_h" else None:
        hf["num_hidden_layers"], arch = len(kinds), arch + "_moe" * ("moe" in kinds)
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(number, hf["num_hidden_layers"])
    writer = gguf.GGUFWriter(path, arch, split_max_tensors=split)
    metadata = settings(hf, arch) | tokenizer(folder) | {"general.type": "model", "general.name": path.stem} | changes
    for key, value in metadata.items():
        if value is not None and key != "general.architecture":
            add(writer, key, value)
    experts: dict[str, dict[int, np.ndarray]] = {}
    for name, weight in sorted(weights.items()):
        weight = weight.astype(np.float32)
        if family in ("gpt_oss", "llama4_text") and ".experts." in name:
            weights[name] = woven_experts(writer, name, weight, kind, family == "gpt_oss")
            continue
        if name.endswith("kv_b_proj.weight") and changes.get("deepseek2.attention.key_length_mla", 0) is not None:
            weights[name] = by_head(writer, hf, name, weight, kind)
            continue
        rows = weight.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] == 0
        stored = kind if weight.ndim > 1 and rows and "gate.weight" not in name and "router" not in name else Type.F32
        order = tiled(hf, name) if arch.startswith("qwen35") else None
        if order is not None:  # whose turns are taken before it is stored
            weight = weight[..., order] if "out_proj" in name else weight[order]
        if stored is not Type.F32:
            weight = gguf.dequantize(raw(weight, stored), stored)
            back = weight if order is None else np.empty_like(weight)
            if order is not None:
                back[(..., order) if "out_proj" in name else order] = weight
            weights[name] = back
        if (arch in ("llama", "granitehybrid") or family == "nemotron_h") and ("q_proj" in name or "k_proj" in name):
            weight = permuted(weight, hf["num_attention_heads" if "q_proj" in name else "num_key_value_heads"])
        shifted = arch in ("gemma", "gemma2", "gemma3", "qwen35", "qwen35moe") and "linear_attn.norm" not in name
        if shifted and name.endswith("norm.weight"):
            weight = weight + 1
        weight = weight.squeeze(1) if name.endswith(("conv.conv.weight", "conv1d.weight")) else weight
        name = name.replace("dt_bias", "dt_proj.bias")
        if name.endswith("A_log"):
            weight = -np.exp(weight)
        weight = folded(hf, name, weight) if family == "falcon_h1" else weight
        if family in ("granitemoehybrid", "nemotron_h", "falcon_h1") and name.endswith((".A_log", ".D")):
            weight = weight[:, None]
        if name.endswith("mamba.norm.weight"):
            weight = weight.reshape(hf["mamba_n_groups"], -1)
        if family == "nemotron_h" and name.endswith("mixer.norm.weight"):
            weight = weight.reshape(hf["n_groups"], -1)
        if name.endswith((".A_log", ".D")):
            writer.add_tensor(names.get_name(name), weight)
            continue
        if fused := halves(hf, name, weight):
            for part, half in fused.items():
                data = raw(half, stored)
                writer.add_tensor(part, data, raw_dtype=None if stored in PLAIN[:2] else stored)
            continue
        stem, ending = name.rsplit(".", 1)
        stem, ending = (name, "bias") if ending == "expert_bias" else (stem, ending)
        if arch == "gemma4" and (own := apart(name)):
            stem, ending = own
        if ending == "e_score_correction_bias":
            stem, ending = f"{stem}.e_score_correction", "bias"
        if ".experts." in name and arch != "gemma4":
            layer, expert, part = stem.split(".")[2], int(stem.split(".")[-2]), stem.split(".")[-1]
            experts.setdefault(f"blk.{layer}.{MERGED[part]}.weight", {})[expert] = raw(weight, stored)
            if len(experts[f"blk.{layer}.{MERGED[part]}.weight"]) < (experts_of(hf)):
                continue
            target = f"blk.{layer}.{MERGED[part]}.weight"
            data = np.stack([experts[target][i] for i in sorted(experts[target])])
        else:
            target = f"{names.get_name(name)}.weight" if ending == "sinks" else f"{names.get_name(stem)}.{ending}"
            target = names.get_name(name) if names.get_name(stem) is None and ending != "sinks" else target
            data = raw(weight, stored)
        writer.add_tensor(target, data, raw_dtype=None if stored in PLAIN[:2] else stored)
    for name, factors in rope_factors(hf).items():
        writer.add_tensor(name, np.asarray(factors, np.float32))
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path if not split else next(iter(sorted(path.parent.glob(f"{path.stem}-00001-of-*.gguf"))))


def tiled(hf: dict, name: str) -> np.ndarray | None:
    """The order in which the rows of a delta rule's tensor, or the columns of its output, are stored: value heads in turns."""
    keys, values, size = hf["linear_num_key_heads"], hf["linear_num_value_heads"], hf["linear_value_head_dim"]
    heads = np.arange(values).reshape(keys, -1).T.ravel()
    if ".linear_attn." not in name or name.endswith("norm.weight"):
        return None
    if name.endswith(("A_log", "dt_bias", "in_proj_a.weight", "in_proj_b.weight")):
        return heads
    rows = (heads[:, None] * size + np.arange(size)).ravel()
    before = 2 * keys * hf["linear_key_head_dim"] if "in_proj_qkv" in name or "conv1d" in name else 0
    return np.concatenate([np.arange(before), before + rows])


def halves(hf: dict, name: str, weight: np.ndarray) -> dict[str, np.ndarray]:
    """The tensors that Granite's gates and what they gate are kept apart in, of the MLP or of experts; none for others."""
    layer = name.split(".")[2] if name.startswith("model.layers.") else ""
    alone = "" if hf.get("num_local_experts") else "_"
    if name.endswith("shared_mlp.input_linear.weight"):
        kind = "" if alone else "_shexp"
        return {
            f"blk.{layer}.ffn_{part}{kind}.weight": half
            for part, half in zip(("gate", "up"), np.split(weight, 2), strict=True)
        }
    if name.endswith("shared_mlp.output_linear.weight") and alone:
        return {f"blk.{layer}.ffn_down.weight": weight}
    if name.endswith("block_sparse_moe.input_linear.weight"):
        parts = np.split(weight, 2, axis=1)
        return {f"blk.{layer}.ffn_{part}_exps.weight": half for part, half in zip(("gate", "up"), parts, strict=True)}
    if ".mlp.experts." in name and "gate_up_proj" in name:
        parts = np.split(weight, 2, axis=1)
        return {f"blk.{layer}.ffn_{part}_exps.weight": half for part, half in zip(("gate", "up"), parts, strict=True)}
    if ".mlp.shared_expert" in name:
        part = name.split(".")[-2].removesuffix("_proj")
        stem = "ffn_gate_inp_shexp" if "expert_gate" in name else f"ffn_{part}_shexp"
        return {f"blk.{layer}.{stem}.weight": weight}
    if name.endswith("mlp.gate.weight") and hf["model_type"].startswith("qwen3_5_moe"):
        return {f"blk.{layer}.ffn_gate_inp.weight": weight}
    return {}


def woven_experts(writer: gguf.GGUFWriter, name: str, weight: np.ndarray, kind: Type, turns: bool) -> np.ndarray:
    """Writes what gpt-oss and Llama 4 keep of all experts in one tensor, and returns what that becomes by its type.

    turns: whether gates and what they gate take turns.
    """
    weight, bias, parts = weight.copy(), name.endswith("_bias"), {}
    if "gate_up" in name:
        half = weight.shape[-1] // 2
        cuts = (slice(0, None, 2), slice(1, None, 2)) if turns else (slice(half), slice(half, None))
        parts = {part: weight[..., cut] for part, cut in zip(("gate", "up"), cuts, strict=True)}
    parts = parts or {"down": weight}
    for part, view in parts.items():
        matrix = np.ascontiguousarray(view if bias else view.swapaxes(1, 2))
        target = f"blk.{name.split('.')[2]}.ffn_{part}_exps"
        if bias:
            writer.add_tensor(f"{target}.bias", matrix)
            continue
        data = raw(matrix, kind)
        writer.add_tensor(f"{target}.weight", data, raw_dtype=None if kind in PLAIN[:2] else kind)
        view[...] = gguf.dequantize(data, kind).reshape(matrix.shape).swapaxes(1, 2)
    return weight


def add(writer: gguf.GGUFWriter, key: str, value) -> None:
    """Adds metadata of the type that a value of Python suggests."""
    kinds = {bool: "bool", int: "uint32", float: "float32", str: "string", list: "array"}
    getattr(writer, f"add_{kinds[type(value)]}")(key, value)


def settings(hf: dict, arch: str) -> dict:
    """The metadata of an HF config, as the converter of each architecture writes it."""
    head_dim = hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"]
    ropes = hf.get("rope_parameters") or {}
    rope = ropes.get("full_attention", ropes)
    found = {
        "context_length": hf["max_position_embeddings"],
        "embedding_length": hf["hidden_size"],
        "block_count": hf["num_hidden_layers"],
        "feed_forward_length": width_of(hf),
        "attention.head_count": hf["num_attention_heads"],
        "attention.head_count_kv": hf["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": float(
            hf.get("rms_norm_eps") or hf.get("norm_eps") or hf["layer_norm_epsilon"]
        ),
        "rope.freq_base": float(rope.get("rope_theta", 10000.0)),
    }
    if arch != "phi3":
        found |= {"attention.key_length": head_dim, "attention.value_length": head_dim}
    if arch in ("llama", "phi3"):
        found["rope.dimension_count"] = int(head_dim * rope.get("partial_rotary_factor", 1.0))
    if rope.get("rope_type") in ("linear", "yarn"):
        found |= {"rope.scaling.type": rope["rope_type"], "rope.scaling.factor": float(rope["factor"])}
    if rope.get("rope_type") == "yarn":
        found["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
    if rope.get("rope_type") == "longrope":
        grown = hf["max_position_embeddings"] / hf["original_max_position_embeddings"]
        attention = math.sqrt(1 + math.log(grown) / math.log(hf["original_max_position_embeddings"]))
        found |= {"rope.scaling.attn_factor": attention}
    if arch == "phi3":
        found |= {"rope.scaling.original_context_length": hf["original_max_position_embeddings"]}
    if "sliding_attention" in ropes:
        found["rope.freq_base_swa"] = float(ropes["sliding_attention"]["rope_theta"])
    if hf.get("sliding_window") and not arch.startswith("qwen"):
        found["attention.sliding_window"] = hf["sliding_window"]
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if arch == "gemma2" or hf.get(key):
            found |= {key: float(hf[key])} if arch.startswith("gemma") else {}
    if experts := experts_of(hf):
        found |= {"expert_count": experts, "expert_used_count": hf.get("num_experts_per_tok") or hf["top_k_experts"]}
    if arch == "gpt-oss":
        found["expert_feed_forward_length"] = hf["intermediate_size"]
    if hf.get("moe_intermediate_size"):
        found["expert_feed_forward_length"] = hf["moe_intermediate_size"]
    if arch.startswith("lfm2"):
        heads = [hf["num_key_value_heads"] * (kind == "full_attention") for kind in hf["layer_types"]]
        found |= {"attention.head_count_kv": heads, "shortconv.l_cache": hf["conv_L_cache"]}
    if arch == "falcon-h1":
        inner = hf["mamba_d_ssm"] or hf["mamba_expand"] * hf["hidden_size"]
        found |= {"ssm.state_size": hf["mamba_d_state"], "ssm.group_count": hf["mamba_n_groups"]}
        found |= {
            "ssm.inner_size": inner,
            "ssm.time_step_rank": hf["mamba_n_heads"],
            "ssm.conv_kernel": hf["mamba_d_conv"],
        }
    if arch == "granitehybrid":
        heads = [hf["num_key_value_heads"] * (kind in ("attention", "full_attention")) for kind in hf["layer_types"]]
        found |= {"attention.head_count_kv": heads, "expert_shared_feed_forward_length": hf["shared_intermediate_size"]}
        names = {"attention.scale": "attention", "embedding_scale": "embedding", "residual_scale": "residual"}
        found |= {key: float(hf[f"{name}_multiplier"]) for key, name in names.items()}
        found |= {"logit_scale": float(hf["logits_scaling"]), "ssm.conv_kernel": hf["mamba_d_conv"]}
        found |= {"ssm.state_size": hf["mamba_d_state"], "ssm.group_count": hf["mamba_n_groups"]}
        found |= {"ssm.inner_size": hf["mamba_n_heads"] * hf["mamba_d_head"], "ssm.time_step_rank": hf["mamba_n_heads"]}
        found["rope.scaling.finetuned"] = hf["position_embedding_type"] == "rope"
    if arch.startswith("qwen35"):
        values, share = hf["linear_num_value_heads"], rope["partial_rotary_factor"]
        found |= {"ssm.conv_kernel": hf["linear_conv_kernel_dim"], "ssm.state_size": hf["linear_key_head_dim"]}
        found |= {"ssm.group_count": hf["linear_num_key_heads"], "ssm.time_step_rank": values}
        found |= {"ssm.inner_size": values * hf["linear_value_head_dim"], "full_attention_interval": 4}
        found |= {"rope.dimension_count": int(head_dim * share), "rope.dimension_sections": [1, 1, 2, 0]}
        if "shared_expert_intermediate_size" in hf:
            found["expert_shared_feed_forward_length"] = hf["shared_expert_intermediate_size"]
    if arch.startswith("nemotron_h"):
        found = only_parts(hf, found)
    if arch == "llama4":
        found |= {"feed_forward_length": hf["intermediate_size_mlp"], "rope.dimension_count": head_dim}
        found |= {"expert_feed_forward_length": hf["intermediate_size"]}
        found |= {"interleave_moe_layer_step": hf["interleave_moe_layer_step"]}
    if arch == "gemma4":
        found |= both_kinds(hf, head_dim)
    if arch == "deepseek2":
        found |= latent(hf, rope)
    if arch == "lfm2moe":
        found |= {"leading_dense_block_count": hf["num_dense_layers"], "expert_gating_func": 2}
    return {f"{arch}.{key}": value for key, value in found.items()}


def experts_of(hf: dict) -> int | None:
    """The number of experts, which goes by several names."""
    return hf.get("num_experts") or hf.get("num_local_experts") or hf.get("n_routed_experts")


def apart(name: str) -> tuple[str, str] | None:
    """The name in the library's table, and the ending, of Gemma 4's tensors that are no weights by name."""
    layer = name.split(".")[2]
    scales = {"router.scale": "ffn_gate_inp", "router.per_expert_scale": "ffn_down_exps"}
    for ending, target in scales.items():
        if name.endswith(ending):
            return f"blk.{layer}.{target}", "scale"
    return None if name.endswith((".weight", ".bias")) else (name, "weight")


def both_kinds(hf: dict, head_dim: int) -> dict:
    """The metadata of Gemma 4, whose layers of two kinds differ in their heads."""
    count, sliding = hf["num_hidden_layers"], [kind == "sliding_attention" for kind in hf["layer_types"]]
    own, shared = hf["per_layer_config"], hf["num_kv_shared_layers"]
    full = next(iter(own.values()))
    kv = [hf["num_key_value_heads"] if one else full.get("num_key_value_heads") for one in sliding]
    found = {"attention.shared_kv_layers": shared, "attention.sliding_window_pattern": sliding}
    found |= {"attention.key_length": full["head_dim"], "attention.value_length": full["head_dim"]}
    found |= {"attention.key_length_swa": head_dim, "attention.value_length_swa": head_dim}
    found |= {"rope.dimension_count": full["head_dim"], "rope.dimension_count_swa": head_dim}
    found |= {"attention.head_count_kv": kv} if None not in kv else {}
    found |= {"embedding_length_per_layer_input": hf["hidden_size_per_layer_input"]}
    if hf["use_double_wide_mlp"]:
        found["feed_forward_length"] = [
            hf["intermediate_size"] * (1 + (layer >= count - shared)) for layer in range(count)
        ]
    return found


def only_parts(hf: dict, found: dict) -> dict:
    """The metadata of Nemotron-H, each of whose layers is one part. found: what it has in common with others."""
    kinds, heads = hf["layers_block_type"], hf["mamba_num_heads"]
    experts = "moe" in kinds
    width = hf["moe_intermediate_size" if experts else "intermediate_size"]
    found = {key: value for key, value in found.items() if experts or not key.startswith("expert_")}
    found |= {"feed_forward_length": [width * (kind == ("moe" if experts else "mlp")) for kind in kinds]}
    found |= {"attention.head_count_kv": [hf["num_key_value_heads"] * (kind == "full_attention") for kind in kinds]}
    found |= {"ssm.conv_kernel": hf["conv_kernel"], "ssm.state_size": hf["ssm_state_size"]}
    found |= {"ssm.group_count": hf["n_groups"], "ssm.inner_size": heads * hf["mamba_head_dim"]}
    found |= {"ssm.time_step_rank": heads, "rope.dimension_count": hf["head_dim"]}
    if experts:
        found |= {"expert_shared_feed_forward_length": hf["moe_shared_expert_intermediate_size"]}
        found |= {"expert_shared_count": 1, "expert_weights_norm": hf["norm_topk_prob"]}
        found |= {"expert_weights_scale": hf["routed_scaling_factor"], "moe_latent_size": hf["moe_latent_size"] or 0}
        found |= {"expert_group_count": hf["n_group"], "expert_group_used_count": hf["topk_group"]}
    return found


def folded(hf: dict, name: str, weight: np.ndarray) -> np.ndarray:
    """A weight of Falcon-H1 times the multipliers beside it."""
    reads, inner = hf["attention_in_multiplier"], hf["mamba_d_ssm"] or hf["mamba_expand"] * hf["hidden_size"]
    gate, down = hf["mlp_multipliers"]
    factors = {"gate_proj": gate, "down_proj": down, "k_proj": hf["key_multiplier"] * reads, "q_proj": reads}
    factors |= {"v_proj": reads, "o_proj": hf["attention_out_multiplier"], "out_proj": hf["ssm_out_multiplier"]}
    factors |= {"lm_head": hf["lm_head_multiplier"], "embed_tokens": hf["embedding_multiplier"]}
    if "in_proj" in name:
        state = hf["mamba_n_groups"] * hf["mamba_d_state"]
        sizes = [inner, inner, state, state, len(weight) - 2 * (inner + state)]
        return weight * hf["ssm_in_multiplier"] * np.float32(np.repeat(hf["ssm_multipliers"], sizes))[:, None]
    return weight * np.float32(factors.get(name.split(".")[-2], 1.0))


def latent(hf: dict, rope: dict) -> dict:
    """The metadata of latent attention, in which all heads share one."""
    rank, turned, plain = hf["kv_lora_rank"], hf["qk_rope_head_dim"], hf["qk_nope_head_dim"]
    found = {"attention.head_count_kv": 1, "attention.kv_lora_rank": rank, "attention.q_lora_rank": hf["q_lora_rank"]}
    found |= {"attention.key_length": rank + turned, "attention.value_length": rank, "rope.dimension_count": turned}
    found |= {"attention.key_length_mla": plain + turned, "attention.value_length_mla": hf["v_head_dim"]}
    dense = [kind == "dense" for kind in hf.get("mlp_layer_types", ())]
    found |= {"leading_dense_block_count": sum(dense) if dense else hf["first_k_dense_replace"]}
    found |= {"expert_group_count": hf["n_group"], "expert_group_used_count": hf["topk_group"]}
    found |= {"expert_shared_count": hf["n_shared_experts"], "expert_weights_scale": hf["routed_scaling_factor"]}
    if hf["model_type"] == "deepseek_v3":
        found |= {"expert_gating_func": 2, "expert_weights_norm": hf["norm_topk_prob"]}
    if hf["model_type"] == "glm4_moe_lite":
        found |= {"expert_weights_norm": True}
    if rope.get("mscale_all_dim"):
        found["rope.scaling.yarn_log_multiplier"] = 0.1 * rope["mscale_all_dim"]
    return {key: value for key, value in found.items() if value is not None}


def by_head(writer: gguf.GGUFWriter, hf: dict, name: str, weight: np.ndarray, kind: Type) -> np.ndarray:
    """Writes what makes keys and values of latents as two tensors, and returns what that becomes by its type."""
    heads, plain, layer = hf["num_attention_heads"], hf["qk_nope_head_dim"], name.split(".")[2]
    whole = weight.reshape(heads, -1, weight.shape[-1]).copy()
    for part, view in {"k": whole[:, :plain].swapaxes(1, 2), "v": whole[:, plain:]}.items():
        stored = kind if view.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] == 0 else Type.F32
        data = raw(np.ascontiguousarray(view), stored)
        target = f"blk.{layer}.attn_{part}_b.weight"
        writer.add_tensor(target, data, raw_dtype=None if stored in PLAIN[:2] else stored)
        view[...] = gguf.dequantize(data, stored).reshape(view.shape)
    return whole.reshape(weight.shape)


def width_of(hf: dict) -> int:
    """The width of an MLP, which LFM2's configs say in a roundabout way."""
    width, multiple = hf["intermediate_size"], hf.get("block_multiple_of", 1)
    if hf.get("block_auto_adjust_ff_dim"):
        width = multiple * math.ceil(int(hf["block_ffn_dim_multiplier"] * int(2 * width / 3)) / multiple)
    return width


def rope_factors(hf: dict) -> dict[str, list[float]]:
    """The tensors that slow rotated pairs down, which Llama 3 and LongRoPE have."""
    ropes = hf.get("rope_parameters") or {}
    if ropes.get("rope_type") == "longrope":
        return {f"rope_factors_{kind}.weight": ropes[f"{kind}_factor"] for kind in ("short", "long")}
    if (rope := ropes.get("full_attention", {})).get("rope_type") == "proportional":
        width = next(iter(hf["per_layer_config"].values()))["head_dim"]
        turned = int(width * rope["partial_rotary_factor"] / 2)
        return {"rope_freqs.weight": [1.0] * turned + [1e30] * (width // 2 - turned)}
    if ropes.get("rope_type") != "llama3":
        return {}
    dim, span, factors = hf["head_dim"], ropes["original_max_position_embeddings"], []
    for i in range(0, dim, 2):
        length = 2 * math.pi * ropes["rope_theta"] ** (i / dim)
        low, high = ropes["low_freq_factor"], ropes["high_freq_factor"]
        between = (span / length - low) / (high - low) if high > low else float(span / length > low)
        smooth = min(max(between, 0), 1)
        factors.append(1 / ((1 - smooth) / ropes["factor"] + smooth))
    return {"rope_freqs.weight": factors}


def tokenizer(folder: pathlib.Path, pre: str = "llama-bpe") -> dict:
    """The metadata of a byte-level tokenizer."""
    whole = json.loads((folder / "tokenizer.json").read_text())
    added = {entry["content"]: entry for entry in whole["added_tokens"]}
    ids = whole["model"]["vocab"] | {text: entry["id"] for text, entry in added.items()}
    tokens = sorted(ids, key=ids.get)
    named = json.loads((folder / "tokenizer_config.json").read_text())
    template = folder / "chat_template.jinja"
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in whole["model"]["merges"]]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [(3 if added[t]["special"] else 4) if t in added else 1 for t in tokens],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": ids[named["bos_token"]],
        "tokenizer.ggml.eos_token_id": ids[named["eos_token"]],
        "tokenizer.ggml.padding_token_id": ids[named["pad_token"]],
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": template.read_text() if template.is_file() else None,
    }
