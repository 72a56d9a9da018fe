"""The fields of a request, and which of them a server takes: OpenAI's newer models know `max_tokens` under another name and take
no temperature, and some servers refuse fields that others need."""

import dataclasses
import json
import re
from typing import Any

from refusal_jax.endpoints.endpoint import EndpointSettings
from refusal_jax.endpoints.trouble import Trouble
from refusal_jax.errors import UserError
from refusal_jax.errors import shown as short

# Fields that a server may not know, with the other name under which to send them; "" leaves them out.
OTHER_NAMES = {"max_tokens": "max_completion_tokens", "seed": "", "temperature": "", "stream_options": ""}
NOT_KNOWN = re.compile(
    r"unsupported|not support|unrecogni[sz]ed|unknown|unexpected|extra (field|input)|not permitted|not allowed|deprecated",
    re.IGNORECASE,
)
OURS = ("model", "messages", "max_tokens", "max_completion_tokens", "temperature", "seed", "stream", "n")
CONCERNS = {
    "temperature": "The server takes no temperature, so its replies are sampled and other ones may come next time.",
    "seed": "The server takes no seed.",
}


def extra_fields(text: str) -> dict[str, Any]:
    """Returns the further fields that the setting `extra` holds. Raises UserError for anything but a JSON object, and for fields
    that other settings give."""
    try:
        extra = json.loads(text) if text.strip() else {}
    except ValueError as error:
        raise UserError(f"The endpoint's extra is not JSON ({error}): {short(text)}.") from None
    if not isinstance(extra, dict):
        raise UserError(f"The endpoint's extra is {short(text)}, expected a JSON object.")
    if taken := sorted(set(extra) & set(OURS)):
        raise UserError(
            f"The endpoint's extra holds {', '.join(taken)}. Use the settings of these names; the number of replies is 1."
        )
    return extra


@dataclasses.dataclass
class Fields:
    """The fields of requests. left_out: those of OTHER_NAMES that the server has refused so far."""

    settings: EndpointSettings
    left_out: set[str] = dataclasses.field(default_factory=set)

    def wanted(self, max_tokens: int) -> dict[str, Any]:
        """Returns the fields that say how to reply, in the names that most servers know."""
        extra = extra_fields(self.settings.extra)
        seed = {} if self.settings.seed is None else {"seed": self.settings.seed}
        return {"max_tokens": max_tokens, "temperature": self.settings.temperature, **seed, **extra}

    def sent(self, max_tokens: int) -> dict[str, Any]:
        """Returns the fields, those of streaming too, in the names that this server takes."""
        stream = {"stream": True, "stream_options": {"include_usage": True}} if self.settings.stream else {}
        fields = self.wanted(max_tokens) | stream
        renamed = {OTHER_NAMES[name] if name in self.left_out else name: value for name, value in fields.items()}
        renamed.pop("", None)
        return renamed

    def learn(self, sent: dict[str, Any], trouble: Trouble) -> bool:
        """Notes which of the sent fields a server has refused, and returns whether to send the request again without them."""
        if trouble.code not in (400, 422) or not NOT_KNOWN.search(trouble.detail):
            return False
        named = {name for name in OTHER_NAMES if name in sent and re.search(rf"\b{name}\b", trouble.detail)}
        self.left_out |= named
        return bool(named)

    @property
    def concerns(self) -> list[str]:
        """Returns what a reader should know of the fields that the server has refused."""
        return [CONCERNS[name] for name in sorted(self.left_out & CONCERNS.keys())]
