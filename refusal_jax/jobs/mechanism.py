"""Looks at how a study's direction works: which heads carry it, what a suffix does to it, and how single it is.

  refusal-jax mechanism --direction=runs/first                              # all parts, added to the study in that folder
  refusal-jax mechanism --direction=runs/first --suffix=mine.txt            # with what a suffix of yours does
  refusal-jax mechanism --direction=runs/first --parts=attribution --attribution.heads=16

The parts are further stages of the study: they write into its folder, below mechanism/, its report.html gains their sections, and
their numbers are printed, with 95 % intervals over prompts. A part that reads what another one writes has that done, too. If the
job is stopped at any moment, the same command continues it; parts that are done are skipped unless a setting of theirs changes.
Model, prompts, chat template, dtype and mesh are the study's.

A suffix is text that follows an instruction. The file holds one for all harmful test prompts, one for each of them in the order
of the study's prompts.json, or rows of an instruction and its suffix (.json, .jsonl, .csv); in a .txt file each line is one, with
the blanks at its beginning. No suffix ships for any model but the embedded one, and none is searched for others.

On several hosts, start the same command on each, as the study. `refusal-jax plan --mechanism` estimates what it needs on a TPU.
"""

from absl import flags

from refusal_jax.jobs import further, processes
from refusal_jax.jobs.setting_flags import flags_of, given
from refusal_jax.study.mechanism.run import run_mechanism
from refusal_jax.study.mechanism.settings import MechanismSettings
from refusal_jax.study.mechanism.stages import STAGES

SETTINGS = flags_of(MechanismSettings())
for shared in (further, processes):
    flags.adopt_module_key_flags(shared)
LISTED = further.listed(STAGES)


def main(argv) -> None:
    processes.join()
    further.show(run_mechanism(given(MechanismSettings, SETTINGS), further.folder(), further.MODEL.value or ""), STAGES)
