"""Times every part of a study on this machine and says how near each is to what the machine can do; compares with PyTorch.

  refusal-jax bench                                     # the demo model, inflated to 127 million parameters, and PyTorch
  refusal-jax bench --model=DIR --out=bench.json        # a checkpoint: a folder, a name on the hub or a GGUF file
  refusal-jax bench --model=DIR --stages=load,export    # some of the parts
  refusal-jax bench --model=llama_3_8b --mesh=1x1x4     # a shape that `refusal-jax plan` knows, with random weights
  refusal-jax bench --model=DIR --pytorch --nolimits    # the comparison alone

The parts are load (a cold read of the checkpoint, until its weights are on the devices), extraction (scores and mean residuals
of the training and validation prompts), selection (of a direction), prefill and decode (replies of exactly --max_new_tokens
tokens to --rows prompts), loss (under ablation), and export (an edited checkpoint, verified). Each runs once as a user first
meets it, with compilation and no cache of earlier ones, and then --repeats times; the median of these is the work alone.

The operations and bytes are those of the matrix products of the programs that ran, counted from the programs, padding included;
"useful" is the share without padding. They are held against ceilings that are measured on the same devices at the same dtype and
precision: a large matrix product, a pass over a large array, reading the checkpoint's files and writing a file where TMPDIR is.
A part's limit is the ceiling that would take longest, its share how much of the time that is. A share above 100 % is marked with
its likely reason, and so are runs that differ much: use a machine that does nothing else.

With --pytorch, which is the default for the demo model on a CPU, the plain PyTorch version in tests/oracle.py of a checkout runs
after it, with the same checkpoint and prompts: extraction and selection by hooks, and transformers' generate. It needs torch,
which the package itself does not. Its results must be the same, or the exit code is 1. On 2 idle cores with the inflated demo
model, extraction and selection should be at least 5 times faster than it. On a busy machine the ratios overstate refusal_jax's
speed, because PyTorch's threads wait for each other. The whole takes 6 to 15 minutes, and about half of that with --n_train=64
--n_val=16.
"""

import logging
import os
import pathlib
import platform
import tempfile
from functools import partial

import jax
from absl import flags

from refusal_jax.chat.model import demo_model_path, load_model, weights_dtype
from refusal_jax.checkpoints.remote import checkpoint_folder
from refusal_jax.data.sampling import sample_prompts
from refusal_jax.errors import UserError, did_you_mean
from refusal_jax.files import local_path, to_json, write_atomically
from refusal_jax.jobs import common, devices
from refusal_jax.models.hf_config import load_config
from refusal_jax.organism.inflate import inflate
from refusal_jax.plan.planner import ON_CPU, WANTED
from refusal_jax.speed import pytorch, table
from refusal_jax.speed.ceilings import measure, weight_files
from refusal_jax.speed.made_up import made_up, shape_of
from refusal_jax.speed.stages import OF_FILES, STAGES, Bench, Task, Timed
from refusal_jax.study.config import get_config

LOG = logging.getLogger(__name__)
MODEL = flags.DEFINE_string(
    "model",
    "",
    f"{common.CHECKPOINT} Or a GGUF file, or the name of a shape that `refusal-jax plan` knows, such as llama_3_8b, which gets "
    "random weights. Default: the embedded demo model.",
)
INFLATE = flags.DEFINE_bool(
    "inflate", None, "Inflate the model to 127M parameters first. Default: only the demo model."
)
STAGE = flags.DEFINE_list("stages", ",".join(STAGES), "Which parts to time.")
LIMITS = flags.DEFINE_bool("limits", True, "Hold the parts against measured ceilings of this machine.")
PYTORCH = flags.DEFINE_bool(
    "pytorch",
    None,
    "Compare with the PyTorch version. Default: with the demo model, in float32 on one CPU, if torch is there.",
)
ORACLE = flags.DEFINE_string("oracle", "", "File of the PyTorch version. Default: tests/oracle.py next to the package.")
REPEATS = flags.DEFINE_integer("repeats", 2, "How often each part runs after its first time.", lower_bound=1)
ROWS = flags.DEFINE_integer("rows", 32, "Number of prompts to generate from, as one batch.", lower_bound=1)
NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 64, "Number of tokens to generate for each prompt.", lower_bound=2)
N_TRAIN = flags.DEFINE_integer("n_train", 128, "Number of harmful and of harmless training prompts.", lower_bound=1)
N_VAL = flags.DEFINE_integer("n_val", 32, "Number of harmful and of harmless validation prompts.", lower_bound=1)
KL = flags.DEFINE_float(
    "kl_threshold", 0.1, "KL threshold of the selection rule, for models that the paper's value does not suit."
)
INDUCE = flags.DEFINE_float(
    "induce_threshold", 0.0, "Threshold of the selection rule for the refusal score under addition, likewise."
)
OUT = flags.DEFINE_string("out", "", "JSON file to write all measurements to.")
flags.adopt_module_key_flags(devices)


def main(argv) -> int:
    del argv
    unknown = [name for name in STAGE.value if name not in STAGES]
    if unknown or not STAGE.value:
        hint = did_you_mean(unknown[0], STAGES) if unknown else ""
        raise UserError(f"--stages={','.join(STAGE.value)} is not a list of {', '.join(STAGES)}.{hint}")
    jax.config.update("jax_enable_compilation_cache", False)  # or the first run would not be one
    oracle = asked_oracle()
    with tempfile.TemporaryDirectory(prefix="refusal-jax-bench-") as scratch:
        bench = Bench(*task(pathlib.Path(scratch)))
        timed = bench.run()
        results = about(bench)
        if LIMITS.value:
            results |= against_limits(bench, timed)
        jobs = [job for job, stages in pytorch.JOBS.items() if oracle and set(stages) <= set(bench.wanted)]
        for job in jobs:
            assert oracle is not None
            LOG.info(f"timing PyTorch, {job}")
            results[job] = found = pytorch.comparison(oracle, bench, job)
            print(pytorch.table(job, found["refusal_jax"], found["pytorch"], found["checks"]), flush=True)
    if OUT.value:
        write_atomically(local_path(OUT.value), to_json(results))
    return 0 if all(check["ok"] for job in jobs for check in results[job]["checks"]) else 1


def task(scratch: pathlib.Path) -> tuple[Task, list[str]]:
    """Returns what to time, and which parts."""
    mesh, dtype = devices.asked_mesh(), weights_dtype(devices.asked_dtype())
    shape = None if local_path(MODEL.value).exists() else shape_of(MODEL.value)
    if shape is None:
        folder, stages = source(scratch), STAGE.value
        files, load = weight_files(folder), partial(load_model, folder, dtype, mesh)
    else:
        folder, stages, files = None, asked_of_shape(STAGE.value), []
        load = partial(made_up, shape, dtype, mesh)
    platform = (mesh.devices.flat[0] if mesh else jax.devices()[0]).platform
    sizes = ON_CPU if platform == "cpu" else WANTED
    thresholds = {"kl_threshold": KL.value, "induce_threshold": INDUCE.value}
    return Task(load, folder, files, prompts(), sizes, NEW_TOKENS.value, thresholds, REPEATS.value, scratch), stages


def asked_of_shape(stages: list[str]) -> list[str]:
    """Returns the parts that a model without files has. Raises UserError if others are asked for by name."""
    of_files = [name for name in stages if name in OF_FILES]
    if of_files and flags.FLAGS["stages"].present:
        raise UserError(
            f"--stages has {' and '.join(of_files)}, which need a checkpoint's files, and {MODEL.value} is a shape with random "
            "weights. Leave them out, or name a checkpoint with --model."
        )
    if INFLATE.value or PYTORCH.value:
        wrong = "--inflate" if INFLATE.value else "--pytorch"
        raise UserError(f"{wrong} needs a checkpoint's files, and {MODEL.value} is a shape with random weights.")
    return [name for name in stages if name not in OF_FILES]


def source(scratch: pathlib.Path) -> pathlib.Path:
    """Returns the folder of the model to time, inflated into `scratch` if asked for."""
    folder = checkpoint_folder(MODEL.value) if MODEL.value else demo_model_path()
    load_config(folder)
    if INFLATE.value is False or (INFLATE.value is None and MODEL.value):
        return folder
    inflate(folder, scratch / "inflated")
    return scratch / "inflated"


def prompts() -> dict[str, list[str]]:
    """Returns the study's own draws for extraction and selection, and alternating harmful and harmless prompts for
    generation."""
    data = get_config().data
    data.n_train, data.n_val, data.n_test = N_TRAIN.value, N_VAL.value, -(-ROWS.value // 2)
    drawn = {split: [row["instruction"] for row in rows] for split, rows in sample_prompts(data).items()}
    pairs = zip(drawn.pop("harmful_test"), drawn.pop("harmless_test"), strict=False)
    drawn["test"] = [text for pair in pairs for text in pair][: ROWS.value]
    return drawn


def asked_oracle() -> pathlib.Path | None:
    """Returns the file of the PyTorch version, None where it is not to run. Raises UserError if it is asked for and cannot."""
    asked = PYTORCH.value or bool(ORACLE.value)
    if PYTORCH.value is False or not (asked or not MODEL.value):
        return None
    path = local_path(ORACLE.value) if ORACLE.value else pytorch.BESIDE
    why = ""
    if jax.default_backend() != "cpu" or devices.asked_mesh() or weights_dtype(devices.asked_dtype()) != "float32":
        why = "The PyTorch version runs in float32 on one CPU: leave out --pytorch, or set JAX_PLATFORMS=cpu, without --mesh."
    why = why or pytorch.missing(path)
    if why and asked:
        raise UserError(why)
    if why:
        LOG.info(f"without the comparison with PyTorch: {why}")
        return None
    return path


def about(bench: Bench) -> dict:
    """Returns what was timed, and on what."""
    device = jax.devices()[0]
    mesh = bench.model.mesh
    return {
        "model": MODEL.value or "demo",
        "inflated": bench.task.folder is not None and bench.task.folder.parent == bench.task.scratch,
        "dtype": bench.model.decoder.dtype.name,
        "device": device.device_kind,
        "devices": mesh.size if mesh else 1,
        "host": {"machine": platform.machine(), "cpus": os.cpu_count(), "load": os.getloadavg()},
        "jax": jax.__version__,
        "max_new_tokens": bench.task.new_tokens,
        "rows": {name: rows for name, rows in vars(bench.task.sizes).items()},
    }


def against_limits(bench: Bench, timed: dict[str, Timed]) -> dict:
    """Measures the ceilings, prints the table, and returns both in plain values."""
    mesh = bench.model.mesh
    used = list(mesh.devices.flat) if mesh else [jax.devices()[0]]
    kinds = sorted({kind for one in timed.values() for kind in one.counted.computed.flops})
    files = bench.task.files if set(OF_FILES) & set(timed) else []
    ceilings = measure(kinds, used, files, bench.task.scratch if "export" in timed else None)
    rows = [table.row(name, one, ceilings) for name, one in timed.items()]
    print(table.table(rows, ceilings) + "\n", flush=True)
    return {"ceilings": vars(ceilings), "stages": table.as_json(rows)}
