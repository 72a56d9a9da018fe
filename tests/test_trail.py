"""The audit trail: whatever is done to its files is found, and whatever a crash leaves is not taken for tampering."""

import errno
import json
import logging
import os
import pathlib
import re
import resource
import shutil
import stat
import subprocess
import sys
import threading
import time

import pytest
from commands import SECONDS, forked_code

from refusal_jax.errors import UserError
from refusal_jax.judges.judge import Outcome, Verdict
from refusal_jax.judges.text import SubstringJudge
from refusal_jax.monitor.parts import Letter, Message
from refusal_jax.monitor.traces import Judged, Judgements, Place, Trace, Unjudged
from refusal_jax.monitor.trail import writer
from refusal_jax.monitor.trail.part import TrailCarrier, TrailPart, record_run
from refusal_jax.monitor.trail.records import line_of, utc
from refusal_jax.monitor.trail.settings import TextKey, TrailSettings
from refusal_jax.monitor.trail.texts import Search
from refusal_jax.monitor.trail.verify import text_of, verify_trail
from refusal_jax.monitor.trail.writer import Trail

JUDGE = SubstringJudge("substring_matching", ("I cannot",), False)
SECRET = "0123456789abcdef0123456789abcdef"
ODD = "Ünïcode \u2028 \ud800 \x00 \r\n 😀"


def records_of(folder: pathlib.Path) -> list[dict]:
    return [json.loads(line) for path in sorted(folder.glob("*.jsonl")) for line in path.read_text().splitlines()]


def replies(start: int, stop: int) -> list[dict]:
    return [{"kind": "reply", "id": f"t{n}", "prompt": {"sha256": "0" * 64}, "n": n} for n in range(start, stop)]


def settings_of(folder, keys=None, **more) -> TrailSettings:
    return TrailSettings.of({"folder": str(folder), "key": str(keys["ed25519.pem"]) if keys else "", **more})


@pytest.fixture(scope="module")
def made(tmp_path_factory, keys) -> pathlib.Path:
    """A signed trail of three files, which ends with three records after its last head."""
    folder = tmp_path_factory.mktemp("made") / "trail"
    trail = Trail.open(settings_of(folder, keys, file_mb=0.002))
    for start in range(0, 24, 3):
        trail.append(replies(start, start + 3))
    trail.close()
    trail = Trail.open(settings_of(folder, keys, file_mb=1.0))
    trail.append(replies(24, 27))
    last = folder / "trail-000003.head.json"
    kept = last.read_bytes()
    trail.close()
    last.write_bytes(kept)
    return folder


@pytest.fixture
def trail(made, tmp_path) -> pathlib.Path:
    """A copy of the trail to be changed."""
    return shutil.copytree(made, tmp_path / "trail")


def lines(path: pathlib.Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True)


def rewrite(path: pathlib.Path, change) -> None:
    """Changes the list of a file's lines."""
    there = lines(path)
    changed = change(there)
    path.write_bytes(b"".join(there if changed is None else changed))


def test_a_whole_trail(made, keys):
    found = verify_trail(made, [keys["ed25519.pub"]])
    assert found.findings == [] and found.exit_code == 0 and found.anchor.head.seq == 27
    records = records_of(made)
    assert [record["seq"] for record in records] == list(range(1, 31))
    assert [record["n"] for record in records if record["kind"] == "reply"] == list(range(27))
    text = text_of(found)
    assert "The trail is whole." in text and "The last 3 records, from 28 on, follow it" in text
    assert "put back an older state of the whole folder" in text
    for path in made.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    assert max(path.stat().st_size for path in made.glob("*.head.json")) < 1000


def test_without_a_key_nothing_is_proven(made, keys):
    found = verify_trail(made)
    assert found.exit_code == 30 and "nothing proves it either" in text_of(found)
    assert verify_trail(made, [keys["ecdsa.pub"]]).exit_code == 40
    assert verify_trail(made, [keys["ecdsa.pub"], keys["ed25519.pub"]]).exit_code == 0  # keys of two years


FIRST, SECOND, THIRD = (f"trail-{n:06d}.jsonl" for n in (1, 2, 3))


def edit(line: int, old: bytes, new: bytes):
    def change(there):
        assert old in there[line - 1]
        there[line - 1] = there[line - 1].replace(old, new)

    return change


def relinked(there: list[bytes], start: int) -> list[bytes]:
    """The lines with every hash made to fit again from an index on, as somebody does who knows the format."""
    from refusal_jax.monitor.trail.records import hash_of

    out = there[:start]
    for line in there[start:]:
        record = json.loads(line)
        record["previous"] = hash_of(out[-1].removesuffix(b"\n"))
        record["seq"] = json.loads(out[-1])["seq"] + 1
        out.append(line_of(record) + b"\n")
    return out


CHANGES = {
    "a changed record": (SECOND, edit(3, b'"n":', b'"n":1'), rf"{SECOND}:3 was changed: record \d+ is not the one"),
    "a changed link": (SECOND, edit(3, b'"previous":"', b'"previous":"f'), rf"{SECOND}:2 was changed"),
    "a changed first line": (SECOND, edit(1, b"2026", b"2025"), rf"{SECOND}:1 was changed"),
    "the last line of a file": (
        FIRST,
        lambda there: edit(len(there), b'"n":', b'"n":1')(there),
        rf"{FIRST}:\d+ was changed",
    ),
    "a removed record": (
        SECOND,
        lambda there: [*there[:3], *there[4:]],
        rf"{SECOND}:4 is record \d+: record \d+ is missing before it",
    ),
    "removed records": (
        SECOND,
        lambda there: [*there[:2], *there[4:]],
        rf"{SECOND}:3 is record \d+: records \d+ to \d+ are",
    ),
    "a record twice": (SECOND, lambda there: there.insert(3, there[2]), f"{SECOND}:3 does not belong here: line 3 was"),
    "a record of another place": (SECOND, lambda there: there.insert(3, there[5]), rf"{SECOND}:4 "),
    "two records swapped": (SECOND, lambda there: [*there[:2], there[3], there[2], *there[4:]], rf"{SECOND}:3 "),
    "a record made up": (
        SECOND,
        lambda there: there.insert(3, relinked(there[:4], 3)[3].replace(b'"n":', b'"n":1')),
        rf"{SECOND}:4 does not belong here: line 4 was inserted",
    ),
    "an empty line": (SECOND, lambda there: there.insert(3, b"\n"), rf"{SECOND}:4 is no record: the line is empty"),
    "line ends": (
        SECOND,
        lambda there: [line[:-1] + b"\r\n" for line in there],
        f"{SECOND}:1 has another end of line",
    ),
    "a byte order mark": (SECOND, lambda there: [b"\xef\xbb\xbf" + there[0], *there[1:]], "byte order mark"),
    "zeros": (
        SECOND,
        lambda there: [*there[:3], b"\0" * 50 + b"\n", *there[4:]],
        f"{SECOND}:4 is no record: it holds zeros",
    ),
    "bytes that are no text": (SECOND, lambda there: [*there[:3], b"\xff\n", *there[4:]], f"{SECOND}:4 is no record"),
    "a list": (SECOND, lambda there: [*there[:3], b"[1]\n", *there[4:]], f"{SECOND}:4 is no record"),
    "numbers of another kind": (SECOND, edit(3, b'"seq":', b'"seq":1.0,"x":'), f"{SECOND}:3 is no record"),
    "all hashes made anew": (
        SECOND,
        lambda there: relinked([*there[:2], there[2].replace(b'"n":', b'"n":1'), *there[3:]], 3),
        f"{SECOND}:\\d+ is not the record that the head .*trail-000002.head.json is of",
    ),
    "the end of a file": (SECOND, lambda there: there[:-1], rf"{THIRD}:1 is record \d+: record \d+ is missing"),
    "half a line at the end of a file": (
        SECOND,
        lambda there: [*there[:-1], there[-1][:20]],
        "ends in the middle",
    ),
    "the tail": (THIRD, lambda there: there[:2], r"is the end, record \d+, but .*head.json says that there were 27 at"),
    "half of the last signed record": (THIRD, lambda there: [*there[:-4], there[-4][:9]], r"says that there were 27"),
    "an empty last file": (THIRD, lambda there: [], r"says that there were 27"),
    "an empty file": (SECOND, lambda there: [], f"{SECOND} is empty, and later files follow"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_each_change_is_found(name, trail, keys):
    file, change, expected = CHANGES[name]
    rewrite(trail / file, change)
    found = verify_trail(trail, [keys["ed25519.pub"]])
    assert found.exit_code == 40
    assert any(re.search(expected, str(one)) for one in found.findings), found.findings
    assert len(found.findings) <= 4, found.findings  # one change is not told as many
    assert "not as it was written" in text_of(found)


def test_every_byte_counts(trail, keys):
    """A flipped bit anywhere in what a head holds is found, in the right file."""
    public, path = [keys["ed25519.pub"]], trail / SECOND
    whole = path.read_bytes()
    for at in range(0, len(whole), 37):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        found = verify_trail(trail, public)
        line = whole[:at].count(b"\n") + 1
        assert found.exit_code == 40, at
        assert any(abs(one.line - line) <= 1 and one.file == path for one in found.findings), (at, line, found.findings)


def test_files_are_swapped_or_missing(trail, keys, tmp_path):
    public = [keys["ed25519.pub"]]
    (trail / FIRST).rename(tmp_path / FIRST)
    (found,) = verify_trail(trail, public).findings
    assert "begins with record" in str(found) and "says that those before it were removed" in str(found)
    (trail / SECOND).rename(trail / FIRST)
    assert any(
        "is the beginning of file 2: another file was put in" in str(one)
        for one in verify_trail(trail, public).findings
    )
    shutil.copy(tmp_path / FIRST, trail / FIRST)
    assert any(
        str(one).endswith(f"{SECOND} is missing, and later files are there")
        for one in verify_trail(trail, public).findings
    )


def test_files_of_another_trail(trail, keys, tmp_path):
    other = tmp_path / "other"
    with Trail.open(settings_of(other, keys, file_mb=0.002)) as writes:
        writes.append(replies(0, 27))
        writes.append(replies(27, 40))
    shutil.copy(other / SECOND, trail / SECOND)
    found = [str(one) for one in verify_trail(trail, [keys["ed25519.pub"]]).findings]
    assert any("belongs to another trail" in one for one in found)
    shutil.copy(other / "trail-000001.head.json", tmp_path / "kept.json")
    found = verify_trail(other, [], [tmp_path / "kept.json"])
    assert found.exit_code == 0 and found.anchor.elsewhere
    assert "is a head of another trail" in str(verify_trail(trail, [], [tmp_path / "kept.json"]).findings)


def test_damaged_heads(trail, keys):
    public, head = [keys["ed25519.pub"]], trail / "trail-000002.head.json"
    whole = head.read_bytes()

    def found() -> str:
        (one,) = verify_trail(trail, public).findings
        assert one.file == head
        return str(one)

    document = {
        "_type": "urn:refusal-jax:trail-head:v1",
        "trail": "x",
        "file": 2,
        "seq": 1,
        "hash": "0" * 64,
        "time": "",
    }
    head.unlink()
    assert "is missing: trail-000002.jsonl has no head" in found()
    for content, expected in (
        (whole[: len(whole) // 2], "is damaged: is not valid JSON"),
        (whole.replace(b'"sig": "', b'"sig": "00'), "was not signed with the private key of .*, or it was changed"),
        (b"{}", "is no head of a trail"),
        (json.dumps(document).encode(), "is not signed"),
        (json.dumps(document | {"hash": "x"}).encode(), "it lacks the trail's name, a number, a hash"),
    ):
        head.write_bytes(content)
        assert re.search(expected, found())


def test_a_tail_after_the_last_head(trail, keys, tmp_path):
    """Nothing in the folder can show that it was cut; a head that is kept elsewhere does."""
    public, elsewhere = [keys["ed25519.pub"]], tmp_path / "elsewhere"
    with Trail.open(settings_of(trail, keys, heads_to=str(elsewhere))) as writes:
        writes.append(replies(27, 28))
    old = shutil.copytree(trail, tmp_path / "old")
    with Trail.open(settings_of(trail, keys, heads_to=str(elsewhere))) as writes:
        writes.append(replies(28, 30))
    assert verify_trail(trail, public, [elsewhere]).exit_code == 0
    assert verify_trail(old, public).exit_code == 0  # an older state of the whole folder
    found = verify_trail(old, public, [elsewhere / "trail-000003.head.json"])
    assert "2 records were cut off" in str(found.findings)
    assert verify_trail(old, [], [elsewhere]).exit_code == 40
    with pytest.raises(UserError, match="holds no heads: expected files such as"):
        verify_trail(old, public, [tmp_path])
    with pytest.raises(UserError, match="gone.json does not exist"):
        verify_trail(old, public, [tmp_path / "gone.json"])


def test_no_trail(tmp_path):
    with pytest.raises(UserError, match="holds no trail: expected a folder with trail-000001.jsonl or later ones"):
        verify_trail(tmp_path)


def test_what_a_crash_leaves_is_no_finding(trail, keys, caplog):
    public = [keys["ed25519.pub"]]
    rewrite(trail / THIRD, lambda there: [*there, there[-1][:17]])
    found = verify_trail(trail, public)
    assert found.exit_code == 0 and f"{THIRD}:{len(lines(trail / THIRD))} is not finished" in text_of(found)
    with caplog.at_level(logging.WARNING, "refusal_jax"):
        Trail.open(settings_of(trail, keys)).close()
    assert "a crash left 17 bytes of a record that was not finished" in caplog.text
    (trail / "trail-000004.jsonl").write_bytes(b'{"kind":"fi')  # a file was begun, and its first line not finished
    assert verify_trail(trail, public).exit_code == 0
    (trail / "trail-000004.jsonl").write_bytes(b"")
    assert verify_trail(trail, public).exit_code == 0
    with Trail.open(settings_of(trail, keys)) as writes:
        writes.append(replies(27, 29))
    found = verify_trail(trail, public)
    assert found.exit_code == 0 and found.chain.records == 32 and found.chain.torn is None
    assert not (trail / "trail-000004.jsonl").exists()


@pytest.mark.parametrize(
    ("file", "change", "expected"),
    [
        (THIRD, edit(3, b'"n":', b'"n":1'), "000003.jsonl:4 is not the record that follows the one before it"),
        (THIRD, lambda there: there[:3], "ends with record 23, but its head is of record 27"),
        (
            THIRD,
            lambda there: relinked([*there[:2], there[2].replace(b"n", b"m"), *there[3:]], 3),
            "that the file's head is of",
        ),
        (THIRD, lambda there: [b"{}\n"], "does not begin with a record of the kind 'file'"),
        (THIRD, lambda there: [b"[]\n"], "its first line is no record"),
        (
            THIRD,
            lambda there: [there[0].replace(b'"file":3', b'"file":"3"')],
            "its first record lacks the trail's name",
        ),
        ("trail-000003.head.json", lambda there: [b"{}"], "cannot be continued: .*Error"),
        ("trail-000003.head.json", lambda there: [b"{"], "cannot be continued: .* is not valid JSON"),
    ],
)
def test_a_changed_trail_is_not_continued(trail, keys, file, change, expected):
    rewrite(trail / file, change)
    before = {path.name: path.read_bytes() for path in trail.iterdir()}
    with pytest.raises(
        UserError, match=f"cannot be continued: (.|\n)*{expected.removeprefix('cannot be continued: ')}"
    ):
        Trail.open(settings_of(trail, keys))
    assert {path.name: path.read_bytes() for path in trail.iterdir()} == before  # evidence stays as it is


def test_another_program_changes_the_file(trail, keys):
    """As log rotation does, which moves a file away, or copies and truncates it."""
    for act in (
        lambda path: path.rename(path.with_suffix(".1")),
        lambda path: os.truncate(path, 10),
        lambda path: rewrite(path, lambda there: [*there, b"x"]),
    ):
        writes = Trail.open(settings_of(trail, keys))
        kept = (trail / THIRD).read_bytes()
        act(trail / THIRD)
        with pytest.raises(UserError, match="removed, replaced or changed by another program"):
            writes.append(replies(0, 1))
        writes.close()
        (trail / THIRD).write_bytes(kept)


def test_one_writer_at_a_time(trail, keys):
    with Trail.open(settings_of(trail, keys)), pytest.raises(UserError, match="is in use: another process appends"):
        record_run(settings_of(trail, keys), {})


def test_full_disk(tmp_path, keys):
    """The operating system refuses to let the file grow, in the middle of a record."""
    folder = tmp_path / "trail"
    writes = Trail.open(settings_of(folder, keys))
    writes.append(replies(0, 3))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((folder / FIRST).stat().st_size + 500, hard))
    try:
        with pytest.raises(UserError, match="trail-000001.jsonl could not be written: File too large"):
            writes.append(replies(3, 9))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    writes.close()
    found = verify_trail(folder, [keys["ed25519.pub"]])
    assert found.exit_code == 0 and found.chain.records == 4 and found.chain.torn is None
    with Trail.open(settings_of(folder, keys)) as again:
        again.append(replies(3, 9))
    assert [one.get("n") for one in records_of(folder)] == [None, *range(9)]


@pytest.mark.parametrize("call", ["fsync", "write", "open"])
def test_a_failing_disk(tmp_path, keys, monkeypatch, call):
    writes = Trail.open(settings_of(tmp_path, keys))

    def fails(*_):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch, pytest.raises(UserError, match="could not be written: Input/output error"):
        patch.setattr(writer.os, call, fails)
        writes.append(replies(0, 3)) if call != "open" else Trail.open(settings_of(tmp_path / "b"))
    writes.close()
    assert verify_trail(tmp_path, [keys["ed25519.pub"]]).exit_code == 0


class Clock:
    """The module `time` at a moment that the test chooses."""

    def __init__(self, now: float):
        self.now = now
        self.strftime, self.monotonic = time.strftime, lambda: self.now
        self.time = lambda: self.now
        self.gmtime = lambda: time.gmtime(self.now)


def test_days_and_retention(tmp_path, keys, monkeypatch):
    clock = Clock(1.7e9)
    monkeypatch.setattr(writer, "time", clock)
    chosen = settings_of(tmp_path, keys, keep_days=3, heads_to=str(tmp_path / "away"))
    public = [keys["ed25519.pub"]]
    for day in range(7):
        clock.now = 1.7e9 + day * 86_400
        with Trail.open(chosen) as writes:
            writes.append(replies(day * 3, day * 3 + 3))
    clock.now -= 3 * 86_400  # a clock that is put back changes nothing
    with Trail.open(chosen) as writes:
        writes.append(replies(21, 23))
    assert [path.name for path in sorted(tmp_path.glob("*.jsonl"))] == [f"trail-{n:06d}.jsonl" for n in (3, 4, 5, 6, 7)]
    found = verify_trail(tmp_path, public, [tmp_path / "away"])
    assert found.exit_code == 0 and found.chain.first == 9
    assert "Records 1 to 8 are no longer there: record" in text_of(found)
    removed = [record for record in records_of(tmp_path) if record["kind"] == "removed"]
    assert [one["files"][0]["file"] for one in removed] == [FIRST, SECOND]
    (tmp_path / THIRD).unlink()  # which nobody has said
    assert "begins with record 13" in str(verify_trail(tmp_path, public).findings)


def test_a_made_up_removal(trail, keys):
    """Somebody removes a file, and appends a record that says that retention did."""
    rest = records_of(trail)
    through = next(record for record in rest if record["kind"] == "file" and record["file"] == 2)
    (trail / FIRST).unlink()
    files = [{"file": FIRST, "through": through["seq"] - 1, "hash": through["previous"]}]
    removal = line_of({"kind": "removed", "time": "", "files": files, "seq": 0, "previous": ""}) + b"\n"
    rewrite(trail / THIRD, lambda there: relinked([*there, removal], len(there)))
    assert verify_trail(trail).exit_code == 30  # without a head that can be believed it may be true
    found = verify_trail(trail, [keys["ed25519.pub"]])
    assert found.exit_code == 40 and f"{SECOND}:1 begins with record" in str(found.findings[0])


def test_verify_while_it_is_written(tmp_path, keys):
    """Rotation, heads and removals that happen meanwhile look like no fault."""
    chosen = settings_of(tmp_path / "trail", keys, file_mb=0.004, head_records=5, keep_days=0, fsync="heads")
    stop, writes = threading.Event(), Trail.open(chosen)

    def write():
        n = 0
        while not stop.is_set():
            writes.append(replies(n, n + 4))
            n += 4

    thread = threading.Thread(target=write)
    thread.start()
    try:
        for _ in range(25):
            found = verify_trail(tmp_path / "trail", [keys["ed25519.pub"]])
            assert found.findings == []
    finally:
        stop.set()
        thread.join()
        writes.close()


def test_files_that_disappear(trail, monkeypatch):
    monkeypatch.setattr(type(trail), "iterdir", lambda self: iter([self / FIRST, self / "trail-000009.jsonl"]))
    with pytest.raises(UserError, match="disappear while they are read. Verify a copy of it"):
        verify_trail(trail, search=Search("x"))


def batch(text: str = "ask") -> Judgements:
    trace = Trace("a\n", 1.7e9, "m", "c", "system", text, "No. I won't.", "stop", Place("/logs/day.jsonl", 7))
    other = Trace("b", float("inf"), "m", "c", None, ODD, None, None, Place("stdin", 8), Unjudged.ERROR)
    return Judgements((Judged(trace, Verdict(0, 0.25), Outcome.REFUSES),), (other,))


def made_by_part(settings: TrailSettings) -> list[Message]:
    part = TrailPart(settings, JUDGE)
    part.restore({})
    sent = part.take(batch(), [Message("alerts", {"title": "less"}), Message("page", {})])
    assert part.changed()["writer"]["id"] == sent[0].content["writer"] and part.changed() == {}
    return list(sent)


def test_records_of_a_batch(tmp_path):
    chosen = settings_of(tmp_path)
    sent = made_by_part(chosen)
    letters = [Letter(number, json.loads(json.dumps(one.content))) for number, one in enumerate(sent, 5)]
    carrier = TrailCarrier(chosen)
    assert carrier.deliver(letters[:2]) == 2
    assert carrier.deliver(letters) == 3  # two of which it has
    carrier.close()
    carrier = TrailCarrier(chosen)
    assert carrier.deliver(letters) == 3
    other = [Letter(number, content | {"writer": "another state"}) for number, content in letters]
    assert carrier.deliver(other) == 3  # letters of a new state begin anew
    carrier.close()
    first, second, alert = records_of(tmp_path)[1:4]
    assert len(records_of(tmp_path)) == 7
    assert (first["outcome"], first["label"], first["probability"]) == ("refuses", 0, "0.250000")
    assert first["judge"]["name"] == "substring_matching" and first["source"] == {"file": "day.jsonl", "line": 7}
    assert first["time"] == "2023-11-14T22:13:20.000000Z" and len(first["prompt"]["sha256"]) == 64
    assert (second["fault"], second["outcome"], second["time"], second["reply"]) == ("error", None, None, None)
    assert alert["kind"] == "alert" and alert["alert"] == {"title": "less"}
    assert b"won't" not in b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert verify_trail(tmp_path).findings == []


@pytest.mark.parametrize("texts", ["omit", "hmac", "keep"])
def test_a_text_is_proved_to_be_a_records(texts, tmp_path, monkeypatch):
    monkeypatch.setenv("TRAIL_KEY", SECRET)
    chosen = settings_of(tmp_path, texts=texts, text_key_env="TRAIL_KEY")
    carrier = TrailCarrier(chosen)
    carrier.deliver([Letter(n, one.content) for n, one in enumerate(made_by_part(chosen), 1)])
    carrier.close()
    stored = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert SECRET.encode() not in stored and (b"won't" in stored) == (texts == "keep")
    key = TextKey.read("TRAIL_KEY", "")
    for text, expected in (
        ("No. I won't.\n", (2, "reply")),
        ("ask", (2, "prompt")),
        (ODD, (3, "prompt")),
        ("system", (2, "system")),
    ):
        search = Search(text, key)
        verify_trail(tmp_path, search=search)
        assert [(one.seq, one.part) for one in search.matches] == [expected] and not search.keyed
    assert not Search("as", key).matches
    search = Search("ask", TextKey.of(b"another key of some length", "x"))
    verify_trail(tmp_path, search=search)
    assert (len(search.matches), search.keyed, search.other_keys) == (
        (0, 4, {key.id}) if texts == "hmac" else (1, 0, set())
    )


def test_keys_of_texts(tmp_path, monkeypatch):
    (tmp_path / "key").write_text(SECRET + "\n")
    monkeypatch.setenv("TRAIL_KEY", SECRET)
    assert TextKey.read("TRAIL_KEY", "") == TextKey.read("", str(tmp_path / "key"))
    monkeypatch.setenv("TRAIL_KEY", "short")
    with pytest.raises(UserError, match="The variable TRAIL_KEY holds a key of 5 bytes, expected at least 16"):
        TextKey.read("TRAIL_KEY", "")
    with pytest.raises(UserError, match="The environment has no variable TRAIL_KEY2"):
        TextKey.read("TRAIL_KEY2", "")
    with pytest.raises(UserError, match="secret key of the trail's texts is missing: name the environment variable"):
        TrailPart(settings_of(tmp_path, texts="hmac"), JUDGE)


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"texts": "hmack"}, "texts=hmack: expected one of omit, hmac, keep. Did you mean hmac?"),
        ({"fsync": "often"}, "fsync=often: expected one of always, heads, never"),
        ({"file_mb": 0.0}, "file_mb=0.0: expected at least 0.001"),
        ({"fsync": "never", "key": "k"}, "fsync=never: a signed head could then be on the disk before its records"),
    ],
)
def test_settings_are_checked(values, match):
    with pytest.raises(UserError, match=match):
        TrailSettings.of(values).check()


def test_a_gate_leaves_its_record(tmp_path, keys):
    chosen = settings_of(tmp_path, keys)
    assert record_run(chosen, {"policy": {"sha256": "0"}, "verdict": "pass", "rate": 0.1 + 0.2}) == 2
    assert record_run(chosen, {"verdict": "fail"}) == 3
    assert [one["kind"] for one in records_of(tmp_path)] == ["file", "gate", "gate"]
    assert verify_trail(tmp_path, [keys["ed25519.pub"]]).exit_code == 0
    with pytest.raises(UserError, match="A record has the fields seq, which the trail itself writes"):
        record_run(chosen, {"seq": 1})


def test_heads_that_cannot_be_copied(tmp_path, keys, caplog):
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING, "refusal_jax"):
        record_run(settings_of(tmp_path / "trail", keys, heads_to=str(tmp_path / "file")), {})
    assert "No copy of the trail's head could be kept in" in caplog.text


def test_times():
    assert utc(0.0) == "1970-01-01T00:00:00.000000Z"
    assert utc(float("nan")) is utc(1e300) is None


def test_kills(tmp_path, keys):
    """A monitor is killed at random moments: no record is missing, and none is there twice."""
    command = [
        sys.executable,
        pathlib.Path(__file__).with_name("trail_killed.py"),
        tmp_path,
        keys["ed25519.pem"],
        "20",
        "1",
    ]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 3
    found = verify_trail(tmp_path / "trail", [keys["ed25519.pub"]])
    assert found.findings == [] and found.exit_code == 0
    names = [record["id"] for record in records_of(tmp_path / "trail") if record["kind"] == "reply"]
    assert names == [f"t{n}" for n in range(200)]


def test_the_job(tmp_path, keys):
    """A monitor that leaves a trail, and the exit codes of its verification."""
    log = tmp_path / "server.jsonl"
    message = {"role": "assistant", "content": "I cannot do that."}
    request = {"model": "m", "messages": [{"role": "user", "content": "Bake."}]}
    reply = {"model": "m", "choices": [{"message": message, "finish_reason": "stop"}]}
    log.write_text(json.dumps({"id": "c", "created": int(time.time()), "request": request, "response": reply}) + "\n")
    (tmp_path / "text").write_text("Bake.")
    (tmp_path / "bytes").write_bytes(b"\xff")
    trail, public = f"{tmp_path}/trail", f"--key={keys['ed25519.pub']}"
    commands = [
        [
            str(log),
            f"--state={tmp_path}/state",
            "--once",
            f"--trail.folder={trail}",
            f"--trail.key={keys['ed25519.pem']}",
        ],
        ["verify", trail, public],
        ["verify", trail],
        ["verify", trail, public, f"--text={tmp_path}/text"],
        ["verify", trail, public, f"--text={log}"],
        ["verify", trail, f"--key={keys['rsa.pub']}"],
        ["verify"],
        ["verify", trail, f"--text={tmp_path}/gone"],
        ["verify", trail, f"--text={tmp_path}/bytes"],
    ]
    script = """
import json, sys
from absl import flags
from refusal_jax.jobs import main
for words in json.loads(sys.argv[1]):
    print("exit code", main.run(["monitor", *words]), flush=True)
    flags.FLAGS.unparse_flags()
    for name in flags.FLAGS:
        flags.FLAGS[name].unparse()
"""
    done = forked_code(script, json.dumps(commands))
    assert re.findall(r"exit code (\d+)", done.stdout) == ["0", "0", "30", "0", "10", "40", "2", "2", "2"], done.stderr
    assert "trail-000001.jsonl:2 holds the text as the prompt of record 2" in done.stdout
    said = " ".join(done.stderr.split())  # lines are broken where the terminal ends
    assert "The trail's folder is missing: refusal-jax monitor verify" in said
    assert "the file could not be read" in said and "is not UTF-8 text" in said
    (record,) = [one for one in records_of(tmp_path / "trail") if one["kind"] == "reply"]
    assert record["outcome"] == "refuses" and record["judge"]["name"] == "rules"
