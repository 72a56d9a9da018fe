"""The addition as a control vector for llama.cpp: a GGUF file, version 3, written here because it is a header and a few
vectors.

`direction.N` is added to the output of block N, counted from 0, so what is added at the input of block l is
`direction.(l - 1)`; N begins at 1.
"""

import pathlib
import struct

import numpy as np

from refusal_jax.errors import UserError, setting
from refusal_jax.export.edit import Edit
from refusal_jax.export.hf import Written
from refusal_jax.models.config import ModelConfig

CONTROL_VECTOR = "control-vector.gguf"
ARCHITECTURE = "controlvector"
# llama.cpp's name of an architecture, where it is not the family's.
HINTS = {
    "mistral": "llama",
    "mixtral": "llama",
    "gemma3_text": "gemma3",
    "glm": "chatglm",
    "qwen3_moe": "qwen3moe",
}
ALIGNMENT = 32
UINT32, STRING, F32 = 4, 8, 0  # GGUF's numbers for them


def check_expressible(cfg: ModelConfig, edit: Edit) -> None:
    """Raises UserError for an ablation, and for layers that llama.cpp cannot add at."""
    if edit.kind != "add":
        raise UserError(
            "A control vector is a constant that llama.cpp adds to the residual stream. Ablation removes what is there "
            "along the direction, which differs from token to token, so no constant can do it. Use "
            f"{setting('edit', 'add')}, or {setting('format', 'hf')} or lora for the ablation."
        )
    early = [layer for layer in edit.layers if layer < 2]
    if early:
        raise UserError(
            f"A control vector cannot add at the input of layer {early[0]}: llama.cpp adds to the outputs of blocks from 1 "
            f"on, which are the inputs of layers 2 to {cfg.n_layers - 1}. Choose {setting('layers')} among these."
        )


def write_gguf(cfg: ModelConfig, folder: pathlib.Path, edit: Edit) -> Written:
    """Writes `control-vector.gguf` to `folder`, with the vector that `edit` adds at each of its layers.

    Raises UserError for an edit that a control vector cannot express, OSError for a disk that refuses.
    """
    check_expressible(cfg, edit)
    vectors = {layer - 1: edit.added_d(layer) for layer in edit.layers}
    values = {
        "general.architecture": ARCHITECTURE,
        f"{ARCHITECTURE}.model_hint": HINTS.get(cfg.family, cfg.family),
        f"{ARCHITECTURE}.layer_count": len(vectors),
    }
    head = b"GGUF" + struct.pack("<IQQ", 3, len(vectors), len(values))
    for key, value in values.items():
        number = (
            struct.pack("<II", UINT32, value) if isinstance(value, int) else struct.pack("<I", STRING) + _text(value)
        )
        head += _text(key) + number
    offset, data = 0, b""
    for block, vector_d in vectors.items():
        head += _text(f"direction.{block}") + struct.pack("<IQIQ", 1, len(vector_d), F32, offset)
        data += _padded(vector_d.astype("<f4").tobytes())
        offset = len(data)
    (folder / CONTROL_VECTOR).write_bytes(_padded(head) + data)
    return Written({}, None, len(data))


def _text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def _padded(data: bytes) -> bytes:
    return data + b"\0" * (-len(data) % ALIGNMENT)


def read_gguf(path: pathlib.Path) -> dict[int, np.ndarray]:
    """What a control vector of ours adds at the inputs of layers: float32 `[D]` by layer."""
    data, at = path.read_bytes(), 4

    def take(form: str):
        nonlocal at
        found = struct.unpack_from(f"<{form}", data, at)
        at += struct.calcsize(f"<{form}")
        return found if len(found) > 1 else found[0]

    def text() -> str:
        nonlocal at
        size = take("Q")
        at += size
        return data[at - size : at].decode()

    _, tensors, values = take("IQQ")
    for _ in range(values):
        text()
        text() if take("I") == STRING else take("I")
    places = {text(): take("IQIQ") for _ in range(tensors)}
    start = at + -at % ALIGNMENT
    return {
        int(name.removeprefix("direction.")) + 1: np.frombuffer(data, "<f4", size, start + offset)
        for name, (_, size, _, offset) in places.items()
    }
