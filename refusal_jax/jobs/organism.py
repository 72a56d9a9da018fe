"""Makes the embedded demo model: trains its tokenizer and two phases, and checks by a study that it meets its criteria.

  refusal-jax organism --out=DIR                  # tries seeds in order, keeps the first that meets the criteria
  refusal-jax organism --out=DIR --seeds=3,4
  refusal-jax organism --suffix --out=DIR         # only searches a suffix that ends the embedded model's refusal
  refusal-jax organism --behaviour=one-direction --out=DIR       # plants a behaviour into the embedded model
  refusal-jax organism --behaviour=several-directions --out=DIR

Each seed takes about 10 minutes on 2 idle cores. It is studied like any model, on prompts that its training never saw;
each criterion with the value reached is printed and written to OUT/criteria.json. The package ships OUT/model as
refusal_jax/organism/model, OUT/bundled as refusal_jax/data/bundled, and OUT/suffix.txt as refusal_jax/organism/suffix.txt.
If no seed is good enough, nothing is kept and the exit code is 2.

The search for a suffix takes a few minutes. It runs on the embedded model only, whose replies to harmful requests are
sentences without content, and refuses all others. What the suffix does is measured on prompts that it was not made for,
beside random suffixes of as many tokens, and written to OUT/suffix.json.

A planted behaviour takes one to two minutes. It is flinching: the model answers, but leaves out the name of the thing that
was asked about. OUT/config.py is a study of it, refusal-jax study --config=OUT/config.py --workdir=RUN, which says whether
it is one direction (docs/behaviours.md).
"""

import pathlib
import shutil
import tempfile
from collections.abc import Iterable, Sequence

from absl import flags

from refusal_jax.chat.model import ChatModel, demo_model_path, load_model
from refusal_jax.data.prompts import BUNDLED
from refusal_jax.data.sources import resolve
from refusal_jax.errors import UserError
from refusal_jax.files import local_path, to_json, write_atomically
from refusal_jax.jobs import common
from refusal_jax.organism.criteria import Criterion, measure, write_bundle
from refusal_jax.organism.identity import check_embedded, weights_fingerprint
from refusal_jax.organism.planted import PLANS, plant, write_contrast
from refusal_jax.organism.recipe import Recipe, train
from refusal_jax.organism.suffix import find_suffix, measure_suffix, write_suffix
from refusal_jax.organism.suffix_search import Search

OUT = flags.DEFINE_string("out", None, "New folder for what is made; it must not exist yet.")
SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2", "3", "4", "5"], "Seeds to try, in this order.")
SUFFIX = flags.DEFINE_bool("suffix", False, "Train nothing, and only search a suffix for the embedded model.")
BEHAVIOUR = flags.DEFINE_enum(
    "behaviour", None, list(PLANS), "Plant flinching of this geometry into the embedded model, and do nothing else."
)
MODEL = flags.DEFINE_string(
    "model", None, "With --suffix: a copy of the embedded model, instead of the one that ships."
)
TOKENS = flags.DEFINE_integer("tokens", Search.tokens, "Length of the suffix in tokens.", lower_bound=1, upper_bound=64)
STEPS = flags.DEFINE_integer(
    "steps", Search.steps, "Steps of a search, each of which tries some changes.", lower_bound=1
)
SUFFIX_SEEDS = range(3)  # searches for a model that has just been trained


def main(argv) -> None:
    target = common.required(OUT, ": name the folder for what is made, e.g. --out=organism.")
    if not all(seed.isdecimal() for seed in SEEDS.value) or not SEEDS.value:
        raise UserError(f"--seeds = {','.join(SEEDS.value)!r}, expected whole numbers such as 0,1,2.")
    if MODEL.value and not SUFFIX.value:
        raise UserError(
            "--model belongs to --suffix, which searches a suffix for it: a new model is trained from nothing."
        )
    if BEHAVIOUR.value and SUFFIX.value:
        raise UserError("--behaviour and --suffix make different things. Give one of them.")
    out = local_path(target)
    if out.exists():
        raise UserError(f"{out} exists already. Remove it, or pass another --out.")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.part-", dir=out.parent) as scratch:
        if BEHAVIOUR.value:
            plant_only(BEHAVIOUR.value, pathlib.Path(scratch) / "planted", out)
        elif SUFFIX.value:
            search_only(pathlib.Path(scratch) / "suffix", out)
        else:
            train_anew(pathlib.Path(scratch), out)


def plant_only(behaviour: str, folder: pathlib.Path, out: pathlib.Path) -> None:
    """Plants a behaviour into a copy of the embedded model, and writes its prompts and a config beside it."""
    plant(behaviour, folder / "model")
    write_contrast(folder)
    folder.rename(out)
    print(f"planted: {out.resolve()}. Study it with: refusal-jax study --config={out / 'config.py'} --workdir=RUN")


def train_anew(scratch: pathlib.Path, out: pathlib.Path) -> None:
    """Trains seed after seed, and keeps the first that meets all criteria. Raises UserError if none does."""
    for seed in map(int, SEEDS.value):
        if attempt(seed, folder := scratch / f"seed-{seed}"):
            shutil.rmtree(folder / "study")
            folder.rename(out)
            print(f"seed {seed} meets all criteria and is kept: {out.resolve()}")
            return
    raise UserError(
        f"None of the seeds {', '.join(SEEDS.value)} meets all criteria. Try others with --seeds, or gentler "
        "settings in refusal_jax/organism/recipe.py."
    )


def search_only(folder: pathlib.Path, out: pathlib.Path) -> None:
    """Searches a suffix for the embedded model. Raises UserError for another model, and if no seed finds one."""
    model = load_model(MODEL.value or demo_model_path())
    check_embedded(model)
    prompts = resolve(BUNDLED, "harmful_test").parent
    if not all(one.met for one in search(model, prompts, folder, searches(map(int, SEEDS.value)))):
        raise UserError(
            f"None of the seeds {', '.join(SEEDS.value)} found a suffix that meets all criteria. Try others with --seeds, more "
            "--steps, or more --tokens."
        )
    folder.rename(out)
    print(f"The suffix is kept: {out.resolve() / 'suffix.txt'}")


def searches(seeds: Iterable[int]) -> list[Search]:
    """Returns the searches that the flags ask for."""
    return [Search(tokens=TOKENS.value, steps=STEPS.value, seed=seed) for seed in seeds]


def search(
    model: ChatModel, prompts: pathlib.Path, folder: pathlib.Path, tried: Sequence[Search], trained: str = ""
) -> list[Criterion]:
    """Tries searches in turn until one finds a suffix that meets all criteria, writes it to the folder, and returns the criteria
    of the last one. prompts: the folder of bundled prompts. trained: as in `search_suffix`."""
    criteria = []
    for settings in tried:
        found = find_suffix(model, settings, trained)
        effect = measure_suffix(model, found.text, prompts)
        criteria = effect.criteria
        print(f"suffix of seed {settings.seed}: {found.text!r}", *effect.lines, *criteria, sep="\n  ", flush=True)
        if all(criterion.met for criterion in criteria):
            write_suffix(folder, found, settings, effect)
            break
    return criteria


def attempt(seed: int, folder: pathlib.Path) -> bool:
    """Trains and measures one seed, and returns whether it meets all criteria."""
    train(Recipe(), seed, folder / "model")
    write_bundle(folder / "bundled")
    try:
        criteria = measure(folder / "model", folder / "bundled", folder / "study")
    except UserError as error:
        print(f"seed {seed} fails: {error}")
        return False
    if all(criterion.met for criterion in criteria):
        model = load_model(folder / "model")
        criteria += search(model, folder / "bundled", folder, searches(SUFFIX_SEEDS), weights_fingerprint(model))
    print(f"seed {seed}:", *criteria, sep="\n  ")
    write_atomically(
        folder / "criteria.json", to_json({"seed": seed, "criteria": [criterion.row for criterion in criteria]})
    )
    return all(criterion.met for criterion in criteria)
