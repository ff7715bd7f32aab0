"""Rehearsals: the control loop against a scripted robot and a scripted policy in virtual time, with scripted faults.

The loop is the real one. Commands are checked at the robot's port (`inspection`), in which nothing of the loop is used.

Shapes: Da = 2 action width, Ta chunk length.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from scd_robot.control.clock import VirtualClock
from scd_robot.control.inspection import InspectedRobot
from scd_robot.control.interfaces import Command, Sample
from scd_robot.control.limits import Limits
from scd_robot.control.loop import ControlLoop
from scd_robot.control.planner import PlanningPolicy, VirtualPlanner
from scd_robot.control.recorder import FlightRecorder, write_record
from scd_robot.control.settings import LoopConfig, LoopReport
from scd_robot.errors import OutputError
from scd_robot.types import ActionArray, ArraySpec, Observation, PolicySpec, RunningChunk

__all__ = ["KINDS", "LINK_KINDS", "Connect", "Incident", "Rehearsal", "ScriptedPolicy", "ScriptedRobot", "rehearse"]

_DA = 2
SPEC = PolicySpec({"state": ArraySpec((_DA,)), "camera": ArraySpec((4, 4), "uint8")}, _DA, 0.05, 16, 8, 8)

KINDS = (
    "drop",  # the robot has no new sample
    "delay",  # its samples are old
    "nan",  # the state is NaN
    "shape",  # the state has another shape
    "freeze",  # the camera repeats itself
    "future",  # the stamp lies in the future
    "observe_crash",
    "send_crash",  # before the command is taken
    "send_lost",  # after it was taken
    "hold_crash",
    "late",  # one wake-up is late by half a step per step
    "stall",  # the clock jumps, by so many steps
    "slow_plan",
    "plan_crash",
    "plan_nan",
    "plan_shape",
    "wild_plan",  # far out of all limits
    "encoder_crash",
    "disk_full",
    "pause",  # and resume afterwards; a human moves the robot meanwhile
    "push_out",  # the same, out of its limits, and back before the end
    "reset",
)

LINK_KINDS = (  # with a policy behind a server, see `scd_robot.serve.rehearsal`
    "server_gone",  # killed, and there again
    "network_cut",  # nothing arrives on either side, and nobody is told
    "slow_network",
    "duplicated",  # every answer comes twice
    "reordered",  # two answers change places
    "refused",
    "forgotten",  # the server drops the history
)


@dataclass(frozen=True)
class Incident:
    """Something that happens.

    Attributes:
        kind: of `KINDS` or `LINK_KINDS`.
        at: first control step.
        steps: for so many.
    """

    kind: str
    at: int
    steps: int = 1

    def __post_init__(self) -> None:
        assert self.kind in KINDS + LINK_KINDS, self.kind


class Script:
    """Which incidents go on at a time; control steps are those of the clock's grid."""

    def __init__(self, incidents: Sequence[Incident], clock: VirtualClock, control_dt: float) -> None:
        self._incidents, self._clock, self._dt = incidents, clock, control_dt

    def going_on(self, kind: str) -> Incident | None:
        """The first incident of this kind now."""
        step = self._clock.now() / self._dt + 1e-6
        return next((one for one in self._incidents if one.kind == kind and one.at <= step < one.at + one.steps), None)


class ScriptedRobot:
    """Follows every command at once; its pose is the last command, or where a human moved it.

    Attributes:
        pose: (Da,) where it is.
        held: how often it was told to hold.
    """

    def __init__(self, script: Script, clock: VirtualClock, pose: Command, tells_executed: bool) -> None:
        self._script, self._clock, self._tells = script, clock, tells_executed
        self.pose = np.array(pose, np.float64)
        self.held = 0
        self._sample: Sample | None = None
        self._executed: ActionArray | None = None
        self._frames = 0

    def observe(self) -> Sample:
        """The newest sample."""
        if self._script.going_on("observe_crash"):
            raise ConnectionError("the robot's server is gone")
        if self._sample is not None and self._script.going_on("drop"):
            return self._sample
        self._frames += not self._script.going_on("freeze")
        stamp = self._clock.now()
        stamp += 10.0 if self._script.going_on("future") else 0.0
        stamp -= 0.5 if self._script.going_on("delay") else 0.0
        state = self.pose.astype(np.float32)
        if self._script.going_on("nan"):
            state = np.full(_DA, np.nan, np.float32)
        if self._script.going_on("shape"):
            state = state[:1]
        camera = np.full((4, 4), self._frames % 251, np.uint8)
        executed = self._executed if self._tells else None
        self._sample = Sample({"state": state, "camera": camera}, stamp, self.pose.copy(), executed)
        return self._sample

    def send(self, command: Command) -> None:
        """Follows."""
        if self._script.going_on("send_crash"):
            raise ConnectionError("no route to the robot")
        self.pose = np.array(command)
        self._executed = self.pose.astype(np.float32)
        if self._script.going_on("send_lost"):
            raise ConnectionError("no answer from the robot")

    def hold(self) -> None:
        """Stands still."""
        if self._script.going_on("hold_crash"):
            raise ConnectionError("no route to the robot")
        self.held += 1


class ScriptedPolicy:
    """Plans random walks from the state; encodes nothing."""

    def __init__(self, script: Script, seed: int) -> None:
        self.spec = SPEC
        self._script = script
        self._rng = np.random.default_rng(seed)
        self._state: np.ndarray[Any, Any] | None = None
        self.encoded = 0

    max_prefix = SPEC.chunk_length - 1

    @property
    def may_plan(self) -> bool:
        """Whether there was an observation."""
        return self._state is not None

    def reset(self, rows: Sequence[int] | None = None, episodes: Sequence[int] | None = None) -> None:
        """Forgets."""
        self._state = None

    def observe(self, observation: Observation, executed_action: ActionArray | None = None) -> None:
        """Keeps the state."""
        if self._script.going_on("encoder_crash"):
            raise RuntimeError("out of memory")
        assert all(np.isfinite(value).all() for value in observation.values())
        assert executed_action is None or np.isfinite(executed_action).all()
        self._state = observation["state"]
        self.encoded += 1

    def snapshot(self) -> Mapping[str, Any]:
        """State and noise."""
        assert self._state is not None
        return {"state": self._state[0].copy(), "walk": self._rng.normal(0, 0.1, (SPEC.chunk_length, _DA))}

    def check_guidance(self, max_gain: float) -> None:
        """Takes any."""

    def plan_from(
        self, given: Mapping[str, Any], prefix: ActionArray | None = None, running: RunningChunk | None = None
    ) -> ActionArray:
        """A walk that begins with the prefix, or goes on as the running chunk does."""
        if self._script.going_on("plan_crash"):
            raise RuntimeError("CUDA error: device-side assert triggered")
        walk = given["walk"] * (1e3 if self._script.going_on("wild_plan") else 1.0)
        chunk: ActionArray = (given["state"] + walk.cumsum(0)).astype(np.float32)
        if prefix is not None:
            chunk[: prefix.shape[1]] = prefix[0]
        if running is not None:
            chunk[: running.actions.shape[1]] = running.actions[0]
        if self._script.going_on("plan_nan"):
            chunk[-1, 0] = np.nan
        return chunk[None, :-1] if self._script.going_on("plan_shape") else chunk[None]


Connect = Callable[[ScriptedPolicy, Script, VirtualClock, Callable[[], float]], PlanningPolicy]
"""Puts a policy behind a server: from it, the script, the clock, and how long its next plan takes [s]."""


@dataclass(frozen=True)
class Rehearsal:
    """What happened.

    Attributes:
        report: of the loop; None where it raised.
        raised: what it raised.
        violations: at the robot's port.
        commands: that were checked there.
        states: control steps in each.
        unrecorded: faults that are in no record on disk (only where there is a folder).
        records: that were written.
    """

    report: LoopReport | None
    raised: BaseException | None
    violations: list[str]
    commands: int
    states: Counter[str] = field(default_factory=Counter)
    unrecorded: int = 0
    records: int = 0


def rehearse(
    incidents: Sequence[Incident],
    config: LoopConfig,
    limits: Limits,
    *,
    steps: int = 200,
    seed: int = 0,
    plan_steps: float = 1.5,
    tells_executed: bool = True,
    connect: Connect | None = None,
) -> Rehearsal:
    """Runs the loop through a script.

    Args:
        incidents: what happens.
        config: of the loop.
        limits: Da = 2.
        steps: control steps of 50 ms, after which it is stopped.
        seed: of the plans.
        plan_steps: control steps that a plan takes; 20 times as many while "slow_plan" goes on.
        tells_executed: whether the robot tells what it did.
        connect: puts the policy behind a server; None = it is in this process.
    """
    clock = VirtualClock()
    script = Script(incidents, clock, SPEC.control_dt)
    middle = (np.array(limits.low) + limits.high) / 2
    robot = ScriptedRobot(script, clock, middle, tells_executed)
    port = InspectedRobot(robot, limits, SPEC.control_dt / config.servo_steps, clock, lambda: robot.pose)
    policy = ScriptedPolicy(script, seed)

    def duration_s() -> float:
        return SPEC.control_dt * plan_steps * (20.0 if script.going_on("slow_plan") else 1.0)

    def write(target: Path, arrays: Mapping[str, Any], document: Mapping[str, Any]) -> None:
        if script.going_on("disk_full"):
            raise OutputError("cannot write the flight record: no space left on device")
        write_record(target, arrays, document)

    recorder = FlightRecorder(config.recorder, SPEC.observation, _DA, SPEC.control_dt, background=False, write=write)
    how: dict[str, Any] = {"clock": clock, "recorder": recorder}
    if connect is None:
        loop = ControlLoop(port, policy, limits, config, planner=VirtualPlanner(policy, clock, duration_s), **how)
    else:
        loop = ControlLoop(port, connect(policy, script, clock, duration_s), limits, config, **how)
    stage = _Stage(loop, robot, clock, script, limits)
    report, raised = None, None
    try:
        report = loop.run(max_steps=steps, until=stage)
    except Exception as error:
        raised = error
    return Rehearsal(
        report,
        raised,
        port.violations,
        port.commands,
        stage.states,
        sum(recorder.unsaved.values()),
        len(recorder.written),
    )


class _Stage:
    """What happens around the loop in each control step: clocks that stall, and people."""

    def __init__(
        self, loop: ControlLoop, robot: ScriptedRobot, clock: VirtualClock, script: Script, limits: Limits
    ) -> None:
        self._loop, self._robot, self._clock, self._script, self._limits = loop, robot, clock, script, limits
        self._done: set[int] = set()
        self._paused = False
        self.states: Counter[str] = Counter()

    def __call__(self) -> bool:
        """Never stops the loop."""
        self.states[self._loop.state] += 1
        stall = self._script.going_on("stall")
        if stall is not None and id(stall) not in self._done:
            self._done.add(id(stall))
            self._clock.advance(stall.steps * SPEC.control_dt)
        if self._script.going_on("late"):
            self._clock.late_s = 0.5 * SPEC.control_dt
        reset = self._script.going_on("reset")
        if reset is not None and id(reset) not in self._done:
            self._done.add(id(reset))
            self._loop.reset()
        self._people()
        return False

    def _people(self) -> None:
        pause, push = self._script.going_on("pause"), self._script.going_on("push_out")
        if (pause or push) and not self._paused:
            self._loop.pause()
        elif self._paused and not (pause or push):
            self._robot.pose = np.clip(self._robot.pose, self._limits.low, self._limits.high)
            self._loop.resume()
        self._paused = bool(pause or push)
        if self._loop.state == "paused":
            span = np.subtract(self._limits.high, self._limits.low)
            self._robot.pose = self._robot.pose + (0.4 if push else 0.01) * span
            if not push:
                self._robot.pose = np.clip(self._robot.pose, self._limits.low, self._limits.high)
