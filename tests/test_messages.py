"""Messages name settings as what runs takes them: flags of the running job, a harness's arguments, or Python's keywords."""

import ast
import importlib
import json
import pathlib
import re

import pytest
import tiny
from commands import forked_code

from refusal_jax import UserError
from refusal_jax.audit.settings import AuditSettings
from refusal_jax.chat.prompts import Chat
from refusal_jax.chat.templates import named_template
from refusal_jax.defence.settings import DefenceSettings
from refusal_jax.errors import field, setting, spelt
from refusal_jax.gate.policy import get_config as get_policy
from refusal_jax.harness.edited import ARGUMENTS
from refusal_jax.jobs.main import JOBS
from refusal_jax.resistance.settings import ResistSettings
from refusal_jax.settings import Settings
from refusal_jax.study.config import get_config
from refusal_jax.study.damage.settings import DamageSettings
from refusal_jax.study.mechanism.settings import MechanismSettings

PACKAGE = pathlib.Path(__file__).parents[1] / "refusal_jax"
MODULES = sorted(PACKAGE.rglob("*.py"))
FLAG = re.compile(r"(?<![\w-])--([a-z][\w.-]*\w)")
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
ANY_JOB = [
    PACKAGE / "jobs" / f"{name}.py" for name in ("main", "command_line", "help", "settings")
]  # they speak of flags


def parsed(path: pathlib.Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def flags_of(job: str) -> set[str]:
    """The flags that a job defines or adopts, read from its source: jobs that share flags cannot be imported together."""
    tree = parsed(PACKAGE / "jobs" / f"{job}.py")
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
    names = [call.args[0] for call in calls if call.func.attr.startswith("DEFINE_")]
    found = {name.value for name in names if isinstance(name, ast.Constant)}
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    if "AuditSettings" in imported:  # whose fields are flags
        found |= set(AuditSettings())
    found |= {one.path for made in settings_of(tree) for one in made.described()}
    views = {"monitor_verify", "monitor_views", "monitor_projections"}
    shared = imported & {"processes", "devices", "settings", "further", *views} | ({"common"} if job in JOBS else set())
    return found.union(*map(flags_of, shared))


def settings_of(tree: ast.Module) -> list[Settings]:
    """The settings whose fields a job makes flags of, by `flags_of(KIND())`."""
    calls = [
        node for node in ast.walk(tree) if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "flags_of"
    ]
    kinds = {
        arg.func.id
        for call in calls
        for arg in call.args
        if isinstance(arg, ast.Call) and isinstance(arg.func, ast.Name)
    }
    places = {
        alias.name: node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    return [getattr(importlib.import_module(str(places[kind])), kind)() for kind in sorted(kinds & places.keys())]


def texts(path: pathlib.Path) -> list[str]:
    """The strings of a module that can reach a user, but for docstrings: values in f-strings are left out."""
    tree, found = parsed(path), []
    inside = {part for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            found.append("".join(part.value if isinstance(part, ast.Constant) else "X" for part in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in inside:
            found.append(node.value)
    documents = {ast.get_docstring(node, clean=False) for node in ast.walk(tree) if isinstance(node, DOCUMENTED)}
    return [text for text in found if text not in documents]


def is_field(name: str) -> bool:
    """Returns whether a study's config, the settings of its mechanism or damage, a defence, resistance tests or a gate's
    policy have a setting."""
    made = [get_config(), get_policy(), MechanismSettings(), DamageSettings(), DefenceSettings(), ResistSettings()]
    return any(name in one or name in {each.path for each in one.described()} for one in made)


def has(job: str, flag: str) -> bool:
    """Returns whether a job takes a flag, of its own or of the config; placeholders such as --config.FIELD stand for any."""
    flags, (kind, _, name) = flags_of(job), flag.partition(".")
    if name and kind in ("config", "policy"):
        return kind in flags and (name.isupper() or is_field(name))
    return flag in flags or flag.removeprefix("no") in flags or flag == "help"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_flags_in_messages(path):
    """Outside of whole commands only a job's own module names flags, and all flags are those of the job that they are for."""
    if path in (PACKAGE / "__init__.py", *ANY_JOB):  # the former's string is for the TPU's compiler
        return
    names = (
        (path.stem, path.stem.partition("_")[0]) if path.parent.name == "jobs" else ()
    )  # monitor_verify is of monitor
    job = next((name for name in names if name in JOBS), None)
    wrong = []
    for text in texts(path):
        for command in re.findall(r"refusal-jax (\w+ [^`]*)", text):
            asked, _, rest = command.partition(" ")
            wrong += [(command, flag) for flag in FLAG.findall(rest) if asked in JOBS and not has(asked, flag)]
        rest = FLAG.sub("", text, 1) if text.startswith("--") and " " not in text else re.sub(r"`[^`]*`", "", text)
        rest = re.sub(r"refusal-jax \w+ .*", "", rest)  # an example at the end
        wrong += [(text, flag) for flag in FLAG.findall(rest) if not (job and has(job, flag))]
    assert not wrong


def test_settings_that_messages_name():
    """Each is a field of the config where one is meant, and else a flag of some job or an argument of the harnesses."""
    flags, named = set().union(*map(flags_of, JOBS)), {"setting": set(), "field": set()}
    for path in MODULES:
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in named:
                named[node.func.id] |= {arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant)}
    assert {"chat_template", "workdir", "layer", "sites"} <= named["setting"] and "positions" in named["field"]
    for name in named["field"] | {n.removeprefix("config.") for n in named["setting"] if n.startswith("config.")}:
        assert is_field(name), name
    for name in named["setting"]:
        assert name.startswith("config.") or name in flags or name in ARGUMENTS, name


# What a process of each job says, of a template and of a folder for results.
SAYS = """
import importlib, json, sys
from refusal_jax.errors import field, setting, spelt
from refusal_jax.jobs.command_line import as_flags
from refusal_jax.runs.storage import named_by
from refusal_jax.chat.templates import advice
importlib.import_module(f"refusal_jax.jobs.{sys.argv[1]}")
with spelt(as_flags(sys.argv[1])):
    print(json.dumps([advice("X"), named_by(), setting("thinking", True), field("select.kl_threshold", 1)]))
"""
OWN_FILE = "write a fitting one to chat_template.jinja in the model's folder."
THRESHOLD = "config.select.kl_threshold=1"


@pytest.mark.parametrize(
    ("job", "said"),
    [
        (
            "study",
            ["set --config.chat_template to X.", " as --workdir", "--config.thinking=True", f"--{THRESHOLD}"],
        ),
        ("plan", ["set --config.chat_template to X.", " as --out", "--config.thinking=True", f"--{THRESHOLD}"]),
        ("chat", ["set --chat_template to X.", "", "--thinking=True", THRESHOLD]),
        ("export", ["set --chat_template to X.", " as --out", None, THRESHOLD]),
        ("evaluate", [OWN_FILE, " as --out", None, THRESHOLD]),
        ("bench", [OWN_FILE, " as --out", None, "--kl_threshold=1"]),
        ("lm_eval", [OWN_FILE, "", None, THRESHOLD]),
    ],
)
def test_what_jobs_say(job, said):
    done = forked_code(SAYS, job)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == said


def test_what_others_say(tmp_path, llama):
    """Python, the harnesses, and judges, whose templates nobody can set."""
    with pytest.raises(
        UserError, match=r"there is no chat template 'x'\. Instead, set chat_template= to one of chatml"
    ):
        named_template("x")
    assert (field("positions"), setting("scale", 2), setting("public")) == ("config.positions", "scale=2", "public=")
    tiny.tiny_tokenizer(tmp_path, "{{ raise_exception('no') }}")
    with spelt(lambda name: None), pytest.raises(UserError, match=rf"message \(no\)\. Repair it, or {OWN_FILE}"):
        Chat.load(tmp_path, 64)
    assert setting("scale") == "scale="  # as before
    pytest.importorskip("lm_eval")
    from refusal_jax.harness.lm_eval import RefusalJaxLM

    with pytest.raises(UserError, match=r"set the model argument chat_template= to one of chatml"):
        RefusalJaxLM(pretrained=str(llama), chat_template="x")
    pytest.importorskip("inspect_ai")
    from refusal_jax.harness.inspect import RefusalJaxAPI

    with pytest.raises(UserError, match=r"set -M chat_template= to one of chatml"):
        RefusalJaxAPI(str(llama), chat_template="x")
