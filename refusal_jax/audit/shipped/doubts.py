"""Why a candidate cannot be called intact although its weights and its replies are as they should be: what lies beside the
weights changes the model that people run, or the comparison was with another model than it seemed."""

from collections.abc import Mapping
from typing import Any

from refusal_jax.audit.shipped.template import KINDS

COMMON = "other_system_prompt"  # which many harmless fine-tunes have


def doubts(facts: Mapping[str, Any]) -> list[str]:
    """Returns the reasons that the facts of the lane "files" give, whole sentences."""
    found = []
    tampering = [KINDS[kind] for kind in facts.get("template_tampering") or () if kind in KINDS and kind != COMMON]
    if tampering:
        found.append(f"The chat template {' and '.join(tampering)}.")
    if facts.get("template_broken"):
        found.append("The candidate's own chat template cannot render a prompt; replies were made with another one.")
    bans = [one["name"] for one in facts.get("hidden_controls") or () if one.get("refusal")]
    if bans:
        found.append(
            f"The generation settings ({', '.join(bans)}) keep replies from beginning as refusals do. Programs that use them get "
            "other replies than were judged here."
        )
    if facts.get("beside"):
        found.append(
            f"Beside the weights there is {', '.join(facts['beside'])}, which changes the model where it is used. The weights "
            "alone were audited."
        )
    if facts.get("base_origin") == "other":
        found.append("The base's files are not those that the hub has under its name, so being like it shows nothing.")
    if facts.get("contradiction"):
        found.append(
            "The candidate is a copy of the base, and its files say that refusal was removed, so the base may be edited itself."
        )
    return found
