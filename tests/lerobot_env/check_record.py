"""A person's demonstrations, a training and the policy on the robot, all by LeRobot's own commands.

    python check_record.py

Runs in the environment of constraints/lerobot.txt, with scd_robot and the plugin. The robot and the arm that a person
would move are fakes of LeRobot's own base classes; `lerobot-record` records both, first led, then by our policy.
"""

# ruff: noqa: E402  torchvision is mended before lerobot imports it
import os
import sys
import tempfile
import types
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from check_lerobot import mend_torchvision

mend_torchvision()
sys.modules["rerun"] = types.ModuleType("rerun")  # the viewer: imported always, used with --display_data only
from check_policy import command, train
from check_robot import Arm, ArmConfig
from lerobot.robots import RobotConfig
from lerobot.teleoperators import Teleoperator, TeleoperatorConfig

FPS, SEED = 20, 7
MOTORS = ("shoulder_pan", "elbow_flex", "gripper")  # of the fake
SEEN, SENT = [], []  # what the robot told, and was told, in the order of its motors


@RobotConfig.register_subclass("check_follower")
@dataclass(kw_only=True)
class FollowerConfig(ArmConfig):
    """Of an arm without hardware."""


class Follower(Arm):
    """Is where it was told to be."""

    config_class = FollowerConfig
    name = "check_follower"

    def __init__(self, config):
        super().__init__(config)
        self.cameras = {"front": None}  # counted by `lerobot-record`
        self.fake.size = (48, 64, 3)

    def connect(self, calibrate=True):
        super().connect(calibrate)
        torch.manual_seed(SEED)  # after LeRobot made the policy, which draws weights before it reads them

    def get_observation(self):
        seen = super().get_observation()
        SEEN.append(([seen[f"{motor}.pos"] for motor in MOTORS], seen["front"]))
        return seen

    def send_action(self, action):
        SENT.append([float(action[f"{motor}.pos"]) for motor in MOTORS])
        self.fake.positions = dict(zip(MOTORS, SENT[-1], strict=True))
        return action


@TeleoperatorConfig.register_subclass("check_leader")
@dataclass(kw_only=True)
class LeaderConfig(TeleoperatorConfig):
    """Of an arm that nobody holds."""


class Leader(Teleoperator):
    """Moves in circles."""

    config_class = LeaderConfig
    name = "check_leader"
    is_connected = is_calibrated = False

    @property
    def feedback_features(self):
        return {}

    @property
    def action_features(self):
        return {f"{motor}.pos": float for motor in MOTORS}

    def connect(self, calibrate=True):
        self.is_connected, self._count = True, 0

    def calibrate(self):
        raise AssertionError("it asks questions")

    def configure(self):
        """Nothing."""

    def get_action(self):
        self._count += 1
        return {f"{motor}.pos": float(30 * np.sin(self._count / 10 + i)) for i, motor in enumerate(MOTORS)}

    def send_feedback(self, feedback):
        raise AssertionError("there is none")

    def disconnect(self):
        self.is_connected = False


def record(home, name, episodes, seconds, *how):
    """`lerobot-record`; the folder of the dataset."""
    from lerobot.scripts.lerobot_record import main

    folder = home / name
    data = {"repo_id": f"local/{name}", "root": folder, "fps": FPS, "num_episodes": episodes, "single_task": "circle"}
    data |= {"episode_time_s": seconds, "reset_time_s": 0.2, "vcodec": "h264", "push_to_hub": "false"}
    settings = [f"--dataset.{key}={value}" for key, value in data.items()]
    robot = ["--robot.type=check_follower", f"--robot.calibration_dir={home}", "--robot.id=check"]
    command(main, *robot, "--play_sounds=false", *settings, *how)
    return folder


def replayed(folder):
    """(N, 3) what the policy does about the observations, by LeRobot's `predict_action`."""
    from lerobot.policies.factory import make_pre_post_processors
    from lerobot.utils.control_utils import predict_action

    from lerobot_policy_scd import ScdPolicy

    policy = ScdPolicy.from_pretrained(folder)
    before, after = make_pre_post_processors(policy.config, pretrained_path=folder)
    policy.reset()
    torch.manual_seed(SEED)
    found, how = [], (policy, torch.device("cpu"), before, after, False, "circle", "check_follower")
    for state, picture in SEEN:
        seen = {"observation.state": np.array(state, np.float32), "observation.images.front": picture}
        found.append(predict_action(seen, *how))
    return torch.cat(found).numpy()


def main(home):
    """All of it."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    led = record(home, "led", 2, 3, "--teleop.type=check_leader", f"--teleop.calibration_dir={home}")
    dataset = LeRobotDataset("local/led", root=led)
    assert dataset.num_episodes == 2, dataset.num_episodes
    policy = train(led, home / "run", 3)
    SEEN.clear(), SENT.clear()
    done = record(home, "eval_done", 1, 2, f"--policy.path={policy}")
    dataset = LeRobotDataset("local/eval_done", root=done, video_backend="pyav")
    assert dataset.fps == FPS, dataset.fps
    assert len(dataset) == len(SENT) >= FPS, (len(dataset), len(SENT))
    recorded = np.stack([item["action"].numpy() for item in dataset])
    states = np.stack([item["observation.state"].numpy() for item in dataset])
    np.testing.assert_allclose(recorded, SENT, rtol=0, atol=1e-5)
    np.testing.assert_allclose(states, [state for state, _ in SEEN], rtol=0, atol=1e-5)
    assert (np.ptp(recorded, axis=0) > 0.1).all(), "the robot was moved"
    np.testing.assert_allclose(states[1:], recorded[:-1], rtol=0, atol=1e-5, err_msg="it is where it was told to be")
    np.testing.assert_allclose(replayed(policy), recorded, rtol=0, atol=1e-3)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as home:
        os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HOME": home}
        torch.set_num_threads(1)
        main(Path(home))
    print("lerobot-record drives a robot with the policy")
