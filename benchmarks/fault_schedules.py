"""Random schedules of faults in virtual time: the first half of `faults.py`.

A schedule is up to eight faults of `scd_robot.control.rehearsal` in 100 control steps, with random settings of the loop
and random limits; the robot is scripted, the loop is the real one. In every other schedule the policy is behind a
server, and the way there has faults, too.
"""

import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np

from scd_robot.control import (
    DelayConfig,
    ExecutionConfig,
    Limits,
    LoopConfig,
    RecorderConfig,
    StartGuard,
    WatchdogConfig,
    Workspace,
)
from scd_robot.control.executor import Strategy
from scd_robot.control.rehearsal import KINDS, LINK_KINDS, Incident, Rehearsal, rehearse
from scd_robot.serve import RemoteStream
from scd_robot.serve.rehearsal import behind_a_server

__all__ = ["STEPS", "run_piece", "settings"]

STEPS = 100


def settings(seed: int) -> dict[str, Any]:
    """What schedules are made of; results of others are not counted together."""
    return {"seed": seed, "steps": STEPS, "kinds": [*KINDS, *LINK_KINDS], "strategies": [*get_args(Strategy)]}


def random_limits(rng: np.random.Generator) -> Limits:
    """Places, velocities or both; sometimes a workspace."""
    kind = rng.integers(4)
    rest = ((None, None), (0.0, 0.0), (None, 0.0), (None, None))[kind]
    velocity, acceleration = (tuple(10 ** rng.uniform(low, high, 2)) for low, high in ((-0.5, 1.5), (0.0, 3.0)))
    box = Workspace((-0.9,), (0.9,), lambda at: at[:1] + 0.3 * np.sin(3 * at[1:])) if kind == 3 else None
    return Limits((-1.0, -1.0), (1.0, 1.0), velocity, acceleration, rest, box)


def random_config(rng: np.random.Generator, folder: Path) -> LoopConfig:
    """Any strategy and any reactions."""

    def one_of(*choices: Any) -> Any:
        return choices[rng.integers(len(choices))]

    watchdog = WatchdogConfig(
        stale_observation=one_of("hold", "hold", "slow", "slow", "stop"),
        frozen_keys=("camera",),
        max_frozen_s=0.2,
        frozen_observation=one_of("hold", "hold", "slow", "slow", "stop"),
        late_plan=one_of("hold", "hold", "slow", "slow", "stop"),
        plan_error=one_of("retry", "retry", "retry", "stop"),
        robot_error=one_of("hold", "hold", "hold", "stop"),
        give_up_s=one_of(1.0, 10.0),
    )
    delay = DelayConfig(window=10, warm_up=1)
    execution = ExecutionConfig(one_of(*get_args(Strategy)), one_of(None, 1, 4, 12, 16), delay=delay)
    guard = StartGuard(one_of(None, (0.1, 0.1)), one_of("blend", "blend", "blend", "refuse"), one_of(0.3, 1.0))
    recorder = RecorderConfig(folder, least_apart_s=2.0)
    return LoopConfig(int(rng.integers(1, 5)), execution, watchdog, guard, recorder)


class Behind:
    """`behind_a_server`, and what the server refused that no script told it to."""

    refused: Sequence[str] = ()

    def __call__(self, *parts: Any) -> RemoteStream:
        """In the place of that function."""
        stream = behind_a_server(*parts)
        self.refused = stream.link.refused
        return stream


def run_schedule(number: int, seed: int) -> tuple[list[Incident], Rehearsal, Sequence[str]]:
    """One of them, what happened, and what the loop's side of the connection did wrong."""
    rng = np.random.default_rng((seed, number))
    remote = bool(number % 2)
    kinds = KINDS + LINK_KINDS if remote else KINDS
    script = [
        Incident(kinds[rng.integers(len(kinds))], int(rng.integers(0, STEPS - 10)), int(rng.integers(1, 13)))
        for _ in range(rng.integers(0, 9))
    ]
    behind = Behind()
    with tempfile.TemporaryDirectory() as folder:
        done = rehearse(
            script,
            random_config(rng, Path(folder)),
            random_limits(rng),
            steps=STEPS,
            seed=number,
            plan_steps=float(rng.choice([0.0, 0.5, 1.5, 6.0, 14.0])),
            tells_executed=bool(rng.integers(2)),
            connect=behind if remote else None,
        )
    return script, done, behind.refused


def run_piece(first: int, count: int, seed: int) -> dict[str, Any]:
    """Some consecutive ones: counts, and those that did not go as they should."""
    totals: Counter[str] = Counter()
    faults: Counter[str] = Counter()
    bad = []
    began_s = time.process_time()
    for number in range(first, first + count):
        script, done, mistakes = run_schedule(number, seed)
        steps = 0 if done.report is None else done.report.steps
        forever = any(one.kind == "disk_full" and one.at + one.steps >= steps for one in script)
        unrecorded = 0 if forever else done.unrecorded
        totals.update(
            schedules=1,
            behind_a_server=number % 2,
            commands=done.commands,
            unsafe=len(done.violations),
            raised=done.raised is not None,
            stopped_early=done.report is not None and steps < STEPS,
            unrecorded=unrecorded,
            history_mistakes=len(mistakes),
            records=done.records,
        )
        faults += Counter({} if done.report is None else done.report.faults)
        if done.violations or done.raised or unrecorded:
            told = [f"{one.kind} at {one.at} for {one.steps}" for one in script]
            bad.append({"schedule": number, "script": told, "unsafe": done.violations[:3], "raised": repr(done.raised)})
    return {
        "totals": {name: int(value) for name, value in totals.items()},
        "faults": dict(faults),
        "not_as_it_should": bad,
        "cpu_s": time.process_time() - began_s,
    }
