"""Defines what alerts say: the numbers, what they are compared with, and what speaks against reading them as a change of the
model."""

import dataclasses
import hashlib
import json
import math
import time as clock
from collections.abc import Sequence

from refusal_jax.judges.judge import Outcome
from refusal_jax.judges.statistics import Rate
from refusal_jax.monitor.change import OUTCOMES, Change, Detector
from refusal_jax.monitor.signal_settings import SignalSettings
from refusal_jax.monitor.streams import Group, Stream
from refusal_jax.monitor.watch import Watch

ALERTS = "alerts"  # the channel of the file of alerts
VOLUME, ENOUGH = (
    2.0,
    30,
)  # a category's traffic has changed if it did by this factor, told from this many replies on each side
SHIFTED = 0.1  # share of the traffic that has moved to other categories, from which on an alert says so
SHOWN = 80  # characters of a name in a sentence
DAY = 86400.0
SENTENCES = {
    Change.REFUSES_LESS: "refuses less",
    Change.REFUSES_MORE: "refuses more",
    Change.DEFLECTS_MORE: "deflects more",
    Change.BROKEN_MORE: "gives more broken replies",
}
NOUNS = {
    Outcome.REFUSES: "refusals",
    Outcome.COMPLIES: "replies that comply",
    Outcome.DEFLECTS: "replies that deflect",
    Outcome.BROKEN: "broken replies",
}


@dataclasses.dataclass(frozen=True)
class Alert:
    """A drift, or the end of one. content: what is sent, a JSON object."""

    content: dict

    @property
    def id(self) -> str:
        """Returns what names the alert; it is the same however often the alert is sent."""
        return self.content["id"]


def drift(
    of: Stream | Group,
    streams: Sequence[Stream],
    watch: Watch,
    time: float,
    settings: SignalSettings,
    tests: int,
    part_of: str | None,
) -> Alert:
    """Returns the alert of a test whose capital has reached 1.

    streams: of the model, those that have a reference. tests: how many share the allowance. part_of: the alarm of all categories
    that this one belongs to.
    """
    content = _content("drift", of, streams, watch, time, settings, tests)
    notes = [
        *_instead(of, watch, streams),
        *_volume(of, watch.detector, time),
        *_mix(of, streams),
        *_where(of, watch, streams),
    ]
    content |= {"alarm": content["id"], "part_of": part_of, "notes": notes}
    return Alert(content | {"text": _text(content, SENTENCES[watch.change])})


def recovery(
    of: Stream | Group, streams: Sequence[Stream], watch: Watch, time: float, settings: SignalSettings, tests: int
) -> Alert:
    """Returns the message that the drift of a test's alarm is over: the share is nearer to the reference than half of it."""
    content = _content("recovery", of, streams, watch, time, settings, tests)
    notes = ["The share is back nearer to the reference than half of the drift; it need not be back at the reference."]
    content |= {"alarm": watch.alarm, "part_of": None, "notes": notes}
    return Alert(content | {"text": _text(content, f"no longer {SENTENCES[watch.change]}")})


def _content(
    kind: str,
    of: Stream | Group,
    streams: Sequence[Stream],
    watch: Watch,
    time: float,
    settings: SignalSettings,
    tests: int,
) -> dict:
    outcome, since = watch.change.outcome, watch.detector.since
    count, n = since[OUTCOMES.index(outcome)], sum(since)
    category = of.category if isinstance(of, Stream) else None
    name = [kind, of.model, category, watch.change, time, of.seen]
    reference = _reference(of, streams, outcome, settings)
    return {
        "id": hashlib.sha256(json.dumps(name).encode("utf-8", "replace")).hexdigest()[:16],
        "kind": kind,
        "time": stamp(time),
        "model": of.model,
        "category": category,
        "change": watch.change.value,
        "outcome": outcome.value,
        "reference": reference,
        "observed": {"count": count, "n": n, "share": round(count / n, 4), "since": stamp(watch.detector.started)},
        "points": round(100 * (count / n - reference["share"]), 1),
        "threshold_points": settings.threshold_points,
        "false_alarms_per_month": settings.false_alarms_per_month,
        "tests": tests,
    }


def _reference(of: Stream | Group, streams: Sequence[Stream], outcome: Outcome, settings: SignalSettings) -> dict:
    """Returns what the share is compared with; for all categories, their references at the mix of late."""
    if isinstance(of, Stream):
        assert of.reference is not None, "tests begin with the reference"
        low, high = of.reference.interval(outcome, settings.confidence)
        share = of.reference.share(outcome) or 0.0
        return {
            "share": round(share, 4),
            "low": round(low, 4),
            "high": round(high, 4),
            "n": of.reference.n,
            "origin": of.reference.origin,
        }
    late = of.shares()
    known = [
        (late[one.category][1], one.reference.share(outcome))
        for one in streams
        if one.reference and one.category in late
    ]
    weighed = [(weight, share) for weight, share in known if share is not None]
    total = sum(weight for weight, _ in weighed)
    share = sum(weight * share for weight, share in weighed) / total if total else 0.0
    origin = f"the references of {len(weighed)} categories at the mix of late"
    return {"share": round(share, 4), "low": None, "high": None, "n": None, "origin": origin}


def _text(content: dict, sentence: str) -> str:
    """Returns the alert in words, as a chat shows it."""
    reference, observed = content["reference"], content["observed"]
    category = "all categories together" if content["category"] is None else f"category {short(content['category'])}"
    interval = (
        ""
        if reference["low"] is None or reference["low"] == reference["high"]
        else f" (interval {percent(reference['low'])} to {percent(reference['high'])})"
    )
    noun = NOUNS[Outcome(content["outcome"])]
    parts = [
        f"{short(content['model'])}, {category}: {sentence}.",
        f"{observed['count']} of {observed['n']} replies since about {observed['since']} are {noun} "
        f"({percent(observed['share'])}); the reference is {percent(reference['share'])}{interval}, {reference['origin']}.",
    ]
    if content["part_of"]:
        parts.append(f"This is part of the alarm {content['part_of']} of all categories together.")
    return " ".join([*parts, *content["notes"]])


def _instead(of: Stream | Group, watch: Watch, streams: Sequence[Stream]) -> list[str]:
    """Says so if fewer refusals do not mean that more requests are answered."""
    if watch.change is not Change.REFUSES_LESS:
        return []
    since = watch.detector.since
    n = sum(since)
    index = OUTCOMES.index(Outcome.COMPLIES)
    references = [of] if isinstance(of, Stream) else streams
    known = [one.reference.share(Outcome.COMPLIES) for one in references if one.reference]
    if len(known) != 1 or known[0] is None or Rate(since[index], n).interval[0] > known[0]:
        return []
    others = [f"{since[OUTCOMES.index(o)]} {NOUNS[o]}" for o in (Outcome.DEFLECTS, Outcome.BROKEN)]
    return [
        f"But replies that comply have not become more frequent for certain ({percent(since[index] / n)} against "
        f"{percent(known[0])}): there are {' and '.join(others)}."
    ]


def _volume(of: Stream | Group, detector: Detector, time: float) -> list[str]:
    """Says so if the traffic has changed at the same time."""
    if not isinstance(of, Stream) or of.first is None:
        return []
    after, before = sum(detector.since), of.seen - sum(detector.since)
    spans = (detector.started - of.first) / DAY, (time - detector.started) / DAY
    if min(after, before) < ENOUGH or min(spans) <= 0:
        return []
    rates = before / spans[0], after / spans[1]
    if 1 / VOLUME < rates[1] / rates[0] < VOLUME:
        return []
    return [
        f"The category's traffic changed too, from {rates[0]:.3g} to {rates[1]:.3g} judged replies a day: others may be asking, "
        "or for other things, and then the share moves though the model is the same. Prompts of your own, sent regularly, tell."
    ]


def _mix(of: Stream | Group, streams: Sequence[Stream]) -> list[str]:
    """Says so if the traffic has moved between categories."""
    if not isinstance(of, Group):
        return []
    shares = of.shares()
    moved = sum(abs(late - ever) for ever, late in shares.values()) / 2
    chance = sum(math.sqrt(ever * (1 - ever) / 150) for ever, _ in shares.values()) / 2
    if moved < SHIFTED + chance:
        return []
    name, (ever, late) = max(shares.items(), key=lambda item: abs(item[1][1] - item[1][0]))
    return [
        f"The mix of categories changed too; {short(name)} went from {percent(ever)} to {percent(late)} of the replies. Each "
        "category is compared with its own reference, so the mix of categories alone raises no alarm, but what is asked within "
        "a category may have changed with it."
    ]


def _where(of: Stream | Group, watch: Watch, streams: Sequence[Stream]) -> list[str]:
    """Names the categories that speak most for a drift of all categories together."""
    if not isinstance(of, Group):
        return []
    found = sorted(
        ((one.tests.watches[watch.change].detector, one) for one in streams if watch.change in one.tests.watches),
        key=lambda pair: pair[0].drift,
        reverse=True,
    )
    index = OUTCOMES.index(watch.change.outcome)
    named = [
        f"{short(one.category)} ({detector.since[index]} of {sum(detector.since)})"
        for detector, one in found[:3]
        if detector.drift > 0
    ]
    return [f"Most of it is in {', '.join(named)}."] if named else []


def stamp(time: float) -> str:
    """Returns a time, in seconds since 1970, as UTC in words of ISO 8601; the start of 1970 for one that no calendar has."""
    try:
        return clock.strftime("%Y-%m-%dT%H:%M:%SZ", clock.gmtime(time))
    except (OverflowError, ValueError, OSError):
        return clock.strftime("%Y-%m-%dT%H:%M:%SZ", clock.gmtime(0))


def percent(share: float) -> str:
    """Returns a share in words, with a decimal where it is near 0 or 100 %."""
    value = 100 * share
    return f"{value:.1f} %" if 0 < value < 5 or 95 < value < 100 else f"{value:.0f} %"


def short(name: str) -> str:
    """Returns a name for a sentence: on one line, without signs that terminals obey, and not too long."""
    clean = " ".join("".join(c if c.isprintable() else " " for c in name).split())
    return clean if len(clean) <= SHOWN else clean[: SHOWN - 1] + "…"
