"""Makes checkpoints from a real one: edited in the ways of several tools, stored in several ways, and changed harmlessly.

The edits are written here from their description, with NumPy on the bytes of safetensors files, and share no code with the
package, so that its audit is tried on others' work. One tensor is in memory at a time.
"""

import dataclasses
import json
import pathlib
import re
import shutil
import struct
from collections.abc import Callable

import ml_dtypes
import numpy as np

LAYER = re.compile(r"model\.layers\.(\d+)\.(self_attn\.o_proj|mlp\.down_proj)\.weight")
MATRIX = re.compile(r"model\.layers\.\d+\.(self_attn|mlp)\.\w+\.weight")
EMBED = "model.embed_tokens.weight"
DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
Change = Callable[[str, np.ndarray], np.ndarray]  # of a tensor's name and its values in float32


def header(path: pathlib.Path) -> tuple[dict, int]:
    """Returns the tensors of a safetensors file as its header lists them, and where their bytes begin."""
    with open(path, "rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        found = json.loads(file.read(size))
    found.pop("__metadata__", None)
    return found, size + 8


def read(path: pathlib.Path, name: str, entry: dict, start: int) -> np.ndarray:
    """Returns a tensor in float32."""
    begin, end = entry["data_offsets"]
    values = np.fromfile(path, np.uint8, end - begin, offset=start + begin).view(DTYPES[entry["dtype"]])
    return values.reshape(entry["shape"]).astype(np.float32)


def shapes(folder: pathlib.Path) -> dict[str, list[int]]:
    """Returns the shape of every tensor of a checkpoint, by name."""
    return {
        name: one["shape"] for path in sorted(folder.glob("*.safetensors")) for name, one in header(path)[0].items()
    }


def rewrite(source: pathlib.Path, target: pathlib.Path, change: Change, dtype: str = "BF16") -> None:
    """Writes a copy of a checkpoint whose tensors are changed, in another dtype."""
    target.mkdir(parents=True)
    for path in source.iterdir():
        if path.suffix != ".safetensors" and path.is_file():
            shutil.copyfile(path, target / path.name)
    config = json.loads((source / "config.json").read_text())
    named = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}[dtype]
    config |= {key: named for key in ("dtype", "torch_dtype") if key in config}
    (target / "config.json").write_text(json.dumps(config))
    for path in source.glob("*.safetensors"):
        tensors, start = header(path)
        out, at = {}, 0
        for name, entry in tensors.items():
            size = int(np.prod(entry["shape"])) * np.dtype(DTYPES[dtype]).itemsize
            out[name] = {"dtype": dtype, "shape": entry["shape"], "data_offsets": [at, at + size]}
            at += size
        text = json.dumps({"__metadata__": {"format": "pt"}} | out).encode()
        text += b" " * (-len(text) % 8)
        with open(target / path.name, "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for name, entry in tensors.items():
                values = change(name, read(path, name, entry, start))
                file.write(np.ascontiguousarray(values.astype(DTYPES[dtype])).tobytes())


def unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector)


def place(name: str) -> tuple[int, str] | None:
    """Returns the layer of a matrix that writes to the residual stream, and "o" or "down"."""
    found = LAYER.fullmatch(name)
    return (int(found[1]), "o" if "o_proj" in found[2] else "down") if found else None


def kept(name: str, values: np.ndarray) -> np.ndarray:
    """The change that changes nothing."""
    return values


def projected(direction_d: np.ndarray, strength: Callable[[int, str], float], embedding: float = 0.0) -> Change:
    """Removes a share of a direction from what each writer writes. strength: of a layer and "o" or "down"."""
    u = unit(direction_d.astype(np.float64)).astype(np.float32)

    def change(name, values):
        where = place(name)
        if where is not None:
            values = values - strength(*where) * np.outer(u, u @ values)
        elif name == EMBED and embedding:
            values = values - embedding * np.outer(values @ u, u)
        return values

    return change


def row_normed(direction_d: np.ndarray, strength: Callable[[int, str], float], rank: int = 0) -> Change:
    """Removes a share of a direction from writers whose rows have been scaled to length 1, scales the rows of the result to
    length 1 again, and gives them their old lengths. rank: of the truncated change that is added instead, 0 for all of it."""
    u = unit(direction_d.astype(np.float64)).astype(np.float32)

    def change(name, values):
        where = place(name)
        w = strength(*where) if where is not None else 0.0
        if not w:
            return values
        lengths = np.linalg.norm(values, axis=1, keepdims=True)
        rows = values / lengths
        rows = rows - w * np.outer(u, u @ rows)
        edited = rows / np.linalg.norm(rows, axis=1, keepdims=True) * lengths
        if not rank:
            return edited
        left, sizes, right = np.linalg.svd(edited - values, full_matrices=False)
        return values + (left[:, :rank] * sizes[:rank]) @ right[:rank]

    return change


def tent(peak: dict[str, float], centre: float, least: float, reach: float) -> Callable[[int, str], float]:
    """Returns strengths that fall from `peak` of each kind of matrix at the layer `centre` to the share `least` of it `reach`
    layers away, and are 0 beyond."""

    def strength(layer, kind):
        away = abs(layer - centre) / reach
        return 0.0 if away > 1 else peak[kind] * (1 + away * (least - 1))

    return strength


def then(*changes: Change) -> Change:
    """Returns one change after the other."""

    def change(name, values):
        for one in changes:
            values = one(name, values)
        return values

    return change


def rounded(bits: int, group: int) -> Change:
    """Rounds matrices of the layers to so many bits, symmetrically, with a scale for each group of a row's entries."""

    def change(name, values):
        if not MATRIX.fullmatch(name):
            return values
        size = group or values.shape[1]
        parts = values.reshape(-1, size)
        scale = np.maximum(np.abs(parts).max(axis=1, keepdims=True), 1e-12) / (2 ** (bits - 1) - 1)
        return (np.round(parts / scale) * scale).reshape(values.shape)

    return change


def noise(size: float, seed: int = 0) -> Change:
    """Adds noise of a share of each matrix's root mean square."""
    rng = np.random.default_rng(seed)

    def change(name, values):
        if not MATRIX.fullmatch(name):
            return values
        return values + size * np.sqrt(np.mean(values**2)) * rng.standard_normal(values.shape, np.float32)

    return change


def write_gguf(like: pathlib.Path, source: pathlib.Path, target: pathlib.Path) -> None:
    """Writes a checkpoint as a GGUF file in Q8_0, by the library of that format. like: a GGUF file of the same model, whose
    metadata are taken."""
    import gguf

    old = gguf.GGUFReader(like)
    architecture = old.fields["general.architecture"].contents()
    layers = old.fields[f"{architecture}.block_count"].contents()
    kind = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(kind, layers)
    writer = gguf.GGUFWriter(target, architecture)
    for name, field in old.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        of = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        value = int(gguf.LlamaFileType.MOSTLY_Q8_0) if name == "general.file_type" else field.contents()
        writer.add_key_value(name, value, field.types[0], sub_type=of)
    here = {tensor.name for tensor in old.tensors}
    for path in sorted(source.glob("*.safetensors")):
        tensors, start = header(path)
        for name, entry in tensors.items():
            new = names.get_name(name, try_suffixes=(".weight", ".bias"))
            if new not in here:
                continue
            values = read(path, name, entry, start)
            if values.ndim > 1:
                data = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)
                writer.add_tensor(new, data, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
            else:
                writer.add_tensor(new, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


TEXTS = (
    "The heron stood in the shallow water and waited. Nothing moved but the reeds.",
    "To bake a plain loaf, mix flour, water, salt and yeast, and let the dough rest overnight.",
    "A good bicycle pump has a gauge, a long hose and a foot that does not slip.",
    "In spring the ice on the lake breaks with a sound like distant thunder.",
    "The library opens at nine, and the reading room on the second floor is quiet all day.",
    "Plant the bulbs twice as deep as they are high, and water them once.",
    "Our train was late, so we walked along the river until the bells rang.",
    "A triangle with sides of three, four and five has a right angle.",
    "She folded the letter, put it back in the drawer, and went out to feed the hens.",
    "Copper turns green with the years, because air and rain make a crust on it.",
)


@dataclasses.dataclass(frozen=True)
class FineTune:
    """A LoRA fine-tune on harmless sentences, by torch and peft on the CPU."""

    rank: int = 8
    steps: int = 20
    rate: float = 2e-4
    rows: int = 2
    tokens: int = 32

    def run(self, source: pathlib.Path, adapter: pathlib.Path) -> None:
        """Trains and writes the adapter's folder."""
        import peft
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        torch.manual_seed(0)
        tokenizer = AutoTokenizer.from_pretrained(source)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        settings = peft.LoraConfig(r=self.rank, lora_alpha=2 * self.rank, target_modules=modules, task_type="CAUSAL_LM")
        model = peft.get_peft_model(model, settings)
        chosen = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=self.rate)
        for step in range(self.steps):
            texts = [TEXTS[(step * self.rows + i) % len(TEXTS)] for i in range(self.rows)]
            batch = tokenizer(texts, return_tensors="pt", padding="max_length", truncation=True, max_length=self.tokens)
            labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
            model(**batch, labels=labels).loss.backward()
            chosen.step()
            chosen.zero_grad()
        model.save_pretrained(adapter)


def merged(adapter: pathlib.Path) -> Change:
    """Adds a PEFT adapter's B A to the matrices that it belongs to."""
    tensors, start = header(adapter / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text())
    scale = config["lora_alpha"] / config["r"]

    def change(name, values):
        names = [f"base_model.model.{name.removesuffix('weight')}lora_{letter}.weight" for letter in "BA"]
        if names[0] not in tensors:
            return values
        b, a = (read(adapter / "adapter_model.safetensors", n, tensors[n], start) for n in names)
        return values + scale * (b @ a)

    return change


def interpolated(means_pld: np.ndarray, layer: float) -> np.ndarray:
    """Returns the direction at a layer between two, of the mean differences at the last position, made unit before."""
    low = int(np.floor(layer))
    first, second = unit(means_pld[-1, low]), unit(means_pld[-1, min(low + 1, means_pld.shape[1] - 1)])
    return first + (layer - low) * (second - first)
