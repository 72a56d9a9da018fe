"""How fast a server is asked: requests at the same time, and pauses that it asks for, which all requests keep."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

REPLIES_UNTIL_FASTER = 16


class Pace:
    """The pace of one batch of requests. A busy server halves the number of requests at the same time, and many replies in a row
    raise it again, up to `most`."""

    def __init__(self, most: int):
        self.most = self.limit = most
        self.active = self.replies = 0
        self.until = 0.0
        self.changed = asyncio.Condition()

    @contextlib.asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Waits until a request may be sent, and counts it as active inside."""
        async with self.changed:
            await self.changed.wait_for(lambda: self.active < self.limit)
            self.active += 1
        try:
            while (left := self.until - time.monotonic()) > 0:
                await asyncio.sleep(left)
            yield
        finally:
            async with self.changed:
                self.active -= 1
                self.changed.notify_all()

    def replied(self) -> None:
        """Notes a reply."""
        self.replies += 1
        if self.replies % REPLIES_UNTIL_FASTER == 0:
            self.limit = min(self.limit + 1, self.most)

    def busy(self, wait: float) -> None:
        """Notes that the server asks to be left alone for so many seconds."""
        self.limit, self.replies = max(1, self.limit // 2), 0
        self.until = max(self.until, time.monotonic() + wait)
