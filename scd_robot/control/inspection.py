"""Checks every command where it reaches the robot, from the definition of the limits and not from how they are kept.

A second opinion: nothing here is shared with `limits.Limiter`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from scd_robot.control.clock import Clock
from scd_robot.control.interfaces import Command, Robot, Sample
from scd_robot.control.limits import Limits

__all__ = ["InspectedRobot"]

_TOLERANCE = 1e-9  # of the span of a dimension


@dataclass
class InspectedRobot:
    """Passes everything on to a robot, and notes what was unsafe.

    Attributes:
        robot: that is commanded.
        limits: their definition.
        period_s: seconds between commands, by which velocities are told.
        clock: two commands may not be less than half a period apart.
        pose: where the robot really is, from which commands begin after a hold and after a failed send; None = where
            its last sample said.
        violations: a sentence for each.
        commands: so many were checked.
    """

    robot: Robot
    limits: Limits
    period_s: float
    clock: Clock
    pose: Callable[[], Command] | None = None
    violations: list[str] = field(default_factory=list)
    commands: int = 0
    _last: list[float] | None = None
    _change: list[float] = field(default_factory=list)
    _told: Command | None = None
    _sent_s: float = -math.inf

    def observe(self) -> Sample:
        """The robot's sample."""
        sample = self.robot.observe()
        if sample.pose is not None:
            self._told = sample.pose
        return sample

    def hold(self) -> None:
        """From here on commands begin anew, where the robot is then."""
        self._last = None
        self.robot.hold()

    def send(self, command: Command) -> None:
        """Checks, then sends."""
        self.commands += 1
        now = self.clock.now()
        if now - self._sent_s < 0.5 * self.period_s * (1 - 1e-6):
            self.violations.append(f"command {self.commands} came {now - self._sent_s:.6f} s after the last one")
        self._sent_s = now
        values = [float(x) for x in np.asarray(command).ravel()]
        self._check(values)
        try:
            self.robot.send(command)
        except Exception:
            self._last = None
            raise

    def _check(self, values: list[float]) -> None:
        limits = self.limits
        if len(values) != len(limits.low):
            self.violations.append(f"command {self.commands} has {len(values)} numbers")
            return
        if self._last is None:
            at = self._told if self.pose is None else self.pose()
            pose = [math.nan] * len(values) if at is None else [float(x) for x in at]
            self._last = [p if rest is None else rest for p, rest in zip(pose, limits.rest, strict=True)]
            self._change = [0.0] * len(values)
        change = [value - last for value, last in zip(values, self._last, strict=True)]
        for i, value in enumerate(values):
            slack = _TOLERANCE * (limits.high[i] - limits.low[i])
            velocity = change[i] / self.period_s
            acceleration = (change[i] - self._change[i]) / self.period_s**2
            kept = {
                "finite": math.isfinite(value),
                "within its bounds": limits.low[i] <= value <= limits.high[i],
                "slow enough": abs(velocity) <= limits.velocity[i] + slack / self.period_s,
                "smooth enough": abs(acceleration) <= limits.acceleration[i] + slack / self.period_s**2,
            }
            told = [name for name, fine in kept.items() if not fine]  # NaN fails every comparison
            self.violations += [f"command {self.commands}, dimension {i}: {value} is not {name}" for name in told]
        box = limits.workspace
        if box is not None:
            hand = [float(x) for x in box.hand(np.array(values))]
            if not all(low <= at <= high for low, at, high in zip(box.low, hand, box.high, strict=True)):
                self.violations.append(f"command {self.commands}: the hand at {hand} is outside of its workspace")
        self._last, self._change = values, change
