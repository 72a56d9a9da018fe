"""The behaviour that a study is about, and the two sides of its contrast, with the words that reports and errors say of them.

Files and settings call the sides by their roles, whatever the behaviour is: "harmful" is the side that shows it and "harmless"
the side that does not, as refusal has them. A judge's label 0 means that a reply shows the behaviour.
"""

import dataclasses
from collections.abc import Mapping, Sequence

from refusal_jax.judges.choice import REFUSAL_JUDGES
from refusal_jax.judges.words import WORD_JUDGES

TOKENS, JUDGE = (
    "tokens",
    "judge",
)  # what the behaviour is measured by: the reply's first token, or a judge of whole replies


@dataclasses.dataclass(frozen=True)
class Behaviour:
    """A behaviour, such as refusal. present, absent: the names of the sides whose prompts show it and do not. measure: TOKENS or
    JUDGE. judge: the name of the judge that decides; "" is the first judge of refusals."""

    name: str = "refusal"
    present: str = "harmful"
    absent: str = "harmless"
    measure: str = TOKENS
    judge: str = ""

    @classmethod
    def of(cls, config: Mapping) -> "Behaviour":
        """Returns the behaviour of a study's settings, or of what a manifest has of them."""
        given = {name: value for name, value in (config.get("behaviour") or {}).items() if value}
        made = cls(**{field.name: given[field.name] for field in dataclasses.fields(cls) if field.name in given})
        if made.is_refusal or made.judge:
            return made
        first = next(iter(config.get("judges") or ("",)))
        return dataclasses.replace(made, judge=first.partition("=")[0])

    @property
    def is_refusal(self) -> bool:
        """Returns whether this is what the words of the paper are about."""
        return (self.name, self.present, self.absent, self.measure, self.judge) == (
            "refusal",
            "harmful",
            "harmless",
            TOKENS,
            "",
        )

    @property
    def title(self) -> str:
        """Returns the name as it begins a heading."""
        return self.name[:1].upper() + self.name[1:]

    @property
    def verb(self) -> str:
        """Returns what a model does that has the behaviour: "this model …"."""
        return "refuses" if self.name == "refusal" else f"shows {self.name}"

    @property
    def verb_on(self) -> str:
        """Returns the verb in front of requests: "this model … 5 % of harmful requests"."""
        return self.verb if self.name == "refusal" else f"{self.verb} on"

    @property
    def done(self) -> str:
        """Returns what a reply is that shows it: "counts 5 % of the completions as …"."""
        return "refused" if self.name == "refusal" else f"showing {self.name}"

    @property
    def of_requests(self) -> str:
        """Returns the behaviour in front of "harmful requests"."""
        return "refusal of" if self.name == "refusal" else f"{self.name} on"

    @property
    def plural(self) -> str:
        """Returns what replies that show it are called."""
        return "refusals" if self.name == "refusal" else f"replies that show {self.name}"

    @property
    def neither(self) -> str:
        """Returns what a broken model does: it does not show the behaviour, either."""
        return "does not refuse either" if self.name == "refusal" else f"tells nothing of {self.name}"

    @property
    def score(self) -> str:
        """Returns the name of its score at the reply's first token."""
        return f"{self.name} score"

    @property
    def tokens(self) -> str:
        """Returns what its opening tokens are called."""
        return "refusal tokens" if self.name == "refusal" else "opening tokens"

    @property
    def sides(self) -> tuple[str, str]:
        """Returns the names of the sides, first of the one that shows it."""
        return self.present, self.absent

    def side(self, harmless: bool) -> str:
        """Returns the name of a side."""
        return self.absent if harmless else self.present

    def split(self, name: str) -> str:
        """Returns a split such as "harmful_train" in words."""
        role, _, part = name.partition("_")
        return f"{ {'harmful': self.present, 'harmless': self.absent}.get(role, role) } {part}".strip()

    def deciding(self, judges: Sequence[str]) -> str | None:
        """Returns the judge by which the behaviour is counted; None if it is not among `judges`."""
        if self.judge:
            return self.judge if self.judge in judges else None
        return next((judge for judge in judges if judge in REFUSAL_JUDGES), None)

    def counted_by(self, judge: str) -> bool:
        """Returns whether a judge's label 0 means the behaviour, and not any failure."""
        return judge in REFUSAL_JUDGES if not self.judge else judge == self.judge or judge in WORD_JUDGES


REFUSAL = Behaviour()
