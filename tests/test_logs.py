"""The log: what is shown on stderr, what a run keeps in its folder, and progress."""

import io
import logging
import re
import sys

import pytest

from refusal_jax import UserError, distributed, errors, logs, progress
from refusal_jax.jobs import common
from refusal_jax.jobs.main import run_job
from refusal_jax.progress import Progress, each
from refusal_jax.runs import log
from refusal_jax.runs.run import Run
from refusal_jax.runs.stage import Stage
from refusal_jax.runs.storage import DiskFolder, ObjectFolder

LOG = logging.getLogger("refusal_jax.test")
OTHER = logging.getLogger("otherlib.part")
TIME = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def watched(monkeypatch) -> Terminal:
    """Makes stderr one that somebody watches. (Not a fixture: pytest sets stderr anew between a fixture and its test.)"""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    return terminal


@pytest.fixture
def process():
    """Sets which of several processes this is."""
    yield logs.set_process
    logs.set_process(None)


def say() -> None:
    LOG.debug("small")
    LOG.info("usual")
    LOG.warning("odd")
    LOG.error("bad")
    OTHER.info("chatter")


def test_a_terminal_shows_bare_messages(monkeypatch):
    terminal = watched(monkeypatch)
    with logs.shown():
        say()
    assert terminal.getvalue().split() == ["usual", "odd", "bad"]


@pytest.mark.parametrize(("level", "lines"), [("info", 3), ("warning", 2), ("error", 1)])
def test_unwatched_output_has_times_and_levels(level, lines, capsys):
    with logs.shown(level):
        say()
    said = capsys.readouterr().err.splitlines()
    wanted = [rf"\[{TIME}\] usual", rf"\[{TIME}\] warning: odd", rf"\[{TIME}\] error: bad"]
    assert len(said) == lines and all(map(re.fullmatch, wanted[3 - lines :], said))


def test_debug_has_times_on_a_terminal_too(monkeypatch):
    terminal = watched(monkeypatch)
    with logs.shown("debug"):
        say()
    assert re.fullmatch(rf"\[{TIME}\] debug: small\n\[{TIME}\] usual\n.*odd\n.*bad\n", terminal.getvalue())


def test_processes_have_numbers_and_all_but_the_first_say_only_errors(monkeypatch, process):
    terminal = watched(monkeypatch)
    for index, level in ((0, "info"), (1, "info"), (2, "debug")):
        process(index)
        with logs.shown(level):
            say()
    lines = [re.fullmatch(rf"\[{TIME} (p\d)\] (.*)", line).groups() for line in terminal.getvalue().splitlines()]
    assert lines == [
        *[("p0", "usual"), ("p0", "warning: odd"), ("p0", "error: bad"), ("p1", "error: bad")],
        *[("p2", "debug: small"), ("p2", "usual"), ("p2", "warning: odd"), ("p2", "error: bad")],
    ]


def test_what_python_has_set_comes_back(capsys):
    root, before = logging.getLogger(), (logs.LOG.level, logs.LOG.propagate, list(logs.LOG.handlers))
    level = root.level
    with pytest.raises(RuntimeError), logs.shown("debug"):
        assert root.level == logging.DEBUG and not logs.LOG.propagate
        raise RuntimeError
    assert (logs.LOG.level, logs.LOG.propagate, list(logs.LOG.handlers)) == before and root.level == level
    LOG.info("nothing")
    assert capsys.readouterr().err == ""


def test_a_closed_stderr_ends_no_job(monkeypatch):
    gone = io.StringIO()
    gone.close()
    monkeypatch.setattr(sys, "stderr", gone)
    with pytest.raises(ValueError, match="closed"):
        gone.isatty()
    monkeypatch.setattr(logs, "on_terminal", lambda: False)
    with logs.shown():
        LOG.info("nobody hears this")


def run(folder, work, stage="a"):
    with Run.open(folder, {}, {}) as opened:
        opened.stage(Stage(stage, work, writes=["a.json"]), opened)
        return opened


def writes(opened, ledger):
    LOG.info("half done")
    opened.write_json("a.json", 1)


def test_a_run_keeps_its_log(tmp_path):
    with logs.shown("error"):
        LOG.info("said before the folder was known")
        run(tmp_path / "run", writes)
        LOG.info("after the run")
        run(tmp_path / "run", writes)
    text = (tmp_path / "run" / log.NAME).read_text()
    first, again = re.split(r"^--- .*, pid \d+: .*\n", text, flags=re.MULTILINE)[1:]
    assert [re.sub(rf"\[{TIME}\] ", "", line) for line in first.splitlines()] == [
        *["said before the folder was known", "a: starts", "half done", "a: done in 0.0 s"]
    ]
    assert [line.partition("] ")[2] for line in again.splitlines()] == ["after the run", "a: done before, skipped"]
    run(tmp_path / "other", writes)  # from Python, without a job
    assert "half done" in (tmp_path / "other" / log.NAME).read_text()


@pytest.mark.parametrize(("level", "held"), [("info", False), ("debug", True)])
def test_other_libraries_are_in_the_log_at_debug(level, held, tmp_path, capsys):
    def work(opened, ledger):
        OTHER.debug("chatter")
        OTHER.warning("a warning")
        opened.write_json("a.json", 1)

    with logs.shown(level):
        run(tmp_path, work)
    text, said = (tmp_path / log.NAME).read_text(), capsys.readouterr().err
    assert ("] otherlib.part debug: chatter\n" in text) == held and "chatter" not in said
    assert ("] otherlib.part warning: a warning\n" in said) == held


def fails(error):
    def work(opened, ledger):
        ledger.append([{"row": 1}])
        raise error

    return work


def test_how_a_run_ended_is_in_its_log(tmp_path, capsys):
    for error in (UserError("The disk is full. Free space."), ZeroDivisionError("a bug"), KeyboardInterrupt()):
        with pytest.raises(type(error)), logs.shown():
            run(tmp_path, fails(error))
    text = (tmp_path / log.NAME).read_text()
    assert "] error: The disk is full. Free space.\n" in text and "a: continues from 1 rows" in text
    assert "Traceback (most recent call last)" in text and "ZeroDivisionError: a bug" in text
    assert text.endswith("] error: The run was interrupted.\n")
    assert "The disk is full" not in capsys.readouterr().err  # which the job prints
    with logs.shown(), Run.open(tmp_path, {}, {}):
        errors.print_error("Process 1 was lost.")  # by the thread that watches the others
    assert "error: Process 1 was lost." in (tmp_path / log.NAME).read_text()
    assert capsys.readouterr().err.count("Process 1 was lost.") == 1


def test_a_run_that_is_taken_back_leaves_no_log(tmp_path):
    with pytest.raises(UserError, match="bad prompts"), Run.open(tmp_path / "run", {}, {}) as opened:
        opened.log.add("some\n")
        opened.discard()
        raise UserError("bad prompts")
    assert not (tmp_path / "run").exists()


def test_a_folder_that_is_no_runs_gets_no_log(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(UserError, match=r"holds no manifest\.json"):
        run(tmp_path, writes)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_log_that_cannot_be_written_ends_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(DiskFolder, "extend", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    assert run(tmp_path, writes).worked == ["a"] and not (tmp_path / log.NAME).exists()


def test_an_object_store_gets_the_log_after_each_stage(monkeypatch):
    objects, puts = {}, []
    monkeypatch.setattr(ObjectFolder, "exists", lambda self, name: name in objects)
    monkeypatch.setattr(ObjectFolder, "read", lambda self, name: objects[name])
    monkeypatch.setattr(
        ObjectFolder, "write", lambda self, name, data: (puts.append(name), objects.update({name: data}))
    )
    file = log.LogFile(storage := ObjectFolder("memory://bucket/run"))
    with logs.kept(file):
        LOG.info("one")
        LOG.info("two")
        assert not puts
        file.flush()
        LOG.info("three")
    assert puts == [log.NAME] * 2
    with log.kept(storage):
        LOG.info("four")
    lines = objects[log.NAME].decode().splitlines()
    assert [line.partition("] ")[2] for line in lines] == ["one", "two", "three", "", "four"]


def test_the_flag_of_all_jobs(capsys):
    assert common.parse("study", ["--workdir=x", "list"]) == ("info", ["--workdir=x", "list"])
    assert common.parse("lm_eval", ["--tasks", "x", "--log_level", "debug"]) == ("debug", ["--tasks", "x"])
    assert common.parse("study", []) == ("info", [])
    assert not [handler for handler in logging.getLogger().handlers if type(handler) is logging.StreamHandler]
    assert run_job("study", ["--log_level=loud"]) == 2
    assert "--log_level=loud is not one of debug, info, warning, error. See" in " ".join(
        capsys.readouterr().err.split()
    )


def test_progress_is_a_bar_on_a_terminal(monkeypatch):
    terminal = watched(monkeypatch)
    with Progress("reading", 4, "row") as bar:
        bar.update(3, note="loss=1")
        bar.bar.refresh()  # which tqdm does at most ten times a second
    assert bar.n == 3 and "reading:  75%" in terminal.getvalue() and "loss=1" in terminal.getvalue()
    terminal.truncate(0)
    with Progress("reading", 4, "row", quiet=True) as bar:
        bar.update(3)
    assert bar.n == 3 and not terminal.getvalue().strip("\0")


def test_other_processes_draw_no_bar(monkeypatch):
    terminal = watched(monkeypatch)
    monkeypatch.setattr(distributed, "first", lambda: False)
    assert list(each("abc", "reading", "row")) == ["a", "b", "c"] and terminal.getvalue() == ""


def test_progress_is_a_line_a_minute_elsewhere(monkeypatch, caplog):
    caplog.set_level(logging.INFO, "refusal_jax")
    clock = iter(range(0, 1000, 25))
    monkeypatch.setattr(progress, "monotonic", lambda: next(clock))
    assert list(each(iter("abcdef"), "reading", "row", 6)) == list("abcdef")
    assert caplog.messages == ["reading: 3 of 6 (50%), 0.04 row/s", "reading: 6 of 6 (100%), 0.04 row/s"]


def test_lines_of_progress():
    bytes_read = Progress("loading weights", 16_000_000_000, "B", done=4_000_000_000)
    bytes_read.update(8_000_000_000)
    assert bytes_read.line(10.0) == "loading weights: 12.0GB of 16.0GB (75%), 800MB/s"
    endless = Progress("training", None, "step")
    endless.update(30, note="loss=0.5")
    assert endless.line(10.0) == "training: 30, 3 step/s, loss=0.5"
