"""Which prompts a study uses: the paper's seeded draws, in the paper's order, from one stream."""

import random

from refusal_jax.data.prompts import dataset_name, read_prompts, resolve
from refusal_jax.errors import UserError

SPLITS = ("harmful_train", "harmless_train", "harmful_val", "harmless_val", "harmful_test", "harmless_test")


def sample_prompts(data) -> dict[str, list[dict]]:
    """`{split: [{"instruction", "category"}]}` for a config's `data`.

    As in the published runs: seed once, draw train and val of each side, and later the harmless test prompts from the
    same stream; the harmful test set is used whole, cut to `n_test` in file order if longer. A set smaller than asked
    for is used whole. Sets of `over_refusal` follow by name, drawn from streams of their own, so that they change none of
    the paper's draws. Raises UserError as `read_prompts` does.
    """
    rng = random.Random(data.seed)
    sets = {split: read_prompts(resolve(data[split], split)) for split in SPLITS}
    counts = {"train": data.n_train, "val": data.n_val, "test": data.n_test}
    drawn = {}
    for split in SPLITS:
        count = min(counts[split.split("_")[1]], len(sets[split]))
        drawn[split] = sets[split][:count] if split == "harmful_test" else rng.sample(sets[split], count)
    for name, source in over_refusal_names(data).items():
        rows = read_prompts(resolve(source, "harmless_test"))
        drawn[f"{name}_test"] = random.Random(data.seed).sample(rows, min(data.n_test, len(rows)))
    return drawn


def over_refusal_names(data) -> dict[str, str]:
    """`{name: source}` of the over-refusal sets. Raises UserError for names that results could not be told apart by."""
    names, taken = {}, {"harmful", "harmless", dataset_name(data.harmful_test)}
    for source in data.over_refusal:
        name = dataset_name(source)
        if name in taken or "_baseline" in name or "_ablation" in name:
            raise UserError(
                f"The over-refusal set {source} would be called {name!r}, as other results are. Rename the file."
            )
        taken.add(name)
        names[name] = source
    return names
