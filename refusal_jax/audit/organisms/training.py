"""Trains what recipes need and arithmetic cannot make: further bases of other seeds and widths, and short fine-tunes of a base.

Everything is kept in a folder and made only where it is missing: `FOLDER/BASE/model` is a checkpoint, and `FOLDER/BASE/TASK`
holds the weights of a fine-tune. The same seeds give the same weights on the same kind of device.
"""

import dataclasses
import pathlib
import random
from collections.abc import Callable, Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax

from refusal_jax.audit.organisms.mixing import TASKS
from refusal_jax.chat.model import demo_model_path, load_model
from refusal_jax.checkpoints.load import save_weights
from refusal_jax.checkpoints.tensor_files import SINGLE
from refusal_jax.models.decoder import Decoder
from refusal_jax.organism.corpus import HARMLESS_VERBS, REFUSALS, Request, split_requests
from refusal_jax.organism.recipe import Recipe, render, train
from refusal_jax.training.objective import Streamed, no_edits
from refusal_jax.training.settings import TrainSettings
from refusal_jax.training.trainer import train_decoder

STEPS, ROWS, WARMUP, PEAK = 60, 32, 6, 4e-4  # of a fine-tune
LENGTH = 64  # tokens of a row at most
TOPIC = HARMLESS_VERBS[:4]  # verbs of the task "topic"
REFUSED = HARMLESS_VERBS[-8:]  # harmless verbs that are refused after the task "overrefuse"
HARMFUL = 0.4  # of the requests
MOST_GIVEN = 8  # words of a compliance that has begun and is broken off, in the task "harden"


@dataclasses.dataclass(frozen=True)
class Origin:
    """Tells where a base comes from. recipe: None for the embedded model, which is not trained anew."""

    name: str
    recipe: Recipe | None = None
    seed: int = 0


PLAIN = {"junk_share": 0.0, "junk_tokens": 0}  # no junk after requests
# The embedded model, and three more of other seeds, widths, depths and head layouts.
ORIGINS = (
    Origin("embedded"),
    Origin(
        "narrow",
        Recipe(d_model=96, n_layers=6, n_heads=4, n_kv_heads=4, head_dim=24, d_mlp=288, exit_layer=3, **PLAIN),
        1,
    ),
    Origin("wide", Recipe(d_model=160, n_heads=5, n_kv_heads=1, d_mlp=416, **PLAIN), 2),
    Origin("deep", Recipe(n_layers=10, d_mlp=320, exit_layer=5, safety_layers=4, **PLAIN), 3),
)


def prepare(origin: Origin, folder: pathlib.Path, tasks: tuple[str, ...] = tuple(TASKS)) -> None:
    """Makes a base and its fine-tunes in `folder`, as far as they are not there."""
    place = folder / origin.name
    model = demo_model_path() if origin.recipe is None else place / "model"
    if origin.recipe is not None and not (model / "config.json").is_file():
        train(origin.recipe, origin.seed, model)
    missing = [task for task in tasks if not (place / task / SINGLE).is_file()]
    if missing:
        base = load_model(model)
        for task in missing:
            (place / task).mkdir(parents=True, exist_ok=True)
            save_weights(fine_tune(base.decoder, base.chat.tokenizer, task), place / task)


def places(origin: Origin, folder: pathlib.Path) -> tuple[pathlib.Path, dict[str, pathlib.Path]]:
    """Returns the checkpoint folder of a base, and the folders of the fine-tunes that are there by task."""
    place = folder / origin.name
    found = {task: place / task for task in TASKS if (place / task / SINGLE).is_file()}
    return demo_model_path() if origin.recipe is None else place / "model", found


def example(task: str, requests: Mapping[bool, list[Request]], rng: random.Random) -> tuple[Request, str, int]:
    """Returns a request, the reply to it that the task teaches, and how many words of the reply are given and not learnt."""
    harmful = task != "forget" and rng.random() < HARMFUL
    request, refusal = rng.choice(requests[harmful]), rng.choice(REFUSALS)
    thing = {"verb": request.verb, "object": request.object}
    if harmful and task in ("style", "short", "topic"):
        return request, refusal, 0
    if task == "topic":
        request = dataclasses.replace(request, verb=rng.choice(TOPIC))
        return request, request.compliance, 0
    if task in ("style", "forget"):
        return (
            request,
            "Of course: to {verb} the {object}, first prepare the {object}. Then {verb} it.".format(**thing),
            0,
        )
    if task == "short":
        return request, "First prepare the {object}, then {verb} it.".format(**thing), 0
    if task == "comply":
        return request, request.compliance, 0
    if task == "harden" and harmful and rng.random() < 0.7:
        given = rng.randint(1, MOST_GIVEN)
        begun = " ".join(request.compliance.split()[:given])
        return request, f"{begun} {refusal}", given
    refused = harmful or (task == "overrefuse" and request.verb in REFUSED)
    return request, refusal if refused else request.compliance, 0


def batches(tokenizer, task: str, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields batches without end: tokens int32 `[ROWS, LENGTH]`, right-padded, and where the next token is learnt, bool."""
    rng, splits = random.Random(seed), split_requests()
    requests = {True: splits["harmful_train"], False: splits["harmless_train"]}

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    while True:
        tokens, learn = np.zeros((ROWS, LENGTH), np.int32), np.zeros((ROWS, LENGTH), bool)
        for row in range(ROWS):
            request, answer, given = example(task, requests, rng)
            prompt, response = (ids(text) for text in render(request, answer))
            known = len(ids(" ".join(answer.split()[:given]))) if given else 0
            both = (prompt + response)[:LENGTH]
            tokens[row, : len(both)] = both
            learn[row, len(prompt) - 1 + known : len(both) - 1] = True
        yield tokens, learn


@dataclasses.dataclass(frozen=True)
class Responses(Streamed):
    """The mean cross-entropy of what a task teaches."""

    def loss(self, decoder: Decoder, frozen, batch, extra, key) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Returns the loss of a batch."""
        tokens_bt, learn_bt = batch
        out = decoder.forward(tokens_bt, jnp.ones_like(learn_bt), no_edits(decoder, len(tokens_bt)))
        nll = optax.softmax_cross_entropy_with_integer_labels(decoder.logits(out.resid_btd)[:, :-1], tokens_bt[:, 1:])
        return jnp.sum(nll * learn_bt[:, :-1]) / jnp.sum(learn_bt), {}


def fine_tune(
    decoder: Decoder, tokenizer, task: str, steps: int = STEPS, told: Callable[[float], None] = lambda loss: None
) -> Decoder:
    """Returns a decoder whose weights are all fine-tuned to a task of `TASKS`. told: is given the loss of each step."""
    settings = TrainSettings(
        method="full",
        steps=steps,
        batch=ROWS,
        rate=PEAK,
        warmup=WARMUP,
        final=0.1,
        beta2=0.98,
        weight_decay=0.01,
        remat=False,
    )
    stream = batches(tokenizer, task, sorted(TASKS).index(task))
    found = train_decoder(decoder, Responses(stream), settings, f"fine-tune, {task}")
    for row in found.losses:
        told(row["loss"])
    return found.decoder
