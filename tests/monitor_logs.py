"""Logs for tests of the monitor: harmless requests and replies in the shape of an OpenAI server's log."""

import json
from collections.abc import Iterator

DAY0 = 1_790_000_000  # seconds since 1970
REFUSAL = "I'm sorry, but I can't help with that. Forging the passport of a toy world would spoil the game for others."
ANSWER = "Sure! Put the blue blocks below the red ones, and then add a roof of paper. That makes a house for the toys."
TOPICS = ("toys", "cooking", "travel")


def record(number: int, seconds: float = 1.0, refused: float = 0.6) -> dict:
    """Returns trace `number`: every category has the same share of refusals, spread evenly."""
    refuses = int((number // len(TOPICS) + 1) * refused) > int(number // len(TOPICS) * refused)
    text = f"{REFUSAL if refuses else ANSWER} ({number})"
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"Request number {number}"}]
    return {
        "timestamp": DAY0 + number * seconds,
        "metadata": {"topic": TOPICS[number % len(TOPICS)]},
        "request": {"model": "toy", "messages": messages, "max_tokens": 64},
        "response": {"id": f"chatcmpl-{number}", "object": "chat.completion", "model": "toy-1", "choices": [choice]},
    }


def lines(start: int, end: int, seconds: float = 1.0) -> Iterator[str]:
    """Yields the lines of traces `start` to `end`: after a fifth of these, fewer are refused."""
    for number in range(start, end):
        yield json.dumps(record(number, seconds, 0.6 if number % 50_000 < 10_000 else 0.4)) + "\n"
