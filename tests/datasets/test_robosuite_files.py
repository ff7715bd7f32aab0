import json

import h5py
import numpy as np
import pytest

from scd_robot.datasets.hdf5.robosuite import EARLY_ACTIONS
from scd_robot.datasets.open import open_dataset
from scd_robot.errors import DatasetError, UnknownNameError
from scd_robot.types import ArraySpec

DT = 0.04
LENGTHS = {"demo_1": 4, "demo_2": 3}


@pytest.fixture(autouse=True)
def _without_probe(monkeypatch):
    """These files do not crash HDF5; what is done about those that do is tested with the other damage."""
    monkeypatch.setattr("scd_robot.datasets.hdf5.files.probe_files", lambda path: None)


def make_states(length, start=0.0):
    states = np.random.default_rng(length).normal(size=(length, 6))
    states[:, 0] = start + DT * np.arange(length)
    return states


@pytest.fixture
def path(tmp_path):
    (tmp_path / "models").mkdir()
    with h5py.File(tmp_path / "demo.hdf5", "w") as file:
        data = file.create_group("data")
        data.attrs.update({"env": "Lift", "repository_version": "1.0.0", "env_info": json.dumps({"robots": "Panda"})})
        for number, (name, length) in enumerate(LENGTHS.items(), 1):
            data[f"{name}/states"] = make_states(length, 100.0 * number)
            data[f"{name}/actions"] = np.full((length, 2), number / 8)
            data[name].attrs["model_file"] = f"model_{number}.xml"
            (tmp_path / f"models/model_{number}.xml").write_text(f"<mujoco model='{number}'/>")
    return tmp_path / "demo.hdf5"


def test_states_stand_for_observations_without_their_time(path):
    dataset = open_dataset(path)
    states = np.concatenate([make_states(4, 100.0), make_states(3, 200.0)])
    assert dataset.spec.observation == {"state": ArraySpec((5,))}
    assert set(dataset.arrays) == {"state", "action", "sim_state"}
    assert dataset.arrays["sim_state"].dtype == np.float64
    np.testing.assert_array_equal(dataset.arrays["sim_state"], states)
    np.testing.assert_array_equal(dataset.arrays["state"], states[:, 1:].astype(np.float32))
    np.testing.assert_array_equal(dataset.arrays["action"][:, 0], [1 / 8] * 4 + [2 / 8] * 3)
    assert dataset.metadata == {
        "format": "robosuite",
        "action": "actions",
        "env": "Lift",
        "repository_version": "1.0.0",
        "env_info": {"robots": "Panda"},
    }
    assert dataset.episode_text == {
        "name": ["demo_1", "demo_2"], "model_xml": ["<mujoco model='1'/>", "<mujoco model='2'/>"],
    }  # fmt: skip


def test_models_in_the_file_itself(path, edit):
    with edit() as data:
        for name in LENGTHS:
            data[name].attrs["model_file"] = f"<mujoco model='{name}' />"
    assert open_dataset(path).episode_text["model_xml"][1] == "<mujoco model='demo_2' />"


def test_a_missing_model_is_told_and_left_out(path, caplog):
    (path.parent / "models/model_2.xml").unlink()
    assert "model_xml" not in open_dataset(path).episode_text
    assert "model_2.xml is missing" in caplog.text


class TestRate:
    def test_is_measured_in_the_states(self, path):
        spec = open_dataset(path).spec
        assert spec.control_dt == DT
        assert "control_dt 0.04 s measured in its states" in spec.source

    def test_of_the_environment_goes_before_that_of_the_states(self, path, edit, caplog):
        with edit() as data:
            data.attrs["env_info"] = json.dumps({"control_freq": 20})
        spec = open_dataset(path).spec
        assert (spec.control_dt, "measured" in spec.source) == (0.05, False)
        assert "0.05 s per control step, but 0.04 s pass in its states" in caplog.text

    def test_is_as_given(self, path):
        assert open_dataset(path, control_dt=0.5).spec.control_dt == 0.5

    @pytest.mark.parametrize("empty", ["demo_1", "demo_2"])
    def test_is_measured_beside_an_empty_demonstration(self, path, edit, empty):
        with edit() as data:
            for key in ("states", "actions"):
                values = data[empty][key][:0]
                del data[empty][key]
                data[empty][key] = values
        assert open_dataset(path, check=False).spec.control_dt == DT

    def test_is_assumed_where_time_stands_still(self, path, edit):
        with edit() as data:
            for name in LENGTHS:
                data[f"{name}/states"][:, 0] = 3.0
        spec = open_dataset(path).spec
        assert (spec.control_dt, "control_dt 0.05 s assumed" in spec.source) == (0.05, True)


class TestEarlyRecordings:
    @pytest.fixture(autouse=True)
    def _early(self, edit):
        with edit() as data:
            for name, length in LENGTHS.items():
                del data[f"{name}/actions"]
                data[f"{name}/joint_velocities"] = np.full((length, 3), 0.5)
                data[f"{name}/gripper_actuations"] = np.arange(length, dtype=np.float64)[:, None]

    def test_velocities_and_gripper_are_the_action(self, path):
        dataset = open_dataset(path)
        assert dataset.metadata["action"] == "joint_velocities+gripper_actuations" == EARLY_ACTIONS
        np.testing.assert_array_equal(dataset.episode(1)["action"], [[0.5, 0.5, 0.5, i] for i in range(3)])
        assert open_dataset(path, action="joint_velocities").spec.action_dim == 3

    @pytest.mark.parametrize("missing", ["joint_velocities", "gripper_actuations"])
    def test_without_one_of_them_they_are_refused(self, path, edit, missing):
        with edit() as data:
            for name in LENGTHS:
                del data[f"{name}/{missing}"]
        with pytest.raises(DatasetError, match="holds states but no actions"):
            open_dataset(path)


class TestRefuses:
    @pytest.mark.parametrize(
        ("key", "values", "message"),
        [
            ("actions", np.zeros((2, 2)), "'states' of demonstration 'demo_2' .* has 3 steps, but its actions have 2"),
            ("states", np.zeros((3, 7)), r"demo_2/states' .* has rows of shape \(7,\), but those of .* \(6,\)"),
            ("states", np.zeros((3, 6), "S3"), "objects, which are not read"),
            ("actions", np.zeros((3, 5)), r"demo_2/actions' .* has rows of shape \(5,\)"),
        ],
    )
    def test_contradictions(self, path, edit, key, values, message):
        with edit() as data:
            del data["demo_2"][key]
            data["demo_2"][key] = values
        with pytest.raises(DatasetError, match=message):
            open_dataset(path)

    @pytest.mark.parametrize("key", ["states", "actions"])
    def test_a_demonstration_that_lacks_an_array(self, path, edit, key):
        with edit() as data:
            del data["demo_2"][key]
        with pytest.raises(DatasetError, match=f"'{key}' of demonstration 'demo_2' .* is missing"):
            open_dataset(path)

    @pytest.mark.parametrize("shape", [(1,), ()])
    def test_states_of_nothing_but_time(self, path, edit, shape):
        with edit() as data:
            for name, length in LENGTHS.items():
                del data[f"{name}/states"]
                data[f"{name}/states"] = np.zeros((length, *shape))
        with pytest.raises(DatasetError, match=r"must be \(T, 1 \+ S\)"):
            open_dataset(path)

    def test_keys_other_than_the_state(self, path):
        assert open_dataset(path, keys=["state"]).num_steps == 7
        with pytest.raises(UnknownNameError, match="raw states, without observations"):
            open_dataset(path, keys=["object"])


@pytest.mark.parametrize(
    ("file", "episodes", "steps", "widths", "action", "control_dt"),
    [
        ("v1.4.1/lift", 3, 1384, (31, 7), "actions", 0.05),
        ("v1.4.1/handover/panda_panda", 7, 2775, (49, 14), "actions", 0.05),
        ("v1.0.1/door/panda", 1, 261, (22, 7), "actions", 0.05),
        ("v1.0.1/lift/panda", 1, 412, (31, 7), "actions", 0.05),
        ("v1.0.1/nut-assembly/panda", 1, 1036, (44, 7), "actions", 0.05),
        ("v1.0.1/pick-place/panda", 1, 1482, (70, 7), "actions", 0.05),
        ("v1.0.1/stack/panda", 1, 532, (44, 7), "actions", 0.05),
        ("v1.0.1/wipe/panda", 1, 174, (14, 6), "actions", 0.05),
        ("v0.3.0/SawyerLift", 2, 1895, (33, 8), EARLY_ACTIONS, 0.012),
        ("v0.3.0/SawyerNutAssembly", 2, 5748, (46, 8), EARLY_ACTIONS, 0.012),
        ("v0.3.0/SawyerPickPlace", 2, 9566, (72, 8), EARLY_ACTIONS, 0.01),
        ("v0.3.0/SawyerStack", 2, 2426, (46, 8), EARLY_ACTIONS, 0.01),
    ],
)
def test_human_recordings_are_read(recordings, file, episodes, steps, widths, action, control_dt):
    path = recordings / "robosuite_human" / file / "demo.hdf5"
    if not path.is_file():
        pytest.skip(f"no recording of robosuite at {path}")
    dataset = open_dataset(path)
    assert (dataset.num_episodes, dataset.num_steps) == (episodes, steps)
    assert (dataset.spec.observation["state"].shape[0], dataset.spec.action_dim) == widths
    assert (dataset.metadata["action"], dataset.spec.control_dt) == (action, control_dt)
    assert all(model.lstrip().startswith("<mujoco") for model in dataset.episode_text["model_xml"])
    with h5py.File(path) as raw:
        for index, name in enumerate(dataset.episode_text["name"]):
            demo, episode = raw["data"][name], dataset.episode(index)
            np.testing.assert_array_equal(episode["sim_state"], demo["states"])
            expected = np.concatenate([demo[key][:] for key in action.split("+")], axis=1)
            np.testing.assert_array_equal(episode["action"], expected.astype(np.float32))


@pytest.mark.parametrize("task", ["BaxterLift", "BaxterPegInHole"])
def test_human_recordings_without_actions_are_refused(recordings, task):
    path = recordings / "robosuite_human" / "v0.3.0" / task / "demo.hdf5"
    if not path.is_file():
        pytest.skip(f"no recording of robosuite at {path}")
    with pytest.raises(DatasetError, match=r"holds states but no actions .* nothing to learn from"):
        open_dataset(path)
