"""robomimic's own wrapper of robosuite beside our adapter: the same episode, number for number.

Needs the environment that `make robosuite` makes. robomimic 0.3 wants two packages that are not there and do nothing
here: mujoco_py for the name of an exception, egl_probe to choose among several GPUs.
"""

import json
import sys
import types

import numpy as np
import pytest

from scd_robot.sim_eval import make_environment
from scd_robot.sim_eval.robosuite_arguments import arguments_before_1_5

pytestmark = pytest.mark.sim

IMAGES = {"use_camera_obs": True, "camera_names": ["agentview"], "camera_heights": 48, "camera_widths": 64}
OSC = {
    "type": "OSC_POSE", "input_max": 1, "input_min": -1, "output_max": [0.05] * 3 + [0.5] * 3,
    "output_min": [-0.05] * 3 + [-0.5] * 3, "kp": 150, "damping": 1, "impedance_mode": "fixed", "kp_limits": [0, 300],
    "damping_limits": [0, 10], "position_limits": None, "orientation_limits": None, "uncouple_pos_ori": True,
    "control_delta": True, "interpolation": None, "ramp_ratio": 0.2,
}  # fmt: skip


@pytest.fixture
def wrapped(monkeypatch):
    """robomimic's environment for some `env_args`."""
    pytest.importorskip("robosuite", reason="robosuite has an environment of its own: make robosuite")
    pytest.importorskip("robomimic", reason="robomimic is in the environment of make robosuite")
    mujoco_py = types.ModuleType("mujoco_py")
    mujoco_py.builder = types.SimpleNamespace(MujocoException=RuntimeError)
    monkeypatch.setitem(sys.modules, "mujoco_py", mujoco_py)
    egl_probe = types.ModuleType("egl_probe")
    egl_probe.get_available_devices = list
    monkeypatch.setitem(sys.modules, "egl_probe", egl_probe)
    from robomimic.utils import env_utils, obs_utils

    made = []

    def make(env_args):
        images = env_args["env_kwargs"].get("use_camera_obs", False)
        rgb = ["agentview_image"] if images else []
        obs_utils.initialize_obs_utils_with_obs_specs({"obs": {"low_dim": ["object"], "rgb": rgb}})
        made.append(env_utils.create_env_from_metadata(env_args, use_image_obs=images))
        return made[-1]

    yield make
    for environment in made:
        environment.env.close()


@pytest.mark.parametrize(
    ("version", "kwargs"),
    [
        ("1.5.1", {"robots": "Panda", "control_freq": 20, "reward_shaping": True}),
        ("1.5.1", {"robots": "Sawyer", "control_freq": 10, **IMAGES}),
        ("1.4.1", {"robots": ["Panda"], "control_freq": 20, "controller_configs": OSC}),
    ],
    ids=["states", "images", "older"],
)
def test_the_same_episode_in_robomimics_wrapper(wrapped, tmp_path, version, kwargs):
    env_args = {"env_name": "Lift", "env_version": version, "type": 1, "env_kwargs": kwargs}
    (tmp_path / "env.json").write_text(json.dumps(env_args))
    rng = np.random.default_rng(0)
    actions = rng.uniform(-1, 1, (8, 7)).astype(np.float32)
    ours = make_environment(f"robosuite/Lift:recorded={tmp_path / 'env.json'}")
    mine = [ours.reset(5)]
    outcomes = []
    for number, action in enumerate(actions):
        if number == 6:
            lift_the_cube(ours._env)
        result = ours.step(action)
        mine.append(result.observation)
        outcomes.append((result.reward, result.success))
    ours.close()
    assert [success for _, success in outcomes] == [False] * 6 + [True] * 2

    # Not side by side: robosuite's own images are of whichever OpenGL context was made current last.
    if version < "1.5":  # which robomimic does not take
        env_args["env_kwargs"] = arguments_before_1_5(kwargs)
    theirs = wrapped(env_args)
    theirs.env.rng.bit_generator.state = np.random.default_rng(5).bit_generator.state
    np.random.seed(5)  # noqa: NPY002 - robosuite's
    check_equal(mine[0], theirs.reset())
    for number, action in enumerate(actions):
        if number == 6:
            lift_the_cube(theirs.env)
        observation, reward, _, _ = theirs.step(action.astype(np.float64))
        check_equal(mine[number + 1], observation)
        assert outcomes[number] == (reward, theirs.is_success()["task"])


def lift_the_cube(environment):
    environment.sim.data.set_joint_qpos(environment.cube.joints[0], [0, 0, 1.2, 1, 0, 0, 0])
    environment.sim.forward()


def check_equal(mine, theirs):
    """All that robomimic observes is what we observe; it gives images as (C, H, W) in 0..1."""
    assert {"object", "robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos"} <= theirs.keys()
    assert {key for key in mine if key.endswith("_image")} <= theirs.keys()
    for key, value in theirs.items():
        if key.endswith("_image"):
            value = np.round(255 * value.transpose(1, 2, 0)).astype(np.uint8)
        np.testing.assert_array_equal(mine[key], np.asarray(value, mine[key].dtype), err_msg=key)
