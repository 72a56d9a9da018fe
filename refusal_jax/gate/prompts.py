"""Draws the prompts that a policy names, and checks that their files are those that it pins by hash."""

import dataclasses
import hashlib
import random

from refusal_jax.data.prompts import read_prompts
from refusal_jax.data.sources import resolve
from refusal_jax.errors import UserError, field
from refusal_jax.files import file_hash
from refusal_jax.gate.policy import HARMFUL, Policy, PromptSet


@dataclasses.dataclass(frozen=True)
class Asked:
    """One prompt. place: of the set, its number there; kind: "harmful" or "harmless"."""

    set: str
    kind: str
    text: str
    category: str | None = None

    @property
    def sha256(self) -> str:
        """Returns the hash of the prompt's text, in hex, by which recorded runs know it."""
        return hashlib.sha256(self.text.encode("utf-8", "surrogatepass")).hexdigest()


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A set of prompts as it was asked. sha256: of its file; of: how many different prompts the file has."""

    name: str
    kind: str
    source: str
    sha256: str
    of: int
    prompts: tuple[Asked, ...]

    @property
    def record(self) -> dict:
        """Returns where the prompts are from, for JSON, without their texts."""
        return {
            "name": self.name,
            "kind": self.kind,
            "source": self.source,
            "sha256": self.sha256,
            "n": len(self.prompts),
            "of": self.of,
        }


def draw(policy: Policy) -> list[Drawn]:
    """Returns the prompts of each set, in the order of their files; repeated prompts count once.

    Raises UserError for files that cannot be read, whose hash is another than the policy's, and for a prompt that is in two sets.
    """
    found = [_set(name, kind, one, policy.seed) for name, (kind, one) in policy.sets.items()]
    where: dict[str, str] = {}
    for drawn in found:
        for one in drawn.prompts:
            if where.setdefault(one.text, drawn.name) != drawn.name:
                raise UserError(
                    f"The prompt {one.text[:80]!r} is in the sets {where[one.text]} and {drawn.name}, so that it would count "
                    "twice. Take it out of one of them."
                )
    return found


def _set(name: str, kind: str, one: PromptSet, seed: int) -> Drawn:
    path = resolve(one.source, f"{kind}_test")
    rows = read_prompts(path)
    sha256 = file_hash(path)
    if one.sha256 and sha256 != one.sha256.lower():
        raise UserError(
            f"The prompts of {name} are not those of the policy: {path} has the sha256 {sha256}, and "
            f"{field(f'{name}.sha256')} is {one.sha256.lower()}. Get the file that the policy "
            "was written for, or pin the new one."
        )
    different = list({row["instruction"]: row for row in reversed(rows)}.values())[::-1]  # the first of each
    kept = range(len(different))
    if one.n < len(different):
        kept = sorted(random.Random(f"{seed} {name}").sample(kept, one.n))
    prompts = tuple(Asked(name, kind, different[i]["instruction"], different[i]["category"]) for i in kept)
    return Drawn(name, kind, one.source, sha256, len(different), prompts)


def digest(sets: list[Drawn]) -> str:
    """Returns one hash, in hex, of all prompts that are asked, in their order."""
    return hashlib.sha256("".join(one.sha256 for drawn in sets for one in drawn.prompts).encode()).hexdigest()


def is_harmful(drawn: Drawn) -> bool:
    """Returns whether the prompts of a set are harmful, so that refusing them is wanted."""
    return drawn.kind == HARMFUL
