"""Defines what takes part in the monitor's loop: parts that keep state, and carriers of the messages that these send.

A part is told of every batch, before it is committed. Its state and its messages are kept in the same transaction as the offsets
and the counts, so that after a crash at any moment each batch was either taken by all or by none. A carrier then takes the
messages from the store's outbox to a file, a page or an address; it may be given a message again after a crash.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

from refusal_jax.monitor.traces import Judgements


class Message(NamedTuple):
    """Something that a part sends. channel: the carrier that it is for, such as "alerts" or "trail". content: a JSON object."""

    channel: str
    content: dict


class Letter(NamedTuple):
    """A message in the outbox. number: grows by at least one from letter to letter, is never used again, and stays the same
    when a letter is delivered twice."""

    number: int
    content: dict


@runtime_checkable
class Part(Protocol):
    """Something that keeps state from batch to batch.

    name: the owner of its state in the store.
    """

    name: str

    def restore(self, state: Mapping[str, dict]) -> None:
        """Takes up the state that the last committed batch left, `{key: JSON object}`; it is empty at the first start."""

    def take(self, batch: Judgements, sent: Sequence[Message]) -> Sequence[Message]:
        """Takes one batch, and returns what is to be sent. sent: what the parts before this one send of the same batch."""
        ...

    def changed(self) -> Mapping[str, dict]:
        """Returns the keys of the state that the last `take` has changed, with their new values."""
        ...


@runtime_checkable
class Carrier(Protocol):
    """Something that takes messages out of the outbox, after they are committed. channel: which of them."""

    channel: str

    def deliver(self, letters: Sequence[Letter]) -> int:
        """Delivers letters in their order, and returns how many of them are done with, which are then deleted; the others are
        given again later. It is called after each batch with what is there, at most `store.AT_ONCE`, and not where there is
        nothing. It must not wait long."""
        ...

    def close(self) -> None:
        """Ends what the carrier holds open."""
