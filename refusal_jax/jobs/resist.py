"""Tests how well checkpoints keep their refusal under white-box attacks, and gives each its worst case.

  refusal-jax resist                                              # the embedded model
  refusal-jax resist DEFENDED --base=BASE --out=resisted          # a checkpoint, and what broke its base
  refusal-jax resist embedded A/model B/model --out=resisted      # one table of several
  refusal-jax resist DEFENDED --direction=runs/base --tests=selected,reselected

A checkpoint is a folder, a name on the hub (ORG/NAME or ORG/NAME@REVISION), a GGUF file or the folder of a PEFT adapter;
`embedded` is the embedded model. Each gets a study of its own below --out, as far as its direction, and then each test
searches for an attack on its training and validation prompts and is measured on its test prompts: how many of the refusals
that it shows without an attack are kept, how many requests are complied with, how many replies are broken, how many harmless
prompts are answered, and how far the attack moves them. The worst case has an interval that holds for all tests together.
Tests that are done are not done again; one that cannot be done, or fails, is reported with its reason, and never counts as
withstood.

Replies are judged and counted. Their texts are written to files only with --texts.
"""

import sys
import textwrap

from absl import flags

from refusal_jax import distributed
from refusal_jax.jobs import devices, processes
from refusal_jax.jobs.setting_flags import flags_of, given
from refusal_jax.resistance.catalogue import ATTACKS
from refusal_jax.resistance.output.files import write_outputs
from refusal_jax.resistance.output.text import text_of
from refusal_jax.resistance.run import resist
from refusal_jax.resistance.settings import ResistSettings

MOST = 64  # checkpoints of a call
ACTIONS = {"": MOST}
OUT = flags.DEFINE_string(
    "out",
    None,
    "Folder, or gs://BUCKET/FOLDER, for the checkpoints' studies, the outcome of each test, resistance.json and resistance.html. "
    "Without it nothing is kept.",
)
SETTINGS = flags_of(ResistSettings(), but=("checkpoints", "dtype"))
flags.adopt_module_key_flags(devices)
flags.adopt_module_key_flags(processes)
WIDTH = max(len(attack.name) for attack in ATTACKS)


def listed(quick: bool) -> str:
    """Returns the tests that are done by default, or the others, with what each does."""
    return "".join(
        textwrap.fill(
            attack.about, 100, initial_indent=f"  {attack.name:{WIDTH}}  ", subsequent_indent=" " * (WIDTH + 4)
        )
        + "\n"
        for attack in ATTACKS
        if attack.quick is quick
    )


LISTED = "\nTests, which --tests names; all of these without it:\n" + listed(True)
if listed(False):
    LISTED += "\nTests that are done only if --tests names them:\n" + listed(False)


def main(words: list[str]) -> None:
    processes.join()
    settings = given(ResistSettings, SETTINGS)
    settings.checkpoints = tuple(words) or ("",)
    settings.dtype = devices.asked_dtype()
    found = resist(settings, OUT.value or "", devices.mesh_shape())
    if not distributed.first():
        return
    print(text_of(found, colour=sys.stdout.isatty()), end="")
    if OUT.value:
        names = write_outputs(found, OUT.value)
        print(f"\nWritten to {OUT.value}: {', '.join(names)}")
