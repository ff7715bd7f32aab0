"""A checkpoint drives a robot in real time: encoder in every step, plans beside it, every command within limits.

The robot is a simulator that goes on by the wall clock in a process of its own. Needs the extra [sim] and a checkpoint,
such as one of train_from_python.py. What the states and faults mean: docs/control.md.

    python examples/control_loop.py runs/example/run
    scd replay-log runs/flights --out flight.html     after a fault
"""

import argparse
import logging
from dataclasses import replace
from pathlib import Path
from typing import get_args

from scd_robot.cli.policy_source import load_source
from scd_robot.control import ControlLoop, ExecutionConfig, LoopConfig, RecorderConfig, WatchdogConfig
from scd_robot.control.executor import Strategy
from scd_robot.seeding import EVALUATION, derive_seed
from scd_robot.sim_eval.simulated_robot import SimulatedRobot, limits_of


def main(options: argparse.Namespace) -> None:
    logging.basicConfig(format="%(message)s")
    policy = load_source(options.checkpoint)  # a folder of 'scd export --format onnx' does as well, without torch
    control_dt = policy.spec.control_dt * options.slow_motion
    policy.spec = replace(policy.spec, control_dt=control_dt)

    # On a robot: a class with observe(), send(command) and hold() in the place of this one. Where actions are changes 0
    # stands still; for joint positions give Limits(..., rest=(None, ...)) and Sample(..., pose=...).
    seed = derive_seed(EVALUATION, options.episode)
    with SimulatedRobot(options.environment, seed, control_dt=control_dt) as robot:
        limits = limits_of(robot.spec, velocity=options.velocity / control_dt)
        config = LoopConfig(
            execution=ExecutionConfig(options.strategy),
            watchdog=WatchdogConfig(max_age_s=max(0.1, 4 * control_dt)),
            recorder=RecorderConfig(options.flights),
        )
        loop = ControlLoop(robot, policy, limits, config)
        # loop.pause(), resume(), reset() and stop() may be called from another thread, a foot switch's for one.
        report = loop.run(max_steps=options.max_steps, until=lambda: robot.finished)

    print("success" if robot.success else "no success", f"after {robot.steps} control steps of the robot")
    for name, times in report.times_ms.items():
        print(f"{name:8}", "  ".join(f"{key} {value:.2f} ms" for key, value in times.items()))
    ticks, missed, worst_ms = (report.pacing[key] for key in ("ticks", "missed", "worst_late_ms"))
    print(f"pacing   {missed} of {ticks + missed} control steps missed, at worst {worst_ms:.2f} ms late")
    print(f"plans    {report.plans}, delay {report.delay_steps} control steps")
    print(f"faults   {report.faults or 'none'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--environment", default="metaworld/push-v3")
    parser.add_argument("--episode", type=int, default=0)
    parser.add_argument("--max-steps", type=int, default=500)
    parser.add_argument("--strategy", choices=get_args(Strategy), default="prefix")
    parser.add_argument("--slow-motion", type=float, default=1.0, help="so many times slower than the data")
    parser.add_argument(
        "--velocity", type=float, default=1.0, help="most change of an action per control step, of its range"
    )
    parser.add_argument("--flights", type=Path, default=Path("runs/flights"), help="folder of flight records")
    main(parser.parse_args())
