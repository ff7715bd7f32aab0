"""Arms of robosuite that take absolute poses; needs the environment that `make robosuite` makes."""

import copy
import json

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from scd_robot.errors import ConfigError
from scd_robot.sim_eval import make_environment
from scd_robot.sim_eval.robosuite_arguments import with_input_types

OSC = {
    "type": "OSC_POSE", "input_max": 1, "input_min": -1, "output_max": [0.05] * 3 + [0.5] * 3,
    "output_min": [-0.05] * 3 + [-0.5] * 3, "kp": 150, "damping_ratio": 1, "impedance_mode": "fixed",
    "kp_limits": [0, 300], "damping_ratio_limits": [0, 10], "position_limits": None, "orientation_limits": None,
    "uncouple_pos_ori": True, "interpolation": None, "ramp_ratio": 0.2,
}  # fmt: skip


def today(**arm):
    """A composite controller of robosuite 1.5, whose arm has the settings given."""
    return {"type": "BASIC", "body_parts": {"right": {**OSC, "gripper": {"type": "GRIP"}, **arm}}}


def test_what_older_versions_called_deltas_is_told_in_todays_words():
    old = {"robots": "Panda", "controller_configs": {**OSC, "control_delta": False}}
    before = copy.deepcopy(old)
    assert with_input_types(old)["controller_configs"] == {**OSC, "input_type": "absolute"}
    assert old == before
    several = [{**OSC, "control_delta": True}, today(control_delta=False), today(input_type="absolute")]
    found = with_input_types({"controller_configs": several})["controller_configs"]
    assert found == [{**OSC, "input_type": "delta"}, today(input_type="absolute"), today(input_type="absolute")]
    kinematics = {"controller_configs": {"type": "IK_POSE", "control_delta": False}}  # which still reads it
    assert with_input_types(kinematics) == kinematics
    assert with_input_types({"robots": "Panda"}) == {"robots": "Panda"}


@pytest.fixture
def absolute(tmp_path):
    """Makes Lift as a recording tells it, and closes it."""
    pytest.importorskip("robosuite", reason="robosuite has an environment of its own: make robosuite")
    made = []

    def make(version, controller, options="", **kwargs):
        kwargs = {"robots": "Panda", "control_freq": 20, **kwargs}
        kwargs |= {} if controller is None else {"controller_configs": controller}
        notes = {"env_name": "Lift", "env_version": version, "type": 1, "env_kwargs": kwargs}
        (tmp_path / "env.json").write_text(json.dumps(notes))
        made.append(make_environment(f"robosuite/Lift:recorded={tmp_path / 'env.json'}{options}"))
        return made[-1]

    yield make
    for environment in made:
        environment.close()


def pose(environment):
    """Pose of the hand in the frame of its controller, as an action (6,)."""
    controller = environment._env.robots[0].part_controllers["right"]
    controller.update(force=True)
    place, turn = controller.ref_pos, controller.ref_ori_mat
    if controller.input_ref_frame == "base":
        found = controller.goal_origin_to_eef_pose()
        place, turn = found[:3, 3], found[:3, :3]
    return np.concatenate([place, Rotation.from_matrix(turn).as_rotvec()])


@pytest.mark.sim
@pytest.mark.parametrize(
    ("version", "controller", "options"),
    [
        ("1.4.1", {**OSC, "control_delta": False}, ""),
        ("", {**OSC, "control_delta": False}, ""),
        ("1.5.1", today(input_type="absolute", input_ref_frame="world"), ""),
        ("1.5.1", today(input_type="absolute", input_ref_frame="base"), ""),
        ("1.5.1", today(input_type="absolute", impedance_mode="variable_kp", input_ref_frame="world"), ""),
        ("1.4.1", {**OSC, "control_delta": True}, ",actions=absolute"),
        ("1.5.1", None, ",actions=absolute"),
    ],
    ids=["older", "of-no-version", "world", "base", "stiffness", "asked-older", "asked"],
)
def test_a_hand_that_is_asked_to_stay_stays_and_goes_where_it_is_asked(absolute, version, controller, options):
    environment = absolute(version, controller, options)
    assert environment.spec.action_kind == "absolute"
    for seed in (0, 1):
        environment.reset(seed)
        before, stiffness = environment.hand.copy(), np.full(environment.spec.action_dim - 7, 150.0)
        there = pose(environment)
        assert np.linalg.norm(there[3:]) > 1.5  # robosuite's own bounds would cut it
        for _ in range(10):
            asked = np.concatenate([stiffness, there, [-1.0]]).astype(np.float32)
            np.testing.assert_array_equal(environment.step(asked).executed_action, asked)
        np.testing.assert_allclose(environment.hand, before, atol=0.004)
        turn = Rotation.from_rotvec(pose(environment)[3:]) * Rotation.from_rotvec(there[3:]).inv()
        assert turn.magnitude() < 0.03
        there[2] += 0.05
        for _ in range(20):
            environment.step(np.concatenate([stiffness, there, [-1.0]]).astype(np.float32))
        np.testing.assert_allclose(environment.hand, before + np.array([0, 0, 0.05]), atol=0.01)
    low, high = np.array(environment.spec.action_low), np.array(environment.spec.action_high)
    assert (low[-1], high[-1]) == (-1, 1)  # the gripper
    assert (high[-7:-4] > 2).all()
    assert (low[-4:-1] < -np.pi).all()
    assert (low[:-7] == 0).all()  # stiffness


@pytest.mark.sim
def test_arms_of_joint_angles_keep_theirs(absolute):
    joints = {"type": "JOINT_POSITION", "input_type": "absolute", "kp": 50, "input_max": 1, "input_min": -1,
              "output_max": 0.05, "output_min": -0.05, "damping_ratio": 1, "impedance_mode": "fixed",
              "kp_limits": [0, 300], "damping_ratio_limits": [0, 10], "qpos_limits": None,
              "interpolation": None, "ramp_ratio": 0.2, "gripper": {"type": "GRIP"}}  # fmt: skip
    environment = absolute("1.5.1", {"type": "BASIC", "body_parts": {"right": joints}})
    assert environment.spec.action_kind == "absolute"
    first = environment.reset(0)
    angles = environment._env.robots[0]._joint_positions
    assert np.abs(angles).max() > 1.5
    for _ in range(10):
        environment.step(np.concatenate([angles, [0.0]]).astype(np.float32))
    np.testing.assert_allclose(environment.hand, first["robot0_eef_pos"], atol=0.01)


@pytest.mark.sim
def test_arms_that_take_changes_keep_their_bounds(absolute):
    environment = absolute("1.5.1", None)
    assert environment.spec.action_low == (-1.0,) * 7
    assert environment.spec.action_high == (1.0,) * 7
    assert environment.spec.action_kind == "delta"
    torques = {"type": "JOINT_TORQUE", "input_max": 1, "input_min": -1, "output_max": 0.1,
                  "output_min": -0.1, "torque_limits": None, "interpolation": None, "ramp_ratio": 0.2,
                  "gripper": {"type": "GRIP"}}  # fmt: skip
    assert absolute("1.5.1", {"type": "BASIC", "body_parts": {"right": torques}}).spec.action_kind == ""
    with pytest.raises(ConfigError, match="OSC or JOINT_POSITION controller, got JOINT_TORQUE"):
        absolute("1.5.1", {"type": "BASIC", "body_parts": {"right": torques}}, ",actions=absolute")
