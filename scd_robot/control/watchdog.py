"""What counts as a fault, and what the loop does about it: every choice is a setting.

Shapes: Da action width.
"""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np

from scd_robot.control.interfaces import Command, Sample
from scd_robot.errors import ConfigError
from scd_robot.types import ArraySpec
from scd_robot.usable import problem_of

__all__ = ["FAULTS", "Approach", "ObservationGate", "Reaction", "StartGuard", "WatchdogConfig"]

Reaction = Literal["hold", "slow", "stop"]

_WHICH_CLOCK = "is it of the loop's clock, time.monotonic() of this machine?"
_WRONG_CLOCK = 10.0  # times `max_age_s`: at first sight no sensor is so late

FAULTS = {
    "robot_observe": "the robot's observe() failed",
    "robot_send": "the robot's send() failed",
    "robot_hold": "the robot's hold() failed; it is called again in each control step",
    "bad_observation": "an observation cannot be used",
    "stale_observation": "the newest good observation is too old",
    "frozen_observation": "a sensor repeats itself",
    "encoder_error": "the policy failed to take in an observation",
    "changed_policy": "the server has other weights than before",
    "plan_error": "a plan failed, or is not finite",
    "plan_late": "all actions are used up before the next plan is there",
    "stale_plan": "a plan was made from an observation that is too old by now; it is not followed",
    "delay_too_long": "plans take more than half a chunk, or longer than the policy was trained for",
    "clock_gap": "the loop stood still for too long",
    "slow_loop": "control steps take too long, again and again: the policy runs slower than it was trained",
    "far_start": "the first action is far from where the robot is",
    "bad_pose": "the robot stands outside of its limits, or does not tell where",
    "gave_up": "it had to hold for too long",
    "recorder_error": "a flight record could not be written",
    "loop_error": "a bug of the loop, or an interruption",
}
"""Every kind of fault that is recorded."""


@dataclass(frozen=True)
class StartGuard:
    """For the first action after a start, a reset or a pause.

    Attributes:
        max_distance: (Da,) how far it may be from the robot's pose, in dimensions that name a place; None = any.
        reaction: where it is farther: "blend" goes from the pose into the plan over `blend_s`; "refuse" stops.
        blend_s: seconds.
    """

    max_distance: tuple[float, ...] | None = None
    reaction: Literal["blend", "refuse"] = "blend"
    blend_s: float = 1.0

    def __post_init__(self) -> None:
        if self.reaction not in ("blend", "refuse"):
            raise ConfigError(f"the start guard's reaction must be 'blend' or 'refuse', got {self.reaction!r}")
        if not self.blend_s > 0:
            raise ConfigError(f"blend_s must be positive [s], got {self.blend_s}")

    def is_far(self, target: Command, pose: Command, rest: tuple[float | None, ...]) -> bool:
        """Whether an action (Da,) is too far from the pose (Da,)."""
        if self.max_distance is None:
            return False
        places = np.array([value is None for value in rest])
        return bool((np.abs(target - pose) > self.max_distance)[places].any())


class Approach:
    """From where the robot is into the plan, evenly over `blend_s`.

    Args:
        config: of the guard.
        control_dt: seconds per control step.
        rest: (Da,) see `Limits`.

    Attributes:
        over: whether the last step was its last.
    """

    def __init__(self, config: StartGuard, control_dt: float, rest: tuple[float | None, ...]) -> None:
        self._part = control_dt / config.blend_s
        self._places = np.array([value is None for value in rest])
        self._rest = np.array([0.0 if value is None else value for value in rest])
        self._done = 0.0
        self.over = False

    def step(self, goal: Command, last: Command) -> Command:
        """The goal of a control step (Da,): a growing part of what is left from the last command to the plan's goal."""
        left = 1.0 - self._done
        self._done += self._part
        self.over = self._done >= 1.0
        if self.over:
            return goal
        to_place = last + self._part / left * (goal - last)
        return np.where(self._places, to_place, self._rest + self._done * (goal - self._rest))


@dataclass(frozen=True)
class WatchdogConfig:
    """Thresholds and reactions.

    "hold" brakes, stands still, and goes on when it is over; "slow" goes on at `slow_rate`, and holds where there is
    nothing to go on with; "stop" brakes and ends.

    Attributes:
        max_age_s: of an observation.
        stale_observation: reaction to older ones, also where new ones never come or are bad. While the robot is not
            commanded, at the start and after a hold, the loop waits for a good one, for `give_up_s`.
        frozen_keys: observation keys that are never twice the same, such as those of a camera.
        max_frozen_s: how long they may be all the same.
        frozen_observation: reaction.
        late_plan: reaction when a plan takes longer than was committed to ("slow"), or than there are actions, and to a
            stale one.
        max_plan_age_s: of the observation that a plan was made from, when the plan begins to be followed; infinite =
            any. While the robot stands still this alone keeps it from following an old plan.
        plan_error: reaction to a plan that failed; "retry" goes on with the running chunk and asks again.
        changed_policy: reaction to a server with other weights than before; "hold" begins anew with a plan of them.
        robot_error: reaction to a failed send; "hold" lets the robot hold and begins anew from its pose.
        max_gap_steps: control steps that may be missed at once; after more the robot holds, and history and commands
            are begun anew, from where it is then.
        slow_rate: see above.
        give_up_s: seconds of holding without a break after which it stops.
    """

    max_age_s: float = 0.2
    stale_observation: Reaction = "hold"
    frozen_keys: tuple[str, ...] = ()
    max_frozen_s: float = 1.0
    frozen_observation: Reaction = "hold"
    late_plan: Reaction = "hold"
    max_plan_age_s: float = float("inf")
    plan_error: Literal["retry", "stop"] = "retry"
    changed_policy: Literal["hold", "stop"] = "hold"
    robot_error: Literal["hold", "stop"] = "hold"
    max_gap_steps: int = 5
    slow_rate: float = 0.5
    give_up_s: float = 10.0

    def __post_init__(self) -> None:
        reactions = dict.fromkeys(("stale_observation", "frozen_observation", "late_plan"), get_args(Reaction))
        reactions |= {"plan_error": ("retry", "stop")} | dict.fromkeys(
            ("changed_policy", "robot_error"), ("hold", "stop")
        )
        for name, choices in reactions.items():
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        for name in ("max_age_s", "max_frozen_s", "max_plan_age_s", "give_up_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be positive [s], got {getattr(self, name)}")
        if not 0 < self.slow_rate < 1:
            raise ConfigError(f"slow_rate must be in (0, 1), got {self.slow_rate}")
        if self.max_gap_steps < 1:
            raise ConfigError(f"max_gap_steps must be at least 1, got {self.max_gap_steps}")


@dataclass
class ObservationGate:
    """Lets good samples in.

    Attributes:
        spec: of the observations, by key.
        config: thresholds.
        action_dim: Da.
        optional: keys that may be None.
        newest: the last good sample; None = none yet.
    """

    spec: dict[str, ArraySpec]
    config: WatchdogConfig
    action_dim: int
    optional: tuple[str, ...] = ()
    newest: Sample | None = None
    _overtaken_s: float = 0.0  # how much older than the newest the last sample is, by its stamp
    _changed: dict[str, tuple[int, float]] = field(default_factory=dict)  # by key: checksum, stamp when it was new

    def admit(self, sample: Sample, now_s: float) -> str | None:
        """Takes in a sample; returns what is wrong with it, or None.

        One of the same time may have newer parts: where they come one by one, its stamp is that of the oldest.
        """
        problem = _misshapen(sample)
        if problem is not None:
            return problem
        self._overtaken_s = 0.0 if self.newest is None else max(0.0, self.newest.stamp_s - sample.stamp_s)
        if sample is self.newest or self._overtaken_s:
            return None  # seen already, or overtaken
        problem = self._problem(sample, now_s)
        if problem is not None:
            return problem
        for key in self.config.frozen_keys:
            if sample.observation[key] is None:
                continue
            checksum = zlib.crc32(np.ascontiguousarray(sample.observation[key]).data)
            if key not in self._changed or self._changed[key][0] != checksum:
                self._changed[key] = (checksum, sample.stamp_s)
        self.newest = sample
        return None

    def age_s(self, now_s: float) -> float:
        """Of the newest good sample [s]; infinite where there is none."""
        return float("inf") if self.newest is None else now_s - self.newest.stamp_s

    def is_stale(self, now_s: float) -> bool:
        """Whether the newest good sample is too old, or there is none."""
        return self.age_s(now_s) > self.config.max_age_s

    def told_age(self, now_s: float) -> str:
        """Of the newest good sample, in words, with what may be wrong where a clock is."""
        age_s, words = self.age_s(now_s), f"{self.age_s(now_s):.3f} s old"
        if self._overtaken_s:
            words += f"; the robot tells of one that is {self._overtaken_s:.3f} s older: did its clock jump?"
        elif age_s > _WRONG_CLOCK * self.config.max_age_s:
            words += f": {_WHICH_CLOCK}"
        return words

    def frozen_key(self) -> str | None:
        """A key that has repeated itself for too long; one that is None now does not."""
        if self.newest is None:
            return None
        limit, seen = self.newest.stamp_s - self.config.max_frozen_s, self.newest.observation
        frozen = (key for key, (_, since) in self._changed.items() if since < limit and seen[key] is not None)
        return next(frozen, None)

    def forget_freezing(self) -> None:
        """Begins to watch for repetition anew."""
        self._changed = {}

    def _problem(self, sample: Sample, now_s: float) -> str | None:
        if not np.isfinite(sample.stamp_s) or sample.stamp_s > now_s + self.config.max_age_s:
            return f"its time stamp {sample.stamp_s} lies in the future: {_WHICH_CLOCK}"
        problem = problem_of(sample.observation, self.spec, self.optional)
        if problem is not None:
            return problem
        if sample.executed is not None and np.shape(sample.executed) != (self.action_dim,):
            return f"`executed` must be ({self.action_dim},) like a command, got {np.shape(sample.executed)}"
        return None


def _misshapen(sample: Any) -> str | None:
    """What is wrong with something that should be a `Sample`, or None."""
    if not isinstance(getattr(sample, "observation", None), Mapping):
        return f"observe() must give a Sample(observation, stamp_s, ...), got {type(sample).__name__}"
    if not isinstance(sample.stamp_s, int | float | np.integer | np.floating):
        return f"its time stamp must be a number of seconds, got {sample.stamp_s!r:.80}"
    return None
