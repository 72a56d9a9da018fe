"""Asks a model behind an OpenAI-compatible server.

Requests are sent side by side, and answers come back in the order of the conversations. What may pass (a busy or failing server,
a broken connection, a reply that is cut off) is asked again after a growing wait; what concerns one conversation is a fault of
its answer; what no later request could mend, such as a refused key, is an error at once, as are several faults in a row.
"""

import asyncio
import collections
import concurrent.futures
import dataclasses
import hashlib
import json
import logging
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

from refusal_jax.chat.messages import NONE, SYSTEM_ROLES, as_messages, system_text
from refusal_jax.endpoints import reply
from refusal_jax.endpoints.concerns import Question, Seen, concerns
from refusal_jax.endpoints.endpoint import Answer, Conversation, EndpointSettings, Fault, Identity, Kept, ServerGivenUp
from refusal_jax.endpoints.fields import Fields
from refusal_jax.endpoints.names import in_words, is_same
from refusal_jax.endpoints.pace import Pace
from refusal_jax.endpoints.transport import Transport
from refusal_jax.errors import UserError
from refusal_jax.progress import Progress

LOG = logging.getLogger(__name__)
PATIENCE = 5  # faults in a row after which a server is given up
Result = TypeVar("Result")


class Endpoint:
    """A model behind a server. It may be asked any number of times, and remembers what it has learned of the server."""

    def __init__(self, settings: EndpointSettings):
        """Raises UserError for settings that cannot be used, before anything is sent, and where `openai` is not installed."""
        _check(settings)
        self.settings, self.fields = settings, Fields(settings)
        self.fields.wanted(settings.max_tokens)  # raises for malformed ones
        self.transport = Transport.of(settings)
        self.address = self.transport.address
        self.system = system_text(settings.system_prompt)
        if self.system == NONE:
            raise UserError(
                "An endpoint's system_prompt cannot be 'none': what the server's template writes by itself cannot be taken away "
                "from here. Leave it empty, or give a text."
            )
        if self.address.concern:
            LOG.warning(self.address.concern)
        self.seen = Seen()
        self._listed: dict[str, dict] | None = None
        self._was_listed, self._faults_in_a_row, self._name = False, 0, settings.model

    @property
    def name(self) -> str:
        """Returns the name of the model that requests carry. Raises UserError if no model is set and the server does not list
        exactly one."""
        if not self._name:
            listed = list(self._list() or {})
            if len(listed) != 1:
                found = f"It lists {in_words(listed)}" if listed else "It lists none"
                raise UserError(
                    f"{self.address.url} was asked for its only model. {found}. Set the endpoint's model to one name."
                )
            self._name = listed[0]
        return self._name

    def identity(self) -> Identity:
        """Returns what the server says it serves, by its list of models and by the replies so far.

        Raises UserError if it cannot be reached or does not let us in.
        """
        listed, name = self._list(), self.name
        same = {} if listed is None else {other: entry for other, entry in listed.items() if is_same(name, other)}
        identity = Identity(
            url=self.address.url,
            asked=name,
            listed=None if listed is None else tuple(listed),
            entry=same.get(name) or next(iter(same.values()), {}),
            answered=dict(sorted(self.seen.models.items())),
            fingerprints=dict(sorted(self.seen.fingerprints.items())),
        )
        transport = [self.address.concern] if self.address.concern else []
        return dataclasses.replace(
            identity, concerns=(*transport, *concerns(identity, self.seen), *self.fields.concerns)
        )

    def answers(
        self,
        conversations: Sequence[Conversation],
        max_tokens: int | None = None,
        *,
        title: str = "",
        ledger: Kept | None = None,
        quiet: bool = False,
    ) -> list[Answer]:
        """Asks the model, and returns its answers in the order of the conversations.

        conversations: texts, or lists of messages `{"role", "content"}` of which the last is the user's. max_tokens: of a reply,
        by default the settings'. title: what the progress is called. ledger: keeps replies, not faults, and has those of an
        interrupted run, which are not asked again. quiet: show no progress. Raises UserError for malformed conversations, if
        the server refuses us or the model, and after PATIENCE faults in a row.
        """
        most = self.settings.max_tokens if max_tokens is None else max_tokens
        questions = self._questions(conversations, most)
        kept = {row["asked"]: row for row in (ledger.rows if ledger else []) if "asked" in row}
        found = {i: Answer.of(kept[one.key]["answer"]) for i, one in enumerate(questions) if one.key in kept}
        for i, answer in found.items():
            self.seen.add(answer, questions[i], kept[questions[i].key].get("fingerprint"))
        todo = [i for i in range(len(questions)) if i not in found]
        if todo:
            with Progress(title or f"ask {self.name}", len(questions), "reply", done=len(found), quiet=quiet) as bar:
                _run(self._ask_all(questions, todo, found, ledger, bar))
        return [found[i] for i in range(len(questions))]

    def _questions(self, conversations: Sequence[Conversation], max_tokens: int) -> list[Question]:
        times: collections.Counter[str] = collections.Counter()
        questions, how = [], [self.address.url, self.name, self.fields.wanted(max_tokens)]
        for conversation in conversations:
            messages = as_messages(conversation)
            if messages[-1]["role"] == "assistant":
                raise UserError(
                    "A conversation ends with a message of the assistant, which servers treat in different ways. End it with one "
                    "of the user."
                )
            if self.system and messages[0]["role"] not in SYSTEM_ROLES:
                messages = [{"role": "system", "content": self.system}, *messages]
            digest = hashlib.sha256(json.dumps([*how, messages], sort_keys=True).encode()).hexdigest()
            times[digest] += 1  # who asks the same twice wants two answers
            questions.append(Question(f"{digest}-{times[digest]}", messages, max_tokens))
        return questions

    async def _ask_all(
        self,
        questions: Sequence[Question],
        todo: Sequence[int],
        found: dict[int, Answer],
        ledger: Kept | None,
        bar: Progress,
    ) -> None:
        """Asks the questions that are due, and puts their answers into `found`."""
        pace, waiting = Pace(min(self.settings.concurrency, len(todo))), iter(todo)

        async def work(client: Any) -> None:
            for index in waiting:
                answer, mark = await self._ask(client, questions[index], pace)
                found[index] = answer
                self.seen.add(answer, questions[index], mark)
                if ledger is not None and answer.fault is None:
                    ledger.append([{"asked": questions[index].key, "answer": answer.row, "fingerprint": mark}])
                bar.update()
                self._count(answer, f"{len(found)} of {len(questions)} were asked", ledger is not None)

        async with self.transport.client() as client:
            workers = [asyncio.create_task(work(client)) for _ in range(pace.most)]
            try:
                await asyncio.gather(*workers)
            finally:
                for worker in workers:
                    worker.cancel()
                await asyncio.gather(*workers, return_exceptions=True)

    def _count(self, answer: Answer, done: str, kept: bool) -> None:
        """Counts faults in a row. Raises UserError when they are too many.

        A prompt that is rejected says nothing of a server that has replied to others; filters and calls of tools are answers of a
        kind.
        """
        if answer.kind in (Fault.FILTERED, Fault.TOOL) or (answer.kind is Fault.REJECTED and self.seen.replies):
            return
        self._faults_in_a_row = 0 if answer.fault is None else self._faults_in_a_row + 1
        if self._faults_in_a_row >= PATIENCE:
            self._faults_in_a_row = 0
            again = ", and run the same command again: replies so far are kept" if kept and self.seen.replies else ""
            raise ServerGivenUp(
                f"{self.address.url} gave no reply to {PATIENCE} conversations in a row ({done}). The last time, {answer.fault}. "
                f"Check the server's log, and that it serves {self.name}{again}."
            )

    async def _ask(self, client: Any, question: Question, pace: Pace) -> tuple[Answer, str | None]:
        """Returns the answer to one question and the server's mark of its configuration. Raises UserError for what no later
        request could mend."""
        while True:
            fields = self.fields.sent(question.max_tokens)

            async def request(fields=fields) -> tuple[Answer, str | None]:
                body = await self.transport.chat(client, self.name, question.messages, fields)
                return reply.answer(body, self.address, question.max_tokens), reply.fingerprint(body, self.address)

            sent = await self.transport.send(request, pace)
            if sent.result is not None:
                answer, mark = sent.result
                return dataclasses.replace(answer, attempts=sent.attempts, seconds=sent.seconds), mark
            trouble = sent.trouble
            assert trouble is not None
            if not self.fields.learn(fields, trouble):
                return Answer(
                    None, attempts=sent.attempts, seconds=sent.seconds, fault=trouble.said, kind=trouble.kind
                ), None

    def _list(self) -> dict[str, dict] | None:
        """Returns what the server says of each model that it lists, by name; None if it gives no list. It is asked once."""
        if not self._was_listed:
            self._listed, self._was_listed = _run(self._models()), True
        return self._listed

    async def _models(self) -> dict[str, dict] | None:
        async with self.transport.client() as client:
            sent = await self.transport.send(lambda: self.transport.models(client), Pace(1))
        trouble = sent.trouble
        if trouble is not None and trouble.kind in (Fault.CONNECTION, Fault.TIMEOUT, Fault.BUSY):
            raise ServerGivenUp(
                f"{self.address.url} was asked which models it serves, and {trouble.said}. Check the address, and that the "
                "server runs."
            )
        if trouble is not None:
            LOG.info(f"{self.address.url} gives no list of models: {trouble.said}.")
        return sent.result


def _run(work: Coroutine[Any, Any, Result]) -> Result:
    """Runs asynchronous work to its end, also where an event loop already runs, as in notebooks and in Inspect."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, work).result()


def _check(settings: EndpointSettings) -> None:
    """Raises UserError for numbers that make no sense."""
    for name, least in (("max_tokens", 1), ("retries", 0), ("concurrency", 1), ("temperature", 0), ("wait_s", 0)):
        if not settings[name] >= least:
            raise UserError(f"The endpoint's {name} is {settings[name]}, expected at least {least}.")
    if not settings.timeout_s > 0:
        raise UserError(f"The endpoint's timeout_s is {settings.timeout_s}, expected more than 0 seconds.")
