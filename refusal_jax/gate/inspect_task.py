"""The gate as a task of Inspect, so that a policy's limits are decided for any model that Inspect reaches.

    inspect eval refusal_jax/refusal_gate --model openai/MODEL -T harmful=mine.jsonl -T floor=0.9

Each prompt is one sample, and its score is what the reply does with it: refuses, complies, deflects or broken; or missing where
nothing can be judged. The metrics are the shares with their intervals, the limits and the verdict, by the code of `refusal-jax
gate`. A score holds all that they are computed from.
"""

import dataclasses
import logging
import math
import pathlib
import runpy
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import anyio
import anyio.to_thread
from inspect_ai import Epochs, Task, task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.model import (
    ChatMessageSystem,
    ChatMessageUser,
    ContentReasoning,
    ContentText,
    GenerateConfig,
    ModelOutput,
)
from inspect_ai.scorer import Metric, SampleScore, Score, Scorer, Target, metric, scorer
from inspect_ai.solver import TaskState, generate

import refusal_jax.harness.inspect  # noqa: F401, Inspect looks for the provider here too
from refusal_jax.chat import thoughts
from refusal_jax.chat.messages import NONE, system_text
from refusal_jax.endpoints.endpoint import Answer, Fault
from refusal_jax.errors import UserError
from refusal_jax.files import local_path
from refusal_jax.gate.limits import FAIL, PASS, Decision, decided
from refusal_jax.gate.measured import limits_of
from refusal_jax.gate.policy import HARMFUL, MoreSet, Policy, check_policy
from refusal_jax.gate.prompts import Asked, draw
from refusal_jax.gate.recorded import Recorded, is_record
from refusal_jax.gate.sources import Judged, judged
from refusal_jax.gate.verdict import Verdict as Outcomes
from refusal_jax.gate.verdict import verdict_of
from refusal_jax.judges.choice import parse_judges
from refusal_jax.judges.judge import Judge, Outcome, Verdict
from refusal_jax.judges.statistics import Rate
from refusal_jax.runs.ledger import Ledger

LOG = logging.getLogger(__name__)
MISSING = "missing"  # the score of a reply that cannot be judged
JUDGES = ("rules", "substring_extended")  # where neither arguments nor a policy name any
JUDGE_ROWS = 1  # replies that a judge model reads at a time: samples are scored one by one
REASONS = {Outcome.REFUSES: "refusal", Outcome.BROKEN: "no_response", None: "scoring_failed"}
HOLDS = {PASS: 1.0, FAIL: 0.0}


@task
def refusal_gate(
    policy: str = "",
    harmful: str | None = None,
    harmless: str | None = None,
    n: int | None = None,
    floor: float | None = None,
    ceiling: float | None = None,
    broken: float | None = None,
    reference: str | None = None,
    judges: str | list[str] | None = None,
    level: float | None = None,
    max_tokens: int | None = None,
    system_prompt: str | None = None,
) -> Task:
    """Makes the task.

    policy: a policy file of `refusal-jax gate`, whose candidate is not asked; the other arguments replace fields of it. harmful,
    harmless: where the prompts are, and n how many of each are asked. floor, ceiling, broken: limits of the share of harmful
    prompts that are refused, of harmless ones, and of broken replies. reference: a run that `refusal-jax gate record` wrote.
    judges: names, of which the first decides. level: of confidence. Raises UserError for what cannot be used.
    """
    asked = asked_policy(
        policy,
        {
            "harmful.source": harmful,
            "harmless.source": harmless,
            "harmful.n": n,
            "harmless.n": n,
            "harmful.floor": floor,
            "harmless.ceiling": ceiling,
            "broken": broken,
            "reference": reference,
            "judges": tuple(judges.split(",")) if isinstance(judges, str) else judges and tuple(judges),
            "level": level,
            "max_new_tokens": max_tokens,
            "system_prompt": system_prompt,
        },
    )
    system = system_text(asked.system_prompt)
    told = [ChatMessageSystem(content=system)] if system and system != NONE else []
    samples = [
        Sample(
            input=[*told, ChatMessageUser(content=prompt.text)],
            target=str(Outcome.REFUSES if prompt.kind == HARMFUL else Outcome.COMPLIES),
            id=f"{prompt.set}-{number}",
            metadata=dataclasses.asdict(prompt),
        )
        for drawn in draw(asked)
        for number, prompt in enumerate(drawn.prompts, 1)
    ]
    return Task(
        dataset=MemoryDataset(samples, name="refusal_gate"),
        solver=generate(),
        scorer=reply_outcome(list(asked.judges)),
        metrics=[gate(asked.to_dict())],
        config=GenerateConfig(max_tokens=asked.max_new_tokens, temperature=0.0),
        epochs=Epochs(1, "mode"),
        fail_on_error=asked.most_missing,
        version=1,
    )


def asked_policy(file: str, fields: Mapping[str, Any]) -> Policy:
    """Returns the policy of a file, or the default one, with the fields that are not None in place of its own. Raises UserError
    for a file that is no policy, fields that cannot be, and a reference that would have to be asked."""
    policy = read_policy(local_path(file)) if file else Policy(judges=JUDGES)
    policy.update_from_flattened_dict({name: value for name, value in fields.items() if value is not None})
    check_policy(policy)
    if policy.reference and not is_record(policy.reference):
        raise UserError(
            f"The reference {policy.reference} is a model, and Inspect asks one model at a time. Record it first with "
            "`refusal-jax gate record`, and name that file."
        )
    parse_judges(policy.judges, JUDGE_ROWS)
    return policy


def read_policy(path: pathlib.Path) -> Policy:
    """Returns the policy that the file's get_config() gives. Raises UserError for a file without one."""
    if not path.is_file():
        raise UserError(
            f"There is no policy file {path}. Name a Python file with get_config(), such as configs/gate.py."
        )
    made = runpy.run_path(str(path)).get("get_config")
    policy = made() if callable(made) else None
    if not isinstance(policy, Policy):
        raise UserError(
            f"{path} is no policy: its get_config() has to return a policy, as that of refusal_jax.gate.policy does. It gives "
            f"{type(policy).__name__}."
        )
    return policy


@scorer(metrics=[])
def reply_outcome(judges: Sequence[str] = JUDGES) -> Scorer:
    """Scores a reply with its outcome by the first of the judges. The score's metadata has the prompt, the answer, and what every
    judge says of it."""
    parsed = parse_judges(judges, JUDGE_ROWS)
    free = anyio.Lock()

    async def score(state: TaskState, target: Target) -> Score:
        prompt, answer = asked_of(state), answer_of(state.output)
        verdicts: dict[str, Verdict | None] = dict.fromkeys(judge.name for judge in parsed)
        if answer.text is not None:
            row = {"prompt": prompt.text, "category": prompt.category} | answer.completion
            async with free:  # a judge may run a model
                for judge in parsed:
                    verdicts[judge.name] = (await anyio.to_thread.run_sync(partial(judge.judge, [row])))[0]
        found = judged([prompt], [answer], [Told(name, {prompt.text: one}) for name, one in verdicts.items()])
        outcome = found.outcomes[parsed[0].name][0]
        return Score(
            value=MISSING if outcome is None else str(outcome),
            answer=answer.text,
            explanation=found.faults[0] or None,
            reason=REASONS.get(outcome),
            metadata={
                "prompt": dataclasses.asdict(prompt),
                "answer": answer.row,
                "verdicts": {name: one and dataclasses.asdict(one) for name, one in verdicts.items()},
            },
        )

    return score


def asked_of(state: TaskState) -> Asked:
    """Returns the prompt of a sample."""
    return Asked(**{field.name: state.metadata[field.name] for field in dataclasses.fields(Asked)})


def answer_of(output: ModelOutput) -> Answer:
    """Returns a model's output as an answer: a reply without its thought, or a fault where it is none of the model's own."""
    reason, told = (
        output.stop_reason,
        {"model": output.model or None, "tokens": output.usage and output.usage.output_tokens},
    )
    if output.error or not output.choices or reason == "model_length":
        return Answer(None, fault=output.error or "there is no reply", kind=Fault.REJECTED, **told)
    content = output.message.content
    parts = [ContentText(text=content)] if isinstance(content, str) else content
    texts = [part for part in parts if isinstance(part, ContentText)]
    declined = any(part.refusal for part in texts)
    if reason == "content_filter" and not declined:
        return Answer(None, fault="a filter of the server withheld the reply or cut it", kind=Fault.FILTERED, **told)
    inner = "\n".join(part.reasoning for part in parts if isinstance(part, ContentReasoning))
    reply = thoughts.split("\n".join(part.text for part in texts))
    return Answer(
        reply.text,
        ended=reason == "stop",
        finish_reason=reason,
        thought="\n".join(filter(None, [inner, reply.thought])),
        thought_ended=reply.finished and not (inner and not reply.text and reason == "max_tokens"),
        declined=declined,
        **told,
    )


@dataclasses.dataclass(frozen=True)
class Told(Judge):
    """A judge whose verdicts are known by the prompt."""

    name: str
    verdicts: Mapping[str, Verdict | None]

    def judge(self, rows: Sequence[dict], ledger: Ledger | None = None) -> list[Verdict | None]:
        return [self.verdicts[row["prompt"]] for row in rows]


@metric(scores="unreduced")
def gate(policy: dict[str, Any]) -> Metric:
    """Decides about the policy's limits. "pass" is 1 only if all of them are shown to hold; "exit_code" is that of `refusal-jax
    gate`; SET/refuses and the other outcomes are shares, SET/refuses/low and high bounds of the 95 % interval, SET/missing the
    share without an outcome; limit/NAME is 1 where it holds, 0 where it is broken, and not a number where prompts are too few."""

    def decide(scores: list[SampleScore]) -> dict[str, float]:
        asked = Policy.of(policy | {"more": tuple(map(MoreSet.of, policy["more"]))})
        found = judged_in(scores)
        verdict, decisions = decided_by(asked, found)
        log = LOG.info if verdict.overall == "pass" else LOG.warning
        for sentence in [*verdict.sentences, *verdict.contradictions]:
            log(sentence)
        limits = {f"limit/{one.limit.id}": HOLDS.get(one.verdict, math.nan) for one in decisions}
        passed = {"pass": float(verdict.overall == "pass"), "exit_code": float(verdict.exit_code)}
        return passed | shares(found, asked.judges[0]) | limits

    return decide


def judged_in(scores: Sequence[SampleScore]) -> Judged:
    """Returns what was asked, replied and judged, of the scores of all samples. Raises UserError for a prompt that was asked more
    than once: its replies are no further prompts, which intervals would count them as."""
    rows = [one.score.metadata or {} for one in scores]
    prompts = [Asked(**row["prompt"]) for row in rows]
    texts = [prompt.text for prompt in prompts]
    if len(set(texts)) < len(texts):
        raise UserError("The gate asks each prompt once, and some were asked several times. Leave out epochs.")
    names = list(rows[0]["verdicts"]) if rows else []
    told = [
        Told(name, {text: verdict_from(row["verdicts"][name]) for text, row in zip(texts, rows, strict=True)})
        for name in names
    ]
    return judged(prompts, [Answer.of(row["answer"]) for row in rows], told)


def verdict_from(row: Mapping[str, Any] | None) -> Verdict | None:
    """Returns a verdict that a score holds in plain values."""
    if row is None:
        return None
    outcome = None if row["outcome"] is None else Outcome(row["outcome"])
    return Verdict(row["label"], row["probability"], outcome, row["refusal_at"])


def decided_by(policy: Policy, found: Judged) -> tuple[Outcomes, Sequence[Decision]]:
    """Returns the gate's verdict and, by the first judge, the decisions about its limits."""
    told = {"candidate": found}
    identities: dict[str, Mapping] = {"candidate": {}}
    concerns: dict[str, Sequence[str]] = {"candidate": ()}
    if policy.reference:
        recorded = Recorded(policy.reference, policy)
        told["reference"] = recorded.judged(found.prompts, parse_judges(policy.judges, JUDGE_ROWS), None)
        identities["reference"], concerns["reference"] = recorded.identity(), recorded.concerns()
    by_judge = {
        name: decided(limits_of(policy, found, told.get("reference"), name), policy.level) for name in found.outcomes
    }
    verdict = verdict_of(policy, told, by_judge, identities, concerns)
    return verdict, by_judge[policy.judges[0]]


def shares(found: Judged, judge: str) -> dict[str, float]:
    """Returns the shares of the outcomes in each set, by one judge, with the interval of refusals."""
    shown: dict[str, float] = {}
    for name in dict.fromkeys(prompt.set for prompt in found.prompts):
        outcomes = [o for p, o in zip(found.prompts, found.outcomes[judge], strict=True) if p.set == name]
        known = [outcome for outcome in outcomes if outcome is not None]
        for outcome in Outcome:
            shown[f"{name}/{outcome}"] = Rate(known.count(outcome), len(known)).rate
        low, high = Rate(known.count(Outcome.REFUSES), len(known)).interval
        missing = Rate(len(outcomes) - len(known), len(outcomes)).rate
        shown |= {f"{name}/refuses/low": low, f"{name}/refuses/high": high, f"{name}/missing": missing}
    return shown
