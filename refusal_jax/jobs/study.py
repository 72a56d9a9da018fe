"""Runs the paper's whole study on a chat model: directions, selection, completions, loss, report.

  refusal-jax study --workdir=runs/first                       # the embedded model, about half a minute on a laptop
  refusal-jax study --model=DIR --workdir=runs/mine            # an HF checkpoint folder, the paper's settings
  refusal-jax study --model=Qwen/Qwen2.5-0.5B-Instruct --workdir=runs/qwen      # by its name on the hub; @REVISION
  refusal-jax study --config=configs/demo.py --workdir=DIR --config.select.full_grid=True

If the study is stopped at any moment, the same command continues it; after it has finished, the command does nothing.
If no direction passes the selection, or the model does not refuse, the exit code is 4. The report then has the refusal rates
of the unedited model and the nearest candidates, and the same command with other --config.select, --config.filter,
--config.refusal_tokens or --config.positions tries again with what was measured.

Every setting is a field of the config (refusal_jax/study/config.py explains them all) and can be overridden by
--config.SECTION.NAME=VALUE. Prompts come from the bundled set, from files, --config.data.harmful_train=my.csv (.json,
.jsonl, .csv, .txt), from a data set on the hub, hf:ORG/NAME:SPLIT[:COLUMN] (slices as in train[:400]; a subset and a
revision as in hf:ORG/NAME/SUBSET@REVISION:SPLIT), or from what `refusal-jax data fetch` has downloaded: "paper" for the
paper's split, "jailbreakbench" or another set's name. Completions are judged by the paper's substrings and whatever
--config.judges names (refusal-jax evaluate --help); --config.data.over_refusal="('xstest',)" adds harmless prompts that
look harmful.
Chat template and refusal tokens are found in the model and printed; --config.chat_template=NAME (chatml, gemma,
llama-2, llama-3, vicuna, alpaca, zephyr, llama-3-published, or a .jinja file) and --config.refusal_tokens="('I', 'As')"
set them instead. --config.system_prompt=TEXT|FILE.txt puts a system prompt before every prompt.

On several hosts, start the same command on each; a mesh that is set explicitly (--config.mesh.data, .fsdp, .model) must
use all devices. A TPU slice needs nothing more; elsewhere add --coordinator=HOST:PORT --num_processes=N --process_id=I.
Process 0 writes the folder. If one process ends, all end within a minute, and the same command continues the study.

The folder receives direction.safetensors and direction_metadata.json (the direction, its position and layer),
direction_evaluations.json, completions/, loss_evals/ (all in the format of the paper's code), statistics.json and
statistics.csv (rates, paired tests, agreement of judges, lengths), damage.json (KL from baseline), manifest.json and
report.html.
"""

import pathlib

from absl import flags

from refusal_jax import distributed
from refusal_jax.errors import NoDirection
from refusal_jax.jobs import common, devices, processes, settings
from refusal_jax.report.text import text_summary
from refusal_jax.runs.artifacts import REPORT
from refusal_jax.runs.run import Run
from refusal_jax.study.study import SECTIONS, run_study

WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Folder of the run, or gs://BUCKET/FOLDER. A new one is created; a run that is already there is continued.",
)
MODEL = flags.DEFINE_string(
    "model",
    None,
    f"{common.CHECKPOINT} It takes the place of config.model. Default: the embedded demo model.",
)
for shared in (settings, devices, processes):
    flags.adopt_module_key_flags(shared)


def main(argv) -> None:
    processes.join()
    workdir = common.required(WORKDIR, ": name the folder for the results, e.g. --workdir=runs/first.")
    try:
        show(run_study(settings.study_settings(MODEL.value), workdir))
    except NoDirection as none:
        assert isinstance(none.run, Run)
        show(none.run)
        raise


def show(run: Run) -> None:
    """Prints the numbers of a finished study, and where its report is."""
    if not distributed.first():
        return
    if not run.worked:
        finished = run.manifest["stages"]["report"]["finished"]
        print(f"This study was finished at {finished}; nothing was left to do.\n")
    print(text_summary(run, SECTIONS))
    report = run.path(REPORT)
    print(f"\nReport: {report.resolve() if isinstance(report, pathlib.Path) else report}")
