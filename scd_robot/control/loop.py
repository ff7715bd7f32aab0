"""The control loop. START HERE: `ControlLoop._control_step` is what happens in a control step.

One thread observes, encodes and commands; another one plans (`planner`), a third one writes records (`recorder`). What
they share are queues. Other threads call `pause`, `resume`, `reset` and `stop`, which go through a queue as well.

Shapes: Da action width, Ta chunk length, d committed actions.
"""

import contextlib
import queue
import sys
from collections import deque
from collections.abc import Callable
from typing import Any, Literal

import numpy as np

from scd_robot.control.clock import Clock, MonotonicClock, Pacer
from scd_robot.control.commander import Commander
from scd_robot.control.interfaces import Command, Robot, Sample, StreamingPolicy
from scd_robot.control.journal import Journal
from scd_robot.control.limits import Limits
from scd_robot.control.planner import Planner, PlanningPolicy, ThreadPlanner
from scd_robot.control.planning import Planning
from scd_robot.control.recorder import FlightRecorder
from scd_robot.control.settings import LoopConfig, LoopReport, State, check_parts, check_settings, describe_settings
from scd_robot.control.watchdog import Approach, ObservationGate
from scd_robot.errors import ConfigError, PolicyChangedError
from scd_robot.types import ActionArray

__all__ = ["ControlLoop"]

_WATCHED, _MOST_SKIPPED = 50, 5  # control steps, and before how many of them some may be missed
_SWITCH_INTERVAL_S = 0.0005  # within which Python lets a plan in another thread give way; by itself it takes 5 ms


class ControlLoop:
    """Drives one robot with one policy.

    Args:
        robot: see `Robot`.
        policy: see `StreamingPolicy`; nobody else may use it while the loop runs. Or one behind a server, see
            `scd_robot.serve.RemoteStream`.
        limits: what every command keeps to.
        config: settings.
        clock: the machine's, or a virtual one.
        planner: None = the policy itself where it is one, otherwise a thread.
        recorder: None = as the settings say.

    Raises:
        ConfigError: robot, policy and settings are not for each other, or plans are to be guided and cannot be.
    """

    def __init__(
        self,
        robot: Robot,
        policy: StreamingPolicy | PlanningPolicy,
        limits: Limits,
        config: LoopConfig | None = None,
        *,
        clock: Clock | None = None,
        planner: Planner | None = None,
        recorder: FlightRecorder | None = None,
    ) -> None:
        check_parts(robot, policy)
        config, spec = config or LoopConfig(), policy.spec
        check_settings(limits, config, spec)
        if config.execution.is_guided:
            policy.check_guidance(config.execution.max_gain)
        self._robot, self._policy, self._limits, self._config = robot, policy, limits, config
        self._clock: Clock = clock or MonotonicClock()
        self._planner: Planner = planner or (policy if isinstance(policy, Planner) else ThreadPlanner(policy))
        self._control_dt, self._servo_dt = spec.control_dt, spec.control_dt / config.servo_steps
        recorder = recorder or FlightRecorder(config.recorder, spec.observation, spec.action_dim, spec.control_dt)
        recorder.about = {"control_dt": spec.control_dt, "settings": describe_settings(config, limits)}
        how = config.execution, limits.rest, config.watchdog.max_plan_age_s
        self._planning = Planning(policy, self._planner, *how)
        self._journal = Journal(recorder, self._clock, self._planning)
        self._commander = Commander(robot, limits, config.servo_steps, self._servo_dt, self._clock, self._journal)
        self._gate = ObservationGate(dict(spec.observation), config.watchdog, spec.action_dim, spec.optional)
        self._requests: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._intent: Literal["run", "pause", "stop"] = "run"
        self._followed = False  # a plan of this epoch was followed
        self._gap_told = False  # the standstill that the next control step will see as missed ones
        self._skipped: deque[bool] = deque(maxlen=_WATCHED)  # whether control steps were missed before the latest ones
        self._approach: Approach | None = None  # while blending into a plan
        self._goal: Command | None = None
        self._from: Command = np.zeros(spec.action_dim)
        self._holding_since: float | None = None
        self._encoded: Sample | None = None  # the sample that was encoded last

    @property
    def state(self) -> State:
        """See docs/control.md."""
        return self._journal.state

    # What other threads may call.

    def pause(self) -> None:
        """Brakes, lets the robot hold, and then sends nothing: a human may take over."""
        self._requests.put("pause")

    def resume(self) -> None:
        """Goes on after a pause, from where the robot is then, with an empty history."""
        self._requests.put("resume")

    def reset(self) -> None:
        """Begins a new episode: empties the history; no plan of before is carried out any more."""
        self._requests.put("reset")

    def stop(self) -> None:
        """Brakes, lets the robot hold, and ends `run`."""
        self._requests.put("stop")

    # The loop.

    def run(self, max_steps: int | None = None, until: Callable[[], bool] | None = None) -> LoopReport:
        """Runs until it is stopped; once only.

        Args:
            max_steps: control steps after which it stops; None = never.
            until: asked in each control step; True stops it.

        Returns:
            The report. Whatever is raised is raised again after the robot holds and a record is written.
        """
        if self.state == "stopped":
            raise ConfigError("this control loop has run already; make another one, or reset() a running one")
        pacer = Pacer(self._clock, self._servo_dt)
        interval_s = sys.getswitchinterval()
        sys.setswitchinterval(min(interval_s, _SWITCH_INTERVAL_S))
        try:
            self._release()
            while self._journal.state != "stopped":
                step, part = divmod(pacer.wait(), self._config.servo_steps)
                if step > self._journal.step:
                    if (max_steps is not None and self._journal.steps >= max_steps) or (until is not None and until()):
                        self._intent = "stop"
                    gap, self._journal.step = step - self._journal.step - 1, step
                    self._control_step(gap, pacer.lateness_s)
                self._servo_step(part)
        except BaseException as error:
            self._journal.fault("loop_error", f"{type(error).__name__}: {error}")
            raise
        finally:
            sys.setswitchinterval(interval_s)
            self._finish(pacer)
        return self._journal.report(pacer)

    def _control_step(self, gap: int, late_s: float) -> None:
        """One observation in, one goal out.

        Args:
            gap: control steps that were missed before it.
            late_s: how late it is.
        """
        self._obey()
        if gap > self._config.watchdog.max_gap_steps and self._intent == "run" and not self._gap_told:
            self._journal.fault("clock_gap", f"{gap} control steps were missed")
            self._release()
        self._gap_told = False
        self._skipped.append(gap > 0)
        skipped = sum(self._skipped)
        self._journal.condition(
            "slow_loop", skipped > _MOST_SKIPPED, f"before {skipped} of the last {len(self._skipped)} some were missed"
        )
        self._look()
        self._collect_plan()
        if self._commander.owes_hold:
            self._release()
        if self._intent == "run" and not self._commander.anchored:
            self._anchor()
        self._goal, rate = None, 0.0
        if self._intent == "run" and self._commander.anchored:
            rate = self._rate()
            self._encode()
            self._ask_for_plan()
            self._goal = self._next_goal(rate)
            self._from = self._commander.last
        self._settle(rate)
        self._end_step(late_s, rate)

    def _servo_step(self, part: int) -> None:
        """One command out, if it is known where the robot is."""
        self._mind_silence()
        if self._commander.anchored and self._goal is None and self._commander.still and self._is_stale:
            self._release()  # it may be moved while nobody sees it; what it was sent last would take it back
        if self._commander.anchored:
            target = None
            if self._goal is not None:
                target = self._commander.between(self._from, self._goal, part)
            if not self._commander.send(target):  # the robot must tell where it is
                self._release()
                if self._config.watchdog.robot_error == "stop":
                    self._intent = "stop"
        if self._intent != "run":
            if self._commander.anchored and self._commander.still:
                self._release()
            hopeless = self._intent == "stop" and self._commander.owes_hold_for(self._config.watchdog.give_up_s)
            if not self._commander.anchored and (not self._commander.owes_hold or hopeless):
                self._journal.enter("paused" if self._intent == "pause" else "stopped")
                self._holding_since = None

    def _mind_silence(self) -> None:
        """After a standstill of the loop nobody knows where the robot is: it holds, and commands begin anew."""
        if self._commander.silent_for((self._config.watchdog.max_gap_steps + 1) * self._control_dt):
            self._journal.fault("clock_gap", "no command was sent for too long: the loop stood still")
            self._gap_told, self._goal = True, None
            self._release()

    @property
    def _is_stale(self) -> bool:
        return "stale_observation" in self._journal.active

    def _obey(self) -> None:
        """What other threads asked for."""
        while True:
            try:
                request = self._requests.get_nowait()
            except queue.Empty:
                return
            self._journal.event(request, "asked for")
            if request == "stop":
                self._intent = "stop"
            elif request == "pause" and self._intent == "run":
                self._intent = "pause"
            elif request == "resume" and self._intent == "pause":
                self._intent = "run"
                self._commander.distrust_samples()  # what was seen while somebody moved the robot does not count
                self._gate.forget_freezing()
                self._new_epoch()
            elif request == "reset":
                self._new_epoch()

    def _look(self) -> None:
        """Takes in the robot's newest sample."""
        try:
            sample = self._robot.observe()
        except Exception as error:
            self._journal.condition("robot_observe", True, f"{type(error).__name__}: {error}")
            return
        self._journal.condition("robot_observe", False)
        problem = self._gate.admit(sample, self._clock.now())
        self._journal.condition("bad_observation", problem is not None, problem or "")

    def _collect_plan(self) -> None:
        """Follows a plan that is there."""
        now = self._clock.now()
        collected = self._planning.collect(self._journal.steps, now)
        if collected is None:
            return
        result, fate = collected
        if fate == "failed":
            self._journal.fault("plan_error", result.error)
            if self._config.watchdog.plan_error == "stop":
                self._intent = "stop"
        elif fate == "stale":
            self._journal.condition("stale_plan", True, f"of an observation {now - result.request.seen_s:.3f} s ago")
            if self._config.watchdog.late_plan == "stop" and self._followed:
                self._intent = "stop"
        elif fate == "followed":
            self._journal.condition("plan_late", False)
            self._journal.condition("stale_plan", False)

    def _anchor(self) -> None:
        """Lets commands begin where the robot is, if a sample tells."""
        now = self._clock.now()
        stale = self._gate.is_stale(now)
        if self._gate.newest is not None:
            self._journal.condition("stale_observation", stale, self._gate.told_age(now))
        if not stale:
            self._commander.anchor(self._gate.newest)

    def _rate(self) -> float:
        """How fast chunks are played in this step: 1, `slow_rate`, or 0 = hold."""
        config, rate = self._config.watchdog, 1.0
        key, now = self._gate.frozen_key(), self._clock.now()
        for kind, reaction, active, detail in (
            ("stale_observation", config.stale_observation, self._gate.is_stale(now), self._gate.told_age(now)),
            ("frozen_observation", config.frozen_observation, key is not None, f"{key!r} repeats itself"),
        ):
            self._journal.condition(kind, active, detail)
            if active:
                rate = min(rate, self._react(reaction))
        late = self._planning.overdue(self._journal.steps) or "stale_plan" in self._journal.active
        if config.late_plan == "slow" and self._followed and late:
            rate = min(rate, config.slow_rate)
        return rate

    @property
    def _blind(self) -> bool:
        """Whether no plan may be made from what is seen."""
        return bool(self._journal.active & {"stale_observation", "frozen_observation"})

    def _react(self, reaction: str) -> float:
        """The rate that goes with a reaction."""
        if reaction == "slow":
            return self._config.watchdog.slow_rate
        if reaction == "stop":
            self._intent = "stop"
        self._drop_plans()  # what comes after the fault is planned after it
        return 0.0

    def _encode(self) -> None:
        """One encoder step of the newest good sample, in every control step: time does not skip, as in training."""
        sample = self._gate.newest
        assert sample is not None, "anchored by one"
        started = self._clock.now()
        seen: dict[str, Any] = {}
        for key in self._policy.spec.observation:
            value = sample.observation[key]
            seen[key] = None if value is None else value[None]
        try:
            self._policy.observe(seen, self._executed(sample))
        except Exception as error:
            changed = isinstance(error, PolicyChangedError)
            self._journal.fault("changed_policy" if changed else "encoder_error", f"{type(error).__name__}: {error}")
            self._new_epoch()
            if changed and self._config.watchdog.changed_policy == "stop":
                self._intent = "stop"
        self._encoded = sample
        self._journal.encoder_ms.append(1e3 * (self._clock.now() - started))

    def _executed(self, sample: Sample) -> ActionArray | None:
        """(1, Da) what the robot did in the step before: as it tells, or else as it was sent."""
        told = None if sample is self._encoded else sample.executed
        known = self._commander.command if told is None else told
        fitting = self._commander.fitting(known)
        return None if fitting is None or not np.isfinite(fitting).all() else fitting[None].astype(np.float32)

    def _ask_for_plan(self) -> None:
        """Asks for the next plan when its time has come."""
        if self._blind:
            return
        assert self._encoded is not None, "in this control step"
        split = self._planning.ask(self._journal.steps, self._clock.now(), self._encoded.stamp_s, self._ahead)
        if split is not None:
            self._journal.condition("delay_too_long", not split.fits, self._planning.told_delay)
            self._collect_plan()  # in virtual time it may be there at once

    def _ahead(self, count: int) -> ActionArray | None:
        """(1, n, Da) what will be carried out in the control steps from this one on, behind the limits."""
        goals = self._planning.executor.upcoming(count)
        if self._approach is not None or not len(goals):
            return None
        return np.stack(self._commander.ahead(list(goals)))[None].astype(np.float32)

    def _next_goal(self, rate: float) -> Command | None:
        """The goal of this control step; None = brake and stand still."""
        if rate == 0 or self._intent != "run":
            return None
        goal = self._planning.executor.take(rate)
        if goal is None:
            if self._blind:  # no plan was asked for, so that none is late; the next one is a new start
                self._followed = False
            elif self._followed and not self._planning.rests:
                self._journal.condition("plan_late", True, "all actions are used up")
                if self._config.watchdog.late_plan == "stop":
                    self._intent = "stop"
            return None
        if not self._followed:
            self._followed = True
            if self._config.start.is_far(goal, self._commander.last, self._limits.rest):
                self._journal.fault(
                    "far_start", f"the first action is {np.round(goal - self._commander.last, 4).tolist()} away"
                )
                if self._config.start.reaction == "refuse":
                    self._intent = "stop"
                    return None
                self._approach = Approach(self._config.start, self._control_dt, self._limits.rest)
                self._from = self._commander.last
        if self._approach is not None:  # a point on the way to it after a far start
            goal = self._approach.step(goal, self._commander.last)
            self._approach = None if self._approach.over else self._approach
        return goal

    def _new_epoch(self) -> None:
        """Forgets the history and all plans, also those that are being made."""
        self._drop_plans()
        self._policy.reset()

    def _drop_plans(self) -> None:
        self._planning.drop()
        self._followed, self._approach = False, None
        self._journal.condition("plan_late", False)
        self._journal.condition("stale_plan", False)

    def _release(self) -> None:
        """Lets the robot hold by its own means; commands begin again from where it is then."""
        self._new_epoch()
        self._commander.release()

    def _settle(self, rate: float) -> None:
        """Names the state, and gives up after holding for too long."""
        if self._intent != "run":
            return
        now = self._clock.now()
        if self._goal is not None:
            self._journal.enter("running" if rate == 1.0 else "slow")
            self._holding_since = None
            return
        self._holding_since = now if self._holding_since is None else self._holding_since
        self._journal.enter("starting" if not self._followed and not self._journal.active else "holding")
        if now - self._holding_since > self._config.watchdog.give_up_s:
            why = ", ".join(sorted(self._journal.active)) or "there was no plan to follow"
            self._journal.fault("gave_up", f"held for {now - self._holding_since:.1f} s: {why}")
            self._intent = "stop"

    def _end_step(self, late_s: float, rate: float) -> None:
        """Keeps the step; `command` is the last one of the step before."""
        sample, fitting = self._gate.newest, self._commander.fitting
        values = {
            "late_ms": 1e3 * late_s, "rate": rate, "target": self._goal, "command": self._commander.command,
            "executed": fitting(sample and sample.executed), "pose": fitting(sample and sample.pose),
        }  # fmt: skip
        self._journal.end_step(sample, self._gate.age_s(self._clock.now()), values)

    def _finish(self, pacer: Pacer) -> None:
        """Whatever happened: the robot holds, and what is not on disk is written."""
        with contextlib.ExitStack() as ends:  # from the last to the first, whatever one of them raises
            ends.callback(self._journal.close, pacer)
            ends.callback(self._planner.close)
            ends.callback(setattr, self._journal, "state", "stopped")
            if self._journal.state != "stopped":
                self._commander.hold_at_last()
