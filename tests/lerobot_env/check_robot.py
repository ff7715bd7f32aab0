"""Drives a robot of LeRobot's own base class by our control loop, and compares what it sees with what LeRobot records.

    python check_robot.py

Runs in the environment of constraints/lerobot.txt, with scd_robot.
"""

# ruff: noqa: E402  torchvision is mended before lerobot imports it
import sys
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from outside import shim

shim.mend_torchvision()  # lerobot.datasets imports it
from lerobot.datasets.utils import build_dataset_frame, hw_to_dataset_features
from lerobot.robots import Robot, RobotConfig
from lerobot.utils.decorators import check_if_already_connected, check_if_not_connected
from lerobot.utils.errors import DeviceNotConnectedError

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))
from robot_fakes import DT, LIMITS, NAMES, SPEC, FakeLeRobot, Stage, virtual_clock

from scd_robot.control.lerobot_robot import LeRobotRobot, names_of_robot


@RobotConfig.register_subclass("check_arm")
@dataclass(kw_only=True)
class ArmConfig(RobotConfig):
    """Of an arm without hardware."""


class Arm(Robot):
    """An arm without hardware: LeRobot's base class and its guards, the rest is the tests' fake."""

    config_class = ArmConfig
    name = "check_arm"

    def __init__(self, config):
        super().__init__(config)
        self.fake = FakeLeRobot()

    @cached_property
    def observation_features(self):
        return self.fake.observation_features

    @cached_property
    def action_features(self):
        return self.fake.action_features

    @property
    def is_connected(self):
        return self.fake.connected

    @check_if_already_connected
    def connect(self, calibrate=True):
        self.fake.connect(calibrate)

    @property
    def is_calibrated(self):
        return True

    def calibrate(self):
        raise AssertionError("it asks questions")

    def configure(self):
        """Nothing."""

    @check_if_not_connected
    def get_observation(self):
        return self.fake.get_observation()

    @check_if_not_connected
    def send_action(self, action):
        return self.fake.send_action(action)

    @check_if_not_connected
    def disconnect(self):
        self.fake.disconnect()


def place(arm):
    """Where it really is (Da,)."""
    return np.array([arm.fake.positions[name.removesuffix(".pos")] for name in NAMES.action])


def check_names(arm):
    """Names and arrays are those of a dataset that LeRobot records of this robot."""
    features = hw_to_dataset_features(arm.observation_features, "observation")
    features |= hw_to_dataset_features(arm.action_features, "action")
    names = names_of_robot(arm)
    assert {key: list(called) for key, called in names.vectors.items()} == {
        key: feature["names"] for key, feature in features.items() if key == "observation.state"
    }
    assert list(names.action) == features["action"]["names"]
    with LeRobotRobot(arm, SPEC, names, patience_s=20.0) as robot:
        arm.fake.frozen = True
        found = robot.observe()
        frame = build_dataset_frame(features, arm.get_observation(), "observation")
    assert found.observation.keys() == frame.keys()
    for key, value in frame.items():
        np.testing.assert_array_equal(found.observation[key], value)
        assert found.observation[key].dtype == value.dtype
    arm.fake.frozen = False


def check_loop(arm):
    """It moves, within its limits; an error of LeRobot's is a fault, and it goes on after it."""
    clock = virtual_clock()
    with LeRobotRobot(arm, SPEC, NAMES, patience_s=20.0, clock=clock) as robot:
        stage = Stage(robot, clock, lambda: place(arm))
        stage.at[30] = lambda: setattr(arm.fake, "connected", False)
        stage.at[40] = lambda: setattr(arm.fake, "connected", True)
        report = stage.run(80)
    assert stage.port.violations == [], stage.port.violations
    assert {"robot_observe", "robot_send", "robot_hold"} <= report.faults.keys(), report.faults
    assert stage.states["running"] >= 55, stage.states
    path = np.array([list(action.values()) for action in arm.fake.sent])
    assert (np.ptp(path, axis=0) > 1.0).all()
    assert (np.abs(np.diff(path, axis=0)) <= np.array(LIMITS.velocity) * DT + 1e-9).all()
    assert not arm.is_connected
    try:
        arm.get_observation()
    except DeviceNotConnectedError:
        return
    raise AssertionError("LeRobot's guard is not there")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as home:
        arm = Arm(ArmConfig(id="check", calibration_dir=Path(home)))
        check_names(arm)
        check_loop(arm)
    print("a robot of LeRobot is driven by the control loop")
