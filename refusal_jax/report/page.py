"""Writes one self-contained HTML page about a run: its findings, how certain they are, their cost, and how to read
them.

The page loads nothing and runs nothing (its policy forbids both), so it can be mailed, archived and opened anywhere.
Everything in it that came from a model, a prompt file or a path is escaped by the template engine; only our own
drawings enter as markup. It holds nothing that changes between two writes, so that equal runs give equal pages.
"""

import math
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import jinja2
from markupsafe import Markup, escape

from refusal_jax.conditions import label_of
from refusal_jax.hub import model_name as hub_name
from refusal_jax.judges.behaviours import Behaviour
from refusal_jax.judges.choice import REFUSAL_JUDGES
from refusal_jax.report.findings import Findings, Section
from refusal_jax.report.summary import REFUSAL_JUDGE, signed, with_interval
from refusal_jax.report.text import decoding_line, template_line
from refusal_jax.runs.artifacts import REPORT
from refusal_jax.runs.run import Run

LONG_TEXT, LONG_LINES = 340, 8  # completions over either are clipped until opened
CONTROLS = {code: "\N{REPLACEMENT CHARACTER}" for code in (*range(9), 11, 12, *range(14, 32), 127)}


def write_report(run: Run, sections: Sequence[Section], drawn: dict[int, Sequence[Any]] | None = None) -> None:
    """Writes the report into the folder of a run, from the artifacts of its other stages and the sections that these add.

    drawn: gets the pictures of the sections, as `Findings` keeps them.
    """
    findings = Findings(run, sections, drawn)
    html = environment(*folders_of(sections)).get_template("page.html.jinja").render(page_context(findings)).lstrip()
    # A lone surrogate, which JSON can carry but UTF-8 cannot, must not cost the page.
    run.write(REPORT, html.encode("utf-8", "replace"))


def folders_of(sections: Sequence[Section]) -> dict[pathlib.Path, None]:
    """Returns the folders that the sections' templates are in, in order."""
    return {section.template.parent: None for section in sections if section.template}


def environment(*folders: pathlib.Path) -> jinja2.Environment:
    """Returns the template engine for templates of this folder and of others, which escapes everything; an unknown name in a
    template is an error."""
    env = jinja2.Environment(
        loader=jinja2.FileSystemLoader([pathlib.Path(__file__).parent, *folders]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.filters |= {"num": number, "signed": signed, "plain": plain, "long": is_long, "prose": prose, "label": label_of}
    env.filters |= {"interval": with_interval}
    return env


def number(value: float | None, digits: int = 3) -> str:
    """Returns a score for reading: fixed decimals, scientific if huge, and words for what is no number."""
    if value is None:
        return "not evaluated"
    if not math.isfinite(value):
        return str(value)
    return (f"{value:.{digits}f}" if abs(value) < 1e6 else f"{value:.2e}").replace("-", "−")


def plain(text) -> str:
    """Returns untrusted text without control characters, which HTML does not allow and terminals obey."""
    return str(text).translate(CONTROLS)


def prose(text: str) -> Markup:
    """Escapes a sentence of ours, which may quote the model, and sets what is between backticks as code."""
    return Markup(re.sub("`([^`]+)`", r"<code>\1</code>", str(escape(plain(text)))))


def is_long(text: str) -> bool:
    """Returns whether a completion is clipped until it is opened."""
    return len(text) > LONG_TEXT or text.count("\n") >= LONG_LINES


def page_context(findings: Findings) -> dict:
    """Returns everything that the page's template shows, the sections as markup."""
    manifest, setup, env = findings.run.manifest, findings.setup, environment(*folders_of(findings.sections))
    names = {condition.dataset: condition.shown for condition in findings.conditions}
    env.filters["dataset"] = lambda name: names.get(name, name)
    stages = {name: record for name, record in manifest["stages"].items() if REPORT not in record.get("writes", ())}
    latest = max(stages.values(), key=lambda record: record.get("finished", ""), default={})
    shared = {
        "setup": setup,
        "template": template_line(setup),
        "conditions": findings.conditions,
        "judges": findings.judges,
        "concerns": findings.concerns,
        "behaviour": findings.behaviour,
        "refusal_judge": REFUSAL_JUDGE,
        "refusal_judges": REFUSAL_JUDGES,
    }
    sections = []
    for section in findings.sections:
        if section.template:
            figures = {picture.name: picture.html for picture in findings.pictures(section)}
            values = shared | section.values(findings) | ({"figures": figures} if figures else {})
            html = env.get_template(section.template.name).render(values)
            links = {
                name: titled(title, findings.behaviour)
                for name, title in section.links.items()
                if f'id="{name}"' in html
            }
            sections.append({"links": links, "html": Markup(html)})
    return shared | {
        "sections": sections,
        "notes": [section.note(findings) for section in findings.sections if section.note],
        "model_name": model_title(setup["model"]),
        "finished": latest.get("finished", "").replace("T", " ").replace("Z", " UTC"),
        "strength": findings.verdict[0],
        "headline": findings.verdict[1],
        "decoding": decoding_line(setup),
        "stages": stages,
        "versions": latest.get("versions", {}),
        "mixed_versions": any(r.get("versions") != latest.get("versions") for r in stages.values()),
        "config": flatten(manifest["config"]),
        "inputs": flatten(manifest["inputs"]),
    }


def titled(title: str, of: Behaviour) -> str:
    """Returns the title of a heading, which may name the behaviour or its sides as `{of.name}`."""
    said = title.format(of=of)
    return said[:1].upper() + said[1:]


def model_title(model: str) -> str:
    """Returns what to call a model: its name on the hub, without the commit, or the name of its folder."""
    named = hub_name(model)
    return named[0].repo if named else pathlib.PurePath(model).name or model


def flatten(tree: dict, prefix: str = "") -> dict[str, str]:
    """Returns nested settings as `section.name`, for a table."""
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, str) else repr(value)
    return flat
