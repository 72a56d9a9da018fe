"""Writes a gate as Markdown, for the summary of a CI job or a comment on a change."""

import re

from refusal_jax.gate.gate import Gate
from refusal_jax.gate.limits import BROKEN, FAIL, PASS, Decision
from refusal_jax.gate.power import points
from refusal_jax.judges.statistics import PairedRates
from refusal_jax.report.page import plain

MARKS = {PASS: "✅ holds", FAIL: "❌ is broken"}
SPECIAL = re.compile(r"([\\`*_{}\[\]()#+\-!|~])")
ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "@": "&#64;", "\n": " ", "\r": " "}


def markdown(gate: Gate) -> str:
    """Returns the summary. All texts are escaped, so that none becomes a link, a mention or markup."""
    first, *others = gate.verdict.sentences
    lines = [f"## {escape(first)}", "", f"Candidate: **{escape(gate.policy.candidate)}**  "]
    if "reference" in gate.judged:
        lines.append(f"Reference: **{escape(gate.policy.reference)}**  ")
    lines += [f"Judge: {escape(gate.judges[0].name)}", ""]
    compared = any(isinstance(one.seen, PairedRates) for one in gate.decisions)
    columns = ["limit", "verdict", "seen", "bounds", "demanded", "prompts", *(["McNemar p"] if compared else [])]
    lines += [_row(columns), _row(["---"] * len(columns))]
    lines += [_row(_cells(one, compared)) for one in gate.decisions]
    told = [text for text in others if not text.startswith("The limit ")]
    for title, texts in (
        ("What could not be told", told),
        ("What speaks against it", gate.verdict.contradictions),
        ("What these prompts can tell", [one.sentence for one in gate.powers]),
    ):
        if texts:
            lines += ["", f"### {title}", "", *(f"* {escape(text)}" for text in texts)]
    return "\n".join(lines) + "\n"


def escape(text: str) -> str:
    """Returns a text that Markdown shows as it is."""
    return SPECIAL.sub(r"\\\1", plain(text)).translate(str.maketrans(ENTITIES)).encode("utf-8", "replace").decode()


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cells(one: Decision, compared: bool) -> list[str]:
    low, high = one.bounds
    paired = isinstance(one.seen, PairedRates)
    unit = "points" if paired else "%"
    seen = "nothing" if one.n == 0 else f"{points(one.value)} {unit}"
    demanded = f"{'≥' if one.limit.least else '≤'} {points(one.limit.value)} {unit}"
    verdict = MARKS.get(one.verdict) or (f"❓ {one.more} more prompts would tell" if one.more else "❓ cannot be told")
    counted = f"{one.n} replies" if one.limit.measure == BROKEN else str(one.n)
    p_value = one.p_value
    p = [] if not compared else ["" if p_value is None else "< 0.001" if p_value < 0.001 else f"{p_value:.3f}"]
    return [escape(one.limit.id), verdict, seen, f"{points(low)} to {points(high)}", demanded, counted, *p]
