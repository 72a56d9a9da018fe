"""Formats plans: one in detail, many as a Markdown table, and either as JSON."""

import dataclasses

from refusal_jax.plan.costs import gib
from refusal_jax.plan.planner import Plan, StageCost
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


def against_limit(seconds: float, stage: StageCost | Plan) -> str:
    """Returns how far an estimate is from its limit, and what binds there, such as 1.4 × memory."""
    return f"{seconds / stage.limit.seconds:.1f} × {stage.limit.binds}" if stage.limit.seconds else ""


def detail(plan: Plan, name: str) -> str:
    """Returns one plan as text, stage by stage."""
    where = plan.where
    halves = f", {where.size} devices" if where.size != where.chips else ""
    lines = [f"{name} on {where.name} ({where.chips} chips{halves} of {gib(where.chip.hbm)}), {plan.work.dtype}"]
    if plan.mesh is None:
        return "\n".join([*lines, *(f"does not fit: {problem}" for problem in plan.problems)])
    used = {group.field for group in plan.work.groups}
    rows = {field: rows for field, rows in dataclasses.asdict(plan.sizes).items() if field in used}
    sizes = ", ".join(f"{field} {count or 'none'}" for field, count in rows.items())
    lines += [f"mesh: {plan.mesh}; rows of a batch: {sizes}; prompts padded to {plan.work.length} tokens", ""]
    head = f"{'stage':<13}{'peak a device':>14}{'time':>10}{'limit':>10}{'':>15}{'PFLOP':>9}{'HBM TB a device':>17}"
    lines.append(f"{head}   estimated from")
    for stage, s in plan.stages.items():
        source = "compiler's cycles" if s.cycles else "operations and bytes"
        lines.append(
            f"{stage:<13}{gib(s.peak):>14}{duration(s.seconds):>10}{duration(s.limit.seconds):>10}"
            f"{against_limit(s.seconds, s):>15}{s.flops / 1e15:>9.1f}{s.bytes / 1e12:>17.2f}   {source}"
        )
    hours = plan.seconds * where.chips / 3600
    lines.append(
        f"{'in all':<13}{gib(plan.peak):>14}{duration(plan.seconds):>10}{duration(plan.limit.seconds):>10}"
        f"{against_limit(plan.seconds, plan):>15}   {hours:.2f} chip-hours"
    )
    return "\n".join([*lines, *(f"does not fit: {problem}" for problem in plan.problems)])


def markdown(plans: list[tuple[str, Plan]]) -> str:
    """Returns a Markdown table of plans, a row each; those that do not fit are listed below it."""
    work = plans[0][1].work
    stages = [group.name for group in work.groups]
    head = f"| model | slice | mesh | rows | peak | {' | '.join(stages)} | in all | limit | chip-hours |"
    rows, notes, too_large = [head, "|" + "---|" * (head.count("|") - 1)], [], {}
    for name, plan in plans:
        if plan.mesh is None:
            too_large.setdefault(plan.where.name, []).append(name)
            continue
        found = (plan.stages.get(stage) for stage in stages)
        times = [f"{duration(s.seconds)}, {against_limit(s.seconds, s)}" if s else "does not fit" for s in found]
        batches = "/".join(str(rows) for rows in dataclasses.astuple(plan.sizes))
        in_all = f"{duration(plan.seconds)}, {against_limit(plan.seconds, plan)}"
        hours = f"{plan.seconds * plan.where.chips / 3600:.2f}"
        cells = [str(plan.mesh), batches, gib(plan.peak), *times, in_all, duration(plan.limit.seconds), hours]
        rows.append(f"| {name} | {plan.where.name} | {' | '.join(cells)} |")
        notes += [f"- {name} on {plan.where.name}: {problem}" for problem in plan.problems]
    notes += [f"- {where} does not hold {', '.join(names)}." for where, names in too_large.items()]
    read = (
        "Rows: forward/selection/generation/loss. Peak: memory of a device. After each time stands how many times its limit it "
        "is, and what binds there: operations (compute), bytes of memory, or the network. "
    )
    return "\n".join([*rows, "", read + assumed(work), *(["", *notes] if notes else [])])


def as_json(name: str, plan: Plan) -> dict:
    """Returns everything in a plan: seconds, bytes and operations as plain numbers."""
    return {
        "model": name,
        "topology": plan.where.name,
        "chips": plan.where.chips,
        "devices": plan.where.size,
        "hbm_bytes": plan.where.chip.hbm,
        "dtype": plan.work.dtype,
        "prompt_tokens": plan.work.length,
        "mesh": plan.mesh and plan.mesh.shape,
        "rows": dataclasses.asdict(plan.sizes),
        "stages": {stage: dataclasses.asdict(s) for stage, s in plan.stages.items()},
        "peak_bytes": plan.peak,
        "seconds": plan.seconds,
        "limit": dataclasses.asdict(plan.limit),
        "chip_hours": plan.seconds * plan.where.chips / 3600,
        "problems": plan.problems,
    }
