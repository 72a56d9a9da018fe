"""Tiny random Llama checkpoints, made on the spot by transformers: parity without downloads.

Weights are scaled so that every part of a block matters: attention is peaked, the residual grows by as much as it
holds, norms and biases are far from their initial values. A bug anywhere then moves the logits by far more than 1e-4.
"""

import json
import pathlib
import re

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
# What the post-instruction tokens of TEMPLATE spell; the first is one token, the last is "\n\n".
AFTER_INSTRUCTION = "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
CORPUS = (
    "How do I bake the bread?",
    "I cannot help with that.",
    "Sure, here is how to do it.",
    "user",
    "assistant\n\n",
)
# Line ends stay together, apart from the words around them, so that a prompt tokenises alone as before its reply.
WORDS = r"\s*[\r\n]+|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+"
NORM, NEAR_ONE = re.compile(r"norm(_[\df])?\.weight$"), re.compile(r"layer_scalar$|router\.(per_expert_)?scale$")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ROPES = {
    "default": {"rope_type": "default", "rope_theta": 1000.0},
    "linear": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 1000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
}


def tiny_tokenizer(
    folder, template: str | None = TEMPLATE, extra: tuple[str, ...] = (), words: str | None = WORDS, **more
):
    """Writes the files of a byte-level BPE tokenizer to `folder` and returns it.

    extra: more special tokens. words: the pattern that splits text before BPE, None for GPT-2's. more: attributes.
    """
    bpe = Tokenizer(models.BPE())
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words is None)
    split = [] if words is None else [pre_tokenizers.Split(Regex(words), "isolated")]
    bpe.pre_tokenizer = pre_tokenizers.Sequence([*split, as_bytes])
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(
        CORPUS * 2, trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    )
    bpe.add_special_tokens([*SPECIAL, *extra])
    named = {"bos_token": SPECIAL[0], "eos_token": SPECIAL[4], "pad_token": SPECIAL[1]} | more
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, clean_up_tokenization_spaces=False, **named)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return tokenizer


def tiny_llama(
    folder,
    *,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 8,
    d_model: int = 32,
    layers: int = 3,
    mlp: int = 48,
    context: int = 256,
    tied: bool = False,
    rope: str = "default",
    attention_bias: bool = False,
    mlp_bias: bool = False,
    dtype: str = "float32",
    seed: int = 0,
    shards: str = "5GB",
    template: str | None = TEMPLATE,
    extra: tuple[str, ...] = (),
    **config,
) -> pathlib.Path:
    """Writes a whole HF folder (config, weights, tokenizer) of a random Llama to `folder` and returns it.

    rope: a key of ROPES. dtype: what is stored. shards: the largest size of a weight file. template, extra: the tokenizer's.
    config: further attributes.
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = tiny_tokenizer(folder, template, extra)
    settings = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=d_model,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=context,
        rms_norm_eps=1e-5,
        rope_parameters=dict(ROPES[rope]),
        tie_word_embeddings=tied,
        attention_bias=attention_bias,
        mlp_bias=mlp_bias,
        **{name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
        **config,
    )
    model = LlamaForCausalLM(settings)
    randomise(model, seed)
    torch.nn.Module.to(model, DTYPES[dtype])
    model.save_pretrained(folder, max_shard_size=shards)
    return folder


def randomise(model, seed: int) -> None:
    """Gives every parameter of a transformers model a value that matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        kind = model.config.model_type
        gemma, gemma4 = "gemma" in kind, "gemma4" in kind
        adds_one = (gemma and not gemma4) or any(
            one in kind for one in ("qwen3_next", "qwen3_5")
        )  # to what norms multiply by
        stored = ("correction", "expert_bias", "layer_scalar")
        stored = [(name, b) for name, b in model.named_buffers() if any(word in name for word in stored)]
        for name, weight in [*model.named_parameters(), *stored]:
            noise = torch.randn(weight.shape, generator=generator)
            if NORM.search(name):
                weight.copy_(0.3 * noise + (not adds_one or name.endswith("linear_attn.norm.weight")))
                if name.endswith("k_norm.weight") and gemma4:  # whose scores have no other scale
                    weight.mul_(weight.shape[-1] ** -0.5)
            elif NEAR_ONE.search(name):
                weight.copy_(0.2 * noise + 1)
            elif name.endswith("A_log"):
                weight.copy_(noise - 2)  # states that last for many tokens
            elif weight.ndim == 1:
                weight.copy_(0.3 * noise)
            elif "embed_tokens" in name or "embeddings" in name:
                weight.copy_(noise * (weight.shape[1] ** -0.5 if gemma else 1))  # and scales its embedding up
            else:
                weight.copy_(1.2 * noise * weight.shape[-1] ** -0.5)


def load_hf(folder, dtype: str = "float32") -> LlamaForCausalLM:
    """The checkpoint in transformers, ready for inference."""
    return LlamaForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype], attn_implementation="eager").eval()


def left_padded(lengths, vocab: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Random token ids int32 `[B, T]` and their mask, row i having `lengths[i]` real tokens at its end.

    The padding holds random ids too: whoever looks at it gets another result.
    """
    rng, width = np.random.default_rng(seed), max(lengths)
    mask = np.arange(width)[None, :] >= width - np.asarray(lengths)[:, None]
    return rng.integers(0, vocab, mask.shape, dtype=np.int32), mask


def hf_forward(model, tokens, mask, **settings):
    """transformers' forward of left-padded rows, with positions that count real tokens only."""
    attended = torch.tensor(mask, dtype=torch.long)
    positions = (attended.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        return model(
            torch.tensor(tokens, dtype=torch.long), attention_mask=attended, position_ids=positions, **settings
        )


def edit_json(path: pathlib.Path, **changes) -> None:
    """Sets keys of a JSON object on the disk; None removes one."""
    value = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: v for key, v in value.items() if v is not None}))
