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
again), 130 interrupted, 141 the reader of the output, such as head, stopped reading. Verdicts are exit codes, too. An audit: 0
intact or hardened, 10 edited but it refuses, 20 refusal is lost, 30 inconclusive, 40 broken files or template. A gate: 0 pass,
10 another limit is broken, 20 a limit of refusals is broken, 30 inconclusive, 40 a broken candidate.
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
    """Returns a job's help text, with what the job lists itself (`LISTED`), its flags and its settings."""
    from absl import flags

    from refusal_jax.jobs import common

    module = importlib.import_module(f"refusal_jax.jobs.{job}")
    own = sorted(flags.FLAGS.get_key_flags_for_module(module.__name__), key=lambda flag: flag.name)
    text = f"refusal-jax {job}: {docstring(job)}\n{getattr(module, 'LISTED', '')}\nFlags:\n"
    for flag in [*own, common.FLAGS["compile_cache"], common.FLAGS["log_level"]]:
        hidden = flag.default in (None, "") or flag.name in ("config", "policy")
        text += entry(flag.name, flag.help or "", "" if hidden else (flag.default_as_str or "").strip("'"))
    return text + "".join(settings_help(job)) if any(flag.name in ("config", "policy") for flag in own) else text


def settings_help(job: str) -> Iterator[str]:
    """Yields the part of a help text that lists every setting of a job's config."""
    from refusal_jax.jobs.command_line import WITH_CONFIG

    taken = WITH_CONFIG[job]
    yield f"\nSettings, which --{taken.name}.SECTION.FIELD=VALUE overrides ({taken.file}):\n"
    for one in taken.defaults().described():
        yield entry(f"{taken.name}.{one.path}", one.meaning + ".", default_as_typed(one.value))


def default_as_typed(value: Any) -> str:
    """Returns a default as a user would type it."""
    return repr(value) if value == "" or not isinstance(value, str) else value


def entry(name: str, meaning: str, default: str) -> str:
    """Returns a flag with its meaning and default, wrapped."""
    text = " ".join(meaning.split()) + (f" (default: {default})" if default else "")
    return f"  --{name}\n" + textwrap.indent(textwrap.fill(text, 100, break_on_hyphens=False), " " * 6) + "\n"
