"""Shows results of resistance tests in a terminal: a table of checkpoints and tests, and what it comes to in sentences.

Whatever may come from a checkpoint is escaped, so that it cannot steer the terminal.
"""

import io
import shutil
from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from refusal_jax.resistance.output.words import found_in, percent, scientific, sentences
from refusal_jax.resistance.run import Resistance, Tested
from refusal_jax.resistance.worst import Kept
from refusal_jax.terminal.screen import escaped

WIDTH = 120  # columns where the output is no terminal
STYLES = {"lost": "bold red", "weakened": "red", "kept": "green"}
SIGNS = {"damaged": "broke", "not_done": "-"}  # in place of a share


def text_of(found: Resistance, columns: int | None = None, colour: bool = False) -> str:
    """Returns results as text for a terminal. columns: its width, by default that of this terminal. colour: whether it may
    have the codes of colours."""
    out = io.StringIO()
    columns = columns or shutil.get_terminal_size((WIDTH, 24)).columns
    console = Console(file=out, width=columns, force_terminal=colour, no_color=not colour, highlight=False)
    for tested in found.checkpoints:
        if tested.plain is not None and tested.outcomes:
            console.print(tests_table(tested, found))
        for sentence in sentences(tested, found):
            console.print(Text(escaped(sentence)))
        console.print()
    if len(found.checkpoints) > 1:
        console.print(Text("Refusals kept, in per cent of those without an attack:"))
        for tests in parts(found.tests, columns):
            console.print(matrix(found, tests))
    return out.getvalue().rstrip() + "\n"


def parts(tests: Sequence[str], columns: int) -> list[Sequence[str]]:
    """Returns the tests in as many parts as tables of this width need."""
    found: list[list[str]] = [[]]
    left = columns - 52  # for the checkpoint's name and the worst case
    for test in tests:
        if found[-1] and sum(max(len(name), 5) + 2 for name in [*found[-1], test]) > left:
            found.append([])
        found[-1].append(test)
    return list(found)


def tests_table(tested: Tested, found: Resistance) -> Table:
    """Returns the table of a checkpoint's tests."""
    plain, attacked, kept, _ = found_in(tested, found.settings.floor)
    table = Table(box=SIMPLE_HEAD, pad_edge=False, title=Text(escaped(tested.checkpoint.title)), title_justify="left")
    table.add_column("test", no_wrap=True)
    for name in ("kept", "refused", "complied", "broken", "harmless answered", "KL", "seconds", "FLOPs"):
        table.add_column(name, justify="right")
    table.add_column("verdict")
    rates = (plain.refusals, plain.complied, plain.broken, plain.answered)
    table.add_row("(none)", "", *map(str, rates), *[""] * 4)
    for name, one in kept.items():
        measured, outcome = attacked[name], tested.outcomes[name]
        rates = (measured.refusals, measured.complied, measured.broken, measured.answered)
        cells = (name, share(one), *map(str, rates), f"{sum(measured.kl) / max(len(measured.kl), 1):.3f}")
        cells += (f"{outcome['seconds']:.1f}", scientific(outcome["flops"]), one.verdict)
        table.add_row(*(Text(cell, STYLES.get(one.verdict, "")) for cell in cells))
    return table


def share(one: Kept) -> str:
    """Returns what is kept, with its bounds."""
    if not one.rate.n:
        return "unknown"
    return f"{100 * one.rate.rate:.0f} [{100 * one.low:.0f}, {100 * one.high:.0f}]"


def matrix(found: Resistance, tests: Sequence[str]) -> Table:
    """Returns the table of checkpoints and tests, with the worst case of each checkpoint."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("checkpoint", max_width=24, overflow="fold")
    table.add_column("none", justify="right")
    for test in tests:
        table.add_column(test, justify="right", no_wrap=True)
    table.add_column("worst of all", justify="right")
    for tested in found.checkpoints:
        name = Text(escaped(tested.checkpoint.title))
        if tested.plain is None:
            table.add_row(name, *["-"] * (len(tests) + 2))
            continue
        plain, _, kept, worst = found_in(tested, found.settings.floor)
        cells = [cell(kept.get(test)) for test in tests]
        least = (
            f"{100 * worst.value:.0f} [{100 * worst.low:.0f}, {100 * worst.high:.0f}]" if worst.test else worst.verdict
        )
        table.add_row(name, percent(plain.refusals.rate), *cells, Text(least, STYLES.get(worst.verdict, "")))
    return table


def cell(one: Kept | None) -> Text:
    """Returns what is kept under a test, as a whole number."""
    if one is None or one.verdict in SIGNS:
        return Text(SIGNS["not_done" if one is None else one.verdict])
    return Text(f"{100 * one.rate.rate:.0f}" if one.rate.n else "?", STYLES.get(one.verdict, ""))
