"""The settings of a training, what each means, and their defaults."""

import dataclasses
import math

from refusal_jax.errors import UserError, did_you_mean, field
from refusal_jax.models.config import ModelConfig
from refusal_jax.models.weights import weight_table
from refusal_jax.settings import Settings, option

METHODS = ("lora", "full")
TARGETS = ("q", "k", "v", "o", "gate", "up", "down")  # matrices of a block that low-rank factors can stand beside


def matrix_names(cfg: ModelConfig) -> tuple[str, ...]:
    """Returns the names of the matrices of a model's blocks that read or write residuals, such as "q"; not those of routers."""
    table = weight_table(cfg).items()
    matrices = [path for path, w in table if len(w.axes) == 3 and "embed" in w.axes and "routes" not in w.axes]
    return tuple(path.removeprefix("blocks.") for path in matrices)


@dataclasses.dataclass
class TrainSettings(Settings, path="train"):
    """Tells what of a model is trained, by which optimiser, for how long, and how often its state is kept."""

    method: str = option(
        "lora", "What is trained: 'lora', low-rank factors beside frozen matrices, or 'full', all weights"
    )
    rank: int = option(16, "Rank of the factors")
    alpha: float = option(32.0, "What the factors' product is multiplied by, divided by their rank")
    rslora: bool = option(False, "Whether alpha is divided by the square root of the rank instead")
    targets: tuple[str, ...] = option(
        TARGETS,
        "Matrices of each block that get factors, of those that it has: q, k, v and o of attention, gate, up and down of the "
        "MLP. Layers without attention have others, which an error lists. Mixtures of experts are not trained",
    )
    layers: tuple[int, ...] = option(
        (),
        "Blocks that get factors, counted from 0; () is all of them. Where all weights are trained, the blocks that learn: "
        "embeddings and the last norm then stay as they are, but their gradients count when gradients are clipped",
    )
    steps: int = option(200, "Number of steps of the optimiser")
    batch: int = option(16, "Rows of a step's batch, of each kind of rows that the recipe has")
    accumulate: int = option(
        1, "Parts of a batch whose gradients are computed one after the other and added, to save memory"
    )
    rate: float = option(1e-4, "Largest learning rate of AdamW")
    warmup: int = option(10, "Steps in which the rate rises from 0 to the largest")
    final: float = option(0.0, "What the rate falls to in the end, along a cosine, as a share of the largest")
    beta1: float = option(0.9, "Decay of AdamW's mean of gradients")
    beta2: float = option(0.999, "Decay of AdamW's mean of squared gradients")
    epsilon: float = option(1e-8, "What AdamW adds to the root of that mean")
    weight_decay: float = option(0.0, "Weight decay of AdamW")
    clip: float = option(1.0, "Largest norm of all gradients together, to which larger ones are scaled; 0 scales none")
    remat: bool = option(
        True, "Whether gradients compute the values of each block anew, which saves memory and costs a third"
    )
    max_tokens: int = option(512, "Tokens of a row at most; what is longer is cut at its end")
    every: int = option(
        100, "Steps after which the state of the training is kept, to go on from; 0 keeps only the last"
    )
    seed: int = option(0, "Seed of the factors, of the order of rows and of whatever a recipe draws")

    @property
    def scale(self) -> float:
        """Returns what the product of the factors is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def check(self, cfg: ModelConfig) -> None:
        """Raises UserError for settings that are out of range or that the model does not fit, and for a mixture of experts."""
        if cfg.n_experts:
            raise UserError(
                "This model is a mixture of experts, and the loop over its experts has no gradient: it cannot be trained here. "
                "Name a model without experts, or choose what trains nothing."
            )
        self._check_choice("method", self.method, METHODS)
        least = {"rank": 1, "steps": 1, "batch": 1, "accumulate": 1, "warmup": 0, "max_tokens": 2, "every": 0}
        for name, smallest in least.items():
            if self[name] < smallest:
                raise UserError(f"{field(f'train.{name}')} = {self[name]}, expected {smallest} or more.")
        above = {"alpha": self.alpha, "rate": self.rate, "epsilon": self.epsilon}
        for name, value in above.items():
            if not (math.isfinite(value) and value > 0):
                raise UserError(f"{field(f'train.{name}')} = {value}, expected a number above 0.")
        for name in ("final", "weight_decay", "clip"):
            if not (math.isfinite(self[name]) and self[name] >= 0):
                raise UserError(f"{field(f'train.{name}')} = {self[name]}, expected 0 or a number above it.")
        for name in ("beta1", "beta2"):
            if not 0 <= self[name] < 1:
                raise UserError(f"{field(f'train.{name}')} = {self[name]}, expected a number from 0 to below 1.")
        if self.batch % self.accumulate:
            raise UserError(
                f"{field('train.batch')} = {self.batch} cannot be cut into {field('train.accumulate')} = {self.accumulate} equal "
                "parts. Choose a batch that is a multiple of it."
            )
        if self.warmup >= self.steps:
            raise UserError(
                f"{field('train.warmup')} = {self.warmup} steps leave none of {field('train.steps')} = {self.steps} at the "
                "full rate. Choose fewer."
            )
        for layer in self.layers:
            if not 0 <= layer < cfg.n_layers:
                raise UserError(
                    f"{field('train.layers')} names block {layer}; the model's blocks are 0 to {cfg.n_layers - 1}."
                )
        if self.method == "lora":
            self._check_factors(cfg)

    def _check_factors(self, cfg: ModelConfig) -> None:
        known = tuple(dict.fromkeys((*TARGETS, *matrix_names(cfg))))
        if not self.targets:
            raise UserError(
                f"{field('train.targets')} is empty: nothing would be trained. Name some of {', '.join(known)}."
            )
        for target in self.targets:
            self._check_choice("targets", target, known)
        if not set(self.targets) & set(matrix_names(cfg)):
            raise UserError(
                f"{field('train.targets')} names {', '.join(self.targets)}, of which this model's blocks have none. Name some of "
                f"{', '.join(matrix_names(cfg))}."
            )
        table = weight_table(cfg)
        paths = [f"blocks.{target}" for target in self.targets if f"blocks.{target}" in table]
        having = {layer for path in paths for layer in table[path].layers}
        if self.layers and not having & set(self.layers):
            raise UserError(
                f"{field('train.layers')} names blocks that have none of {', '.join(self.targets)}: nothing would be trained. "
                f"Name some of the blocks {', '.join(map(str, sorted(having)))}, or other {field('train.targets')}."
            )

    @staticmethod
    def _check_choice(name: str, value: str, known: tuple[str, ...]) -> None:
        if value not in known:
            raise UserError(
                f"{field(f'train.{name}')} names {value!r}, expected one of {', '.join(known)}.{did_you_mean(value, known)}"
            )
