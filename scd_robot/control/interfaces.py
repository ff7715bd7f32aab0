"""What a control loop stands between: a robot, and a policy whose plans are made beside its observations.

Shapes: Da action width, Ta chunk length, d committed actions. One robot; arrays of a policy have a leading axis of 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from scd_robot.types import ActionArray, Observation, PolicySpec, RunningChunk

__all__ = ["Command", "EncodingPolicy", "Robot", "Sample", "StreamingPolicy"]

Command = NDArray[np.float64]
"""(Da,) in the units of the policy's actions; float64, since limits on acceleration are differences of differences."""


@dataclass(frozen=True)
class Sample:
    """What a robot's sensors said at one time.

    Attributes:
        observation: arrays without a batch axis; nobody changes them afterwards.
        stamp_s: when, on the clock of the loop; where parts come one by one, of the oldest. Another sample of the same
            time has newer parts.
        pose: (Da,) the command that leaves the robot where it was then; None where commands do not name places.
        executed: (Da,) the action that the robot carried out in the control step before; None = as it was sent.
    """

    observation: Observation
    stamp_s: float
    pose: Command | None = None
    executed: ActionArray | None = None


class Robot(Protocol):
    """One robot. The calls are quick, are made by the loop's thread only, and raise where they fail."""

    def observe(self) -> Sample:
        """The newest sample, which may be the same as before; never waits for one."""
        ...

    def send(self, command: Command) -> None:
        """Follow this command (Da,) until the next one."""
        ...

    def hold(self) -> None:
        """Stay where you are, by your own means, until the next command."""
        ...


class EncodingPolicy(Protocol):
    """What the loop's thread asks of a policy, wherever its plans are made; the calls are quick."""

    spec: PolicySpec

    @property
    def may_plan(self) -> bool:
        """Whether a plan of this observation is possible."""
        ...

    @property
    def max_prefix(self) -> int:
        """Most committed actions that a plan begins with."""
        ...

    def reset(self, rows: Sequence[int] | None = None, episodes: Sequence[int] | None = None) -> None:
        """Forgets the history."""
        ...

    def observe(self, observation: Observation, executed_action: ActionArray | None = None) -> None:
        """Encodes one control step; raises PolicyChangedError once where its weights are others than before."""
        ...

    def check_guidance(self, max_gain: float) -> None:
        """Raises ConfigError where plans cannot be guided with this gain; asked by the strategies that are guided."""
        ...

    def snapshot(self) -> Any:
        """What a plan from the last observation is made from."""
        ...


class StreamingPolicy(EncodingPolicy, Protocol):
    """A policy as `scd_robot.policies.ScdPolicy` is one: `observe` in one thread, `plan_from` in another."""

    def plan_from(
        self, given: Any, prefix: ActionArray | None = None, running: RunningChunk | None = None
    ) -> ActionArray:
        """A chunk (1, Ta, Da) from a snapshot; changes nothing of the policy.

        Args:
            given: the snapshot.
            prefix: (1, d, Da) what it begins with.
            running: what it is guided towards.
        """
        ...
