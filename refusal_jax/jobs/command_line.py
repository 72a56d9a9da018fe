"""Parses a command, from what a user writes to a job with its flags set.

One idea has one spelling in all jobs, which `refusal-jax JOB --help` shows. Older spellings, and dashes in names, are
rewritten here before anything reads them. Unknown names are answered with the nearest known one.
"""

import dataclasses
import importlib
import re
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

from absl import flags

from refusal_jax.errors import UserError, did_you_mean, nearest, shown
from refusal_jax.files import local_path
from refusal_jax.gate import policy
from refusal_jax.settings import Settings, in_words
from refusal_jax.study import config

# By job, flags that were called otherwise: what they are now, with {} where their value goes.
SYNONYMS = {
    "study": {"out": "workdir={}"},
    "chat": {"devices": "mesh=1x1x{}"},
    "evaluate": {"model_axis": "mesh=1x1x{}", "model": "author={}"},
    "data": {"out": "folder={}"},
}


@dataclasses.dataclass(frozen=True)
class ConfigFlag:
    """The flag by which a job takes a file of settings. name: of the flag; defaults: returns the settings; file: where they are
    explained; example: such a file."""

    name: str
    defaults: Callable[[], Settings]
    file: str
    example: str


STUDY = ConfigFlag("config", config.get_config, "refusal_jax/study/config.py", "configs/demo.py")
POLICY = ConfigFlag("policy", policy.get_config, "refusal_jax/gate/policy.py", "configs/gate.py")
WITH_CONFIG = {"study": STUDY, "plan": STUDY, "gate": POLICY}
FLAG = re.compile(r"(--?)([A-Za-z][\w.-]*)(?:=(.*))?", re.DOTALL)


def canonical(job: str, argv: list[str]) -> list[str]:
    """Returns the arguments as the job knows them: names with underscores, today's flags in place of older ones, and
    --config first, as the fields that it sets are overridden by what follows. Raises UserError if the config file does
    not exist."""
    synonyms, words, first = SYNONYMS.get(job, {}), [], []
    rest = iter(argv)
    for word in rest:
        found = FLAG.fullmatch(word)
        if word == "--":
            return [*first, *words, word, *rest]
        if not found:
            words.append(word)
            continue
        name, value = re.sub("^no_", "no", found[2].replace("-", "_")), found[3]
        taken = WITH_CONFIG.get(job)
        own = taken if taken is not None and name == taken.name else None
        if value is None and (name in synonyms or own):
            value = next(rest, None)
        if value is None:
            words.append(f"--{name}")
        elif own:
            first.append(f"--{name}={config_file(value, own)}")
        else:
            words.append("--" + synonyms.get(name, f"{name}={{}}").format(value))
    return [*first, *words]


def config_file(value: str, taken: ConfigFlag = STUDY) -> str:
    """Returns what --config, or the flag `taken`, names, `FILE` or `FILE:NAME`, with a leading ~ expanded. A config that is
    now one of several in a file, such as configs/llama_3_70b.py, is looked for in the files beside it. Raises UserError if
    there is none."""
    name, colon, argument = value.partition(":")
    path = local_path(name)
    if path.is_file():
        return f"{path}{colon}{argument}"
    beside: dict[str, str] = {}
    for other in sorted(path.parent.glob("*.py")):
        beside[str(other)] = str(other)
        text = other.read_text(encoding="utf-8", errors="replace")
        for entry in re.findall(r'^ +"(\w+)": \w+\(', text, re.MULTILINE):
            beside.setdefault(str(path.with_name(f"{entry}.py")), f"{other}:{entry}")
    if str(path) in beside:
        return beside[str(path)]
    hint = did_you_mean(beside.get(nearest(str(path), beside) or ""), beside.values())
    raise UserError(
        f"--{taken.name}={value}: there is no such file.{hint} A {taken.name} file is one such as {taken.example}."
    )


def prepare_job(job: str, argv: list[str]) -> tuple[types.ModuleType, list[str]]:
    """Returns a job's module, with its flags parsed, and what its `main` takes: the words that are no flags if it has actions,
    else all arguments.

    argv: in canonical words. Raises UserError for anything wrong with these, or with the config file that they name.
    """
    sys.argv[1:] = [job, *argv]  # where ml_collections looks for fields of the config
    if job in WITH_CONFIG:
        check_fields(job, argv)
    try:
        module = importlib.import_module(f"refusal_jax.jobs.{job}")  # reads the config of --config at once
        if getattr(module, "PASSED_ON", False):
            return module, argv
        left = flags.FLAGS([f"refusal-jax {job}", *argv])
        if job in WITH_CONFIG:
            check_config(flags.FLAGS[WITH_CONFIG[job].name].value, WITH_CONFIG[job])
    except flags.Error as error:
        raise flag_error(job, error) from None
    except Exception as error:
        if job not in WITH_CONFIG or isinstance(error, ModuleNotFoundError):
            raise  # a fault of ours, or a broken installation
        raise config_error(error, WITH_CONFIG[job]) from None
    actions = getattr(
        module, "ACTIONS", {}
    )  # what may follow the job's name: actions, with how many more words each takes
    words = left[1:]
    action = words[0] if words and words[0] in actions else ""
    if words and actions and action not in actions:
        raise UserError(
            f"{job} has no action {words[0]!r}: it has {', '.join(actions)}.{did_you_mean(words[0], actions)}"
        )
    taken = bool(action) + actions.get(action, 0)
    if words[taken:]:
        raise UserError(f"unexpected argument {words[taken]!r}: flags are written --name=value.")
    return module, words if actions else argv


def check_config(found: Any, taken: ConfigFlag) -> None:
    """Raises UserError for what a config file returned if it is no config, such as None for want of a `return`."""
    if not hasattr(found, "items"):
        whose = "the study" if taken is STUDY else f"the {taken.name}"
        raise UserError(
            f"The {taken.name} file returned {shown(found)}, expected what get_config() of {whose} returns."
        )


def check_fields(job: str, argv: list[str]) -> None:
    """Raises UserError for an override of a setting that does not exist."""
    taken = WITH_CONFIG[job]
    paths = {one.path: one.path for one in taken.defaults().described()}
    sections = {path.partition(".")[0] for path in paths}
    for word in argv:
        path = re.match(rf"--(?:no)?{taken.name}\.([^=]+)", word)
        if path and path[1] not in paths and path[1] not in sections and "[" not in path[1]:
            listing = "study" if taken is STUDY else job
            raise UserError(
                f"There is no setting --{taken.name}.{path[1]}.{did_you_mean_field(path[1], taken)} `refusal-jax {listing} "
                "--help` lists all."
            )


def did_you_mean_field(name: str, taken: ConfigFlag) -> str:
    """Returns a sentence that asks for the nearest setting, by its whole name or by the last part of it; "" if none is near."""
    paths = [one.path for one in taken.defaults().described()]
    last = {path.rpartition(".")[2]: path for path in paths}
    found = nearest(name, paths) or last.get(nearest(name.rpartition(".")[2], last) or "")
    return f" Did you mean --{taken.name}.{found}?" if found else ""


def flag_error(job: str, error: flags.Error, values: flags.FlagValues = flags.FLAGS) -> UserError:
    """Returns a readable message about a wrong flag of a job, with the nearest name if there is one."""
    if told := inner_error(error):
        return told
    text, see = " ".join(str(error).split()), f" See `refusal-jax {job} --help`."
    if isinstance(error, flags.UnrecognizedFlagError):
        name = error.flagname.replace("-", "_")
        hint = did_you_mean(f"--{name}", (f"--{flag}" for flag in (*names_of_flags(job), "log_level", "help")))
        if not hint and job in WITH_CONFIG:
            hint = did_you_mean_field(name, WITH_CONFIG[job])
        return UserError(f"Unknown command line flag {error.flagname!r}.{hint}{see}")
    found = re.match(r"flag --([\w.]+)=(.*?): ", text)
    if not found or found[1] not in values:
        return UserError(text.rstrip(".") + "." + see)
    name, value = found.groups()
    choices = getattr(values[name].parser, "enum_values", None)
    if choices:
        return UserError(f"--{name}={value} is not one of {', '.join(choices)}.{did_you_mean(value, choices)}{see}")
    taken = WITH_CONFIG.get(job, STUDY)
    kinds = {f"{taken.name}.{one.path}": in_words(one.kind) for one in taken.defaults().described()}
    return UserError(f"--{name}={value}: expected {kinds[name]}." if name in kinds else text.rstrip(".") + "." + see)


def config_error(error: Exception, taken: ConfigFlag) -> UserError:
    """Returns what is wrong with a config file, which may raise anything."""
    if told := inner_error(error):
        return told
    reason = " ".join(str(error).split())
    return UserError(
        f"--{taken.name} cannot be used ({type(error).__name__}: {reason}). Name a {taken.name} file that exists and runs, "
        f"such as {taken.example}, and fields that {taken.file} has."
    )


def inner_error(error: BaseException | None) -> UserError | None:
    """Returns the first UserError of those that led to this one: libraries wrap what config files and settings raise."""
    found = None
    while error is not None:
        found = error if isinstance(error, UserError) else found
        error = error.__cause__ or error.__context__
    return found


def names_of_flags(job: str) -> Iterator[str]:
    """Yields the names of a job's flags, those that it shares with others included."""
    return (flag.name for flag in flags.FLAGS.get_key_flags_for_module(f"refusal_jax.jobs.{job}"))


def as_flags(job: str) -> Callable[[str], str | None]:
    """Returns how a job's flags spell settings, for `errors.spelt`: by a flag of that name or, where the job takes a study's
    config, by the field of it. A field is also spelt by a flag that has its last name."""
    names, taken = set(names_of_flags(job)), WITH_CONFIG.get(job)

    def spelling(name: str) -> str | None:
        path = name.removeprefix("config.")
        if path in names:
            return f"--{path}"
        if taken is not None and taken.name in names and (path != name or path in taken.defaults()):
            return f"--{taken.name}.{path}"
        last = path.rpartition(".")[2]
        return f"--{last}" if path != name and last in names else None

    return spelling
