"""What a checkpoint replies to the prompts of an audit; of the base once for all its candidates, in memory or in a file."""

import dataclasses
import hashlib
import json
import logging
import pathlib
from collections.abc import Sequence

import jax

from refusal_jax.audit.settings import AuditSettings
from refusal_jax.audit.subject import Subject
from refusal_jax.chat.model import ChatModel
from refusal_jax.checkpoints.fingerprint import checkpoint_fingerprint
from refusal_jax.errors import UserError, setting
from refusal_jax.files import local_path, read_json, write_atomically
from refusal_jax.plan.planner import ON_CPU, WANTED
from refusal_jax.progress import Progress

LOG = logging.getLogger(__name__)
SIDES = ("harmful", "harmless")
BASE = "replies of the base"  # the key of what candidates of one base share
Completions = dict[str, list[dict]]  # of each side, in the order of its test prompts


def batch_rows(settings: AuditSettings, stage: str) -> int:
    """Returns the rows of a batch: what the settings ask for, else as many as a study begins with on such devices.

    stage: "forward" or "generation".
    """
    return settings.batch_size or getattr(ON_CPU if jax.default_backend() == "cpu" else WANTED, stage)


def completions(model: ChatModel, subject: Subject, title: str) -> Completions:
    """Returns the greedy replies to the test prompts, as rows `{"category", "prompt", "response", …}` of each side; a
    response is what follows the thought.

    Raises UserError if prompts and replies do not fit the model's context, and for values that are not finite.
    """
    settings, prompts = subject.settings, subject.prompts
    todo = [(side, text) for side in SIDES for text in prompts[f"{side}_test"]]
    if settings.min_new_tokens:
        model = model.decoded(False, min_new_tokens=settings.min_new_tokens)
    rows, batch = min(batch_rows(settings, "generation"), len(todo)), model.encode([text for _, text in todo])
    found: dict[int, dict] = {}
    with Progress(title, len(todo), "reply") as bar:
        for index, ids in model.reply_ids(batch, settings.max_new_tokens, rows=rows):
            found |= {i: reply.row for i, reply in zip(index, model.chat.replies(ids), strict=True)}
            bar.update(len(index))
    replied: Completions = {side: [] for side in SIDES}
    for i, (side, text) in enumerate(todo):
        replied[side].append({"category": None, "prompt": text} | model.chat.told | found[i])
    return replied


def base_completions(subject: Subject) -> Completions:
    """Returns the base's replies: those of an earlier candidate of the same base, or those in the settings' file, or new ones,
    which are written to that file.

    Raises UserError as `completions` does, and for a file of other replies than these.
    """
    if BASE not in subject.shared:
        kept = subject.settings.base_replies
        subject.shared[BASE] = _filed(subject, local_path(kept)) if kept else _new(subject)
    return subject.shared[BASE]


def _new(subject: Subject) -> Completions:
    return completions(subject.base.model, subject, "replies of the base")


@dataclasses.dataclass(frozen=True)
class Origin:
    """What replies depend on. checkpoint: its fingerprint. prompts: a hash of their texts as the template renders them."""

    checkpoint: str
    prompts: str
    dtype: str
    max_new_tokens: int
    min_new_tokens: int

    @classmethod
    def of(cls, subject: Subject) -> "Origin":
        """Returns the origin of the base's replies."""
        settings, base = subject.settings, subject.base
        texts = [base.model.chat.render(text) for side in SIDES for text in subject.prompts[f"{side}_test"]]
        hashed = hashlib.sha256(json.dumps(texts).encode()).hexdigest()
        dtype = str(base.model.decoder.dtype)
        return cls(checkpoint_fingerprint(base.folder), hashed, dtype, settings.max_new_tokens, settings.min_new_tokens)


def _filed(subject: Subject, path: pathlib.Path) -> Completions:
    """Returns the replies in a file, which is written if it is not there. Raises UserError if it holds others."""
    origin = dataclasses.asdict(Origin.of(subject))
    if not path.exists():
        replied = _new(subject)
        content = {"origin": origin, "completions": replied}
        write_atomically(path, json.dumps(content, indent=1, ensure_ascii=False).encode())
        return replied
    content = read_json(path)
    held = content.get("origin")
    differing = [name for name, value in origin.items() if not isinstance(held, dict) or held.get(name) != value]
    if differing or not _complete(content.get("completions"), subject):
        raise UserError(
            f"{path} does not hold the base's replies to these prompts (other {', '.join(differing) or 'completions'}). Name "
            f"another file for {setting('base_replies') or 'base_replies'}, which is then written, or remove this one."
        )
    LOG.info(f"The base's replies are those of {path}.")
    return content["completions"]


def _complete(replied, subject: Subject) -> bool:
    """Returns whether what a file holds is one row with a response for each prompt, in their order."""

    def fits(rows, texts: Sequence[str]) -> bool:
        return isinstance(rows, list) and [
            row.get("prompt") if isinstance(row, dict) and isinstance(row.get("response"), str) else None
            for row in rows
        ] == list(texts)

    return isinstance(replied, dict) and all(fits(replied.get(s), subject.prompts[f"{s}_test"]) for s in SIDES)
