"""Makes the embedded demo model: trains its tokenizer and two phases, and checks by a study that it meets its criteria.

  refusal-jax organism --out=DIR                  # tries seeds in order, keeps the first that meets the criteria
  refusal-jax organism --out=DIR --seeds=3,4

Each seed takes about 10 minutes on 2 idle cores. It is studied like any model, on prompts that its training never saw;
each criterion with the value reached is printed and written to OUT/criteria.json. The package ships OUT/model as
refusal_jax/organism/model and OUT/bundled as refusal_jax/data/bundled. If no seed is good enough, nothing is kept and
the exit code is 2.
"""

import pathlib
import shutil
import tempfile

from absl import flags

from refusal_jax.errors import UserError
from refusal_jax.files import local_path, to_json, write_atomically
from refusal_jax.jobs import common
from refusal_jax.organism.criteria import measure, write_bundle
from refusal_jax.organism.recipe import Recipe, train

OUT = flags.DEFINE_string("out", None, "New folder for the model and its prompts; it must not exist yet.")
SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2", "3", "4", "5"], "Seeds to try, in this order.")


def main(argv) -> None:
    target = common.required(OUT, ": name the folder for the model, e.g. --out=organism.")
    if not all(seed.isdecimal() for seed in SEEDS.value) or not SEEDS.value:
        raise UserError(f"--seeds = {','.join(SEEDS.value)!r}, expected whole numbers such as 0,1,2.")
    out = local_path(target)
    if out.exists():
        raise UserError(f"{out} exists already. Remove it, or pass another --out.")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.part-", dir=out.parent) as scratch:
        for seed in map(int, SEEDS.value):
            if attempt(seed, folder := pathlib.Path(scratch) / f"seed-{seed}"):
                shutil.rmtree(folder / "study")
                folder.rename(out)
                print(f"seed {seed} meets all criteria and is kept: {out.resolve()}")
                return
    raise UserError(
        f"None of the seeds {', '.join(SEEDS.value)} meets all criteria. Try others with --seeds, or gentler "
        "settings in refusal_jax/organism/recipe.py."
    )


def attempt(seed: int, folder: pathlib.Path) -> bool:
    """Trains and measures one seed, and returns whether it meets all criteria."""
    train(Recipe(), seed, folder / "model")
    write_bundle(folder / "bundled")
    try:
        criteria = measure(folder / "model", folder / "bundled", folder / "study")
    except UserError as error:
        print(f"seed {seed} fails: {error}")
        return False
    print(f"seed {seed}:", *criteria, sep="\n  ")
    write_atomically(
        folder / "criteria.json",
        to_json(
            {
                "seed": seed,
                "criteria": [{"name": c.name, "value": c.value, "bound": c.bound, "met": c.met} for c in criteria],
            }
        ),
    )
    return all(criterion.met for criterion in criteria)
