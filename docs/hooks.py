"""Extends MkDocs: fills in parts that come from the code, sets formulas, and adds notes on what a block needs.

A page says `<!-- generated: NAME -->` where a part of it is made from the code, so that it cannot become wrong; and
`<!-- needs: NAME -->` before a block of commands or code that the tests do not run, or `<!-- excerpt: FILE -->` before one that
shows a part of that file, which become notes that readers see.
"""

import html
import json
import os
import re
import textwrap
from collections.abc import Iterator

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from latex2mathml.converter import convert

from refusal_jax.audit.output.record import SCHEMA_FILE
from refusal_jax.audit.settings import AuditSettings
from refusal_jax.axes import AXES
from refusal_jax.jobs.help import docstring
from refusal_jax.jobs.main import JOBS
from refusal_jax.study.config import get_config

# What a block of commands or code may need that the tests do not have, and how a reader is told.
NEEDS = {
    "tpu": "needs a TPU",
    "gpu": "needs a GPU",
    "network": "needs a network",
    "model": "needs a downloaded model",
    "server": "needs a running server",
    "minutes": "takes minutes",
}
MARK = re.compile(r"^( *)<!-- (needs|generated|excerpt): ([\w, ./]+) -->$", re.MULTILINE)
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)


def axes() -> Iterator[str]:
    """Yields a table of the axis letters."""
    yield "| letter | axis |\n|---|---|"
    for letter, meaning in AXES.items():
        yield f"| `{letter}` | {meaning} |"


def settings() -> Iterator[str]:
    """Yields a table of the settings of each section."""
    sections: dict[str, list[str]] = {}
    for one in get_config().described():
        section, _, name = one.path.rpartition(".")
        meaning = html.escape(one.meaning, quote=False).replace("|", "\\|").replace("''", "`''`")
        sections.setdefault(section, []).append(f"| `{name}` | `{one.value!r}` | {meaning} |")
    for section, rows in sections.items():
        yield f"\n## {section or 'The study'}\n\n| field | default | meaning |\n|---|---|---|"
        yield from rows


def jobs() -> Iterator[str]:
    """Yields the help text of each job; its indented paragraphs are commands and lists, which keep their lines."""
    for job in JOBS:
        yield f"## {job}\n"
        for paragraph in docstring(job).split("\n\n"):
            if paragraph.startswith(" "):
                lines = re.sub(r" {3,}#", "  #", textwrap.dedent(paragraph))
                yield f"```text\n{lines}\n```\n"
            else:
                parts = re.split("(`[^`]*`)", paragraph)
                yield "".join(part if part.startswith("`") else html.escape(part, quote=False) for part in parts) + "\n"


def audit_settings() -> Iterator[str]:
    """Yields a table of the settings of an audit."""
    yield "| setting | default | meaning |\n|---|---|---|"
    for one in AuditSettings().described():
        meaning = html.escape(one.meaning, quote=False).replace("|", "\\|").replace("''", "`''`")
        yield f"| `{one.path}` | `{one.value!r}` | {meaning} |"


def audit_record() -> Iterator[str]:
    """Yields a table of the fields of an audit's record, from its schema."""
    schema = json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))
    yield "| field | type | meaning |\n|---|---|---|"
    yield from _fields(schema, schema["$defs"], "")


def _fields(node: dict, definitions: dict, path: str) -> Iterator[str]:
    """Yields a row for each field below a node of a JSON Schema."""
    for name, field in node.get("properties", {}).items():
        field = field | definitions.get(field.get("$ref", "").rpartition("/")[2], {})
        inner = field.get("items", {})
        inner = inner | definitions.get(inner.get("$ref", "").rpartition("/")[2], {})
        many = "[]" if field.get("type") == "array" else ""
        either = [part for part in field.get("anyOf", ()) if part.get("type") == "object" or "$ref" in part]
        below = next((part | definitions.get(part.get("$ref", "").rpartition("/")[2], {}) for part in either), field)
        yield f"| `{path}{name}{many}` | {_type(field)} | {field.get('description', '')} |"
        yield from _fields(inner if many else below, definitions, f"{path}{name}{many}.")


def _type(field: dict) -> str:
    """Returns the type of a field in words."""
    if "enum" in field:
        return "one of " + ", ".join(f"`{value}`" for value in field["enum"])
    if "const" in field:
        return f"`{field['const']}`"
    kinds = field.get("type") or [part.get("type", "object") for part in field.get("anyOf", ())]
    return " or ".join([kinds] if isinstance(kinds, str) else kinds)


GENERATED = {
    "axes": axes,
    "settings": settings,
    "jobs": jobs,
    "audit_settings": audit_settings,
    "audit_record": audit_record,
}


def _marked(found: re.Match) -> str:
    indent, kind, names = found.groups()
    if kind == "generated":
        return "\n".join(GENERATED[names]())
    told = f"from `{names}`" if kind == "excerpt" else " and ".join(NEEDS[name] for name in names.split(", "))
    return f"{indent}*{told[0].upper()}{told[1:]}:*\n{indent}{{ .needs }}\n"


def on_page_markdown(markdown: str, **_) -> str:
    """Returns the page with its marks replaced."""
    return MARK.sub(_marked, markdown)


def on_page_content(content: str, **_) -> str:
    """Returns the page with its formulas as MathML, and flags that are not broken after their dashes."""

    def formula(found: re.Match) -> str:
        display = "block" if found[2] == "[" else "inline"
        return convert(html.unescape(found[3]).strip(), display=display)

    return FORMULA.sub(formula, content).replace("<code>--", '<code class="flag">--')
