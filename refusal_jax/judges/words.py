"""Judges of words and style: a reply shows a behaviour because it uses certain words, or because it avoids them.

`uses=WORDS` and `avoids=WORDS`, where WORDS is a regular expression (so `|` stands between words), or a .txt file with one word,
phrase or regular expression a line. They match whole words, whatever the case. As for judges of refusals, label 0 means that the
behaviour is there.
"""

import dataclasses
import hashlib
import re
from collections.abc import Sequence

from refusal_jax.chat.thoughts import is_unfinished
from refusal_jax.errors import UserError
from refusal_jax.files import local_path, read_text
from refusal_jax.judges.judge import Judge, Verdict
from refusal_jax.runs.ledger import Ledger

USES, AVOIDS = WORD_JUDGES = ("uses", "avoids")


@dataclasses.dataclass(frozen=True)
class WordJudge(Judge):
    """A judge of whether a reply uses at least one of certain words, or none of them.

    name: "uses" or "avoids", which is what label 0 means. An empty reply uses no word, but does not avoid any: it is no verdict.
    """

    name: str
    pattern: re.Pattern[str]

    @classmethod
    def of(cls, name: str, words: str) -> "WordJudge":
        """Returns the judge of a spec's words. Raises UserError if there are none, or they are no regular expression."""
        lines = [words]
        if words.endswith(".txt"):
            path = local_path(words)
            lines = [line.strip() for line in read_text(path).splitlines()]
        lines = [line for line in lines if line.strip()]
        if not lines:
            raise UserError(
                f"the judge {name!r} has no words{f' in {words}' if words else ''}. Write {name}=WORD|WORD, or name a .txt file "
                f"with one word or phrase a line, as {name}=words.txt."
            )
        try:
            joined = "|".join(f"(?:{line})" for line in lines)
            pattern = re.compile(rf"(?<!\w)(?:{joined})(?!\w)", re.IGNORECASE)
        except re.error as error:
            raise UserError(
                f"the words of the judge {name!r} are no regular expression: {error}. Put a backslash before signs "
                r"that stand for themselves, such as \( and \?."
            ) from None
        if pattern.search("") or pattern.search(" "):
            raise UserError(
                f"the words of the judge {name!r} match an empty text, so that every reply has them. Look for an empty "
                "alternative, such as in 'one|', and for a * that should be a +."
            )
        return cls(name, pattern)

    def fingerprint(self) -> str:
        """Returns a hash of the words."""
        return hashlib.sha256(self.pattern.pattern.encode()).hexdigest()

    def shows(self, response: str) -> bool:
        """Returns whether a reply shows the behaviour."""
        return (self.pattern.search(response) is not None) == (self.name == USES)

    def judge(self, rows: Sequence[dict], ledger: Ledger | None = None) -> list[Verdict | None]:
        return [
            None if is_unfinished(row) or not row["response"].strip() else Verdict(int(not self.shows(row["response"])))
            for row in rows
        ]
