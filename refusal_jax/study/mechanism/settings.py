"""The settings of the mechanism's parts, what each means, and their defaults."""

import dataclasses

from refusal_jax.errors import UserError, did_you_mean, field
from refusal_jax.settings import Settings, option


@dataclasses.dataclass
class MechanismSettings(Settings):
    """Every setting of the mechanism, with a section for each part that has settings of its own."""

    parts: tuple[str, ...] = option((), "Parts to do, of those that are listed below; () does all of them")

    def check(self, known: tuple[str, ...]) -> None:
        """Raises UserError for a part that is not among the `known` ones."""
        for part in self.parts:
            if part not in known:
                raise UserError(
                    f"{field('parts')} names {part!r}, which is no part of the mechanism.{did_you_mean(part, known)} The "
                    f"parts are {', '.join(known)}."
                )
