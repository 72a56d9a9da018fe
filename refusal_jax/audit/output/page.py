"""Writes an audit as one self-contained HTML page, in the style of a study's report.

The page loads nothing and runs nothing. All that may come from a checkpoint is escaped by the template engine; only our own
drawing enters as markup. Texts that a model wrote are on it only if they were asked for.
"""

import pathlib
from typing import Any

import numpy as np
from markupsafe import Markup

from refusal_jax.audit.audit import Audit
from refusal_jax.audit.evidence import Findings
from refusal_jax.audit.output.figures import doses_of, draw_doses, legend
from refusal_jax.audit.output.record import audit_record
from refusal_jax.audit.output.summary import ALARMING, amount, number_text, p_text, value_text
from refusal_jax.audit.verdict import EDITS, REFUSES
from refusal_jax.report.page import environment, flatten, model_title

TEMPLATE = pathlib.Path(__file__).with_name("audit.html.jinja")
SAMPLES = 8  # number of prompts of each kind whose replies the page shows
# What each lane looks at.
LANES = {
    "files": "Files: records of other tools, hashes, tensors, tokenizer and chat template",
    "weights": "Weights against the base",
    "alone": "Weights alone",
    "activations": "Activations",
    "behaviour": "Behaviour",
    "resistance": "Resistance tests, made apart from the audit",
}
# What the facts of the lane "files" that are differences for people are of.
DIFFERENCES = {
    "template_diff": "Chat template",
    "tokenizer_diff": "Tokenizer",
    "generation_diff": "Generation settings",
}


def audit_page(audit: Audit, replies: bool = False) -> str:
    """Returns the page. replies: whether samples of what the models replied are shown."""
    record, doses = audit_record(audit), doses_of(audit)
    env = environment(TEMPLATE.parent)
    env.filters |= {"value": number_text}
    shown = {
        "title": audit.verdict.sentences[0],
        "strength": "bad" if audit.verdict.overall in ALARMING else "",
        "candidate": model_title(audit.settings.candidate) or record["candidate"]["name"],
        "record": record,
        "edit": EDITS[audit.verdict.edit],
        "refuses": REFUSES[audit.verdict.refuses],
        "lanes": [lane_context(found) for found in audit.findings],
        "figure": Markup(draw_doses(doses)),
        "legend": legend(doses),
        "diffs": differences(audit),
        "samples": [samples(audit, side) for side in ("harmful", "harmless")] if replies else [],
        "settings": flatten(record["settings"]),
        "details": {
            name: in_words(value) for name, value in record["verdict"]["details"].items() if value not in (None, "", [])
        },
    }
    return env.get_template(TEMPLATE.name).render(shown).lstrip()


def in_words(value: Any) -> str:
    """Returns a detail of the verdict for reading; numbers that follow each other, such as of layers, become ranges."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {in_words(one)}" for name, one in value.items())
    if not isinstance(value, list):
        return number_text(value)
    parts: list[list] = []
    for one in value:
        follows = isinstance(one, int) and parts and isinstance(parts[-1][-1], int) and one == parts[-1][-1] + 1
        parts[-1].append(one) if follows else parts.append([one])
    ranges = (f"{part[0]} to {part[-1]}" if len(part) > 2 else ", ".join(map(in_words, part)) for part in parts)
    return ", ".join(ranges)


def lane_context(found: Findings) -> dict[str, Any]:
    """Returns what the page shows of a lane."""
    rows = [{"of": one, "value": value_text(one), "p": p_text(one.p_value)} for one in found.evidence]
    return {
        "of": found,
        "title": LANES.get(found.lane, found.lane),
        "rows": rows,
        "read": amount(found.bytes_read).strip(" ()"),
        "tested": any(row["p"] for row in rows),
        "placed": any(one.where for one in found.evidence),
    }


def differences(audit: Audit) -> dict[str, str]:
    """Returns how texts and settings of the candidate differ from the base's, by what they are of, from the facts of "files"."""
    found = audit.of("files")
    shown = {title: found.facts.get(name, "") for name, title in DIFFERENCES.items()} if found else {}
    return {title: text if isinstance(text, str) else "\n".join(text) for title, text in shown.items() if text}


def samples(audit: Audit, side: str) -> dict[str, Any]:
    """Returns prompts of one kind, spread evenly over those that were asked, with the replies under each condition."""
    conditions = {
        name: rows
        for found in audit.findings
        for name, rows in found.replies.items()
        if name.split("_")[0] == side and rows
    }
    first = list(next(iter(conditions.values()))) if conditions else []
    wanted = sorted(set(np.linspace(0, len(first) - 1, min(len(first), SAMPLES)).round().astype(int).tolist()))
    rows = [
        {
            "prompt": first[index]["prompt"],
            "cells": {
                name: of[index]["response"]
                for name, of in conditions.items()
                if index < len(of) and of[index]["prompt"] == first[index]["prompt"]
            },
        }
        for index in wanted
    ]
    return {"side": side, "n": len(first), "rows": rows}
