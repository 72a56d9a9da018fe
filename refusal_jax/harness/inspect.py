"""The Inspect provider `refusal_jax`: a checkpoint, with edits as model arguments, on the devices that JAX finds.

    inspect eval TASK --model refusal_jax/DIR -M ablate=runs/mine

DIR is the folder of an HF checkpoint (an absolute one after two slashes), or `study` for the model that the study of the edit ran
on and, with no edit, the embedded one. -M takes the arguments of `edited.read_arguments` and batch_size. Samples that Inspect
evaluates at the same time (--max-connections, default the batch size) are answered in batches. A thought before the reply becomes
a reasoning part of the message, so scorers see the reply alone.
"""

import dataclasses
import time
from collections.abc import Sequence
from functools import partial

import anyio
import anyio.to_thread
from inspect_ai.model import (
    ChatCompletionChoice,
    ChatMessage,
    ChatMessageAssistant,
    ContentReasoning,
    ContentText,
    GenerateConfig,
    ModelAPI,
    ModelOutput,
    ModelUsage,
    modelapi,
)
from inspect_ai.tool import ToolChoice, ToolInfo

from refusal_jax.chat import thoughts
from refusal_jax.errors import UserError, spelt
from refusal_jax.harness.edited import ARGUMENTS, EditedModel, Reply

OF_THE_STUDY = "study"
MAX_TOKENS = 512  # of a reply, where the task does not say
GATHER_SECONDS = 0.05  # what is asked within this time after another becomes one batch with it
# Settings that would change replies, with the values at which they do not.
SAMPLING = {
    "temperature": (0,),
    "top_p": (1,),
    "top_k": (1,),
    "num_choices": (1,),
    "best_of": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "response_schema": (),
}


@dataclasses.dataclass(eq=False)
class Asked:
    """A prompt as token ids, how its reply is to end, and the reply or what went wrong, once that is known."""

    ids: list[int]
    max_tokens: int
    stops: Sequence[str]
    answer: Reply | Exception | None = None


@modelapi(name="refusal_jax")
class RefusalJaxAPI(ModelAPI):
    """Greedy replies; whoever finds the model free answers for all that wait."""

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig = GenerateConfig(),  # noqa: B008, as ModelAPI has it
        batch_size: int = 32,
        **edited,
    ):
        """Makes the provider. edited: the arguments of `edited.read_arguments`. Raises UserError for anything that
        cannot be used."""
        super().__init__(model_name, base_url, api_key, [], config)
        if not isinstance(batch_size, int) or batch_size < 1:
            raise UserError(f"batch_size = {batch_size}: give a number of rows.")
        if model_name != OF_THE_STUDY:
            edited = {"pretrained": model_name} | edited
        with spelt(model_argument):
            self.batch_size, self.edited = batch_size, EditedModel.load(edited)
        self.waiting: list[Asked] = []
        self.free = anyio.Lock()

    @property
    def about(self) -> dict:
        """Returns what the log says of a reply: the edits, and the checkpoint's settings that it was or was not decoded with."""
        model = self.edited.model
        record = model.settings.record(model.decoding is not None)
        settings = {"generation_settings": record} if record["applied"] or record["left_out"] else {}
        return ({"edits": self.edited.about} if self.edited.about else {}) | settings

    def max_tokens(self) -> int:
        return MAX_TOKENS

    def max_connections(self) -> int:
        return self.batch_size

    async def count_text_tokens(self, text: str) -> int:
        return len(self.edited.model.chat.ids(text))

    async def generate(
        self, input: list[ChatMessage], tools: list[ToolInfo], tool_choice: ToolChoice, config: GenerateConfig
    ) -> ModelOutput:
        """Returns the greedy reply to a conversation of texts. Raises UserError for tools, other content, and
        sampling."""
        started = time.monotonic()
        if tools:
            raise UserError(
                f"The task gives the model tools ({', '.join(tool.name for tool in tools)}), and this provider has none. Use "
                "tasks without tools."
            )
        refuse_sampling(config)
        chat = self.edited.model.chat
        with spelt(model_argument):
            prompt = self.edited.rendered([as_text(message) for message in input])
        ids = chat.ids(prompt)
        room = chat.context_length - len(ids)
        if room < 1:
            return ModelOutput.from_content(
                self.model_name, "", "model_length", f"The prompt has {len(ids)} of {chat.context_length} tokens."
            )
        asked = Asked(ids, min(config.max_tokens or MAX_TOKENS, room), config.stop_seqs or ())
        reply = await self._answered(asked)
        parts = thoughts.split(reply.text, thoughts.opened_by(prompt))
        content = parts.text
        if parts.inner:
            content = [ContentReasoning(reasoning=parts.inner), ContentText(text=parts.text)]
        message = ChatMessageAssistant(content=content, model=self.model_name, source="generate")
        choice = ChatCompletionChoice(message=message, stop_reason="stop" if reply.ended else "max_tokens")
        usage = ModelUsage(input_tokens=len(ids), output_tokens=reply.tokens, total_tokens=len(ids) + reply.tokens)
        return ModelOutput(
            model=self.model_name,
            choices=[choice],
            usage=usage,
            time=time.monotonic() - started,
            metadata=self.about or None,
        )

    async def _answered(self, asked: Asked) -> Reply:
        self.waiting.append(asked)
        try:
            await anyio.sleep(GATHER_SECONDS)
            async with self.free:
                if asked.answer is None:  # nobody took it into a batch
                    alike = [
                        other for other in self.waiting if other.max_tokens == asked.max_tokens and other is not asked
                    ]
                    batch = [asked, *alike[: self.batch_size - 1]]
                    self.waiting = [other for other in self.waiting if other not in batch]
                    await anyio.to_thread.run_sync(partial(self._answer, batch))
        finally:
            self.waiting = [other for other in self.waiting if other is not asked]
        if isinstance(asked.answer, Exception):
            raise asked.answer
        assert asked.answer is not None  # `_answer` sets it, in this batch or in another's
        return asked.answer

    def _answer(self, batch: list[Asked]) -> None:
        """Sets the answers of a batch, in a thread of its own so that Inspect goes on."""
        part = [asked.ids for asked in batch], batch[0].max_tokens, [asked.stops for asked in batch]
        try:
            answers: Sequence = self.edited.replies(*part, self.batch_size, show_marks=True)
        except Exception as error:  # which all of them are told
            answers = [error] * len(batch)
        for asked, answer in zip(batch, answers, strict=True):
            asked.answer = answer


def model_argument(name: str) -> str | None:
    """Spells settings as Inspect takes them, for `errors.spelt`."""
    return f"-M {name}=" if name in ARGUMENTS else None


def refuse_sampling(config: GenerateConfig) -> None:
    """Raises UserError for settings that would change what greedy decoding gives."""
    found = {name: getattr(config, name, None) for name in SAMPLING}
    wrong = [f"{name} = {value}" for name, value in found.items() if value is not None and value not in SAMPLING[name]]
    if wrong:
        raise UserError(f"{', '.join(wrong)}: this provider decodes greedily and gives texts alone. Leave it out.")


def as_text(message: ChatMessage) -> dict[str, str]:
    """Returns a message in the form that chat templates take, with thoughts in <think> and </think>, which templates
    know to leave out of earlier turns. Raises UserError for anything but text."""
    kinds = (
        []
        if isinstance(message.content, str)
        else sorted({part.type for part in message.content} - {"text", "reasoning"})
    )
    if kinds or message.role == "tool":
        what = " and ".join(kinds) or "a tool's result"
        raise UserError(f"A message of the task holds {what}: this provider reads text only. Use another task.")
    if isinstance(message.content, str):
        return {"role": message.role, "content": message.content}
    parts = (
        f"<think>\n{part.reasoning}\n</think>\n" if isinstance(part, ContentReasoning) else getattr(part, "text", "")
        for part in message.content
    )
    return {"role": message.role, "content": "\n".join(parts)}
