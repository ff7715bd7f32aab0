import errno
import json
import logging
import pickle
import subprocess
import sys

import h5py
import numpy as np
import pytest

from scd_robot.datasets.lazy import LazyArray
from scd_robot.datasets.open import open_dataset
from scd_robot.errors import ConfigError, DatasetError, MissingDependencyError, UnknownNameError
from scd_robot.types import ArraySpec

ENV_ARGS = {"env_name": "Lift", "type": 1, "env_kwargs": {"control_freq": 50, "robots": ["Panda"]}}
LENGTHS = {"demo_2": 4, "demo_10": 3, "demo_0": 5}  # written in this order; read as 0, 2, 10
ORDER = ["demo_0", "demo_2", "demo_10"]


def make_demo(name):
    length = LENGTHS[name]
    rng = np.random.default_rng(length)
    return {
        "actions": rng.normal(size=(length, 2)),
        "states": rng.normal(size=(length, 6)),
        "rewards": np.arange(length, dtype=np.float64),
        "dones": np.arange(length) == length - 1,
        "obs/pos": rng.normal(size=(length, 3)),
        "obs/image": rng.integers(0, 256, (length, 8, 9, 3), dtype=np.uint8),
        "next_obs/pos": np.full((length, 3), np.nan),  # must not be read
    }


def write_file(path):
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["env_args"] = json.dumps(ENV_ARGS)
        data.attrs["total"] = sum(LENGTHS.values())
        for name, length in LENGTHS.items():
            for key, values in make_demo(name).items():
                data[f"{name}/{key}"] = values
            data[name].attrs["num_samples"] = length
            data[name].attrs["model_file"] = f"<mujoco model='{name}'/>"
    return path


def put(group, name, values):
    """Replaces a dataset."""
    if name in group:
        del group[name]
    group[name] = values


@pytest.fixture(autouse=True)
def _without_probe(monkeypatch):
    """These files do not crash HDF5; what is done about those that do is tested with the other damage."""
    monkeypatch.setattr("scd_robot.datasets.hdf5.files.probe_files", lambda path: None)


@pytest.fixture
def path(tmp_path):
    return write_file(tmp_path / "a.hdf5")


def concatenated(key):
    return np.concatenate([make_demo(name)[key] for name in ORDER])


class TestReads:
    def test_demonstrations_in_the_order_of_their_numbers(self, path):
        dataset = open_dataset(path)
        assert dataset.episode_text["name"] == ORDER
        assert dataset.episode_lengths.tolist() == [5, 4, 3]
        assert dataset.spec.observation == {"image": ArraySpec((8, 9, 3), "uint8"), "pos": ArraySpec((3,))}
        for name, key, dtype in [
            ("pos", "obs/pos", np.float32),
            ("image", "obs/image", np.uint8),
            ("action", "actions", np.float32),
            ("sim_state", "states", np.float64),
            ("reward", "rewards", np.float32),
            ("done", "dones", np.uint8),
        ]:
            values = np.asarray(dataset.arrays[name])
            assert values.dtype == dtype
            np.testing.assert_array_equal(values, concatenated(key).astype(dtype))
        assert set(dataset.arrays) == {"pos", "image", "action", "sim_state", "reward", "done"}
        assert dataset.metadata == {"format": "robomimic", "action": "actions", "env_args": ENV_ARGS}
        assert dataset.spec.source == "a.hdf5 (robomimic, Lift)"
        assert dataset.episode_text["model_xml"] == [f"<mujoco model='{name}'/>" for name in ORDER]

    @pytest.mark.parametrize("index", [slice(3, 8), 4, [11, 0, 0, 5], [[1, 2], [8, 9]], -1, slice(0, 0)])
    def test_images_when_they_are_indexed(self, path, index):
        images = open_dataset(path).arrays["image"]
        assert isinstance(images, LazyArray)
        np.testing.assert_array_equal(images[index], concatenated("obs/image")[index])

    def test_images_in_another_process(self, path):
        images = open_dataset(path).arrays["image"]
        images[:1]
        code = "import pickle, sys; print(int(pickle.load(sys.stdin.buffer)[:].astype(int).sum()))"
        told = subprocess.run([sys.executable, "-c", code], input=pickle.dumps(images), capture_output=True, check=True)
        assert int(told.stdout) == concatenated("obs/image").astype(int).sum()

    def test_images_from_another_folder_than_the_one_it_was_opened_in(self, path, monkeypatch):
        monkeypatch.chdir(path.parent)
        images = open_dataset(path.name).arrays["image"]
        monkeypatch.chdir("/")
        np.testing.assert_array_equal(images[:], concatenated("obs/image"))

    def test_more_demonstrations_than_are_kept_open(self, path, monkeypatch):
        monkeypatch.setattr("scd_robot.datasets.hdf5.files._OPEN_ARRAYS", 2)
        images = open_dataset(path).arrays["image"]
        for _ in range(2):
            np.testing.assert_array_equal(images[:], concatenated("obs/image"))

    @pytest.mark.parametrize("compression", ["gzip", "lzf"])
    def test_compressed_chunks(self, path, edit, compression):
        with edit() as data:
            for name in LENGTHS:
                demo = make_demo(name)
                for key, chunks in (("obs/image", (2, 8, 9, 3)), ("actions", (2, 2))):
                    del data[name][key]
                    data[name].create_dataset(
                        key, data=demo[key], chunks=chunks, compression=compression, shuffle=True, fletcher32=True
                    )
        dataset = open_dataset(path)
        np.testing.assert_array_equal(dataset.arrays["image"][2:11], concatenated("obs/image")[2:11])
        np.testing.assert_array_equal(dataset.arrays["action"], concatenated("actions").astype(np.float32))

    def test_texts_among_observations_are_left_out_and_told(self, path, edit, caplog):
        with edit() as data:
            for name, length in LENGTHS.items():
                data[f"{name}/obs/lang"] = np.array(["pick"] * length, h5py.string_dtype())
        assert list(open_dataset(path).spec.observation) == ["image", "pos"]
        assert "observations that hold texts are left out: lang" in caplog.text
        with pytest.raises(DatasetError, match=r"obs/lang' .* which are not read"):
            open_dataset(path, keys=["lang", "pos"])

    def test_nested_boolean_and_integer_observations_as_float32(self, path, edit):
        with edit() as data:
            for name, length in LENGTHS.items():
                data[f"{name}/obs/robot/arm/joint_pos"] = np.full((length, 2), 0.25)
                data[f"{name}/obs/robot/closed"] = np.arange(length) % 2 == 1
                data[f"{name}/obs/count"] = np.arange(length, dtype=np.int64)[:, None]
                data[f"{name}/obs/empty"] = np.zeros((length, 0))
        dataset = open_dataset(path)
        assert list(dataset.spec.observation) == ["count", "image", "pos", "robot.arm.joint_pos", "robot.closed"]
        for key in ("count", "robot.closed"):
            assert (dataset.arrays[key].dtype, dataset.arrays[key].shape) == (np.float32, (12, 1))
        np.testing.assert_array_equal(dataset.episode(0)["robot.closed"][:, 0], [0, 1, 0, 1, 0])

    def test_observations_called_as_other_arrays_under_another_name(self, path, edit):
        with edit() as data:
            for name, length in LENGTHS.items():
                data[f"{name}/obs/action"] = np.full((length, 5), 7.0)
        dataset = open_dataset(path)
        np.testing.assert_array_equal(dataset.arrays["obs.action"], np.full((12, 5), 7.0))
        np.testing.assert_array_equal(dataset.arrays["action"], concatenated("actions").astype(np.float32))

    def test_float_images_as_uint8(self, path, edit):
        with edit() as data:
            for name in LENGTHS:
                put(data[name], "obs/image", np.moveaxis(make_demo(name)["obs/image"] / np.float32(255), -1, 1))
        images = open_dataset(path).arrays["image"]
        assert images.dtype == np.uint8
        np.testing.assert_array_equal(images[:], concatenated("obs/image"))

    def test_only_the_chosen_keys(self, path):
        assert set(open_dataset(path, keys=["pos"]).spec.observation) == {"pos"}
        with pytest.raises(UnknownNameError, match="did you mean 'pos'"):
            open_dataset(path, keys=["poss"])

    def test_soft_links_within_the_file(self, path, edit):
        with edit() as data:
            data.file["kept"] = make_demo("demo_2")["obs/pos"]
            del data["demo_2/obs/pos"]
            data["demo_2/obs/pos"] = h5py.SoftLink("/kept")
        np.testing.assert_array_equal(open_dataset(path).arrays["pos"], concatenated("obs/pos").astype(np.float32))

    def test_states_in_groups_are_left_out(self, path, edit):
        with edit() as data:
            for name, length in LENGTHS.items():
                del data[f"{name}/states"]
                data[f"{name}/states/robot/joint_position"] = np.zeros((length, 9))
        assert "sim_state" not in open_dataset(path).arrays

    def test_rewards_with_a_second_axis(self, path, edit):
        with edit() as data:
            for name in LENGTHS:
                put(data[name], "rewards", make_demo(name)["rewards"][:, None])
        np.testing.assert_array_equal(open_dataset(path).arrays["reward"], concatenated("rewards"))

    def test_notes_that_all_demonstrations_have(self, path, edit):
        with edit() as data:
            for number, name in enumerate(LENGTHS):
                data[name].attrs.update({"success": number > 0, "seed": number, "lang": f"lift {number}"})
                data[name].attrs.update({"list": [1, 2], "mask_train": 1, "name": "other"})
            data["demo_0"].attrs["only_here"] = 1
        dataset = open_dataset(path)
        assert {name: values.tolist() for name, values in dataset.episode_info.items()} == {
            "success": [1, 0, 1], "seed": [2, 0, 1],
        }  # fmt: skip
        assert dataset.episode_text["lang"] == ["lift 2", "lift 0", "lift 1"]
        assert dataset.episode_text["name"] == ORDER

    def test_wrong_counts_are_told_and_not_used(self, path, edit, caplog):
        with edit() as data:
            data.attrs["total"] = 99
            data["demo_2"].attrs["num_samples"] = 98
        assert open_dataset(path).num_steps == 12
        assert "notes 99 steps in all, but holds 12" in caplog.text
        assert "demo_2 (98, holds 4)" in caplog.text

    @pytest.mark.parametrize("options", [{}, {"drop": ["1"]}, {"mask": "train"}])
    def test_right_counts_are_not_mentioned(self, path, edit, caplog, options):
        with edit() as data:
            data.file["mask/train"] = ["demo_0"]
        with caplog.at_level(logging.WARNING):
            open_dataset(path, **options)
        assert not caplog.records

    def test_values_are_checked_unless_asked_not_to(self, path, edit):
        with edit() as data:
            data["demo_2/obs/pos"][1, 1] = np.inf
        with pytest.raises(DatasetError, match=r"'pos' .* first in episode 1 at step 1"):
            open_dataset(path)
        assert np.isinf(open_dataset(path, check=False).arrays["pos"][6, 1])

    @pytest.mark.parametrize(
        ("attributes", "task"),
        [
            ({"language_instruction": "lift"}, "lift"),
            ({"ep_meta": json.dumps({"lang": "lift", "layout_id": 3})}, "lift"),
            ({"task": "lift", "language_instruction": "lift the cube", "ep_meta": json.dumps({"lang": "x"})}, "lift"),
            ({"task": 7, "language_instruction": "lift"}, None),
            ({"ep_meta": "{"}, None),
            ({"ep_meta": json.dumps(["lang"])}, None),
            ({"ep_meta": json.dumps({"lang": 3})}, None),
        ],
    )
    def test_task_in_words_wherever_it_is_noted(self, path, edit, attributes, task):
        with edit() as data:
            for name in LENGTHS:
                data[name].attrs.update(attributes)
        assert open_dataset(path).episode_text.get("task") == (task and [task] * 3)

    def test_tasks_noted_in_different_places(self, path, edit):
        with edit() as data:
            data["demo_0"].attrs["task"] = "lift"
            data["demo_2"].attrs["language_instruction"] = "push"
            data["demo_10"].attrs["ep_meta"] = json.dumps({"lang": "pull"})
        assert open_dataset(path).episode_text["task"] == ["lift", "push", "pull"]
        with edit() as data:
            del data["demo_10"].attrs["ep_meta"]
        assert "task" not in open_dataset(path).episode_text


class TestLabels:
    @pytest.fixture(autouse=True)
    def _more_actions(self, edit):
        with edit() as data:
            for name, length in LENGTHS.items():
                data[f"{name}/actions_abs"] = np.full((length, 3), 3.0)
                data[f"{name}/action_dict/abs_pos"] = np.full((length, 2), 1.0)
                data[f"{name}/action_dict/gripper"] = np.arange(length, dtype=np.float32)
                data[f"{name}/obs/actions"] = np.full((length, 2), 9.0)
                data[f"{name}/executed_action"] = np.full((length, 2), 5.0)

    @pytest.mark.parametrize(
        ("action", "first"),
        [
            ("actions_abs", [3, 3, 3]),
            ("action_dict/abs_pos", [1, 1]),
            ("action_dict/abs_pos+action_dict/gripper+actions_abs", [1, 1, 0, 3, 3, 3]),
        ],
    )
    def test_label_is_chosen(self, path, action, first):
        dataset = open_dataset(path, action=action)
        assert dataset.spec.action_dim == len(first)
        assert dataset.metadata["action"] == action
        np.testing.assert_array_equal(dataset.episode(1)["action"][0], first)
        assert "executed_action" not in dataset.arrays

    def test_other_labels_are_told(self, path, caplog):
        with caplog.at_level(logging.INFO, "scd_robot"):
            open_dataset(path, action="actions_abs")
            assert "--action" not in caplog.text
            open_dataset(path)
        assert "--action takes others there are: actions_abs, action_dict/abs_pos, action_dict/gripper" in caplog.text

    @pytest.mark.parametrize(
        ("controllers", "action", "kind"),
        [
            (None, "actions", ""),
            (None, "actions_abs", "absolute"),
            ({"type": "OSC_POSE", "control_delta": True}, "actions", "delta"),
            ({"type": "OSC_POSE", "control_delta": True}, "action_dict/abs_pos+action_dict/gripper", "absolute"),
            ({"type": "OSC_POSE", "control_delta": False}, "actions", "absolute"),
            ([{"type": "OSC_POSITION"}, {"type": "OSC_POSITION"}], "actions", "delta"),
            ([{"type": "OSC_POSITION"}, {"type": "OSC_POSITION", "input_type": "absolute"}], "actions", ""),
            ({"type": "JOINT_POSITION"}, "actions", "delta"),
            ({"type": "JOINT_TORQUE"}, "actions", ""),
            ({"body_parts": {"right": {"type": "OSC_POSE", "input_type": "absolute"}}}, "actions", "absolute"),
            ({"body_parts": {"arms": {"left": {"type": "OSC_POSE"}}, "torso": {"type": "JOINT_POSITION",
              "input_type": "absolute"}}}, "actions", "delta"),
            (None, "action_dict/abs_pos+action_dict/rel_pos", ""),
        ],
    )  # fmt: skip
    def test_what_actions_ask_for_is_told_by_their_name_or_the_controllers(self, path, edit, controllers, action, kind):
        with edit() as data:
            for name, length in LENGTHS.items():
                data[f"{name}/action_dict/rel_pos"] = np.zeros((length, 2))
            if controllers is not None:
                kwargs = {**ENV_ARGS["env_kwargs"], "controller_configs": controllers}
                data.attrs["env_args"] = json.dumps({**ENV_ARGS, "env_kwargs": kwargs})
        assert open_dataset(path, action=action).spec.action_kind == kind

    def test_joined_columns_keep_their_rows(self, path):
        gripper = open_dataset(path, action="actions_abs+action_dict/gripper").arrays["action"][:, 3]
        np.testing.assert_array_equal(gripper, [0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 1, 2])

    def test_default_is_actions_never_the_observation(self, path):
        dataset = open_dataset(path)
        np.testing.assert_array_equal(dataset.arrays["action"], concatenated("actions").astype(np.float32))
        np.testing.assert_array_equal(dataset.arrays["actions"], np.full((12, 2), 9.0))
        np.testing.assert_array_equal(dataset.executed(), np.full((12, 2), 5.0))

    @pytest.mark.parametrize(
        "action", ["action_abs", "obs/actions", "actions+nothing", "", "rewards", "action_dict", "."]
    )
    def test_unknown_label_is_refused_with_candidates(self, path, action):
        with pytest.raises((UnknownNameError, DatasetError), match=r"actions_abs|actions"):
            open_dataset(path, action=action) if action else open_dataset(path, action="x")

    def test_file_without_actions_names_the_candidates(self, path, edit):
        with edit() as data:
            for name in LENGTHS:
                del data[f"{name}/actions"]
        with pytest.raises(DatasetError, match=r"no array 'actions'.*actions_abs.*action_dict/abs_pos"):
            open_dataset(path)


class TestMasks:
    @pytest.mark.parametrize("texts", [["demo_10", "demo_0"], np.array([b"demo_10", b"demo_0"])])
    def test_lists_become_numbers_of_episodes(self, path, edit, texts):
        with edit() as data:
            data.file["mask/train"] = texts
            data.file["mask/none"] = np.array([], "S8")
        dataset = open_dataset(path)
        assert dataset.episode_info["mask_train"].tolist() == [1, 0, 1]
        assert dataset.episode_info["mask_none"].tolist() == [0, 0, 0]
        chosen = open_dataset(path, mask="train")
        assert chosen.episode_text["name"] == ["demo_0", "demo_10"]
        with pytest.raises(UnknownNameError, match="train"):
            open_dataset(path, mask="trian")

    def test_a_listed_demonstration_that_is_not_there_is_told(self, path, edit, caplog):
        with edit() as data:
            data.file["mask/train"] = ["demo_0", "demo_1"]
        assert open_dataset(path).episode_info["mask_train"].tolist() == [1, 0, 0]
        assert "lists 1 demonstrations that are not there: 'demo_1'" in caplog.text

    def test_what_is_wrong_with_a_demonstration_does_not_matter_where_it_is_left_out(self, path, edit):
        with edit() as data:
            del data["demo_2/obs/pos"]
            data.file["mask/good"] = ["demo_0", "demo_10"]
        with pytest.raises(
            DatasetError,
            match=r"of 'demo_2' \(episode 1\) and those before it not all have pos; leave it out with --drop",
        ):
            open_dataset(path)
        with pytest.raises(DatasetError, match=r"'obs/pos' of demonstration 'demo_2' \(episode 1\) .* is missing"):
            open_dataset(path, keys=["pos"], drop=["0"])
        for options in ({"drop": ["1"]}, {"only": ["0", "2-"]}, {"mask": "good"}):
            assert open_dataset(path, **options).episode_text["name"] == ["demo_0", "demo_10"]
        with pytest.raises(DatasetError, match="no episode is left of the 3"):
            open_dataset(path, drop=["0-"])
        with pytest.raises(ConfigError, match="'7' does not name episodes of 0 to 2"):
            open_dataset(path, drop=["7"])

    @pytest.mark.parametrize("values", [np.arange(3), np.array([["demo_0"]], "S")])
    def test_lists_of_something_else_are_refused(self, path, edit, values):
        with edit() as data:
            data.file["mask/train"] = values
        with pytest.raises(DatasetError, match="must be a list of texts"):
            open_dataset(path)


class TestRate:
    @pytest.mark.parametrize(
        ("env_args", "expected"),
        [
            ({"env_kwargs": {"control_freq": 50}}, 0.02),
            ({"env_kwargs": {"env_kwargs": {"control_freq": 10.0}}}, 0.1),
            ({"env_name": "Isaac", "sim_args": {"dt": 0.01, "decimation": 5}}, 0.05),
            ({"env_kwargs": {"control_freq": 0}, "deep": {"control_freq": 5}}, 0.2),
        ],
    )
    @pytest.mark.parametrize("as_bytes", [False, True])
    def test_comes_from_the_environment(self, path, edit, env_args, expected, as_bytes):
        text = json.dumps(env_args)
        with edit() as data:
            data.attrs["env_args"] = np.bytes_(text.encode()) if as_bytes else text
        dataset = open_dataset(path)
        assert dataset.spec.control_dt == pytest.approx(expected, rel=1e-12)
        assert dataset.metadata["env_args"] == env_args
        assert "assumed" not in dataset.spec.source

    @pytest.mark.parametrize("text", [None, "{}", '{"env_name": "Li', "[1]", '{"env_kwargs": {"control_freq": "20"}}'])
    def test_is_assumed_and_said_where_the_file_is_silent(self, path, edit, text):
        with edit() as data:
            del data.attrs["env_args"]
            if text is not None:
                data.attrs["env_args"] = text
        dataset = open_dataset(path)
        assert dataset.spec.control_dt == 0.05
        assert "control_dt 0.05 s assumed" in dataset.spec.source
        given = open_dataset(path, control_dt=0.2).spec
        assert (given.control_dt, "assumed" in given.source) == (0.2, False)

    def test_is_measured_in_time_stamps_where_there_are_some(self, path, edit):
        with edit() as data:
            for name, length in LENGTHS.items():
                data[f"{name}/timestamp"] = 9.0 + np.arange(length) / 32
            del data.attrs["env_args"]
        spec = open_dataset(path).spec
        assert (spec.control_dt, "0.03125 s measured in its timestamp" in spec.source) == (0.03125, True)
        with edit() as data:
            for name in LENGTHS:
                data[f"{name}/timestamp"][:] *= 1000  # milliseconds
        assert open_dataset(path).spec.control_dt == 0.05

    def test_broken_arguments_are_kept_as_text(self, path, edit, caplog):
        with edit() as data:
            data.attrs["env_args"] = '{"env_name": "Li'
        assert open_dataset(path).metadata["env_args_text"] == '{"env_name": "Li'
        assert "'env_args' is no JSON object" in caplog.text


class TestRefuses:
    @pytest.mark.parametrize(
        ("key", "rows", "message"),
        [
            ("obs/pos", np.zeros((3, 3)), r"'obs/pos' of demonstration 'demo_2' .* has 3 steps, .* have 4"),
            ("rewards", np.zeros(5), r"'rewards' of demonstration 'demo_2' .* has 5 steps, .* have 4"),
            ("obs/pos", np.zeros((4, 2)), r"demo_2/obs/pos' .* has rows of shape \(2,\), .*demo_0/obs/pos.* \(3,\)"),
            ("actions", np.zeros((4, 3)), r"demo_2/actions' .* has rows of shape \(3,\)"),
            ("obs/image", np.zeros((4, 8, 9, 3), np.float32), "holds float32 images, but .* uint8"),
            ("obs/pos", np.array(["a"] * 4, "S"), "holds .* objects, which are not read"),
            ("obs/pos", np.zeros(4, [("x", "f4")]), "objects, which are not read"),
            ("obs/pos", np.zeros((4, 3), np.complex64), "objects, which are not read"),
            ("obs/pos", 1.0, "is a single value"),
            ("actions", np.zeros(()), "is a single value"),
            ("rewards", np.zeros((4, 2)), "rewards"),
        ],
    )
    def test_contradictions_within_a_demonstration(self, path, edit, key, rows, message):
        with edit() as data:
            put(data["demo_2"], key, rows)
        with pytest.raises(DatasetError, match=message):
            open_dataset(path)

    @pytest.mark.parametrize("key", ["states", "rewards", "dones"])
    def test_what_only_some_demonstrations_have_is_left_out(self, path, edit, key, caplog):
        with edit() as data:
            del data["demo_10"][key]
        whole = {"states": "sim_state", "rewards": "reward", "dones": "done"}
        assert set(whole.values()) - set(open_dataset(path).arrays) == {whole[key]}
        assert f"{key!r} is left out: only 2 of 3 demonstrations have it" in caplog.text

    def test_states_of_scenes_with_different_objects_are_left_out(self, path, edit, caplog):
        with edit() as data:
            put(data["demo_2"], "states", np.zeros((4, 99)))
        dataset = open_dataset(path)
        assert "sim_state" not in dataset.arrays
        assert "reward" in dataset.arrays
        assert "'states' is left out: its rows have 2 different shapes" in caplog.text

    @pytest.mark.parametrize("key", ["actions", "obs/pos", "obs"])
    def test_a_key_that_one_demonstration_lacks(self, path, edit, key):
        with edit() as data:
            del data["demo_10"][key]
        with pytest.raises(DatasetError, match="demo_10"):
            open_dataset(path)

    def test_the_missing_key_only_where_it_is_wanted(self, path, edit):
        with edit() as data:
            del data["demo_10/obs/pos"]
        assert set(open_dataset(path, keys=["image"]).spec.observation) == {"image"}
        with pytest.raises(DatasetError, match=r"'obs/pos' of demonstration 'demo_10' .* is missing"):
            open_dataset(path, keys=["pos"])

    def test_two_keys_of_one_name(self, path, edit):
        with edit() as data:
            for name, length in LENGTHS.items():
                data[f"{name}/obs/a.b"] = data[f"{name}/obs/a/b"] = np.zeros((length, 1))
        with pytest.raises(DatasetError, match=r"are the same key 'a.b'"):
            open_dataset(path)

    def test_no_demonstrations(self, path, edit):
        with edit() as data:
            for name in LENGTHS:
                data.move(name, f"episode{name}")
        with pytest.raises(DatasetError, match="holds no demonstration"):
            open_dataset(path)

    def test_other_layouts_say_what_is_there(self, tmp_path, path, edit):
        with h5py.File(tmp_path / "other.hdf5", "w") as file:
            file["steps/qpos"] = file["action"] = np.zeros((3, 2))
        with pytest.raises(DatasetError, match=r"no group 'data'.* holds: action, steps; .*ZarrWriter"):
            open_dataset(tmp_path / "other.hdf5")
        with edit() as data:
            for name in LENGTHS:
                data.move(name, name.replace("demo", "episode"))
        with pytest.raises(DatasetError, match=r"but: episode_0, episode_10, episode_2; rename them so"):
            open_dataset(path)

    def test_one_observation_more_than_actions(self, path, edit):
        with edit() as data:
            put(data["demo_0"], "obs/pos", np.zeros((6, 3)))
        with pytest.raises(
            DatasetError, match=r"has 6 steps, but its actions have 5; .* after the last action.* cut it"
        ):
            open_dataset(path)

    @pytest.mark.parametrize(("start", "kind"), [(b"\xff\xd8\xff\xe0", "JPEG"), (b"\x89PNG", "PNG")])
    def test_compressed_pictures_in_rows_of_bytes(self, path, edit, start, kind):
        with edit() as data:
            for name, length in LENGTHS.items():
                put(data[name], "obs/image", np.tile(np.frombuffer(start + bytes(20), np.uint8), (length, 1)))
        with pytest.raises(DatasetError, match=f"'image' of .* holds compressed pictures .{kind}.*store them decoded"):
            open_dataset(path)
        with edit() as data:
            put(data["demo_2"], "obs/image", np.zeros((4, 9), np.uint8))  # as long as its own longest one
        with pytest.raises(DatasetError, match=r"rows of shape \(9,\).*; store pictures decoded"):
            open_dataset(path)

    def test_compressed_pictures_of_their_own_lengths(self, path, edit):
        with edit() as data:
            for name, length in LENGTHS.items():
                del data[name]["obs/image"]
                data[name].create_dataset("obs/image", (length,), h5py.vlen_dtype(np.uint8))
        with pytest.raises(DatasetError, match=r"holds rows of different lengths \(compressed pictures\?\)"):
            open_dataset(path)

    @pytest.mark.parametrize("states", [True, False])
    def test_next_observations_alone_are_not_what_was_seen(self, path, edit, caplog, states):
        with edit() as data:
            for name in LENGTHS:
                del data[name]["obs"]
                if not states:
                    del data[name]["states"]
        if states:
            assert list(open_dataset(path).spec.observation) == ["state"]
            assert "has 'next_obs', what was seen after each action, but no 'obs'" in caplog.text
        else:
            with pytest.raises(DatasetError, match=r"'next_obs', what was seen after it, is not read"):
                open_dataset(path)

    def test_no_observations(self, path, edit):
        with edit() as data:
            for name in LENGTHS:
                del data[f"{name}/obs"], data[f"{name}/states"]
        with pytest.raises(
            DatasetError, match=r"neither observations .* nor simulator states .*'demo_0' holds: actions"
        ):
            open_dataset(path)

    def test_a_demonstration_without_steps(self, path, edit):
        with edit() as data:
            for key, values in make_demo("demo_2").items():
                put(data["demo_2"], key, values[:0])
        with pytest.raises(DatasetError, match="episode 1 has 0"):
            open_dataset(path)

    def test_foreign_files(self, tmp_path):
        with h5py.File(tmp_path / "a.hdf5", "w") as file:
            file["x"] = [1, 2]
        (tmp_path / "b.hdf5").write_text("not one")
        for name, message in (("a.hdf5", "no group 'data'"), ("b.hdf5", "cannot be read")):
            with pytest.raises(DatasetError, match=message):
                open_dataset(tmp_path / name)

    @pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
    def test_truncated_files(self, path, share):
        content = path.read_bytes()
        path.write_bytes(content[: int(share * len(content))])
        with pytest.raises(DatasetError, match="cannot be read"):
            open_dataset(path)


class TestRefusesWhatLiesElsewhere:
    @pytest.fixture
    def other(self, tmp_path):
        with h5py.File(tmp_path / "other.hdf5", "w") as file:
            file["pos"] = np.zeros((4, 3))
        return tmp_path / "other.hdf5"

    @pytest.mark.parametrize("soft", [False, True])
    @pytest.mark.parametrize("place", ["demo_2/obs/pos", "demo_2/actions", "demo_2/obs", "demo_2"])
    def test_links_to_other_files(self, path, edit, other, place, soft):
        with edit() as data:
            del data[place]
            if soft:
                data["outside"] = h5py.ExternalLink(str(other), "/")
            data[place] = h5py.SoftLink("/data/outside/pos") if soft else h5py.ExternalLink(str(other), "/pos")
        with pytest.raises(DatasetError, match=r"is a link to the file .*other.hdf5"):
            open_dataset(path)

    @pytest.mark.parametrize("target", ["/data/demo_2/obs/pos", "nowhere", "/data/demo_0/actions/x"])
    def test_links_that_lead_nowhere(self, path, edit, target):
        with edit() as data:
            del data["demo_2/obs/pos"]
            data["demo_2/obs/pos"] = h5py.SoftLink(target)
        with pytest.raises(DatasetError, match=r"a link leads to .* and nowhere from there"):
            open_dataset(path)

    def test_groups_that_hold_each_other(self, path, edit):
        with edit() as data:
            data["demo_2/obs/again"] = data["demo_2/obs"]
        with pytest.raises(DatasetError, match="lies in several groups"):
            open_dataset(path)

    def test_virtual_datasets(self, path, edit, other):
        layout = h5py.VirtualLayout((4, 3), np.float64)
        layout[:] = h5py.VirtualSource(str(other), "pos", (4, 3))
        with edit() as data:
            del data["demo_2/obs/pos"]
            data.create_virtual_dataset("demo_2/obs/pos", layout)
        with pytest.raises(DatasetError, match=r"demo_2/obs/pos.*lie in other arrays or files"):
            open_dataset(path)

    def test_values_in_files_without_format(self, path, edit, tmp_path):
        (tmp_path / "secret.bin").write_bytes(b"\0" * 96)
        with edit() as data:
            del data["demo_2/obs/pos"]
            data.create_dataset("demo_2/obs/pos", (4, 3), np.float64, external=[(str(tmp_path / "secret.bin"), 0, 96)])
        with pytest.raises(DatasetError, match=r"demo_2/obs/pos.*lie in other arrays or files"):
            open_dataset(path)

    @pytest.mark.parametrize("name", ["../model.xml", "/etc/hostname", "a/b.xml"])
    def test_model_files_outside_their_folder(self, path, edit, name):
        with edit() as data:
            data["demo_2"].attrs["model_file"] = name
        with pytest.raises(DatasetError, match="leaves the folder 'models'"):
            open_dataset(path)


class TestRefusesWhatIsNotStored:
    @pytest.mark.parametrize("options", [{}, {"chunks": (1, 3)}, {"chunks": (2, 3), "compression": "gzip"}])
    def test_arrays_that_were_never_written(self, path, edit, options):
        with edit() as data:
            del data["demo_2/obs/pos"]
            data.create_dataset("demo_2/obs/pos", (4, 3), np.float64, **options)
        with pytest.raises(
            DatasetError, match=r"demo_2/obs/pos.* is declared as \(4, 3\), but parts of it are not stored"
        ):
            open_dataset(path)

    def test_chunks_that_were_never_written(self, path, edit):
        with edit() as data:
            del data["demo_2/obs/image"]
            images = data.create_dataset("demo_2/obs/image", (4, 8, 9, 3), np.uint8, chunks=(1, 8, 9, 3))
            images[:3] = 1
        with pytest.raises(DatasetError, match=r"demo_2/obs/image.* parts of it are not stored"):
            open_dataset(path)

    @pytest.mark.parametrize(
        ("shape", "chunks"), [((10**12, 3), (10**4, 3)), ((10**7, 3), None), ((4, 10**9), (1, 3 * 10**8))]
    )
    def test_declared_sizes_without_content(self, path, edit, shape, chunks):
        with edit() as data:
            for name in LENGTHS:
                del data[f"{name}/actions"]
                data.create_dataset(f"{name}/actions", shape, np.float64, chunks=chunks)
        with pytest.raises(DatasetError, match=r"not stored|over 1 GiB"):
            open_dataset(path)

    def test_bombs(self, path, edit, monkeypatch):
        monkeypatch.setattr("scd_robot.datasets.hdf5.files._PLAIN_BYTES", 1000)
        monkeypatch.setattr("scd_robot.datasets.hdf5.files.MAX_RATIO", 20)
        with edit() as data:
            del data["demo_2/obs/pos"]
            data.create_dataset("demo_2/obs/pos", data=np.zeros((4, 3000)), compression="gzip")
        with pytest.raises(DatasetError, match=r"demo_2/obs/pos.* refused as a bomb"):
            open_dataset(path, keys=["pos"])

    @pytest.mark.parametrize("key", ["obs/image", "actions"])
    def test_damaged_chunks(self, path, edit, key):
        with edit() as data:
            values = make_demo("demo_2")[key]
            del data["demo_2"][key]
            chunked = data["demo_2"].create_dataset(key, data=values, chunks=values.shape, fletcher32=True)
            place = chunked.id.get_chunk_info(0).byte_offset
        content = bytearray(path.read_bytes())
        content[place + 5] ^= 0xFF
        path.write_bytes(content)
        with pytest.raises(DatasetError, match=f"data/demo_2/{key}.* cannot be read"):
            open_dataset(path).load()


def with_filter(group, name, values, code):
    """A dataset that says it was compressed by a filter that is not there."""
    settings = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    settings.set_chunk(values.shape)
    settings.set_filter(code, h5py.h5z.FLAG_OPTIONAL)
    space = h5py.h5s.create_simple(values.shape)
    made = h5py.h5d.create(group.id, name.encode(), h5py.h5t.NATIVE_DOUBLE, space, settings)
    h5py.Dataset(made)[:] = values


def test_plugin_that_is_missing_is_named(path, edit):
    code = 32998  # nobody's
    with edit() as data:
        del data["demo_2/obs/pos"]
        with_filter(data["demo_2/obs"], "pos", make_demo("demo_2")["obs/pos"], code)
    with pytest.raises(MissingDependencyError, match="plugin 32998: pip install hdf5plugin"):
        open_dataset(path)


def test_filters_that_are_unsafe_on_damaged_files_are_refused(path, edit):
    with edit() as data:
        del data["demo_2/obs/pos"]
        data.create_dataset("demo_2/obs/pos", data=np.arange(12).reshape(4, 3), chunks=(4, 3), scaleoffset=0)
    with pytest.raises(DatasetError, match="filter 6, which is not read; use gzip"):
        open_dataset(path)


class TestLocks:
    def test_a_file_that_is_being_written_is_refused(self, path):
        code = "import h5py, sys; f = h5py.File(sys.argv[1], 'r+'); print('open', flush=True); sys.stdin.read()"
        with subprocess.Popen(
            [sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as writer:
            writer.stdout.readline()
            with pytest.raises(DatasetError, match="is being written by another program"):
                open_dataset(path)
            writer.stdin.close()
        assert open_dataset(path).num_episodes == 3

    def test_file_systems_without_locks_are_read(self, path, monkeypatch):
        original = h5py.File

        def no_locks(name, mode="r", **options):
            if options.get("locking", True):
                raise OSError(errno.ENOLCK, "unable to lock file, errno = 37, error message = 'No locks available'")
            return original(name, mode, **options)

        monkeypatch.setattr(h5py, "File", no_locks)
        dataset = open_dataset(path)
        np.testing.assert_array_equal(dataset.arrays["image"][:], concatenated("obs/image"))


class TestIsaacLabRecording:
    @pytest.fixture
    def file(self, recordings):
        path = recordings / "isaaclab_stack_cube_franka_human" / "dataset.hdf5"
        if not path.is_file():
            pytest.skip(f"no recording of Isaac Lab at {path}")
        return path

    def test_all_of_it_is_read(self, file, caplog):
        dataset = open_dataset(file)
        assert (dataset.num_episodes, dataset.num_steps, dataset.spec.action_dim) == (10, 2163, 7)
        assert "notes 3901 steps in all, but holds 2163" in caplog.text
        numbers = [int(name.removeprefix("demo_")) for name in dataset.episode_text["name"]]
        assert numbers == [0, 1, 2, 6, 8, 9, 12, 13, 14, 16]
        assert {key: spec.shape[0] for key, spec in dataset.spec.observation.items()} == {
            "actions": 7, "cube_orientations": 12, "cube_positions": 9, "eef_pos": 3, "eef_quat": 4, "gripper_pos": 2,
            "joint_pos": 9, "joint_vel": 9, "object": 39,
        }  # fmt: skip
        assert "sim_state" not in dataset.arrays  # it is in nested groups
        with h5py.File(file) as raw:
            for index, name in enumerate(dataset.episode_text["name"]):
                episode = dataset.episode(index)
                np.testing.assert_array_equal(episode["action"], raw["data"][name]["actions"])
                for key in dataset.spec.observation:
                    np.testing.assert_array_equal(episode[key], raw["data"][name]["obs"][key])

    def test_label_is_not_the_previous_action(self, file):
        dataset = open_dataset(file)
        for index in range(dataset.num_episodes):
            episode = dataset.episode(index)
            np.testing.assert_array_equal(episode["actions"][1:], episode["action"][:-1])
