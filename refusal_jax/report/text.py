"""The report's numbers of a finished study, as text for a terminal."""

from collections.abc import Sequence

from refusal_jax.chat.messages import NONE
from refusal_jax.errors import field
from refusal_jax.models.decoding import in_words
from refusal_jax.report.findings import Findings, Section
from refusal_jax.runs.run import Run

SHOWN = 200  # characters of a system prompt


def decoding_line(setup: dict) -> str:
    """Returns how replies were decoded, in words; empty for a run that did not record it."""
    record = setup.get("decoding")
    return in_words(record, field("generation.from_checkpoint", True)) if record else ""


def template_line(setup: dict) -> str:
    """Returns where the chat template came from, whether the model was asked to think, and the system prompt if it is not the
    template's, in words."""
    closed, system = setup.get("reply_start", {}).get("closes"), setup.get("system_prompt", "")
    thinking = "on" if setup["thinking"] else "closed" if closed else "off"
    told = " ".join(system.split())
    shown = f"“{told[:SHOWN]}…”" if len(told) > SHOWN else f"“{told}”"
    under = {"": "", NONE: ", no system prompt"}.get(system, f", system prompt {shown}")
    return f"Chat template: {setup['chat_template']}, thinking {thinking}{under}"


def text_summary(run: Run, sections: Sequence[Section]) -> str:
    """Returns the lines that the stages add to the report, what speaks against the numbers, and the verdict in words."""
    findings, lines = Findings(run, sections), []
    shown = [section for section in sections if section in findings.sections]  # in the order of the stages
    for section in sorted(shown, key=lambda section: section.late):
        lines += section.lines(findings)
    if findings.concerns:
        lines += ["", "What speaks against these numbers:"]
        lines += [f"({number}) {concern.text}" for number, concern in enumerate(findings.concerns, 1)]
    return "\n".join([*lines, "", findings.verdict[1]])


def outcome_lines(rows: Sequence[dict]) -> list[str]:
    """Returns the shares of outcomes, a line for each condition and judge, as rows of the table `outcomes` have them."""
    by: dict[tuple, list[dict]] = {}
    for row in rows:
        by.setdefault((row["dataset"], row["intervention"], row["judge"]), []).append(row)
    lines = ["", "Outcomes:"] if by else []
    for (dataset, intervention, judge), found in by.items():
        shares = [f"{r['outcome']} {r['successes']} ({100 * r['low']:.0f} to {100 * r['high']:.0f} %)" for r in found]
        late = sum(row["late"]["successes"] for row in found if "late" in row)
        more = [f"{late} of the refusals after other words"] if late else []
        more += [f"{found[0]['undecided']} undecided"] if found[0]["undecided"] else []
        name = f"{dataset} {intervention}".strip()
        lines.append(
            f"  {name}, {judge}: {', '.join(shares)} of {found[0]['n']}{''.join(f'; {part}' for part in more)}"
        )
    return lines


def labels_table(tables: dict) -> str:
    """Returns how judges agree with labels, for a terminal; "" where there are no labels."""

    def percent(row: dict) -> str:
        return (
            "-"
            if row["rate"] is None
            else f"{100 * row['rate']:.1f} % ({100 * row['low']:.0f} to {100 * row['high']:.0f})"
        )

    lines = []
    for row in tables.get("labels", []):
        kappa = row["kappa"]
        interval = f"({kappa['low']:.2f} to {kappa['high']:.2f})"
        value = "not defined" if kappa["kappa"] is None else f"{kappa['kappa']:.2f} {interval}"
        undecided = f", {row['undecided']} undecided" if row["undecided"] else ""
        lines.append(
            f"  {row['file']}, {row['judge']}, {row['question']}: {percent(row['accuracy'])} of {row['n']}{undecided}, "
            f"Cohen's kappa {value}"
        )
        for answer, found in row["answers"].items():
            rates = f"precision {percent(found['precision'])}, recall {percent(found['recall'])}"
            lines.append(f"    {answer + ':':<14}{rates}")
    return "\n".join(["", "Agreement with labels:", *lines]) if lines else ""


def rates_table(tables: dict) -> str:
    """Returns the tables of judged completions, without categories, for a terminal."""

    def percent(row: dict, key: str) -> str:
        if row[key] is None:
            return "-"
        return f"{100 * row[key]:.1f} % ({100 * row['low']:.1f} to {100 * row['high']:.1f})"

    def share(row: dict) -> str:
        return "-" if row["rate"] is None else f"{100 * row['rate']:.1f} %"

    lines = [f"{'data set':<22}{'condition':<12}{'judge':<20}{'success rate, 95 % interval':<30}{'n':>4}"]
    for row in tables["rates"]:
        if row["category"] is None:
            of = f"{row['dataset']:<22}{row['intervention'] or '-':<12}{row['judge']:<20}"
            lines.append(f"{of}{percent(row, 'rate'):<30}{row['n']:>4}")
    lines += outcome_lines(tables.get("outcomes", []))
    if tables["comparisons"]:
        lines += ["", "Paired comparisons (McNemar):"]
    for row in tables["comparisons"]:
        lines.append(
            f"  {row['dataset']}, {row['judge']}: {row['intervention']} against {row['compared_with']} "
            f"{percent(row, 'difference')}, p = {row['p_value']:.2g}"
        )
    if tables["agreement"]:
        lines += ["", "Agreement of judges:"]
    for row in tables["agreement"]:
        kappa = "not defined" if row["kappa"] is None else f"{row['kappa']:.2f}"
        agreed = "-" if row["agreement"] is None else f"{100 * row['agreement']:.1f} %"
        lines.append(f"  {row['first']} and {row['second']}: {agreed}, Cohen's kappa {kappa}")
    head = f"{'data set':<22}{'condition':<12}{'mean length':<18}{'empty':>8}{'repetitive':>12}"
    thinking = any(row["unfinished"]["successes"] for row in tables["completions"])
    lines += ["", head + (f"{'in thought':>12}" if thinking else "")]
    for row in tables["completions"]:
        length = "-" if row["length"]["mean"] is None else f"{row['length']['mean']:.1f} {row['unit']}"
        rates = share(row["empty"]), share(row["repetitive"])
        unfinished = f"{row['unfinished']['successes']:>12}" if thinking else ""
        line = (
            f"{row['dataset']:<22}{row['intervention'] or '-':<12}{length:<18}{rates[0]:>8}{rates[1]:>12}{unfinished}"
        )
        lines.append(line)
    return "\n".join(lines)
