import logging
import os
import pickle
import subprocess
from fractions import Fraction
from pathlib import Path

import av
import h5py
import numpy as np
import pytest

from scd_robot.datasets.hdf5 import aloha, probe
from scd_robot.datasets.hdf5 import files as hdf5_files
from scd_robot.datasets.lazy import LazyArray
from scd_robot.datasets.open import detect_format, open_dataset
from scd_robot.errors import ConfigError, DatasetError, UnknownNameError
from scd_robot.types import ArraySpec

LENGTHS = {10: 3, 2: 4, 0: 5}  # written in this order; read as 0, 2, 10
ORDER = [0, 2, 10]
CAMERAS = ("cam_low", "cam_high")  # the order of ALOHA, which is not that of the file
SIZE = (16, 32)


def pictures(number, camera):
    """Of one colour each, so that compression changes little."""
    rng = np.random.default_rng((number, CAMERAS.index(camera)))
    colours = rng.integers(0, 256, (LENGTHS[number], 1, 1, 3), dtype=np.uint8)
    return np.broadcast_to(colours, (LENGTHS[number], *SIZE, 3)).copy()


def jpeg(image):
    context = av.CodecContext.create("mjpeg", "w")
    context.height, context.width = image.shape[:2]
    context.pix_fmt, context.time_base = "yuvj444p", Fraction(1)
    packets = context.encode(av.VideoFrame.from_ndarray(image).reformat(format="yuvj444p"))
    return b"".join(bytes(packet) for packet in [*packets, *context.encode(None)])


def vectors(number):
    rng = np.random.default_rng(number)
    length = LENGTHS[number]
    names = {"action": 6, "base_action": 2, "qpos": 7, "qvel": 7, "effort": 7}
    return {name: rng.normal(size=(length, width)) for name, width in names.items()}


def store_raw(file, number):
    for camera in CAMERAS:
        file[f"observations/images/{camera}"] = pictures(number, camera)


def store_padded(file, number):
    files = {camera: [jpeg(image) for image in pictures(number, camera)] for camera in CAMERAS}
    lengths = [[len(data) for data in files[camera]] for camera in CAMERAS]
    width = np.max(lengths)  # differs from episode to episode
    for camera in CAMERAS:
        rows = [np.frombuffer(data.ljust(width, b"\0"), np.uint8) for data in files[camera]]
        file.create_dataset(f"observations/images/{camera}", data=rows, chunks=(1, width))
    file["compress_len"] = np.asarray(lengths, np.float32)
    file.attrs["compress"] = True


def store_varying(file, number):
    for camera in CAMERAS:
        rows = file.create_dataset(f"observations/images/{camera}", (LENGTHS[number],), dtype=h5py.vlen_dtype(np.uint8))
        for row, image in enumerate(pictures(number, camera)):
            rows[row] = np.frombuffer(jpeg(image), np.uint8)


def store_texts(file, number):
    for camera in CAMERAS:
        file[f"observations/images/{camera}"] = np.asarray([jpeg(image) for image in pictures(number, camera)], "S")


COMPRESSED = [store_padded, store_varying, store_texts]


def write_folder(folder, store=store_raw):
    folder.mkdir()
    for number in LENGTHS:
        with h5py.File(folder / f"episode_{number}.hdf5", "w") as file:
            file.attrs.update(sim=False, language_instruction=f"task {number}")
            for name, values in vectors(number).items():
                file[name if "action" in name else f"observations/{name}"] = values
            store(file, number)
    return folder


def edit(folder, number):
    return h5py.File(folder / f"episode_{number}.hdf5", "r+")


def concatenated(name):
    return np.concatenate([vectors(number)[name] for number in ORDER]).astype(np.float32)


@pytest.fixture(autouse=True)
def _without_probe(monkeypatch):
    """These files do not crash HDF5."""
    for module in (aloha, hdf5_files):
        monkeypatch.setattr(module, "probe_files", lambda paths: None)


@pytest.fixture
def path(tmp_path):
    return write_folder(tmp_path / "task")


class TestReads:
    def test_episodes_in_the_order_of_their_numbers(self, path):
        dataset = open_dataset(path)
        assert detect_format(path) == "aloha"
        assert dataset.episode_text["name"] == ["episode_0", "episode_2", "episode_10"]
        assert dataset.episode_lengths.tolist() == [5, 4, 3]
        vector, picture = ArraySpec((7,)), ArraySpec((*SIZE, 3), "uint8")
        assert dataset.spec.observation == {
            "effort": vector, "cam_high": picture, "cam_low": picture, "qpos": vector, "qvel": vector,
        }  # fmt: skip
        for name in ("qpos", "qvel", "effort", "action"):
            np.testing.assert_array_equal(dataset.arrays[name], concatenated(name))
        for camera in CAMERAS:
            assert isinstance(dataset.arrays[camera], LazyArray)
            expected = np.concatenate([pictures(number, camera) for number in ORDER])
            np.testing.assert_array_equal(dataset.arrays[camera], expected)
        assert dataset.episode_info["sim"].tolist() == [0, 0, 0]
        assert dataset.episode_text["task"] == ["task 0", "task 2", "task 10"]

    def test_one_file_is_an_episode(self, path):
        dataset = open_dataset(path / "episode_2.hdf5")
        np.testing.assert_array_equal(dataset.arrays["qpos"], vectors(2)["qpos"].astype(np.float32))
        with pytest.raises(ConfigError, match="'1' does not name episodes of 0 to 0"):
            open_dataset(path / "episode_2.hdf5", only=["1"])

    @pytest.mark.parametrize("store", COMPRESSED)
    def test_compressed_pictures_are_decoded_where_they_are_asked_for(self, tmp_path, store, caplog):
        caplog.set_level(logging.INFO)
        dataset = open_dataset(write_folder(tmp_path / "task", store))
        for camera in CAMERAS:
            expected = np.concatenate([pictures(number, camera) for number in ORDER]).astype(int)
            copy = pickle.loads(pickle.dumps(dataset.arrays[camera]))  # as in a worker process
            assert copy.shape == expected.shape
            assert copy.dtype == np.uint8
            assert np.abs(copy[:] - expected).max() <= 4
            assert np.abs(copy[[11, 4, 5]] - expected[[11, 4, 5]]).max() <= 4  # of three files
        assert "compress" not in dataset.episode_info
        assert "pictures are read as RGB" in caplog.text

    def test_no_file_stays_open(self, path):
        dataset = open_dataset(path)
        for camera in CAMERAS:
            assert len(dataset.arrays[camera][:]) == 12
        held = [os.readlink(entry) for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink()]
        assert not [name for name in held if name.startswith(str(path))]

    def test_depth_and_nested_groups(self, path):
        for number, length in LENGTHS.items():
            with edit(path, number) as file:
                file["observations/images_depth/cam_high"] = np.full((length, 24, 32), 1000 + number, np.uint16)
                file["observations/empty"] = np.zeros((length, 0))
        dataset = open_dataset(path)
        assert dataset.spec.observation["images_depth.cam_high"] == ArraySpec((24, 32, 1), "float32")
        assert dataset.arrays["images_depth.cam_high"][-1][0, 0, 0] == 1010
        assert "empty" not in dataset.arrays

    def test_rate_is_assumed_and_told_or_given(self, path, caplog):
        caplog.set_level(logging.INFO)
        dataset = open_dataset(path)
        assert dataset.spec.control_dt == 0.02
        assert "control_dt 0.02 s assumed" in dataset.spec.source
        assert "0.02 s per control step assumed (--control-dt)" in caplog.text
        given = open_dataset(path, control_dt=0.05)
        assert given.spec.control_dt == 0.05
        assert "assumed" not in given.spec.source

    def test_keys_labels_and_episodes_are_chosen(self, path, caplog):
        caplog.set_level(logging.INFO)
        open_dataset(path)
        assert "--action takes others there are: base_action" in caplog.text
        dataset = open_dataset(path, keys=["qpos", "cam_low"], action="action+base_action", drop=["1"])
        assert list(dataset.spec.observation) == ["qpos", "cam_low"]
        assert dataset.spec.action_dim == 8
        expected = np.concatenate([np.hstack([vectors(n)["action"], vectors(n)["base_action"]]) for n in (0, 10)])
        np.testing.assert_array_equal(dataset.arrays["action"], expected.astype(np.float32))
        assert [dataset.number(index) for index in range(2)] == [0, 2]
        assert open_dataset(path, only=["1-"]).episode_text["name"] == ["episode_2", "episode_10"]

    def test_other_files_are_left_out_and_told(self, path, caplog):
        (path / "features.hdf5").write_bytes(b"")
        assert open_dataset(path).num_episodes == 3
        assert "1 files that are not named episode_N.hdf5 are left out: features.hdf5" in caplog.text


def truncate(path):
    content = (path / "episode_2.hdf5").read_bytes()
    (path / "episode_2.hdf5").write_bytes(content[: len(content) // 2])


def shorten(name):
    def spoil(path):
        with edit(path, 2) as file:
            values = file[name][:-1]
            del file[name]
            file[name] = values

    return spoil


def replace(name, values):
    def spoil(path):
        with edit(path, 2) as file:
            del file[name]
            if values is not None:
                file[name] = values

    return spoil


class TestDamage:
    @pytest.mark.parametrize(
        ("spoil", "message"),
        [
            (truncate, r"episode_2.hdf5 cannot be read"),
            (
                shorten("observations/qvel"),
                r"'observations/qvel' of .*episode_2.hdf5 has 3 steps, but its actions have 4",
            ),
            (shorten("observations/images/cam_low"), r"'observations/images/cam_low' of .*episode_2.hdf5 has 3 steps"),
            (shorten("action"), r"has 4 steps, but its actions have 3; if the last one was seen after"),
            (
                replace("observations/images/cam_low", None),
                r"observations of .*episode_2.hdf5 and .*episode_0.hdf5 differ: not both have cam_low; .*--drop 1",
            ),
            (
                replace("observations/qpos", np.zeros((4, 6))),
                r"'qpos' of .*episode_2.hdf5 are \(6,\) .*episode_0.hdf5 they are \(7,\) .*--drop 1",
            ),
            (replace("action", np.zeros((4, 5))), r"the labels of .*episode_2.hdf5 are \(5,\)"),
            (
                replace("observations/images/cam_low", np.zeros((4, 8, 8, 3), np.uint8)),
                r"'cam_low' of .*episode_2.hdf5 are \(8, 8, 3\)",
            ),
            (
                replace("observations/images/cam_low", np.zeros((4, 8, 8, 3), np.float32)),
                r"'cam_low' of .*episode_2.hdf5 are \(8, 8, 3\) \(float32\)",
            ),
            (
                replace("observations", None),
                r"episode_2.hdf5 has no group 'observations'.* It holds: action, base_action",
            ),
            (replace("action", None), r"episode_2.hdf5 has no array 'action'.*--action, one of: base_action"),
            (
                replace("observations/images/cam_low", np.zeros((4, 10), np.uint8)),
                r"step 0 of 'observations/images/cam_low' of .*episode_2.hdf5 is neither a PNG nor a JPEG",
            ),
        ],
    )
    def test_names_the_file_and_does_not_matter_where_it_is_left_out(self, path, spoil, message):
        spoil(path)
        with pytest.raises(DatasetError, match=message):
            open_dataset(path)
        assert open_dataset(path, drop=["1"]).episode_text["name"] == ["episode_0", "episode_10"]

    def test_a_camera_that_one_episode_lacks_can_be_left_out(self, path):
        replace("observations/images/cam_low", None)(path)
        assert "cam_high" in open_dataset(path, keys=["qpos", "cam_high"]).arrays

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda data: data[: len(data) // 2], r"^step 3 of 'observations/images/cam_low' of .*episode_2.hdf5"),
            (lambda data: jpeg(np.zeros((8, 8, 3), np.uint8)), r"has a picture of shape \(8, 8, 3\) at step 3"),
        ],
    )
    def test_a_damaged_picture_tells_its_step(self, tmp_path, change, message):
        path = write_folder(tmp_path / "task", store_varying)
        with edit(path, 2) as file:
            rows = file["observations/images/cam_low"]
            rows[3] = np.frombuffer(change(bytes(rows[3])), np.uint8)
        camera = open_dataset(path, check=False).arrays["cam_low"]
        assert len(camera[:8]) == 8
        with pytest.raises(DatasetError, match=message):
            camera[8]

    def test_a_step_that_is_not_a_number_names_its_episode(self, path):
        with edit(path, 2) as file:
            file["observations/qpos"][2] = np.nan
        with pytest.raises(DatasetError, match=r"'qpos' of .* first in episode 1 at step 2"):
            open_dataset(path)

    def test_names_that_are_not_there(self, path):
        with pytest.raises(UnknownNameError, match=r"episode_0.hdf5 'cam_lo'.*'cam_low'"):
            open_dataset(path, keys=["cam_lo"])
        with pytest.raises(UnknownNameError, match=r"base_actoin.*base_action"):
            open_dataset(path, action="action+base_actoin")

    def test_the_file_that_crashes_hdf5_is_named(self, path, tmp_path, monkeypatch):
        monkeypatch.undo()
        program = tmp_path / "probe.py"
        source, begin = Path(probe.__file__).read_text(), "    is_text = "
        assert source.count(begin) == 1
        crash = f"    if 'episode_2.' in dataset.file.filename: os.kill(os.getpid(), 11)\n{begin}"
        program.write_text(source.replace(begin, crash))
        monkeypatch.setattr(probe, "__file__", str(program))
        with pytest.raises(DatasetError, match=r"episode_2.hdf5 cannot be read: HDF5 crashes on it"):
            open_dataset(path)

    def test_one_process_probes_all_files(self, path, monkeypatch):
        monkeypatch.undo()
        started = []
        run = subprocess.run
        monkeypatch.setattr(hdf5_files.subprocess, "run", lambda *args, **kw: started.append(args) or run(*args, **kw))
        open_dataset(path)
        assert len(started) == 1


def test_files_that_are_named_otherwise_say_what_to_call_them(path, tmp_path):
    folder = tmp_path / "renamed"
    folder.mkdir()
    for number, file in enumerate(sorted(path.glob("episode_*.hdf5"))):
        (folder / f"demo{number}.hdf5").write_bytes(file.read_bytes())
    with pytest.raises(DatasetError, match=r"give one of them.*names episode_0\.hdf5"):
        open_dataset(folder)
