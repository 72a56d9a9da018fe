"""Help texts: of the command, and of each job with its flags and, where it takes a study's config, every setting."""

import ast
import importlib
import importlib.util
import pathlib
import textwrap
from collections.abc import Iterator
from typing import Any

USAGE = """refusal-jax JOB [--flags]: find, measure, edit and audit the refusal direction of chat models.

Jobs:
{jobs}

Start with `refusal-jax study --workdir=runs/first`, which needs nothing else. `refusal-jax JOB --help` explains a job.
Exit codes: 0 done, 1 a bug of ours (with a traceback), 2 bad input or environment (with a next step), 3 an export that failed
its verification, 4 a study that found no direction (its report says why), 75 another process of the run failed (start all
again), 130 interrupted, 141 the reader of the output, such as head, stopped reading. An audit's verdict is an exit code, too: 0
intact or hardened, 10 edited but it refuses, 20 refusal is lost, 30 inconclusive, 40 broken files or template.
"""
WORDS = ("--help", "-h", "-help", "--helpfull", "--helpshort")


def usage(jobs: tuple[str, ...]) -> str:
    """Returns the help text of the command, with the first line of each job's."""
    width = max(map(len, jobs))
    return USAGE.format(jobs="\n".join(f"  {job:{width}}  {docstring(job).splitlines()[0]}" for job in jobs))


def docstring(job: str) -> str:
    """Returns a job's help text, read from its source: importing it would import jax."""
    spec = importlib.util.find_spec(f"refusal_jax.jobs.{job}")
    assert spec is not None and spec.origin is not None
    return ast.get_docstring(ast.parse(pathlib.Path(spec.origin).read_text(encoding="utf-8"))) or ""


def help_text(job: str) -> str:
    """Returns a job's help text, with its flags and settings."""
    from absl import flags

    from refusal_jax.jobs import common

    module = importlib.import_module(f"refusal_jax.jobs.{job}")
    own = sorted(flags.FLAGS.get_key_flags_for_module(module.__name__), key=lambda flag: flag.name)
    text = f"refusal-jax {job}: {docstring(job)}\n\nFlags:\n"
    for flag in [*own, common.FLAGS["log_level"]]:
        hidden = flag.default in (None, "") or flag.name == "config"
        text += entry(flag.name, flag.help or "", "" if hidden else (flag.default_as_str or "").strip("'"))
    return text + "".join(settings_help()) if any(flag.name == "config" for flag in own) else text


def settings_help() -> Iterator[str]:
    """Yields the part of a help text that lists every setting of a study."""
    from refusal_jax.study.config import get_config

    yield "\nSettings, which --config.SECTION.FIELD=VALUE overrides (refusal_jax/study/config.py):\n"
    for one in get_config().described():
        yield entry(f"config.{one.path}", one.meaning + ".", default_as_typed(one.value))


def default_as_typed(value: Any) -> str:
    """Returns a default as a user would type it."""
    return repr(value) if value == "" or not isinstance(value, str) else value


def entry(name: str, meaning: str, default: str) -> str:
    """Returns a flag with its meaning and default, wrapped."""
    text = " ".join(meaning.split()) + (f" (default: {default})" if default else "")
    return f"  --{name}\n" + textwrap.indent(textwrap.fill(text, 100, break_on_hyphens=False), " " * 6) + "\n"
