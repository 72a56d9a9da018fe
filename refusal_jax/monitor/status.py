"""Tells what a monitor has counted, in words, from its database."""

import datetime
from collections import Counter

from refusal_jax.judges.judge import Outcome
from refusal_jax.judges.statistics import Rate
from refusal_jax.monitor.intake import DUPLICATES, LINES, MALFORMED, OTHER_LINES
from refusal_jax.monitor.sampling import TRACES
from refusal_jax.monitor.store import Store
from refusal_jax.monitor.traces import Unjudged
from refusal_jax.terminal.screen import escaped

SHOWN = 20  # malformed lines


def status_text(store: Store, days: int) -> str:
    """Returns what was counted of lines, and of each model's and category's traces in the last days that have any."""
    tallies, counts = store.tallies(), store.counts()
    text = (
        f"{tallies[LINES]} lines were read: {sum(n for c, n in counts.items() if c.what == TRACES)} traces, "
        f"{tallies[DUPLICATES]} duplicates, {tallies[OTHER_LINES]} lines about other things, {tallies[MALFORMED]} malformed.\n"
    )
    for day in sorted({count.day for count in counts})[-days:]:
        date = datetime.date.fromordinal(datetime.date(1970, 1, 1).toordinal() + day)
        text += f"\n{date}\n"
        series: dict[tuple[str, str], Counter[str]] = {}
        for count, n in counts.items():
            if count.day == day:
                series.setdefault((count.model, count.category), Counter())[count.what] += n
        for (model, category), of in sorted(series.items()):
            text += f"  {escaped(model)}, {escaped(category)}: {in_words(of)}\n"
    malformed = store.malformed()[-SHOWN:]
    if malformed:
        text += f"\nThe last {len(malformed)} malformed lines:\n"
        text += "".join(f"  {escaped(f'{place} {reason}')}\n" for place, reason in malformed)
    return text


def in_words(of: Counter[str]) -> str:
    """Returns one series' counts as a line."""
    outcomes = {outcome.value: of[outcome.value] for outcome in Outcome}
    judged = sum(outcomes.values())
    text = f"{of[TRACES]} traces, {judged} judged"
    if judged:
        rate = Rate(outcomes[Outcome.REFUSES.value], judged)
        low, high = rate.interval
        text += f", refused {rate.rate:.1%} [{low:.1%}, {high:.1%}]"
        text += "".join(f", {n} {name}" for name, n in outcomes.items() if n and name != Outcome.REFUSES.value)
    return text + "".join(f", {of[why.value]} {why.value}" for why in Unjudged if of[why.value])
