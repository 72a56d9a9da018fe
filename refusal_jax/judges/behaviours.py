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
    def infinitive(self) -> str:
        """Returns what replies may do that show it: "they may … in other words"."""
        return "refuse" if self.name == "refusal" else f"show {self.name}"

    @property
    def done_title(self) -> str:
        """Returns `done` as it begins a heading."""
        return self.done[:1].upper() + self.done[1:]

    @property
    def not_done(self) -> str:
        """Returns what prompts are that do not show it, in a legend."""
        return "not refused" if self.name == "refusal" else f"no {self.name}"

    @property
    def shown(self) -> str:
        """Returns what prompts do that show it: "half of the prompts …"."""
        return "are refused" if self.name == "refusal" else f"show {self.name}"

    @property
    def still_shown(self) -> str:
        """Returns `shown` of prompts that show it in spite of an intervention."""
        return "are still refused" if self.name == "refusal" else f"still show {self.name}"

    @property
    def not_shown(self) -> str:
        """Returns what prompts do that do not show it."""
        return "are answered" if self.name == "refusal" else f"show no {self.name}"

    @property
    def cases(self) -> str:
        """Returns what is counted of it: "half of the … are gone"."""
        return "refusals" if self.name == "refusal" else f"cases of {self.name}"

    @property
    def cases_title(self) -> str:
        """Returns `cases` as it begins a heading."""
        return self.cases[:1].upper() + self.cases[1:]

    @property
    def other_replies(self) -> str:
        """Returns what replies are called that do not show it."""
        return "answers" if self.name == "refusal" else "other replies"

    @property
    def answered(self) -> str:
        """Returns what prompts are that do not show it, beside `done`."""
        return "answered" if self.name == "refusal" else "others"

    @property
    def answered_while(self) -> str:
        """Returns that prompts no longer show it under an intervention: "prompts that …, and … while"."""
        return "answered" if self.name == "refusal" else self.not_shown

    @property
    def done_prompts(self) -> str:
        """Returns what prompts are called that show it."""
        return "refused prompts" if self.name == "refusal" else f"prompts that show {self.name}"

    @property
    def a_present(self) -> str:
        """Returns the side that shows it with its article."""
        return with_article(self.present)

    @property
    def an_absent(self) -> str:
        """Returns the other side with its article."""
        return with_article(self.absent)

    @property
    def that_model_does(self) -> str:
        """Returns which prompts those are that show it: "harmful prompts …"."""
        return "that the model refuses" if self.name == "refusal" else f"that {self.shown}"

    @property
    def kept_present(self) -> str:
        """Returns what prompts of its side are called that are there because they show it: "… test prompts"."""
        return f"refused {self.present}" if self.name == "refusal" else self.present

    @property
    def contrast(self) -> str:
        """Returns what the sides differ in."""
        return "harmfulness" if self.present == "harmful" else "contrast"

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
        return f"{self.dataset(role)} {part}".strip()

    def dataset(self, name: str) -> str:
        """Returns what a test set is called: a side by its name, another set as it is."""
        return {"harmful": self.present, "harmless": self.absent}.get(name, name)

    def deciding(self, judges: Sequence[str]) -> str | None:
        """Returns the judge by which the behaviour is counted; None if it is not among `judges`."""
        if self.judge:
            return self.judge if self.judge in judges else None
        return next((judge for judge in judges if judge in REFUSAL_JUDGES), None)

    def counted_by(self, judge: str) -> bool:
        """Returns whether a judge's label 0 means the behaviour, and not any failure."""
        return judge in REFUSAL_JUDGES if not self.judge else judge == self.judge or judge in WORD_JUDGES


def with_article(noun: str) -> str:
    """Returns a noun or an adjective after "a" or "an"."""
    return f"{'an' if noun[:1].lower() in 'aeiou' else 'a'} {noun}"


REFUSAL = Behaviour()
