"""Shows an audit in a terminal: the verdicts in sentences, the evidence as a table, and the lanes that were left out.

Whatever may come from a checkpoint (a template, a name, a model's text) is escaped, so that it cannot steer the terminal.
"""

import io
import shutil

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from refusal_jax.audit.audit import Audit
from refusal_jax.audit.evidence import Evidence
from refusal_jax.terminal.screen import escaped

WIDTH = 120  # columns where the output is no terminal
ALARMING = ("abliterated", "uncensored", "damaged")


def text_of(audit: Audit, columns: int | None = None, colour: bool = False) -> str:
    """Returns an audit as text for a terminal. columns: its width, by default that of this terminal. colour: whether it may have
    the codes of colours."""
    out = io.StringIO()
    columns = columns or shutil.get_terminal_size((WIDTH, 24)).columns
    console = Console(file=out, width=columns, force_terminal=colour, no_color=not colour, highlight=False)
    first, *others = audit.verdict.sentences
    console.print(Text(escaped(first), "bold red" if audit.verdict.overall in ALARMING else "bold"))
    for sentence in others:
        console.print(Text(escaped(sentence)))
    rows = [(found.lane, one) for found in audit.findings for one in found.evidence]
    if rows:
        console.print(evidence_table(rows))
    for found in audit.findings:
        if found.left_out:
            console.print(Text(f"Left out: {found.lane}. {escaped(found.left_out)}"))
    ran = [f"{f.lane} {f.seconds:.1f} s{amount(f.bytes_read)}" for f in audit.findings if not f.left_out]
    if ran:
        console.print(Text(f"Time: {', '.join(ran)}."))
    return out.getvalue()


def amount(read: int) -> str:
    """Returns the bytes that a lane read, to follow its time; "" if it read none."""
    return f" ({read / 1e9:.2f} GB read)" if read >= 1e7 else f" ({read / 1e6:.2f} MB read)" if read else ""


def evidence_table(rows: list[tuple[str, Evidence]]) -> Table:
    """Returns the table of evidence, a row for each pair of a lane and a statistic."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("lane", no_wrap=True)
    table.add_column("statistic", max_width=20)
    table.add_column("value", justify="right", max_width=24)
    tested = any(one.p_value is not None for _, one in rows)
    if tested:
        table.add_column("p", justify="right")
    table.add_column("what it means", ratio=1)
    last = ""
    for lane, one in rows:
        meaning = one.meaning + (f" ({one.where})" if one.where else "")
        cells = ("" if lane == last else lane, one.statistic.replace("_", " "), value_text(one))
        cells += (*([p_text(one.p_value)] if tested else []), meaning)
        table.add_row(*(Text(escaped(cell)) for cell in cells))
        last = lane
    return table


def number_text(value: float | int | str | None) -> str:
    """Returns a value for reading: up to three digits, words for what is no number."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.3g}" if isinstance(value, float) else str(value).replace("_", " ")


def value_text(one: Evidence) -> str:
    """Returns the value of a statistic, with its interval where it has one."""
    if one.low is None and one.high is None:
        return number_text(one.value)
    return f"{number_text(one.value)} [{number_text(one.low)}, {number_text(one.high)}]"


def p_text(p_value: float | None) -> str:
    """Returns a p-value for reading, "" where there is none."""
    return "" if p_value is None else "< 0.001" if p_value < 0.001 else f"{p_value:.3f}"
