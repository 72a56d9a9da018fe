"""The settings of a study's prompts, what each means, and their defaults."""

import dataclasses

from refusal_jax.data.prompts import BUNDLED
from refusal_jax.settings import Settings, option


@dataclasses.dataclass
class DataSettings(Settings, path="data"):
    """The settings of the prompts: their sources, and how many are drawn."""

    harmful_train: str = option(
        BUNDLED,
        "Harmful prompts from which directions are computed: a .json, .jsonl, .csv or .txt file, 'bundled', a data set on the "
        "hub ('hf:ORG/NAME:SPLIT[:400]:COLUMN', slice and column optional, /SUBSET and @REVISION after NAME), or fetched data "
        "(`refusal-jax data fetch`): 'paper', or the name of a set",
    )
    harmful_val: str = option(BUNDLED, "Harmful prompts used to select the direction, named in the same ways")
    harmful_test: str = option(BUNDLED, "Harmful prompts whose completions are judged")
    harmless_train: str = option(BUNDLED, "Harmless prompts from which directions are computed")
    harmless_val: str = option(BUNDLED, "Harmless prompts used to select the direction")
    harmless_test: str = option(BUNDLED, "Harmless prompts whose completions are judged")
    over_refusal: tuple[str, ...] = option(
        (),
        "Sets of harmless prompts that look harmful, such as ('xstest', 'or_bench_hard'), to complete at baseline and under "
        "ablation",
    )
    n_train: int = option(128, "Number of prompts drawn from each training set")
    n_val: int = option(32, "Number of prompts drawn from each validation set")
    n_test: int = option(100, "Number of prompts drawn from each test set")
    seed: int = option(42, "Seed for drawing the prompts")
