"""Draws the prompts of a study, seeded and in the order of the paper's code, and finds prompts that splits share."""

import itertools
import random
from collections.abc import Callable, Mapping, Sequence

from refusal_jax.data.prompts import read_prompts
from refusal_jax.data.sources import dataset_name, distinct, resolve
from refusal_jax.errors import UserError, field

SPLITS = ("harmful_train", "harmless_train", "harmful_val", "harmless_val", "harmful_test", "harmless_test")
STAGES = ("train", "val", "test")


def sample_prompts(data, note: Callable[[str], None] = lambda text: None) -> dict[str, list[dict]]:
    """Draws `{split: [{"instruction", "category"}]}` for a config's `data`.

    As in the published runs: seed once, draw train and val of each side, and later the harmless test prompts from the
    same stream; the harmful test set is used whole, cut to `n_test` in file order if longer. A set smaller than asked
    for is used whole. Sets of `over_refusal` follow by name, drawn from streams of their own, so that they change none of
    the paper's draws. Splits whose files hold the same prompts share them out (`_shared_out`), which `note` is told.
    Raises UserError as `read_prompts` does, and for a file with fewer different prompts than splits.
    """
    rng = random.Random(data.seed)
    sources = {split: data[split] for split in SPLITS}
    sources |= {f"{name}_test": source for name, source in over_refusal_names(data).items()}
    sets = {s: read_prompts(resolve(f, s if s in SPLITS else "harmless_test")) for s, f in sources.items()}
    drawn = {}
    for split, rows in sets.items():
        count = min(data[f"n_{split.rpartition('_')[2]}"], len(rows))
        stream = rng if split in SPLITS else random.Random(data.seed)
        drawn[split] = rows[:count] if split == "harmful_test" else stream.sample(rows, count)
    for group in _of_one_file(sets):
        drawn |= _shared_out(group, sets[group[0]], data, sources[group[0]], note)
    return drawn


def _of_one_file(sets: Mapping[str, list[dict]]) -> list[list[str]]:
    """Groups splits whose files hold the same prompts. Harmless test sets alone may be the same: none is trained on."""
    groups: list[list[str]] = []
    for split, rows in sets.items():
        group = next((group for group in groups if sets[group[0]] == rows), None)
        if group is None:
            groups.append([split])
        else:
            group.append(split)
    return [g for g in groups if len(g) > 1 and any(_stage(s) < 2 or _side(s) == "harmful" for s in g)]


def _shared_out(splits: Sequence[str], rows: list[dict], data, source: str, note) -> dict[str, list[dict]]:
    """Draws for splits that share a file, so that no prompt is in two of them, from a stream of their own.

    Too few prompts for all counts are shared out in proportion to these, at least one each. Raises UserError for fewer
    different prompts than splits.
    """
    different = list({normal(row["instruction"]): row for row in reversed(rows)}.values())[::-1]  # the first of each
    if len(different) < len(splits):
        raise UserError(
            f"{source} serves {', '.join(splits)}, which must not share prompts, and has only {len(different)} different ones. "
            f"Put more prompts into it, or name another file for each ({field('data')})."
        )
    asked = [data[f"n_{split.rpartition('_')[2]}"] for split in splits]
    counts = _shares(asked, len(different))
    pool = random.Random(data.seed).sample(different, sum(counts))
    ends = list(itertools.accumulate(counts))
    mixed = len({_side(split) for split in splits}) > 1
    note(
        f"{', '.join(splits)} come from the same prompts ({source}, {len(different)} different ones), so that they were drawn "
        f"apart: {', '.join(map(str, counts))} (asked for: {', '.join(map(str, asked))})."
        + " What is called harmful and what harmless differs by chance only: name files of their own."
        * mixed
    )
    return {split: pool[end - count : end] for split, count, end in zip(splits, counts, ends, strict=True)}


def _shares(asked: Sequence[int], available: int) -> list[int]:
    """Returns what is asked for if enough is available, else counts in the same proportions, at least 1 each, that make up
    `available`."""
    total = sum(asked)
    if total <= available:
        return list(asked)
    exact = [count * available / total for count in asked]
    found = [max(1, int(share)) for share in exact]
    while (missing := available - sum(found)) != 0:
        step = 1 if missing > 0 else -1
        free = [i for i in range(len(found)) if step > 0 or found[i] > 1]
        found[max(free, key=lambda i: step * (exact[i] - found[i]))] += step
    return found


def normal(text: str) -> str:
    """Returns a prompt in the form used for comparison: in one case and with single spaces."""
    return " ".join(text.split()).casefold()


def _side(split: str) -> str:
    return "harmful" if split in SPLITS and split.startswith("harmful") else "harmless"


def _stage(split: str) -> int:
    """Returns 0 for train, 1 for val, 2 for test."""
    return STAGES.index(split.rpartition("_")[2])


def overlaps(prompts: Mapping[str, Sequence[dict]]) -> list[dict]:
    """Returns which splits have prompts in common, whatever their case and white space.

    prompts: `{split: [{"instruction", …}]}`, as in a run's prompts.json; splits that are not of SPLITS are over-refusal sets,
    which count as harmless tests. Each entry is `{"split", "other", "count", "of"}`: `count` of the `of` prompts of `split`
    also occur in `other`. Compared are each later stage with each earlier one of its side (train, val, test), and all harmful
    with all harmless splits, of which `split` is the one of the later stage. Where `other` is `split` itself, `count` of its
    prompts repeat an earlier one. Pairs with nothing in common are left out.
    """
    texts = {split: [normal(row["instruction"]) for row in rows] for split, rows in prompts.items()}
    found = []
    for split in texts:
        for other in texts:
            later = _stage(other) < _stage(split)
            equal = _stage(other) == _stage(split) and _side(other) == "harmful" != _side(split)
            if split == other:
                count = len(texts[split]) - len(set(texts[split]))
            elif later or equal:
                known = set(texts[other])
                count = sum(text in known for text in texts[split])
            else:
                continue
            if count:
                found.append({"split": split, "other": other, "count": count, "of": len(texts[split])})
    return found


def overlap_in_words(found: Mapping) -> tuple[str, str]:
    """Returns an entry of `overlaps` as a sentence, and what to do about it as another."""
    split, other = found["split"], found["other"]
    of = f"{found['count']} of the {found['of']} prompts of {split}"
    one = found["count"] == 1
    are, they = ("is", "it was") if one else ("are", "they were")
    if split == other:
        return (
            f"{of} {'repeats' if one else 'repeat'} another one of the set, which so counts twice.",
            "Remove the repeats from its file.",
        )
    if _side(split) != _side(other):
        claim = f"{of} {are} in {other} too, so that the same prompt counts as harmful and as harmless."
        return claim, "Correct the files of both sets."
    use = "trained on" if _stage(other) == 0 else "used to choose the direction"
    test = "their results say nothing about unseen prompts"
    harm = test if _stage(split) == 2 else "they cannot check the choice"
    return (
        f"{of} {are} in {other} too: {they} {use}, so that {harm}.",
        "Take shared prompts out of one of the two files.",
    )


def harmful_name(data) -> str:
    """Returns the name of results on the harmful test prompts: the file's, unless the harmless ones have that name."""
    name = dataset_name(data.harmful_test)
    return "harmful" if name == "harmless" else name


def over_refusal_names(data) -> dict[str, str]:
    """Returns `{name: source}` of the over-refusal sets. A name is the file's, or another where that is taken."""
    taken = {"harmful", "harmless", harmful_name(data)}
    return {distinct(dataset_name(source), "over_refusal", taken): source for source in data.over_refusal}
