"""What the edits cost on text that has nothing to do with refusal: cross-entropy loss, and the KL divergence from baseline."""

import dataclasses
import math
import pathlib
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from refusal_jax.chat.model import ChatModel
from refusal_jax.chat.prompts import Chat, bucket
from refusal_jax.data.prompts import read_prompts, read_rows, resolve
from refusal_jax.edits import Edits
from refusal_jax.errors import UserError, field
from refusal_jax.judges.statistics import mean_interval
from refusal_jax.models.attention import Context
from refusal_jax.models.decoder import Decoder
from refusal_jax.models.finite import check_finite
from refusal_jax.models.sharding import replicate
from refusal_jax.progress import each


@dataclasses.dataclass(frozen=True)
class LossRow:
    """Token ids, and the index of the first token that is predicted and counted."""

    ids: list[int]
    first: int


def chat_rows(chat: Chat, pairs: Sequence[tuple[str, str]], max_tokens: int) -> list[LossRow]:
    """Rows of (instruction, response): counted is the response, predicted from the last post-instruction token on."""
    rows = []
    for instruction, response in pairs:
        ids, prompt = chat.ids(chat.render(instruction, response)), chat.prompt_ids(instruction)
        # A reply may change how the prompt's end is split into tokens; it begins where the two first differ.
        first = next((i for i, (one, other) in enumerate(zip(ids, prompt, strict=False)) if one != other), len(prompt))
        rows.append(LossRow(ids[:max_tokens], first))
    return rows


def text_rows(chat: Chat, texts: Sequence[str], max_tokens: int) -> list[LossRow]:
    """Rows of plain text, tokenised as is the tokenizer's default (with its BOS); all but the first token count."""
    return [LossRow(chat.ids(text, special=True)[:max_tokens], 1) for text in texts]


def read_chat_pairs(path: pathlib.Path) -> list[tuple[str, str]]:
    """(instruction, response) of a .json or .jsonl file of objects with "prompt" or "instruction" and "response" or
    "output"; rows with an "input" are left out. Raises UserError that names the file and the row."""
    if path.suffix.lower() not in (".json", ".jsonl"):
        raise UserError(f"{path} is not a chat file: its name must end in .json or .jsonl.")
    pairs = []
    for number, (prompt, row) in enumerate(zip(read_prompts(path), read_rows(path), strict=True), 1):
        found = (
            [row[key] for key in ("response", "output") if row.get(key) is not None] if isinstance(row, dict) else []
        )
        if not found or not isinstance(found[0], str):
            raise UserError(
                f"{path}, row {number} has no response: an object of a chat file needs 'response' or 'output'."
            )
        if not row.get("input"):  # Alpaca's rows with an input are no single instruction; the paper leaves them out
            pairs.append((prompt["instruction"], found[0]))
    return pairs


@jax.jit
def loss_batch(decoder: Decoder, tokens_bt, mask_bt, edits: Edits, counted_bt) -> tuple[jax.Array, jax.Array]:
    """Summed cross-entropy (nats) and number of counted tokens of each row; `counted_bt` marks predicted tokens.

    The sum of a row whose values are not finite is NaN. A scan over rows keeps one row's logits alive at a time instead of
    `[B, T, V]`.
    """
    x = decoder.forward(tokens_bt, mask_bt, edits).resid_btd

    def row(_, inputs):
        x_td, tokens_t, counted_t = inputs
        logits_1tv = decoder.logits(x_td[None, :-1])
        logp = jax.nn.log_softmax(logits_1tv[0], axis=-1)
        nll = -jnp.take_along_axis(logp, tokens_t[1:, None], axis=-1)[:, 0]
        nll = jnp.where(decoder.finite(x_td[None, :-1], logits_1tv)[0], nll, jnp.nan)
        return None, (jnp.sum(jnp.where(counted_t[1:], nll, 0.0)), jnp.sum(counted_t[1:], dtype=jnp.int32))

    return replicate(decoder.mesh, jax.lax.scan(row, None, (x, tokens_bt, counted_bt))[1])


def _batches(model: ChatModel, rows: Sequence[LossRow], batch_size: int, title: str):
    """Yields (number of rows, padded batch, counted tokens `[B, T]`), like lengths together. Raises UserError if no token
    counts."""
    order = sorted((row for row in rows if len(row.ids) > row.first), key=lambda row: len(row.ids))
    if not order:
        raise UserError(
            f"'{title}' has no token to measure the loss on: every row is empty or cut before its response. "
            f"Raise {field('loss.text_tokens')} or drop the file."
        )
    for start in each(range(0, len(order), batch_size), f"loss, {title}", "batch"):
        part = order[start : start + batch_size]
        length = bucket(len(part[-1].ids))
        counted = np.zeros((batch_size, length), bool)
        for i, row in enumerate(part):
            counted[i, length - len(row.ids) + row.first :] = True
        yield len(part), model.chat.pad([row.ids for row in part], length).padded_to(batch_size), counted


def measure_loss(model: ChatModel, rows: Sequence[LossRow], edits: Edits, batch_size: int, title: str) -> dict:
    """`{"ce_loss", "perplexity", "n_tokens"}` of the rows, as published.

    Raises UserError if no token counts, and for values that are not finite.
    """
    total, count = 0.0, 0
    for n, batch, counted in _batches(model, rows, batch_size, title):
        sums, counts = jax.device_get(loss_batch(model.decoder, *model.put(batch.tokens, batch.mask, edits), counted))
        what = f"The loss of '{title}' cannot be measured"
        check_finite(np.isfinite(sums[:n]), model.decoder.dtype, what, edits.in_force_r)
        total, count = total + float(np.sum(sums, dtype=np.float64)), count + int(counts.sum())
    return {"ce_loss": total / count, "perplexity": math.exp(min(total / count, 700.0)), "n_tokens": count}


@jax.jit
def kl_batch(decoder: Decoder, tokens_bt, mask_bt, edits: Edits, counted_bt) -> tuple[jax.Array, jax.Array]:
    """Of each row, the summed KL divergence (nats) of the edited next-token distribution from the unedited one, and the number of
    counted tokens; `counted_bt` as in `loss_batch`, and like there one row's logits are alive at a time."""
    ctx, embedded = Context.of_prompt(decoder.cfg, mask_bt), decoder.embed_tokens(tokens_bt)
    none = jax.tree.map(jnp.zeros_like, edits)
    none = dataclasses.replace(none, layer_r=jnp.full_like(edits.layer_r, -1))
    base, edited = (decoder.run(embedded, ctx, one).resid_btd for one in (none, edits))

    def row(_, inputs):
        base_td, edited_td, counted_t = inputs
        both = base_td[None, :-1], edited_td[None, :-1]
        logits = [decoder.logits(x_1td) for x_1td in both]
        logp, logq = (jax.nn.log_softmax(logits_1tv[0].astype(jnp.float32), axis=-1) for logits_1tv in logits)
        terms = jnp.where(logp == -jnp.inf, 0.0, jnp.exp(logp) * (logp - logq))  # padded columns of the vocabulary
        finite_t = jnp.stack([decoder.finite(*pair)[0] for pair in zip(both, logits, strict=True)]).all(axis=0)
        kl_t = jnp.where(finite_t, terms.sum(axis=-1), jnp.nan)
        return None, (jnp.sum(jnp.where(counted_t[1:], kl_t, 0.0)), jnp.sum(counted_t[1:], dtype=jnp.int32))

    return replicate(decoder.mesh, jax.lax.scan(row, None, (base, edited, counted_bt))[1])


def measure_kl(model: ChatModel, rows: Sequence[LossRow], edits: Edits, batch_size: int, title: str) -> dict:
    """How far the edits move the model on the rows: `{"kl_per_token", "n_tokens", "per_row": mean and interval over rows}`.

    KL(baseline ‖ edited), nats, of each counted token's distribution. Raises UserError if no token counts, and for values that
    are not finite.
    """
    total, count, means = 0.0, 0, []
    for n, batch, counted in _batches(model, rows, batch_size, title):
        out = jax.device_get(kl_batch(model.decoder, *model.put(batch.tokens, batch.mask, edits), counted))
        sums, counts = (np.asarray(a, np.float64)[:n] for a in out)
        check_finite(np.isfinite(sums), model.decoder.dtype, f"'{title}' cannot be measured", edits.in_force_r)
        total, count, means = total + sums.sum(), count + int(counts.sum()), [*means, *(sums / counts).tolist()]
    return {"kl_per_token": float(total / count), "n_tokens": count, "per_row": mean_interval(means)}


def loss_datasets(model: ChatModel, settings, harmless_baseline: list[dict]) -> dict[str, list[LossRow]]:
    """The rows to measure: the model's own baseline completions on harmless prompts, and the configured files.

    harmless_baseline: those completions, of which the thoughts count as well: they are the model's own words. Empty ones are left
    out, and the set with them if none is left. The files' names differ (`check_settings` sees to it).
    """
    longest, opened = model.config.context_length, len(model.chat.opened_thought)
    whole = [(c["prompt"], c["thought"][opened:] if "thought" in c else "", c["response"]) for c in harmless_baseline]
    own = [(prompt, thought + said) for prompt, thought, said in whole if thought + said]
    sets = {"on_distribution": chat_rows(model.chat, own, longest)} if own else {}
    cut = min(settings.text_tokens, longest)
    readers: list[tuple[Sequence[str], Callable]] = [
        (settings.text_files, lambda path: text_rows(model.chat, [p["instruction"] for p in read_prompts(path)], cut)),
        (settings.chat_files, lambda path: chat_rows(model.chat, read_chat_pairs(path), longest)),
    ]
    for files, read in readers:
        for file in files:
            path = resolve(file, "loss")
            sets[path.stem] = read(path)
    return sets
