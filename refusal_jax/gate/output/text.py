"""Shows a gate in a terminal: the verdict, the limits as a table, what speaks against it, and what its prompts can tell."""

import io
import shutil

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from refusal_jax.gate.gate import Gate
from refusal_jax.gate.limits import FAIL, PASS
from refusal_jax.gate.words import counts_in_words, demand_in_words
from refusal_jax.terminal.screen import escaped

WIDTH = 120  # columns where the output is no terminal
STYLES = {PASS: "green", FAIL: "bold red"}
SHOWN = {PASS: "holds", FAIL: "broken"}


def text_of(gate: Gate, columns: int | None = None, colour: bool = False) -> str:
    """Returns a gate as text for a terminal; what may come from a server or a file is escaped. columns: its width, by
    default that of this terminal. colour: whether it may have the codes of colours."""
    out = io.StringIO()
    columns = columns or shutil.get_terminal_size((WIDTH, 24)).columns
    console = Console(file=out, width=columns, force_terminal=colour, no_color=not colour, highlight=False)

    def say(text: str, style: str = "") -> None:
        console.print(Text(escaped(text), style))

    first, *others = gate.verdict.sentences
    say(first, "bold green" if gate.verdict.overall == "pass" else "bold red")
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("limit", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    table.add_column("what was seen", ratio=1)
    table.add_column("p", justify="right", no_wrap=True)
    for one in gate.decisions:
        seen = f"{counts_in_words(one)}; {demand_in_words(one)}" if one.n else "nothing"
        told = SHOWN.get(one.verdict) or (f"{one.more} more" if one.more else "unclear")
        p_value = one.p_value
        p = "" if p_value is None else "< 0.001" if p_value < 0.001 else f"{p_value:.3f}"
        cells = (one.limit.id, told, seen, p)
        table.add_row(
            *(Text(escaped(c), STYLES.get(one.verdict, "yellow") if i == 1 else "") for i, c in enumerate(cells))
        )
    console.print(table)
    for sentence in others:
        if not sentence.startswith("The limit "):  # which the table has
            say(sentence)
    for sentence in gate.verdict.contradictions:
        say(f"Beware: {sentence}", "yellow")
    for power in gate.powers:
        say(f"{power.limit.id}: {power.sentence}", "dim")
    return out.getvalue()
