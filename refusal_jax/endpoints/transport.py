"""Sends requests through the `openai` client, asks again what may pass, and keeps to the server's pace."""

import asyncio
import contextlib
import dataclasses
import importlib.util
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Generic, TypeVar

from refusal_jax.endpoints import reply
from refusal_jax.endpoints.address import Address
from refusal_jax.endpoints.endpoint import EndpointSettings, Fault
from refusal_jax.endpoints.pace import Pace
from refusal_jax.endpoints.trouble import Trouble, of_exception
from refusal_jax.errors import UserError

LOG = logging.getLogger(__name__)
TIMEOUT_ATTEMPTS = 2  # a reply that took too long will mostly do so again
NO_LIST = (404, 405, 422, 500, 501)  # how servers say that they list no models; transformers' fails without a cache
LONGEST_BACKOFF = 30.0  # seconds
Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True)
class Sent(Generic[Result]):
    """Holds what came of a request: `result`, or the trouble of the last attempt. attempts: how often it was sent; seconds:
    how long the last took."""

    result: Result | None
    trouble: Trouble | None
    attempts: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class Transport:
    """The way to one server."""

    settings: EndpointSettings
    address: Address

    @classmethod
    def of(cls, settings: EndpointSettings) -> "Transport":
        """Returns the way to the server that settings name. Raises UserError as `Address.of`, and without `openai`."""
        if importlib.util.find_spec("openai") is None:
            raise UserError(
                "Endpoints need the openai client, which is not installed: pip install 'refusal-jax[endpoints]'."
            )
        return cls(settings, Address.of(settings))

    @contextlib.asynccontextmanager
    async def client(self) -> AsyncIterator[Any]:
        """Yields a client. Of the environment's settings for OpenAI, other servers get only OPENAI_CUSTOM_HEADERS."""
        import openai

        foreign = () if self.address.of_openai else ("OpenAI-Organization", "OpenAI-Project")
        headers: Any = {name: openai.Omit() for name in foreign}
        # A proxy of the environment knows no way to this machine.
        http = openai.DefaultAsyncHttpxClient(timeout=self.settings.timeout_s, trust_env=not self.address.local)
        async with openai.AsyncOpenAI(
            api_key=self.address.key or "none",  # else it would take OPENAI_API_KEY, which is not for this server
            base_url=self.address.url,
            timeout=self.settings.timeout_s,
            max_retries=0,  # `send` knows of replies that are cut off and of the other requests
            default_headers=headers,
            http_client=http,
        ) as client:
            yield client

    async def send(self, request: Callable[[], Awaitable[Result]], pace: Pace) -> Sent[Result]:
        """Sends a request until it succeeds, or until its trouble will not pass. Raises UserError for what no later request could
        mend."""
        attempt = 0
        while True:
            attempt += 1
            async with pace.turn():
                started = time.monotonic()
                try:
                    result, trouble = await self._once(request), None
                except Trouble as found:
                    result, trouble = None, found
            seconds = round(time.monotonic() - started, 3)
            if trouble is None:
                pace.replied()
                return Sent(result, None, attempt, seconds)
            most = self.settings.retries + 1
            most = min(most, TIMEOUT_ATTEMPTS) if trouble.kind is Fault.TIMEOUT else most
            if not trouble.passing or attempt >= most:
                return Sent(None, trouble, attempt, seconds)
            wait = trouble.wait
            if wait is None:
                wait = min(self.settings.wait_s * 2 ** (attempt - 1), LONGEST_BACKOFF)
            LOG.info(f"{self.address.url}: {trouble.said}; attempt {attempt + 1} of {most} begins in {wait:.1f} s.")
            if trouble.kind is Fault.BUSY or trouble.wait is not None:
                pace.busy(wait)
            await asyncio.sleep(wait)

    async def _once(self, request: Callable[[], Awaitable[Result]]) -> Result:
        try:
            async with asyncio.timeout(self.settings.timeout_s):
                return await request()
        except (Trouble, UserError):
            raise
        except Exception as error:
            raise of_exception(error, self.address, self.settings.timeout_s) from None

    async def chat(self, client: Any, model: str, messages: list[dict[str, str]], fields: dict[str, Any]) -> Any:
        """Returns the body of a reply; `fields` with "stream" streams it. Raises Trouble for what is no whole body, and
        whatever the client raises."""
        asked = {"model": model, "messages": messages, "extra_headers": self._headers()}
        if fields.get("stream"):
            rest = {name: value for name, value in fields.items() if name != "stream"}
            async with await client.chat.completions.create(**asked, extra_body=rest, stream=True) as chunks:
                return await reply.gathered(chunks)
        raw = await client.chat.completions.with_raw_response.create(**asked, extra_body=fields)
        return reply.parsed(raw.text, self.address)

    async def models(self, client: Any) -> dict[str, dict] | None:
        """Returns what the server says of each model that it lists, by name; None if it gives no list."""
        import openai

        try:
            raw = await client.models.with_raw_response.list(extra_headers=self._headers())
        except openai.APIStatusError as error:
            if error.status_code not in NO_LIST:
                raise
            LOG.info(f"{self.address.url} gives no list of models (status {error.status_code}).")
            return None
        return reply.models(reply.parsed(raw.text, self.address), self.address)

    def _headers(self) -> dict[str, Any]:
        import openai

        return {} if self.address.key else {"Authorization": openai.Omit()}
