"""The lm-evaluation-harness model `refusal_jax`: a checkpoint, with edits as model arguments, on the devices that JAX finds.

Importing this module registers the model; the harness has no plugins that it would find by itself.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from refusal_jax.chat.padding import bucket
from refusal_jax.checkpoints.fingerprint import checkpoint_fingerprint
from refusal_jax.checkpoints.mirrors import source_name
from refusal_jax.edits import Edits
from refusal_jax.errors import UserError, spelt
from refusal_jax.harness.edited import ARGUMENTS, EditedModel, warn_once
from refusal_jax.models.decoder import Decoder
from refusal_jax.models.decoding import COMPUTED
from refusal_jax.models.finite import check_finite
from refusal_jax.models.sharding import replicate
from refusal_jax.progress import Progress

AUTO_BATCH = 32  # rows for --batch_size auto
# Of generation settings those that greedy decoding obeys, and those that it makes pointless.
OBEYED, POINTLESS = ("until", "max_gen_toks", "do_sample", "temperature"), ("top_p", "top_k")
# Arguments of the harness's hf model that this one can only do without, with the values that ask for nothing.
ONLY = {
    "backend": ("default", "causal"),
    "revision": ("main",),
    "subfolder": (),
    "tokenizer": (),
    "truncation": (False,),
    "softmax_dtype": ("float32",),
    "mixed_precision_dtype": (),
    "use_fast_tokenizer": (True,),
    "peft": (),
    "delta": (),
    "autogptq": (False,),
    "gptqmodel": (False,),
    "gguf_file": (),
}
# Those that say how PyTorch is to run the model or load it, which is otherwise here.
OF_TORCH = ("device", "parallelize", "max_memory_per_gpu", "max_cpu_memory", "offload_folder", "tp_plan", "device_map")
OF_TORCH += ("attn_implementation", "low_cpu_mem_usage", "trust_remote_code")
HARNESS_DEVICE = ("device", "cuda:0")  # which the harness gives by itself
THOUGHTS_STAY = (
    "Replies hold thoughts, which are scored with them. Give the model argument think_end_token, such as "
    "think_end_token=</think>, to score what follows it."
)


@partial(jax.jit, static_argnames="n")
def score_batch(decoder: Decoder, tokens_bt, mask_bt, edits: Edits, last_bk, *, n: int):
    """Returns log-probabilities at the last n tokens of each row, float32, NaN where values are not finite: `[B, n -
    1]` of the tokens themselves after the first, and `[B, K]` of the K candidates for what comes after the row. Also
    returns the most probable next tokens, int32 `[B, n]`.

    A scan over rows keeps one row's logits alive at a time instead of `[B, n, V]`.
    """
    x = decoder.forward(tokens_bt, mask_bt, edits).resid_btd

    def row(_, inputs):
        x_nd, tokens_n, last_k = inputs
        logits_1nv = decoder.logits(x_nd[None])
        logits_nv, finite_n = logits_1nv[0], decoder.finite(x_nd[None], logits_1nv)[0]
        logp_nv = jax.nn.log_softmax(logits_nv, axis=-1)
        inner_n = jnp.take_along_axis(logp_nv[:-1], tokens_n[1:, None], axis=-1)[:, 0]
        inner_n, last_k = (
            jnp.where(finite, values, jnp.nan)
            for finite, values in ((finite_n[:-1], inner_n), (finite_n[-1], logp_nv[-1, last_k]))
        )
        return None, (inner_n, last_k, jnp.argmax(logits_nv, axis=-1).astype(jnp.int32))

    return replicate(decoder.mesh, jax.lax.scan(row, None, (x[:, -n:], tokens_bt[:, -n:], last_bk))[1])


@register_model("refusal_jax")
class RefusalJaxLM(TemplateLM):
    """Requests as the harness makes them, answered greedily in one process; `self.edited` is the model and its edits."""

    def __init__(
        self,
        batch_size=1,
        max_batch_size=None,
        max_length=None,
        max_gen_toks=256,
        add_bos_token=None,
        prefix_token_id=None,
        think_end_token=None,
        generation_from_checkpoint=True,
        **more,
    ):
        """Makes the harness's model.

        batch_size: a number of rows, or auto. max_length: longest context with continuation, by default the model's.
        max_gen_toks: longest reply where a task sets none. add_bos_token: whether texts get a BOS token, by default as
        the tokenizer does. prefix_token_id: the token before a text without a context, by default BOS or else the end
        of text. think_end_token: a text or token id after which the reply begins; what comes before is dropped.
        generation_from_checkpoint: whether generation_config.json applies to replies, as it does for the harness's hf
        model. more: the arguments of `edited.read_arguments`, and others that the harness's hf model takes. Raises
        UserError for anything that cannot be used.
        """
        super().__init__()
        if not isinstance(generation_from_checkpoint, bool):
            raise UserError(f"generation_from_checkpoint = {generation_from_checkpoint!r}, expected true or false.")
        self.generation_from_checkpoint = generation_from_checkpoint
        self.batch_size = _rows(batch_size, max_batch_size)
        edited = _without_hf_arguments(more)
        self.enable_thinking = bool(edited.get("enable_thinking"))
        if self.enable_thinking and think_end_token in (None, ""):
            raise UserError(
                "enable_thinking needs think_end_token, the text or token id that ends a thought, such as "
                "think_end_token=</think>: else thoughts would be scored as replies."
            )
        if (
            think_end_token not in (None, "")
            and edited.get("thinking") is None
            and edited.get("enable_thinking") is None
        ):
            edited["thinking"] = True  # or no thought would come, which that token could end
        with spelt(model_argument):
            self.edited = EditedModel.load(edited)
        self.model, self.tokenizer = self.edited.model, self.edited.model.chat.tokenizer
        if add_bos_token not in (None, True, False):
            raise UserError(f"add_bos_token = {add_bos_token!r} is neither true nor false.")
        vocab_size, context = self.model.chat.vocab_size, self.model.config.context_length
        self.add_bos_token, self.max_gen_toks = add_bos_token, max_gen_toks
        self.custom_prefix_token_id = _token_id("prefix_token_id", prefix_token_id, vocab_size)
        text = isinstance(think_end_token, str) and not think_end_token.isdecimal()
        self.think_end_token = (
            think_end_token or None if text else _token_id("think_end_token", think_end_token, vocab_size)
        )
        self.max_length = max_length or context
        if not isinstance(self.max_length, int) or not 1 <= self.max_length <= context:
            raise UserError(
                f"max_length = {max_length}: give a number of tokens, at most the model's context of {context}."
            )

    @property
    def eot_token_id(self) -> int:
        return self.model.chat.eos_ids[0] if self.tokenizer.eos_token_id is None else self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """Returns the token that stands before a text without a context."""
        if self.custom_prefix_token_id is not None:
            return self.custom_prefix_token_id
        bos = getattr(self.tokenizer, "bos_token_id", None)
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return source_name(self.model.path).replace("/", "__")

    def get_model_info(self) -> dict:
        """Returns what the results' config records about the model, including its edits."""
        sizes = (weight.size for weight in jax.tree.leaves(self.model.decoder))
        return {
            "model_num_parameters": sum(sizes),
            "model_dtype": str(self.model.decoder.dtype),
            "model_sha": checkpoint_fingerprint(self.model.path),
            "edits": self.edited.about,
            "generation_settings": self.model.settings.record(self.generation_from_checkpoint),
        }

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Returns the conversation as text up to the start of the next reply or, without add_generation_prompt, to the
        end of the last message, which the model is to continue. If the template refuses a system message, that message
        is left out, as by the harness's hf model. Raises UserError if the template refuses the rest too."""
        if not add_generation_prompt:
            return self.apply_chat_template(chat_history[:-1]) + chat_history[-1]["content"]
        try:
            return self._rendered(chat_history)
        except UserError as error:
            rest = [message for message in chat_history if message["role"] != "system"]
            if len(rest) == len(chat_history):
                raise
            text = self._rendered(rest)
            warn_once(
                f"{error} Here the system message is left out instead, as the harness's hf model does: descriptions of tasks and "
                "system instructions do not reach the model."
            )
            return text

    def _rendered(self, messages: list[dict[str, str]]) -> str:
        with spelt(model_argument):
            return self.edited.rendered(messages)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, left_truncate_len: int | None = None, **_
    ) -> list[int]:
        """Returns token ids; a text that begins with the prefix token gets no other, unless add_special_tokens says
        so."""
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self.tokenizer.decode([self.prefix_token_id]))
        ids = self._ids(string, add_special_tokens)
        return ids[-left_truncate_len:] if left_truncate_len else ids

    def _ids(self, text: str, special: bool) -> list[int]:
        """Returns token ids. special: whether to add BOS as add_bos_token says or, by default, all special tokens that
        the tokenizer adds by itself."""
        ids = self.model.chat.ids(text, special=special and self.add_bos_token is None)
        bos = getattr(self.tokenizer, "bos_token_id", None)
        return [bos, *ids] if special and self.add_bos_token and bos is not None else ids

    def loglikelihood(self, requests, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Scores continuations, as the harness defines it. Raises UserError if the model was asked to think, since no given
        continuation follows the prompt then."""
        if self.enable_thinking:
            tasks = ", ".join(sorted({request.task_name for request in requests if request.task_name}))
            raise UserError(
                f"enable_thinking goes with tasks that generate, and {tasks or 'this one'} scores given continuations, before "
                "which the model would have to think. Leave out enable_thinking or the task."
            )
        return super().loglikelihood(requests, disable_tqdm)

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **_) -> list[tuple[float, bool]]:
        """Returns (sum of log-probabilities, whether greedy decoding gives exactly this continuation) for each (key,
        context ids, continuation ids).

        Requests whose ids differ only in the last one, such as the answers A to D, share a row.
        """
        groups = defaultdict(list)
        results: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        for i, (_, context, continuation) in enumerate(requests):
            if len(continuation) > self.max_length:
                raise UserError(
                    f"A continuation has {len(continuation)} tokens, the model takes {self.max_length}. Raise max_length or "
                    "leave out the task."
                )
            context = list(context) or [self.prefix_token_id]  # of spaces only, without BOS
            ids = (context + list(continuation))[-(self.max_length + 1) :]
            if continuation:
                groups[tuple(ids[:-1])].append((i, len(continuation), ids[-1]))
        order = sorted(groups, key=len, reverse=True)
        with Progress("loglikelihood", len(requests), "request", quiet=disable_tqdm) as bar:
            for start in range(0, len(order), self.batch_size):
                rows = order[start : start + self.batch_size]
                self._score(rows, [groups[row] for row in rows], results)
                bar.update(sum(len(groups[row]) for row in rows))
        for (key, _, _), result in zip(requests, results, strict=True):
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, result)
        return results

    def _score(self, rows: Sequence[tuple[int, ...]], asked: Sequence[list[tuple]], results: list) -> None:
        """Scores one batch into `results`. asked: for each row, tuples (request, tokens that count, the last of
        them)."""
        model = self.model
        length = min(bucket(max(map(len, rows))), model.config.context_length)
        n = min(bucket(max(count for group in asked for _, count, _ in group)), length)
        last = np.zeros((self.batch_size, 1 << (max(map(len, asked)) - 1).bit_length()), np.int32)
        for row, group in enumerate(asked):
            last[row, : len(group)] = [token for _, _, token in group]
        batch = model.chat.pad(rows, length).padded_to(self.batch_size)
        contexts = [row[: len(row) + 1 - max(n for _, n, _ in group)] for row, group in zip(rows, asked, strict=True)]
        edits = self.edited.decided(contexts, length, self.batch_size)
        part = model.put(batch.tokens, batch.mask, edits)
        inner_bn, last_bk, best_bn = map(np.asarray, score_batch(model.decoder, *part, last, n=n))
        for row, group in enumerate(asked):
            for k, (request, count, token) in enumerate(group):
                total = inner_bn[row, n - count :].sum(dtype=np.float64) + last_bk[row, k]
                check_finite([np.isfinite(total)], model.decoder.dtype, "A score failed", edits.in_force_r[:1])
                wanted = [*batch.tokens[row, length - count + 1 :], token]
                results[request] = float(total), bool(np.array_equal(best_bn[row, n - count :], wanted))

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """Returns the log-probability of each whole text, in windows of `max_length`, counting each token once."""
        windows, owners = [], []
        for i, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(i)
        totals = np.zeros(len(requests))
        for owner, (total, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[owner] += total
        for request, total in zip(requests, totals.tolist(), strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals.tolist()

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """Returns greedy replies, cut before the first of the task's `until`; contexts that are too long lose their
        beginning. With think_end_token, a reply is what follows it, and `until` does not end a thought."""
        groups = defaultdict(list)
        stops, prompts, decoded = [], [], {}
        for i, request in enumerate(requests):
            settings = greedy_settings(request.args[1], self.max_gen_toks)
            room = self.max_length - settings["max_gen_toks"]
            if room < 1:
                raise UserError(
                    f"max_gen_toks = {settings['max_gen_toks']} leaves no room for a prompt in the {self.max_length} tokens that "
                    "the model takes. Lower it with gen_kwargs max_gen_toks=N."
                )
            text, bos = request.args[0], getattr(self.tokenizer, "bos_token", None)
            ids = self._ids(text, special=bos is None or not text.startswith(bos))
            prompts.append(ids[-room:] or [self.prefix_token_id])
            stops.append(settings["until"])
            more = {name: value for name, value in settings.items() if name in COMPUTED}
            groups[settings["max_gen_toks"], repr(sorted(more.items()))].append(i)
            decoded[repr(sorted(more.items()))] = more
        texts = [""] * len(requests)
        with Progress("generate_until", len(requests), "request", quiet=disable_tqdm) as bar:
            for (tokens, key), index in groups.items():
                model = self.model.decoded(self.generation_from_checkpoint, **decoded[key])
                edited = dataclasses.replace(self.edited, model=model)
                part = [prompts[i] for i in index], tokens, [stops[i] for i in index], self.batch_size, bar
                for i, reply in zip(index, edited.replies(*part, self.think_end_token), strict=True):
                    if self.think_end_token is None and reply.marked:
                        warn_once(THOUGHTS_STAY)
                    texts[i] = reply.text
                    self.cache_hook.add_partial("generate_until", requests[i].args, reply.text)
        return texts


def model_argument(name: str) -> str | None:
    """Spells settings as the harness takes them, for `errors.spelt`."""
    return f"the model argument {name}=" if name in ARGUMENTS else None


def greedy_settings(gen_kwargs: dict, max_gen_toks: int) -> dict:
    """Returns a request's generation settings in one form, "until" and "max_gen_toks" among them. Raises UserError for
    sampling."""
    settings = dict(normalize_gen_kwargs(gen_kwargs, max_gen_toks))
    if settings["do_sample"] and settings.get("temperature") != 0:
        raise UserError(
            "The task samples its replies, and this model decodes greedily. Add gen_kwargs do_sample=false,temperature=0 if "
            "the greedy reply serves as well."
        )
    more = sorted(set(settings) - {*OBEYED, *POINTLESS, *COMPUTED})
    if more:
        raise UserError(
            f"The generation settings {', '.join(more)} would change replies, and this model decodes greedily: it knows "
            f"{', '.join([*OBEYED, *COMPUTED])}."
        )
    return settings


def _rows(batch_size, max_batch_size) -> int:
    """Returns the number of rows of a batch that --batch_size asks for."""
    text = str(batch_size)
    if text.split(":")[0] == "auto":
        return min(AUTO_BATCH, int(max_batch_size or AUTO_BATCH))
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"batch_size = {batch_size}: give a number of rows, or auto.")
    return int(text)


def _without_hf_arguments(given: dict) -> dict:
    """Returns the arguments that are not specific to the harness's hf model. Raises UserError for those that ask for
    what this model cannot do, and warns about those that have no meaning here."""
    wrong = [
        f"{name} = {given[name]!r}"
        for name, values in ONLY.items()
        if name in given and given[name] not in (None, "", *values)
    ]
    if wrong:
        raise UserError(
            f"The harness's hf model takes {', '.join(wrong)}; this one can do nothing of the kind. Leave it out, or make a "
            "checkpoint folder of what it names and give that as pretrained."
        )
    idle = [name for name in OF_TORCH if given.get(name) and (name, given[name]) != HARNESS_DEVICE]
    if idle:
        warn_once(
            f"{', '.join(idle)}: without a meaning here. JAX chooses the devices (JAX_PLATFORMS=cpu: the CPU), data, fsdp and "
            "model spread the model over several, and code of a checkpoint is never run."
        )
    # Rows with one context are always scored together, so logits_cache is obeyed and denied alike.
    return {name: value for name, value in given.items() if name not in (*ONLY, *OF_TORCH, "logits_cache")}


def _token_id(name: str, value, vocab_size: int) -> int | None:
    """Returns a token id that is given as a number or in digits, or None if none is given. Raises UserError for
    anything else."""
    if value in (None, ""):
        return None
    text = str(value)
    if isinstance(value, bool) or not text.isdecimal() or int(text) >= vocab_size:
        raise UserError(f"{name} = {value!r} is no token id of the model, which are 0 to {vocab_size - 1}.")
    return int(text)
