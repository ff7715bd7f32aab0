"""A checkpoint drives a robot behind ROS 2 topics: joint states and images in, a trajectory or an array out.

Needs ROS 2 (source its setup file, and use its Python) and a LeRobot dataset's folder, of which meta/info.json and
meta/stats.json are read: its numbers must be named <joint>.pos, <joint>.vel or <joint>.effort, after the joints.
What the states and faults mean: docs/control.md.

    python examples/ros2_node.py policies/task data/task --camera front=/camera/image_raw --dry-run
    python examples/ros2_node.py policies/task data/task --command /controller/commands --array-joints shoulder elbow
"""

import argparse
import itertools
import logging
import signal
import sys
from pathlib import Path

from scd_robot.cli.policy_source import load_source
from scd_robot.control import ControlLoop, LoopConfig, RecorderConfig, StartGuard, WatchdogConfig
from scd_robot.control.dry_run import DryRun
from scd_robot.control.names import NameMap
from scd_robot.control.ros_robot import RosRobot, RosTopics


def main(options: argparse.Namespace) -> None:
    logging.basicConfig(format="%(message)s")
    policy = load_source(options.policy)  # a folder of 'scd export --format onnx' does as well, without torch
    names = NameMap.of_dataset(options.dataset)
    limits = names.limits(options.speed, 10 * options.speed)  # or those that the robot's maker tells: Limits(...)
    near = tuple(0.25 * (high - low) for low, high in zip(limits.low, limits.high, strict=True))

    topics = RosTopics(
        options.joint_states,
        options.command,
        "array" if options.array_joints else "trajectory",
        tuple(options.array_joints),
        dict(pair.split("=", 1) for pair in options.camera),
    )
    config = LoopConfig(
        start=StartGuard(near, reaction="refuse"),
        watchdog=WatchdogConfig(
            frozen_keys=tuple(set(names.cameras) & set(policy.spec.observation)),
            max_plan_age_s=options.max_plan_age,
        ),
        recorder=RecorderConfig(options.flights, at_end=options.dry_run),
    )
    with RosRobot(policy.spec, names, topics) as robot:
        loop = ControlLoop(DryRun(robot) if options.dry_run else robot, policy, limits, config)
        report = loop.run(max_steps=round(options.seconds / policy.spec.control_dt))
    print(f"{report.state} after {report.steps} control steps, {report.commands} commands")
    print(f"faults   {report.faults or 'none'}")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the robot holds, and a record is written
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("policy", type=Path, help="checkpoint or exported folder")
    parser.add_argument("dataset", type=Path, help="folder of the LeRobot dataset that it was trained on")
    parser.add_argument("--joint-states", default="/joint_states")
    parser.add_argument("--command", default="/joint_trajectory_controller/joint_trajectory")
    parser.add_argument("--array-joints", nargs="*", default=[], help="of the controller, in its order: send an array")
    parser.add_argument("--camera", nargs="*", default=[], metavar="NAME=TOPIC", help="as named in the dataset")
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--speed", type=float, default=0.5, help="most, in parts of an action's range per second")
    parser.add_argument("--max-plan-age", type=float, default=1.0, help="seconds from observation to plan; inf: any")
    parser.add_argument("--flights", type=Path, default=Path("runs/flights"), help="folder of flight records")
    parser.add_argument("--dry-run", action="store_true", help="read and plan, and send nothing")
    ours = itertools.takewhile(lambda word: word != "--ros-args", sys.argv[1:])  # what follows is rclpy's
    main(parser.parse_args(list(ours)))
