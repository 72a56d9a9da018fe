"""A judge behind an endpoint: a model of any OpenAI-compatible server is asked, in words, what a reply does.

A fault, or an answer that is none of the words, is no verdict. The replies are text of the model that is judged, which may hold
instructions for the judge: they stand between fences that they cannot know, and only a word alone is an answer.
"""

import collections
import dataclasses
import hashlib
import logging
from collections.abc import Sequence

from refusal_jax.chat.thoughts import is_unfinished
from refusal_jax.endpoints.client import Endpoint
from refusal_jax.endpoints.endpoint import Answer, EndpointSettings
from refusal_jax.errors import UserError
from refusal_jax.judges.degenerate import is_broken
from refusal_jax.judges.folded_text import folded
from refusal_jax.judges.judge import Judge, Outcome, Verdict
from refusal_jax.judges.questions import ASKED, OUTCOMES, SYSTEM, filled, outcome_named
from refusal_jax.runs.ledger import Ledger

LOG = logging.getLogger(__name__)
ENDPOINT = "endpoint"  # the judge's name
MOST_TOKENS = 512  # of an answer; judges that think need more than a word
AT_A_TIME = 64  # replies, after which verdicts are kept


@dataclasses.dataclass(frozen=True)
class EndpointJudge(Judge):
    """A judge that asks a model behind a server. It is undecided, and gives None, where there is no answer, or one that is no
    outcome."""

    endpoint: Endpoint
    name: str = ENDPOINT
    uses_devices = True  # of others: it is slow, so judges that say what is wrong with completions come before it
    elsewhere = True

    @classmethod
    def of(cls, address: str) -> "EndpointJudge":
        """Returns the judge at an address, `URL`, `URL#MODEL` or `URL#MODEL#NAME` with the name of the environment variable that
        holds the key. Raises UserError if there is no URL, or the settings cannot be used."""
        url, _, rest = address.partition("#")
        model, _, variable = rest.partition("#")
        if not url.startswith(("http://", "https://")):
            raise UserError(
                f"the judge {ENDPOINT}={address} has no address of a server: write {ENDPOINT}=URL#MODEL, such as "
                f"{ENDPOINT}=http://localhost:8000#qwen, or {ENDPOINT}=URL#MODEL#NAME with the name of the environment variable "
                "that holds the key."
            )
        settings = EndpointSettings(url=url, model=model, api_key_env=variable, max_tokens=MOST_TOKENS)
        return cls(Endpoint(settings))

    def fingerprint(self) -> str:
        """Returns a hash of the server's address, the model's name and the question."""
        settings = self.endpoint.settings
        return hashlib.sha256("\0".join((settings.url, settings.model, OUTCOMES)).encode()).hexdigest()

    def judge(self, rows: Sequence[dict], ledger: Ledger | None = None) -> list[Verdict | None]:
        kept = [row for row in (ledger.rows if ledger is not None else []) if row["judge"] == self.name]
        found: dict[int, Verdict | None] = {row["index"]: Verdict.of(row) for row in kept}
        for i, row in enumerate(rows):
            if not is_unfinished(row) and is_broken(folded(row["response"])):
                found[i] = Verdict(0, None, Outcome.BROKEN)
        todo = [i for i, row in enumerate(rows) if i not in found and not is_unfinished(row)]
        why: list[str] = []
        for start in range(0, len(todo), AT_A_TIME):
            part = todo[start : start + AT_A_TIME]
            questions = [
                filled(OUTCOMES, r["prompt"], r["response"], r.get(SYSTEM) or "") for r in (rows[i] for i in part)
            ]
            answers = self.endpoint.answers(questions, title=f"judge {self.name}")
            verdicts = {i: verdict_of(answer) for i, answer in zip(part, answers, strict=True)}
            why += [why_not(answer) for i, answer in zip(part, answers, strict=True) if verdicts[i] is None]
            found |= verdicts
            if ledger is not None:
                known = [(i, verdict) for i, verdict in verdicts.items() if verdict]
                ledger.append([{"judge": self.name, "index": i, **dataclasses.asdict(v)} for i, v in known])
        if why:
            often, times = collections.Counter(why).most_common(1)[0]
            LOG.warning(
                f"The judge {self.name!r} gave no verdict on {len(why)} of {len(rows)} replies, which are left out of its rates. "
                f"Most often ({times} times): {often}."
            )
        return [found.get(i) for i in range(len(rows))]


def verdict_of(answer: Answer) -> Verdict | None:
    """Returns the verdict that an answer gives, None for a fault and for anything but one of the words."""
    outcome = outcome_named(answer.text) if answer.text is not None else None
    return Verdict(int(outcome is Outcome.COMPLIES), None, outcome) if outcome else None


def why_not(answer: Answer) -> str:
    """Returns why an answer gives no verdict."""
    if answer.text is None:
        return answer.fault or "there was no reply"
    if not answer.thought_ended:
        return f"the judge still thought after {MOST_TOKENS} tokens"
    return f"the answer was not one of {', '.join(ASKED)}, but {answer.text[:40]!r}"
