"""What robosuite was called with for a recording: its cameras, and what older versions took, for robosuite 1.5."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["arguments_before_1_5", "hold_orientation", "is_before_1_5", "recorded_cameras"]

_CAMERA, _SIZE = "agentview", 256  # robosuite's defaults


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
