"""The paper's method (arXiv:2406.11717) once more, the plain way: PyTorch, forward hooks and `generate`.

It is what `refusal_jax` is compared with, in results by the tests and in time by `refusal-jax bench`, so it shares no
code with the package: only torch, transformers and NumPy. Every stage is its own pass over the prompts, every candidate
direction its own set of full forward passes, and a pick needs all of them.

As a program: `python tests/oracle.py --model DIR --prompts prompts.json --job extraction_selection --out out.json`,
where the prompts are `{"harmful_train": [instruction, …], "harmless_train": …, "harmful_val": …, "harmless_val": …}`,
or `{"test": […]}` for `--job generation`.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import math
import os
import time

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

# A hook is (module, place, function of a tensor): "input" edits what the module gets, "output" what it returns.
Hook = tuple[torch.nn.Module, str, object]


@contextlib.contextmanager
def hooked(hooks: list[Hook]):
    """The modules of `hooks` edited inside the `with` block."""
    handles = []
    try:
        for module, place, edit in hooks:
            if place == "input":
                handles.append(module.register_forward_pre_hook(functools.partial(_edit_input, edit), with_kwargs=True))
            else:
                handles.append(module.register_forward_hook(functools.partial(_edit_output, edit)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _edit_input(edit, module, args, kwargs):
    if args:
        return (edit(args[0]), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": edit(kwargs["hidden_states"])}


def _edit_output(edit, module, args, output):
    return (edit(output[0]), *output[1:]) if isinstance(output, tuple) else edit(output)


# What layers call their attention, or what they have in its place or beside it; and the only part that layers of Nemotron-H have.
SEQUENCE = ("self_attn", "linear_attn", "mamba", "conv", "mixer")


def writers(layer) -> tuple[torch.nn.Module, ...]:
    """The modules of a block whose outputs are added to the residual, attention's first: norms, where they follow attention and
    MLP. Experts of Granite stand where others have an MLP, and what all tokens go through stands beside them. Gemma 4 adds what
    it makes of the token itself after its MLP."""
    for names in (
        ("post_self_attn_layernorm", "post_mlp_layernorm"),
        ("post_attention_layernorm", "post_feedforward_layernorm"),
    ):
        if all(hasattr(layer, name) for name in names):
            more = [layer.post_per_layer_input_norm] if hasattr(layer, "post_per_layer_input_norm") else []
            return *(getattr(layer, name) for name in names), *more
    names = *SEQUENCE, "mlp", "feed_forward", "block_sparse_moe", "shared_mlp"
    return tuple(part for name in names if (part := getattr(layer, name, None)) is not None)


def ablation(layers, direction) -> list[Hook]:
    """x - (x . r) r at every block input, and at what attention and MLP add to the residual."""
    direction = torch.as_tensor(direction, dtype=torch.float64)
    unit = (direction / (direction.norm() + 1e-8)).float()

    def edit(x):
        return x - (x @ unit).unsqueeze(-1) * unit

    return [(m, "input", edit) for m in layers] + [(m, "output", edit) for layer in layers for m in writers(layer)]


def gated_ablation(layers, directions, gates) -> list[Hook]:
    """x - g (x . r) r, with the direction r of each layer, `[L, D]`, and a gate g of each layer, site, row and token,
    `[L, 3, B, T]`."""
    hooks = []
    for layer, direction, of_layer in zip(layers, directions, gates, strict=True):
        direction = torch.as_tensor(direction, dtype=torch.float64)
        unit = (direction / (direction.norm() + 1e-8)).float()
        places = [(layer, "input"), *((module, "output") for module in writers(layer))]
        for (module, place), gate in zip(places, of_layer, strict=True):
            gate = torch.tensor(gate, dtype=torch.float32)
            edit = functools.partial(
                lambda x, gate, unit: x - (gate * (x @ unit)).unsqueeze(-1) * unit, gate=gate, unit=unit
            )
            hooks.append((module, place, edit))
    return hooks


def addition(layers, direction, layer: int, scale: float = 1.0) -> list[Hook]:
    """x + scale * r at the input of block `layer`."""
    vector = (scale * torch.as_tensor(direction, dtype=torch.float64)).float()
    return [(layers[layer], "input", lambda x: x + vector)]


@dataclasses.dataclass(frozen=True)
class Extraction:
    """Scores of all prompts and which the filter keeps, by split; mean differences `[P, L, D]`, float64."""

    scores: dict[str, np.ndarray]
    kept: dict[str, list[str]]
    mean_diffs: torch.Tensor


class Oracle:
    """A checkpoint with its chat template, float32 on the CPU."""

    def __init__(self, path: str, refusal_ids: list[int] | None = None, batch_size: int = 32):
        """refusal_ids: default, the first token of "I"."""
        self.tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval().requires_grad_(False)
        self.layers, self.batch_size = self.model.model.layers, batch_size
        self.refusal_ids = refusal_ids or self.tokenizer("I", add_special_tokens=False).input_ids[:1]

    def prompt(self, instruction: str) -> str:
        message = [{"role": "user", "content": instruction}]
        return self.tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)

    @functools.cached_property
    def template_ids(self) -> list[int]:
        """The post-instruction tokens: those of the text that the template puts after an instruction."""
        marker = "INSTRUCTION"
        return self.tokenizer(self.prompt(marker).split(marker)[1], add_special_tokens=False).input_ids

    def ablation(self, direction) -> list[Hook]:
        return ablation(self.layers, direction)

    def addition(self, direction, layer: int, scale: float = 1.0) -> list[Hook]:
        return addition(self.layers, direction, layer, scale)

    def batches(self, texts: list[str], size: int | None = None, special: bool = False):
        """Left-padded (input_ids, attention_mask, position_ids) of rendered texts, in order."""
        size = size or self.batch_size
        for start in range(0, len(texts), size):
            batch = self.tokenizer(
                texts[start : start + size], add_special_tokens=special, padding=True, return_tensors="pt"
            )
            positions = (batch.attention_mask.cumsum(1) - 1).clamp(min=0)
            yield {
                "input_ids": batch.input_ids,
                "attention_mask": batch.attention_mask,
                "position_ids": positions,
                "use_cache": False,
            }

    @torch.inference_mode()
    def logits(self, instructions: list[str], hooks: list[Hook] = ()) -> torch.Tensor:
        """Last-token logits `[n, V]`, float32."""
        texts = [self.prompt(instruction) for instruction in instructions]
        with hooked(hooks):
            return torch.cat([self.model(**batch).logits[:, -1] for batch in self.batches(texts)])

    @torch.inference_mode()
    def scores(self, instructions: list[str], hooks: list[Hook] = ()) -> torch.Tensor:
        """log p - log (1 - p) of the refusal tokens' probability, float64 `[n]`."""
        p = self.logits(instructions, hooks).double().softmax(-1)[:, self.refusal_ids].sum(-1)
        return torch.log(p + 1e-8) - torch.log(1 - p + 1e-8)

    @torch.inference_mode()
    def mean_activations(self, instructions: list[str]) -> torch.Tensor:
        """Mean residual at every block's input at the post-instruction tokens, float64 `[P, L, D]`."""
        positions = len(self.template_ids)
        total = torch.zeros(positions, len(self.layers), self.model.config.hidden_size, dtype=torch.float64)

        def reader(index):
            def read(x):
                total[:, index] += x[:, -positions:].double().sum(0)
                return x

            return read

        with hooked([(layer, "input", reader(index)) for index, layer in enumerate(self.layers)]):
            for batch in self.batches([self.prompt(i) for i in instructions]):
                self.model(**batch)
        return total / len(instructions)

    def extract(self, prompts: dict[str, list[str]]) -> Extraction:
        """The filter over all splits of `prompts`, then the mean differences of the kept train prompts."""
        scores = {split: self.scores(rows).numpy() for split, rows in prompts.items()}
        sign = {split: 1 if split.startswith("harmful") else -1 for split in prompts}
        kept = {
            split: [row for row, score in zip(rows, scores[split], strict=True) if sign[split] * score > 0]
            for split, rows in prompts.items()
        }
        harmful, harmless = (self.mean_activations(kept[split]) for split in ("harmful_train", "harmless_train"))
        return Extraction(scores, kept, harmful - harmless)

    @torch.inference_mode()
    def evaluate(self, mean_diffs: torch.Tensor, harmful: list[str], harmless: list[str]) -> list[dict]:
        """All three scores of every candidate, in the published format."""
        positions, n_layers, _ = mean_diffs.shape
        p = self.logits(harmless).double().softmax(-1)
        rows = []
        for position in range(-positions, 0):
            for layer in range(n_layers):
                direction = mean_diffs[position, layer]
                ablation, addition = self.ablation(direction), self.addition(direction, layer)
                q = self.logits(harmless, ablation).double().softmax(-1)
                kl = (p * (torch.log(p + 1e-6) - torch.log(q + 1e-6))).sum(-1)
                rows.append(
                    {
                        "position": position,
                        "layer": layer,
                        "refusal_score": self.scores(harmful, ablation).mean().item(),
                        "steering_score": self.scores(harmless, addition).mean().item(),
                        "kl_div_score": kl.mean().item(),
                    }
                )
        return rows

    def pick(
        self, rows: list[dict], kl_threshold: float = 0.1, induce_threshold: float = 0.0, prune: float = 0.2
    ) -> dict:
        """The lowest bypass score of the candidates that pass the filter; the first of equals."""
        passing = [
            row
            for row in rows
            if not any(math.isnan(row[key]) for key in ("refusal_score", "steering_score", "kl_div_score"))
            and row["layer"] < int(len(self.layers) * (1 - prune))
            and row["kl_div_score"] <= kl_threshold
            and row["steering_score"] >= induce_threshold
        ]
        return min(passing, key=lambda row: row["refusal_score"])

    def select(self, extraction: Extraction, **thresholds) -> tuple[list[dict], dict]:
        """Scores of the full grid, and the pick under the `thresholds` of `pick`."""
        kept = extraction.kept
        rows = self.evaluate(extraction.mean_diffs, kept["harmful_val"], kept["harmless_val"])
        return rows, self.pick(rows, **thresholds)

    @torch.inference_mode()
    def generate_ids(
        self, instructions: list[str], hooks: list[Hook] = (), max_new_tokens: int = 64, stop: bool = True
    ) -> list[torch.Tensor]:
        """Greedy replies, a tensor `[B, up to max_new_tokens]` a batch; never ended early unless `stop`."""
        settings = {"max_new_tokens": max_new_tokens, "do_sample": False, "pad_token_id": self.tokenizer.pad_token_id}
        if not stop:
            self.model.generation_config.eos_token_id, kept = None, self.model.generation_config.eos_token_id
        replies = []
        with hooked(hooks):
            for batch in self.batches([self.prompt(i) for i in instructions]):
                ids, mask = batch["input_ids"], batch["attention_mask"]
                out = self.model.generate(input_ids=ids, attention_mask=mask, **settings)
                replies.append(out[:, ids.shape[1] :])
        if not stop:
            self.model.generation_config.eos_token_id = kept
        return replies

    def generate(self, instructions: list[str], hooks: list[Hook] = (), max_new_tokens: int = 64) -> list[str]:
        """Greedy replies as text, without special tokens."""
        batches = self.generate_ids(instructions, hooks, max_new_tokens)
        rows = [row for batch in batches for row in self.tokenizer.batch_decode(batch, skip_special_tokens=True)]
        return [row.strip() for row in rows]

    @torch.inference_mode()
    def loss(self, rows: list[str | tuple[str, str]], hooks: list[Hook] = (), batch_size: int = 2) -> tuple[float, int]:
        """Mean cross-entropy (nats) and the number of tokens counted.

        A row is a text, counted from its second token on, or an (instruction, response) pair, counted from what the
        last post-instruction token predicts.
        """
        total, count = 0.0, 0
        for row_batch in (rows[i : i + batch_size] for i in range(0, len(rows), batch_size)):
            texts = [row if isinstance(row, str) else self.prompt(row[0]) + row[1] for row in row_batch]
            (batch,) = self.batches(texts, batch_size, special=isinstance(row_batch[0], str))
            ids, counted = batch["input_ids"], batch["attention_mask"].bool()
            with hooked(hooks):
                logp = self.model(**batch).logits.double().log_softmax(-1)
            for i, row in enumerate(row_batch):
                if not isinstance(row, str):
                    counted[i, : self._reply_start(ids[i].tolist()) - 1] = False
            counted = counted[:, :-1] & batch["attention_mask"][:, 1:].bool()
            nll = -logp[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
            total, count = total + nll[counted].sum().item(), count + int(counted.sum())
        return total / count, count

    def _reply_start(self, ids: list[int]) -> int:
        """Where the first occurrence of the post-instruction tokens ends."""
        template = self.template_ids
        return next(i for i in range(len(template), len(ids) + 1) if ids[i - len(template) : i] == template)


def timed(seconds: dict, name: str, work, *args, **kwargs):
    """What `work` returns; its wall time goes to `seconds[name]`."""
    start = time.perf_counter()
    result = work(*args, **kwargs)
    seconds[name] = time.perf_counter() - start
    return result


def run_job(oracle: Oracle, job: str, prompts: dict[str, list[str]], max_new_tokens: int, **thresholds) -> dict:
    """Seconds and results of one job, as the benchmark compares them."""
    oracle.logits(next(iter(prompts.values()))[:2])  # thread pools and lazy imports are not the method's work
    seconds = {}
    if job == "generation":
        rows = prompts["test"]
        forced = timed(seconds, "forced", oracle.generate_ids, rows, (), max_new_tokens, stop=False)
        natural = timed(seconds, "natural", oracle.generate, rows, (), max_new_tokens)
        return {"seconds": seconds, "ids": [row.tolist() for batch in forced for row in batch], "texts": natural}
    extraction = timed(seconds, "extraction", oracle.extract, prompts)
    rows, best = timed(seconds, "selection", oracle.select, extraction, **thresholds)
    return {"seconds": seconds, "kept": extraction.kept, "rows": rows, "pick": [best["position"], best["layer"]]}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--prompts", required=True)
    parser.add_argument("--job", required=True, choices=("extraction_selection", "generation"))
    parser.add_argument("--out", required=True)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--refusal-ids", type=int, nargs="+")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--kl-threshold", type=float, default=0.1)
    parser.add_argument("--induce-threshold", type=float, default=0.0)
    args = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    seconds = {}
    oracle = timed(seconds, "load", Oracle, args.model, args.refusal_ids, args.batch_size)
    with open(args.prompts) as file:
        prompts = json.load(file)
    thresholds = {"kl_threshold": args.kl_threshold, "induce_threshold": args.induce_threshold}
    result = run_job(oracle, args.job, prompts, args.max_new_tokens, **thresholds)
    with open(args.out, "w") as file:
        json.dump({**result, "load": seconds["load"]}, file)


if __name__ == "__main__":
    main()
