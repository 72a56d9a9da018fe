"""Files that the monitor reads on, however they are rotated; pipes; and lines that are long, broken or not complete."""

import bz2
import gzip
import lzma
import os
import pathlib
import shutil
import threading
import time

import pytest

from refusal_jax.errors import UserError
from refusal_jax.monitor.lines import Pipe, Splitter
from refusal_jax.monitor.log_files import LogFiles

LONGEST = 1000


class Reader:
    """Reads a path as the monitor does, by what it kept of the last time."""

    def __init__(self, path: pathlib.Path, began: float = 0.0):
        self.path, self.began, self.cursors = path, began, {}

    def read(self, files: LogFiles | None = None) -> list[str]:
        """Returns what is new; with `files`, read on by these."""
        source = files or LogFiles(self.path, list(self.cursors.values()), self.began, LONGEST, False)
        found = []
        while lines := source.take(3, 1 << 20):
            self.cursors |= {cursor.id: cursor for cursor in source.changed()}
            found += ["-" if line.data is None else line.data.decode() for line in lines]
        self.waiting = source.waiting()
        if files is None:
            assert source.ended
            source.close()
        return found


@pytest.fixture
def log(tmp_path) -> pathlib.Path:
    path = tmp_path / "logs/log.jsonl"
    path.parent.mkdir()
    write(path, range(5))
    return path


def write(path: pathlib.Path, numbers, end: str = "\n", mode: str = "a"):
    with open(path, mode) as file:
        file.write("\n".join(line(number) for number in numbers) + end)


def line(number: int) -> str:
    return f'{{"the beginning of all lines is the same": {{}}, "n": {number}}}'


def numbers(lines: list[str]) -> list[int]:
    return [int(text.split(": ")[-1].rstrip("}")) for text in lines]


@pytest.mark.parametrize("whole", [True, False], ids=["folder", "file"])
@pytest.mark.parametrize("how", ["rename", "copytruncate", "gzip", "bzip2", "xz", "copy and gzip", "same size"])
def test_rotation(log, how, whole):
    """A rotated file is read on where it was left, and nothing of it twice; the new one from its beginning."""
    reader = Reader(log.parent if whole else log)
    assert numbers(reader.read()) == [0, 1, 2, 3, 4]
    write(log, range(5, 8))
    old = log.with_name("log.jsonl.1")
    if how in ("copytruncate", "copy and gzip", "same size"):
        shutil.copyfile(log, old)
        os.truncate(log, 0)
    else:
        log.rename(old)
    packers = {"gzip": gzip.open, "copy and gzip": gzip.open, "bzip2": bz2.open, "xz": lzma.open}
    if how in packers:
        with packers[how](f"{old}.packed", "wb") as packed:
            packed.write(old.read_bytes())
        old.unlink()
    write(log, range(10, 18 if how == "same size" else 12))
    assert sorted(numbers(reader.read())) == [5, 6, 7, *range(10, 18 if how == "same size" else 12)]
    assert reader.read() == []
    write(log, [20])
    assert numbers(reader.read()) == [20]


def test_several_rotations_while_the_monitor_is_down(log):
    reader = Reader(log, time.time() - 10)
    old = log.with_name("log-20260101.jsonl")
    write(old, range(90, 95))
    os.utime(old, (1, 1))  # rotated before the monitor was first started
    assert numbers(reader.read()) == [0, 1, 2, 3, 4]
    for number in (1, 2, 3):
        for index in (2, 1):
            if (path := log.with_name(f"log.jsonl.{index}")).exists():
                path.rename(log.with_name(f"log.jsonl.{index + 1}"))
        write(log, [10 * number])
        log.rename(log.with_name("log.jsonl.1"))
        write(log, [10 * number + 1])
    assert sorted(numbers(reader.read())) == [10, 11, 20, 21, 30, 31]
    assert reader.read() == []


def test_rotation_under_an_open_file(log):
    """A line that was written to a file just before it was deleted is read from the open one."""
    reader = Reader(log)
    files = LogFiles(log, [], 0.0, LONGEST, True, 0.01)
    assert numbers(reader.read(files)) == [0, 1, 2, 3, 4]
    write(log, [5])
    log.unlink()
    write(log, [6])
    assert sorted(numbers(reader.read(files))) == [5, 6]
    shutil.copyfile(log, log.with_name("log.jsonl.1"))
    os.truncate(log, 0)
    write(log, range(7, 30))  # more than there was
    assert numbers(reader.read(files)) == list(range(7, 30))
    files.close()


def test_half_written_lines_wait(log):
    reader = Reader(log)
    write(log, [5], "\n" + line(6)[:20])
    assert numbers(reader.read()) == [0, 1, 2, 3, 4, 5]
    assert [(place.file, place.line) for place in reader.waiting] == [(str(log), 7)]
    assert reader.read() == []
    with open(log, "a") as file:
        file.write(line(6)[20:])  # whole, though its end is still to come
    assert numbers(reader.read()) == [6]
    with open(log, "a") as file:
        file.write("\n")
    write(log, [7])
    assert numbers(reader.read()) == [7]
    assert max(cursor.line for cursor in reader.cursors.values()) == 8


def test_long_lines_are_dropped(log):
    reader = Reader(log)
    with open(log, "a") as file:
        file.write("x" * 300_000 + "\n")
    write(log, [6])
    found = reader.read()
    assert found[5] == "-" and numbers(found[6:]) == [6]
    assert reader.read() == []
    splitter = Splitter("pipe", 0, LONGEST)
    for _ in range(100):
        assert splitter.feed(b"x" * 5000) == [] and len(splitter.rest) <= LONGEST
    (dropped,) = splitter.feed(b"\n")
    assert dropped.data is None and dropped.place == ("pipe", 1)


def test_a_copy_is_not_read_twice(log):
    reader = Reader(log.parent)
    assert len(reader.read()) == 5
    shutil.copyfile(log, log.with_name("copy.jsonl"))
    assert reader.read() == []
    write(log.with_name("new.jsonl"), range(6, 8))
    assert numbers(reader.read()) == [6, 7]


def test_compressed_files_that_are_not_complete(log, caplog):
    whole = gzip.compress("\n".join(line(number) for number in range(10_000, 20_000)).encode())
    reader, packed = Reader(log), log.with_name("log.jsonl.9.gz")
    packed.write_bytes(whole[: len(whole) // 2])
    some = numbers(reader.read())
    assert not caplog.records  # it may still be written
    os.utime(packed, (time.time() - 1000,) * 2)
    Reader(log).read()
    assert "log.jsonl.9.gz cannot be read on: Compressed file ended" in caplog.text
    packed.write_bytes(whole)
    assert sorted(some + numbers(reader.read())) == [*range(5), *range(10_000, 20_000)]
    log.with_name("log.zst").write_bytes(b"\x28\xb5\x2f\xfd0123")
    Reader(log.parent).read()
    assert "compressed with Zstandard" in caplog.text


def test_unreadable_files(log):
    with pytest.raises(UserError, match="does not exist. Name a file of traces, a folder of them, or -"):
        LogFiles(log.with_name("missing"), [], 0.0, LONGEST, False)
    files = LogFiles(log.with_name("later.jsonl"), [], 0.0, LONGEST, True, 0.01)  # may come yet
    assert files.take(10, 100) == []
    write(log.with_name("later.jsonl"), [1])
    assert len(files.take(10, 100)) == 1
    files.close()


def test_gone_files_are_forgotten(log):
    reader = Reader(log.parent)
    reader.read()
    files = LogFiles(log.parent, list(reader.cursors.values()), 0.0, LONGEST, True, 0.01)
    files.take(10, 100)
    assert files.gone(time.time() + 10) == []
    log.unlink()
    files.take(10, 100)
    assert files.gone(time.time() - 10) == [] and files.gone(time.time() + 10) == list(reader.cursors)


def test_pipe():
    read, write_end = os.pipe()
    pipe = Pipe(read, "stdin", LONGEST, 0.01)
    assert pipe.take(10, 1000) == [] and not pipe.ended
    os.write(write_end, b"a\n\nb\nhal")
    assert [text.data for text in pipe.take(10, 1000)] == [b"a", b"b"]
    assert pipe.waiting() == [("stdin", 4)]
    threading.Timer(0.05, lambda: (os.write(write_end, b"f"), os.close(write_end))).start()
    found = []
    while not pipe.ended:
        found += pipe.take(10, 1000)
    assert [(text.data, text.place.line) for text in found] == [(b"half", 4)]
    os.close(read)
