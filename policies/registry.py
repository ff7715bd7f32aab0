"""Policy types by the name that stands in a checkpoint's manifest. A new policy is one file and one line here."""

import importlib
from typing import Any

from scd_robot.errors import UnknownNameError

__all__ = ["POLICIES", "policy_class", "policy_type"]

POLICIES = {
    "causal_dit": "scd_robot.policies.causal_dit:CausalDitPolicy",
    "scd": "scd_robot.policies.scd:ScdPolicy",
}


def policy_class(name: str) -> Any:
    """The class registered under `name`; it has a classmethod `from_parts`."""
    if name not in POLICIES:
        raise UnknownNameError("policy type", name, POLICIES)
    module, _, attribute = POLICIES[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def policy_type(architecture: str) -> str:
    """The name of the policy that runs models of this architecture, see `ScdConfig`."""
    return {"separable": "scd", "entangled": "causal_dit"}[architecture]
