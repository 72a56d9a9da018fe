"""A model behind an OpenAI-compatible server as the source of a gate's replies."""

from collections.abc import Sequence
from typing import Any

from refusal_jax.endpoints.client import Endpoint
from refusal_jax.endpoints.endpoint import Answer, EndpointSettings, Kept
from refusal_jax.errors import UserError, field
from refusal_jax.gate.policy import Policy
from refusal_jax.gate.prompts import Asked
from refusal_jax.gate.sources import Live

ADDRESS = ("http://", "https://")


def is_address(name: str) -> bool:
    """Returns whether a policy names a server rather than a checkpoint or a recorded run."""
    return name.startswith(ADDRESS)


class Served(Live):
    """A model behind a server. name: its address with the model's name, `http://HOST:PORT#MODEL`; without a name it is the only
    model of the server. role: "candidate" or "reference". section: the policy's settings of the server, called `where`."""

    def __init__(self, name: str, role: str, policy: Policy, section: EndpointSettings, where: str):
        """Raises UserError as `Endpoint` does, and for settings that the policy has elsewhere."""
        self.name, self.role = name, role
        default = type(section)()
        for own, elsewhere in (("url", role), ("max_tokens", "max_new_tokens"), ("system_prompt", "system_prompt")):
            if section[own] != default[own]:
                raise UserError(
                    f"{field(f'{where}.{own}')} is set, but a gate takes it from {field(elsewhere)}, which holds for both "
                    "models that are compared. Set that."
                )
        settings = EndpointSettings.of(section.to_dict())
        settings.url, _, model = name.partition("#")
        settings.model = model or settings.model
        settings.max_tokens, settings.system_prompt = policy.max_new_tokens, policy.system_prompt
        self.endpoint = Endpoint(settings)

    def identity(self) -> dict[str, Any]:
        """Returns what the server says it serves, with the names and marks that came with the replies so far."""
        record = self.endpoint.identity().record
        return {"kind": "endpoint", **{name: value for name, value in record.items() if name != "concerns"}}

    def concerns(self) -> Sequence[str]:
        return self.endpoint.identity().concerns

    def answers(self, prompts: Sequence[Asked], kept: Kept | None) -> list[Answer]:
        """Returns the server's answers. Raises UserError if it cannot be reached, does not let us in, or stops answering."""
        title = f"replies of the {self.role}"
        return self.endpoint.answers([prompt.text for prompt in prompts], title=title, ledger=kept)
