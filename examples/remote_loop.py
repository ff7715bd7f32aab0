"""The control loop on a robot's computer, the policy on another machine: limits and watchdog here, plans from there.

Needs the extra [serve] only; on a robot's computer scd_robot_runtime, which then is imported in the place of scd_robot.
The robot here is a stand-in that sees noise and is at once where it is told to be. What the states and faults mean, and
what happens when the server or the network is gone: docs/control.md.

    scd serve runs/example/run
    python examples/remote_loop.py ws://127.0.0.1:8000
"""

import argparse
import logging
import signal
import time
from pathlib import Path
from typing import get_args

import numpy as np

from scd_robot.control import ControlLoop, ExecutionConfig, Limits, LoopConfig, RecorderConfig, Sample, WatchdogConfig
from scd_robot.control.executor import Strategy
from scd_robot.serve import RemoteStream


class StandIn:
    """Your robot takes its place: observe, send and hold, which are quick and raise where they fail."""

    def __init__(self, spec):
        self.spec, self.at, self.rng = spec, np.zeros(spec.action_dim), np.random.default_rng(0)

    def observe(self):
        """The newest sample."""
        seen = {
            key: self.rng.uniform(0, 256 if array.dtype == "uint8" else 1, array.shape).astype(array.dtype)
            for key, array in self.spec.observation.items()
        }
        return Sample(seen, time.monotonic(), pose=self.at.copy())  # the pose: the command that leaves it where it is

    def send(self, command):
        """Follows."""
        self.at = np.array(command)

    def hold(self):
        """Stays."""


def main(options: argparse.Namespace) -> None:
    logging.basicConfig(format="%(message)s")
    policy = RemoteStream.connect(options.address, api_key=options.api_key, task=options.task)
    wide = policy.spec.action_dim
    limits = Limits((-1.0,) * wide, (1.0,) * wide, (2.0,) * wide, (40.0,) * wide, rest=(None,) * wide)  # of your robot
    watchdog = WatchdogConfig(max_plan_age_s=options.max_plan_age)
    execution = ExecutionConfig(options.strategy)
    config = LoopConfig(execution=execution, watchdog=watchdog, recorder=RecorderConfig(options.flights))
    report = ControlLoop(StandIn(policy.spec), policy, limits, config).run(max_steps=options.steps)
    ticks, missed, worst_ms = (report.pacing[key] for key in ("ticks", "missed", "worst_late_ms"))
    print(f"pacing   {missed} of {ticks + missed} control steps missed, at worst {worst_ms:.2f} ms late")
    print(f"plans    {report.plans}, delay {report.delay_steps} control steps, {report.times_ms['plan']} ms")
    print(f"faults   {report.faults or 'none'}")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the robot holds, and a record is written
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("address")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--api-key")
    parser.add_argument("--task", help="in words, for a policy of several")
    parser.add_argument("--strategy", choices=get_args(Strategy), default="prefix", help="see docs/control.md")
    parser.add_argument("--max-plan-age", type=float, default=1.0, help="seconds from observation to plan; inf: any")
    parser.add_argument("--flights", type=Path, default=Path("runs/flights"), help="folder of flight records")
    main(parser.parse_args())
