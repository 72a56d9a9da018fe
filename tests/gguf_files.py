"""Writes tiny HF checkpoints as GGUF files, as llama.cpp's converter does, with the gguf library's names of tensors."""

import json
import pathlib

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf_settings import experts_of, rope_factors, settings
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


def apart(name: str) -> tuple[str, str] | None:
    """The name in the library's table, and the ending, of Gemma 4's tensors that are no weights by name."""
    layer = name.split(".")[2]
    scales = {"router.scale": "ffn_gate_inp", "router.per_expert_scale": "ffn_down_exps"}
    for ending, target in scales.items():
        if name.endswith(ending):
            return f"blk.{layer}.{target}", "scale"
    return None if name.endswith((".weight", ".bias")) else (name, "weight")


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
