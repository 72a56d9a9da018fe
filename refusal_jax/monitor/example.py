"""Writes a log to try the monitor on: what the embedded model replied over thirty days, of which the last ten had a fault.

In these ten, a third of the replies come from a replica whose weights were edited: its refusal direction is ablated. Requests are
the bundled ones, whose harm is one of a toy world.
"""

import json
import pathlib
import random
import time as clock

from refusal_jax.chat.model import demo_model_path, load_model
from refusal_jax.data.prompts import BUNDLED, read_prompts
from refusal_jax.data.sources import resolve
from refusal_jax.edits import Edits
from refusal_jax.files import write_atomically
from refusal_jax.organism.direction import embedded_direction

DAYS, FAULTY, A_DAY = 30, 10, 200  # days in all and with the fault; requests of each category a day
EDITED = 1 / 3  # share of replies of the edited replica
PROMPTS, TOKENS = 50, 32  # different requests of each category; most tokens of a reply
DAY = 86400.0
CATEGORIES = ("harmful", "harmless")


def write_example(path: pathlib.Path, now: float | None = None) -> int:
    """Writes the log as JSON lines of requests and replies of the OpenAI API, and returns their number. now: when its last day
    ends, in seconds since 1970; by default the present. Raises UserError if the file cannot be written."""
    end = clock.time() if now is None else now
    replies = _replies()
    rng, lines = random.Random(0), []
    for day in range(DAYS):
        for number in range(A_DAY):
            time = end - (DAYS - day) * DAY + number * DAY / A_DAY
            for category in CATEGORIES:
                edited = day >= DAYS - FAULTY and rng.random() < EDITED
                prompt, plain, other = rng.choice(replies[category])
                name = f"{day}-{number}-{category}"
                lines.append(_line(name, time, category, prompt, other if edited else plain))
    write_atomically(path, "".join(lines).encode())
    return len(lines)


def _replies() -> dict[str, list[tuple[str, str, str]]]:
    """Returns requests by category, each with the replies of the model and of its edited replica."""
    model = load_model(demo_model_path())
    edits = Edits.ablate(embedded_direction(model).raw_jd[None])
    found = {}
    for category in CATEGORIES:
        prompts = [row["instruction"] for row in read_prompts(resolve(BUNDLED, f"{category}_test"))[:PROMPTS]]
        found[category] = list(
            zip(prompts, model.generate(prompts, TOKENS), model.generate(prompts, TOKENS, edits), strict=True)
        )
    return found


def _line(name: str, time: float, category: str, prompt: str, reply: str) -> str:
    request = {
        "model": "embedded",
        "messages": [{"role": "user", "content": prompt}],
        "metadata": {"category": category},
    }
    message = {"role": "assistant", "content": reply}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    response = {"id": name, "model": "embedded", "created": int(time), "choices": [choice]}
    return json.dumps({"timestamp": round(time, 3), "request": request, "response": response}) + "\n"
