"""Verifies a trail: that no record was changed, removed, inserted or moved, as far as that can be told, and says how far."""

import dataclasses
import pathlib
from collections.abc import Sequence

from refusal_jax.errors import UserError, setting
from refusal_jax.monitor.trail import files
from refusal_jax.monitor.trail.chain import Chain, Finding, Known, Place
from refusal_jax.monitor.trail.files import file_name, head_name, read_head, signer_of
from refusal_jax.monitor.trail.records import START
from refusal_jax.monitor.trail.texts import Search
from refusal_jax.signatures import PublicKey
from refusal_jax.terminal.screen import escaped

WHOLE, UNPROVEN, CHANGED = 0, 30, 40  # exit codes, as an audit's for intact, inconclusive and broken
VERDICTS = {
    WHOLE: "The trail is whole.",
    UNPROVEN: "Nothing is wrong with the trail, but nothing proves it either.",
    CHANGED: "The trail is not as it was written.",
}
TRIES = 3  # a monitor may remove old files while the trail is read


@dataclasses.dataclass
class Verification:
    """Holds what was found. chain: the trail as it was followed; anchor: the head that holds most records, None if there is
    none that can be believed; notes: sentences on what is no fault."""

    folder: pathlib.Path
    chain: Chain
    anchor: Known | None
    notes: list[str]

    @property
    def findings(self) -> list[Finding]:
        """Returns what is wrong, by place."""
        return self.chain.findings

    @property
    def exit_code(self) -> int:
        """0 for a trail that is whole, 30 if nothing is wrong but no head can be believed, 40 if something is wrong."""
        return CHANGED if self.findings else WHOLE if self.anchor else UNPROVEN


def verify_trail(
    folder: pathlib.Path,
    keys: Sequence[pathlib.Path] = (),
    heads: Sequence[pathlib.Path] = (),
    search: Search | None = None,
) -> Verification:
    """Returns what is wrong with the trail in a folder. A monitor may append to it meanwhile.

    keys: public keys in PEM, one of which must have signed each head. heads: files of heads that were kept elsewhere, or folders
    of such; without keys, they are believed because they were. search: is given every record. Raises UserError if there is no
    trail, and for a key or a head that cannot be read.
    """
    if not folder.is_dir() or not files.numbers(folder):
        raise UserError(
            f"{folder} holds no trail: expected a folder with {file_name(1)} or later ones, which {setting('trail.folder')} of a "
            "monitor has named."
        )
    public = [PublicKey(key) for key in keys]
    for left in reversed(range(TRIES)):
        try:
            return _verified(folder, public, heads, search)
        except FileNotFoundError:
            if not left:
                raise UserError(
                    f"Files of {folder} disappear while they are read. Verify a copy of it, or try again later."
                ) from None
            if search:
                search.begin()
    raise AssertionError


def _verified(
    folder: pathlib.Path, keys: Sequence[PublicKey], heads: Sequence[pathlib.Path], search: Search | None
) -> Verification:
    # What a monitor does meanwhile must not look like a fault: the heads are read first, as records are only added, and whether a
    # file has a head is asked last.
    known, problems = list[Known](), list[Finding]()
    for place in sorted(folder.glob(head_name(0).replace("000000", "*"))):
        _read(place, keys, False, known, problems)
    for path in (path for place in heads for path in _head_files(place)):
        _read(path, keys, True, known, problems)
    there = files.numbers(folder)
    chain = Chain(known, search.visit if search else None, findings=problems)
    for position, number in enumerate(there):
        if position and number != there[position - 1] + 1:
            chain.find(folder / file_name(there[position - 1] + 1), 0, "is missing, and later files are there")
        chain.follow(folder / file_name(number), number, number == there[-1])
    if keys:
        _check_missing_heads(folder, chain, there)
    _check_heads(folder, chain)
    notes = _check_start(folder / file_name(there[0]), chain)
    anchors = [one for one in chain.held if one.is_believed]
    return Verification(folder, chain, max(anchors, key=lambda one: one.head.seq, default=None), notes)


def _head_files(place: pathlib.Path) -> list[pathlib.Path]:
    """Returns the files of heads that a file or folder stands for. Raises UserError if there are none."""
    if not place.is_dir():
        return [place]
    found = sorted(place.glob("*.head.json"))
    if not found:
        raise UserError(f"{place} holds no heads: expected files such as {head_name(1)}.")
    return found


def _read(
    place: pathlib.Path, keys: Sequence[PublicKey], elsewhere: bool, known: list[Known], problems: list[Finding]
) -> None:
    """Reads a head, and keeps it, or says what is wrong with it."""
    try:
        head, envelope = read_head(place)
    except UserError as error:
        if elsewhere:
            raise
        problems.append(Finding(place, 0, f"is damaged: {str(error).removeprefix(str(place)).strip()}"))
        return
    except ValueError as error:
        problems.append(Finding(place, 0, f"is no head of a trail: {error}"))
        return
    signer = None
    if keys:
        signer = signer_of(envelope, keys) if envelope else None
        if signer is None:
            names = " or ".join(str(key.file) for key in keys)
            what = f"was not signed with the private key of {names}, or it was changed" if envelope else "is not signed"
            problems.append(Finding(place, 0, what))
            return
    known.append(Known(head, place, signer.file if signer else None, elsewhere))


def _check_missing_heads(folder: pathlib.Path, chain: Chain, there: Sequence[int]) -> None:
    """Finds heads that were removed: each file has one before its second record is written."""
    for number in there:
        last = chain.last
        is_new = number == there[-1] and (not last or last.line <= 1 or last.file.name != file_name(number))
        if not is_new and not (folder / head_name(number)).exists():
            chain.find(folder / head_name(number), 0, f"is missing: {file_name(number)} has no head")


def _check_heads(folder: pathlib.Path, chain: Chain) -> None:
    """Finds tails that were cut, and heads of other trails."""
    for one in chain.known:
        head = one.head
        if chain.trail and head.trail != chain.trail:
            chain.find(one.place, 0, f"is a head of another trail, {head.trail}, not of {chain.trail}")
        elif head.seq > chain.records:
            end = chain.last or Place(folder, 0)
            chain.find(
                *end,
                f"is the end, record {chain.records}, but {one.place} says that there were {head.seq} at {head.time}: "
                f"{head.seq - chain.records} records were cut off",
            )


def _check_start(start: pathlib.Path, chain: Chain) -> list[str]:
    """Finds records that are missing at the start, unless a record that can be believed says that they were removed."""
    if chain.last is None or (chain.first, chain.first_previous) == (1, START):
        return []
    holding = max((one.head.seq for one in chain.held if one.is_believed), default=0)
    for removal in reversed(chain.removals):
        if removal.ends.get(chain.first - 1) == chain.first_previous and (not holding or removal.seq <= holding):
            return [
                f"Records 1 to {chain.first - 1} are no longer there: record {removal.seq}, of {removal.time}, says that their "
                "files were old enough to be removed."
            ]
    what = f"begins with record {chain.first}" if chain.first != 1 else "names a record before the first"
    chain.find(start, 1, f"{what}, and no record that can be believed says that those before it were removed")
    return []


def text_of(found: Verification) -> str:
    """Returns what was found, in sentences for people, with no control characters."""
    chain, anchor = found.chain, found.anchor
    count = f"{chain.lines} records" + (f", {chain.first} to {chain.records}" if chain.lines else "")
    lines = [f"Trail {chain.trail} in {found.folder}: {count}, begun {chain.begun}."]
    lines += [str(one) for one in found.findings]
    if chain.more:
        lines.append(f"{chain.more} more findings are not listed.")
    lines += found.notes
    if chain.torn:
        lines.append(
            f"{chain.torn.file}:{chain.torn.line} is not finished: it is being written, or a crash cut it. It is no record."
        )
    if anchor:
        lines += _what_holds(found, anchor)
    elif not found.findings:
        lines.append(
            "No head that can be believed holds this trail: whoever may write to the folder could have written all of it anew. "
            f"Give the public key of its heads with {setting('key')}, or a head that was kept elsewhere with {setting('heads')}."
        )
    lines.append(VERDICTS[found.exit_code])
    return "\n".join(escaped(line) for line in lines) + "\n"


def _what_holds(found: Verification, anchor: Known) -> list[str]:
    """Returns sentences that say up to where a head holds the trail, and what that cannot show."""
    head, after = anchor.head, found.chain.records - anchor.head.seq
    whose = f"is signed with the key of {anchor.signer}" if anchor.signer else "was kept elsewhere"
    lines = [
        f"The head {anchor.place}, of {head.time}, {whose}: no record up to {head.seq} can have been changed unnoticed."
    ]
    if after:
        lines.append(
            f"The last {after} records, from {head.seq + 1} on, follow it, and no head holds them: whoever may write to the "
            "folder could have changed or cut them."
        )
    if not anchor.elsewhere:
        lines.append(
            "If somebody put back an older state of the whole folder, with the head of that time, nothing in it shows that. A "
            f"head that is kept elsewhere does: give it with {setting('heads')}."
        )
    return lines
