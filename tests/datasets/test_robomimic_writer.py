import json
import subprocess
import sys
from dataclasses import replace

import h5py
import numpy as np
import pytest

from scd_robot.datasets.hdf5.robomimic_writer import write_robomimic
from scd_robot.datasets.lazy import LazyArray
from scd_robot.datasets.open import open_dataset
from scd_robot.datasets.schema import EpisodeDataset
from scd_robot.errors import ConfigError, DatasetError, OutputError
from scd_robot.types import ArraySpec, DatasetSpec

LENGTHS = [12, 9, 17]


@pytest.fixture(autouse=True)
def _without_probe(monkeypatch):
    """These files do not crash HDF5; what is done about those that do is tested with the other damage."""
    monkeypatch.setattr("scd_robot.datasets.hdf5.files.probe_files", lambda path: None)


def make_dataset(control_dt=0.05, metadata=None, **arrays):
    rng, steps = np.random.default_rng(0), sum(LENGTHS)
    spec = DatasetSpec({"robot.pos": ArraySpec((3,)), "camera": ArraySpec((8, 9, 3), "uint8")}, 2, control_dt, "a toy")
    return EpisodeDataset(
        spec,
        np.cumsum(LENGTHS),
        {
            "robot.pos": rng.normal(size=(steps, 3)).astype(np.float32),
            "camera": rng.integers(0, 256, (steps, 8, 9, 3), dtype=np.uint8),
            "action": rng.normal(size=(steps, 2)).astype(np.float32),
            **arrays,
        },
        metadata or {},
        {"seed": np.asarray([7, 8, 9]), "mask_train": np.asarray([1, 0, 1], np.uint8), "mask_none": np.zeros(3)},
        {"name": ["a", "b", "c"], "model_xml": ["<a/>", "<b/>", "<c/>" * 40000], "task": ["lift", "", "höher\0"]},
    )


def test_what_actions_ask_for_is_read_back_whatever_the_environment_took(tmp_path):
    took_changes = {"env_args": {"type": 1, "env_kwargs": {"controller_configs": {"type": "OSC_POSE"}}}}
    for kind in ("absolute", "delta", ""):
        dataset = make_dataset(metadata=took_changes)
        dataset = replace(dataset, spec=replace(dataset.spec, action_kind=kind))
        write_robomimic(dataset, tmp_path / "a.hdf5", overwrite=True, progress=False)
        assert open_dataset(tmp_path / "a.hdf5").spec.action_kind == kind


def make_extras():
    steps = sum(LENGTHS)
    return {
        "sim_state": np.random.default_rng(1).normal(size=(steps, 4)),
        "reward": np.linspace(0, 1, steps, dtype=np.float32),
        "done": (np.arange(steps) % 5 == 0).astype(np.uint8),
        "executed_action": np.full((steps, 2), 0.5, np.float32),
        "timestamp": np.arange(steps) / 3,
        "force": np.arange(steps),
        "present.camera": (np.arange(steps) % 4 > 0).astype(np.uint8),
        "position.hand": np.random.default_rng(2).normal(size=(steps, 3)),
    }


@pytest.mark.parametrize("extras", [{}, make_extras()], ids=["bare", "extras"])
def test_what_is_written_is_read_back(tmp_path, extras):
    dataset = make_dataset(**extras)
    summary = write_robomimic(dataset, tmp_path / "new/a.hdf5", progress=False)
    size = (tmp_path / "new/a.hdf5").stat().st_size
    assert summary == {"path": str(tmp_path / "new/a.hdf5"), "episodes": 3, "steps": 38, "bytes": size}
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["a.hdf5"]
    again = open_dataset(tmp_path / "new/a.hdf5")
    assert again.spec.observation == dataset.spec.observation
    assert again.spec.control_dt == dataset.spec.control_dt
    assert isinstance(again.arrays["camera"], LazyArray)
    for key in set(dataset.arrays) - {"force"}:  # readers leave out what they do not know
        assert again.arrays[key].dtype == dataset.arrays[key].dtype
        np.testing.assert_array_equal(again.arrays[key], dataset.arrays[key])
    assert {name: values.tolist() for name, values in again.episode_info.items()} == {
        "seed": [7, 8, 9], "mask_train": [1, 0, 1], "mask_none": [0, 0, 0],
    }  # fmt: skip
    assert again.episode_text == {
        **dataset.episode_text, "name": ["demo_0", "demo_1", "demo_2"], "task": ["lift", "", "höher"],
    }  # fmt: skip


def test_files_have_the_layout_of_robomimic(tmp_path):
    dataset = make_dataset(**{key: make_extras()[key] for key in ("sim_state", "force")})
    write_robomimic(dataset, tmp_path / "a.hdf5", progress=False)
    with h5py.File(tmp_path / "a.hdf5") as file:
        assert file["data"].attrs["total"] == 38
        assert json.loads(file["data"].attrs["env_args"]) == {
            "env_name": "a toy", "type": 2, "env_kwargs": {"control_freq": 20},
        }  # fmt: skip
        assert [name.decode() for name in file["mask/train"][:]] == ["demo_0", "demo_2"]
        for index, length in enumerate(LENGTHS):
            demo, episode = file[f"data/demo_{index}"], dataset.episode(index)
            assert demo.attrs["num_samples"] == length
            assert isinstance(demo.attrs["model_file"], str)
            assert set(demo) == {"actions", "obs", "next_obs", "rewards", "dones", "states", "force"}
            assert set(demo["obs"]) == set(demo["next_obs"]) == {"robot.pos", "camera"}
            assert demo["obs/camera"].chunks == (1, 8, 9, 3)
            assert demo["obs/camera"].compression is None
            for key in ("robot.pos", "camera"):
                np.testing.assert_array_equal(demo["next_obs"][key][:-1], episode[key][1:])
                np.testing.assert_array_equal(demo["next_obs"][key][-1], episode[key][-1])
            np.testing.assert_array_equal(demo["rewards"], np.zeros(length))
            np.testing.assert_array_equal(demo["dones"], [0] * (length - 1) + [1])
            np.testing.assert_array_equal(demo["states"], episode["sim_state"])


@pytest.mark.parametrize("control_dt", [0.05, 0.1, 1 / 30, 0.012, 0.0001, 3.0])
@pytest.mark.parametrize(
    "env_args",
    [
        None,
        {"env_name": "Lift", "type": 1, "env_kwargs": {"robots": "Panda"}},
        {"env_name": "Lift", "env_kwargs": {"control_freq": 50}},
        {"env_name": "Isaac", "sim_args": {"dt": 0.01, "decimation": 5}, "env_kwargs": None},
        {"control_freq": 40},
        "not a dictionary",
    ],
)
def test_rate_is_that_of_the_dataset_whatever_the_environment_had(tmp_path, control_dt, env_args):
    dataset = make_dataset(control_dt, {"env_args": env_args} if env_args else None)
    write_robomimic(dataset, tmp_path / "a.hdf5", progress=False)
    again = open_dataset(tmp_path / "a.hdf5")
    assert again.spec.control_dt == pytest.approx(control_dt, rel=1e-9)
    assert "assumed" not in again.spec.source
    for name in {"env_name", "type"} & set(env_args if isinstance(env_args, dict) else ()):
        assert again.metadata["env_args"][name] == env_args[name]


def test_arguments_of_the_environment_are_kept(tmp_path):
    env_args = {"env_name": "Lift", "type": 1, "env_kwargs": {"control_freq": 20, "robots": ["Panda"]}}
    write_robomimic(make_dataset(0.05, {"env_args": env_args}), tmp_path / "a.hdf5", progress=False)
    assert open_dataset(tmp_path / "a.hdf5").metadata["env_args"] == env_args


def test_one_episode_is_in_memory_at_a_time(tmp_path):
    asked = []

    class Watched(LazyArray):
        def read(self, start, stop):
            asked.append((start, stop))
            return np.zeros((stop - start, *self.shape[1:]), self.dtype)

    dataset = make_dataset(camera=Watched((38, 8, 9, 3), np.uint8))
    write_robomimic(dataset, tmp_path / "a.hdf5", progress=False)
    assert asked == [(0, 12), (12, 21), (21, 38)]


class TestRefuses:
    def test_a_path_that_is_taken(self, tmp_path):
        path = tmp_path / "a.hdf5"
        write_robomimic(make_dataset(), path, progress=False)
        before = path.read_bytes()
        with pytest.raises(OutputError, match="exists already; choose another path, or overwrite"):
            write_robomimic(make_dataset(0.1), path, progress=False)
        assert path.read_bytes() == before
        write_robomimic(make_dataset(0.1), path, overwrite=True, progress=False)
        assert open_dataset(path).spec.control_dt == 0.1

    def test_to_replace_what_is_no_recording(self, tmp_path):
        (tmp_path / "thesis.tex").write_text("text")
        for name in ("thesis.tex", "."):
            with pytest.raises(OutputError, match=r"not an HDF5 file and will not be replaced|it is a folder"):
                write_robomimic(make_dataset(), tmp_path / name, overwrite=True, progress=False)
        assert (tmp_path / "thesis.tex").read_text() == "text"

    def test_a_folder_that_is_none(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(OutputError, match="cannot write the dataset"):
            write_robomimic(make_dataset(), tmp_path / "file/a.hdf5", progress=False)

    @pytest.mark.parametrize("key", ["a/b", "", ".", "a\0"])
    def test_keys_that_hdf5_does_not_take(self, tmp_path, key):
        dataset = make_dataset(**{key: np.zeros(38)})
        with pytest.raises(ConfigError, match="cannot be the name of an array"):
            write_robomimic(dataset, tmp_path / "a.hdf5", progress=False)

    @pytest.mark.parametrize("key", ["actions", "obs", "next_obs", "states", "rewards"])
    def test_arrays_with_names_of_the_format(self, tmp_path, key):
        with pytest.raises(ConfigError, match="has the name that robomimic gives to another"):
            write_robomimic(make_dataset(**{key: np.zeros(38)}), tmp_path / "a.hdf5", progress=False)


def test_a_dataset_that_breaks_off_leaves_nothing(tmp_path):
    class Broken(LazyArray):
        def read(self, start, stop):
            if start > 0:
                raise DatasetError("the source is damaged")
            return np.zeros((stop - start, *self.shape[1:]), self.dtype)

    with pytest.raises(DatasetError, match="the source is damaged"):
        write_robomimic(make_dataset(camera=Broken((38, 8, 9, 3), np.uint8)), tmp_path / "a.hdf5", progress=False)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_the_old_file_alone_and_the_process_alive(tmp_path):
    """A limit on the size of files stands for the disk; HDF5 itself would crash at the end of the process."""
    path = tmp_path / "a.hdf5"
    write_robomimic(make_dataset(), path, progress=False)
    size = write_robomimic(open_dataset(path), path, overwrite=True, progress=False)["bytes"]
    before = path.read_bytes()
    code = f"""
import resource, signal, sys
from scd_robot.datasets.open import open_dataset
from scd_robot.datasets.hdf5.robomimic_writer import write_robomimic
from scd_robot.errors import OutputError
dataset = open_dataset(sys.argv[1])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
for limit in (0, 100, 3000, {size // 3}, {size - 2000}, {size - 1}):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        write_robomimic(dataset, sys.argv[1], overwrite=True, progress=False)
    except OutputError as error:
        print(limit, error)
"""
    told = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, check=False)
    assert told.returncode == 0, told.stderr.decode()
    lines = told.stdout.decode().splitlines()
    assert len(lines) == 6
    assert all("file too large; free some space" in line for line in lines)
    assert told.stderr == b""
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["a.hdf5"]


@pytest.fixture
def sequences():
    """Makes robomimic's own SequenceDataset."""
    pytest.importorskip("robomimic")
    import robomimic.utils.obs_utils as obs_utils
    from robomimic.utils.dataset import SequenceDataset

    def make(path, low_dim, rgb=(), **options):
        obs_utils.initialize_obs_utils_with_obs_specs({"obs": {"low_dim": list(low_dim), "rgb": list(rgb)}})
        return SequenceDataset(
            str(path),
            obs_keys=[*low_dim, *rgb],
            dataset_keys=["actions", "rewards", "dones"],
            hdf5_use_swmr=False,
            **options,
        )

    return make


def padded(array, start, length):
    """Rows (length, ...) from `start` on, the last one repeated."""
    return array[np.minimum(np.arange(start, start + length), len(array) - 1)]


def assert_same_windows(theirs, ours, pad, seq_length, next_obs=True, stride=1):
    """Every window of robomimic's is the one that our arrays give."""
    index = 0
    for number in range(ours.num_episodes):
        episode = {key: np.asarray(values) for key, values in ours.episode(number).items()}
        for start in range(len(episode["action"]) - (0 if pad else seq_length - 1)):
            if index % stride == 0:
                window = theirs[index]
                expected = padded(episode["action"], start, seq_length)
                np.testing.assert_array_equal(np.asarray(window["actions"], np.float32), expected)
                for key, name in (("rewards", "reward"), ("dones", "done")):
                    if name in episode:
                        np.testing.assert_array_equal(window[key], padded(episode[name], start, seq_length))
                for key in ours.spec.observation:
                    expected = padded(episode[key], start, seq_length)
                    np.testing.assert_array_equal(np.asarray(window["obs"][key], expected.dtype), expected)
                    if next_obs:
                        following = np.concatenate([episode[key][1:], episode[key][-1:]])
                        expected = padded(following, start, seq_length)
                        np.testing.assert_array_equal(np.asarray(window["next_obs"][key], expected.dtype), expected)
            index += 1
    assert len(theirs) == index


def hand_made(path):
    """A file that robomimic's own tools could have written: float64, gaps in the numbers."""
    rng = np.random.default_rng(5)
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["env_args"] = json.dumps({"env_name": "Lift", "type": 1, "env_kwargs": {"control_freq": 20}})
        for number, length in ((11, 10), (2, 9), (0, 13)):
            demo = data.create_group(f"demo_{number}")
            demo.attrs["num_samples"] = length
            demo["actions"] = rng.normal(size=(length, 2))
            demo["rewards"] = rng.integers(0, 2, length).astype(np.float64)
            demo["dones"] = (np.arange(length) == length - 1).astype(np.int64)
            for key, values in (
                ("robot.pos", rng.normal(size=(length, 3))),
                ("camera", rng.integers(0, 256, (length, 8, 9, 3), dtype=np.uint8)),
            ):
                demo.create_dataset(f"obs/{key}", data=values, compression="gzip")
                demo.create_dataset(f"next_obs/{key}", data=np.concatenate([values[1:], values[-1:]]))
        file["mask/train"] = np.asarray(["demo_11", "demo_0"], "S")
    return path


@pytest.mark.parametrize("cache", [None, "all"])
@pytest.mark.parametrize(("seq_length", "pad"), [(1, True), (1, False), (8, True), (8, False)])
@pytest.mark.parametrize("source", ["ours", "theirs"])
@pytest.mark.parametrize("mask", [None, "train"])
def test_robomimic_reads_the_same_windows(tmp_path, sequences, cache, seq_length, pad, source, mask):
    path = tmp_path / "a.hdf5"
    if source == "ours":
        extras = make_extras()
        write_robomimic(make_dataset(reward=extras["reward"], done=extras["done"]), path, progress=False)
    else:
        hand_made(path)
    options = {"hdf5_cache_mode": cache, "seq_length": seq_length, "pad_seq_length": pad, "filter_by_attribute": mask}
    theirs = sequences(path, ["robot.pos"], ["camera"], **options)
    assert_same_windows(theirs, open_dataset(path, mask=mask), pad, seq_length)


def test_robomimic_reads_the_same_windows_of_the_human_recording(recordings, sequences):
    path = recordings / "isaaclab_stack_cube_franka_human" / "dataset.hdf5"
    if not path.is_file():
        pytest.skip(f"no recording of Isaac Lab at {path}")
    ours = open_dataset(path)
    theirs = sequences(path, list(ours.spec.observation), seq_length=8, load_next_obs=False, hdf5_cache_mode="low_dim")
    assert_same_windows(theirs, ours, True, 8, next_obs=False, stride=7)


def test_robomimic_reads_the_converted_human_recording(recordings, sequences, tmp_path):
    path = recordings / "isaaclab_stack_cube_franka_human" / "dataset.hdf5"
    if not path.is_file():
        pytest.skip(f"no recording of Isaac Lab at {path}")
    ours = open_dataset(path)
    write_robomimic(ours, tmp_path / "a.hdf5", progress=False)
    theirs = sequences(tmp_path / "a.hdf5", list(ours.spec.observation), seq_length=8, hdf5_cache_mode="low_dim")
    assert_same_windows(theirs, ours, True, 8, stride=7)


def test_what_will_not_be_read_back_is_told(tmp_path, caplog):
    write_robomimic(make_dataset(**make_extras()), tmp_path / "a.hdf5", progress=False)
    assert "not read back by scd_robot, as they are no observations: force" in caplog.text
