"""A checkpoint drives an SO-100 or SO-101 arm of LeRobot: every command within the range and speed of its data.

Needs lerobot 0.4.4 with the arm's extra [feetech], the arm calibrated by lerobot-calibrate, and the dataset's folder,
of which meta/info.json and meta/stats.json are read. Any other robot of LeRobot: another class in the place of SO101.
What the states and faults mean: docs/control.md.

    python examples/lerobot_robot.py policies/task data/task --port /dev/ttyACM0 --camera front=0 --dry-run
"""

import argparse
import logging
import signal
from pathlib import Path

from scd_robot.cli.policy_source import load_source
from scd_robot.control import ControlLoop, LoopConfig, RecorderConfig, StartGuard, WatchdogConfig
from scd_robot.control.dry_run import DryRun
from scd_robot.control.lerobot_robot import LeRobotRobot
from scd_robot.control.names import NameMap


def main(options: argparse.Namespace) -> None:
    from lerobot.cameras.opencv import OpenCVCameraConfig
    from lerobot.robots.so_follower import SO101Follower, SOFollowerRobotConfig

    logging.basicConfig(format="%(message)s")
    policy = load_source(options.policy)  # a folder of 'scd export --format onnx' does as well, without torch
    names = NameMap.of_dataset(options.dataset)
    limits = names.limits(options.speed, 10 * options.speed)  # or those that the robot's maker tells: Limits(...)
    near = tuple(0.25 * (high - low) for low, high in zip(limits.low, limits.high, strict=True))

    cameras, key_of = {}, {camera: key for key, camera in names.cameras.items()}
    for name, index in (pair.split("=", 1) for pair in options.camera):
        height, width, _ = policy.spec.observation[key_of[name]].shape
        source = int(index) if index.isdigit() else Path(index)
        cameras[name] = OpenCVCameraConfig(source, fps=30, width=width, height=height)
    arm = SO101Follower(SOFollowerRobotConfig(id=options.id, port=options.port, cameras=cameras))

    config = LoopConfig(
        start=StartGuard(near, reaction="refuse"),
        watchdog=WatchdogConfig(
            frozen_keys=tuple(set(names.cameras) & set(policy.spec.observation)),
            max_plan_age_s=options.max_plan_age,
        ),
        recorder=RecorderConfig(options.flights, at_end=options.dry_run),
    )
    with LeRobotRobot(arm, policy.spec, names) as robot:
        loop = ControlLoop(DryRun(robot) if options.dry_run else robot, policy, limits, config)
        try:
            report = loop.run(max_steps=round(options.seconds / policy.spec.control_dt))
        finally:
            input("The arm holds, and goes limp now: support it, then press Enter. ")
    print(f"{report.state} after {report.steps} control steps, {report.commands} commands")
    print(f"faults   {report.faults or 'none'}")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the robot holds, and a record is written
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("policy", type=Path, help="checkpoint or exported folder")
    parser.add_argument("dataset", type=Path, help="folder of the LeRobot dataset that it was trained on")
    parser.add_argument("--port", default="/dev/ttyACM0")
    parser.add_argument("--id", default="follower", help="under which the arm was calibrated")
    parser.add_argument("--camera", nargs="*", default=[], metavar="NAME=INDEX", help="as named in the dataset")
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--speed", type=float, default=0.5, help="most, in parts of an action's range per second")
    parser.add_argument("--max-plan-age", type=float, default=1.0, help="seconds from observation to plan; inf: any")
    parser.add_argument("--flights", type=Path, default=Path("runs/flights"), help="folder of flight records")
    parser.add_argument("--dry-run", action="store_true", help="read and plan, and send nothing")
    main(parser.parse_args())
