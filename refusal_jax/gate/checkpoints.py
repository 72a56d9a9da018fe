"""A checkpoint as the source of a gate's replies: a folder, a name on the hub, a GGUF file, or an adapter."""

import functools
import hashlib
import json
import logging
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from refusal_jax.audit.broken import finding_damage, open_checkpoint
from refusal_jax.chat.model import ChatModel, demo_model_path, load_model, weights_dtype
from refusal_jax.chat.prompts import Chat
from refusal_jax.checkpoints.adapters import adapter_mirror, is_adapter, named_base
from refusal_jax.checkpoints.remote import checkpoint_folder
from refusal_jax.endpoints.endpoint import Answer, Kept
from refusal_jax.export.provenance import base_model
from refusal_jax.gate.policy import EMBEDDED, Policy
from refusal_jax.gate.prompts import Asked
from refusal_jax.gate.sources import Live
from refusal_jax.models.hf_config import load_config
from refusal_jax.plan.planner import ON_CPU, WANTED
from refusal_jax.progress import Progress

LOG = logging.getLogger(__name__)


class Checkpoint(Live):
    """A checkpoint that replies greedily. role: "candidate" or "reference". mesh: the devices that it runs on."""

    def __init__(self, name: str, role: str, policy: Policy, mesh: jax.sharding.Mesh | None = None):
        self.name, self.role, self.policy, self.mesh = name, role, policy, mesh

    @functools.cached_property
    def folder(self) -> pathlib.Path:
        """Returns the folder on this machine. Raises UserError if nothing is there, and for an adapter whose base is not,
        BrokenCheckpoint for damaged files."""
        if self.name == EMBEDDED:
            return demo_model_path()
        with finding_damage():
            folder = checkpoint_folder(self.name, adapters=True)
            if not is_adapter(folder):
                open_checkpoint(folder)
                return folder
            return adapter_mirror(folder, checkpoint_folder(named_base(folder)))

    @functools.cache  # noqa: B019, there are two of them
    def identity(self) -> dict[str, Any]:
        """Returns name, revision and fingerprint of the checkpoint, its precision here, and its chat template by hash."""
        template = hashlib.sha256(str(self.chat.tokenizer.chat_template).encode("utf-8", "surrogatepass")).hexdigest()
        named = base_model(self.folder, "the embedded model" if self.name == EMBEDDED else "")
        dtype = weights_dtype(self.policy.dtype)
        return {
            "kind": "checkpoint",
            **named,
            "dtype": dtype,
            "template": self.chat.template_origin,
            "template_sha256": template,
        }

    def concerns(self) -> Sequence[str]:
        return ()

    @functools.cached_property
    def chat(self) -> Chat:
        """Returns the tokenizer with the policy's settings of prompts. Raises UserError as `Chat.load` does."""
        cfg, p = load_config(self.folder), self.policy
        with finding_damage():
            return Chat.load(
                self.folder, cfg.context_length, cfg.vocab_size, p.chat_template, p.thinking, p.system_prompt
            )

    def model(self) -> ChatModel:
        """Loads the model. Raises UserError as `load_model` does."""
        with finding_damage():
            return load_model(self.folder, self.policy.dtype, self.mesh, progress=True, chat=self.chat)

    def answers(self, prompts: Sequence[Asked], kept: Kept | None) -> list[Answer]:
        """Returns the greedy replies. Raises UserError if prompts and replies do not fit the context, and for values that are not
        finite."""
        keys = [self._key(prompt) for prompt in prompts]
        rows = {row["asked"]: row for row in (kept.rows if kept else []) if "asked" in row}
        found = {i: Answer.of(rows[key]["answer"]) for i, key in enumerate(keys) if key in rows}
        todo = [i for i in range(len(prompts)) if i not in found]
        if todo:
            self._ask(prompts, todo, keys, found, kept)
        return [found[i] for i in range(len(prompts))]

    def _ask(
        self, prompts, todo: Sequence[int], keys: Sequence[str], found: dict[int, Answer], kept: Kept | None
    ) -> None:
        """Puts the replies that are not known yet into `found` and the ledger."""
        model, most = self.model(), self.policy.max_new_tokens
        usual = (ON_CPU if jax.default_backend() == "cpu" else WANTED).generation
        batch = model.encode([prompts[i].text for i in todo])
        size = min(self.policy.batch_size or usual, len(todo))
        with Progress(f"replies of the {self.role}", len(prompts), "reply", done=len(found)) as bar:
            for index, ids in model.reply_ids(batch, most, rows=size):
                numbers = [todo[i] for i in index]
                answers = [self._answer(model.chat, row) for row in np.asarray(ids)]
                found.update(zip(numbers, answers, strict=True))
                if kept is not None:
                    kept.append([{"asked": keys[i], "answer": found[i].row} for i in numbers])
                bar.update(len(numbers))

    def _answer(self, chat: Chat, ids: np.ndarray) -> Answer:
        """Returns a reply as a server would give it."""
        (reply,) = chat.replies(ids[None])
        tokens = len(chat.before_end(ids.tolist()))
        ended = tokens < len(ids)
        return Answer(
            reply.text,
            ended,
            "stop" if ended else "length",
            tokens,
            thought=reply.thought,
            thought_ended=reply.finished,
        )

    def _key(self, prompt: Asked) -> str:
        """Returns a hash of all that the reply depends on."""
        depends = [self.identity()["fingerprint"], self.identity()["dtype"], self.policy.max_new_tokens]
        return hashlib.sha256(json.dumps([*depends, self.chat.render(prompt.text)]).encode()).hexdigest()
