"""Policy types by the name that stands in a checkpoint's manifest. A new policy is one file and one line here."""

import importlib
from typing import Any

from scd_robot.errors import ConfigError, UnknownNameError
from scd_robot.model import ScdConfig

__all__ = ["FRAMES", "POLICIES", "checkpoint_type", "policy_class", "policy_type"]

FRAMES = "frames"  # in the place of a policy's name in checkpoints of models of frames

POLICIES = {
    "causal_dit": "scd_robot.policies.causal_dit:CausalDitPolicy",
    "scd": "scd_robot.policies.scd:ScdPolicy",
}


def policy_class(name: str) -> Any:
    """The class registered under `name`; it has a classmethod `from_parts`.

    Raises:
        ConfigError: it is a model of frames.
        UnknownNameError: there is none of that name.
    """
    if name == FRAMES:
        raise ConfigError(
            "this checkpoint imagines frames and plans no actions: show what it imagines with 'scd imagine', or train "
            "a policy with 'scd train image'"
        )
    if name not in POLICIES:
        raise UnknownNameError("policy type", name, POLICIES)
    module, _, attribute = POLICIES[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def policy_type(architecture: str) -> str:
    """The name of the policy that runs models of this architecture, see `ScdConfig`."""
    return {"separable": "scd", "entangled": "causal_dit"}[architecture]


def checkpoint_type(model: ScdConfig) -> str:
    """What stands in the manifest of a checkpoint with such a model: a policy's name, or `FRAMES`."""
    return FRAMES if model.decodes_frames else policy_type(model.architecture)
