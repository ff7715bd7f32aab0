"""What a control loop keeps of its own run: its state, faults and those that go on, flight records, the report.

Shapes: Da action width.
"""

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from scd_robot.control.clock import Clock, Pacer
from scd_robot.control.interfaces import Sample
from scd_robot.control.planning import KEPT_TIMES, Planning
from scd_robot.control.recorder import FlightRecorder
from scd_robot.control.settings import LoopReport, State, percentiles
from scd_robot.control.watchdog import FAULTS
from scd_robot.latest import Latest

__all__ = ["Journal"]

logger = logging.getLogger(__name__)

_QUIET_S = 1.0  # of the same kind the log has no more than one line in that time; counts and records have all


@dataclass
class _Told:
    at: float
    left_out: int = 0


class Journal:
    """Notes what happens; used by the loop's thread alone.

    Args:
        recorder: writes flight records.
        clock: the loop's.
        planning: whose counts and times are told.

    Attributes:
        state: of the loop.
        faults: how often each kind began.
        active: kinds that go on.
        step: number of the present control step on the loop's grid; -1 before the first.
        steps: control steps that were taken.
        commands: that were sent.
        encoder_ms: of encoder steps.
    """

    def __init__(self, recorder: FlightRecorder, clock: Clock, planning: Planning) -> None:
        self._recorder, self._clock, self._planning = recorder, clock, planning
        self.state: State = "starting"
        self.faults: Counter[str] = Counter()
        self.active: set[str] = set()
        self._told: dict[str, _Told] = {}
        self.step, self.steps, self.commands = -1, 0, 0
        self.encoder_ms = Latest(KEPT_TIMES)

    def enter(self, state: State) -> None:
        """Notes the state, where it is a new one."""
        if state != self.state:
            self.event(state, f"was {self.state}")
            self.state = state

    def condition(self, kind: str, active: bool, detail: str = "") -> None:
        """A fault that goes on for a while counts once."""
        if active and kind not in self.active:
            self.active.add(kind)
            self.fault(kind, detail)
        elif not active and kind in self.active:
            self.active.discard(kind)
            self.event(kind, "is over")

    def fault(self, kind: str, detail: str) -> None:
        """Counts and logs a fault (each kind once a second), and asks for a record of it."""
        assert kind in FAULTS, kind
        now = self._clock.now()
        self.faults[kind] += 1
        self._log(kind, detail, now)
        self._recorder.event(now, self.step, kind, detail, fault=True)

    def _log(self, kind: str, detail: str, now: float) -> None:
        told = self._told.get(kind)
        if told is not None and now - told.at < _QUIET_S:
            told.left_out += 1
            return
        more = f"; {told.left_out} more of them since the last line" if told is not None and told.left_out else ""
        logger.warning("control step %d: %s (%s)%s", self.step, FAULTS[kind], detail, more)
        self._told[kind] = _Told(now)

    def event(self, kind: str, detail: str) -> None:
        """Notes what is no fault."""
        self._recorder.event(self._clock.now(), self.step, kind, detail, fault=False)

    def end_step(self, sample: Sample | None, age_s: float, values: Mapping[str, Any]) -> None:
        """Keeps a control step.

        Args:
            sample: the newest good one.
            age_s: how old it is [s].
            values: further columns of the record.
        """
        now = self._clock.now()
        columns = {"step": self.step, "time_s": now, "age_s": age_s, "epoch": self._planning.epoch, "state": self.state}
        self._recorder.step({**columns, **values}, None if sample is None else sample.observation)
        self.steps += 1
        if (failure := self._recorder.failure()) is not None:
            self.fault("recorder_error", failure)
        self._recorder.flush(now, self._summary())

    def close(self, pacer: Pacer) -> None:
        """Writes what is not on disk."""
        self._recorder.flush(self._clock.now(), {**self._summary(), "pacing": pacer.report()}, last=True)
        self._recorder.close()
        while (failure := self._recorder.failure()) is not None:
            self.fault("recorder_error", failure)

    def report(self, pacer: Pacer) -> LoopReport:
        """Of the run."""
        return LoopReport(
            **self._summary(),
            commands=self.commands,
            pacing=pacer.report(),
            times_ms={"encoder": percentiles(self.encoder_ms), "plan": percentiles(self._planning.times_ms)},
            delay_steps=self._planning.delay_steps,
        )

    def _summary(self) -> dict[str, Any]:
        return {
            "state": self.state,
            "steps": self.steps,
            "faults": dict(self.faults),
            "plans": dict(self._planning.counts),
        }
