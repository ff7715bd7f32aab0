"""robosuite behind the door of evaluation; needs the environment that `make robosuite` makes."""

import json

import numpy as np
import pytest

from scd_robot.errors import ConfigError, DatasetError, UnknownNameError
from scd_robot.sim_eval import known_environments, make_environment
from scd_robot.sim_eval.robosuite import recorded_env_args


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
        environment.close()
        with pytest.raises(ConfigError, match="was recorded in Lift, not in Door"):
            make_environment(f"robosuite/Door:recorded={path}")

    @pytest.mark.slow
    def test_pictures_are_the_right_way_up(self):
        environment = make_environment("robosuite/Lift:cameras=agentview,image_size=48")
        image = environment.reset(0)["agentview_image"]
        assert image.shape == (48, 48, 3)
        assert environment.spec.observation["agentview_image"].dtype == "uint8"
        environment.close()
