"""Policies: objects that turn observations into actions and hide their caches and normalisation.

Names are loaded when they are asked for: a policy that was exported shares modules of this package and has no torch.
"""

from typing import TYPE_CHECKING

if __name__ == "policies":
    raise ModuleNotFoundError("no package 'policies' is installed; import 'scd_robot.policies'", name="policies")

if TYPE_CHECKING:
    from scd_robot.policies.causal_dit import CausalDitPolicy
    from scd_robot.policies.choosing import ChoosingPolicy, GoalPicture
    from scd_robot.policies.imagination import Imagination, load_imagination
    from scd_robot.policies.loading import load_policy
    from scd_robot.policies.scd import ScdPolicy
    from scd_robot.policies.surprise import Surprise

__all__ = [
    "CausalDitPolicy",
    "ChoosingPolicy",
    "GoalPicture",
    "Imagination",
    "ScdPolicy",
    "Surprise",
    "load_imagination",
    "load_policy",
]

_MODULES = {
    "CausalDitPolicy": "causal_dit",
    "ChoosingPolicy": "choosing",
    "GoalPicture": "choosing",
    "Imagination": "imagination",
    "ScdPolicy": "scd",
    "Surprise": "surprise",
    "load_imagination": "imagination",
    "load_policy": "loading",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module 'scd_robot.policies' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"scd_robot.policies.{_MODULES[name]}"), name)
