"""Does the control loop stay as it is for an hour? Memory, missed control steps, jitter.

    python benchmarks/soak.py                          an hour at 20 Hz, the policy in the loop's process
    python benchmarks/soak.py --server                 the policy behind a server in a process of its own
    python benchmarks/soak.py --minutes 3              tells that it works, not yet whether memory grows

A policy of the default size with random weights drives a stand-in for a robot by the wall clock; every command is
checked at the robot's port. Each half minute the loop is reset, and in the middle of it a plan fails (in process), so
that epochs and flight records take part. Memory is the resident set of each process; its growth is counted from the end
of the first sixth (ten minutes of an hour) on, between the medians of the two sixths that begin and end what is left.

Exits with 1 where a command was unsafe, the loop ended early, or memory grew by 1 % (of runs of 20 minutes and more).
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import contextlib
import datetime
import logging
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from fault_runs import Server, policy_with_random_weights
from job import code_version, describe_machine, result_file

from scd_robot.control import ControlLoop, Limits, LoopConfig, MonotonicClock, RecorderConfig, Sample, WatchdogConfig
from scd_robot.control.inspection import InspectedRobot
from scd_robot.output import write_json
from scd_robot.serve import RemoteStream
from scd_robot.types import PolicySpec

MOST_GROWTH = 0.01
SHORTEST_MINUTES = 20.0  # from which on growth is judged
SAMPLE_S, RESET_S = 5.0, 30.0


class StandIn:
    """A robot that sees noise and is where its last command said."""

    def __init__(self, spec: PolicySpec) -> None:
        self._spec, self._rng = spec, np.random.default_rng(0)
        self.pose = np.zeros(spec.action_dim)

    def observe(self) -> Sample:
        """A new sample each time."""
        shapes = {key: array.shape for key, array in self._spec.observation.items()}
        seen = {key: self._rng.normal(0, 0.3, shape).astype(np.float32) for key, shape in shapes.items()}
        return Sample(seen, time.monotonic(), self.pose.copy())

    def send(self, command: np.ndarray) -> None:
        """Follows."""
        self.pose = np.array(command)

    def hold(self) -> None:
        """Stays."""


class Memory:
    """Called in each control step: looks at the processes now and then, and disturbs the loop a little."""

    def __init__(self, processes: dict[str, psutil.Process], minutes: float, fail: Any) -> None:
        self._processes, self._fail = processes, fail
        self._began_s = time.monotonic()
        self._end_s = self._began_s + 60 * minutes
        self._next_s = self._next_reset_s = self._began_s
        self.loop: ControlLoop | None = None
        self.seconds: list[float] = []
        self.mib: dict[str, list[float]] = {name: [] for name in processes}

    def __call__(self) -> bool:
        """Whether the time is over."""
        now = time.monotonic()
        if now >= self._next_s:
            self._next_s = now + SAMPLE_S
            self.seconds.append(now - self._began_s)
            for name, process in self._processes.items():
                self.mib[name].append(process.memory_info().rss / 2**20)
        if now >= self._next_reset_s + RESET_S:
            self._next_reset_s = now
            assert self.loop is not None
            self.loop.reset()
            self._fail(now + RESET_S / 2)
        return now >= self._end_s

    def growth(self) -> dict[str, dict[str, float]]:
        """Of each process: MiB after the first sixth and at the end, and what that is of the former."""
        at, end = np.array(self.seconds), self.seconds[-1]
        begin = at >= end / 6
        found = {}
        for name, values in self.mib.items():
            mib = np.array(values)
            first = float(np.median(mib[begin & (at <= 2 * end / 6)]))
            last = float(np.median(mib[at >= 5 * end / 6]))
            found[name] = {
                "first_mib": first,
                "last_mib": last,
                "most_mib": float(mib.max()),
                "grown": last / first - 1,
            }
        return found


class Failing:
    """Passes plans on, but for one at a time that is told beforehand."""

    def __init__(self, policy: Any) -> None:
        self._policy, self._at_s = policy, np.inf

    def __getattr__(self, name: str) -> Any:
        return getattr(self._policy, name)

    def fail_at(self, time_s: float) -> None:
        """The first plan after this time [s] fails."""
        self._at_s = time_s

    def plan_from(self, *arguments: Any) -> Any:
        """Plans, or fails."""
        if time.monotonic() >= self._at_s:
            self._at_s = np.inf
            raise RuntimeError("failed on purpose")
        return self._policy.plan_from(*arguments)


@contextlib.contextmanager
def policy_of(server: bool, rate_hz: float) -> Iterator[tuple[Any, Any, dict[str, psutil.Process]]]:
    """The policy, how its next plan is made to fail, and the processes that are looked at."""
    processes = {"loop": psutil.Process()}
    if not server:
        policy = Failing(policy_with_random_weights())
        policy._policy.spec = replace(policy.spec, control_dt=1 / rate_hz)
        yield policy, policy.fail_at, processes
        return
    process = Server()
    try:
        stream = RemoteStream.connect(process.address, connect_timeout_s=600.0)
        stream.spec = replace(stream.spec, control_dt=1 / rate_hz)
        yield stream, lambda at_s: None, {**processes, "server": psutil.Process(process.pid)}
    finally:
        process.kill()


def soak(minutes: float, rate_hz: float, server: bool) -> dict[str, Any]:
    """Runs the loop for so long."""
    with tempfile.TemporaryDirectory() as folder, policy_of(server, rate_hz) as (policy, fail, processes):
        spec = policy.spec
        wide, dt = spec.action_dim, spec.control_dt
        limits = Limits((-1.0,) * wide, (1.0,) * wide, (0.5 / dt,) * wide, (0.2 / dt**2,) * wide, (None,) * wide)
        port = InspectedRobot(StandIn(spec), limits, dt, MonotonicClock())
        watchdog = WatchdogConfig(max_age_s=max(0.2, 4 * dt), give_up_s=60.0)
        config = LoopConfig(watchdog=watchdog, recorder=RecorderConfig(Path(folder) / "records"))
        memory = Memory(processes, minutes, fail)
        memory.loop = ControlLoop(port, policy, limits, config)
        report = memory.loop.run(until=memory)
        records = len(list((Path(folder) / "records").glob("*")))
    return {
        "minutes": memory.seconds[-1] / 60,
        "control_steps": report.steps,
        "commands": port.commands,
        "unsafe": port.violations[:5],
        "faults": report.faults,
        "records": records,
        "plans": report.plans,
        "pacing": report.pacing,
        "times_ms": report.times_ms,
        "growth": memory.growth(),
        "memory": {"seconds": memory.seconds, "mib": memory.mib},
    }


def tell(found: dict[str, Any]) -> str:
    """For people."""
    pacing, times = found["pacing"], found["times_ms"]
    due = pacing["ticks"] + pacing["missed"]
    edges = [f"under {edge:g} ms" for edge in pacing["late_ms_edges"]] + ["later"]
    late = ", ".join(f"{edge} {count}" for edge, count in zip(edges, pacing["late_counts"], strict=True) if count)
    lines = [
        f"{found['minutes']:.1f} minutes, {found['control_steps']:,} control steps, {found['commands']:,} commands, "
        f"unsafe {len(found['unsafe'])}",
        f"missed {pacing['missed']} of {due:,} ({100 * pacing['missed'] / max(due, 1):.2f} %); begun late by: {late}; "
        f"at worst {pacing['worst_late_ms']:.1f} ms",
        *(
            f"{name} ms: " + ", ".join(f"{key} {value:.1f}" for key, value in one.items())
            for name, one in times.items()
        ),
        f"plans {found['plans']}; faults {found['faults']}; flight records {found['records']}",
    ]
    for name, one in found["growth"].items():
        growth = f"{one['first_mib']:.1f} MiB, then {one['last_mib']:.1f} ({100 * one['grown']:+.2f} %)"
        lines.append(f"memory of the {name}: {growth}")
    return "\n".join(lines)


def main() -> int:
    """Runs, prints, and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--rate", type=float, default=20.0, metavar="HZ", help="of control steps")
    parser.add_argument("--server", action="store_true", help="the policy is behind a server")
    parser.add_argument("--out", type=result_file, default="runs/benchmarks/soak.json")
    options = parser.parse_args()
    logging.disable(logging.ERROR)
    load = os.getloadavg()[0]
    found = soak(options.minutes, options.rate, options.server)
    print(tell(found))
    about = {
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", *sys.argv]),
        "code": code_version(),
    }
    machine = {**describe_machine(), "load_1min_at_start": load}
    write_json(options.out, {**about, "machine": machine, "rate_hz": options.rate, "server": options.server, **found})
    print(f"written: {options.out}")
    grown = max(one["grown"] for one in found["growth"].values())
    if options.minutes < SHORTEST_MINUTES:
        print(f"too short to judge growth, which takes {SHORTEST_MINUTES:g} minutes")
        grown = 0.0
    return int(bool(found["unsafe"]) or grown >= MOST_GROWTH or found["minutes"] < 0.95 * options.minutes)


if __name__ == "__main__":
    sys.exit(main())
