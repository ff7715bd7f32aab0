import errno
import json
import logging
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from scd_robot.datasets.lazy import MappedArray
from scd_robot.datasets.lerobot import writer as lerobot_writer
from scd_robot.datasets.lerobot.statistics import histogram, image_stats, joined, number_stats
from scd_robot.datasets.lerobot.writer import write_lerobot
from scd_robot.datasets.open import open_dataset
from scd_robot.datasets.schema import EpisodeDataset
from scd_robot.errors import ConfigError, DatasetError, MissingDependencyError, OutputError
from scd_robot.types import ArraySpec, DatasetSpec

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

LENGTHS = (5, 8, 3, 6)
SIZE = (32, 48)
NAMES = {
    "state": "observation.state",
    "observation.keypoints": "observation.keypoints",
    "width": "observation.width",
    "front": "observation.images.front",
    "odd": "observation.images.odd",
    "gray": "observation.images.gray",
}


def scenes(count):
    """Soft pictures (count, H, W, 3) that move."""
    y, x = np.mgrid[: SIZE[0], : SIZE[1]]
    waves = [120 + 50 * np.sin(x / 9 + number / 3) + 40 * np.cos(y / 7) for number in range(count)]
    return np.stack([np.stack([wave, 40 + wave / 2, 90 + wave / 3], -1) for wave in waves]).astype(np.uint8)


def make(lengths=LENGTHS, **others):
    """A dataset with an array of every kind."""
    rng = np.random.default_rng(0)
    count = sum(lengths)
    arrays = {
        "state": rng.normal(size=(count, 4)).astype(np.float32),
        "observation.keypoints": rng.normal(size=(count, 3, 2)).astype(np.float32),
        "width": rng.normal(size=(count, 1)).astype(np.float32),
        "front": scenes(count),
        "odd": rng.integers(0, 256, (count, 7, 9, 3), dtype=np.uint8),
        "gray": rng.integers(0, 256, (count, 8, 10, 1), dtype=np.uint8),
    }
    spec = DatasetSpec({k: ArraySpec(v.shape[1:], str(v.dtype)) for k, v in arrays.items()}, 3, 0.05, "made up")
    arrays |= {
        "action": rng.normal(size=(count, 3)).astype(np.float32),
        "executed_action": rng.normal(size=(count, 3)).astype(np.float32),
        "sim_state": rng.normal(size=(count, 6)),
        "reward": rng.normal(size=count),
        "done": rng.integers(0, 2, count).astype(bool),
    }
    info = {"success": np.array([1, 0, 1, 0])}
    return EpisodeDataset(
        spec, np.cumsum(lengths), arrays, {"robot_type": "arm"}, info, {"task": ["a", "b", "a", ""]}, **others
    )


def written(path, dataset=None, **options):
    dataset = dataset or make()
    write_lerobot(dataset, path, progress=False, **options)
    return open_dataset(path)


def assert_same(found, expected, exact=()):
    """All arrays are equal, videos but for those that are named `exact` to 35 dB."""
    assert found.episode_lengths.tolist() == expected.episode_lengths.tolist()
    assert set(found.arrays) == {NAMES.get(key, key) for key in expected.arrays} | {"timestamp"}
    for key, values in expected.arrays.items():
        other = found.arrays[NAMES.get(key, key)]
        assert (other.shape, other.dtype) == (values.shape, values.dtype), key
        if key == "front" and key not in exact:
            errors = np.mean((other[:].astype(np.float64) - values[:]) ** 2, axis=(1, 2, 3))
            assert 10 * np.log10(255**2 / errors.max()) >= 35
        else:
            np.testing.assert_array_equal(other[:], values[:], err_msg=key)


def features_of(path):
    return json.loads((path / "meta/info.json").read_text())["features"]


class TestRoundTrip:
    def test_everything_is_read_back(self, tmp_path):
        dataset = make()
        found = written(tmp_path / "a", dataset)
        assert_same(found, dataset)
        assert found.spec.control_dt == 0.05
        assert found.spec.action_dim == 3
        assert list(found.spec.observation) == [NAMES[key] for key in dataset.spec.observation]
        assert list(found.episode_text["task"]) == ["a", "b", "a", ""]
        assert found.episode_info["success"].tolist() == [True, False, True, False]
        assert found.metadata["robot_type"] == "arm"
        steps = np.concatenate([np.arange(length) for length in LENGTHS])
        np.testing.assert_array_equal(found.arrays["timestamp"], (steps * 0.05).astype(np.float32))

    def test_without_video_every_pixel_is_kept(self, tmp_path):
        dataset = make()
        found = written(tmp_path / "a", dataset, video=False)
        assert_same(found, dataset, exact=["front"])
        assert not (tmp_path / "a/videos").exists()
        assert features_of(tmp_path / "a")["observation.images.front"]["dtype"] == "image"

    def test_what_was_read_can_be_written_again(self, tmp_path):
        first = written(tmp_path / "a", video=False)
        second = written(tmp_path / "b", first, video=False)
        for key in first.arrays:
            np.testing.assert_array_equal(first.arrays[key][:], second.arrays[key][:])
        assert second.spec.observation == first.spec.observation

    def test_episodes_go_on_in_other_files_when_one_is_full(self, tmp_path, monkeypatch):
        monkeypatch.setattr(lerobot_writer, "DATA_BYTES", 1)
        monkeypatch.setattr(lerobot_writer, "VIDEO_BYTES", 0)
        monkeypatch.setattr(lerobot_writer, "CHUNK_SIZE", 3)
        dataset = make()
        assert_same(written(tmp_path / "a", dataset), dataset)
        names = ["chunk-000/file-000", "chunk-000/file-001", "chunk-000/file-002", "chunk-001/file-000"]
        for folder, end in (("data", ".parquet"), ("videos/observation.images.front", ".mp4")):
            files = sorted((tmp_path / "a" / folder).glob("*/*"))
            assert [str(file.relative_to(tmp_path / "a" / folder)) for file in files] == [name + end for name in names]

    def test_long_episodes_are_written_in_pieces(self, tmp_path, monkeypatch):
        monkeypatch.setattr(lerobot_writer, "_BLOCK_BYTES", 1000)
        dataset = make()
        largest = []

        def watch(rows):
            largest.append(len(rows))
            return rows

        arrays = {
            key: MappedArray(array, watch, array.shape[1:], array.dtype) if key in ("front", "odd") else array
            for key, array in dataset.arrays.items()
        }
        assert_same(written(tmp_path / "a", replace(dataset, arrays=arrays)), dataset)
        assert max(largest) == 3

    def test_a_real_recording(self, tmp_path, recordings):
        dataset = open_dataset(recordings / "cr5_5ep_lerobot_v21").select([2])
        found = written(tmp_path / "a", dataset)
        for key in ("observation.state", "action", "timestamp"):
            np.testing.assert_array_equal(found.arrays[key], dataset.arrays[key])
        rows = slice(0, 76, 15)
        pictures = dataset.arrays["observation.images.top"][rows].astype(np.float64)
        errors = np.mean((found.arrays["observation.images.top"][rows] - pictures) ** 2, axis=(1, 2, 3))
        assert 10 * np.log10(255**2 / errors.max()) >= 35

    def test_without_tasks_and_success(self, tmp_path):
        found = written(tmp_path / "a", replace(make(), episode_info={}, episode_text={}))
        assert found.episode_text == {}
        assert found.episode_info == {}


class TestFiles:
    """By the text of the format, read with pyarrow alone."""

    @pytest.fixture
    def dataset(self):
        return make()

    @pytest.fixture
    def path(self, tmp_path, dataset):
        write_lerobot(dataset, tmp_path / "a", progress=False)
        return tmp_path / "a"

    def test_columns_have_the_types_of_lerobots_own_files(self, path, dataset):
        schema = pq.read_schema(path / "data/chunk-000/file-000.parquet")
        types = {name: str(schema.field(name).type) for name in schema.names}
        assert types == {
            "observation.state": "fixed_size_list<element: float>[4]",
            "observation.keypoints": "list<element: list<element: float>>",
            "observation.width": "float",
            "observation.images.odd": "struct<bytes: binary, path: string>",
            "observation.images.gray": "struct<bytes: binary, path: string>",
            "action": "fixed_size_list<element: float>[3]",
            "executed_action": "fixed_size_list<element: float>[3]",
            "sim_state": "fixed_size_list<element: double>[6]",
            "next.reward": "double",
            "next.done": "bool",
            "next.success": "bool",
            "timestamp": "float",
            **dict.fromkeys(("frame_index", "episode_index", "index", "task_index"), "int64"),
        }
        table = pq.read_table(path / "data/chunk-000/file-000.parquet").to_pydict()
        assert table["index"] == list(range(sum(LENGTHS)))
        assert table["episode_index"] == np.repeat(range(4), LENGTHS).tolist()
        assert table["task_index"] == np.repeat([0, 1, 0, 2], LENGTHS).tolist()
        assert table["next.success"] == [row in (4, 15) for row in range(sum(LENGTHS))]
        np.testing.assert_array_equal(np.asarray(table["sim_state"]), dataset.arrays["sim_state"])

    def test_info_tells_what_there_is(self, path):
        info = json.loads((path / "meta/info.json").read_text())
        features = info.pop("features")
        assert info == {
            "codebase_version": "v3.0",
            "robot_type": "arm",
            "total_episodes": 4,
            "total_frames": 22,
            "total_tasks": 3,
            "chunks_size": 1000,
            "data_files_size_in_mb": 100,
            "video_files_size_in_mb": 200,
            "fps": 20,
            "splits": {"train": "0:4"},
            "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
            "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
        }
        assert features["observation.state"] == {"dtype": "float32", "shape": [4], "names": None}
        assert features["action"] == {"dtype": "float32", "shape": [3], "names": None}
        assert features["next.reward"] == {"dtype": "float64", "shape": [1], "names": None}
        names = ["height", "width", "channels"]
        assert features["observation.images.gray"] == {"dtype": "image", "shape": [8, 10, 1], "names": names}
        video = features["observation.images.front"]
        assert (video["dtype"], video["shape"], video["names"]) == ("video", [32, 48, 3], names)
        assert (video["info"]["video.codec"], video["info"]["video.fps"]) == ("h264", 20)

    def test_the_table_of_episodes_tells_where_each_is(self, path, dataset):
        rows = pq.read_table(path / "meta/episodes/chunk-000/file-000.parquet").to_pylist()
        ends = np.cumsum(LENGTHS)
        for index, row in enumerate(rows):
            first, end = int(ends[index] - LENGTHS[index]), int(ends[index])
            assert (row["episode_index"], row["length"], row["tasks"]) == (
                index,
                LENGTHS[index],
                ["aba "[index].strip()],
            )
            assert (row["dataset_from_index"], row["dataset_to_index"]) == (first, end)
            assert (row["data/chunk_index"], row["data/file_index"]) == (0, 0)
            prefix = "videos/observation.images.front"
            assert (row[f"{prefix}/chunk_index"], row[f"{prefix}/file_index"]) == (0, 0)
            times = row[f"{prefix}/from_timestamp"], row[f"{prefix}/to_timestamp"]
            np.testing.assert_allclose(times, (first * 0.05, end * 0.05), atol=1e-12)
            state = dataset.arrays["state"][first:end].astype(np.float64)
            for name, value in (("min", state.min(0)), ("max", state.max(0)), ("mean", state.mean(0))):
                np.testing.assert_allclose(row[f"stats/observation.state/{name}"], value, rtol=1e-12)
            np.testing.assert_allclose(row["stats/observation.state/std"], state.std(0), rtol=1e-12)
            np.testing.assert_allclose(row["stats/observation.state/q90"], np.quantile(state, 0.9, axis=0), rtol=1e-12)
            assert row["stats/observation.state/count"] == [LENGTHS[index]]

    def test_statistics_are_those_of_all_episodes(self, path, dataset):
        stats = json.loads((path / "meta/stats.json").read_text())
        assert set(stats) == set(features_of(path))
        for name, key in (("observation.keypoints", "observation.keypoints"), ("sim_state", "sim_state")):
            values = dataset.arrays[key].astype(np.float64)
            np.testing.assert_allclose(stats[name]["mean"], values.mean(0), rtol=1e-9, atol=1e-12)
            np.testing.assert_allclose(stats[name]["std"], values.std(0), rtol=1e-9)
            np.testing.assert_array_equal(stats[name]["max"], values.max(0))
        for name, key in (("observation.images.odd", "odd"), ("observation.images.front", "front")):
            images = dataset.arrays[key] / 255
            np.testing.assert_allclose(stats[name]["mean"], images.mean((0, 1, 2))[:, None, None], rtol=1e-9)
            np.testing.assert_allclose(stats[name]["std"], images.std((0, 1, 2))[:, None, None], rtol=1e-9)
            np.testing.assert_allclose(stats[name]["min"], images.min((0, 1, 2))[:, None, None])

    def test_tasks_are_the_index_that_pandas_restores(self, path):
        table = pq.read_table(path / "meta/tasks.parquet")
        assert json.loads(table.schema.metadata[b"pandas"])["index_columns"] == ["task"]
        assert table.to_pydict() == {"task_index": [0, 1, 2], "task": ["a", "b", ""]}


class TestStatistics:
    def test_of_numbers(self):
        stats = number_stats(np.array([[1.0, 5.0], [3.0, 5.0]]))
        expected = {"min": [1, 5], "max": [3, 5], "mean": [2, 5], "std": [1, 0], "count": [2], "q50": [2, 5]}
        for name, value in expected.items():
            np.testing.assert_array_equal(stats[name], value)
        assert number_stats(np.array([True, False]))["mean"].tolist() == [0.5]

    def test_of_images_from_their_histogram(self):
        images = np.zeros((4, 1, 1, 2), np.uint8)
        images[:, 0, 0, 0] = [0, 51, 51, 102]
        images[:, 0, 0, 1] = 255
        stats = image_stats(histogram(images), 4)
        assert stats["count"].tolist() == [4]
        for name, value in {"min": [0, 1], "max": [0.4, 1], "mean": [0.2, 1], "q50": [0.2, 1], "q99": [0.4, 1]}.items():
            np.testing.assert_allclose(stats[name], np.array(value)[:, None, None], err_msg=name)
        np.testing.assert_allclose(stats["std"][:, 0, 0], [0.2 / np.sqrt(2), 0], atol=1e-7)

    def test_of_episodes_together_are_those_of_the_whole(self):
        values = np.random.default_rng(0).normal(size=(30, 4))
        parts = joined([number_stats(part) for part in np.split(values, [3, 17])])
        whole = number_stats(values)
        for name in ("min", "max", "mean", "std", "count"):
            np.testing.assert_allclose(parts[name], whole[name], rtol=1e-12)


class TestTarget:
    def test_an_existing_path_is_kept(self, tmp_path):
        path = tmp_path / "a"
        written(path)
        before = sorted(path.rglob("*"))
        with pytest.raises(OutputError, match=r"exists already.*--overwrite"):
            written(path)
        assert sorted(path.rglob("*")) == before

    def test_only_a_lerobot_dataset_is_replaced(self, tmp_path):
        (tmp_path / "papers").mkdir()
        (tmp_path / "papers/thesis.txt").write_text("years of work")
        with pytest.raises(OutputError, match="is not a LeRobot dataset and will not be replaced"):
            written(tmp_path / "papers", overwrite=True)
        assert (tmp_path / "papers/thesis.txt").exists()

    def test_a_dataset_can_be_replaced_even_while_it_is_read(self, tmp_path):
        path = tmp_path / "a"
        first = written(path, video=False)
        second = written(path, first.select([1, 3]), video=False, overwrite=True)
        assert second.episode_lengths.tolist() == [8, 6]
        assert [entry.name for entry in tmp_path.iterdir()] == ["a"]

    def test_the_result_tells_what_was_written(self, tmp_path):
        result = write_lerobot(make(), tmp_path / "deep" / "a", progress=False)
        size = sum(file.stat().st_size for file in (tmp_path / "deep/a").rglob("*") if file.is_file())
        assert result == {"path": str(tmp_path / "deep/a"), "episodes": 4, "steps": 22, "bytes": size}

    @pytest.mark.parametrize("overwrite", [False, True])
    def test_a_failure_on_the_way_leaves_what_was_there(self, tmp_path, overwrite):
        def broken(rows):
            raise DatasetError("the disk of the recording is broken")

        path = tmp_path / "a"
        if overwrite:
            written(path)
        before = sorted(tmp_path.rglob("*"))
        dataset = make()
        arrays = dataset.arrays | {"front": MappedArray(dataset.arrays["front"], broken, (*SIZE, 3), np.uint8)}
        with pytest.raises(DatasetError, match="recording is broken"):
            written(path, replace(dataset, arrays=arrays), overwrite=overwrite)
        assert sorted(tmp_path.rglob("*")) == before

    @pytest.mark.parametrize("allowed", range(4))
    def test_a_full_disk_leaves_nothing(self, tmp_path, monkeypatch, allowed):
        """The disk takes `allowed` more files or folders."""
        original, left = Path.mkdir, [allowed]

        def scarce(self, *args, **kwargs):
            left[0] -= 1
            if left[0] < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))
            return original(self, *args, **kwargs)

        monkeypatch.setattr(Path, "mkdir", scarce)
        with pytest.raises(OutputError, match="no space left on device"):
            written(tmp_path / "a")
        assert list(tmp_path.iterdir()) == []

    def test_a_parent_that_is_a_file(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(OutputError, match="cannot write the dataset"):
            written(tmp_path / "file" / "a")


class TestRefuses:
    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("a/b", "cannot be a feature 'observation.a/b' of LeRobot's: it holds '/'"),
            ("observation.state", "'observation.state' of LeRobot's: it is there twice"),
        ],
    )
    def test_observation_names(self, tmp_path, name, message):
        dataset = make()
        spec = replace(dataset.spec, observation=dataset.spec.observation | {name: ArraySpec((4,))})
        with pytest.raises(ConfigError, match=message):
            written(
                tmp_path / "x", replace(dataset, spec=spec, arrays=dataset.arrays | {name: dataset.arrays["state"]})
            )
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("name", ["index", "frame_index", "next.success", "next.reward"])
    def test_names_that_the_format_uses(self, tmp_path, name):
        dataset = make()
        with pytest.raises(ConfigError, match=f"'{name}' of LeRobot's: it is there twice; rename it"):
            written(tmp_path / "x", replace(dataset, arrays=dataset.arrays | {name: np.zeros(22)}))

    def test_a_dataset_without_episodes(self, tmp_path):
        dataset = make()
        empty = {key: array[:0] for key, array in dataset.arrays.items()}
        with pytest.raises(DatasetError, match="made up holds no episode"):
            written(tmp_path / "x", replace(dataset, arrays=empty, episode_ends=np.empty(0, np.int64), episode_info={}))

    def test_without_pyarrow_the_command_is_named(self, tmp_path, monkeypatch):
        monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
        with pytest.raises(MissingDependencyError, match=r"pip install 'scd_robot\[formats\]'"):
            write_lerobot(make(), tmp_path / "x")
        assert list(tmp_path.iterdir()) == []


class TestLosses:
    def test_irregular_times_are_told(self, tmp_path, caplog):
        times = np.concatenate([np.arange(length) * 0.05 for length in LENGTHS])
        dataset = make()
        written(tmp_path / "a", replace(dataset, arrays=dataset.arrays | {"timestamp": times}))
        assert caplog.text == ""
        times[7] += 0.02
        found = written(tmp_path / "b", replace(dataset, arrays=dataset.arrays | {"timestamp": times}))
        assert "recorded times differ by up to 0.02 s from regular ones" in caplog.text
        assert found.arrays["timestamp"][7] == np.float32(0.1)

    def test_notes_without_a_place_are_told(self, tmp_path, caplog):
        dataset = make()
        info = dataset.episode_info | {"seed": np.arange(4), "mask_train": np.ones(4)}
        with caplog.at_level(logging.INFO):
            written(tmp_path / "a", replace(dataset, episode_info=info))
        assert "no place for what is noted about episodes: mask_train, seed" in caplog.text

    @pytest.mark.parametrize(("control_dt", "fps"), [(0.1, 10), (1 / 30, 30), (0.03, 1 / 0.03)])
    def test_rates_are_whole_numbers_where_they_can_be(self, tmp_path, control_dt, fps):
        dataset = make()
        found = written(tmp_path / "a", replace(dataset, spec=replace(dataset.spec, control_dt=control_dt)))
        told = json.loads((tmp_path / "a/meta/info.json").read_text())["fps"]
        assert (told, type(told)) == (fps, type(fps))
        assert found.spec.control_dt == pytest.approx(control_dt, rel=1e-12)
        assert len(found.arrays["observation.images.front"][:]) == 22


@pytest.mark.parametrize(("control_dt", "fps"), [(0.033333, 30), (1 / 29.97, 29.97), (0.4999, 1 / 0.4999)])
def test_rows_and_frames_have_one_clock(tmp_path, control_dt, fps):
    """Of thousands of frames each is the one of its row: clocks that differ a little drift apart."""
    count = 1500
    light = np.arange(2 * count) // 4 % 2 * 200
    front = np.broadcast_to(light.astype(np.uint8)[:, None, None, None], (2 * count, 16, 16, 3))
    arrays = {"front": front, "action": np.zeros((2 * count, 1), np.float32)}
    spec = DatasetSpec({"front": ArraySpec((16, 16, 3), "uint8")}, 1, control_dt, "lights")
    write_lerobot(EpisodeDataset(spec, np.array([count, 2 * count]), arrays), tmp_path / "out")
    info = json.loads((tmp_path / "out/meta/info.json").read_text())
    assert info["fps"] == pytest.approx(fps, rel=1e-6)
    assert isinstance(info["fps"], int) == (fps == 30)
    found = open_dataset(tmp_path / "out").arrays["observation.images.front"][-400:]
    np.testing.assert_array_equal(found.mean((1, 2, 3)) > 100, light[-400:] > 0)


def test_what_is_absent_stays_absent_and_where_things_were_is_kept(tmp_path, caplog):
    dataset = make()
    steps = dataset.num_steps
    extras = {
        "present.front": (np.arange(steps) % 3 > 0).astype(np.uint8),
        "present.observation.keypoints": (np.arange(steps) % 4 > 0).astype(np.uint8),
        "position.hand": np.random.default_rng(1).normal(size=(steps, 3)),
        "force": np.arange(steps),
    }
    again = written(tmp_path / "a", replace(dataset, arrays={**dataset.arrays, **extras}))
    for ours, theirs in (("front", "observation.images.front"), *[("observation.keypoints",) * 2]):
        assert again.has_gaps(theirs)
        np.testing.assert_array_equal(again.arrays[f"present.{theirs}"], extras[f"present.{ours}"])
    np.testing.assert_array_equal(again.arrays["position.hand"], extras["position.hand"])
    assert set(again.spec.observation) == set(written(tmp_path / "b").spec.observation)
    assert "not read back by scd_robot, as they are no observations: force" in caplog.text
