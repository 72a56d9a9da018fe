"""The monitor's store, its choice of traces and its loop, with a monitor that is killed."""

import json
import os
import pathlib
import re
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter

import pytest
from commands import SECONDS
from monitor_logs import DAY0, lines, record

from refusal_jax.errors import DamagedFile, UserError
from refusal_jax.judges.judge import Judge, Outcome, Verdict
from refusal_jax.monitor import loop
from refusal_jax.monitor.judging import Judging
from refusal_jax.monitor.loop import Monitor
from refusal_jax.monitor.parts import Letter, Message
from refusal_jax.monitor.settings import MonitorSettings
from refusal_jax.monitor.start import source_of
from refusal_jax.monitor.status import status_text
from refusal_jax.monitor.store import Changes, Count, Store
from refusal_jax.monitor.traces import Place

NOW = DAY0 + 10 * 86400.0


class Saying(Judge):
    """A judge that knows refusals by a word, and is asked for in batches that it keeps."""

    def __init__(self, name: str = "rules", outcome: bool = True):
        self.name, self.outcome, self.asked = name, outcome, []

    def judge(self, rows, ledger=None):
        self.asked.append(len(rows))
        return [self.verdict(row["response"]) for row in rows]

    def verdict(self, text: str) -> Verdict | None:
        refuses = "sorry" in text
        if text == "?":
            return None
        return Verdict(
            int(not refuses), None, (Outcome.REFUSES if refuses else Outcome.COMPLIES) if self.outcome else None
        )


class Recorder:
    """A part that keeps what it was told, and sends a message for each refusal."""

    name = "recorder"

    def __init__(self):
        self.judged, self.unjudged, self.state = [], [], {}

    def restore(self, state):
        self.state = dict(state)

    def take(self, batch, sent):
        self.judged += batch.judged
        self.unjudged += batch.unjudged
        self.state["n"] = {"n": self.state.get("n", {"n": 0})["n"] + len(batch.judged)}
        return [Message("post", {"id": one.trace.id}) for one in batch.judged if one.outcome is Outcome.REFUSES]

    def changed(self):
        return self.state


class Post:
    """A carrier that is done with as many letters as it is told."""

    channel = "post"

    def __init__(self, done: int = 10**9):
        self.done, self.got = done, []

    def deliver(self, letters):
        done = min(self.done, len(letters))
        self.got += letters[:done]
        return done

    def close(self):
        pass


def watch(
    folder: pathlib.Path, log: pathlib.Path, parts=(), carriers=(), judge: Judge | None = None, **settings
) -> Store:
    """Runs a monitor over a log once, and returns its store, open."""
    asked = MonitorSettings.of(settings)
    store = Store.open(folder)
    source = source_of(str(log), store, asked, False, lambda: 0.0)
    judging = Judging(judge or Saying())
    try:
        Monitor(asked, store, source, judging, parts, carriers, lambda: NOW).run()
    except BaseException:
        store.close()
        raise
    finally:
        judging.close()
        source.close()
    return store


def counted(store: Store) -> dict[tuple[str, str], int]:
    """Returns the counts by category and what they are of."""
    found: Counter[tuple[str, str]] = Counter()
    for count, n in store.counts().items():
        found[count.category, count.what] += n
    return dict(found)


@pytest.fixture
def log(tmp_path) -> pathlib.Path:
    path = tmp_path / "log.jsonl"
    path.write_text("".join(lines(0, 300)))
    return path


def test_counts_states_and_letters(tmp_path, log):
    part, post = Recorder(), Post(done=2)
    with watch(tmp_path / "state", log, [part], [post], category_field="metadata.topic") as store:
        found = counted(store)
        assert found["toys", "traces"] == found["toys", "sampled"] == 100
        assert found["toys", "refuses"] + found["toys", "complies"] == 100 and found["toys", "refuses"] == 60
        assert store.state("recorder") == {"n": {"n": 300}}
        assert len(part.judged) == 300 and len(post.got) == 2 * 2  # of one batch, and at the end
        assert [one.trace.id for one in part.judged][:2] == ["chatcmpl-0", "chatcmpl-1"]
    log.write_text(log.read_text() + "".join(lines(290, 310)))
    part, second = Recorder(), Post()
    with watch(tmp_path / "state", log, [part], [second], category_field="metadata.topic") as store:
        assert len(part.judged) == 10 and store.state("recorder") == {"n": {"n": 310}}  # the others were read before
        assert store.tallies()["duplicates"] == 10 and store.letters("post") == []
        letters = [letter.content["id"] for letter in (*post.got[:4], *second.got)]
        assert len(letters) == len(set(letters)) == 184


def test_judged_and_unjudged_are_apart(tmp_path):
    log = tmp_path / "log.jsonl"
    odd = [
        {**record(1), "response": {"error": {"message": "overloaded"}}},
        {**record(2), "response": None},
        {**record(3), "response": {"id": "3", "choices": [{"message": {"content": "?"}}]}},
        {**record(4), "timestamp": DAY0 - 500 * 86400},
    ]
    log.write_text("\n".join(map(json.dumps, odd)) + "\n" + "".join(lines(5, 7)))
    part = Recorder()
    with watch(tmp_path / "state", log, [part]) as store:
        found = counted(store)
        names = ("error", "no_reply", "unclear", "old")
        assert [found["all", name] for name in names] == [1, 1, 1, 1] and len(part.judged) == 2
        assert sorted(trace.fault for trace in part.unjudged) == sorted(names)
        text = status_text(store, 7)
        assert "2 traces, 2 judged, refused 50.0%" in text and "0 judged, 1 error, 1 no_reply, 1 unclear" in text


def test_malformed_lines_are_counted_shown_and_skipped(tmp_path, caplog):
    log = tmp_path / "log.jsonl"
    good = list(lines(0, 300))
    for number in range(200):
        good.insert(number * 2 + 1, ('{"half', "text", '{"x": 1}', "[3]")[number % 4] + f"{number}\n")
    log.write_text("".join(good))
    with watch(tmp_path / "state", log) as store:
        assert store.tallies() == {"lines": 500, "malformed": 200} and counted(store)["all", "traces"] == 300
        assert [place.line for place, _ in store.malformed()] == list(range(2, 402, 2))
        assert f"{log}:2 it is no JSON" in status_text(store, 1) or f"{log}:364 " in status_text(store, 1)
    assert f"{log}:2 is skipped: it is no JSON" in caplog.text and "190 more malformed lines are skipped" in caplog.text


def test_the_same_traces_are_chosen(tmp_path, log):
    chosen = []
    for seed in ("a", "a", "b"):
        part = Recorder()
        watch(tmp_path / f"state{len(chosen)}", log, [part], rate=0.3, seed=seed).close()
        chosen.append([one.trace.id for one in part.judged])
    assert chosen[0] == chosen[1] != chosen[2]
    assert 60 < len(chosen[0]) < 120


def test_a_limit_a_day_is_spread_by_the_day_before(tmp_path):
    log, part = tmp_path / "log.jsonl", Recorder()
    log.write_text("".join(lines(0, 600, seconds=86400 / 300)))
    first = 300 - int(DAY0 % 86400 / (86400 / 300))  # traces until midnight
    with watch(tmp_path / "state", log, [part], max_per_day=20) as store:
        per_day = [n for count, n in sorted(store.counts().items()) if count.what == "sampled"]
    ids = [int(one.trace.id.split("-")[1]) for one in part.judged]
    assert per_day[0] == 20 and ids[:20] == list(range(20))  # nothing is known of the first day
    second = [number for number in ids if first <= number < first + 300]
    assert 8 <= len(second) <= 20 and max(second) - min(second) > 80


def test_categories(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text("".join(lines(0, 30)))
    rules = tmp_path / "rules.json"
    rules.write_text(json.dumps({"tens": ["number [12]\\d$"], "ones": "NUMBER \\d$"}))
    with watch(tmp_path / "a", log, categories_file=str(rules)) as store:
        assert {what: n for (what, kind), n in counted(store).items() if kind == "traces"} == {"tens": 20, "ones": 10}
    with watch(tmp_path / "b", log, categories=["even=[02468]$"]) as store:
        assert {what: n for (what, kind), n in counted(store).items() if kind == "traces"} == {"even": 15, "other": 15}
    with watch(tmp_path / "c", log, category_field="metadata.topic", max_series=2) as store:
        assert {count.category for count in store.counts()} == {"toys", "cooking", "other"}
    rules.write_text(json.dumps({"a": 5}))
    for settings, message in (
        ({"categories": ["even"]}, "'even' is no rule. Write NAME=REGEX"),
        ({"categories": ["a=("]}, "The rule of category 'a' is no regular expression"),
        ({"categories_file": str(rules)}, "the category 'a' has 5, expected a regular expression or a list"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            watch(tmp_path / "d", log, **settings)


def test_traces_of_several_lines(tmp_path):
    """A stream that began in one run ends in the next; one that never ends is given up."""
    log = tmp_path / "log.jsonl"

    def piece(identity: str, text: str, reason=None) -> str:
        choice = {"index": 0, "delta": {"content": text}, "finish_reason": reason}
        chunk = {
            "id": identity,
            "object": "chat.completion.chunk",
            "created": DAY0,
            "model": "toy",
            "choices": [choice],
        }
        return json.dumps(chunk) + "\n"

    log.write_text(piece("a", "I am ") + piece("b", "never ends") + piece("a", "sorry"))
    settings, now = MonitorSettings.of({}), [NOW]
    for more, present in (("", NOW), (piece("a", ".", "stop"), NOW + 10), (piece("c", "x"), NOW + 1000)):
        with open(log, "a") as file:
            file.write(more)
        now[0] = present
        with Store.open(tmp_path / "state") as store:
            source, part = source_of(str(log), store, settings, True, lambda: 0.0), Recorder()
            stops = iter([False, True])
            Monitor(settings, store, source, Judging(Saying()), [part], now=lambda: now[0]).run(stops.__next__)
            found = [one.trace.response for one in part.judged], [trace.fault for trace in part.unjudged]
            drafts = len(store.drafts())
        assert (found, drafts) == {NOW: (([], []), 2), NOW + 10: ((["I am sorry."], []), 1)}.get(
            present, (([], ["cut"]), 1)
        )


def test_a_model_judges_in_a_thread_of_its_own(tmp_path, log, monkeypatch):
    monkeypatch.setattr(loop, "LINES_AT_ONCE", 10)
    judge, free = Saying("llm", outcome=False), threading.Event()
    log.write_text(
        log.read_text() + json.dumps({"id": "x", "time": DAY0, "output": "A reply to we do not know what"}) + "\n"
    )
    judge.judge, says = lambda rows, ledger=None: free.wait(60) and says(rows), judge.judge
    add = loop.Intake.add

    def added(self, batch, lines, changed, ended):
        """Lets the judge go on once all has been read."""
        add(self, batch, lines, changed, ended)
        if ended:
            free.set()

    monkeypatch.setattr(loop.Intake, "add", added)
    part = Recorder()
    with watch(tmp_path / "state", log, [part], judge=judge, judge_batch=1000) as store:
        found = counted(store)
    assert found["all", "judged"] == 180 and found["all", "complies"] == 120  # label 0 of such a judge is no refusal
    assert found["all", "no_prompt"] == 1
    assert len(judge.asked) <= 4 and sum(judge.asked) == 300  # what came meanwhile was judged in one go
    assert [one.trace.id for one in part.judged] == [f"chatcmpl-{number}" for number in range(300)]


def test_a_stop_finishes_what_was_begun(tmp_path, log):
    settings, stops = MonitorSettings.of({"poll_s": 0.01}), iter([False, False, True])
    with Store.open(tmp_path / "state") as store:
        source = source_of(str(log), store, settings, True)
        Monitor(settings, store, source, Judging(Saying())).run(lambda: next(stops))
        assert store.tallies()["lines"] == 300


def test_store_errors(tmp_path):
    folder = tmp_path / "state"
    with pytest.raises(UserError, match="has no monitor.sqlite: it is not the state of a monitor"):
        Store.view(tmp_path)
    with Store.open(folder) as store:
        store.commit(Changes(counts=Counter({Count(1, "m", "c", "traces"): 2}), malformed=[(Place("f", 1), "r")]))
        with pytest.raises(UserError, match="in use by another monitor. One monitor may use a state at a time"):
            Store.open(folder)
        with Store.view(folder) as seen:  # while it runs
            assert seen.counts() == store.counts()
    with sqlite3.connect(folder / "monitor.sqlite") as database:
        database.execute("PRAGMA user_version = 9")
    with pytest.raises(
        UserError, match="has the schema 9, expected 1: a newer version of this package made it. Upgrade"
    ):
        Store.open(folder)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="could not be written"):
        Store.open(tmp_path / "file/state")
    data = bytearray((folder / "monitor.sqlite").read_bytes())
    data[4096 * 2 : 4096 * 6] = os.urandom(4096 * 4)
    (folder / "monitor.sqlite").write_bytes(data)
    with pytest.raises(DamagedFile, match="monitor.sqlite is damaged: .*Put a backup of it back, or move it away"):
        Store.open(folder)
    for path in folder.glob("monitor.sqlite-*"):
        path.unlink()
    (folder / "monitor.sqlite").write_text("no database, but a text that is long enough to be taken for one" * 20)
    with pytest.raises(DamagedFile, match="file is not a database"):
        Store.open(folder)


def test_the_database_is_bounded(tmp_path, monkeypatch):
    with Store.open(tmp_path / "state") as store:
        for day in range(10):
            bad = [(Place("f", line), "r") for line in range(300)]
            store.commit(Changes(seen={day: day}, counts=Counter({Count(day, "m", "c", "traces"): 1}), malformed=bad))
        store.prune(5, 7)
        assert {count.day for count in store.counts()} == set(range(5, 10)) and store.seen(list(range(10))) == {7, 8, 9}
        assert len(store.malformed()) == 1000


def test_a_full_disk_is_told_and_loses_nothing(tmp_path, log):
    with Store.open(tmp_path / "state") as store:
        pages = store.database.execute("PRAGMA page_count").fetchone()[0]
        store.database.execute(f"PRAGMA max_page_count = {pages}")
        with pytest.raises(
            UserError, match="could not be used: database or disk is full. Check that the disk has space"
        ):
            for number in range(100):
                store.commit(Changes(states={("a", str(number)): {"x": "y" * 4000}}))
        assert store.state("a") == {} or len(store.state("a")) < 100
        store.database.execute("PRAGMA max_page_count = 100000")
        store.commit(Changes(messages=[Message("post", {})]))
        assert store.letters("post") == [Letter(1, {})]


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"rate": 1.5}, "rate = 1.5, expected a value from 0.0 to 1.0"),
        ({"max_series": 0}, "expected a value from 1 to"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(UserError, match=message):
        MonitorSettings.of(settings).check()


def test_a_judge_that_reads_no_text():
    with pytest.raises(
        UserError, match="The judge refusal_score reads a model's probabilities, which logs do not have"
    ):
        Judging.of(MonitorSettings.of({"judge": "refusal_score"}))


def test_kills_change_nothing(tmp_path):
    """Runs that are killed at random moments, while the log is rotated: counts, charts, alerts and trail are as without."""
    script = pathlib.Path(__file__).with_name("monitor_kills.py")
    done = subprocess.run(
        [sys.executable, str(script), "--kills=8", "--traces=4000"],
        capture_output=True,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0 and "differences: none" in done.stdout, done.stdout + done.stderr
    assert int(done.stdout.split()[0]) >= 3


def test_a_database_appears_whole(tmp_path, monkeypatch):
    """A monitor that is stopped while it makes its database leaves none, and the next one makes it."""

    def stopped(*_):
        assert not (tmp_path / "monitor.sqlite").exists()
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(os, "replace", stopped)
        Store.open(tmp_path)
    with pytest.raises(UserError, match="has no monitor.sqlite"):
        Store.view(tmp_path)
    (tmp_path / "monitor.sqlite.new").write_bytes(b"half a database")
    with Store.open(tmp_path), Store.view(tmp_path) as seen:
        assert seen.tallies()["lines"] == 0
    assert sorted(file.name for file in tmp_path.iterdir()) == ["monitor.lock", "monitor.sqlite"]


def test_job(tmp_path, log):
    """The job follows a log until SIGTERM, and its status is read meanwhile."""
    command = [sys.executable, "-m", "refusal_jax.jobs.main", "monitor"]
    state = f"--state={tmp_path / 'state'}"
    run = subprocess.Popen(
        [*command, str(log), state, "--poll_s=0.05"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    database = tmp_path / "state/monitor.sqlite"
    until = time.monotonic() + SECONDS
    while time.monotonic() < until and run.poll() is None:
        if database.exists():
            with Store.view(tmp_path / "state") as store:
                if store.tallies()["lines"] == 300:
                    break
        threading.Event().wait(0.1)
    run.send_signal(signal.SIGTERM)
    out, _ = run.communicate(timeout=SECONDS)
    assert run.returncode == 0 and "300 lines were read: 300 traces" in out
