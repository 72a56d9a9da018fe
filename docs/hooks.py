"""Extends MkDocs: fills in parts that come from the code, sets formulas, and adds notes on what a block needs.

A page says `<!-- generated: NAME -->` where a part of it is made from the code, so that it cannot become wrong; and
`<!-- needs: NAME -->` before a block of commands or code that the tests do not run, or `<!-- excerpt: FILE -->` before one that
shows a part of that file, which become notes that readers see.
"""

import html
import os
import re
import textwrap
from collections.abc import Iterator

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from latex2mathml.converter import convert

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


GENERATED = {"axes": axes, "settings": settings, "jobs": jobs}


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
