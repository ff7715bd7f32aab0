"""What may be commanded, and a filter that keeps every command to it.

Between two commands, which are one period apart, a dimension changes by u. Velocity bounds |u|, acceleration bounds the
change of u from one command to the next. The filter keeps an invariant: from the present command and u, slowing down as
fast as acceleration allows stays within all limits. It holds at the start, where u = 0, and every command is chosen so
that it holds again; so there always is a next command, and standing still is never more than braking away.

Shapes: Da action width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scd_robot.control.interfaces import Command
from scd_robot.errors import ActionError, ConfigError

__all__ = ["Limiter", "Limits", "Workspace"]

_ROUNDING = 1e-12  # relative; what the filter stays below its limits, for the sums of float64
_MOST_BRAKING_STEPS = 10_000


@dataclass(frozen=True)
class Workspace:
    """A box that the hand stays in.

    Attributes:
        low: (n,) corner.
        high: (n,) opposite corner.
        hand: where the hand is (n,) when the robot stands at a command (Da,): forward kinematics.
    """

    low: tuple[float, ...]
    high: tuple[float, ...]
    hand: Callable[[Command], NDArray[Any]]

    def __post_init__(self) -> None:
        if len(self.low) != len(self.high) or not all(a < b for a, b in zip(self.low, self.high, strict=True)):
            raise ConfigError(f"a workspace needs low < high in each dimension, got {self.low} and {self.high}")

    def holds(self, command: Command) -> bool:
        """Whether the hand is in the box; False where the kinematics gives no finite answer."""
        at = np.asarray(self.hand(command), np.float64)
        return bool(np.isfinite(at).all() and (at >= self.low).all() and (at <= self.high).all())


@dataclass(frozen=True)
class Limits:
    """Bounds on the commands of one robot, per dimension.

    Attributes:
        low: (Da,) least command.
        high: (Da,) greatest command.
        velocity: (Da,) most change [1/s]; infinite = any.
        acceleration: (Da,) most change of that [1/s^2]; infinite = any.
        rest: (Da,) what standing still is: None where a command names a place, so that the last one repeated stands
            still; a number, mostly 0, where it is a velocity or an increment.
        workspace: for commands that name places.
    """

    low: tuple[float, ...]
    high: tuple[float, ...]
    velocity: tuple[float, ...]
    acceleration: tuple[float, ...]
    rest: tuple[float | None, ...]
    workspace: Workspace | None = None

    def __post_init__(self) -> None:
        width = len(self.low)
        for name in ("high", "velocity", "acceleration", "rest"):
            if len(getattr(self, name)) != width:
                raise ConfigError(f"limits are per dimension: low has {width}, {name} {len(getattr(self, name))}")
        if not np.isfinite([*self.low, *self.high]).all():
            raise ConfigError(f"low and high must be finite, got {self.low} and {self.high}")
        for i, (low, high, rest) in enumerate(zip(self.low, self.high, self.rest, strict=True)):
            if not low < high or (rest is not None and not low <= rest <= high):
                raise ConfigError(f"dimension {i} needs low < high with rest between, got {low}, {high} and {rest}")
            if not (self.velocity[i] > 0 and self.acceleration[i] > 0):
                raise ConfigError(
                    f"velocity and acceleration must be positive, got {self.velocity[i]} and {self.acceleration[i]} in "
                    f"dimension {i}"
                )
        if self.workspace is not None and any(rest is not None for rest in self.rest):
            raise ConfigError("a workspace is for commands that all name places (rest None)")

    @classmethod
    def of_box(
        cls, low: Sequence[float], high: Sequence[float], rest: Sequence[float | None] | None = None
    ) -> "Limits":
        """Bounds alone, with any velocity."""
        anything = (float("inf"),) * len(low)
        return cls(tuple(low), tuple(high), anything, anything, (None,) * len(low) if rest is None else tuple(rest))


class Limiter:
    """Makes targets into commands within the limits.

    Args:
        limits: what commands keep to.
        period_s: seconds between commands.
    """

    def __init__(self, limits: Limits, period_s: float) -> None:
        self._limits = limits
        self._low, self._high = np.array(limits.low), np.array(limits.high)
        self._velocity = np.array(limits.velocity) * period_s * (1 - _ROUNDING)
        self._acceleration = np.array(limits.acceleration) * period_s**2 * (1 - _ROUNDING)
        self._at_rest = np.array([np.nan if rest is None else rest for rest in limits.rest], np.float64)
        self._names_place = np.isnan(self._at_rest)
        self._last = np.full(len(limits.low), np.nan)
        self._change = np.zeros(len(limits.low))

    def start(self, pose: Command | None) -> None:
        """Takes the robot to stand still.

        Args:
            pose: (Da,) the command that leaves it where it is; None = no command names a place.

        Raises:
            ActionError: the pose is missing, not finite, or outside the limits: no command would be within them.
        """
        width = len(self._low)
        given = np.full(width, np.nan) if pose is None else np.asarray(pose, np.float64)
        if given.shape != (width,):
            raise ActionError(f"the robot's pose must be ({width},) like its commands, got {given.shape}")
        if pose is None and self._names_place.any():
            raise ActionError(
                "the robot does not tell its pose, where commands that name a place begin: observe() must give "
                "Sample(..., pose=...); for commands that are velocities or increments give Limits(..., rest=...)"
            )
        last = np.where(self._names_place, given, self._at_rest)
        outside = ~((last >= self._low) & (last <= self._high))  # NaN too
        if outside.any():
            i = int(np.flatnonzero(outside)[0])
            raise ActionError(
                f"the robot stands at {last[i]:g} in dimension {i}, outside of its limits {self._low[i]:g} to "
                f"{self._high[i]:g}; move it back by hand, or correct the limits"
            )
        if self._limits.workspace is not None and not self._limits.workspace.holds(last):
            raise ActionError("the robot's hand is outside of its workspace; move it back by hand, or correct the box")
        self._last, self._change = last, np.zeros(width)

    def step(self, target: Command | None) -> Command:
        """The next command (Da,).

        Args:
            target: (Da,) where the policy wants it; None, NaN or infinite: brake, and stand still.
        """
        assert np.isfinite(self._last).all(), "start() first"
        brake = self._braked(self._change)
        if target is None or not np.isfinite(target).all():
            change = brake if not self._rests else np.where(self._names_place, brake, self._towards(self._at_rest))
        else:
            change = self._towards(np.asarray(target, np.float64))
            if self._limits.workspace is not None and not self._stays_inside(change):
                change = brake
        command = np.clip(self._last + change, self._low, self._high)
        self._change = command - self._last
        self._last = command
        return np.array(command)

    @property
    def still(self) -> bool:
        """Whether the last command left the robot standing."""
        resting = np.where(
            self._names_place, self._change == 0, np.isclose(self._last, self._at_rest, rtol=0, atol=1e-9)
        )
        return bool(resting.all())

    @property
    def last(self) -> Command:
        """(Da,) the last command, or the pose it started from."""
        return np.array(self._last)

    @property
    def _rests(self) -> bool:
        return not self._names_place.all()

    def _towards(self, target: Command) -> NDArray[np.float64]:
        """The change towards a target that can still stop at it and at the bounds; NaN where the target is."""
        wanted = target - self._last
        wanted = np.sign(wanted) * np.minimum(np.abs(wanted), self._stoppable(np.abs(wanted)))
        least = np.maximum(-self._velocity, self._change - self._acceleration)
        most = np.minimum(self._velocity, self._change + self._acceleration)
        least = np.maximum(least, -self._stoppable(self._last - self._low) * (1 - _ROUNDING))
        most = np.minimum(most, self._stoppable(self._high - self._last) * (1 - _ROUNDING))
        return np.asarray(np.clip(wanted, np.minimum(least, most), most))

    def _stoppable(self, distance: NDArray[np.float64]) -> NDArray[np.float64]:
        """(Da,) the greatest u for which u + (u - a) + (u - 2a) + ... down to 0 is no more than the distance.

        With n terms above 0 the sum is n u - a n (n - 1) / 2; n is the least number with a n (n + 1) / 2 >= distance.
        """
        a, far = self._acceleration, np.maximum(distance, 0.0)
        with np.errstate(invalid="ignore"):
            n = np.ceil((np.sqrt(1.0 + 8.0 * far / a) - 1.0) / 2.0)
            n = np.maximum(n, 1.0)
            free = np.isinf(a) | (n == 1.0)
            most = (far + np.where(free, 0.0, a) * n * (n - 1.0) / 2.0) / n
        return np.where(free, far, most)

    def _braked(self, change: NDArray[np.float64]) -> NDArray[np.float64]:
        """The change after this one that slows down most."""
        return np.sign(change) * np.maximum(np.abs(change) - self._acceleration, 0.0)

    def _stays_inside(self, change: NDArray[np.float64]) -> bool:
        """Whether the hand is in its workspace after this change, and at all commands while braking from there."""
        box = self._limits.workspace
        assert box is not None
        at = self._last
        for _ in range(_MOST_BRAKING_STEPS):
            at = at + change
            if not box.holds(at):
                return False
            change = self._braked(change)
            if not change.any():
                return True
        return False
