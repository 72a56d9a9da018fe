"""Holds a part's time against the nearest thing that limits it, and writes that as a table and as plain values."""

import dataclasses

from refusal_jax.speed.ceilings import Ceilings
from refusal_jax.speed.stages import Timed

SURPRISING = 1.05  # share of a ceiling above which something is wrong with one of the two
UNSTEADY = 1.25  # ratio of the slowest and fastest of equal runs
WHY = {
    "compute": "the ceiling may have been measured while the machine was busier, or the product is of a shape that runs faster",
    "memory": "what is read may stay in a cache of the processor, and does not come from memory each time",
    "disk": "the system may have held the files in memory, or been slower when the ceiling was measured",
}


@dataclasses.dataclass(frozen=True)
class Row:
    """A part's time against its limits.

    limits: the least seconds that it could take, by what limits it. useful: the share of its operations that is no padding.
    notes: what is surprising.
    """

    name: str
    timed: Timed
    limits: dict[str, float]
    useful: float
    notes: tuple[str, ...]

    @property
    def nearest(self) -> str:
        """Returns what limits it; "" where nothing was counted."""
        return max(self.limits, key=self.limits.__getitem__) if any(self.limits.values()) else ""

    @property
    def share(self) -> float:
        """Returns how near it comes to what limits it: 1 is as fast as can be."""
        return max(self.limits.values(), default=0.0) / self.timed.median

    @property
    def useful_share(self) -> float:
        """Returns the same with the time that padding would take left out of the limits."""
        limits = self.limits | {"compute": self.limits.get("compute", 0.0) * self.useful}
        return max(limits.values()) / self.timed.median


def row(name: str, timed: Timed, ceilings: Ceilings) -> Row:
    """Returns a part's times held against the ceilings."""
    computed, useful = timed.counted.computed, timed.counted.useful
    limits = {
        "compute": sum(flops / ceilings.flops[kind] for kind, flops in computed.flops.items()),
        "memory": computed.bytes / ceilings.memory,
    }
    disk = [(timed.read, ceilings.read), (timed.written, ceilings.write)]
    limits["disk"] = sum(size / speed for size, speed in disk if size and speed)
    found = Row(name, timed, limits, useful.total / computed.total if computed.total else 1.0, ())
    notes = []
    if found.share > SURPRISING:
        notes.append(f"{found.share:.0%} of the ceiling of {found.nearest}: {WHY[found.nearest]}")
    slowest, fastest = max(timed.seconds), min(timed.seconds)
    if slowest > UNSTEADY * fastest:
        notes.append(
            f"runs took {fastest:.2f} to {slowest:.2f} s: the machine was busy, or the time is too short to measure"
        )
    return dataclasses.replace(found, notes=tuple(notes))


def table(rows: list[Row], ceilings: Ceilings) -> str:
    """Returns rows and ceilings as text."""
    lines = [
        f"{'':<46}{'a second':>18}{'':10}{'share of it':>16}",
        f"{'stage':<11}{'first s':>9}{'s':>9}{'GFLOP':>9}{'useful':>8}{'GFLOP':>10}{'GB':>8}  "
        f"{'limit':<8}{'all':>8}{'useful':>8}",
    ]
    for one in rows:
        timed, work = one.timed, one.timed.counted.computed
        moved = timed.read + timed.written if one.nearest == "disk" else work.bytes
        flops = f"{work.total / 1e9:>9,.0f}{one.useful:>8.0%}{work.total / 1e9 / timed.median:>10,.0f}"
        lines.append(
            f"{one.name:<11}{timed.first:>9.2f}{timed.median:>9.2f}{flops if work.total else ' ' * 27}"
            f"{moved / 1e9 / timed.median:>8.2f}  {one.nearest:<8}{one.share:>8.0%}{one.useful_share:>8.0%}"
        )
    lines += ["", *in_words(ceilings)]
    for one in rows:
        rate, amounts = rates(one.timed), one.timed.amounts
        if "activations" in amounts:
            kept = amounts["activations_kept"] / amounts["activations"]
            lines.append(
                f"activations: {rate['activations_per_second']:,.0f} a second are read (prompt tokens × layers × d_model), "
                f"of which {kept:.0%} are kept for means"
            )
    lines += [f"! {one.name}: {note}." for one in rows for note in one.notes]
    return "\n".join(lines)


def in_words(ceilings: Ceilings) -> list[str]:
    """Returns the ceilings as lines."""
    found = [f"{kind} {speed / 1e9:,.0f} GFLOP/s" for kind, speed in ceilings.flops.items()]
    found.append(f"memory {ceilings.memory / 1e9:,.1f} GB/s")
    for name, speed in (("reading files", ceilings.read), ("writing files", ceilings.write)):
        found += [f"{name} {speed / 1e9:.2f} GB/s"] if speed else []
    return [f"ceilings: {'; '.join(found)}"]


def as_json(rows: list[Row]) -> dict:
    """Returns the rows by name, in plain values: seconds, operations and bytes."""
    return {
        one.name: {
            "first_seconds": one.timed.first,
            "seconds": one.timed.median,
            "runs": one.timed.seconds,
            "flops": one.timed.counted.computed.flops,
            "useful_flops": one.timed.counted.useful.total,
            "bytes": one.timed.counted.computed.bytes,
            "programs": one.timed.counted.calls,
            "read_bytes": one.timed.read,
            "written_bytes": one.timed.written,
            "flops_per_second": one.timed.counted.computed.total / one.timed.median,
            "bytes_per_second": one.timed.counted.computed.bytes / one.timed.median,
            "limit_seconds": one.limits,
            "nearest": one.nearest,
            "share": one.share,
            "useful_share": one.useful_share,
            "notes": list(one.notes),
            **one.timed.amounts,
            **rates(one.timed),
        }
        for one in rows
    }


def rates(timed: Timed) -> dict[str, float]:
    """Returns what users compare: amounts of a part in a second."""
    kept = {
        key: timed.amounts[key] for key in ("activations", "activations_kept", "new_tokens") if key in timed.amounts
    }
    return {f"{key}_per_second": amount / timed.median for key, amount in kept.items()}
