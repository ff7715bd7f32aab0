"""What is done to HDF5 files by accident: whatever comes out is an error of ours or what h5py itself reads."""

import json
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scd_robot.datasets.hdf5 import files as hdf5_files
from scd_robot.datasets.hdf5 import probe
from scd_robot.datasets.open import open_dataset
from scd_robot.errors import DatasetError, MissingDependencyError

LENGTHS = (4, 3, 5)
FUZZ = settings(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr(hdf5_files, "PATIENCE_S", 3.0)


def write_file(path, libver):
    rng = np.random.default_rng(0)
    with h5py.File(path, "w", libver=libver) as file:
        data = file.create_group("data")
        data.attrs["env_args"] = json.dumps({"env_name": "Lift", "env_kwargs": {"control_freq": 20}})
        for index, length in enumerate(LENGTHS):
            demo = data.create_group(f"demo_{index}")
            demo.attrs["num_samples"] = length
            demo.attrs["model_file"] = "<mujoco/>"
            demo["actions"] = rng.normal(size=(length, 2))
            demo["dones"] = np.arange(length) == length - 1
            demo.create_dataset("obs/pos", data=rng.normal(size=(length, 3)), chunks=(2, 3), compression="lzf")
            images = rng.integers(0, 256, (length, 5, 6, 3), dtype=np.uint8)
            demo.create_dataset("obs/image", data=images, chunks=(1, 5, 6, 3), compression="gzip")
        file["mask/train"] = ["demo_0", "demo_2"]
    return path.read_bytes()


@pytest.fixture(scope="module", params=["earliest", "latest"])
def content(request, tmp_path_factory):
    return write_file(tmp_path_factory.mktemp("fuzz") / "a.hdf5", request.param)


def raw_arrays(path, dataset):
    """The arrays of `dataset`, read by h5py alone."""
    places = {key: f"obs/{key.replace('.', '/')}" for key in dataset.spec.observation}
    places |= {"action": "actions", "done": "dones", "sim_state": "states", "reward": "rewards"}
    found = {}
    with h5py.File(path, "r") as file:
        demos = [file["data"][name] for name in dataset.episode_text["name"]]
        for key in dataset.arrays:
            if key == "state":  # of robosuite, without the time
                found[key] = [demo["states"][:, 1:] for demo in demos]
            else:
                found[key] = [demo[places[key]][()] for demo in demos]
    return found


def is_refused_or_equal(path):
    """Whether it is refused; fails where something else is read than h5py reads."""
    try:
        dataset = open_dataset(path).load()
    except (DatasetError, MissingDependencyError):
        return True
    for key, values in raw_arrays(path, dataset).items():
        ours = np.asarray(dataset.arrays[key])
        theirs = np.concatenate([np.asarray(part).reshape(len(part), *ours.shape[1:]) for part in values])
        if key == "done":
            theirs = theirs != 0
        np.testing.assert_array_equal(ours, theirs.astype(ours.dtype))
    return False


def is_refused_or_equal_elsewhere(folder, content):
    """As above, under a new name: HDF5 shares what it has in memory between openings of one file."""
    path = folder / f"{len(list(folder.iterdir()))}.hdf5"
    path.write_bytes(content)
    return is_refused_or_equal(path)


def test_the_undamaged_file_is_read(tmp_path, content):
    assert not is_refused_or_equal_elsewhere(tmp_path, content)


@settings(FUZZ, max_examples=10)
@given(changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), min_size=1, max_size=4))
def test_flipped_bits_never_give_other_numbers(tmp_path, content, changes):
    damaged = bytearray(content)
    for place, change in changes:
        damaged[int(place * len(content))] ^= change
    is_refused_or_equal_elsewhere(tmp_path, damaged)


@settings(FUZZ, max_examples=4)
@given(share=st.floats(0, 1, exclude_max=True))
def test_truncated_files_are_refused(tmp_path, content, share):
    assert is_refused_or_equal_elsewhere(tmp_path, content[: int(share * len(content))])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "name", ["isaaclab_stack_cube_franka_human/dataset.hdf5", "robosuite_human/v1.4.1/lift/demo.hdf5"]
)
def test_flipped_bytes_of_human_recordings(recordings, tmp_path, name, seed):
    path = recordings / name
    if not path.is_file():
        pytest.skip(f"no recording at {path}")
    rng = np.random.default_rng(seed)
    damaged = bytearray(path.read_bytes())
    for place in rng.integers(0, len(damaged), 20).tolist() + rng.integers(0, 6000, 2).tolist():
        damaged[place] ^= int(rng.integers(1, 256))
    is_refused_or_equal_elsewhere(tmp_path, damaged)


def heap_of_texts(content):
    """Where the sizes of the first object and of the free space stand in the first heap of texts of variable length."""
    begin = content.index(b"GCOL")
    return begin + 16 + 8


def test_a_heap_with_a_loop_is_refused_in_time(tmp_path, content):
    """Some versions of HDF5 walk such a heap for ever, others crash or refuse; the reading process survives."""
    damaged = bytearray(content)
    place = heap_of_texts(content)
    damaged[place : place + 8] = (2**64 - 16).to_bytes(8, "little")
    assert is_refused_or_equal_elsewhere(tmp_path, damaged)


@pytest.mark.parametrize(
    ("body", "patience_s", "message"),
    [
        ("os.kill(os.getpid(), 11)", 60.0, "HDF5 crashes on it"),
        ("import time; time.sleep(60)", 0.5, "does not come to an end"),
    ],
)
def test_a_crash_or_hang_of_hdf5_becomes_an_error(tmp_path, content, monkeypatch, body, patience_s, message):
    monkeypatch.setattr(hdf5_files, "PATIENCE_S", patience_s)
    program = tmp_path / "probe.py"
    source, begin = Path(probe.__file__).read_text(), "    is_text = "
    assert source.count(begin) == 1
    program.write_text(source.replace(begin, f"    {body}\n{begin}"))
    monkeypatch.setattr(probe, "__file__", str(program))
    (tmp_path / "a.hdf5").write_bytes(content)
    with pytest.raises(DatasetError, match=message):
        open_dataset(tmp_path / "a.hdf5")


def test_probe_touches_all_that_is_read(tmp_path):
    """Told by the objects that are opened in the probe and in the reader."""
    write_file(tmp_path / "a.hdf5", "earliest")
    code = """
import json, sys, h5py
seen = set()
original = h5py.Group.__getitem__
def watched(self, name):
    item = original(self, name)
    seen.add(item.name)
    return item
h5py.Group.__getitem__ = watched
if sys.argv[1] == "probe":
    from scd_robot.datasets.hdf5.probe import main
    main(sys.argv[2], 60.0)
else:
    import scd_robot.datasets.hdf5.files as files
    files.probe_files = lambda path: None
    from scd_robot.datasets.open import open_dataset
    open_dataset(sys.argv[2]).load()
print(json.dumps(sorted(seen)))
"""
    opened = {}
    for name in ("probe", "reader"):
        command = [sys.executable, "-c", code, name, str(tmp_path / "a.hdf5")]
        opened[name] = set(json.loads(subprocess.run(command, capture_output=True, check=True).stdout))
    assert opened["reader"] <= opened["probe"]
    assert "/data/demo_2/obs/image" in opened["reader"]
