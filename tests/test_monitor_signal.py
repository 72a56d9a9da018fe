"""The monitor's signal: confidence sequences cover at all times, false alarms are as rare as stated, drifts are found, and the
state survives."""

import json
import math

import numpy as np
import pytest

from refusal_jax.errors import UserError
from refusal_jax.judges.judge import Outcome, Verdict
from refusal_jax.monitor import change, sequences, simulation
from refusal_jax.monitor.change import CHANGES, OUTCOMES, Change, Reference
from refusal_jax.monitor.references import read_references
from refusal_jax.monitor.signal import Signal
from refusal_jax.monitor.signal_settings import SECONDS_A_MONTH, SignalSettings
from refusal_jax.monitor.traces import Judged, Judgements, Place, Trace
from refusal_jax.monitor.watch import FORGOTTEN

START, DAY = 1.7e9, 86400.0
STATED = {("*", "*"): Reference((0, 0, 0, 0), 0, "stated", (0.9, 0.06, 0.03, 0.01))}


def drawn(rng, n, refuses=0.9, deflects=0.03, broken=0.01):
    """`n` outcomes with these shares."""
    shares = {Outcome.REFUSES: refuses, Outcome.DEFLECTS: deflects, Outcome.BROKEN: broken}
    rest = 1 - sum(shares.values())
    return [OUTCOMES[i] for i in rng.choice(len(OUTCOMES), n, p=[shares.get(o, rest) for o in OUTCOMES])]


def fed(signal, outcomes, start=START, step=432.0, category="a", model="m"):
    """The alerts that outcomes raise, one every `step` seconds."""
    alerts = []
    for number, outcome in enumerate(outcomes):
        alerts += signal.add(model, category, start + number * step, outcome)
    return alerts


def test_a_confidence_sequence_covers_at_all_times_at_once():
    """The martingale of the true rate reaches its limit in at most 5 % of runs, at any of 20 000 looks; a 95 % interval that is
    looked at as often leaves the rate out in most."""
    rng = np.random.default_rng(0)
    for rate in (0.02, 0.5, 0.9):
        hits = rng.random((400, 4000)) < rate
        count, n = hits.cumsum(1), np.arange(1, 4001)
        from scipy.special import betaln

        prior = sequences.PRIOR
        logs = betaln(prior + count, prior + n - count) - betaln(prior, prior)
        logs -= count * math.log(rate) + (n - count) * math.log(1 - rate)
        assert (logs.max(1) >= math.log(20)).mean() <= 0.05
        fixed = abs(count / n - rate) > 1.96 * np.sqrt(rate * (1 - rate) / n)
        assert fixed[:, 99:].any(1).mean() > 0.3
        assert logs[0, -1] == pytest.approx(sequences.log_martingale(rate, int(count[0, -1]), 4000))


@pytest.mark.parametrize(("count", "n"), [(0, 0), (0, 10), (10, 10), (7, 10), (450, 500), (3, 100_000)])
def test_the_bounds_are_where_the_martingale_reaches_its_limit(count, n):
    low, high = sequences.confidence_sequence(count, n)
    assert low <= count / max(n, 1) <= high
    for bound in (low, high):
        if 0 < bound < 1:
            assert sequences.log_martingale(bound, count, n) == pytest.approx(math.log(20), abs=1e-6)
    assert (low, high) == (0.0, 1.0) if not n else (low == 0) == (count == 0) and (high == 1) == (count == n)


def test_bets_are_fair_at_the_end_of_the_range_and_lose_within():
    for end, sign in ((0.88, -1), (0.05, 1), (0.5, 1)):
        for at in (end, end - 0.03 * sign):
            without, with_it = change.bets(end, sign)
            expected = [(1 - at) * a + at * b for a, b in zip(without.ratios, with_it.ratios, strict=True)]
            assert max(expected) <= 1 + 1e-12
            assert (min(expected) > 1 - 1e-12) == (at == end)
        back = change.bets(end, sign, 1.0)
        assert (back[1].ratios[0] > 1) == (sign < 0), "after an alarm it bets on the way back"


def test_false_alarms_are_as_rare_as_stated_even_at_the_edge_of_the_range():
    """Three months of 24 replies a day with the share at the end of the range: as many false alarms are allowed, and at the
    reference itself there are hardly any."""
    settings = SignalSettings(false_alarms_per_month=1.0, minimum=1, cool_down_hours=0.0)
    rng, runs, n = np.random.default_rng(1), 300, 24 * 90
    counts = np.tile([900, 60, 30, 10], (runs, 1))
    reference = Reference((900, 60, 30, 10), 1000, "")
    low = reference.end(Change.REFUSES_LESS, 2.0, 0.95)
    assert low is not None

    def mean(refuses):
        draws = (np.array([OUTCOMES.index(o) for o in drawn(rng, runs, refuses)]) for _ in range(n))
        found = simulation.monitor_events(settings, counts, draws, 3600.0)
        return sum(not over for of in found for _, _, over in of) / runs

    months = n * 3600 / SECONDS_A_MONTH
    assert 0.05 < mean(low) <= months
    assert mean(0.9) < 0.1 * months


def test_the_simulation_is_the_monitor():
    """Alarms and recoveries of the vectorised simulation are those of the monitor, reply by reply."""
    settings = SignalSettings(false_alarms_per_month=1.0, minimum=20, learn=300)
    rng = np.random.default_rng(2)
    learnt = drawn(rng, 300)
    rest = drawn(rng, 1200) + drawn(rng, 900, 0.7, 0.1) + drawn(rng, 1500, 0.93) + drawn(rng, 500, 0.6, 0.03, 0.2)
    signal = Signal(settings, now=lambda: math.inf)
    assert fed(signal, learnt) == []
    start = START + 300 * 432.0
    alerts = fed(signal, rest, start)
    counts = np.array([[learnt.count(outcome) for outcome in OUTCOMES]])
    (events,) = simulation.monitor_events(settings, counts, [np.array([OUTCOMES.index(o)]) for o in rest], 432.0)
    ours = [(one.content["time"], one.content["change"], one.content["kind"] == "recovery") for one in alerts]
    from refusal_jax.monitor.alerts import stamp

    assert ours == [(stamp(start + number * 432.0), of.value, over) for number, of, over in events]
    assert {of for _, of, _ in ours} >= {"refuses_less", "broken_more"}
    assert any(over for _, _, over in ours)


def test_the_table_of_a_small_simulation():
    rows = simulation.simulated(
        simulation.Traffic(a_day=20, runs=8, categories=2), SignalSettings(false_alarms_per_month=1.0)
    )
    assert [row.rule for row in rows] == ["monitor", *simulation.RULES]
    assert rows[0].delays[20.0][0] < 10
    text = simulation.table(rows)
    assert text.count("\n") == len(rows) + 1 and "95 % interval of each day" in text
    with pytest.raises(UserError, match="signal.learn"):
        simulation.simulated(simulation.Traffic(), SignalSettings(learn=1))


def test_a_fall_is_found_and_its_end_is_told_once():
    rng = np.random.default_rng(3)
    signal = Signal(SignalSettings(), STATED)
    outcomes = drawn(rng, 2000) + drawn(rng, 1000, 0.75) + drawn(rng, 2500, 0.9)
    alerts = [one.content for one in fed(signal, outcomes)]
    assert [(one["kind"], one["change"]) for one in alerts] == [
        ("drift", "refuses_less"),
        ("recovery", "refuses_less"),
    ]
    first, second = alerts
    assert first["points"] < -8 and first["observed"]["n"] >= 30
    assert second["alarm"] == first["id"] != second["id"]
    assert "m, category a: refuses less." in first["text"] and "the reference is 90 %, stated" in first["text"]
    began = START + 2000 * 432
    assert abs(_seconds(first["observed"]["since"]) - began) < 2 * DAY


def _seconds(stamp):
    import datetime

    return datetime.datetime.fromisoformat(stamp).timestamp()


@pytest.mark.parametrize(
    ("shares", "expected"),
    [
        ({"refuses": 0.99, "deflects": 0.005, "broken": 0.0}, "refuses_more"),
        ({"deflects": 0.2, "refuses": 0.79}, "deflects_more"),
        ({"broken": 0.15, "refuses": 0.82}, "broken_more"),
    ],
)
def test_changes_of_all_kinds_are_found(shares, expected):
    rng = np.random.default_rng(4)
    alerts = fed(Signal(SignalSettings(), STATED), drawn(rng, 500) + drawn(rng, 1500, **shares))
    assert expected in {one.content["change"] for one in alerts}


def test_a_small_drift_is_no_alarm_however_long_it_lasts():
    rng = np.random.default_rng(5)
    draws = (np.array([OUTCOMES.index(o) for o in drawn(rng, 10, 0.88)]) for _ in range(10_000))
    settings = SignalSettings(threshold_points=3.0)
    assert (
        simulation.monitor_events(settings, np.tile([90_000, 6_000, 3_000, 1_000], (10, 1)), draws, 432.0) == [[]] * 10
    )


def test_fewer_refusals_that_are_no_compliance_are_said_to_be_none():
    rng = np.random.default_rng(6)
    reference = {("*", "*"): Reference((900, 60, 30, 10), 1000, "recorded")}
    alerts = fed(Signal(SignalSettings(), reference), drawn(rng, 500) + drawn(rng, 800, 0.6, 0.05, 0.3))
    (less,) = [one.content for one in alerts if one.content["change"] == "refuses_less"]
    assert "have not become more frequent" in less["text"] and "broken replies" in less["text"]


def test_a_change_of_the_traffic_is_said_with_the_alarm():
    rng = np.random.default_rng(7)
    signal = Signal(SignalSettings(), STATED)
    assert fed(signal, drawn(rng, 1000)) == []
    alerts = fed(signal, drawn(rng, 600, 0.6), START + 1000 * 432, 60.0)
    assert "The category's traffic changed too, from 200 to" in alerts[0].content["text"]


def test_a_change_of_the_mix_alone_is_no_alarm_of_all_categories():
    rng = np.random.default_rng(8)
    references = {("*", "a"): STATED["*", "*"], ("*", "b"): Reference((0, 0, 0, 0), 0, "s", (0.1, 0.86, 0.03, 0.01))}
    signal = Signal(SignalSettings(), references)
    alerts = []
    for number in range(3000):
        category = "a" if rng.random() < (0.8 if number < 1500 else 0.2) else "b"
        (outcome,) = drawn(rng, 1, 0.9 if category == "a" else 0.1)
        alerts += signal.add("m", category, START + 432 * number, outcome)
    assert alerts == []
    shares = signal.groups["m"].shares()
    assert shares["a"][1] < 0.4 < shares["a"][0]
    for number in range(3000, 4000):
        category = "a" if rng.random() < 0.2 else "b"
        (outcome,) = drawn(rng, 1, 0.75 if category == "a" else 0.02)
        alerts += signal.add("m", category, START + 432 * number, outcome)
    whole = next(one.content for one in alerts if one.content["category"] is None)
    assert whole["change"] == "refuses_less" and "The mix of categories changed too; a went from" in whole["text"]


def test_alarms_of_categories_are_part_of_that_of_all_and_go_to_the_first_channel_alone():
    rng = np.random.default_rng(9)
    signal = Signal(SignalSettings(), STATED, ("alerts", "webhook"))
    rows = [("a" if n % 2 else "b", o) for n, o in enumerate(drawn(rng, 800) + drawn(rng, 300, 0.3))]
    messages = []
    for number, (category, outcome) in enumerate(rows):
        place = Place("f", number + 1)
        trace = Trace(str(number), START + 60 * number, "m", category, None, "", "", "stop", place)
        messages += signal.take(Judgements((Judged(trace, Verdict(0), outcome),), ()))
    hook = [one.content for one in messages if one.channel == "webhook" and one.content["change"] == "refuses_less"]
    file = [one.content for one in messages if one.channel == "alerts" and one.content["change"] == "refuses_less"]
    assert len(file) == 3 and [one["category"] for one in hook if one["part_of"]] == []
    whole = next(one for one in file if one["category"] is None)
    late = [one for one in file if one["part_of"]]
    assert late and all(one["part_of"] == whole["id"] and "This is part of the alarm" in one["text"] for one in late)
    assert len(hook) == 3 - len(late)


def test_the_state_is_small_json_and_goes_on_as_if_nothing_had_happened():
    """However the replies are batched and wherever the monitor was stopped, the alerts and the state are the same."""
    rng = np.random.default_rng(10)
    outcomes = drawn(rng, 700) + drawn(rng, 500, 0.6) + drawn(rng, 500, 0.95)
    rows = [(START + 100 * n, "ab"[n % 2], outcome) for n, outcome in enumerate(outcomes)]
    settings = SignalSettings(learn=100)
    whole, kept, alerts, again = Signal(settings), {}, [], []
    for time, category, outcome in rows:
        alerts += whole.add("m", category, time, outcome)
    start = 0
    while start < len(rows):
        signal = Signal(settings)
        signal.restore(json.loads(json.dumps(kept)))
        stop = start + int(rng.integers(1, 300))
        for time, category, outcome in rows[start:stop]:
            again += signal.add("m", category, time, outcome)
        kept |= signal.changed()
        assert signal.changed() == {}
        start = stop
    assert [one.content for one in again] == [one.content for one in alerts] != []
    assert json.dumps(kept, sort_keys=True) == json.dumps(whole.state(), sort_keys=True)
    assert max(len(json.dumps(value)) for key, value in kept.items() if "alerts" not in key) < 4000


def test_references_are_learnt_and_can_be_learnt_anew():
    rng = np.random.default_rng(11)
    signal = Signal(SignalSettings(learn=200))
    fed(signal, drawn(rng, 199))
    assert signal.active == 0 and signal.streams["m", "a"].reference is None
    fed(signal, drawn(rng, 1), START + 199 * 432)
    reference = signal.streams["m", "a"].reference
    assert reference and reference.n == 200 and signal.active == 4 and sum(signal.streams["m", "a"].counts) == 0
    signal.relearn("other")
    assert signal.streams["m", "a"].reference
    signal.relearn("m")
    assert signal.streams["m", "a"].reference is None and signal.active == 0


def test_time_brings_in_no_more_than_it_has():
    """Gaps, clocks that go back, and tests without replies: what comes in never exceeds the allowance for the time."""
    signal = Signal(SignalSettings(), STATED)
    signal.add("m", "a", START, Outcome.REFUSES)
    tests = signal.streams["m", "a"].tests
    month = SECONDS_A_MONTH / 0.1
    signal.add("m", "a", START + 3 * DAY, Outcome.REFUSES)
    assert tests.income == pytest.approx(DAY / month / 4), "a gap counts as one day"
    signal.add("m", "a", START + DAY, Outcome.REFUSES)
    assert tests.income == 0 and tests.last == START + 3 * DAY
    signal.add("m", "b", START + 4 * DAY, Outcome.REFUSES)
    assert signal.active == 12  # two categories, and both together
    signal.add("m", "b", START + 4 * DAY + FORGOTTEN, Outcome.REFUSES)
    assert signal.active == 8, "the tests of a are forgotten"
    signal.add("m", "a", START + 4 * DAY + FORGOTTEN, Outcome.REFUSES)
    assert signal.active == 12 and tests.income == 0


def test_replies_from_the_future_count_as_of_now():
    signal = Signal(SignalSettings(), STATED, now=lambda: START)
    trace = Trace("1", START + 1e9, "m", "a", None, "", "", "stop", Place("f", 1))
    signal.take(Judgements((Judged(trace, Verdict(0), Outcome.REFUSES), Judged(trace, Verdict(0), None)), ()))
    assert signal.latest == START and signal.streams["m", "a"].seen == 1


def test_ranges_cover_the_references_own_interval():
    reference = Reference((180, 20, 0, 0), 200, "")
    low, high = reference.interval(Outcome.REFUSES, 0.95)
    from scipy import stats

    exact = stats.binomtest(180, 200).proportion_ci(0.95, "exact")
    assert (low, high) == pytest.approx((exact.low, exact.high))
    assert reference.end(Change.REFUSES_LESS, 2.0, 0.95) == pytest.approx(exact.low)
    assert reference.end(Change.REFUSES_LESS, 10.0, 0.95) == pytest.approx(0.8)
    assert Reference((200, 0, 0, 0), 200, "").end(Change.REFUSES_MORE, 2.0, 0.95) is None
    assert reference.interval(Outcome.BROKEN, 0.95)[0] == 0
    assert [STATED["*", "*"].end(of, 2.0, 0.95) for of in CHANGES] == pytest.approx([0.88, 0.92, 0.05, 0.03])


@pytest.mark.parametrize("name", list(SignalSettings()))
def test_settings_out_of_their_ranges(name):
    if name == "references":
        return
    with pytest.raises(UserError, match=rf"signal.{name} = .*expected a value from"):
        Signal(SignalSettings.of({name: -1 if name in ("learn", "minimum") else -1.0}))


def written(tmp_path, content):
    path = tmp_path / "rates.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_references_of_a_file_of_rates(tmp_path):
    content = {
        "harmful": {"refuses": 0.95, "broken": 0.01},
        "m": {"harmless": {"refuses": {"count": 4, "n": 200}}},
        "*": {"*": {"refuses": 0.5}},
    }
    found = read_references(written(tmp_path, content), "rules")
    assert (
        found["*", "harmful"].share(Outcome.REFUSES) == 0.95 and found["*", "harmful"].share(Outcome.DEFLECTS) is None
    )
    assert found["m", "harmless"].share(Outcome.REFUSES) == 0.02 and found["m", "harmless"].n == 200
    assert found["m", "harmless"].share(Outcome.BROKEN) is None
    signal = Signal(SignalSettings(), found)
    assert signal.reference_for("m", "harmless") is found["m", "harmless"]
    assert signal.reference_for("x", "harmful") is found["*", "harmful"]
    assert signal.reference_for("x", "y") is found["*", "*"]
    fed(signal, [Outcome.REFUSES] * 5, category="harmless")
    assert set(signal.streams["m", "harmless"].ends) == {Change.REFUSES_MORE}


def test_references_of_a_recorded_run(tmp_path):
    replies = [
        {"set": "harmful", "fault": "", "outcomes": {"rules": "refuses" if n < 9 else "complies"}} for n in range(10)
    ]
    replies.append({"set": "harmful", "fault": "timeout", "outcomes": {"rules": None}})
    record = {"schema": "refusal_jax/gate-record/1", "judges": [{"name": "rules"}], "replies": replies}
    found = read_references(written(tmp_path, record), "rules")
    assert found["*", "harmful"].n == 10 and found["*", "harmful"].share(Outcome.REFUSES) == 0.9
    with pytest.raises(UserError, match="no outcome of the judge 'other'.*judged by rules"):
        read_references(written(tmp_path, record), "other")
    with pytest.raises(UserError, match="damaged recorded run"):
        read_references(written(tmp_path, record | {"replies": [{"set": 1}]}), "rules")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not valid JSON"),
        ("[]", "expected shares by outcome"),
        ({"schema": "x"}, "has the schema 'x'"),
        ({"a": 0.5}, "expected shares by outcome"),
        ({"a": {"refuses": 1.5}}, "found 1.5, expected shares"),
        ({"a": {"refuses": True}}, "found True, expected shares"),
        ({"a": {"b": {}}}, "expected shares by outcome"),
        ({"a": {"refuses": 0.5, "refusess": 0.5}}, "'refusess' is no outcome. Did you mean refuses"),
        ({"a": {"refuses": 0.7, "complies": 0.7}}, "add up to more than 1"),
        ({"a": {"refuses": {"count": 5, "n": 4}}}, "expected shares by outcome"),
        ({"a": {"refuses": {"count": 3, "n": 4}, "broken": {"count": 3, "n": 4}}}, "do not belong together"),
        ({"a": {"refuses": {"count": 3, "n": 4}, "broken": 0.1}}, "do not belong together"),
    ],
)
def test_files_of_rates_that_are_none(tmp_path, content, message):
    with pytest.raises(UserError, match=message):
        read_references(written(tmp_path, content), "rules")
