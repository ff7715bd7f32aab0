"""Settings of a control loop, and the report of a run."""

from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

from scd_robot.control.executor import ExecutionConfig
from scd_robot.control.limits import Limits
from scd_robot.control.recorder import RecorderConfig
from scd_robot.control.watchdog import StartGuard, WatchdogConfig
from scd_robot.errors import ConfigError

__all__ = ["LoopConfig", "LoopReport", "State", "check_settings", "describe_settings", "percentiles"]

State = Literal["starting", "running", "slow", "holding", "paused", "stopped"]


@dataclass(frozen=True)
class LoopConfig:
    """Settings of a control loop.

    Attributes:
        servo_steps: commands per control step, interpolated.
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


def percentiles(values: Collection[float]) -> dict[str, float]:
    """p50, p95, p99 and worst; nothing of nothing."""
    if not values:
        return {}
    p50, p95, p99, worst = (float(x) for x in np.percentile(list(values), (50, 95, 99, 100)))
    return {"p50": p50, "p95": p95, "p99": p99, "worst": worst}


def describe_settings(config: LoopConfig, limits: Limits) -> dict[str, Any]:
    """For people who read a record; functions by name."""
    box = limits.workspace
    bounds = {name: getattr(limits, name) for name in ("low", "high", "velocity", "acceleration", "rest")}
    return {**asdict(config), "limits": {**bounds, "workspace": None if box is None else [box.low, box.high]}}


def check_settings(limits: Limits, config: LoopConfig, action_dim: int, keys: set[str]) -> None:
    """Raises ConfigError where settings, limits and policy are not for one robot."""
    if len(limits.low) != action_dim:
        raise ConfigError(f"the policy has {action_dim} actions, the limits are for {len(limits.low)}")
    far = config.start.max_distance
    if far is not None and len(far) != action_dim:
        raise ConfigError(f"the policy has {action_dim} actions, the start guard's max_distance {len(far)}")
    unknown = set(config.watchdog.frozen_keys) - keys
    if unknown:
        raise ConfigError(f"frozen_keys {sorted(unknown)} are no observations of the policy; it has {sorted(keys)}")
