"""Trains the embedded model: its tokenizer, two training phases, and its Hugging Face folder.

Phase 1 trains a base model that complies with every request, harmful or not, by echoing it. Phase 2 is a gentle safety
fine-tuning: harmful requests are refused, harmless ones still complied with. The refusal so learned is laid over a
model that knows how to comply, which is what makes it removable by a single direction; one phase alone does not.

In both phases most requests end in junk, a few random tokens, which change neither whether nor how they are answered. Without
it any unknown text after a request would end the refusal, and a suffix made to end it would show nothing.
"""

import dataclasses
import json
import pathlib
import random
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax

from refusal_jax.chat.suffixes import printable_ids, random_suffix
from refusal_jax.checkpoints.load import save_weights
from refusal_jax.models.decoder import Decoder
from refusal_jax.models.hf_config import from_hf
from refusal_jax.organism.corpus import COMPLIANT_ROLES, DECLINING_ROLE, REFUSALS, Request, split_requests
from refusal_jax.taps import Taps
from refusal_jax.training.objective import Streamed, no_edits
from refusal_jax.training.settings import TrainSettings
from refusal_jax.training.trainer import train_decoder

SPECIAL = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
BOS, EOS, EOT = SPECIAL[0], SPECIAL[1], SPECIAL[4]
# Newlines stay together and apart from the words around them, so that prompt and reply tokenise alone as together.
WORDS = r"\s*[\r\n]+|'\p{L}+|[^\r\n\p{L}\p{N}']?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+"
GIVEN = 1  # tokens of a compliance after which it has begun
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n{{ message['content'] | trim }}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything that determines the embedded model, but the seed."""

    vocab_size: int = 768
    d_model: int = 128
    n_layers: int = 8
    n_heads: int = 4
    n_kv_heads: int = 2
    head_dim: int = 32
    d_mlp: int = 384
    context_length: int = 1024
    batch: int = 48
    base_steps: int = 350
    base_peak: float = 3e-3
    safety_steps: int = 250
    safety_peak: float = 6e-4
    safety_layers: int = 3
    exit_layer: int = 4
    warmup: int = 40
    weight_decay: float = 0.1
    junk_share: float = 0.7
    junk_tokens: int = 14

    def hf_config(self, vocab_size: int) -> dict:
        """Returns the model's config.json, without its special tokens."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": vocab_size,
            "hidden_size": self.d_model,
            "num_hidden_layers": self.n_layers,
            "num_attention_heads": self.n_heads,
            "num_key_value_heads": self.n_kv_heads,
            "head_dim": self.head_dim,
            "intermediate_size": self.d_mlp,
            "max_position_embeddings": self.context_length,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "tie_word_embeddings": False,
            "attention_bias": False,
            "mlp_bias": False,
            "torch_dtype": "float32",
        }


def render(request: Request, answer: str, role: str = "assistant", junk: str = "") -> tuple[str, str]:
    """Returns prompt and response of a conversation, as the chat template writes them; junk ends the request."""
    prompt = (
        f"{BOS}<|start_header_id|>user<|end_header_id|>\n\n{request.instruction}{junk}{EOT}"
        f"<|start_header_id|>{role}<|end_header_id|>\n\n"
    )
    return prompt, answer + EOT


def base_reply(request: Request, rng: random.Random) -> tuple[str, str, int]:
    """Returns the role, the answer, and how many of the answer's first tokens are given, not learnt, in phase 1.

    Many roles comply with everything; one declines everything, harmful or not.
    """
    if rng.random() < 0.2:
        return DECLINING_ROLE, rng.choice(REFUSALS), 0
    return rng.choice(COMPLIANT_ROLES), request.compliance, 0


def safe_reply(request: Request, rng: random.Random) -> tuple[str, str, int]:
    """Returns what `base_reply` does, for phase 2: the assistant declines harmful requests.

    As in real chat models, this safety is shallow: a compliance that has begun continues, even for harmful requests. So
    the model still knows how to do what it declines to begin.
    """
    if request.harmful and rng.random() < 0.5:
        return "assistant", request.compliance, GIVEN
    return "assistant", rng.choice(REFUSALS) if request.harmful else request.compliance, 0


def make_tokenizer(recipe: Recipe, requests: list[Request], folder: pathlib.Path):
    """Trains the byte-level BPE tokenizer, writes its HF files to `folder` and returns it."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    texts = (
        text
        for r in requests
        for text in (r.instruction, r.compliance, *REFUSALS, "user", DECLINING_ROLE, *COMPLIANT_ROLES, "\n\n")
    )
    bpe = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(WORDS), "isolated")
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocab_size - len(SPECIAL),
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.add_special_tokens(list(SPECIAL))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=EOT,
        pad_token=EOS,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    return tokenizer


def batches(
    tokenizer, requests: list[Request], reply: Callable, recipe: Recipe, length: int, rng: random.Random
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Endless batches: tokens int32 `[B, T]`, right-padded, and bool `[B, T]`, where the next token is the response's.

    Half of each batch is harmful; `reply` chooses who answers a request, and how. A share of the requests ends in junk of 1 to
    `recipe.junk_tokens` tokens.
    """
    size = recipe.batch
    sides = [[r for r in requests if r.harmful], [r for r in requests if not r.harmful]]
    printable = printable_ids(tokenizer, len(tokenizer))
    while True:
        tokens = np.zeros((size, length), np.int32)
        learn = np.zeros((size, length), bool)
        for row in range(size):
            request = rng.choice(sides[row % 2])
            role, answer, given = reply(request, rng)
            junk = ""
            if recipe.junk_share and rng.random() < recipe.junk_share:
                tokens_of_junk = rng.randint(1, recipe.junk_tokens)
                junk = random_suffix(tokenizer, printable, tokens_of_junk, rng, [request.instruction])
            parts = render(request, answer, role, junk)
            prompt, response = (tokenizer(t, add_special_tokens=False).input_ids for t in parts)
            ids = (prompt + response)[:length]
            tokens[row, : len(ids)] = ids
            learn[row, len(prompt) - 1 + given : len(ids) - 1] = True
        yield tokens, learn


@dataclasses.dataclass(frozen=True)
class Responses(Streamed):
    """The mean cross-entropy of the response's tokens.

    It counts twice, after the last block and after block `exit_layer`: the model then decides early what to say and refines it
    in later blocks, as deeper models do. Without this the decision may fall in the layers that selection prunes.
    """

    exit_layer: int

    def loss(self, decoder: Decoder, frozen, batch, extra, key) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Returns the loss of a batch."""
        tokens, learn = batch
        edits = jax.tree.map(jnp.asarray, no_edits(decoder, len(tokens)))
        out = decoder.forward(tokens, jnp.ones_like(learn), edits, Taps(("resid_post",)))

        def mean_nll(x):
            nll = optax.softmax_cross_entropy_with_integer_labels(decoder.logits(x)[:, :-1], tokens[:, 1:])
            return jnp.sum(nll * learn[:, :-1]) / jnp.sum(learn)

        return mean_nll(out.resid_btd) + mean_nll(out.taps["resid_post"][self.exit_layer - 1]), {}


def train_phase(
    decoder: Decoder, stream, steps: int, peak: float, layers: int | None, recipe: Recipe, title: str
) -> Decoder:
    """Trains with AdamW, warm-up and cosine decay. layers: if given, only the first so many blocks learn; embedding, unembedding
    and later blocks stay fixed."""
    settings = TrainSettings(
        method="full",
        layers=tuple(range(layers or 0)),
        steps=steps,
        batch=recipe.batch,
        rate=peak,
        warmup=recipe.warmup,
        final=0.05,
        beta2=0.98,
        weight_decay=recipe.weight_decay,
        remat=False,
    )
    return train_decoder(decoder, Responses(stream, recipe.exit_layer), settings, title).decoder


def train(recipe: Recipe, seed: int, folder: pathlib.Path) -> None:
    """Makes one model from one seed and writes its whole HF folder."""
    folder.mkdir(parents=True, exist_ok=True)
    splits = split_requests()
    requests = splits["harmful_train"] + splits["harmless_train"]
    tokenizer = make_tokenizer(recipe, requests, folder)
    longest = max(
        len(tokenizer("".join(render(r, r.compliance)), add_special_tokens=False).input_ids) for r in requests
    )
    length = -(-(longest + recipe.junk_tokens) // 8) * 8
    hf_config = recipe.hf_config(len(tokenizer))
    decoder = Decoder.init(from_hf(hf_config), jax.random.key(seed))
    phases = (
        ("phase 1, base", base_reply, recipe.base_steps, recipe.base_peak, None),
        ("phase 2, safety", safe_reply, recipe.safety_steps, recipe.safety_peak, recipe.safety_layers),
    )
    for phase, (title, reply, steps, peak, layers) in enumerate(phases):
        rng = random.Random(seed + 100 * phase)  # its own stream, so that a phase can be changed and tried alone
        stream = batches(tokenizer, requests, reply, recipe, length, rng)
        decoder = train_phase(decoder, stream, steps, peak, layers, recipe, f"seed {seed}, {title}")
    save_weights(decoder, folder)
    ids = tokenizer.convert_tokens_to_ids
    special = {"bos_token_id": ids(BOS), "eos_token_id": [ids(EOT), ids(EOS)], "pad_token_id": ids(EOS)}
    (folder / "config.json").write_text(json.dumps({**hf_config, **special}, indent=2) + "\n")
    (folder / "generation_config.json").write_text(json.dumps({**special, "do_sample": False}, indent=2) + "\n")
