"""The tables that a finished study prints: the report's numbers, for a terminal."""

from refusal_jax.report.summary import REFUSAL_JUDGE, read_conditions, read_losses, verdict_in_words
from refusal_jax.runs import Run

COLUMNS = ("baseline", "ablation", "actadd")


def setup_lines(setup: dict) -> list[str]:
    """The chat template, what it puts after the instruction, and the refusal tokens with where they came from."""
    openings = {row["id"]: row for row in setup["openings"]}
    tokens = []
    for token in setup["refusal_tokens"]:
        row = openings.get(token["id"])
        tokens.append(f"{token['text']} ({row['harmful']:.3f}, {row['harmless']:.3f})" if row else token["text"])
    bundled = setup["bundled_prompts"]
    warning = (
        f"Prompts: bundled ({', '.join(bundled)}). They are made for the embedded model, and results on another mean "
        "little: give all six sets, --config.data.harmful_train=FILE and so on."
    )
    return [warning] * bool(bundled) + [
        f"Chat template: {setup['chat_template']}, thinking {'on' if setup['thinking'] else 'off'}. Post-instruction "
        f"tokens: {' '.join(token['text'] for token in setup['post_instruction_tokens'])}",
        f"Refusal tokens, from {setup['refusal_tokens_from']}"
        f"{' (mean probability after harmful and harmless prompts)' if openings else ''}: {', '.join(tokens)}",
    ]


def text_summary(run: Run) -> str:
    """Template and refusal tokens, the selected direction, refusal rates with 95 % intervals, losses, and the verdict in
    words."""
    picked = run.read_json("direction_metadata.json")
    row = next(
        r
        for r in run.read_json("direction_evaluations.json")
        if (r["position"], r["layer"]) == (picked["pos"], picked["layer"])
    )
    lines = [
        *setup_lines(run.read_json("setup.json")),
        f"Direction: position {row['position']}, layer {row['layer']}. Bypass {row['refusal_score']:.3f}, induce "
        f"{row['steering_score']:.3f}, KL {row['kl_div_score']:.4f}.",
        "",
        f"{'prompts':<18}{'intervention':<14}{'refused':>9}   {'95 % interval':<18}{'n':>4}",
    ]
    conditions = read_conditions(run, run.manifest["stages"]["evaluations"]["writes"])
    for condition in conditions:
        rate = condition.rates[REFUSAL_JUDGE]
        interval = " to ".join(f"{100 * bound:.1f}" for bound in rate.interval) + " %"
        lines.append(
            f"{condition.dataset:<18}{condition.label:<14}{f'{100 * rate.rate:.1f} %':>9}   {interval:<18}{rate.n:>4}"
        )
    lines += ["", f"{'cross-entropy on':<18}{'baseline':>9}{'ablation':>10}{'− addition':>12}{'tokens':>9}"]
    for name, by in read_losses(run).items():
        values = "".join(f"{by[kind]['ce_loss']:>{width}.3f}" for kind, width in zip(COLUMNS, (9, 10, 12), strict=True))
        lines.append(f"{name:<18}{values}{by['baseline']['n_tokens']:>9}")
    return "\n".join([*lines, "", verdict_in_words(conditions, [REFUSAL_JUDGE])[1]])
