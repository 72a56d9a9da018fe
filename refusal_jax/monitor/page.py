"""Writes what a monitor has seen as one self-contained HTML page, in the style of a study's report.

The page loads nothing and runs nothing. Names of models and categories, and what was malformed, are escaped by the
template engine; only our own drawings enter as markup. No text of a request or a reply is on it.
"""

import datetime
import pathlib
import time as clock
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from refusal_jax.judges.judge import Outcome
from refusal_jax.monitor.alerts import percent, short, stamp
from refusal_jax.monitor.change import Change
from refusal_jax.monitor.figures import Chart, Day, date, draw
from refusal_jax.monitor.sequences import confidence_sequence
from refusal_jax.monitor.signal import Signal
from refusal_jax.monitor.store import Count, Store
from refusal_jax.monitor.traces import Unjudged
from refusal_jax.monitor.views import StreamView, stream_views, test_views
from refusal_jax.report.page import environment, flatten

TEMPLATE = pathlib.Path(__file__).with_name("monitor.html.jinja")
CHARTS = 40  # of the models and categories with the most replies
ALERTS = 50  # the latest, on the page
MALFORMED = 200  # lines, the latest, on the page
DAY = 86400.0
# Why traces have no outcome, for readers.
REASONS = {
    Unjudged.ERROR: "the call failed",
    Unjudged.NO_REPLY: "the log has no reply",
    Unjudged.NO_TEXT: "the log leaves the texts out",
    Unjudged.CUT: "the log cut the reply short",
    Unjudged.TOOL_CALL: "the reply calls tools and has no text",
    Unjudged.THOUGHT: "the reply ended within its thought",
    Unjudged.NO_PROMPT: "the judge needs the request, which the log does not have",
    Unjudged.OLD: "older than what is kept",
    Unjudged.UNCLEAR: "the judge gave no verdict",
}


def monitor_page(store: Store, now: float | None = None) -> str:
    """Returns the page. now: when it is made, in seconds since 1970; by default the present."""
    signal = Signal.view(store.state(Signal.name))
    counts = store.counts()
    views = list(stream_views(signal))
    open_alarms = {test for test in test_views(signal) if test.alarmed}
    alerts = [_alert(one, signal) for one in reversed(signal.alerts[-ALERTS:])]
    charted = sorted(views, key=lambda one: -one.seen)[:CHARTS]
    figures = [_figure(index, one, signal, counts) for index, one in enumerate(sorted(charted, key=_name))]
    malformed = store.malformed()
    return (
        environment(TEMPLATE.parent)
        .get_template(TEMPLATE.name)
        .render(
            made=stamp(clock.time() if now is None else now),
            latest=stamp(signal.latest) if signal.latest else "",
            headline=_headline(views, len(open_alarms)),
            strength="bad" if open_alarms else "",
            alerts=alerts,
            figures=[one for one in figures if one["svg"]],
            left_out=len(views) - len(charted),
            rows=[_row(one, signal) for one in views],
            tiles=_tiles(views, counts, len(open_alarms)),
            tests=signal.active,
            tallies=dict(sorted(store.tallies().items())),
            reasons=_reasons(counts),
            malformed=[(str(place), reason) for place, reason in reversed(malformed[-MALFORMED:])],
            settings=flatten(signal.settings.to_dict()),
            of=signal.settings,
        )
        .lstrip()
        .encode("utf-8", "replace")
        .decode()
    )


def _name(view: StreamView) -> tuple[str, str]:
    return view.model, view.category


def _headline(views: Sequence[StreamView], alarms: int) -> str:
    if not views:
        return "Nothing has been judged yet."
    learning = sum(one.reference is None for one in views)
    text = {0: "No alarm.", 1: "One alarm is not over."}.get(alarms, f"{alarms} alarms are not over.")
    if learning == len(views):
        return "All references are still being learnt: nothing is compared yet, so that there can be no alarm."
    return text + (f" {learning} of {len(views)} categories are still learning their reference." if learning else "")


def _tiles(views: Sequence[StreamView], counts: Mapping[Count, int], alarms: int) -> dict[str, tuple[str, str]]:
    days = sorted({one.day for one in counts})
    since = f"{date(days[0])} to {date(days[-1])}" if days else ""
    traces = sum(n for one, n in counts.items() if one.what == "traces")
    return {
        "Judged replies": (f"{sum(one.seen for one in views):,}".replace(",", " "), f"of {traces} traces"),
        "Models": (str(len({one.model for one in views})), f"{len(views)} pairs with categories"),
        "Days": (str(len(days)), since),
        "Alarms not over": (str(alarms), ""),
    }


def _alert(content: Mapping[str, Any], signal: Signal) -> dict[str, Any]:
    """Returns an alert for the page, and whether its alarm is over."""
    recovered = {one["alarm"] for one in signal.alerts if one["kind"] == "recovery"}
    drift = content["kind"] == "drift"
    return {"of": content, "drift": drift, "over": not drift or content["id"] in recovered}


def _figure(index: int, view: StreamView, signal: Signal, counts: Mapping[Count, int]) -> dict[str, Any]:
    own: dict[int, Counter[str]] = {}
    outcomes = {outcome.value for outcome in Outcome}
    for one, n in counts.items():
        if (one.model, one.category) == (view.model, view.category) and one.what in outcomes:
            own.setdefault(one.day, Counter())[one.what] += n
    days = tuple(Day(day, of[Outcome.REFUSES.value], of.total()) for day, of in sorted(own.items()))
    alerts = tuple(
        (_day(one["time"]), one["kind"] == "drift")
        for one in signal.alerts
        if one["model"] == view.model and one["category"] == view.category and one["outcome"] == Outcome.REFUSES
    )
    share = view.reference.share(Outcome.REFUSES) if view.reference else None
    chart = Chart(
        f"{short(view.model)}, {short(view.category)}",
        days,
        share,
        None if share is None else view.ends.get(Change.REFUSES_LESS, 0.0),
        None if share is None else view.ends.get(Change.REFUSES_MORE, 1.0),
        alerts,
    )
    svg = draw(chart, f"fig-{index}", signal.settings.confidence)
    return {"model": view.model, "category": view.category, "svg": Markup(svg), "learning": view.reference is None}


def _day(time: str) -> float:
    return datetime.datetime.fromisoformat(time).timestamp() / DAY


def _row(view: StreamView, signal: Signal) -> dict[str, Any]:
    shares = {}
    for outcome, count in view.counts.items():
        low, high = confidence_sequence(count, view.n, signal.settings.confidence)
        known = view.reference.share(outcome) if view.reference else None
        shares[outcome.value] = {
            "now": percent(count / view.n) if view.n else "",
            "bounds": f"{percent(low)} to {percent(high)}" if view.n else "",
            "reference": "" if known is None else percent(known),
        }
    alarmed = [
        test.change.value.replace("_", " ")
        for test in test_views(signal)
        if test.alarmed and (test.model, test.category) == (view.model, view.category)
    ]
    learnt = f"learning, {view.seen} of {signal.settings.learn}"
    state = ", ".join(alarmed) or (learnt if view.reference is None else "no alarm")
    return {"of": view, "shares": shares, "state": state, "alarmed": bool(alarmed)}


def _reasons(counts: Mapping[Count, int]) -> dict[str, int]:
    found: Counter[str] = Counter()
    for one, n in counts.items():
        if one.what in REASONS:
            found[REASONS[Unjudged(one.what)]] += n
    return dict(found.most_common())
