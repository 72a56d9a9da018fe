"""Which prompts a study uses: the paper's seeded draws, in the paper's order, from one stream."""

import random

from refusal_jax.data.prompts import read_prompts, resolve

SPLITS = ("harmful_train", "harmless_train", "harmful_val", "harmless_val", "harmful_test", "harmless_test")


def sample_prompts(data) -> dict[str, list[dict]]:
    """`{split: [{"instruction", "category"}]}` for a config's `data`.

    As in the published runs: seed once, draw train and val of each side, and later the harmless test prompts from the
    same stream; the harmful test set is used whole, cut to `n_test` in file order if longer. A set smaller than asked
    for is used whole. Raises UserError as `read_prompts` does.
    """
    rng = random.Random(data.seed)
    sets = {split: read_prompts(resolve(data[split], split)) for split in SPLITS}
    counts = {"train": data.n_train, "val": data.n_val, "test": data.n_test}
    drawn = {}
    for split in SPLITS:
        count = min(counts[split.split("_")[1]], len(sets[split]))
        drawn[split] = sets[split][:count] if split == "harmful_test" else rng.sample(sets[split], count)
    return drawn
