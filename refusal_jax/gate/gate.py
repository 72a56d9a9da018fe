"""Runs a gate: asks candidate and reference the policy's prompts, judges the replies, and decides about every limit."""

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax

from refusal_jax.audit.broken import BrokenCheckpoint
from refusal_jax.endpoints.endpoint import Answer, ServerGivenUp
from refusal_jax.errors import UserError, field
from refusal_jax.gate.limits import KEPT, Decision, decided
from refusal_jax.gate.measured import limits_of
from refusal_jax.gate.opened import open_candidate, open_reference
from refusal_jax.gate.policy import Policy, check_policy
from refusal_jax.gate.power import Power, power_of
from refusal_jax.gate.prompts import Asked, Drawn, draw
from refusal_jax.gate.recorded import Recorded, record_of
from refusal_jax.gate.resistance import worst_cases
from refusal_jax.gate.sources import Judged, Source
from refusal_jax.gate.sources import judged as judge_answers
from refusal_jax.gate.verdict import Verdict, verdict_of
from refusal_jax.judges.choice import parse_judges
from refusal_jax.judges.judge import Judge
from refusal_jax.runs.ledger import Ledger
from refusal_jax.runs.storage import DiskFolder

CANDIDATE = "candidate"
BATCH = 8  # rows that a judge model reads together
LEDGERS = {"candidate": "candidate.replies.jsonl", "reference": "reference.replies.jsonl"}


@dataclasses.dataclass(frozen=True)
class Gate:
    """Holds what a gate found. decisions: by the first judge. powers: what its prompts can tell, one for each decision about all
    of a set that has replies. identities, concerns: of "candidate" and "reference". seconds: how long it took."""

    policy: Policy
    sets: Sequence[Drawn]
    judges: Sequence[Judge]
    judged: dict[str, Judged]
    identities: dict[str, dict]
    concerns: dict[str, Sequence[str]]
    decisions: Sequence[Decision]
    powers: Sequence[Power]
    verdict: Verdict
    seconds: float


def run_gate(policy: Policy, mesh: jax.sharding.Mesh | None = None, folder: DiskFolder | None = None) -> Gate:
    """Returns what the gate found.

    mesh: the devices that checkpoints and judge models run on. folder: keeps the replies until the gate is done, so that one that
    was interrupted goes on with them; the caller holds it. Raises UserError for anything that keeps the gate from being run, and
    BrokenCheckpoint for a checkpoint whose files are damaged.
    """
    started = time.monotonic()
    check_policy(policy)
    sets = draw(policy)
    judges = parse_judges(policy.judges, BATCH, policy.dtype, mesh)
    opened: dict[str, Source | None] = {
        "candidate": open_candidate(policy, mesh),
        "reference": open_reference(policy, mesh),
    }
    sources = {role: source for role, source in opened.items() if source is not None}
    attacked = worst_cases(policy, sources["candidate"])  # before long work, as the record may be of another checkpoint
    prompts = [one for drawn in sets for one in drawn.prompts]
    # The reference first: where it is a record of other prompts, that is said before long work.
    asked = {role: ask(role, sources[role], prompts, judges, ledger(folder, role)) for role in reversed(sources)}
    judged = {role: one.judged for role, one in asked.items()}
    identities = {role: one.identity for role, one in asked.items()}
    concerns = {role: one.concerns for role, one in asked.items()}
    by_judge = {
        judge.name: decided(
            limits_of(policy, judged["candidate"], judged.get("reference"), judge.name), policy.level, attacked
        )
        for judge in judges
    }
    decisions = by_judge[judges[0].name]
    counted = [one for one in decisions if one.n and not one.limit.category and one.limit.measure != KEPT]
    powers = [power_of(decision, policy.power) for decision in counted]
    verdict = verdict_of(policy, judged, by_judge, identities, concerns)
    seconds = time.monotonic() - started
    return Gate(policy, sets, judges, judged, identities, concerns, decisions, powers, verdict, seconds)


class Replied(NamedTuple):
    """Holds what a source replied, what it is, and what is to be known of it."""

    judged: Judged
    identity: dict
    concerns: Sequence[str]


def ask(role: str, source: Source, prompts: Sequence[Asked], judges: Sequence[Judge], kept: Ledger | None) -> Replied:
    """Returns what a source replied. A candidate whose files are broken, or whose server does not reply, has replied to nothing,
    which is a finding; of a reference it is an error. Raises UserError as `Source.judged` does."""
    try:
        return Replied(source.judged(prompts, judges, kept), source.identity(), source.concerns())
    except (BrokenCheckpoint, ServerGivenUp) as error:
        if role != CANDIDATE:
            raise UserError(f"The reference cannot be asked: {error}") from None
        answers = [Answer(None, fault=str(error))] * len(prompts)
        return Replied(judge_answers(prompts, answers, judges), {"kind": "broken", "reason": str(error)}, ())


def record_reference(
    policy: Policy, texts: bool, mesh: jax.sharding.Mesh | None = None, folder: DiskFolder | None = None
) -> dict:
    """Returns the reference's replies as a recorded run, for JSON. texts: whether it holds them as texts rather than as
    hashes; mesh, folder: as in `run_gate`. Raises UserError where the policy names no reference or a record, and as
    `run_gate` does."""
    check_policy(policy)
    source = open_reference(policy, mesh)
    if source is None or isinstance(source, Recorded):
        found = "no reference" if source is None else f"the recorded run {policy.reference} as its reference"
        raise UserError(
            f"The policy names {found}, so there is no model to record. Name it by {field('reference', 'MODEL')}: a folder, "
            "ORG/NAME, a GGUF file, or the address of a server."
        )
    sets, judges = draw(policy), parse_judges(policy.judges, BATCH, policy.dtype, mesh)
    prompts = [one for drawn in sets for one in drawn.prompts]
    found = source.judged(prompts, judges, ledger(folder, "reference"))
    return record_of(policy, source, found, sets, judges, texts)


def ledger(folder: DiskFolder | None, role: str) -> Ledger | None:
    """Returns the ledger of a model's replies, None where nothing is kept."""
    return Ledger.open(folder, LEDGERS[role]) if folder else None


@contextlib.contextmanager
def kept_replies(folder: DiskFolder) -> Iterator[None]:
    """Holds the folder of a gate; the replies that it keeps are removed once the gate is done, as a server's may change."""
    with folder.held():
        yield
        folder.remove(list(LEDGERS.values()))
