import json
import logging
import math
import multiprocessing
import pickle
import re
import shutil
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from scd_robot.datasets.formats import ReadOptions
from scd_robot.datasets.lerobot.reader import open_lerobot
from scd_robot.datasets.open import detect_format, open_dataset
from scd_robot.datasets.video import encode_png
from scd_robot.errors import DatasetError, MissingDependencyError, UnknownNameError
from scd_robot.types import ArraySpec

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

FPS = 10
LENGTHS = (6, 9, 4, 7)
TASKS = ("push the block", "lift the block")
CAMERA = "observation.images.top"
SIZE = (32, 48)
VERSIONS = ("v2.0", "v2.1", "v3.0")
# Which episodes share a data file, a video file, and a file of the table, in v3.0.
DATA_FILES, VIDEO_FILES, TABLE_FILES = [(0, 1), (2, 3)], [(0, 1, 2), (3,)], [(0, 1, 2), (3,)]

FEATURES = {
    "observation.state": ("float32", [3]),
    "observation.keypoints": ("float64", [4, 2]),
    "observation.gripper": ("float32", [1]),
    "observation.contact": ("bool", [2]),
    "observation.count": ("int64", [1]),
    CAMERA: ("video", [*SIZE, 3]),
    "observation.images.wrist": ("image", [8, 10, 3]),
    "language": ("string", [1]),
    "action": ("float32", [5]),
    "action.raw": ("float32", [2]),
    "next.reward": ("float32", [1]),
    "next.done": ("bool", [1]),
    "next.success": ("bool", [1]),
    **dict.fromkeys(("frame_index", "episode_index", "index", "task_index"), ("int64", [1])),
    "timestamp": ("float32", [1]),
}


def episode(index):
    """Columns (T, ...) of an episode, as numpy arrays and lists; pictures of the wrist as arrays."""
    rng = np.random.default_rng(index)
    length = LENGTHS[index]
    steps = np.arange(length)
    return {
        "observation.state": rng.normal(size=(length, 3)).astype(np.float32),
        "observation.keypoints": rng.normal(size=(length, 4, 2)),
        "observation.gripper": rng.normal(size=length).astype(np.float32),
        "observation.contact": rng.integers(0, 2, (length, 2)).astype(bool),
        "observation.count": rng.integers(-5, 5, length),
        "observation.images.wrist": rng.integers(0, 256, (length, 8, 10, 3), dtype=np.uint8),
        "language": [f"word {step}" for step in steps],
        "action": rng.normal(size=(length, 5)).astype(np.float32),
        "action.raw": rng.normal(size=(length, 2)).astype(np.float32),
        "next.reward": rng.normal(size=length).astype(np.float32),
        "next.done": steps == length - 1,
        "next.success": (steps == length - 2) & (index % 2 == 0),
        "timestamp": (steps / FPS).astype(np.float32),
        "frame_index": steps,
        "episode_index": np.full(length, index),
        "index": steps + sum(LENGTHS[:index]),
        "task_index": np.full(length, index % 2),
        "not in info.json": steps,
    }


def pictures(index):
    """What the camera saw in an episode, (T, H, W, 3)."""
    y, x = np.mgrid[: SIZE[0], : SIZE[1]]
    levels = 30 + 7 * (np.arange(LENGTHS[index]) + sum(LENGTHS[:index]))
    return np.stack([np.stack([level + x / 3, level + y / 3, np.full_like(x, level)], -1) for level in levels])


def arrow(values):
    """A column: lists for vectors, files for pictures."""
    if isinstance(values, np.ndarray) and values.dtype == np.uint8:
        return pa.array([{"bytes": encode_png(image), "path": f"frame_{n}.png"} for n, image in enumerate(values)])
    return pa.array(values.tolist() if isinstance(values, np.ndarray) and values.ndim > 1 else values)


def write_rows(path, indices, **changes):
    """A data file with these episodes."""
    parts = [episode(index) for index in indices]
    table = pa.concat_tables([pa.table({name: arrow(values) for name, values in part.items()}) for part in parts])
    write_table(path, table, **changes)


def write_table(path, table, **changes):
    """Writes a table with columns replaced, or left out where they are None."""
    for name, values in changes.items():
        table = table.drop_columns([name]) if name in table.column_names else table
        table = table if values is None else table.append_column(name, arrow(values))
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=5)


def write_video(path, images):
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as output:
        stream = output.add_stream("libx264", rate=FPS)
        stream.height, stream.width = images.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.options = {"g": "2", "crf": "20"}
        for number, image in enumerate(images.astype(np.uint8)):
            frame = av.VideoFrame.from_ndarray(image).reformat(format="yuv420p")
            frame.pts, frame.time_base = number, Fraction(1, FPS)
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))


def build(path, version):
    """A dataset of four episodes as LeRobot would have written it."""
    info = {
        "codebase_version": version,
        "robot_type": "arm",
        "total_episodes": len(LENGTHS),
        "total_frames": sum(LENGTHS),
        "chunks_size": 3,
        "fps": FPS,
        "splits": {"train": "0:4"},
        "features": {name: {"dtype": dtype, "shape": shape} for name, (dtype, shape) in FEATURES.items()},
    }
    (path / "meta").mkdir(parents=True)
    if version == "v3.0":
        info["data_path"] = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
        info["video_path"] = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
        build_shared_files(path)
    else:
        info["data_path"] = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
        info["video_path"] = "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"
        for index in range(len(LENGTHS)):
            place = {"episode_chunk": index // 3, "episode_index": index}
            write_rows(path / info["data_path"].format(**place), [index])
            write_video(path / info["video_path"].format(video_key=CAMERA, **place), pictures(index))
        rows = [
            {"episode_index": index, "tasks": [TASKS[index % 2]], "length": length}
            for index, length in enumerate(LENGTHS)
        ]
        write_lines(path / "meta" / "episodes.jsonl", rows)
        write_lines(path / "meta" / "tasks.jsonl", [{"task_index": n, "task": task} for n, task in enumerate(TASKS)])
    (path / "meta" / "info.json").write_text(json.dumps(info))
    return path


def build_shared_files(path):
    rows = []
    for index, length in enumerate(LENGTHS):
        data, clip = ([index in part for part in parts].index(True) for parts in (DATA_FILES, VIDEO_FILES))
        begin = sum(LENGTHS[other] for other in VIDEO_FILES[clip] if other < index) / FPS
        first = sum(LENGTHS[:index])
        rows.append(
            {
                **{"episode_index": index, "tasks": [TASKS[index % 2]], "length": length},
                **{"data/chunk_index": 0, "data/file_index": data},
                **{"dataset_from_index": first, "dataset_to_index": first + length},
                **{f"videos/{CAMERA}/chunk_index": clip, f"videos/{CAMERA}/file_index": 0},
                **{f"videos/{CAMERA}/from_timestamp": begin, f"videos/{CAMERA}/to_timestamp": begin + length / FPS},
                "stats/action/min": [0.0],
            }
        )
    for number, part in enumerate(DATA_FILES):
        write_rows(path / f"data/chunk-000/file-{number:03d}.parquet", part)
    for number, part in enumerate(VIDEO_FILES):
        images = np.concatenate([pictures(index) for index in part])
        write_video(path / f"videos/{CAMERA}/chunk-{number:03d}/file-000.mp4", images)
    for number, part in enumerate(TABLE_FILES):
        table = pa.Table.from_pylist([rows[index] for index in part])
        write_table(path / f"meta/episodes/chunk-000/file-{number:03d}.parquet", table)
    table = pa.table({"task_index": [0, 1], "__index_level_0__": list(TASKS)})
    write_table(path / "meta/tasks.parquet", table)


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def edit_info(path, **changes):
    """Changes entries of info.json; those of features by their names."""
    file = path / "meta" / "info.json"
    info = json.loads(file.read_text())
    for name, value in changes.items():
        (info["features"] if name in info["features"] else info)[name] = value
    file.write_text(json.dumps(info))


def edit_episode(path, index, **changes):
    """Changes a row in the table of episodes, of either kind."""
    lines = path / "meta" / "episodes.jsonl"
    if lines.exists():
        rows = [json.loads(line) for line in lines.read_text().splitlines()]
        rows[index].update(changes)
        write_lines(lines, rows)
        return
    number = [index in part for part in TABLE_FILES].index(True)
    file = path / f"meta/episodes/chunk-000/file-{number:03d}.parquet"
    rows = pq.read_table(file).to_pylist()
    rows[TABLE_FILES[number].index(index)].update({name.replace("CAMERA", CAMERA): v for name, v in changes.items()})
    write_table(file, pa.Table.from_pylist(rows))


def data_file(path, index):
    """The file with the rows of an episode, and its episodes."""
    if (path / "meta" / "episodes.jsonl").exists():
        return path / f"data/chunk-{index // 3:03d}/episode_{index:06d}.parquet", (index,)
    number = [index in part for part in DATA_FILES].index(True)
    return path / f"data/chunk-000/file-{number:03d}.parquet", DATA_FILES[number]


def edit_rows(path, index, **changes):
    """Changes columns in an episode's data file; a change is a function of the column's values."""
    file, indices = data_file(path, index)
    whole = {name: np.concatenate([np.asarray(episode(i)[name]) for i in indices]) for name in episode(index)}
    write_rows(file, indices, **{name: change and change(whole[name]) for name, change in changes.items()})


def video_file(path, index):
    if (path / "meta" / "episodes.jsonl").exists():
        return path / f"videos/chunk-{index // 3:03d}/{CAMERA}/episode_{index:06d}.mp4"
    return path / f"videos/{CAMERA}/chunk-{[index in part for part in VIDEO_FILES].index(True):03d}/file-000.mp4"


def decoded(path):
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    return {version: build(tmp_path_factory.mktemp("lerobot") / "data", version) for version in VERSIONS}


@pytest.fixture(params=VERSIONS)
def dataset(request, originals, tmp_path):
    """Folder of a dataset that may be spoiled."""
    return shutil.copytree(originals[request.param], tmp_path / "mine")


def read(path, **options):
    return open_dataset(path, **options)


@pytest.fixture
def folder(recordings):
    """The recording of a real robot, v2.1."""
    return recordings / "cr5_5ep_lerobot_v21"


class TestRealRecording:
    def test_numbers_equal_pyarrows_own_reading(self, folder):
        tables = [pq.read_table(path).to_pydict() for path in sorted((folder / "data").rglob("*.parquet"))]
        dataset = open_dataset(folder)
        assert dataset.episode_lengths.tolist() == [len(table["action"]) for table in tables]
        for key, name in (("observation.state",) * 2, ("action",) * 2, ("timestamp",) * 2):
            expected = np.concatenate([np.asarray(table[name], np.float32) for table in tables])
            np.testing.assert_array_equal(dataset.arrays[key], expected)
        assert dataset.spec.observation["observation.state"] == ArraySpec((6,))
        assert dataset.spec.action_dim == 7
        assert dataset.spec.control_dt == 0.1
        assert dataset.episode_text["task"] == ["grasp_cube"] * 5

    def test_frames_equal_a_plain_decode_in_any_order(self, folder):
        dataset = open_dataset(folder)
        rows = dataset.arrays["observation.images.top"]
        assert (rows.shape, rows.dtype) == ((530, 480, 640, 3), np.uint8)
        expected = decoded(folder / "videos/chunk-000/observation.images.top/episode_000002.mp4")
        inside = dataset.rows(2)
        np.testing.assert_array_equal(rows[inside], expected)
        order = np.random.default_rng(0).permutation(len(expected))[:12]
        np.testing.assert_array_equal(rows[inside.start + order], expected[order])
        first = decoded(folder / "videos/chunk-000/observation.images.top/episode_000003.mp4")[:3]
        np.testing.assert_array_equal(rows[inside.stop - 2 : inside.stop + 3], np.concatenate([expected[-2:], first]))

    def test_the_first_format_is_named(self, recordings):
        with pytest.raises(DatasetError, match=r"version 1, which is not read; expected one of v2\.0, v2\.1, v3\.0"):
            read(recordings / "lerobot_v1_samples" / "aloha_sim_insertion_human")


class TestVersions:
    def test_the_format_is_told_from_the_folder(self, dataset):
        assert detect_format(dataset) == "lerobot"
        assert open_dataset(dataset).num_episodes == 4

    def test_a_part_tells_the_folder_of_the_whole(self, dataset):
        for part in (dataset / "data", next(dataset.rglob("*.parquet")), next(dataset.rglob("*.mp4"))):
            with pytest.raises(DatasetError, match=f"a part of a LeRobot dataset.*; give its folder: {dataset}$"):
                open_dataset(part)

    def test_numbers_are_those_that_were_written(self, dataset):
        opened = read(dataset)
        assert opened.episode_lengths.tolist() == list(LENGTHS)
        observations = [name for name in FEATURES if name.startswith("observation.")]
        assert list(opened.spec.observation) == observations
        for index, length in enumerate(LENGTHS):
            expected, found = episode(index), opened.episode(index)
            for name in set(observations) - {CAMERA, "observation.images.wrist"}:
                shape = (length, *FEATURES[name][1])
                np.testing.assert_array_equal(found[name], expected[name].reshape(shape).astype(np.float32))
                assert found[name].dtype == np.float32
                assert opened.spec.observation[name] == ArraySpec(shape[1:])
            np.testing.assert_array_equal(found["action"], expected["action"])
            np.testing.assert_array_equal(found["reward"], expected["next.reward"])
            np.testing.assert_array_equal(found["done"], expected["next.done"])
            np.testing.assert_array_equal(found["timestamp"], expected["timestamp"].astype(np.float64))
            assert found["timestamp"].dtype == np.float64
        assert set(opened.arrays) == {*observations, "action", "reward", "done", "timestamp"}

    def test_pictures_are_those_that_were_written(self, dataset):
        opened = read(dataset)
        wrist = np.concatenate([episode(index)["observation.images.wrist"] for index in range(4)])
        np.testing.assert_array_equal(opened.arrays["observation.images.wrist"][:], wrist)
        np.testing.assert_array_equal(opened.arrays["observation.images.wrist"][[20, 3, 11, 3]], wrist[[20, 3, 11, 3]])
        for index in range(4):
            found = opened.episode(index)[CAMERA]
            np.testing.assert_allclose(found.mean((1, 2, 3)), pictures(index).mean((1, 2, 3)), atol=2)
        files = dict.fromkeys(video_file(dataset, index) for index in range(4))
        np.testing.assert_array_equal(opened.arrays[CAMERA][:], np.concatenate([decoded(path) for path in files]))

    def test_what_is_known_about_the_whole_and_the_episodes(self, dataset):
        opened = read(dataset)
        assert opened.spec.control_dt == 0.1
        assert opened.episode_text["task"] == [TASKS[0], TASKS[1], TASKS[0], TASKS[1]]
        assert opened.episode_info["success"].tolist() == [True, False, True, False]
        version = json.loads((dataset / "meta/info.json").read_text())["codebase_version"]
        assert opened.metadata == {"format": "lerobot", "version": version, "robot_type": "arm"}
        assert opened.spec.source == f"mine (LeRobot {version})"

    def test_another_step_changes_the_specification_alone(self, dataset):
        opened = read(dataset, control_dt=0.02)
        assert opened.spec.control_dt == 0.02
        np.testing.assert_array_equal(opened.arrays[CAMERA][5:8], read(dataset).arrays[CAMERA][5:8])

    def test_workers_read_pickled_pictures(self, dataset):
        arrays = pickle.loads(pickle.dumps(read(dataset))).arrays
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            for key in (CAMERA, "observation.images.wrist"):
                np.testing.assert_array_equal(pool.apply(arrays[key].read, (4, 9)), read(dataset).arrays[key][4:9])


class TestChoices:
    def test_keys_choose_the_observations(self, dataset):
        opened = read(dataset, keys=["observation.gripper", "action.raw"])
        assert list(opened.spec.observation) == ["observation.gripper", "action.raw"]
        np.testing.assert_array_equal(opened.episode(1)["action.raw"], episode(1)["action.raw"])

    def test_an_unknown_key_is_refused_with_the_nearest(self, dataset):
        with pytest.raises(UnknownNameError, match=r"did you mean 'observation\.state'"):
            read(dataset, keys=["observation.stat"])

    @pytest.mark.parametrize("key", ["language", "action", "frame_index", "next.reward"])
    def test_what_is_no_observation_cannot_be_asked_for(self, dataset, key):
        with pytest.raises(UnknownNameError, match=f"unknown key .* '{key}'"):
            read(dataset, keys=[key])

    def test_another_feature_may_be_the_action(self, dataset):
        opened = read(dataset, action="action.raw")
        assert opened.spec.action_dim == 2
        np.testing.assert_array_equal(opened.episode(2)["action"], episode(2)["action.raw"])
        with pytest.raises(UnknownNameError, match=r"unknown action array .* did you mean 'action\.raw'"):
            read(dataset, action="action.row")

    def test_without_the_usual_prefix_all_but_actions_are_observations(self, tmp_path):
        path = build(tmp_path / "a", "v2.1")
        info = json.loads((path / "meta/info.json").read_text())
        old, new = "observation.gripper", "gripper"
        kept = {name: value for name, value in info["features"].items() if not name.startswith("observation.")}
        info["features"] = kept | {new: info["features"][old]}
        (path / "meta/info.json").write_text(json.dumps(info))
        for index in range(4):
            file, _ = data_file(path, index)
            table = pq.read_table(file)
            pq.write_table(table.append_column(new, table[old]), file)
        assert list(read(path).spec.observation) == ["gripper"]

    def test_texts_are_left_out_with_a_word(self, dataset, caplog):
        with caplog.at_level(logging.INFO):
            read(dataset)
        assert [r.getMessage() for r in caplog.records if "'language' is not read" in r.getMessage()]

    def test_several_tasks_in_an_episode_are_all_told(self, dataset):
        edit_rows(dataset, 2, task_index=lambda values: np.arange(len(values)) % 2)
        assert read(dataset).episode_text["task"][2] == "push the block; lift the block"


class TestVideosThatAreNotThere:
    def test_are_left_out_with_a_warning(self, dataset, caplog):
        shutil.rmtree(dataset / "videos")
        opened = read(dataset)
        assert CAMERA not in opened.spec.observation
        assert CAMERA not in opened.arrays
        warning = next(r.getMessage() for r in caplog.records if r.levelno == logging.WARNING)
        assert f"'{CAMERA}' is left out: " in warning
        assert str(video_file(dataset, 0)) in warning

    def test_are_refused_where_they_were_asked_for(self, dataset):
        shutil.rmtree(dataset / "videos")
        with pytest.raises(DatasetError, match=f"'{CAMERA}' was asked for, but .* are missing"):
            read(dataset, keys=[CAMERA, "observation.state"])
        assert list(read(dataset, keys=["observation.state"]).spec.observation) == ["observation.state"]

    def test_also_where_info_json_says_so(self, dataset, caplog):
        edit_info(dataset, video_path=None)
        assert CAMERA not in read(dataset).spec.observation
        assert "says that there are no videos" in caplog.text

    def test_leave_no_dataset_without_other_observations(self, dataset):
        features = {name: {"dtype": dtype, "shape": shape} for name, (dtype, shape) in FEATURES.items()}
        kept = {name: features[name] for name in features if not name.startswith("observation.") or name == CAMERA}
        edit_info(dataset, features=kept, video_path=None)
        with pytest.raises(DatasetError, match="has no observations"):
            read(dataset)


class TestContradictions:
    @pytest.mark.parametrize("name", ["observation.state", "observation.images.wrist", "action", "frame_index"])
    def test_a_missing_column(self, dataset, name):
        edit_rows(dataset, 2, **{name: None})
        with pytest.raises(DatasetError, match=f"{data_file(dataset, 2)[0].name} has no column '{name}'.*found"):
            read(dataset)

    def test_a_column_of_another_width(self, dataset):
        edit_rows(dataset, 1, **{"observation.state": lambda values: values[:, :2]})
        message = rf"column 'observation.state' of .*{data_file(dataset, 1)[0].name} has 2 .*; expected 3 by the shape"
        with pytest.raises(DatasetError, match=message):
            read(dataset)

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            (lambda values: [[1.0]] + [[1.0, 2.0, 3.0]] * (len(values) - 1), "lists of different lengths"),
            (lambda values: [None] + [[1.0, 2.0, 3.0]] * (len(values) - 1), "or none in places"),
            (lambda values: [[1.0, None, 3.0]] * len(values), r"lacks \d+ of its \d+ values"),
            (lambda values: [["a", "b", "c"]] * len(values), "holds string; expected numbers"),
            (lambda values: ["abc"] * len(values), "holds string; expected numbers"),
        ],
    )
    def test_a_column_of_something_else(self, dataset, values, message):
        edit_rows(dataset, 1, **{"observation.state": values})
        with pytest.raises(DatasetError, match=f"column 'observation.state' of .*{message}"):
            read(dataset)

    def test_columns_that_info_json_lacks_are_not_read(self, dataset, caplog):
        with caplog.at_level(logging.DEBUG, logger="scd_robot"):
            assert "not in info.json" not in read(dataset).arrays
        assert "are not read: ['not in info.json']" in caplog.text

    def test_totals_in_info_json_alone(self, dataset, caplog):
        edit_info(dataset, total_episodes=7, total_frames=99)
        assert read(dataset).num_episodes == 4
        assert "total_episodes = 7, but its table of episodes has 4" in caplog.text
        assert "total_frames = 99, but its table of episodes has 26" in caplog.text

    def test_a_table_that_lost_its_last_episode(self, tmp_path):
        path = build(tmp_path / "a", "v2.1")
        lines = (path / "meta/episodes.jsonl").read_text().splitlines()
        (path / "meta/episodes.jsonl").write_text("\n".join(lines[:3]))
        with pytest.raises(DatasetError, match=r"does not list .*episode_000003\.parquet: the table has lost episodes"):
            read(path)
        path = build(tmp_path / "b", "v3.0")
        (path / "meta/episodes/chunk-000/file-001.parquet").unlink()
        with pytest.raises(DatasetError, match=r"file-001\.parquet has 11 rows, but the table of episodes says 4"):
            read(path)

    def test_a_length_that_the_rows_do_not_have(self, dataset):
        edit_episode(dataset, 2, length=5, dataset_to_index=sum(LENGTHS[:2]) + 5)
        with pytest.raises(DatasetError, match=r"(has \d+ rows, but the table .* episode 2|shorter than .* episode 2|"
                           "episode 3 has 7 steps and follows 20)"):  # fmt: skip
            read(dataset)

    def test_lengths_that_agree_in_the_sum_only(self, tmp_path):
        path = build(tmp_path / "a", "v3.0")
        edit_episode(path, 0, length=7, dataset_to_index=7, **{"videos/CAMERA/to_timestamp": 0.7})
        edit_episode(path, 1, length=8, dataset_from_index=7, **{"videos/CAMERA/from_timestamp": 0.7})
        with pytest.raises(DatasetError, match=r"episode_index of .* must be 0 in row 6 \(episode 0, step 6.*, got 1"):
            read(path)

    def test_steps_that_do_not_count_up(self, dataset):
        edit_rows(dataset, 1, frame_index=lambda values: np.where(values == 3, 4, values))
        with pytest.raises(DatasetError, match=r"frame_index of .* must be 3 in row \d+ \(episode \d, step 3.*, got 4"):
            read(dataset)

    def test_rows_of_another_episode(self, dataset):
        edit_rows(dataset, 2, episode_index=lambda values: np.where(np.arange(len(values)) == 1, 9, values))
        with pytest.raises(DatasetError, match=r"episode_index of .* must be 2 in row 1 \(episode 2, step 1.*, got 9"):
            read(dataset)

    def test_episodes_out_of_order(self, dataset):
        edit_episode(dataset, 2, episode_index=1)
        with pytest.raises(DatasetError, match="episode 1 follows episode 1 in the table"):
            read(dataset)

    def test_a_task_that_the_table_lacks(self, dataset):
        edit_rows(dataset, 2, task_index=lambda values: values + 5)
        with pytest.raises(DatasetError, match=r"episode 2 of .* has the task_index [56], but .* lists \[0, 1\]"):
            read(dataset)

    @pytest.mark.parametrize("times", [lambda values: values * math.nan, lambda values: values + math.inf])
    def test_times_that_are_no_numbers(self, dataset, times):
        edit_rows(dataset, 2, timestamp=times)
        with pytest.raises(DatasetError, match="NaN or infinite"):
            read(dataset)

    def test_rows_of_the_table_that_contradict_each_other(self, tmp_path):
        path = build(tmp_path / "a", "v3.0")
        edit_episode(path, 2, dataset_from_index=14)
        with pytest.raises(DatasetError, match=r"episode 2 has 4 steps and follows 15, .* \(15, 19\), got \(14, 19\)"):
            read(path)

    def test_episodes_that_share_frames(self, tmp_path):
        path = build(tmp_path / "a", "v3.0")
        edit_episode(path, 1, **{"videos/CAMERA/from_timestamp": 0.5})
        with pytest.raises(DatasetError, match=r"episodes 0 and 1 share frames of .*: one ends at 0\.6000 s"):
            read(path)

    @pytest.mark.parametrize("column", ["length", "data/file_index", f"videos/{CAMERA}/to_timestamp"])
    def test_a_table_of_episodes_without_a_column(self, tmp_path, column):
        path = build(tmp_path / "a", "v3.0")
        file = path / "meta/episodes/chunk-000/file-001.parquet"
        write_table(file, pq.read_table(file), **{column: None})
        with pytest.raises(DatasetError, match=f"file-001.parquet has no column '{column}'"):
            read(path)

    def test_bad_values_are_refused_unless_they_are_to_be_found_later(self, dataset):
        edit_rows(dataset, 1, **{"observation.state": lambda values: np.where(values == values.max(), np.nan, values)})
        with pytest.raises(DatasetError, match=r"'observation.state' of .* holds NaN .* episode \d"):
            read(dataset)
        assert np.isnan(read(dataset, check=False).arrays["observation.state"]).sum() == 1


class TestChosenEpisodes:
    def test_damage_does_not_matter_in_files_that_are_left_out(self, dataset):
        video_file(dataset, 3).unlink()  # alone in its file in all versions
        with pytest.raises(DatasetError, match=f"'{CAMERA}' of .*: 1 of its . video files are missing.* --drop"):
            read(dataset)
        left = read(dataset, drop=["3"])
        assert left.episode_lengths.tolist() == list(LENGTHS[:3])
        assert CAMERA in left.spec.observation

    def test_one_episode_of_a_file_with_several(self, dataset):
        one, whole = read(dataset, only=["1"]), read(dataset)
        assert one.episode_lengths.tolist() == [LENGTHS[1]]
        for key, values in whole.episode(1).items():
            np.testing.assert_array_equal(one.episode(0)[key], values)
        assert one.episode_text["task"] == [whole.episode_text["task"][1]]


class TestVideoAgainstRows:
    def test_the_tolerance_says_how_far_a_frame_may_be(self, dataset):
        edit_rows(dataset, 2, timestamp=lambda values: np.where(values > 0.25, values + 0.08, values))
        rows = slice(sum(LENGTHS[:2]), sum(LENGTHS[:3]))
        with pytest.raises(
            DatasetError, match=r"episode 2, step 3, needs a frame at .*, but its last frame is at .*, alth.*mend"
        ):
            read(dataset).arrays[CAMERA][rows]
        assert len(read(dataset, frame_tolerance=0.9).arrays[CAMERA][rows]) == LENGTHS[2]

    def test_a_video_shorter_than_its_rows(self, dataset):
        index = 3  # alone in its file in all versions
        write_video(video_file(dataset, index), pictures(index)[:-2])
        message = r"shorter than its rows: expected 7 frames .*episode 3, found 5"
        with pytest.raises(DatasetError, match=message):
            read(dataset)
        rows = read(dataset, check=False).arrays[CAMERA]
        assert len(rows[19:24]) == 5
        with pytest.raises(DatasetError, match=r"episode 3, step 5, .*expected 7 frames, found 5"):
            rows[24]

    def test_a_clip_shorter_than_its_rows(self, tmp_path):
        path = build(tmp_path / "a", "v3.0")
        edit_episode(path, 1, **{"videos/CAMERA/to_timestamp": 1.3})
        with pytest.raises(DatasetError, match=r"shorter than the rows of episode 1: expected 9 frames, found 7"):
            read(path)

    def test_jittered_times_are_kept_and_find_their_frames(self, dataset):
        jitter = np.array([0.0, 0.04, -0.03, 0.02])
        edit_rows(dataset, 2, timestamp=lambda values: values + np.resize(jitter, len(values)).astype(np.float32))
        opened = read(dataset)
        expected = (np.arange(4) / FPS).astype(np.float32) + jitter.astype(np.float32)
        np.testing.assert_array_equal(opened.episode(2)["timestamp"], expected.astype(np.float64))
        np.testing.assert_array_equal(opened.episode(2)[CAMERA][1:], self.frames(dataset, 2)[1:])

    @staticmethod
    def frames(path, index):
        with_others = decoded(video_file(path, index))
        first = sum(LENGTHS[:index]) if len(with_others) > LENGTHS[index] else 0
        return with_others[first : first + LENGTHS[index]]

    def test_times_without_a_frame_are_told(self, dataset):
        edit_rows(dataset, 3, timestamp=lambda values: values * np.float32(1.6))
        rows = read(dataset).arrays[CAMERA]
        with pytest.raises(DatasetError, match=r"episode [23], step [1-6], needs a frame at"):
            rows[15:]

    def test_pictures_of_another_size(self, dataset):
        edit_info(dataset, **{CAMERA: {"dtype": "video", "shape": [48, 32, 3]}})
        with pytest.raises(DatasetError, match="frames of 32 x 48 pixels, expected 48 x 32"):
            read(dataset)

    @pytest.mark.parametrize("names", [["channels", "height", "width"], None])
    def test_channels_may_be_listed_first(self, dataset, names):
        edit_info(dataset, **{CAMERA: {"dtype": "video", "shape": [3, *SIZE], "names": names}})
        assert read(dataset).arrays[CAMERA].shape == (26, *SIZE, 3)

    def test_width_may_be_named_before_height(self, dataset):
        names = ["width", "height", "channels"]
        edit_info(dataset, **{CAMERA: {"dtype": "video", "shape": [*SIZE[::-1], 3], "names": names}})
        assert read(dataset).arrays[CAMERA][:1].shape == (1, *SIZE, 3)

    def test_messages_count_as_drop_does(self, tmp_path):
        """Where LeRobot's numbers have a gap, `--drop` still counts what is there."""
        path = build(tmp_path / "a", "v2.1")
        table = path / "meta" / "episodes.jsonl"
        table.write_text("".join(line for i, line in enumerate(table.read_text().splitlines(True)) if i != 1))
        edit_info(path, total_episodes=3, total_frames=sum(LENGTHS) - LENGTHS[1])
        edit_rows(path, 3, timestamp=lambda values: values * np.float32("nan"))
        with pytest.raises(DatasetError, match=r"episode 2 \(episode_index 3\) of .* has NaN"):
            read(path)
        assert read(path, drop=["2"]).num_episodes == 2

    def test_a_task_that_changes_within_an_episode_is_told(self, dataset, caplog):
        edit_rows(dataset, 2, task_index=lambda values: np.arange(len(values)) // 2 % 2)
        assert read(dataset).episode_text["task"][2] == "; ".join(TASKS)
        assert re.search(r"the task changes within \d episodes? .*episode 2", caplog.text)

    def test_images_of_another_size(self, dataset):
        edit_info(dataset, **{"observation.images.wrist": {"dtype": "image", "shape": [10, 8, 3]}})
        with pytest.raises(
            DatasetError, match=r"wrist' in row \d+ of .* is an image \(8, 10, 3\); expected \(10, 8, 3\)"
        ):
            read(dataset).arrays["observation.images.wrist"][2]

    @pytest.mark.parametrize(
        ("files", "message"),
        [
            (lambda values: [{"bytes": None, "path": "/etc/passwd"}] * len(values), "holds no image, only a path"),
            (lambda values: [{"bytes": b"GIF89a", "path": ""}] * len(values), "neither a PNG nor a JPEG"),
            (lambda values: [1] * len(values), r"holds int64; expected images \(bytes, path\)"),
        ],
    )
    def test_images_that_are_none(self, dataset, files, message):
        edit_rows(dataset, 0, **{"observation.images.wrist": files})
        with pytest.raises(DatasetError, match=message):
            read(dataset).arrays["observation.images.wrist"][2]


class TestInfo:
    @pytest.mark.parametrize("version", ["v1.6", "v2.2", "v4.0", None, 3])
    def test_other_versions_are_refused(self, dataset, version):
        edit_info(dataset, codebase_version=version)
        with pytest.raises(DatasetError, match=r"expected one of v2\.0, v2\.1, v3\.0"):
            read(dataset)

    @pytest.mark.parametrize(
        "template",
        [
            "../{episode_index}.parquet",
            "/etc/{episode_index}",
            "data/{episode_index.__class__}",
            "data/{0}",
            "data/{episode_index!r}",
            "data/{episode_index:>99999999d}",
            "data/{other}",
            "data/{",
            "data/\0",
            7,
        ],
    )
    @pytest.mark.parametrize("which", ["data_path", "video_path"])
    def test_templates_that_lead_elsewhere(self, dataset, which, template):
        if json.loads((dataset / "meta/info.json").read_text())["codebase_version"] == "v3.0":
            template = str(template).replace("episode_index", "file_index") if isinstance(template, str) else template
        edit_info(dataset, **{which: template})
        with pytest.raises(DatasetError, match=r"info\.json"):
            read(dataset)

    def test_camera_names_that_lead_elsewhere(self, tmp_path):
        path = build(tmp_path / "a", "v2.1")
        edit_info(
            path,
            features={"action": {"dtype": "float32", "shape": [5]}, "../../x": {"dtype": "video", "shape": [4, 4, 3]}},
        )
        with pytest.raises(DatasetError, match="outside of its folder"):
            read(path)

    @pytest.mark.parametrize(
        "changes",
        [
            {"fps": 0},
            {"fps": -10},
            {"fps": "10"},
            {"fps": True},
            {"fps": math.nan},
            {"features": []},
            {"features": {"action": 3}},
            {"action": {"dtype": "float32", "shape": "5"}},
            {"action": {"dtype": "float32", "shape": [-5]}},
            {"action": {"dtype": "float32", "shape": [5.0]}},
            {"action": {"dtype": ["float32"], "shape": [5]}},
            {CAMERA: {"dtype": "video", "shape": [32, 48]}},
            {CAMERA: {"dtype": "video", "shape": [32, 48, 2]}},
            {"chunks_size": 0},
            {"data_path": None},
        ],
        ids=str,
    )
    def test_entries_that_make_no_sense(self, tmp_path, changes):
        path = build(tmp_path / "a", "v2.1")
        edit_info(path, **changes)
        with pytest.raises(DatasetError, match=r"info\.json"):
            read(path)

    @pytest.mark.parametrize("text", ["", "[]", "{", "null", "[" * 100_000, "\ud800".encode("utf-8", "surrogatepass")])
    def test_files_that_hold_no_object(self, dataset, text):
        (dataset / "meta/info.json").write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(DatasetError, match=r"info\.json"):
            read(dataset)

    def test_no_action(self, dataset):
        info = json.loads((dataset / "meta/info.json").read_text())
        del info["features"]["action"]
        (dataset / "meta/info.json").write_text(json.dumps(info))
        with pytest.raises(DatasetError, match=r"lists no feature 'action'; .* option action .* action\.raw"):
            read(dataset)

    def test_a_folder_that_is_no_dataset(self, tmp_path):
        with pytest.raises(DatasetError, match=r"not a LeRobot dataset: it has no meta/info\.json"):
            open_lerobot(str(tmp_path), ReadOptions())

    @pytest.mark.parametrize(
        "row", [{}, {"episode_index": 0}, {"episode_index": 0, "length": 0}, [], {"length": 2**70}]
    )
    def test_a_table_of_episodes_that_makes_no_sense(self, tmp_path, row):
        path = build(tmp_path / "a", "v2.1")
        write_lines(path / "meta/episodes.jsonl", [row])
        with pytest.raises(DatasetError, match=r"line 1 of .*episodes\.jsonl"):
            read(path)

    def test_a_length_beyond_all_memory(self, dataset):
        edit_episode(dataset, 2, length=10**12, dataset_to_index=15 + 10**12)
        with pytest.raises(DatasetError, match=r"table of episodes|shorter than the rows"):
            read(dataset)

    def test_no_episodes(self, tmp_path):
        path = build(tmp_path / "a", "v2.1")
        (path / "meta/episodes.jsonl").write_text("")
        with pytest.raises(DatasetError, match=r"table of episodes in .* is empty"):
            read(path)
        shutil.rmtree(build(tmp_path / "b", "v3.0") / "meta/episodes")
        with pytest.raises(DatasetError, match=r"table of episodes in .* is empty"):
            read(tmp_path / "b")

    @pytest.mark.parametrize("name", ["meta/episodes.jsonl", "data/chunk-000/episode_000001.parquet"])
    def test_missing_files(self, tmp_path, name):
        path = build(tmp_path / "a", "v2.1")
        (path / name).unlink()
        with pytest.raises(DatasetError, match=rf"{Path(name).name} cannot be read \(FileNotFoundError"):
            read(path)

    def test_without_pyarrow_the_command_is_named(self, dataset, monkeypatch):
        monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
        with pytest.raises(MissingDependencyError, match=r"pip install 'scd_robot\[formats\]'"):
            read(dataset)
