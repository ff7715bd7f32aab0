"""Does any fault make the control loop send an unsafe command?

    python benchmarks/faults.py                      10,000 random schedules in virtual time, then real runs
    python benchmarks/faults.py --schedules 500 --skip-real

A schedule is up to eight faults of `scd_robot.control.rehearsal` in 100 control steps, with random settings of the loop
and random limits; the robot is scripted, the loop is the real one. In the real runs a policy with random weights drives
Meta-World's push-v3, which goes on by the wall clock in a process of its own, and something is really broken: processes
are killed, threads sleep, files do not fit. Every command is checked at the robot's port, by
`scd_robot.control.inspection`: bounds, velocity, acceleration, workspace, spacing in time, NaN.

Prints counts; exits with 1 where a command was unsafe, a fault was not recorded, or the loop did not end as it should.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import logging
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from scd_robot.control import (
    ControlLoop,
    DelayConfig,
    ExecutionConfig,
    Limits,
    LoopConfig,
    LoopReport,
    MonotonicClock,
    RecorderConfig,
    StartGuard,
    WatchdogConfig,
    Workspace,
)
from scd_robot.control.inspection import InspectedRobot
from scd_robot.control.recorder import read_record
from scd_robot.control.rehearsal import KINDS, Incident, rehearse

STEPS = 100
REAL_DT = 0.05  # slow motion, so that a busy machine can follow
REAL_STEPS = 160
FAULT_AT = 50


# -------------------------------------------------------------------------------------------------- virtual schedules


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
    execution = ExecutionConfig(
        one_of("receding", "prefix", "ensemble"), one_of(None, 1, 4, 12, 16), delay=DelayConfig(window=10, warm_up=1)
    )
    guard = StartGuard(one_of(None, (0.1, 0.1)), one_of("blend", "blend", "blend", "refuse"), one_of(0.3, 1.0))
    recorder = RecorderConfig(folder, least_apart_s=2.0)
    return LoopConfig(int(rng.integers(1, 5)), execution, watchdog, guard, recorder)


def run_schedules(count: int, seed: int) -> bool:
    """Runs them, prints counts, and returns whether all was well."""
    totals: Counter[str] = Counter()
    faults: Counter[str] = Counter()
    started = time.monotonic()
    for number in range(count):
        rng = np.random.default_rng((seed, number))
        script = [
            Incident(KINDS[rng.integers(len(KINDS))], int(rng.integers(0, STEPS - 10)), int(rng.integers(1, 13)))
            for _ in range(rng.integers(0, 9))
        ]
        with tempfile.TemporaryDirectory() as folder:
            done = rehearse(
                script,
                random_config(rng, Path(folder)),
                random_limits(rng),
                steps=STEPS,
                seed=number,
                plan_steps=float(rng.choice([0.0, 0.5, 1.5, 6.0, 14.0])),
                tells_executed=bool(rng.integers(2)),
            )
        forever = any(one.kind == "disk_full" and one.at + one.steps >= (done.report or _NONE).steps for one in script)
        totals.update(
            schedules=1,
            commands=done.commands,
            unsafe=len(done.violations),
            raised=done.raised is not None,
            stopped_early=done.report is not None and done.report.steps < STEPS,
            unrecorded=0 if forever else done.unrecorded,
            records=done.records,
        )
        faults += Counter({} if done.report is None else done.report.faults)
        if done.violations or done.raised or (done.unrecorded and not forever):
            print(f"schedule {number}: {script}\n  {done.violations[:3]} {done.raised!r} unrecorded {done.unrecorded}")
        if number % 500 == 499:
            print(f"  after {number + 1} schedules: " + told(totals), flush=True)
    print(f"virtual time, {time.monotonic() - started:.0f} s: " + told(totals))
    print(f"  faults: {sum(faults.values())}: " + told(faults))
    return not (totals["unsafe"] or totals["raised"] or totals["unrecorded"])


_NONE = LoopReport("stopped", 0, 0, {}, {}, {}, {}, 0)


def told(counts: Counter[str]) -> str:
    """As words."""
    return ", ".join(f"{name.replace('_', ' ')} {counts[name]:,}" for name in counts)


# --------------------------------------------------------------------------------------------------------- real runs


class Broken:
    """A policy and a robot that break on demand; everything else is passed on."""

    def __init__(self, inner: Any) -> None:
        self._inner, self.breaks = inner, {}  # by method: called first, with the method's result function

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._inner, name)
        broken = self.breaks.get(name)
        return value if broken is None else lambda *args: broken(value, *args)


def fail(method: Callable[..., Any], *args: Any) -> Any:
    """In the place of a call."""
    raise ConnectionError("broken on purpose")


def slow(method: Callable[..., Any], *args: Any) -> Any:
    """A call that takes two seconds."""
    time.sleep(2.0)
    return method(*args)


def spoil(method: Callable[..., Any]) -> Any:
    """NaN in an observation."""
    sample = method()
    return replace(sample, observation={**sample.observation, "proprio": sample.observation["proprio"] * np.nan})


class Frozen:
    """The first observation again and again, with new stamps."""

    kept = None

    def observe(self, method: Callable[..., Any]) -> Any:
        """In the place of the robot's."""
        sample = method()
        self.kept = self.kept or sample
        return replace(sample, observation=self.kept.observation)


# By name: what breaks, where, for how many control steps, the fault that must be recorded, and whether it ends the run.
REAL = {
    "nothing": (None, None, 0, None, False),
    "slow plan": ("policy", {"plan_from": slow}, 12, "plan_late", False),
    "exception in a plan": ("policy", {"plan_from": fail}, 20, "plan_error", False),
    "exception in the encoder": ("policy", {"observe": fail}, 5, "encoder_error", False),
    "NaN observation": ("robot", {"observe": spoil}, 20, "bad_observation", False),
    "frozen sensor": ("robot", {"observe": Frozen().observe}, 30, "frozen_observation", False),
    "stall of the loop": ("robot", {"observe": slow}, 1, "clock_gap", False),
    "commands get lost": ("robot", {"send": fail}, 5, "robot_send", False),
    "simulator killed": ("kill", None, 0, "robot_observe", True),
    "full disk": ("disk", {"plan_from": fail}, 10, "recorder_error", False),
}


def run_real(name: str, policy: Any, folder: Path) -> bool:
    """Breaks one thing in the middle of a run; prints and returns whether all was well."""
    from scd_robot.sim_eval.simulated_robot import SimulatedRobot, limits_of

    where, breaks, steps, expected, ends = REAL[name]
    broken_policy = Broken(policy)
    with SimulatedRobot("metaworld/push-v3", 0, control_dt=REAL_DT) as simulator:
        robot = Broken(simulator)
        limits = limits_of(simulator.spec, velocity=10.0)
        port = InspectedRobot(robot, limits, REAL_DT, MonotonicClock())
        watchdog = WatchdogConfig(max_age_s=0.4, frozen_keys=("proprio",), max_frozen_s=0.5, give_up_s=3.0)
        config = LoopConfig(watchdog=watchdog, recorder=RecorderConfig(folder, least_apart_s=1.0))
        loop = ControlLoop(port, broken_policy, limits, config)
        count = 0
        unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)

        def stage() -> bool:
            nonlocal count
            count += 1
            if count == FAULT_AT:
                if where == "kill":
                    os.kill(simulator._process.pid, signal.SIGKILL)  # type: ignore[arg-type]
                if where == "disk":
                    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, unlimited[1]))
                (robot if where == "robot" else broken_policy).breaks = breaks or {}
            if count == FAULT_AT + steps:
                robot.breaks = broken_policy.breaks = {}
            if count == FAULT_AT + steps + 25:
                resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
            return False

        report = loop.run(REAL_STEPS, stage)
    recorded: Counter[str] = Counter()
    for record in sorted(folder.iterdir()) if folder.exists() else []:
        recorded |= Counter(read_record(record)[1]["faults"])
    ended_early = report.steps < REAL_STEPS
    missing = Counter(report.faults) - recorded
    fine = (
        not port.violations
        and not missing
        and ended_early == ends
        and (expected is None or report.faults.get(expected))
    )
    times, pacing = report.times_ms, report.pacing
    print(
        f"  {name}: {port.commands} commands, unsafe {len(port.violations)}; faults {report.faults}; unrecorded "
        f"{dict(missing)}; {'ended' if ended_early else 'went on'}; plans {report.plans}; missed {pacing['missed']} of "
        f"{pacing['ticks']}; encoder p50/p99 {times['encoder']['p50']:.1f}/{times['encoder']['p99']:.1f} ms, plan "
        f"{times['plan']['p50']:.1f}/{times['plan']['p99']:.1f} ms{'' if fine else '   NOT AS IT SHOULD BE'}"
    )
    return bool(fine)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schedules", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--skip-real", action="store_true")
    parser.add_argument("--only", nargs="+", choices=list(REAL), default=list(REAL), help="real runs")
    options = parser.parse_args()
    logging.disable(logging.ERROR)
    fine = run_schedules(options.schedules, options.seed)
    if not options.skip_real:
        import torch
        from latency import make_policy

        torch.set_num_threads(1)
        print(f"wall clock, metaworld/push-v3 at {1 / REAL_DT:g} Hz, {REAL_STEPS} control steps each:")
        for name in options.only:
            policy = make_policy(64, 4)
            policy.spec = replace(policy.spec, control_dt=REAL_DT)
            with tempfile.TemporaryDirectory() as folder:
                fine = run_real(name, policy, Path(folder) / "records") and fine
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
