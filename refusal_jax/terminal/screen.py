"""Draws replies on a terminal: two columns side by side that grow together, with a colour for each token.

A model's text is untrusted: whatever could steer the terminal is shown as an escape such as \\x1b and never sent.
"""

import dataclasses
import sys
import unicodedata
from collections.abc import Sequence
from itertools import zip_longest

JOINERS = "\u200c\u200d"  # invisible, and part of ordinary words and emoji
UNSAFE = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")  # categories of what is not plainly shown
GAP = " │ "
# Colours of the 256 of terminals by size of the projection, in units of the direction's length; below the first, none.
BOUNDS = (0.1, 0.3, 0.6)
AGAINST, ALONG = (110, 75, 33), (180, 215, 203)
RESET, BOLD, DIM = "\x1b[0m", "\x1b[1m", "\x1b[2m"


def escaped(text: str) -> str:
    """Returns `text` with line ends kept and everything else that is not a plain character written as an escape."""

    def shown(char: str) -> str:
        if char == "\n" or char in JOINERS or unicodedata.category(char) not in UNSAFE:
            return char
        return "    " if char == "\t" else char.encode("unicode_escape").decode()

    return "".join(map(shown, text))


def colour(value: float | None) -> str:
    """Returns the terminal's code for a projection in units of the direction's length; None or NaN gives no colour."""
    if value is None:
        return ""
    level = sum(abs(value) >= bound for bound in BOUNDS)
    return f"\x1b[38;5;{(ALONG if value > 0 else AGAINST)[level - 1]}m" if level else ""


def width(char: str) -> int:
    """Returns how many columns a character takes."""
    if unicodedata.category(char) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1


@dataclasses.dataclass(frozen=True)
class Piece:
    """A token's text, escaped, and its projection in units of the direction's length, or None."""

    text: str
    value: float | None = None


Line = list[tuple[str, float | None]]  # characters and the values of their tokens


def wrapped(pieces: Sequence[Piece], columns: int) -> list[Line]:
    """Breaks pieces into lines of at most `columns`, at spaces where there are any. As text grows, only the last line
    changes."""
    lines: list[Line] = [[]]
    for piece in pieces:
        for char in piece.text:
            if char == "\n":
                lines.append([])
                continue
            line = lines[-1]
            if sum(width(c) for c, _ in line) + width(char) > columns:
                space = next((i for i in range(len(line) - 1, 0, -1) if line[i][0] == " "), None)
                rest = [] if space is None or char == " " else line[space + 1 :]
                if rest or char == " ":
                    del line[len(line) if char == " " else space :]
                lines.append(rest)
                if char == " ":
                    continue
            lines[-1].append((char, piece.value))
    return lines


def painted(line: Line, columns: int) -> str:
    """Returns a line with its colours, filled up to `columns`."""
    text, last = "", ""
    for char, value in line:
        code = colour(value)
        if code != last:
            text += RESET + code
            last = code
        text += char
    return text + (RESET if last else "") + " " * (columns - sum(width(c) for c, _ in line))


class Columns:
    """Two texts side by side, redrawn where they can still change.

    A terminal cannot go back above its first row, so lines that are final in both columns are left alone, and a column that
    is a screen ahead of the other waits for it.
    """

    def __init__(self, columns: int, rows: int, out=None):
        self.out = out or sys.stdout
        self.each, self.rows = max((columns - len(GAP)) // 2, 8), max(rows - 2, 1)
        self.final = self.live = 0  # lines that stay, and lines below them that the next drawing goes over

    def draw(self, texts: Sequence[Sequence[Piece]], done: Sequence[bool]) -> None:
        """Shows the two texts; done: whether each is complete."""
        both = [wrapped(pieces, self.each) for pieces in texts]
        longest = max(map(len, both))
        final = min(longest if end else len(lines) - 1 for lines, end in zip(both, done, strict=True))
        shown = longest if all(done) else min(longest, final + self.rows)
        back = f"\x1b[{self.live}A" if self.live else ""
        rows = list(zip_longest(*both, fillvalue=[]))[self.final : shown]
        text = "".join(f"\r{GAP.join(painted(line, self.each) for line in row)}\x1b[K\n" for row in rows)
        self.out.write(back + text)
        self.out.flush()
        self.live, self.final = shown - final, final
