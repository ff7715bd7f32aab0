"""Small MuJoCo tasks in which memory decides: `scd_memory/cue-reach` and others; and two that do not wait.

Each memory task shows something that matters, hides it for `delay` control steps, and asks for it. Its twin with
`cue_visible=1` asks for the same movements without hiding anything.
"""

from collections.abc import Mapping
from typing import Any

from scd_robot.sim_eval.adapter import read_options
from scd_robot.sim_eval.memory.count_press import CountPress
from scd_robot.sim_eval.memory.cue_reach import CueReach
from scd_robot.sim_eval.memory.dynamic import MovingTarget, TrayBalance
from scd_robot.sim_eval.memory.environment import MemoryEnvironment, MemoryOptions
from scd_robot.sim_eval.memory.hidden_friction import HiddenFriction
from scd_robot.sim_eval.memory.occluded_reach import OccludedReach
from scd_robot.sim_eval.memory.place_back import PlaceBack

__all__ = ["MEMORY_TASKS", "TASKS", "MemoryEnvironment", "MemoryOptions", "make"]

MEMORY_TASKS: dict[str, type[MemoryEnvironment]] = {
    kind.task: kind for kind in (CueReach, PlaceBack, CountPress, OccludedReach, HiddenFriction)
}
_DYNAMIC: dict[str, type[MemoryEnvironment]] = {kind.task: kind for kind in (MovingTarget, TrayBalance)}
TASKS = (*MEMORY_TASKS, *_DYNAMIC)


def make(task: str, options: Mapping[str, Any]) -> MemoryEnvironment:
    """The environment for `scd_memory/TASK:OPTIONS`, see `MemoryOptions`.

    Raises:
        UnknownNameError: no such task or option.
        ConfigError: an option is out of range.
    """
    return (MEMORY_TASKS | _DYNAMIC)[task](read_options(MemoryOptions, options, "scd_memory"))
