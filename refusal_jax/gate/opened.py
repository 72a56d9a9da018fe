"""Opens what a policy names as the kind of source that it is."""

import jax

from refusal_jax.gate.checkpoints import Checkpoint
from refusal_jax.gate.policy import Policy
from refusal_jax.gate.recorded import Recorded, is_record
from refusal_jax.gate.served import Served, is_address
from refusal_jax.gate.sources import Source


def open_candidate(policy: Policy, mesh: jax.sharding.Mesh | None = None) -> Source:
    """Returns the candidate. mesh: the devices that a checkpoint runs on. Raises UserError for settings, addresses and records
    that cannot be used."""
    return _open(policy.candidate, "candidate", policy, mesh)


def open_reference(policy: Policy, mesh: jax.sharding.Mesh | None = None) -> Source | None:
    """Returns the reference, None where the policy names none. Raises UserError as `open_candidate` does."""
    return _open(policy.reference, "reference", policy, mesh) if policy.reference else None


def _open(name: str, role: str, policy: Policy, mesh: jax.sharding.Mesh | None) -> Source:
    if is_address(name):
        where = "endpoint" if role == "candidate" else "reference_endpoint"
        return Served(name, role, policy, policy[where], where)
    return Recorded(name, policy) if is_record(name) else Checkpoint(name, role, policy, mesh)
