"""Alerts on their way out: the file holds each once, the webhook delivers at least once and hides its address; metrics and page
show what the signal knows, with names escaped and in bounds."""

import contextlib
import http.server
import json
import logging
import socket
import threading
import time
import urllib.request
from collections import Counter

import pytest

from refusal_jax.errors import UserError
from refusal_jax.judges.judge import Outcome, Verdict
from refusal_jax.monitor.alert_carriers import AlertFile, Webhook
from refusal_jax.monitor.alerts import percent, short, stamp
from refusal_jax.monitor.change import Reference
from refusal_jax.monitor.figures import Day, date, sequence_of
from refusal_jax.monitor.metrics import Metrics, label
from refusal_jax.monitor.page import monitor_page
from refusal_jax.monitor.parts import Carrier, Letter, Message, Part
from refusal_jax.monitor.sequences import confidence_sequence
from refusal_jax.monitor.signal import Signal
from refusal_jax.monitor.signal_settings import SignalSettings
from refusal_jax.monitor.store import Changes, Count, Store
from refusal_jax.monitor.traces import Judged, Judgements, Place, Trace, Unjudged

SECRET = "T0000/B0000/not-to-be-shown"
EVIL = '<script>alert("x")</script>\n\\"} 1'

SOON = 60.0  # seconds within which a busy machine does what takes none


def letters(*names):
    return [Letter(number, {"id": name, "kind": "drift", "text": name}) for number, name in enumerate(names, 1)]


@contextlib.contextmanager
def hook(answers):
    """A server that answers with these statuses in turn, the last one for ever; "hang" answers when all is over. Yields its port
    and what it got."""
    got, left, over = [], list(answers), threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            got.append((self.path, dict(self.headers), body))
            answer = left.pop(0) if len(left) > 1 else left[0]
            if answer == "hang":
                over.wait(SOON)
                answer = 200
            self.send_response(answer)
            if answer == 302:
                self.send_header("Location", f"http://127.0.0.1:{self.server.server_port}/elsewhere")
            self.send_header("Content-Length", "0")
            with contextlib.suppress(OSError):
                self.end_headers()

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield server.server_port, got
    finally:
        over.set()
        server.shutdown()
        server.server_close()
        thread.join()


def delivered(webhook, of, patience=SOON):
    """Offers letters, as the monitor's loop does, until all are delivered."""
    until, done = time.monotonic() + patience, 0
    while done < len(of) and time.monotonic() < until:
        done = webhook.deliver(of)
        time.sleep(0.005)
    return done


def test_the_file_holds_each_alert_once_and_loses_a_torn_line(tmp_path):
    path = tmp_path / "of" / "alerts.jsonl"
    first = AlertFile(path)
    assert isinstance(first, Carrier)
    assert first.deliver(letters("a", "b")) == 2
    with open(path, "ab") as file:
        file.write(b'{"id": "c", "ki')  # a crash while the third was written
    assert AlertFile(path).deliver(letters("a", "b", "c")) == 3
    assert [json.loads(line)["id"] for line in path.read_text().splitlines()] == ["a", "b", "c"]
    path.write_text("no JSON\n[]\n" + path.read_text())
    assert AlertFile(path).deliver(letters("c", "d")) == 2
    assert path.read_text().count('"id": "c"') == 1 and path.read_text().endswith('"text": "d"}\n')
    with pytest.raises(UserError, match="could not be written"):
        AlertFile(tmp_path).deliver(letters("a"))
    first.close()


def test_the_webhook_sends_in_order_and_again_after_failures(caplog):
    caplog.set_level(logging.DEBUG)
    with hook([500, 429, 302, 200]) as (port, got):
        webhook = Webhook(f"http://127.0.0.1:{port}/{SECRET}", waits_s=(0.01, 0.02))
        assert isinstance(webhook, Carrier)
        assert delivered(webhook, letters("a", "b")) == 2
        webhook.close()
    assert [body["id"] for _, _, body in got] == ["a"] * 4 + ["b"]
    assert {path for path, _, _ in got} == {f"/{SECRET}"}, "a redirect is not followed"
    assert got[-1][1]["Idempotency-Key"] == got[-1][2]["id"] and got[-1][2]["text"] == "b"
    assert (webhook.sent, webhook.failures) == (2, 3)
    assert "status 500" in caplog.text and "sent again in 0.01 s" in caplog.text and SECRET not in caplog.text


def test_the_webhook_does_not_hold_up_reading_and_gives_the_rest_back(caplog):
    with hook(["hang"]) as (port, got):
        webhook = Webhook(f"http://127.0.0.1:{port}/{SECRET}", timeout_s=0.2, waits_s=(10 * SOON,))
        began = time.monotonic()
        assert webhook.deliver(letters("a", "b")) == 0
        assert webhook.deliver(letters("a", "b")) == 0, "it is not queued again"
        webhook.close()
        assert time.monotonic() - began < SOON
    assert [body["id"] for _, _, body in got] == ["a"]
    assert "TimeoutError" in caplog.text and SECRET not in caplog.text


def test_a_webhook_that_is_not_there_shows_no_address(caplog):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    webhook = Webhook(f"http://127.0.0.1:{port}/{SECRET}", waits_s=(0.01,))
    assert webhook.deliver(letters("a")) == 0
    webhook.close()
    assert "ConnectionRefusedError" in caplog.text and "The webhook at 127.0.0.1 did not take" in caplog.text
    assert SECRET not in caplog.text and str(port) not in caplog.text


def test_the_end_of_a_monitor_sends_what_waits_and_tells_the_store(tmp_path):
    with hook([500, 500, 200]) as (port, got), Store.open(tmp_path) as store:
        contents = [letter.content for letter in letters("a", "b")]
        store.commit(Changes(messages=[Message("webhook", content) for content in contents]))
        webhook = Webhook(f"http://127.0.0.1:{port}/", waits_s=(0.05, 600.0))
        assert webhook.deliver(store.letters("webhook")) == 0
        webhook.finish(store)
        assert store.letters("webhook") == []
        webhook.close()
    assert [body["id"] for _, _, body in got] == ["a", "a", "a", "b"]


def test_a_webhook_that_never_takes_an_alert_loses_it_after_a_day(caplog):
    with hook([404]) as (port, _):
        webhook = Webhook(f"http://127.0.0.1:{port}/", waits_s=(0.01,))
        webhook.PATIENCE_S = 0.0
        assert delivered(webhook, letters("a")) == 1
        webhook.close()
    assert "refuses alert a: status 404. Given up" in caplog.text


def test_the_address_of_a_webhook_comes_from_the_environment(monkeypatch):
    monkeypatch.delenv("HOOK", raising=False)
    with pytest.raises(UserError, match="HOOK of the environment, which should hold the webhook's address, is not set"):
        Webhook.from_environment("HOOK")
    for bad in (
        f"ftp://x/{SECRET}",
        SECRET,
        f"http://[x/{SECRET}",
        f"https://x y/{SECRET}",
        f"http://x:99999/{SECRET}",
    ):
        monkeypatch.setenv("HOOK", bad)
        with pytest.raises(UserError, match="does not hold a web address") as found:
            Webhook.from_environment("HOOK")
        assert SECRET not in str(found.value)
    monkeypatch.setenv("HOOK", f"https://hooks.example.org/{SECRET}\n")
    assert Webhook.from_environment("HOOK").host == "hooks.example.org"


STATED = {("*", "*"): Reference((0, 0, 0, 0), 0, "stated", (0.9, 0.06, 0.03, 0.01))}


def judgements(outcomes, model="m", category="a", start=1.7e9):
    judged = []
    for number, outcome in enumerate(outcomes):
        trace = Trace(str(number), start + 600 * number, model, category, None, "", "", "stop", Place("f", number + 1))
        judged.append(Judged(trace, Verdict(0), outcome))
    fault = Trace("x", start, model, category, None, "", None, None, Place("f", 1), Unjudged.ERROR)
    return Judgements(tuple(judged), (fault,))


def watched():
    """A signal that has raised an alarm, with its batch and messages."""
    signal = Signal(SignalSettings(), STATED)
    batch = judgements([Outcome.REFUSES, Outcome.COMPLIES] * 100, EVIL, "x" * 500)
    sent = signal.take(batch)
    assert sent
    return signal, batch, sent


def scraped(port):
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=SOON) as answer:
        return answer.read().decode()


def samples(text):
    from prometheus_client.parser import text_string_to_metric_families

    names = ("model", "category", "outcome", "change", "what")
    return {
        (one.name, *(one.labels[name] for name in names if name in one.labels)): one.value
        for of in text_string_to_metric_families(text)
        for one in of.samples
    }


def test_metrics_over_http_and_as_a_file(tmp_path):
    signal, batch, sent = watched()
    metrics = Metrics(signal, lambda: Counter(lines=7))
    assert isinstance(metrics, Part) and metrics.changed() == {} and metrics.restore({}) is None
    metrics.write_to(tmp_path / "of" / "refusal.prom")
    port = metrics.serve(0)
    assert metrics.take(batch, [*sent, Message("trail", {"record": 1})]) == []
    time.sleep(0.55)  # the batch came right after a snapshot, and no other comes
    text = scraped(port)
    found = samples(text)
    name = label("x" * 500)
    assert len(name) == 120 and name != label("x" * 501)
    assert found["refusal_jax_monitor_judged_total", EVIL, name, "refuses"] == 100
    assert found["refusal_jax_monitor_unjudged_total", "error"] == 1
    assert found["refusal_jax_monitor_alerts_total", "drift"] == len(sent)
    assert found["refusal_jax_monitor_lines_total", "lines"] == 7
    assert found["refusal_jax_monitor_reference_share", EVIL, name, "refuses"] == 0.9
    assert found["refusal_jax_monitor_alarmed", EVIL, name, "refuses_less"] == 1
    assert found["refusal_jax_monitor_alarmed", EVIL, name, "broken_more"] == 0
    assert 0 <= found["refusal_jax_monitor_evidence", EVIL, name, "refuses_more"] < 1
    low, share, high = (
        found[f"refusal_jax_monitor_share{end}", EVIL, name, "refuses"] for end in ("_low", "", "_high")
    )
    assert low < share == 0.5 < high
    with pytest.raises(UserError, match=f"The port {port} of 127.0.0.1 cannot be had"):
        Metrics(signal).serve(port)
    metrics.close()
    assert samples((tmp_path / "of" / "refusal.prom").read_text()) == found
    with pytest.raises(OSError):
        scraped(port)
    with pytest.raises(UserError, match="could not be written"):
        metrics.write_to(tmp_path)
    assert label("\ud800").startswith("?…") and label("\ud800") != label("\ud801")


def test_metrics_without_their_library(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "prometheus_client", None)
    with pytest.raises(UserError, match=r"pip install 'refusal-jax\[monitor\]'"):
        Metrics(Signal(SignalSettings()))


def test_the_page_shows_alarms_charts_and_malformed_lines_and_escapes_names(tmp_path):
    signal, batch, _ = watched()
    changes = Changes(tallies=Counter(lines=500, malformed=2))
    for one in batch.judged:
        changes.counts[Count(int(one.trace.time // 86400), EVIL, "x" * 500, one.outcome.value)] += 1
    changes.counts[Count(int(1.7e9 // 86400), EVIL, "x" * 500, "traces")] = 300
    changes.counts[Count(int(1.7e9 // 86400), EVIL, "x" * 500, "error")] = 3
    changes.malformed = [(Place("/var/log/a.jsonl", 17), "it is no JSON: <b>"), (Place("-", 2), "\x1b[31mred")]
    changes.states = {("signal", key): value for key, value in signal.changed().items()}
    with Store.open(tmp_path) as store:
        store.commit(changes)
        html = monitor_page(store, 1.71e9)
        assert html == monitor_page(store, 1.71e9)
    assert "<script" not in html and "&lt;script&gt;" in html and "\x1b" not in html and "&lt;b&gt;" in html
    assert "alarm is not over" in html or "alarms are not over" in html
    assert html.count("<svg") == 1 and "/var/log/a.jsonl:17" in html and "the call failed" in html
    assert "default-src &#39;none&#39;" in html or "default-src 'none'" in html
    assert "of 300 traces" in html and "false_alarms_per_month" in html


def test_the_page_of_a_monitor_that_has_seen_nothing_or_still_learns(tmp_path):
    with Store.open(tmp_path) as store:
        assert "Nothing has been judged yet." in monitor_page(store)
        signal = Signal(SignalSettings())
        signal.take(judgements([Outcome.REFUSES] * 3))
        states = {("signal", key): value for key, value in signal.changed().items()}
        store.commit(Changes(states=states, counts=Counter({Count(19675, "m", "a", "refuses"): 3})))
        html = monitor_page(store)
        assert "still being learnt" in html and "learning, 3 of 1000" in html and html.count("<svg") == 1


def test_the_charts_sequence_begins_anew_with_each_alert():
    days = [Day(10, 5, 10), Day(11, 9, 10), Day(13, 1, 10)]
    rows = sequence_of(days, [12.5], 0.95)
    assert rows[1] == (0.7, *confidence_sequence(14, 20)) and rows[2] == (0.1, *confidence_sequence(1, 10))
    assert date(0) == "1970-01-01" and date(10**9) == ""


def test_words():
    assert (percent(0.012), percent(0.5), percent(0.99), percent(1.0)) == ("1.2 %", "50 %", "99.0 %", "100 %")
    assert short("a\n\x1b[1mb" + "c" * 100).startswith("a [1mb") and len(short("c" * 100)) == 80
    assert stamp(0.0) == stamp(1e300) == "1970-01-01T00:00:00Z"
