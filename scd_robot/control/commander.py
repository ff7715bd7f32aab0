"""The robot's end of a control loop: commands within the limits, holds, and where commands begin.

After a start, a hold, a failed send or a takeover nobody knows where the robot is; commands begin again from the pose
of a sample that is newer than that.

Shapes: Da action width.
"""

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np

from scd_robot.control.clock import Clock
from scd_robot.control.interfaces import Command, Robot, Sample
from scd_robot.control.journal import Journal
from scd_robot.control.limits import Limiter, Limits
from scd_robot.errors import ActionError

__all__ = ["Commander"]

_LEAST_SPACING = 0.5  # of the servo period, between two commands
_HOLD_ATTEMPTS = 3


class Commander:
    """Commands one robot; used by the loop's thread alone.

    Args:
        robot: that is commanded.
        limits: what every command keeps to.
        servo_steps: commands per control step.
        servo_dt: seconds between commands.
        clock: the loop's.
        journal: where failures are noted.

    Attributes:
        anchored: whether it is known where the robot is, so that commands may be sent.
        command: (Da,) the last one, if it was sent in the step before; None = it was not, or it failed.
    """

    def __init__(
        self, robot: Robot, limits: Limits, servo_steps: int, servo_dt: float, clock: Clock, journal: Journal
    ) -> None:
        self._robot, self._servo_steps, self._servo_dt = robot, servo_steps, servo_dt
        self._clock, self._journal = clock, journal
        self._places = np.array([rest is None for rest in limits.rest])
        self._limiter = Limiter(limits, servo_dt)
        self._owed_s: float | None = None  # since when hold() has failed
        self._distrusted_s = -np.inf  # samples up to then do not tell where the robot is
        self._sent_s = self._alive_s = -np.inf
        self.anchored = False
        self.command: Command | None = None

    @property
    def last(self) -> Command:
        """(Da,) the last command, or the pose that commands begin from."""
        return self._limiter.last

    @property
    def still(self) -> bool:
        """Whether the last command left the robot standing."""
        return self._limiter.still

    def silent_for(self, seconds: float) -> bool:
        """Whether none was sent for longer than that [s] where some were due: nobody knows where the robot is now."""
        return self.anchored and self._clock.now() - self._alive_s > seconds

    @property
    def owes_hold(self) -> bool:
        """Whether hold() failed, and is to be called again."""
        return self._owed_s is not None

    def owes_hold_for(self, seconds: float) -> bool:
        """Whether hold() has failed for longer than that [s]."""
        return self._owed_s is not None and self._clock.now() - self._owed_s > seconds

    def distrust_samples(self) -> None:
        """Samples so far do not tell where the robot is, since somebody moved it."""
        self._distrusted_s = self._clock.now()

    def anchor(self, sample: Sample | None) -> None:
        """Commands begin where a fresh sample says that the robot is, unless it is too old for that or a bad place."""
        if sample is None or sample.stamp_s <= self._distrusted_s:
            return
        try:
            self._limiter.start(sample.pose)
        except ActionError as error:
            self._journal.condition("bad_pose", True, str(error))
            return
        self._journal.condition("bad_pose", False)
        self.anchored, self._alive_s = True, self._clock.now()

    def release(self) -> None:
        """Lets the robot hold by its own means; commands begin again from where it is then."""
        self.anchored, self.command = False, None
        try:
            self._robot.hold()
        except Exception as error:
            self._owed_s = self._clock.now() if self._owed_s is None else self._owed_s
            self._journal.condition("robot_hold", True, f"{type(error).__name__}: {error}")
        else:
            self._owed_s = None
            self._journal.condition("robot_hold", False)
        self._distrusted_s = self._clock.now()

    def hold_at_last(self) -> None:
        """Whatever happened: the robot holds, and nothing is sent any more. Another Ctrl-C is raised after that."""
        interruption: BaseException | None = None
        for _ in range(_HOLD_ATTEMPTS):
            try:
                self._robot.hold()
                break
            except BaseException as error:
                interruption = interruption if isinstance(error, Exception) else error
                self._journal.fault("robot_hold", f"{type(error).__name__}: {error}")
        if interruption is not None:
            raise interruption

    def send(self, target: Command | None) -> bool:
        """The next command, towards a target (Da,); None = brake and stand still.

        Returns:
            False where it failed: nobody knows whether the robot follows it.
        """
        self._clock.sleep_until(self._sent_s + _LEAST_SPACING * self._servo_dt)
        command = self._limiter.step(target)
        self._journal.commands += 1
        try:
            self._robot.send(command.copy())  # it may be changed there: into other units, say
        except Exception as error:
            self._journal.fault("robot_send", f"{type(error).__name__}: {error}")
            self.command = None
            return False
        finally:  # not before it: this thread may have waited for the processor until the robot had it
            self._sent_s = self._alive_s = self._clock.now()
        self.command = command
        return True

    def between(self, start: Command, goal: Command, part: int) -> Command:
        """The target (Da,) of a servo step: on the way to a place, an increment or velocity as it is."""
        share = (part + 1) / self._servo_steps
        return np.where(self._places, start + share * (goal - start), goal)

    def ahead(self, goals: Sequence[Command]) -> list[Command]:
        """What will have been sent at the end of each control step with these goals."""
        limiter, ends = copy.copy(self._limiter), []
        for goal in goals:
            start = limiter.last  # limits may have kept it from the goal before
            for part in range(self._servo_steps):
                command = limiter.step(self.between(start, goal, part))
            ends.append(command)
        return ends

    def fitting(self, value: Any) -> Command | None:
        """What a robot tells, if it is as wide as a command."""
        array = None if value is None else np.asarray(value, np.float64)
        return array if array is not None and array.shape == self._places.shape else None
