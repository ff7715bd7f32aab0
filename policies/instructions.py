"""What a policy is told apart from what it observes: its task, in words, and a goal.

Shapes: B rows, n numbers of a task's vector.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scd_robot.errors import ConfigError, ShapeError, UnknownNameError
from scd_robot.policies.inputs import as_float32
from scd_robot.transforms import GOAL, TASK
from scd_robot.types import ArraySpec, Observation

__all__ = ["Instructions"]


class Instructions:
    """The task and the goal of a policy, and what its model sees of them.

    Args:
        tasks: vectors (n,) by the words of the tasks; none = the model is shown no task.
        task: which; None = not told, or the only one.
        goal: by observation key as recorded (without "goal.") and without a batch axis; None = observations bring it.
        sources: the recording's keys of what the model takes.
        recorded: their specifications.

    Attributes:
        tasks: as given.
        goal: as given, by "goal.KEY".

    Raises:
        UnknownNameError: a task that is none of these, or a goal that the model is not shown.
        ShapeError: a goal of another shape or type than it is recorded with.
    """

    def __init__(
        self,
        tasks: Mapping[str, Sequence[float]],
        task: str | None,
        goal: Observation | None,
        sources: Iterable[str],
        recorded: Mapping[str, ArraySpec],
    ) -> None:
        self.tasks = tasks
        self._sources = tuple(sources)
        self.goal = _checked_goal(goal or {}, self._sources, recorded)
        self._task = next(iter(tasks)) if len(tasks) == 1 else None
        if task is not None:
            self.task = task

    @property
    def task(self) -> str | None:
        """In words; None = not told yet."""
        return self._task

    @task.setter
    def task(self, text: str) -> None:
        self.vector(text)
        self._task = text

    def vector(self, text: str | None = None) -> NDArray[np.float32]:
        """(n,) what the model is shown of a task; None = of `task`.

        Raises:
            UnknownNameError: it does not know the task.
            ConfigError: it was not told which.
        """
        text = self._task if text is None else text
        if text is None:
            raise ConfigError(
                f"this policy does {len(self.tasks)} tasks and was not told which: set policy.task (--task) to one of "
                f"{', '.join(map(repr, self.tasks))}"
            )
        if text not in self.tasks:
            raise UnknownNameError("task of this policy", text, self.tasks)
        return np.asarray(self.tasks[text], np.float32)

    def with_goal(self, observation: Observation) -> Observation:
        """The observation with the goal in every row."""
        if not self.goal:
            return observation
        seen = (observation.get(key) for key in self._sources if key not in self.goal)
        rows = next((len(value) for value in seen if value is not None and np.ndim(value)), 1)
        return {**observation, **{key: np.repeat(value[None], rows, axis=0) for key, value in self.goal.items()}}

    def task_rows(self, observation: Observation, rows: int) -> NDArray[np.float32]:
        """(B, n) the vectors of the rows' tasks: of the observation "task", (n,) or (B, n), or of `task`.

        Raises:
            ShapeError: the observation has something else there.
            ConfigError: nothing tells the task.
        """
        given, name = observation.get(TASK), "observation 'task'"
        value = as_float32(self.vector() if given is None else given, name)
        width = len(next(iter(self.tasks.values())))
        if value.shape == (width,):
            value = np.repeat(value[None], rows, axis=0)
        if value.shape != (rows, width) or not np.isfinite(value).all():
            raise ShapeError(f"{name} must be finite numbers {(rows, width)}, got {value.shape}")
        return value


def _checked_goal(
    goal: Observation, sources: Iterable[str], recorded: Mapping[str, ArraySpec]
) -> dict[str, NDArray[Any]]:
    shown = {key.removeprefix(GOAL) for key in sources if key.startswith(GOAL)}
    found = {}
    for key, value in goal.items():
        if key not in shown:
            raise UnknownNameError("goal", key, shown)
        spec, array = recorded[GOAL + key], np.asarray(value)
        if array.shape != tuple(spec.shape) or (array.dtype == np.uint8) != (spec.dtype == "uint8"):
            raise ShapeError(
                f"the goal {key!r} must be {spec.dtype} {tuple(spec.shape)}, got {array.dtype} {array.shape}"
            )
        found[GOAL + key] = array
    return found
