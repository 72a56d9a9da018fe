"""The tables that a finished study prints: the report's numbers, for a terminal."""

from refusal_jax.directions import Direction
from refusal_jax.errors import field
from refusal_jax.judges.choice import REFUSAL_JUDGES
from refusal_jax.judges.statistics import Rate
from refusal_jax.models.decoding import in_words
from refusal_jax.report.concerns import find_concerns
from refusal_jax.report.summary import (
    REFUSAL_JUDGE,
    judges_of,
    read_conditions,
    read_damage,
    read_losses,
)
from refusal_jax.report.verdict import verdict_in_words
from refusal_jax.runs.run import Run

COLUMNS = ("baseline", "ablation", "actadd")


def decoding_line(setup: dict) -> str:
    """How replies were decoded, in words; empty for a run that did not record it."""
    record = setup.get("decoding")
    return in_words(record, field("generation.from_checkpoint", True)) if record else ""


def setup_lines(setup: dict) -> list[str]:
    """The chat template, what it puts after the instruction, the refusal tokens with where they came from, and decoding."""
    openings = {row["id"]: row for row in setup["openings"]}
    tokens = []
    for token in setup["refusal_tokens"]:
        row = openings.get(token["id"])
        tokens.append(f"{token['text']} ({row['harmful']:.3f}, {row['harmless']:.3f})" if row else token["text"])
    bundled = setup["bundled_prompts"]
    warning = (
        f"Prompts: bundled ({', '.join(bundled)}). They are made for the embedded model, and results on another mean "
        f"little: give all six sets, {field('data.harmful_train', 'FILE')} and so on."
    )
    return [warning] * bool(bundled) + [
        f"Chat template: {setup['chat_template']}, thinking {'on' if setup['thinking'] else 'off'}. Post-instruction "
        f"tokens: {' '.join(token['text'] for token in setup['post_instruction_tokens'])}",
        f"Refusal tokens, from {setup['refusal_tokens_from']}"
        f"{' (mean probability after harmful and harmless prompts)' if openings else ''}: {', '.join(tokens)}",
        *filter(None, [decoding_line(setup)]),
    ]


def text_summary(run: Run) -> str:
    """Template and refusal tokens, the selected direction, refusal rates with 95 % intervals, losses, and the verdict in
    words."""
    row = next(
        r
        for r in run.read_json("direction_evaluations.json")
        if (r["position"], r["layer"]) == Direction.selected(run).place
    )
    lines = [
        *setup_lines(run.read_json("setup.json")),
        f"Direction: position {row['position']}, layer {row['layer']}. Bypass {row['refusal_score']:.3f}, induce "
        f"{row['steering_score']:.3f}, KL {row['kl_div_score']:.4f}.",
        "",
        f"{'prompts':<18}{'intervention':<14}{'refused':>9}   {'95 % interval':<18}{'n':>4}",
    ]
    conditions = read_conditions(run, run.manifest["stages"]["evaluations"]["writes"])
    judges = judges_of(conditions)
    judge = next((judge for judge in judges if judge in REFUSAL_JUDGES), (judges or [REFUSAL_JUDGE])[0])
    concerns = find_concerns(run, conditions, judges)
    for condition in conditions:
        rate, key = condition.rates.get(judge, Rate(0, 0)), (condition.dataset, condition.intervention)
        interval = " to ".join(f"{100 * bound:.1f}" for bound in rate.interval) + " %"
        share = f"{100 * rate.rate:.1f} %" if rate.n else "-"
        notes = "".join(f" ({number})" for number, concern in enumerate(concerns, 1) if key in concern.about)
        lines.append(f"{condition.dataset:<18}{condition.label:<14}{share:>9}   {interval:<18}{rate.n:>4}{notes}")
    lines += ["", f"{'cross-entropy on':<18}{'baseline':>9}{'ablation':>10}{'− addition':>12}{'tokens':>9}"]
    for name, by in read_losses(run).items():
        values = "".join(f"{by[kind]['ce_loss']:>{width}.3f}" for kind, width in zip(COLUMNS, (9, 10, 12), strict=True))
        lines.append(f"{name:<18}{values}{by['baseline']['n_tokens']:>9}")
    for kind, row in read_damage(run).items():
        name = {"actadd": "− addition"}.get(kind, kind)
        lines.append(
            f"KL from baseline on answers to harmless prompts, {name}: {row['kl_per_token']:.4f} nats per token"
        )
    if concerns:
        lines += ["", "What speaks against these numbers:"]
        lines += [f"({number}) {concern.text}" for number, concern in enumerate(concerns, 1)]
    return "\n".join([*lines, "", verdict_in_words(conditions, judges, concerns)[1]])


def rates_table(tables: dict) -> str:
    """The tables of `study.evaluation`, without categories, for a terminal."""

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
