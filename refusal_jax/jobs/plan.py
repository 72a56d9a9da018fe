"""Estimates, without a TPU, which slice a study fits on, with which mesh and batches, and roughly how long it takes.

  pip install 'refusal-jax[plan]'                                        # the TPU compiler; needs no TPU
  refusal-jax plan --model=DIR --topology=v5e-16                         # a checkpoint folder, or its config.json alone
  refusal-jax plan --model=qwen_72b --topology=v5e-64,v5p-16             # a model that is known, by its config's name
  refusal-jax plan --model=deepseek-ai/DeepSeek-V3 --topology=tpu7x-32 --nocompile   # or the hub's; in seconds
  refusal-jax plan --config=configs/paper.py:llama_3_70b --topology=v5e-16   # with that config's settings
  refusal-jax plan --all --out=plans                                     # the paper's 13 models and today's on common slices
  refusal-jax plan --audit --model=DIR --topology=v5e-8                  # an audit against a base instead of a study
  refusal-jax plan --mechanism --model=DIR --topology=v5e-8              # the mechanism of a study instead of the study
  refusal-jax plan --damage --model=DIR --topology=v5e-8                 # or what removing its direction damages
  refusal-jax plan --defend --model=DIR --topology=v5e-16 --train.rank=8 # or the training of a defence

The study's own programs (extraction, selection, prefill, decoding, loss) are compiled with the real TPU compiler for
the slice's topology. The memory that it reports decides which batches fit; a run on such a slice decides with the same
code. --nocompile, and --all unless --compile is given, reckon both from the model's shape instead, in seconds. Times are
estimates: the compiler's cycles, or operations and bytes divided by what compiled programs reach, plus communication by
its bytes. Beside each stands its limit: operations at the chip's peak, bytes at its memory's bandwidth, or what is sent at
that of its links, whichever takes longest. Slice names follow gcloud: v5e-16 and v6e-16 count chips, v4-16, v5p-16 and
tpu7x-16 count TensorCores, two per chip; 2xv5e-16 is two slices. --out=NAME writes NAME.json and NAME.md.
"""

import importlib.util
import logging
import pathlib

from absl import flags
from ml_collections import config_flags

from refusal_jax.checkpoints.gguf_mirror import as_folder
from refusal_jax.checkpoints.remote import checkpoint_folder
from refusal_jax.defence.planned import training_workload
from refusal_jax.defence.settings import DefenceSettings
from refusal_jax.errors import UserError, did_you_mean
from refusal_jax.files import local_path, read_json, to_json, write_atomically
from refusal_jax.hub import model_name
from refusal_jax.jobs import devices, settings
from refusal_jax.jobs.audit_work import audit_workload, reading
from refusal_jax.jobs.setting_flags import flags_of, given_only
from refusal_jax.models.config import ModelConfig
from refusal_jax.models.hf_config import from_hf, load_config
from refusal_jax.plan import table
from refusal_jax.plan.chips import Slice
from refusal_jax.plan.known import KNOWN, NAMES, config_of, repo_of
from refusal_jax.plan.planner import MeshShape, Plan, make_plan
from refusal_jax.plan.programs import USUAL_LENGTH, Workload
from refusal_jax.progress import each
from refusal_jax.study.checks import check_numbers
from refusal_jax.study.config import StudyConfig
from refusal_jax.study.damage.run import DAMAGE as DAMAGE_STAGES
from refusal_jax.study.mechanism.run import MECHANISM as MECHANISM_STAGES
from refusal_jax.study.study import workload

LOG = logging.getLogger(__name__)

# Settings of a training that decide what it needs.
TRAINED = tuple(f"train.{name}" for name in ("method", "rank", "targets", "steps", "batch", "remat", "max_tokens"))
COMMON = ("v5e-8", "v5e-16", "v5p-8", "v5p-64", "v6e-8", "v6e-32", "tpu7x-8", "tpu7x-32")
MODEL = flags.DEFINE_string(
    "model",
    None,
    "Checkpoint folder, its name on the hub (ORG/NAME), GGUF file, config.json, or the name of a known model, in place of "
    "config.model.",
)
TOPOLOGY = flags.DEFINE_list("topology", "v5e-16", "Slices to plan for, separated by commas.")
ALL = flags.DEFINE_bool(
    "all",
    False,
    f"Plan the paper's 13 models and those of today's families for {', '.join(COMMON)}, or for --topology if given.",
)
COMPILE = flags.DEFINE_bool(
    "compile",
    None,
    "Compile the programs with the TPU compiler, a minute or so each, rather than reckon in seconds what they need. By default "
    "this is done unless --all is given.",
)
AUDIT = flags.DEFINE_bool(
    "audit", False, "Plan an audit of a model of this shape against its base, in place of a study."
)
MECHANISM = flags.DEFINE_bool(
    "mechanism", False, "Plan the mechanism of a finished study of the model, all parts, in place of the study."
)
DAMAGE = flags.DEFINE_bool(
    "damage", False, "Plan what is measured of the damage that removal does, all parts, in place of the study."
)
DEFEND = flags.DEFINE_bool(
    "defend", False, "Plan the training of a defence, with the flags of its section train, in place of the study."
)
LENGTH = flags.DEFINE_integer(
    "prompt_tokens", USUAL_LENGTH, "Number of tokens that prompts are padded to.", lower_bound=8
)
OUT = flags.DEFINE_string("out", "", "Path of the files to write, without the endings .json and .md.")
TRAINING = flags_of(DefenceSettings(), [one.path for one in DefenceSettings().described() if one.path not in TRAINED])


def defence_workload(cfg: ModelConfig, dtype: str, config: StudyConfig, length: int) -> Workload:
    """Returns the training of a defence under the settings of the command line."""
    settings = DefenceSettings.of(given_only(TRAINING)).train
    return training_workload(settings)(cfg, dtype, config, length)


# What describes the work of each plan that is not of a study.
WORKLOADS = (
    (AUDIT, audit_workload),
    (MECHANISM, MECHANISM_STAGES.workload),
    (DAMAGE, DAMAGE_STAGES.workload),
    (DEFEND, defence_workload),
)
for shared in (settings, devices):
    flags.adopt_module_key_flags(shared)


def main(argv) -> None:
    if compiling() and importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "Planning needs the TPU compiler, which is not installed here: pip install 'refusal-jax[plan]'. With --nocompile it "
            "reckons without one."
        )
    asked = [f"--{flag.name}" for flag, _ in WORKLOADS if flag.value]
    if len(asked) > 1:
        raise UserError(f"{' and '.join(asked)} are {len(asked)} plans: give one of them at a time.")
    config = settings.study_settings(MODEL.value)
    check_numbers(config)
    if OUT.value and not pathlib.Path(OUT.value).name:
        raise UserError(f"--out={OUT.value} is no name for files: plans/mine writes plans/mine.json and plans/mine.md.")
    slices = [
        Slice.parse(name) for name in (COMMON if ALL.value and not flags.FLAGS["topology"].present else TOPOLOGY.value)
    ]
    models = {m.name: config_of(m.name) for m in KNOWN.values() if m.table} if ALL.value else None
    models = models or dict([named_model(config.model)])
    plans, jobs = [], [(name, cfg, where) for name, cfg in models.items() for where in slices]
    for name, cfg, where in each(jobs, "planning", "plan"):
        plan = one(name, cfg, config, where)
        plans.append((name, plan))
        if not ALL.value:
            print(table.detail(plan, name) + "\n", flush=True)
    print(table.markdown(plans) if ALL.value else table.assumed(plans[0][1].work))
    if AUDIT.value and not ALL.value:
        print(reading(plans[0][1].work.cfg, plans[0][1].work.dtype))
    if OUT.value:
        out = local_path(OUT.value)
        write_atomically(out.with_name(out.name + ".md"), (table.markdown(plans) + "\n").encode())
        write_atomically(
            out.with_name(out.name + ".json"), to_json([table.as_json(name, plan) for name, plan in plans])
        )


def compiling() -> bool:
    """Returns whether programs are to be compiled."""
    return not ALL.value if COMPILE.value is None else COMPILE.value


def one(name: str, cfg: ModelConfig, config: StudyConfig, where: Slice) -> Plan:
    """Returns the plan of one model for one slice, logging what is being compiled or reckoned."""

    def note(text: str) -> None:
        LOG.info(f"{'compiling' if compiling() else 'reckoning'} for {where.name}: {name}, {text}")

    dtype = "bfloat16" if config.dtype == "auto" else config.dtype  # as a study on a TPU
    sides = [max(side, 1) for side in config.mesh.values()] if any(config.mesh.values()) else None
    mesh = MeshShape(*sides) if sides else None
    describe = next((describe for flag, describe in WORKLOADS if flag.value), workload)
    return make_plan(describe(cfg, dtype, config, LENGTH.value), where, mesh, note, compiling())


def named_model(asked: str) -> tuple[str, ModelConfig]:
    """Returns a name for the model that is asked for, and its config. asked: a folder, a config.json, a GGUF file, the name of a
    model that is known, or one on the hub; if it is empty, the config file's name counts. Raises UserError, with the choices, if
    there is no such model."""
    given = bool(asked)
    if not given:
        file, _, argument = config_flags.get_config_filename(flags.FLAGS["config"]).partition(":")
        asked = argument or pathlib.Path(file).stem
    path, choices = local_path(asked), ", ".join(model.name for model in KNOWN.values() if model.table)
    if path.is_dir() or path.suffix == ".gguf":
        return path.resolve().name, load_config(as_folder(path))
    if path.suffix == ".json":
        if not path.is_file():
            raise UserError(f"{path} does not exist. Name a config.json, a checkpoint folder or one of {choices}.")
        return path.resolve().parent.name, from_hf(read_json(path), str(path))
    for name in (asked, path.stem):
        if repo_of(name):
            return name.rpartition("/")[2], config_of(name)
    if named := model_name(asked):
        return named[0].repo.rpartition("/")[2], load_config(checkpoint_folder(asked, weights=False))
    if not given and asked == "config":
        raise UserError(
            f"Name a model with --model: a checkpoint folder, ORG/NAME on the hub, a config.json or one of {choices}; or --all."
        )
    raise UserError(
        f"{asked!r} is no checkpoint folder, no config.json and none of the models known by name ({choices}, and others)."
        f"{did_you_mean(asked, NAMES)} Name one with --model, or --all."
    )
