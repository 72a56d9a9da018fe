"""Formats plans: one in detail, many as a Markdown table, and either as JSON."""

import dataclasses

from refusal_jax.plan.costs import gib
from refusal_jax.plan.planner import Plan
from refusal_jax.plan.programs import Workload


def assumed(work: Workload) -> str:
    """Returns what the estimates of a workload assume and leave out, in words."""
    clauses = [*(group.assumed for group in work.groups if group.assumed), "nothing overlaps with communication"]
    return (
        f"Estimates are rough and assume that {', that '.join(clauses[:-1])}{', and that ' if clauses[1:] else ''}"
        f"{clauses[-1]}. Loading, compilation and the host are not in them."
    )


def duration(seconds: float) -> str:
    """Returns a time in words, such as 41 s, 3.2 min or 1.4 h."""
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def detail(plan: Plan, name: str) -> str:
    """Returns one plan as text, stage by stage."""
    lines = [f"{name} on {plan.where.name} ({plan.where.chips} chips of {gib(plan.where.chip.hbm)}), {plan.work.dtype}"]
    if plan.mesh is None:
        return "\n".join([*lines, *(f"does not fit: {problem}" for problem in plan.problems)])
    used = {group.field for group in plan.work.groups}
    rows = {field: rows for field, rows in dataclasses.asdict(plan.sizes).items() if field in used}
    sizes = ", ".join(f"{field} {count or 'none'}" for field, count in rows.items())
    lines += [f"mesh: {plan.mesh}; rows of a batch: {sizes}; prompts padded to {plan.work.length} tokens", ""]
    lines.append(f"{'stage':<13}{'peak a chip':>12}{'time':>10}{'PFLOP':>9}{'HBM TB a chip':>15}   estimated from")
    for stage, s in plan.stages.items():
        source = "compiler's cycles" if s.cycles else "roofline"
        lines.append(
            f"{stage:<13}{gib(s.peak):>12}{duration(s.seconds):>10}{s.flops / 1e15:>9.1f}{s.bytes / 1e12:>15.2f}   {source}"
        )
    hours = plan.seconds * plan.where.chips / 3600
    lines.append(f"{'in all':<13}{gib(plan.peak):>12}{duration(plan.seconds):>10}   {hours:.2f} chip-hours")
    return "\n".join([*lines, *(f"does not fit: {problem}" for problem in plan.problems)])


def markdown(plans: list[tuple[str, Plan]]) -> str:
    """Returns a Markdown table of plans, a row each."""
    work = plans[0][1].work
    stages = [group.name for group in work.groups]
    head = f"| model | slice | mesh | rows | peak a chip | {' | '.join(stages)} | in all | chip-hours |"
    rows = [head, "|" + "---|" * (head.count("|") - 1)]
    notes = []
    for name, plan in plans:
        start = f"| {name} | {plan.where.name} |"
        if plan.mesh is None:
            rows.append(f"{start} does not fit |{' |' * (len(stages) + 4)}")
            notes.append(f"- {name} on {plan.where.name}: {'; '.join(plan.problems)}")
            continue
        times = [duration(s.seconds) if s else "does not fit" for s in (plan.stages.get(k) for k in stages)]
        batches = "/".join(str(rows) for rows in dataclasses.astuple(plan.sizes))
        hours = f"{plan.seconds * plan.where.chips / 3600:.2f}"
        cells = [str(plan.mesh), batches, gib(plan.peak), *times, duration(plan.seconds), hours]
        rows.append(f"{start} {' | '.join(cells)} |")
        notes += [f"- {name} on {plan.where.name}: {problem}" for problem in plan.problems]
    return "\n".join(
        [*rows, "", "Rows: forward/selection/generation/loss. " + assumed(work), *(["", *notes] if notes else [])]
    )


def as_json(name: str, plan: Plan) -> dict:
    """Returns everything in a plan: seconds, bytes and operations as plain numbers."""
    return {
        "model": name,
        "topology": plan.where.name,
        "chips": plan.where.chips,
        "hbm_bytes": plan.where.chip.hbm,
        "dtype": plan.work.dtype,
        "prompt_tokens": plan.work.length,
        "mesh": plan.mesh and plan.mesh.shape,
        "rows": dataclasses.asdict(plan.sizes),
        "stages": {stage: dataclasses.asdict(s) for stage, s in plan.stages.items()},
        "peak_bytes": plan.peak,
        "seconds": plan.seconds,
        "chip_hours": plan.seconds * plan.where.chips / 3600,
        "problems": plan.problems,
    }
