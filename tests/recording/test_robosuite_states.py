import dataclasses
import sys
import xml.etree.ElementTree as ElementTree
from importlib.util import find_spec

import numpy as np
import pytest

from scd_robot.datasets.open import open_dataset
from scd_robot.datasets.schema import EpisodeDataset
from scd_robot.errors import DatasetError, MissingDependencyError, OutputError, SimulatorError, UnknownNameError
from scd_robot.recording import observe_states, replay_dataset, write_observations
from scd_robot.recording.robosuite_models import recorded_arguments, recorded_version, upgraded
from scd_robot.recording.robosuite_states import RobosuiteSimulator
from scd_robot.sim_eval.robosuite_arguments import is_before_1_5
from scd_robot.types import ArraySpec, DatasetSpec

needs_robosuite = pytest.mark.skipif(
    find_spec("robosuite") is None, reason="robosuite has an environment of its own: make robosuite"
)


def raw(states, actions, model, metadata, lengths=None):
    """A raw recording as `datasets.robosuite` gives it."""
    lengths = [len(states)] if lengths is None else lengths
    spec = DatasetSpec({"state": ArraySpec((states.shape[1] - 1,))}, actions.shape[1], 0.05, "demo.hdf5 (robosuite)")
    arrays = {
        "state": states[:, 1:].astype(np.float32),
        "action": actions.astype(np.float32),
        "sim_state": states,
    }
    names = [f"demo_{i}" for i in range(len(lengths))]
    text = {"model_xml": [model] * len(lengths), "name": names}
    return EpisodeDataset(spec, np.cumsum(lengths), arrays, metadata, {}, text)


def noted(**metadata):
    return raw(np.zeros((2, 5)), np.zeros((2, 7)), "<mujoco/>", metadata)


@pytest.mark.parametrize(
    "metadata",
    [
        {"env": "Lift", "env_info": {"env_name": "Lift", "robots": "Panda"}},
        {"env": "Lift", "env_info": '{"env_name": "Lift", "robots": "Panda"}'},
        {"env_args": {"type": 1, "env_name": "Lift", "env_version": "1.4.1", "env_kwargs": {"robots": "Panda"}}},
        {"env": "Lift", "env_args": {"type": 1, "env_kwargs": {"robots": "Panda"}}},
    ],
    ids=["robosuite", "text", "robomimic", "old robomimic"],
)
def test_environment_is_found_wherever_a_file_keeps_it(metadata):
    assert recorded_arguments(noted(**metadata)) == {"env_name": "Lift", "robots": "Panda"}


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, "does not tell its environment"),
        ({"env_info": "{broken"}, "env_info of demo.hdf5 .* cannot be read"),
        ({"env_info": [1, 2]}, "cannot be read"),
        ({"env_args": {"type": 2, "env_name": "Hopper-v3"}}, "is not one of robosuite"),
    ],
)
def test_recording_without_its_environment_is_refused(metadata, message):
    with pytest.raises(DatasetError, match=message):
        recorded_arguments(noted(**metadata))


def test_version_is_told_by_either_attribute():
    assert recorded_version({"repository_version": "1.4.0"}) == "1.4.0"
    assert recorded_version({"env_args": {"env_version": "1.5.1"}}) == "1.5.1"
    assert recorded_version({"env_args": {}}) == "of an unknown version"


@pytest.mark.parametrize(
    ("version", "controllers", "before"),
    [
        ("1.4.1", None, True),
        ("0.3.0", None, True),
        ("1.5.0", {"type": "OSC_POSE"}, False),
        ("2.0", None, False),
        ("of an unknown version", {"type": "OSC_POSE"}, True),
        ("of an unknown version", [{"type": "BASIC", "body_parts": {}}], False),
        ("of an unknown version", None, False),
    ],
)
def test_recordings_before_1_5_are_told_by_version_or_controllers(version, controllers, before):
    assert is_before_1_5(version, {"controller_configs": controllers}) is before


OLD = """<mujoco><asset>
    <mesh name="link" file="{here}"/><mesh name="link_vis" file="/gone/link_vis.stl"/>
  </asset><worldbody><body name="robot0_base"><body name="gripper0_right_gripper">
    <geom name="gripper0_hand" type="mesh" mesh="link"/>
    <geom name="gripper0_hand_visual" type="mesh" mesh="link_vis" contype="0" conaffinity="0"/>
    <joint name="gripper0_finger_joint1"/></body><body name="mount0_base"/></body>
  </worldbody><actuator><motor name="gripper0_finger" joint="gripper0_finger_joint1"/></actuator></mujoco>"""
NEW = """<mujoco><asset><mesh name="link" file="other.stl"/><mesh name="link_vis_0" file="new.obj"/></asset><worldbody>
    <body name="robot0_base"><geom name="robot0_shell" mesh="link_vis_0"/><site name="robot0_center"/>
      <body name="gripper0_right_right_gripper"><geom name="gripper0_right_hand" mass="3"/></body>
      <body name="elsewhere"><geom name="new"/></body></body>
    <body name="target" mocap="true"/></worldbody></mujoco>"""


@pytest.fixture
def old(tmp_path):
    (tmp_path / "assets" / "bases").mkdir(parents=True)
    (tmp_path / "assets" / "bases" / "link.stl").touch()
    return OLD.format(here=tmp_path / "assets" / "mounts" / "link.stl")


def test_old_model_gets_new_names_and_what_the_installed_robot_has_besides(old, tmp_path):
    model = ElementTree.fromstring(upgraded(old, NEW))
    names = {element.get("name") for element in model.iter() if element.get("name")}
    assert names == {
        "link", "link_vis_0", "robot0_base", "gripper0_right_right_gripper", "gripper0_right_hand",
        "gripper0_right_finger_joint1", "gripper0_right_finger", "fixed_mount0_base", "robot0_shell", "robot0_center",
        "target",
    }  # fmt: skip
    assert model.find("actuator/motor").get("joint") == "gripper0_right_finger_joint1"
    assert model.find("asset/mesh").get("file") == str(tmp_path / "assets" / "bases" / "link.stl")
    shell = next(geom for geom in model.iter("geom") if geom.get("name") == "robot0_shell")
    assert shell.attrib.items() >= {"contype": "0", "conaffinity": "0", "mass": "0"}.items()
    assert len(list(model.iter("joint"))) == 1  # states keep their meaning


def test_missing_mesh_that_takes_part_in_contacts_is_refused(old):
    touching = old.replace('mesh="link_vis" contype="0" conaffinity="0"', 'mesh="link_vis"')
    with pytest.raises(SimulatorError, match="'link_vis' takes part in contacts"):
        upgraded(touching, NEW)


def test_missing_robosuite_names_the_way_to_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "robosuite", None)
    with pytest.raises(MissingDependencyError, match="make robosuite"):
        next(observe_states(noted(env="Lift")))


def test_recording_without_states_is_refused():
    dataset = noted(env="Lift")
    del dataset.arrays["sim_state"]
    with pytest.raises(DatasetError, match="holds no simulator states"):
        next(observe_states(dataset))


@pytest.fixture(scope="module")
def human(recordings):
    """Opens a human recording: `human("v1.4.1/lift")`."""

    def opened(name):
        path = recordings / "robosuite_human" / name / "demo.hdf5"
        if not path.is_file():
            pytest.skip(f"no recording of robosuite at {path}")
        return open_dataset(path)

    return opened


def beginnings(dataset, episodes, steps):
    """The first steps of some episodes."""
    chosen = dataset.select(episodes)
    rows = np.concatenate([np.arange(steps) + chosen.rows(i).start for i in range(chosen.num_episodes)])
    arrays = {key: array[rows] for key, array in chosen.arrays.items()}
    ends = np.arange(1, chosen.num_episodes + 1) * steps
    return dataclasses.replace(chosen, episode_ends=ends, arrays=arrays)


@needs_robosuite
@pytest.mark.sim
class TestWithRobosuite:
    def test_observations_are_those_of_the_states(self, human):
        dataset = beginnings(human("v1.4.1/lift"), [0, 2], 4)
        episodes = list(observe_states(dataset))
        assert len(episodes) == 2
        for index, episode in enumerate(episodes):
            states = dataset.episode(index)["sim_state"]
            np.testing.assert_array_equal(episode["sim_state"], states)
            np.testing.assert_array_equal(episode["action"], dataset.episode(index)["action"])
            np.testing.assert_array_equal(episode["robot0_joint_pos"], states[:, 1:8].astype(np.float32))
            np.testing.assert_array_equal(episode["robot0_gripper_qpos"], states[:, 8:10].astype(np.float32))
            np.testing.assert_allclose(episode["cube_pos"], states[:, 10:13], atol=1e-6)
            np.testing.assert_array_equal(episode["robot0_joint_vel"], states[:, 17:24].astype(np.float32))
            gap = episode["cube_pos"] - episode["robot0_eef_pos"]  # robosuite's own sign
            np.testing.assert_allclose(np.abs(episode["gripper_to_cube_pos"]), np.abs(gap), atol=1e-5)
            assert not {"robot0_joint_acc", "state"} & set(episode)

    def test_images_are_the_right_way_up_and_do_not_depend_on_earlier_episodes(self, human):
        dataset = beginnings(human("v1.4.1/lift"), [0, 1], 2)
        both = list(observe_states(dataset, cameras=["agentview", "frontview"], height=64, width=96))
        alone = next(observe_states(dataset.select([1]), cameras=["agentview", "frontview"], height=64, width=96))
        image = both[1]["agentview_image"][0].astype(int)
        assert image.shape == (64, 96, 3)
        np.testing.assert_array_equal(both[1]["agentview_image"], alone["agentview_image"])
        red = image[..., 0] - image[..., 1] > 80  # the cube
        assert 4 < red.sum() < 300
        front = both[0]["frontview_image"][0].astype(int).sum(2)
        assert np.std(front[:10]) < np.std(front[-20:])  # the wall above is plainer than table and floor below

    def test_store_is_written_and_read_back(self, human, tmp_path):
        dataset = beginnings(human("v1.4.1/lift"), [0, 1], 3)
        summary = write_observations(
            dataset, tmp_path / "a.zarr", cameras=["agentview"], height=32, width=32, progress=False
        )
        stored = open_dataset(tmp_path / "a.zarr")
        assert (summary["episodes"], summary["steps"]) == (stored.num_episodes, stored.num_steps) == (2, 6)
        assert set(summary["keys"]) == set(stored.spec.observation)
        assert stored.spec.observation["agentview_image"] == ArraySpec((32, 32, 3), "uint8")
        np.testing.assert_array_equal(stored.arrays["sim_state"], dataset.arrays["sim_state"])
        assert list(stored.episode_text["model_xml"]) == list(dataset.episode_text["model_xml"])
        assert stored.metadata["repository_version"] == "1.4.0"
        assert set(stored.metadata["observed_with"]) == {"robosuite", "mujoco"}
        again = replay_dataset(stored, "robosuite", progress=False)  # it can still be replayed
        assert again["drift"]["max"] < 0.01
        with pytest.raises(OutputError, match="exists already"):
            write_observations(dataset, tmp_path / "a.zarr", progress=False)

    def test_present_robosuite_replays_what_it_recorded(self):
        import robosuite

        arguments = {"env_name": "Lift", "robots": "Panda", "control_freq": 20}
        env = robosuite.make(
            **arguments, has_renderer=False, has_offscreen_renderer=False, use_camera_obs=False, ignore_done=True
        )
        env.reset()
        model = env.sim.model.get_xml()
        start = env.sim.get_state().flatten()
        env.reset_from_xml_string(model)  # as robosuite's own recorder does
        env.sim.reset()
        env.sim.set_state_from_flattened(start)
        env.sim.forward()
        rng = np.random.default_rng(0)
        actions, states = rng.uniform(-1, 1, (15, env.action_dim)), []
        for action in actions:
            states.append(env.sim.get_state().flatten())
            env.step(action)
        env.close()
        dataset = raw(
            np.asarray(states), actions, model, {"env_info": arguments, "repository_version": robosuite.__version__}
        )
        result = replay_dataset(dataset, "robosuite", progress=False)
        assert result["environment"] == "robosuite/Lift"
        assert result["drift"]["max"] < 1e-6  # actions are float32
        assert result["control_dt"] == {"recorded": 0.05, "simulated": 0.05}

    def test_lift_of_1_4_replays(self, human):
        result = replay_dataset(human("v1.4.1/lift").select([2]), "robosuite", progress=False)
        assert (result["successes"], result["recorded_successes"]) == (1, 1)
        assert result["drift"]["max"] < 0.02

    @pytest.mark.slow
    @pytest.mark.parametrize(("name", "episodes", "least"), [("lift", 3, 3), ("handover/panda_panda", 3, 2)])
    def test_demonstrations_of_1_4_replay(self, human, name, episodes, least):
        recorded = human(f"v1.4.1/{name}").select(list(range(episodes)))
        result = replay_dataset(recorded, "robosuite", progress=False)
        assert (result["episodes"], result["recorded_successes"]) == (episodes, episodes)
        assert result["successes"] >= least
        assert result["reproduces"]

    @pytest.mark.parametrize(
        ("name", "version"),
        [("v1.0.1/lift/panda", "1.0.0"), ("v1.0.1/door/panda", "1.0.0"), ("v0.3.0/SawyerLift", "0.1.0")],
    )
    def test_older_recordings_are_refused_with_both_versions(self, human, name, version):
        import robosuite

        with pytest.raises(SimulatorError) as refusal:
            next(observe_states(human(name)))
        assert f"robosuite {robosuite.__version__}, which is installed" in str(refusal.value)
        assert f"recorded with robosuite {version}" in str(refusal.value)
        assert len(str(refusal.value)) < 600

    def test_unknown_camera_and_damaged_models_are_refused(self, human):
        dataset = beginnings(human("v1.4.1/lift"), [0], 2)
        with pytest.raises(UnknownNameError, match="did you mean 'agentview'"):
            next(observe_states(dataset, cameras=["agentviw"]))
        with pytest.raises(DatasetError, match="is not XML"):
            next(observe_states(dataclasses.replace(dataset, episode_text={"model_xml": ["<mujoco"]})))
        arrays = {**dataset.arrays, "sim_state": dataset.arrays["sim_state"][:, :-1]}
        with pytest.raises(DatasetError, match=r"must be 32 wide by its model .* got 31"):
            RobosuiteSimulator(dataclasses.replace(dataset, arrays=arrays)).load(0)
