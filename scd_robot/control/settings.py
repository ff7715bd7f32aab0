"""Settings of a control loop, and the report of a run."""

import logging
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

from scd_robot.control.executor import ExecutionConfig
from scd_robot.control.limits import Limits
from scd_robot.control.recorder import RecorderConfig
from scd_robot.control.watchdog import StartGuard, WatchdogConfig
from scd_robot.errors import ConfigError
from scd_robot.latest import Latest
from scd_robot.types import PolicySpec

__all__ = ["LoopConfig", "LoopReport", "State", "check_parts", "check_settings", "describe_settings", "percentiles"]

logger = logging.getLogger(__name__)

_UNTRAINED = (
    "this policy was not trained for delays (model.max_delay_steps is 0): with the strategy 'prefix' its plans begin "
    "with the committed actions, but may go on from them with a jump, which the limits make smooth; train it with "
    "model.max_delay_steps, or choose another strategy (docs/control.md, Strategies)"
)
_REPEATED = (
    "the policy's actions are changes (action_kind delta), and each is sent in all %d servo steps of a control step: "
    "the robot must take it as the change of the whole control step, told again, and not add it up"
)
State = Literal["starting", "running", "slow", "holding", "paused", "stopped"]


@dataclass(frozen=True)
class LoopConfig:
    """Settings of a control loop.

    Attributes:
        servo_steps: commands per control step: on the way to a place, and a velocity or change of the whole control
            step again and again.
        execution: how chunks are carried out.
        watchdog: what is done about faults.
        start: guard of the first action.
        recorder: flight records.
    """

    servo_steps: int = 1
    execution: ExecutionConfig = field(default_factory=ExecutionConfig)
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)
    start: StartGuard = field(default_factory=StartGuard)
    recorder: RecorderConfig = field(default_factory=RecorderConfig)

    def __post_init__(self) -> None:
        if self.servo_steps < 1:
            raise ConfigError(f"servo_steps must be at least 1, got {self.servo_steps}")


@dataclass(frozen=True)
class LoopReport:
    """How a run went.

    Attributes:
        state: at its end.
        steps: control steps.
        commands: that were sent.
        faults: how often each began.
        plans: "asked", "followed", "failed", "too_late" (no action of it is left), "stale" (see `max_plan_age_s`), and
            "dropped" with the epoch they were asked for in.
        pacing: see `Pacer.report`.
        times_ms: of "encoder" and "plan": p50, p95, p99 and worst.
        delay_steps: the last guess.
    """

    state: State
    steps: int
    commands: int
    faults: dict[str, int]
    plans: dict[str, int]
    pacing: dict[str, Any]
    times_ms: dict[str, dict[str, float]]
    delay_steps: int


def percentiles(latest: Latest) -> dict[str, float]:
    """p50, p95, p99 and worst; nothing of nothing."""
    values = latest.values()
    if not len(values):
        return {}
    p50, p95, p99, worst = (float(x) for x in np.percentile(values, (50, 95, 99, 100)))
    return {"p50": p50, "p95": p95, "p99": p99, "worst": worst}


def describe_settings(config: LoopConfig, limits: Limits) -> dict[str, Any]:
    """For people who read a record; functions by name."""
    box = limits.workspace
    bounds = {name: getattr(limits, name) for name in ("low", "high", "velocity", "acceleration", "rest")}
    return {**asdict(config), "limits": {**bounds, "workspace": None if box is None else [box.low, box.high]}}


def check_parts(robot: Any, policy: Any) -> None:
    """Raises ConfigError where something else takes the place of the robot or the policy."""
    for name in ("observe", "send", "hold"):
        if not callable(getattr(robot, name, None)):
            raise ConfigError(
                f"a robot has observe(), send(command) and hold(); this {type(robot).__name__} has no {name}() (see "
                "scd_robot.control.Robot)"
            )
    plans = "submit" if hasattr(policy, "submit") else "plan_from"
    for name in ("spec", "reset", "observe", "snapshot", plans):
        if not hasattr(policy, name):
            raise ConfigError(
                "the control loop takes a policy of load_policy or OnnxPolicy, or RemoteStream.connect(address) for "
                f"one behind a server; this {type(policy).__name__} has no {name}"
            )


def check_settings(limits: Limits, config: LoopConfig, spec: PolicySpec) -> None:
    """Raises ConfigError where settings, limits and policy are not for one robot; warns of what goes badly together."""
    action_dim, keys = spec.action_dim, spec.observation.keys()
    if len(limits.low) != action_dim:
        raise ConfigError(f"the policy has {action_dim} actions, the limits are for {len(limits.low)}")
    _check_rest(limits, spec)
    far = config.start.max_distance
    if far is not None and len(far) != action_dim:
        raise ConfigError(f"the policy has {action_dim} actions, the start guard's max_distance {len(far)}")
    unknown = set(config.watchdog.frozen_keys) - keys
    if unknown:
        raise ConfigError(f"frozen_keys {sorted(unknown)} are no observations of the policy; it has {sorted(keys)}")
    if config.execution.strategy == "prefix" and spec.max_delay_steps == 0:
        logger.warning("%s", _UNTRAINED)
    if config.servo_steps > 1 and spec.action_kind == "delta":
        logger.warning("%s", _REPEATED % config.servo_steps)


def _check_rest(limits: Limits, spec: PolicySpec) -> None:
    """Standing still must be what the actions call so: else the robot drifts on, or is sent to the place 0."""
    places = [rest is None for rest in limits.rest]
    if spec.action_kind == "delta" and all(places):
        raise ConfigError(
            "the policy's actions are changes (action_kind delta), and rest=None says that all of them name places: "
            "standing still would repeat the last change; give Limits(..., rest=(0.0, ...)), None only where a "
            "dimension names a place, such as a gripper"
        )
    if spec.action_kind == "absolute" and not any(places):
        raise ConfigError(
            f"the policy's actions name places (action_kind absolute), and rest={limits.rest} says that none of them "
            "does: standing still would send the robot there; give Limits(..., rest=(None, ...)), a number only where "
            "a dimension is a change, a velocity or an effort"
        )
