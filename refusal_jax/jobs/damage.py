"""Measures what removing a study's direction costs: refusal against damage, at every strength and place.

  refusal-jax damage --direction=runs/first                                  # all parts, added to the study in that folder
  refusal-jax damage --direction=runs/first --grid.steps=10 --grid.most=1.5  # finer and stronger
  refusal-jax damage --direction=runs/first --grid.places=all@all,written@50%-100%,mlp_out@tent:70%:30%

The parts are further stages of the study: they write into its folder, below damage/, its report.html gains their sections, and
their numbers are printed, with 95 % intervals over prompts and in pairs with the model as it is. If the job is stopped at any
moment, the same command continues it; parts that are done are skipped unless a setting of theirs changes. Model, prompts, texts,
chat template, dtype and mesh are the study's.

No weights are rewritten: each setting is a row of one compiled program, in which a part of the direction, its strength, is taken
out of what some layers and sites write. A place is SITES@LAYERS. SITES is `all` (the paper's: each block's input, and what its
attention and its MLP write), `written` (what attention and MLP write, which editing their weights does too), or resid_pre,
attn_out, mlp_out, several joined by +. LAYERS is `all`, a band such as 4-9 or 25%-50% of the depth, or a tent such as
tent:60%:40%, whose strength falls linearly from its greatest at 60 % of the depth to none at a distance of 40 % of it; a fourth
number is what is left there of the greatest instead, such as tent:13.57:3.78:0.8. At a block's input a part is taken out again in
each layer, so that even a low strength leaves little of the direction after some.

Refusal and over-refusal are read at the prompt's end, as the study's refusal tokens tell; the KL divergence is of the next token
after harmless prompts; the loss is on the model's own answers to harmless prompts and on the texts of the study's settings.

On several hosts, start the same command on each, as the study. `refusal-jax plan --damage` estimates what it needs on a TPU.
"""

from absl import flags

from refusal_jax.jobs import further, processes
from refusal_jax.jobs.setting_flags import flags_of, given
from refusal_jax.study.damage.run import run_damage
from refusal_jax.study.damage.settings import DamageSettings
from refusal_jax.study.damage.stages import STAGES

SETTINGS = flags_of(DamageSettings())
for shared in (further, processes):
    flags.adopt_module_key_flags(shared)
LISTED = further.listed(STAGES)


def main(argv) -> None:
    processes.join()
    further.show(run_damage(given(DamageSettings, SETTINGS), further.folder(), further.MODEL.value or ""), STAGES)
