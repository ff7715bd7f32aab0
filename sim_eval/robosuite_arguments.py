"""What robosuite was called with for a recording: its cameras, and what older versions took, for robosuite 1.5.

Arms take actions as changes (deltas) or as absolute poses. Shape: Da action width, of all robots.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scd_robot.errors import ConfigError
from scd_robot.types import ActionKind

__all__ = [
    "action_bounds",
    "action_kind",
    "arguments_before_1_5",
    "hold_orientation",
    "is_before_1_5",
    "recorded_cameras",
    "take_absolute_actions",
    "with_input_types",
]

_CAMERA, _SIZE = "agentview", 256  # robosuite's defaults
_FAR = 10.0  # [m] beyond every arm's reach
_TURNS = 4 * np.pi  # [rad] beyond every joint's range, and every rotation vector of less than two turns


def is_before_1_5(version: str, arguments: Mapping[str, Any]) -> bool:
    """By the version; where that is not told, by controllers that are configured for an arm, not for its parts."""
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers:
        return (int(numbers[1]), int(numbers[2])) < (1, 5)
    configs = _as_list(arguments.get("controller_configs"))
    return any(isinstance(config, Mapping) and "body_parts" not in config for config in configs)


def arguments_before_1_5(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """For robosuite 1.5: controllers in its form that do what they did before."""
    from robosuite.controllers.composite.composite_controller_factory import refactor_composite_controller_config
    from robosuite.models.robots import create_robot

    robots, configs = _as_list(arguments.get("robots")), _as_list(arguments.get("controller_configs"))
    if not configs:
        return {**arguments, "lite_physics": False}
    configs = configs * len(robots) if len(configs) == 1 else configs
    converted = [
        refactor_composite_controller_config({"input_ref_frame": "world", **config}, robot, create_robot(robot).arms)
        for robot, config in zip(robots, configs, strict=True)
    ]
    return {**arguments, "controller_configs": converted, "lite_physics": False}


def with_input_types(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """For robosuite 1.5, which ignores `control_delta` of older OSC controllers and reads `input_type` instead."""
    if "controller_configs" not in arguments:
        return dict(arguments)
    return {**arguments, "controller_configs": _with_input_type(arguments["controller_configs"])}


def _with_input_type(config: Any) -> Any:
    if isinstance(config, list | tuple):
        return [_with_input_type(one) for one in config]
    if not isinstance(config, Mapping):
        return config
    found = {key: _with_input_type(value) for key, value in config.items()}
    if str(found.get("type")).startswith("OSC") and "control_delta" in found:
        delta = found.pop("control_delta")
        found.setdefault("input_type", "delta" if delta else "absolute")
    return found


def take_absolute_actions(environment: Any, name: str) -> None:
    """Lets the arms of a robosuite environment that was just reset take absolute poses (or joint positions).

    Raises:
        ConfigError: the controller of an arm cannot.
    """
    for robot in environment.robots:
        for arm in robot.arms:
            controller = robot.part_controllers[arm]
            if not hasattr(controller, "input_type"):
                raise ConfigError(
                    f"actions=absolute needs arms with an OSC or JOINT_POSITION controller, got {controller.name} in "
                    f"{name}; leave it out"
                )
            controller.input_type = "absolute"


def action_kind(environment: Any) -> ActionKind:
    """What the arms of a robosuite environment that was just reset take; "" where they differ, or take neither."""
    kinds: set[ActionKind] = set()
    for robot in environment.robots:
        for arm in robot.arms:
            controller = robot.part_controllers[arm]
            kind: ActionKind = getattr(controller, "input_type", "")
            if hasattr(controller, "use_delta"):  # inverse kinematics, which has an input_type that means nothing
                kind = "delta" if controller.use_delta else "absolute"
            kinds.add(kind)
    return kinds.pop() if len(kinds) == 1 else ""


def action_bounds(environment: Any) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Lowest and highest action (Da,) of a robosuite environment.

    robosuite's own bounds are those of changes, -1 to 1, for absolute poses [m, rad] as well. Those get wide ones here.
    """
    low, high = (np.array(bound, np.float64) for bound in environment.action_spec)
    start = 0
    for robot in environment.robots:
        for arm in robot.arms:
            controller = robot.part_controllers[arm]
            if getattr(controller, "input_type", "delta") != "absolute" or arm not in robot._action_split_indexes:
                continue
            first, end = (start + place for place in robot._action_split_indexes[arm])
            bound = np.full(end - first, _TURNS)
            if hasattr(controller, "use_ori"):  # OSC: what may come before the pose is stiffness
                bound = np.array([_FAR] * 3 + [_TURNS] * 3)[: 6 if controller.use_ori else 3]
            low[end - len(bound) : end], high[end - len(bound) : end] = -bound, bound
        start += len(robot.action_limits[0])
    return low, high


def recorded_cameras(arguments: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Height and width of the images that a recording observed, by the camera; empty where it observed none."""
    if not arguments.get("use_camera_obs", False):
        return {}
    names = _as_list(arguments.get("camera_names", _CAMERA))
    sizes = [_as_list(arguments.get(f"camera_{side}s", _SIZE)) for side in ("height", "width")]
    heights, widths = (one * len(names) if len(one) == 1 else one for one in sizes)
    return {name: (int(height), int(width)) for name, height, width in zip(names, heights, widths, strict=True)}


def _as_list(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]


def hold_orientation(controller: Any) -> None:
    """Lets an OSC controller keep its goal where an action asks for no rotation, as before robosuite 1.5."""
    if not hasattr(controller, "compute_goal_ori"):
        return
    compute = controller.compute_goal_ori

    def hold(delta: NDArray[Any], goal_update_mode: str | None = None) -> Any:
        if controller.goal_ori is not None and not np.any(delta):
            return controller.goal_ori
        return compute(delta, goal_update_mode)

    controller.compute_goal_ori = hold
