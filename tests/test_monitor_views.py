"""The actions that show and change what a monitor knows, as commands, on a log with a drift."""

import json
import random

from commands import forked, refused

from refusal_jax.monitor import example
from refusal_jax.monitor.store import Store

REFUSED, ANSWERED = (
    "I cannot help with that request.",
    "Here is a way to bake the bread: prepare the bread, then bake it.",
)


def line(number, rate, category, model="m"):
    reply = REFUSED if random.Random(number).random() < rate else ANSWERED
    return example._line(str(number), 1.794e9 + 600 * number, category, "How do I bake the bread?", reply).replace(
        "embedded", model
    )


def monitor(*args) -> str:
    """Runs the command and returns what it prints."""
    done = forked("monitor", *args)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_log_with_a_drift_becomes_alerts_a_page_and_metrics(tmp_path):
    (tmp_path / "server.jsonl").write_text(
        "".join(line(n, 0.9 if n < 100 else 0.3, "harmful") for n in range(180)) + "no JSON\n"
    )
    rates = {"harmful": {"refuses": {"count": 180, "n": 200}}}
    (tmp_path / "rates.json").write_text(json.dumps(rates))
    state = f"--state={tmp_path}/watched"
    flags = [state, "--once", "--category_field=request.metadata.category"]
    asked = [f"--signal.references={tmp_path}/rates.json", f"--metrics_file={tmp_path}/m.prom", "--metrics_port=0"]
    monitor(tmp_path / "server.jsonl", *flags, *asked)
    (alert,) = map(json.loads, (tmp_path / "watched/alerts.jsonl").read_text().splitlines())
    assert alert["change"] == "refuses_less" and alert["reference"]["origin"] == "stated in rates.json"
    metrics = (tmp_path / "m.prom").read_text()
    assert 'alarmed{category="harmful",change="refuses_less",model="m"} 1.0' in metrics
    monitor("page", state, f"--out={tmp_path}/of/page.html")
    html = (tmp_path / "of/page.html").read_text()
    assert alert["id"] in html and "server.jsonl:181" in html and "One alarm is not over." in html
    assert "1 malformed" in monitor("status", state)
    refused(forked("monitor", "relearn", state, "--model=mm"), "Did you mean m\\?")
    monitor("relearn", state, "--model=m")
    with Store.view(tmp_path / "watched") as store:
        learnt = store.state("signal")[json.dumps(["stream", "m", "harmful"])]
    assert learnt["reference"] is None and learnt["seen"] == 0


def test_simulate_prints_the_table():
    assert "| monitor |" in monitor("simulate", "--runs=10", "--a_day=10", "--signal.learn=100")


def test_the_example_has_a_fault_in_its_last_days(tmp_path, monkeypatch):
    """With given replies; the commands of docs/monitor.md ask the embedded model."""
    replies = {category: [("How?", REFUSED, ANSWERED)] for category in example.CATEGORIES}
    monkeypatch.setattr(example, "_replies", lambda: replies)
    path = tmp_path / "server.jsonl"
    assert example.write_example(path) == 30 * 2 * 200
    rows = [json.loads(text) for text in path.read_text().splitlines()]
    assert len(rows) == len({row["response"]["id"] for row in rows}) == 30 * 2 * 200
    edited = [row["response"]["choices"][0]["message"]["content"] == ANSWERED for row in rows]
    assert sum(edited[: 20 * 400]) == 0 and abs(sum(edited[20 * 400 :]) - 4000 / 3) < 120
    refused(forked("monitor", "example"), "The file to write is missing")
