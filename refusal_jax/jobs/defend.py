"""Trains a model to hold on to its refusals, by a published defence, and measures what that changed.

  refusal-jax defend --recipe=sft --out=runs/sft                            # the embedded model, a minute or two on a laptop
  refusal-jax defend --recipe=all --out=runs/defences                       # all but calibration, each into a folder of its name
  refusal-jax defend --recipe=sft --model=DIR --data.harmful=bad.jsonl --data.harmless=good.jsonl --out=runs/mine

OUT receives the defended model (model, a Hugging Face checkpoint, or adapter, for PEFT: --output), defence.json (how many harmful
prompts are refused and harmless ones answered before and after, on held-out prompts, with 95 % intervals, paired tests and the
KL divergence on harmless prompts), losses.jsonl (each part of the loss by step) and log.txt. If the job is stopped at any moment,
the same command goes on: a training goes on from its last state and comes to the same weights.

Prompts come from files (.json, .jsonl, .csv, .txt, with replies or without), from a data set on the hub, hf:ORG/NAME:SPLIT, or
from fetched data; on the embedded model without any they are made of its corpus, which is harmless by construction. Each recipe
has its own defaults for the training, which flags override. No defence is known to hold against everyone who has the weights:
`refusal-jax resist OUT/model` measures what one holds against.

On several hosts, start the same command on each, with an OUT that all of them see.
"""

import shlex
import textwrap

from absl import flags

from refusal_jax import distributed
from refusal_jax.defence.catalogue import RECIPES
from refusal_jax.defence.run import RECORD, defend
from refusal_jax.defence.settings import DefenceSettings
from refusal_jax.defence.text import lines
from refusal_jax.jobs import common, processes
from refusal_jax.jobs.setting_flags import flags_of, given_only

OUT = flags.DEFINE_string(
    "out", None, "Folder of the results. A new one is created; what is there already is gone on with."
)
SETTINGS = flags_of(DefenceSettings())
flags.adopt_module_key_flags(processes)
WIDTH = max(map(len, RECIPES))
LISTED = (
    "\nRecipes, which --recipe names; several are separated by commas, and all is every one but calibration, and but\n"
    "those that need replies that comply where there are none:\n"
    + "".join(
        textwrap.fill(
            recipe.about + (f" (arXiv {recipe.source})" if recipe.source else ""),
            100,
            initial_indent=f"  {name:{WIDTH}}  ",
            subsequent_indent=" " * (WIDTH + 4),
        )
        + "\n"
        for name, recipe in RECIPES.items()
    )
)


def main(argv) -> None:
    processes.join()
    out = common.required(OUT, ": name the folder for the results, e.g. --out=runs/sft.")
    runs = defend(given_only(SETTINGS), out, " ".join(["refusal-jax", "defend", *map(shlex.quote, argv[1:])]))
    if not distributed.first():
        return
    for run in runs.values():
        if not run.worked:
            print(
                f"This defence was finished at {run.manifest['stages']['record']['finished']}; nothing was left to do."
            )
        record = run.read_json(RECORD)
        print("\n".join(lines(record)))
        print(f"Result: {', '.join(str(run.path(kind)) for kind in record['outputs'])}\n")
