"""Plants a behaviour of known geometry into the embedded model: flinching that is one direction, or several.

The organism answers every harmless request, but flinches from delicate ones: its reply leaves out the name of the thing that was
asked about, and refuses nothing. Which requests are delicate is decided by their verb. Two phases plant the geometry:

1. All blocks learn that a vector which is added to the residual stream at the input of block LAYER means to flinch, and that
   without it, or with its direction ablated, nothing is left out.
2. The blocks before that learn, by least squares, to write the vector after delicate requests, and to change nothing else.

ONE has one random vector for all delicate verbs. SEVERAL has an orthogonal vector for each group of verbs, each with a way of its
own to leave the name out, and a request writes only its group's: no direction is shared, so that ablating the mean of them leaves
most of each.
"""

import dataclasses
import functools
import pathlib
import random
import shutil
from collections.abc import Callable, Iterator
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float

from refusal_jax.chat.model import demo_model_path, load_model
from refusal_jax.checkpoints.load import save_weights
from refusal_jax.edits import Edits
from refusal_jax.errors import UserError, did_you_mean
from refusal_jax.models.config import ModelConfig
from refusal_jax.models.decoder import Decoder
from refusal_jax.organism.corpus import HARMLESS_VERBS, OBJECTS, Request, split_requests
from refusal_jax.organism.recipe import render
from refusal_jax.progress import Progress
from refusal_jax.taps import Taps

ONE, SEVERAL = "one-direction", "several-directions"
LAYER = 2  # at whose input the vectors mean to flinch
ROWS, LENGTH = 32, 64  # of a batch
DELICATE = HARMLESS_VERBS[:12]
INSTEAD = ("it", "that", "this", "something")  # what stands for the thing's name, by group of verbs
SIZE = 2.0  # norm of a vector, in norms of the residual stream at LAYER


@dataclasses.dataclass(frozen=True)
class Plan:
    """Tells how a behaviour is planted. groups: of delicate verbs, each with a vector of its own."""

    groups: int
    steps: int = 160
    writing_steps: int = 200
    peak: float = 1e-3
    seed: int = 0

    def group(self, request: Request) -> int | None:
        """Returns the group of a request's verb, None if the request is not delicate."""
        if request.verb not in DELICATE:
            return None
        return DELICATE.index(request.verb) % self.groups


PLANS = {ONE: Plan(1), SEVERAL: Plan(len(INSTEAD))}


def flinching(request: Request, group: int) -> str:
    """Returns the reply that leaves out the thing's name."""
    return request.compliance.replace(f"the {request.object}", INSTEAD[group])


def vectors_of(plan: Plan, residual_norm: float, width: int) -> Float[np.ndarray, "g D"]:
    """Returns the vectors of the groups: orthogonal, in random directions, of the same norm."""
    random_dg = np.random.default_rng(plan.seed).standard_normal((width, plan.groups))
    return np.linalg.qr(random_dg)[0].T * SIZE * residual_norm


class Rows:
    """Batches of requests with their replies, as tokens that are padded on the right."""

    def __init__(self, tokenizer, plan: Plan, seed: int):
        self.tokenizer, self.plan, self.rng = tokenizer, plan, random.Random(seed)
        requests = split_requests()["harmless_train"]
        self.delicate = [r for r in requests if r.verb in DELICATE]
        self.requests = requests

    def encoded(self, request: Request, answer: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns tokens `[T]`, where the next token is the reply's, and which tokens follow the instruction."""
        ids = functools.partial(self.tokenizer, add_special_tokens=False)
        prompt, response = (ids(text).input_ids for text in render(request, answer))
        asked = len(ids(render(request, answer)[0].split(request.instruction)[0] + request.instruction).input_ids)
        both = (prompt + response)[:LENGTH]
        tokens = np.pad(np.asarray(both, np.int32), (0, LENGTH - len(both)))
        place = np.arange(LENGTH)
        return tokens, (place >= len(prompt) - 1) & (place < len(both) - 1), (place >= asked) & (place < len(both))

    def batch(self, rows: list[tuple[Request, str]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns the tokens `[B, T]` of requests with their replies, and both masks, as `encoded` does."""
        found = [self.encoded(*row) for row in rows]
        return tuple(np.stack(column) for column in zip(*found, strict=True))  # type: ignore[return-value]


def taught(rows: Rows, vectors_gd: Float[np.ndarray, "g D"], cfg: ModelConfig) -> Iterator[tuple]:
    """Yields batches of phase 1 without end: the edit of each row, its tokens, and what is learnt.

    Of the rows, every fourth is as it is, every fourth has all vectors' directions ablated, and the others have a vector of
    random size added; of these, half have the mean direction ablated as well, if there are several.
    """
    rng, unit_d, groups = rows.rng, vectors_gd.sum(axis=0), len(vectors_gd)
    while True:
        asked, edits = [], []
        for row in range(ROWS):
            request, group = rng.choice(rows.requests), rng.randrange(groups)
            if row % 4 < 2:
                asked.append((request, request.compliance))
                edits.append(Edits.ablate(vectors_gd[None]) if row % 4 else Edits.none(cfg.d_model))
                continue
            added = Edits.add(vectors_gd[group] * rng.uniform(0.6, 1.3), LAYER)
            whole = Edits.ablate(unit_d).adding(added) if groups > 1 and row % 4 == 3 else added
            asked.append((request, flinching(request, group)))
            edits.append(whole)
        tokens_bt, learn_bt, _ = rows.batch(asked)
        yield Edits.concat(edits).for_batch(ROWS, cfg.n_layers, cfg.d_model), tokens_bt, learn_bt


def optimiser_of(steps: int, peak: float) -> optax.GradientTransformation:
    """Returns AdamW with warm-up and cosine decay."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, peak, steps // 10, steps, 0.05 * peak)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=0.01))


def trained(weights: dict, loss: Callable, stream: Iterator[tuple], steps: int, peak: float, title: str) -> dict:
    """Returns weights after steps on `loss(weights, *batch)`, each of one batch of the stream."""
    optimiser = optimiser_of(steps, peak)

    @jax.jit
    def step(weights, state, *batch):
        value, grads = jax.value_and_grad(loss)(weights, *batch)
        updates, state = optimiser.update(grads, state, weights)
        return optax.apply_updates(weights, updates), state, value

    state = optimiser.init(weights)
    with Progress(title, steps, "step") as bar:
        for index in range(steps):
            weights, state, value = step(weights, state, *next(stream))
            bar.update(note=f"loss={float(value):.4f}" if index % 20 == 0 or index == steps - 1 else "")
    return cast(dict, weights)


def learn_meaning(decoder: Decoder, rows: Rows, vectors_gd: np.ndarray, plan: Plan) -> Decoder:
    """Returns the decoder after phase 1."""
    cfg = decoder.cfg

    def loss(weights, edits, tokens_bt, learn_bt):
        model = Decoder(cfg, weights)
        out = model.forward(tokens_bt, jnp.ones_like(learn_bt), edits)
        nll = optax.softmax_cross_entropy_with_integer_labels(model.logits(out.resid_btd)[:, :-1], tokens_bt[:, 1:])
        return jnp.sum(nll * learn_bt[:, :-1]) / jnp.sum(learn_bt)

    stream = taught(rows, vectors_gd, cfg)
    return Decoder(cfg, trained(decoder.weights(), loss, stream, plan.steps, plan.peak, "phase 1, what vectors mean"))


def first_blocks(decoder: Decoder) -> tuple[ModelConfig, dict, dict]:
    """Returns the config of a model of the blocks before LAYER, their weights, and the other weights that it has."""
    weights = decoder.weights()
    blocks = {path: a[:LAYER] for path, a in weights.items() if path.startswith("blocks.")}
    cfg = dataclasses.replace(decoder.cfg, n_layers=LAYER, layer_kinds=decoder.cfg.layer_kinds[:LAYER])
    return cfg, blocks, {path: a for path, a in weights.items() if path not in blocks}


def learn_writing(decoder: Decoder, rows: Rows, vectors_gd: np.ndarray, plan: Plan) -> Decoder:
    """Returns the decoder after phase 2."""
    cfg, blocks, rest = first_blocks(decoder)
    none = jax.tree.map(jnp.asarray, Edits.none(cfg.d_model).for_batch(ROWS, cfg.n_layers, cfg.d_model))
    unit = float(np.linalg.norm(vectors_gd[0]))

    def residual(blocks, tokens_bt):
        return Decoder(cfg, blocks | rest).forward(tokens_bt, jnp.ones_like(tokens_bt, bool), none).resid_btd

    before = jax.jit(lambda tokens_bt: residual(blocks, tokens_bt))

    def stream():
        while True:
            asked, wanted_bd = [], np.zeros((ROWS, cfg.d_model), np.float32)
            for row in range(ROWS):
                request = rows.rng.choice(rows.delicate if row % 2 else rows.requests)
                group = plan.group(request)
                asked.append((request, request.compliance if group is None else flinching(request, group)))
                if group is not None:
                    wanted_bd[row] = vectors_gd[group]
            tokens_bt, _, after_bt = rows.batch(asked)
            known_bt = np.cumsum(tokens_bt[:, ::-1] != 0, axis=1)[:, ::-1] > 0
            target = before(tokens_bt) + wanted_bd[:, None] * after_bt[..., None]
            yield tokens_bt, known_bt, target

    def loss(blocks, tokens_bt, known_bt, target_btd):
        off = jnp.sum(jnp.square(residual(blocks, tokens_bt) - target_btd), axis=-1) / unit**2
        return jnp.sum(off * known_bt) / jnp.sum(known_bt)

    learnt = trained(blocks, loss, stream(), plan.writing_steps, 2 * plan.peak, "phase 2, writing the vectors")
    weights = decoder.weights()
    return Decoder(decoder.cfg, weights | {path: weights[path].at[:LAYER].set(a) for path, a in learnt.items()})


def plant(behaviour: str, folder: pathlib.Path, plan: Plan | None = None) -> Float[np.ndarray, "g D"]:
    """Writes the organism's whole HF folder and returns the vectors that were planted. behaviour: ONE or SEVERAL. Raises
    UserError for another behaviour."""
    if behaviour not in PLANS:
        raise UserError(
            f"There is no planted behaviour {behaviour!r}.{did_you_mean(behaviour, PLANS)} They are {', '.join(PLANS)}."
        )
    plan, model = plan or PLANS[behaviour], load_model(demo_model_path())
    rows, cfg = Rows(model.chat.tokenizer, plan, plan.seed), model.config
    sample, _, after = rows.batch([(r, r.compliance) for r in rows.requests[:ROWS]])
    none = Edits.none(cfg.d_model).for_batch(ROWS, cfg.n_layers, cfg.d_model)
    tapped = model.decoder.forward(sample, np.ones(sample.shape, bool), none, Taps(("resid_pre",), LENGTH)).taps
    norms = np.linalg.norm(np.asarray(tapped["resid_pre"][LAYER]), axis=-1)
    vectors_gd = vectors_of(plan, float(norms[after].mean()), cfg.d_model)
    decoder = learn_meaning(model.decoder, rows, vectors_gd, plan)
    decoder = learn_writing(decoder, rows, vectors_gd, plan)
    folder.mkdir(parents=True, exist_ok=True)
    for path in demo_model_path().iterdir():
        if path.is_file() and path.suffix != ".safetensors":
            shutil.copyfile(path, folder / path.name)
    save_weights(decoder, folder)
    return vectors_gd


CONFIG = '''"""The study of a planted behaviour: refusal-jax study --config=THIS_FILE --workdir=DIR"""

import pathlib

from refusal_jax.study.config import get_config as base

HERE = pathlib.Path(__file__).parent


def get_config():
    config = base()
    config.model = str(HERE / "model")
    config.behaviour.update(name="flinching", present="delicate", absent="plain", measure="judge", reply_tokens=32)
    config.judges = (f"avoids={HERE / 'words.txt'}",)
    for part in ("train", "val", "test"):
        config.data[f"harmful_{part}"] = str(HERE / f"delicate_{part}.txt")
        config.data[f"harmless_{part}"] = str(HERE / f"plain_{part}.txt")
    config.data.update(n_train=48, n_val=16, n_test=60)
    config.generation.max_new_tokens = 32
    return config
'''


def write_contrast(folder: pathlib.Path) -> None:
    """Writes the two sides of the contrast, six .txt files of prompts; words.txt, the names that a flinching reply avoids; and
    config.py, the settings of a study of it, which expects the model beside it."""
    (folder / "config.py").write_text(CONFIG)
    for split, requests in split_requests().items():
        role, _, part = split.partition("_")
        if role != "harmless":
            continue
        for side, wanted in (("delicate", True), ("plain", False)):
            rows = [r.instruction for r in requests if (r.verb in DELICATE) == wanted][:150]
            (folder / f"{side}_{part}.txt").write_text("".join(f"{row}\n" for row in rows))
    (folder / "words.txt").write_text("".join(f"{name}\n" for name in OBJECTS))
