"""Runs EleutherAI's lm-evaluation-harness with the model `refusal_jax`: standard benchmarks, with and without edits.

  refusal-jax lm_eval --model refusal_jax --model_args pretrained=DIR --tasks mmlu --batch_size 16
  refusal-jax lm_eval --model refusal_jax --model_args ablate=runs/mine --tasks mmlu,gsm8k --batch_size 16
  refusal-jax lm_eval --model refusal_jax --model_args add=runs/mine,scale=-1 --tasks truthfulqa --apply_chat_template

This is the harness's own command, lm_eval, with one more model: all of its arguments are the same, and `lm_eval run
--help` explains them. (The harness finds no models of other packages by itself. In Python, `import
refusal_jax.harness.lm_eval` makes the model known to `lm_eval.simple_evaluate(model="refusal_jax", …)`.) Install it
with: pip install '.[lm_eval]'

--model_args, separated by commas:
  pretrained=DIR         HF checkpoint folder; default: the model that the study of the edit ran on
  ablate=RUN|FILE        remove this direction everywhere: folder of a study, or .npy, .safetensors or .pt file
  add=RUN|FILE           add this direction at its layer
  scale=X                multiple of the direction to add (-1 subtracts), or fraction of it to remove
  layer=L, position=P    where to add; of a file of mean differences, which one (layer alone: of a file with a row a layer)
  subspace=true          remove the span of all rows of the file that ablate names
  dtype=NAME             float32, bfloat16, float16; default: float32 on CPU, bfloat16 elsewhere
  mesh=DATAxFSDPxMODEL   devices along each axis of the mesh, such as 1x1x8
  chat_template=NAME|FILE, thinking=true, system_prompt=TEXT|FILE, cache=DIR   as in a study's config
  max_length=N, add_bos_token=true|false, prefix_token_id=ID, think_end_token=TEXT|ID, enable_thinking=true|false,
  chat_template_args={...}   as for the harness's hf model; its other arguments are refused, or said to mean nothing here
  max_gen_toks=N         maximum length of a reply, where the task sets none
  generation_from_checkpoint=false   plain greedy decoding; by default, the settings of generation_config.json that affect
                         greedy decoding (such as repetition_penalty) apply, as for the harness's hf model

Tasks that measure refusal are added, which the harness lacks: refusal_xstest, refusal_jailbreakbench, refusal_strongreject,
refusal_harmbench, refusal_or_bench, and refusal_prompts for a file of yours (docs/evaluation.md). Add
--apply_chat_template. `refusal-jax lm_eval tasks_folder` prints their folder, for the harness's own --include_path.

Decoding is greedy: tasks that sample are refused, unless --gen_kwargs do_sample=false,temperature=0 is given. Give a
--batch_size (or auto, 32): the harness's default is 1. A model that thinks needs think_end_token=</think>, or whatever
ends its thoughts; otherwise they are scored with the reply; stop strings do not end a thought. JAX picks the devices
(JAX_PLATFORMS=cpu: the CPU).
"""

import importlib.util
import sys

from refusal_jax.errors import UserError

TASKS_FOLDER = "tasks_folder"  # the word that prints the folder of our tasks
PASSED_ON = True  # the harness reads the command line itself


def main(argv) -> None:
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("The harness is not installed. Install it with `pip install '.[lm_eval]'` from a checkout.")
    from lm_eval._cli import HarnessCLI
    from lm_eval.utils import setup_logging

    import refusal_jax.harness.lm_eval  # noqa: F401, registers the model
    from refusal_jax.harness.refusal_tasks import FOLDER

    if argv == [TASKS_FOLDER]:
        print(FOLDER)
        return
    sys.argv = ["refusal-jax lm_eval", *argv]
    setup_logging()
    harness = HarnessCLI()
    arguments = harness.parse_args()
    if hasattr(arguments, "include_path"):  # which the harness takes one of by a flag, and several otherwise
        arguments.include_path = [str(FOLDER), *([arguments.include_path] if arguments.include_path else [])]
    harness.execute(arguments)
