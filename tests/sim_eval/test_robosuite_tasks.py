"""robosuite behind the door of evaluation; needs the environment that `make robosuite` makes."""

import json
import os
import subprocess
import sys
import types

import numpy as np
import pytest

from scd_robot.errors import ConfigError, DatasetError, ShapeError, UnknownNameError
from scd_robot.sim_eval import known_environments, make_environment
from scd_robot.sim_eval.policy_adapter import check_policy_spec
from scd_robot.sim_eval.robosuite import recorded_env_args
from scd_robot.sim_eval.robosuite_arguments import recorded_cameras
from scd_robot.types import ArraySpec, PolicySpec


def recording(path, **document):
    path.write_text(json.dumps(document))
    return path


class TestWithoutRobosuite:
    def test_names_are_known(self):
        assert "robosuite/Lift" in known_environments()
        with pytest.raises(UnknownNameError, match="did you mean 'robosuite/Lift'"):
            make_environment("robosuite/Lft")

    def test_arguments_of_recordings(self, tmp_path):
        kwargs = {"robots": "Panda", "control_freq": 10}
        args = {"env_name": "Lift", "env_version": "1.4.1", "type": 1, "env_kwargs": kwargs}
        found = recorded_env_args(str(recording(tmp_path / "a.json", **args)))
        assert found == {**kwargs, "env_name": "Lift", "env_version": "1.4.1"}
        raw = recording(tmp_path / "b.json", env="Door", env_info=json.dumps(kwargs), repository_version="1.4.1")
        assert recorded_env_args(str(raw)) == {**kwargs, "env_name": "Door", "env_version": "1.4.1"}

    @pytest.mark.parametrize("text", ["{}", "no json", "[]", '{"env_info": "no json"}'])
    def test_recordings_that_do_not_tell(self, tmp_path, text):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(DatasetError, match="environment"):
            recorded_env_args(str(tmp_path / "a.json"))
        with pytest.raises(DatasetError, match="cannot read"):
            recorded_env_args(str(tmp_path / "missing.json"))

    @pytest.mark.parametrize(
        ("arguments", "wanted"),
        [
            ({}, {}),
            ({"use_camera_obs": False, "camera_names": ["agentview"], "camera_heights": 84}, {}),
            ({"use_camera_obs": True}, {"agentview": (256, 256)}),
            (
                {"use_camera_obs": True, "camera_names": ["a", "b"], "camera_heights": 84, "camera_widths": [96, 48]},
                {"a": (84, 96), "b": (84, 48)},
            ),
            ({"use_camera_obs": True, "camera_names": "a", "camera_heights": [8], "camera_widths": 9}, {"a": (8, 9)}),
        ],
    )
    def test_cameras_of_recordings(self, arguments, wanted):
        assert recorded_cameras(arguments) == wanted

    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ("robots=Sawyer", ConfigError, "tells robots; leave that out"),
            ("control_freq=20,robots=Panda", ConfigError, "tells control_freq and robots"),
            ("image_size=84", ConfigError, "tells image_size"),
            ("cameras=frontview", UnknownNameError, "'frontview'"),
            ("control_freq=30", ConfigError, "must divide 500"),
            ("cameras=3", ConfigError, "cameras must be words such as agentview.*got 3"),
            ("max_steps=long", ConfigError, "max_steps must be a whole number of at least 1, got long"),
            ("actions=relative", ConfigError, "actions must be absolute.*got relative"),
        ],
    )
    def test_options_that_contradict_a_recording_are_refused(self, tmp_path, options, error, message):
        path = recording(tmp_path / "a.json", env_name="Lift", env_version="1.5.1", env_kwargs=RECORDED)
        with pytest.raises(error, match=message):
            make_environment(f"robosuite/Lift:recorded={path},{options}")

    def test_options_that_must_be_words(self):
        with pytest.raises(ConfigError, match=r"robots must be words such as Panda.*got 3"):
            make_environment("robosuite/Lift:robots=3")
        with pytest.raises(ConfigError, match=r"recorded must be words such as env\.json, got 3"):
            make_environment("robosuite/Lift:recorded=3")

    def test_recordings_of_other_packages_environments_say_what_to_do(self, tmp_path):
        path = recording(tmp_path / "a.json", env_name="Square_D0", env_version="1.4.1", env_kwargs=RECORDED)
        for task in ("Square_D0", "NutAssemblySquare"):
            with pytest.raises(ConfigError, match=r"in Square_D0, none of robosuite's own.*mimicgen.*my_env:make"):
                make_environment(f"robosuite/{task}:recorded={path}")
        with pytest.raises(UnknownNameError, match="Square_D1"):
            make_environment(f"robosuite/Square_D1:recorded={path}")


RECORDED = {
    "robots": "Panda", "control_freq": 20, "has_renderer": True, "use_camera_obs": True, "use_object_obs": False,
    "camera_names": ["agentview", "robot0_eye_in_hand"], "camera_heights": 84, "camera_widths": [84, 48],
    "camera_depths": True, "ignore_done": False, "render_gpu_device_id": 7,
}  # fmt: skip


class TestWithRobosuite:
    @pytest.fixture(autouse=True)
    def _needs_robosuite(self):
        pytest.importorskip("robosuite", reason="robosuite has an environment of its own: make robosuite")

    @pytest.mark.parametrize("seed", [0, 7])
    def test_an_episode_follows_from_its_seed(self, seed):
        environment = make_environment("robosuite/Lift:max_steps=5")
        hashes, observations = [], []
        for each in (seed, seed + 1, seed):
            observations.append(environment.reset(each))
            hashes.append(environment.state_hash())
            for key, spec in environment.spec.observation.items():
                assert (observations[-1][key].shape, str(observations[-1][key].dtype)) == (spec.shape, spec.dtype)
        assert hashes[0] == hashes[2] != hashes[1]
        np.testing.assert_array_equal(observations[0]["object"], observations[2]["object"])
        action = np.full(environment.spec.action_dim, 0.5, np.float32)
        results = [environment.step(action) for _ in range(5)]
        assert results[-1].truncated
        assert not results[0].success
        assert environment.render(64, 96).shape == (64, 96, 3)
        environment.close()
        environment.close()

    def test_making_one_loads_its_model_once(self, monkeypatch):
        from robosuite.environments.manipulation.lift import Lift

        loaded, load = [], Lift._load_model
        monkeypatch.setattr(Lift, "_load_model", lambda lift: loaded.append(lift) or load(lift))
        environment = make_environment("robosuite/Lift")
        assert len(loaded) == 1
        first = environment.reset(0)
        assert {key: (value.shape, value.dtype) for key, value in first.items()} == {
            key: (spec.shape, spec.dtype) for key, spec in environment.spec.observation.items()
        }
        environment.close()

    def test_a_recording_tells_robots_rate_and_older_controllers(self, tmp_path):
        controller = {
            "type": "OSC_POSE", "input_max": 1, "input_min": -1, "output_max": [0.05] * 3 + [0.5] * 3,
            "output_min": [-0.05] * 3 + [-0.5] * 3, "kp": 150, "damping_ratio": 1, "impedance_mode": "fixed",
            "kp_limits": [0, 300], "damping_ratio_limits": [0, 10], "position_limits": None,
            "orientation_limits": None, "uncouple_pos_ori": True, "control_delta": True, "interpolation": None,
            "ramp_ratio": 0.2,
        }  # fmt: skip
        kwargs = {"robots": "Panda", "control_freq": 10, "controller_configs": controller}
        args = {"env_name": "Lift", "env_version": "1.4.1", "type": 1, "env_kwargs": kwargs}
        path = recording(tmp_path / "a.json", **args)
        environment = make_environment(f"robosuite/Lift:recorded={path}")
        assert environment.spec.control_dt == pytest.approx(0.1)
        assert environment.spec.action_dim == 7
        first = environment.reset(0)["robot0_eef_pos"]
        up = np.array([0, 0, 1, 0, 0, 0, 0], np.float32)
        moved = [environment.step(up) for _ in range(5)][-1].observation["robot0_eef_pos"]
        assert 0.03 < moved[2] - first[2] < 0.3
        environment.step(np.array([0, 0, 0, 0, 0, 1, 0], np.float32))
        controller = environment._env.robots[0].part_controllers["right"]
        asked = controller.goal_ori.copy()
        environment.step(up)
        np.testing.assert_array_equal(controller.goal_ori, asked)  # which robosuite 1.5 would give up
        environment.close()
        with pytest.raises(ConfigError, match="was recorded in Lift, not in Door"):
            make_environment(f"robosuite/Door:recorded={path}")

    def test_a_policy_of_recorded_images_finds_them(self, tmp_path):
        path = recording(tmp_path / "a.json", env_name="Lift", env_version="1.5.1", env_kwargs=RECORDED)
        name = f"robosuite/Lift:recorded={path}"
        keys = {"agentview_image": ArraySpec((84, 84, 3), "uint8"), "robot0_eef_pos": ArraySpec((3,))}
        policy = types.SimpleNamespace(spec=PolicySpec(keys, 7, 0.05, 4, 2, 1))
        images = {}
        for cameras, wanted in (
            ("", {"agentview_image": (84, 84, 3), "robot0_eye_in_hand_image": (84, 48, 3)}),
            (",cameras=agentview", {"agentview_image": (84, 84, 3)}),
            (",cameras=none", {}),
        ):
            environment = make_environment(name + cameras)
            first = environment.reset(3)
            images[cameras] = first.get("agentview_image")
            assert {key: value.shape for key, value in first.items() if value.ndim == 3} == wanted
            assert environment.spec.observation["object"] == ArraySpec((10,))
            if wanted:
                check_policy_spec(policy, environment.spec)
            else:
                with pytest.raises(ShapeError, match="agentview_image"):
                    check_policy_spec(policy, environment.spec)
            environment.close()
        np.testing.assert_array_equal(images[""], images[",cameras=agentview"])

    def test_images_are_the_right_way_up_and_do_not_depend_on_what_else_is_drawn(self):
        name = "robosuite/Lift:cameras=agentview,image_size=64"
        alone, action = make_environment(name), np.ones(7, np.float32)
        wanted = [alone.reset(1)["agentview_image"], alone.step(action).observation["agentview_image"]]
        red = wanted[0][..., 0].astype(int) - wanted[0][..., 1] > 80  # the cube, on the table below the arm
        assert 4 < red.sum() < 300
        assert np.argwhere(red)[:, 0].mean() > 32
        other = make_environment("robosuite/Door:cameras=frontview,image_size=32")
        found = [alone.reset(1)["agentview_image"]]
        other.reset(2)
        alone.render(48, 48)
        found.append(alone.step(action).observation["agentview_image"])
        np.testing.assert_array_equal(found, wanted)
        other.close()
        alone.render(48, 48)
        alone.reset(1)
        np.testing.assert_array_equal(alone.step(action).observation["agentview_image"], wanted[1])
        alone.close()

    def test_wiping_ends_when_the_arm_collides_or_reaches_a_limit(self):
        environment = make_environment("robosuite/Wipe")
        environment.reset(0)
        down = np.array([0, 0, -1, 0, 1, 0], np.float32)
        results = []
        while not results or not (results[-1].terminated or results[-1].truncated):
            results.append(environment.step(down))
        assert results[-1].terminated
        assert not results[-1].success
        environment.close()

    def test_the_opengl_backend_is_still_to_be_chosen_after_the_import(self):
        code = "import os; from scd_robot.sim_eval.robosuite_simulator import import_robosuite; import_robosuite(); "
        code += "raise SystemExit(os.environ.get('MUJOCO_GL'))"
        environment = {key: value for key, value in os.environ.items() if key != "MUJOCO_GL"}
        subprocess.run([sys.executable, "-c", code], env=environment, check=True)

    def test_an_environment_of_another_package_is_made_by_a_function_of_ones_own(self, tmp_path, monkeypatch):
        path = recording(tmp_path / "a.json", env_name="Lift_D0", env_version="1.5.1", env_kwargs={"robots": "Panda"})
        (tmp_path / "own_lift.py").write_text(
            "from robosuite.environments.manipulation.lift import Lift\n"
            "from scd_robot.sim_eval.robosuite import RobosuiteEnvironment, RobosuiteOptions\n"
            "class Lift_D0(Lift): pass\n"  # robosuite registers it
            "def make():\n"
            f"    return RobosuiteEnvironment('Lift_D0', RobosuiteOptions(recorded={str(path)!r}))\n"
        )
        monkeypatch.syspath_prepend(str(tmp_path))
        environment = make_environment("own_lift:make")
        assert environment.reset(0)["robot0_eef_pos"].shape == (3,)
        environment.close()

    @pytest.mark.parametrize(
        ("name", "short", "steps"),
        [
            ("robosuite/Lift:robots=Panda,max_steps=400", "robosuite/Lift", 400),
            ("robosuite/ToolHang:max_steps=400", "robosuite/ToolHang:max_steps=400", 400),
            ("robosuite/ToolHang", "robosuite/ToolHang", 700),
            ("robosuite/TwoArmTransport", "robosuite/TwoArmTransport", 700),
        ],
    )
    def test_a_task_has_as_many_steps_and_arms_as_it_needs(self, name, short, steps):
        environment = make_environment(name)
        assert (environment.spec.name, environment.spec.max_steps) == (short, steps)
        assert environment.spec.action_dim == (14 if "TwoArm" in name else 7)
        environment.close()

    def test_two_arms_have_two_hands(self):
        environment = make_environment("robosuite/TwoArmLift:robots=Panda+Panda")
        assert environment.spec.name == "robosuite/TwoArmLift"
        first = environment.reset(0)
        wanted = [first["robot0_eef_pos"], first["robot1_eef_pos"]]
        np.testing.assert_allclose(environment.hand, wanted, atol=1e-6)
        environment.close()
