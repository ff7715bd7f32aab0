"""Whether recorded actions ask the arms of a robot for changes or for absolute poses (or joint positions).

Nothing in a file says so as such: the name of the labels does, or the controllers that robosuite was given.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from scd_robot.datasets.hdf5.demos import ACTIONS
from scd_robot.types import ActionKind

__all__ = ["recorded_action_kind"]

_WORDS: dict[str, ActionKind] = {"abs": "absolute", "absolute": "absolute", "rel": "delta", "delta": "delta"}
_ROBOSUITE = 1  # robomimic's number for it
_ARMS = ("arms", "right", "left")
_CONTROLLERS = re.compile(r"OSC_|JOINT_POSITION$|IK_POSE$")


def recorded_action_kind(label: str, metadata: Mapping[str, Any]) -> ActionKind:
    """Of what was read of a robomimic or robosuite file; "" where it does not tell, or tells both.

    Args:
        label: array of the actions, or several joined by "+": robomimic calls "actions_abs" and "action_dict/abs_pos"
            what is absolute, "action_dict/rel_pos" what is not. "actions" are what the environment took.
        metadata: with `env_args` or `env_info`, the arguments of the environment.
    """
    found: set[ActionKind] = set()
    for part in label.split("+"):
        words = re.split(r"[_/]", part)
        found |= _controlled(metadata) if part == ACTIONS else {_WORDS[word] for word in words if word in _WORDS}
    return found.pop() if len(found) == 1 else ""


def _controlled(metadata: Mapping[str, Any]) -> set[ActionKind]:
    arguments = metadata.get("env_args", metadata.get("env_info"))
    if not isinstance(arguments, Mapping) or arguments.get("type", _ROBOSUITE) != _ROBOSUITE:
        return set()
    inner = arguments.get("env_kwargs", arguments)
    configs = inner.get("controller_configs") if isinstance(inner, Mapping) else None
    return set(_of_arms(configs))


def _of_arms(config: Any) -> Iterator[ActionKind]:
    """What the arms' controllers take, of one for all, of a list with one for each robot, or of body parts."""
    if isinstance(config, list | tuple):
        for one in config:
            yield from _of_arms(one)
    elif isinstance(config, Mapping) and isinstance(config.get("body_parts"), Mapping):
        yield from _of_arms([part for name, part in config["body_parts"].items() if name in _ARMS])
    elif isinstance(config, Mapping) and isinstance(config.get("type"), str):
        if _CONTROLLERS.match(config["type"]):
            told = config.get("input_type", "delta" if config.get("control_delta", True) else "absolute")
            yield "absolute" if told == "absolute" else "delta"
    elif isinstance(config, Mapping):  # "arms"
        yield from _of_arms([part for name, part in config.items() if name in _ARMS])
