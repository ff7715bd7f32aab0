import errno
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numcodecs
import numpy as np
import pytest
import zarr

from scd_robot.datasets.lazy import LazyArray
from scd_robot.datasets.open import open_dataset
from scd_robot.datasets.schema import EpisodeDataset
from scd_robot.datasets.zarr.store import open_store
from scd_robot.datasets.zarr.writer import SCHEMA, ZarrWriter
from scd_robot.errors import ConfigError, DatasetError, OutputError, ShapeError, UnknownNameError
from scd_robot.types import ArraySpec, DatasetSpec

SPEC = DatasetSpec(
    {"state": ArraySpec((3,)), "camera": ArraySpec((4, 5, 3), "uint8")}, action_dim=2, control_dt=0.05, source="test"
)


def make_episode(length, seed=0, executed=True):
    rng = np.random.default_rng(seed)
    episode = {
        "state": rng.normal(size=(length, 3)).astype(np.float32),
        "camera": np.zeros((length, 4, 5, 3), np.uint8),  # all black: its chunks must be written all the same
        "action": rng.normal(size=(length, 2)).astype(np.float32),
    }
    if executed:
        episode["executed_action"] = episode["action"] + np.float32(0.5)
    return episode


def write_store(path, lengths=(5, 2, 7), **options):
    with ZarrWriter(path, SPEC, {"note": "x"}, **options) as writer:
        for seed, length in enumerate(lengths):
            writer.append(make_episode(length, seed), {"seed": 2**32 - 1 - seed})
    return path


def limit_file_writes(monkeypatch, left):
    """The disk takes `left[0]` more files; then it is full."""
    original, lock = Path.open, threading.Lock()

    def scarce(self, mode="r", *args, **kwargs):
        if "w" in mode:
            with lock:  # zarr writes some files at the same time
                left[0] -= 1
                full = left[0] < 0
            if full:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))
        return original(self, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", scarce)


def assert_episodes(dataset, lengths):
    assert dataset.episode_lengths.tolist() == list(lengths)
    for index, length in enumerate(lengths):
        expected = make_episode(length, index)
        episode = dataset.episode(index)
        assert set(episode) == set(expected)
        for key, values in expected.items():
            np.testing.assert_array_equal(episode[key], values)


@pytest.fixture
def store(tmp_path):
    return write_store(tmp_path / "a.zarr")


def test_what_is_written_is_read_back(store):
    dataset = open_store(store)
    assert_episodes(dataset, [5, 2, 7])
    assert dataset.spec == SPEC
    assert dataset.metadata == {"note": "x"}
    assert dataset.episode_info["seed"].tolist() == [2**32 - 1, 2**32 - 2, 2**32 - 3]
    assert {key: str(array.dtype) for key, array in dataset.arrays.items()} == {
        "state": "float32", "camera": "uint8", "action": "float32", "executed_action": "float32",
    }  # fmt: skip


def test_many_chunks_are_read_back(tmp_path, monkeypatch):
    monkeypatch.setattr("scd_robot.datasets.zarr.writer._CHUNK_ROWS", 4)
    assert_episodes(open_store(write_store(tmp_path / "a.zarr", (5, 2, 7, 30))), [5, 2, 7, 30])


def test_files_follow_format_2_with_blosc(store):
    """Read by the text of the format alone, as zarr 2 and diffusion_policy do."""

    def read(name):
        header = json.loads((store / name / ".zarray").read_text())
        assert header["zarr_format"] == 2
        assert header["compressor"]["id"] == "blosc"
        assert (header["filters"], header["order"], header["dimension_separator"]) == (None, "C", ".")
        assert header["chunks"][1:] == header["shape"][1:]
        raw = (store / name / ".".join("0" for _ in header["shape"])).read_bytes()
        chunk = np.frombuffer(numcodecs.get_codec(header["compressor"]).decode(raw), header["dtype"])
        return chunk.reshape(header["chunks"])[: header["shape"][0]]

    assert json.loads((store / ".zgroup").read_text()) == {"zarr_format": 2}
    assert read("meta/episode_ends").tolist() == [5, 7, 14]
    assert read("meta/episode_ends").dtype == np.int64
    expected = np.concatenate([make_episode(n, i)["state"] for i, n in enumerate([5, 2, 7])])
    np.testing.assert_array_equal(read("data/state"), expected)
    assert json.loads((store / ".zattrs").read_text())["scd_robot"]["schema"] == SCHEMA


def test_keys_choose_the_observations(store):
    dataset = open_dataset(store, keys=["state"])
    assert set(dataset.arrays) == {"state", "action", "executed_action"}
    assert set(dataset.spec.observation) == {"state"}
    with pytest.raises(UnknownNameError, match="did you mean 'state'"):
        open_dataset(store, keys=["stata"])


def test_numbers_of_double_precision_are_read_as_any_others(store):
    before = open_dataset(store)
    group = zarr.open_group(store, mode="r+")
    for key in ("action", next(iter(before.spec.observation))):
        values = group[f"data/{key}"][:]
        if values.dtype == np.float32:
            del group[f"data/{key}"]
            group.create_array(f"data/{key}", data=values.astype(np.float64))
    after = open_dataset(store)
    assert after.arrays["action"].dtype == np.float32  # torch multiplies no doubles with the weights of a model
    np.testing.assert_array_equal(after.arrays["action"], before.arrays["action"])
    assert {key: array.dtype for key, array in after.arrays.items()} == {
        key: array.dtype for key, array in before.arrays.items()
    }


def test_a_note_that_is_not_of_all_episodes_is_left_out(tmp_path, caplog):
    """As earlier versions wrote it where an episode came without."""
    path = tmp_path / "a.zarr"
    with ZarrWriter(path, SPEC) as writer:
        for index, length in enumerate((5, 2, 7)):
            text = {"task": "lift", "place": "lab", "name": str(index)}
            writer.append(make_episode(length, index), {"seed": index, "success": 1}, text)
    meta = zarr.open_group(path, mode="r+")["meta"]
    meta["episode_success"].resize((2,))
    meta["text_task_ends"].resize((2,))
    meta["text_place_ends"][1] = -1
    dataset = open_dataset(path)
    assert_episodes(dataset, [5, 2, 7])
    assert {name: values.tolist() for name, values in dataset.episode_info.items()} == {"seed": [0, 1, 2]}
    assert {name: list(values) for name, values in dataset.episode_text.items()} == {"name": ["0", "1", "2"]}
    for name in ("episode_success", "text_task_ends", "text_place_ends"):
        assert f"{name} is left out: 2 of 3 episodes have it" in caplog.text


def test_executed_falls_back_to_action(tmp_path):
    with ZarrWriter(tmp_path / "a.zarr", SPEC) as writer:
        writer.append(make_episode(3, executed=False))
    dataset = open_store(tmp_path / "a.zarr")
    np.testing.assert_array_equal(dataset.executed(), dataset.arrays["action"])
    dataset = open_store(write_store(tmp_path / "b.zarr"))
    np.testing.assert_array_equal(dataset.executed(), dataset.arrays["action"] + np.float32(0.5))


def test_fractions_after_whole_numbers_are_kept(tmp_path):
    rewards, scores = ([0, 0, 0], [True, False, True], [0.75, 0.5, 0.25]), (1, 0.7, np.float32(0.25))
    with ZarrWriter(tmp_path / "a.zarr", SPEC) as writer:
        for reward, score in zip(rewards, scores, strict=True):
            extra = {"reward": np.asarray(reward), "force": reward}
            writer.append({**make_episode(3), **extra}, {"score": score, "seed": 2**62 + 1})
    dataset = open_store(tmp_path / "a.zarr")
    assert dataset.arrays["reward"].tolist() == dataset.arrays["force"].tolist() == [0, 0, 0, 1, 0, 1, 0.75, 0.5, 0.25]
    assert dataset.episode_info["score"].tolist() == [1, 0.7, 0.25]
    assert dataset.episode_info["seed"].tolist() == [2**62 + 1] * 3  # float64 has no such number
    with ZarrWriter(tmp_path / "b.zarr", SPEC) as writer:
        writer.append(make_episode(3), {"seed": 1})
        with pytest.raises(ShapeError, match=f"'seed' of episode 1 .* a number that float64 holds.* got {2**62 + 1}"):
            writer.append(make_episode(3), {"seed": 2**62 + 1})


class TestWriterRefuses:
    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"state": np.zeros((4, 2), np.float32)}, ShapeError, r"'state' must be \(4, 3\), got \(4, 2\)"),
            ({"state": np.zeros((3, 3), np.float32)}, ShapeError, r"'state' must be \(4, 3\), got \(3, 3\)"),
            ({"action": np.zeros((4, 1), np.float32)}, ShapeError, r"'action' must be \(4, 2\)"),
            ({"extra": np.zeros((4, 1), np.float32)}, ShapeError, "must have the keys"),
            ({"state": np.full((4, 3), np.inf, np.float32)}, DatasetError, "'state' .* NaN or infinite .* step 0"),
        ],
    )
    def test_an_episode_that_does_not_fit(self, tmp_path, change, error, message):
        with ZarrWriter(tmp_path / "a.zarr", SPEC) as writer:
            writer.append(make_episode(5, 0))
            with pytest.raises(error, match=message):
                writer.append({**make_episode(4), **change})
        assert_episodes(open_store(tmp_path / "a.zarr"), [5])

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"camera": np.full((4, 4, 5, 3), 0.5)}, r"'camera' of episode 1 .*uint8, got float64.*255 \* picture"),
            ({"camera": np.full((4, 4, 5, 3), 99.5)}, r"of 99.5 to 99.5, .*give np.round\(picture\).astype"),
            ({"camera": np.full((4, 4, 5, 3), 599)}, "got int64 of 599 to 599.*bring pictures to 0 to 255"),
            ({"camera": np.full((4, 4, 5, 3), -1, np.int8)}, "bring pictures to 0 to 255"),
            ({"gripper": np.full(4, 0.5)}, "'gripper' of episode 1 .*int64, got float64.*float64 from the first"),
            ({"half": np.full(4, 1 / 3)}, "'half' .*float16, got float64"),
            ({"state": np.full((4, 3), "x")}, "'state' .*must hold numbers, got <U1"),
        ],
    )
    def test_numbers_that_would_become_others(self, tmp_path, change, message):
        extra = {"gripper": np.arange(4), "half": np.ones(4, np.float16)}
        with ZarrWriter(tmp_path / "a.zarr", SPEC) as writer:
            writer.append({**make_episode(4), **extra})
            with pytest.raises(ShapeError, match=message):
                writer.append({**make_episode(4), **extra, **change})
            whole = {"camera": np.full((4, 4, 5, 3), 200.0), "gripper": np.full(4, 2.0), "state": np.full((4, 3), 0.1)}
            writer.append({**make_episode(4), **extra, **whole})
        dataset = open_store(tmp_path / "a.zarr")
        assert dataset.num_episodes == 2
        assert (dataset.episode(1)["camera"] == 200).all()
        assert (dataset.episode(1)["state"] == np.float32(0.1)).all()

    @pytest.mark.parametrize("kind", ["info", "text"])
    @pytest.mark.parametrize(("first", "second"), [(("a",), ()), ((), ("a",)), (("a",), ("a", "b"))])
    @pytest.mark.parametrize("overwrite", [False, True])
    def test_an_episode_with_other_notes(self, tmp_path, kind, first, second, overwrite):
        value = 1 if kind == "info" else "lift"
        path = write_store(tmp_path / "a.zarr") if overwrite else tmp_path / "a.zarr"
        with ZarrWriter(path, SPEC, overwrite=overwrite) as writer:
            writer.append(make_episode(5, 0), **{kind: dict.fromkeys(first, value)})
            with pytest.raises(ShapeError, match=re.escape(f"got {list(second)}; note the same")):
                writer.append(make_episode(4, 1), **{kind: dict.fromkeys(second, value)})
            writer.append(make_episode(4, 1), **{kind: dict.fromkeys(first, value)})
        dataset = open_store(path)
        assert_episodes(dataset, [5, 4])
        noted = dataset.episode_info if kind == "info" else dataset.episode_text
        assert {name: list(values) for name, values in noted.items()} == {key: [value, value] for key in first}

    @pytest.mark.parametrize(
        ("notes", "error", "message"),
        [
            ({"info": {"score": "good"}}, ShapeError, "'score' of episode 0 .* must be a number, got 'good'.*`text`"),
            ({"info": {"score": 2**70}}, ShapeError, "must be a number"),
            ({"info": {"score": [1]}}, ShapeError, "must be a number"),
            ({"info": {"ends": 1}}, ConfigError, "'ends' cannot be the name"),
            ({"text": {"task": 3}}, ShapeError, "'task' of episode 0 .* must be a text, got 3.*`info`"),
        ],
    )
    def test_notes_of_another_kind(self, tmp_path, notes, error, message):
        with ZarrWriter(tmp_path / "a.zarr", SPEC) as writer:
            with pytest.raises(error, match=message):
                writer.append(make_episode(4), **notes)
            writer.append(make_episode(5, 0))
        assert_episodes(open_store(tmp_path / "a.zarr"), [5])

    def test_an_episode_of_one_step(self, tmp_path):
        with pytest.raises(DatasetError, match="at least 2 steps"), ZarrWriter(tmp_path / "a.zarr", SPEC) as writer:
            writer.append(make_episode(1))
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        "observation",
        [{"a/b": ArraySpec((3,))}, {"action": ArraySpec((3,))}, {"x": ArraySpec((3,), "float64")}],
    )
    def test_an_observation_that_cannot_be_stored(self, tmp_path, observation):
        with pytest.raises(ConfigError, match=repr(next(iter(observation)))):
            ZarrWriter(tmp_path / "a.zarr", DatasetSpec(observation, 1, 0.1))

    def test_a_path_that_exists(self, store):
        with pytest.raises(OutputError, match=r"exists already.*--overwrite"):
            write_store(store, (3,))
        assert_episodes(open_store(store), [5, 2, 7])

    def test_to_replace_a_folder_that_is_no_store(self, tmp_path):
        (tmp_path / "papers").mkdir()
        (tmp_path / "papers" / "thesis.txt").write_text("years of work")
        with pytest.raises(OutputError, match="will not be replaced"):
            write_store(tmp_path / "papers", overwrite=True)
        assert (tmp_path / "papers" / "thesis.txt").exists()

    def test_a_parent_that_is_a_file(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(OutputError, match=r"cannot write the dataset .*choose another path"):
            write_store(tmp_path / "file" / "a.zarr")

    def test_no_permission(self, tmp_path, monkeypatch):
        def refuse(self, *args, **kwargs):
            raise PermissionError(errno.EACCES, "Permission denied", str(self))

        monkeypatch.setattr(Path, "mkdir", refuse)
        with pytest.raises(OutputError, match="no write permission"):
            write_store(tmp_path / "a.zarr")


@pytest.mark.parametrize("allowed", range(4))
def test_full_disk_at_the_start_leaves_nothing(tmp_path, monkeypatch, allowed):
    limit_file_writes(monkeypatch, [allowed])
    with pytest.raises(OutputError, match="disk is full"):
        write_store(tmp_path / "a.zarr")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_zarr_writes_late_does_not_outlive_a_failed_start(tmp_path, monkeypatch):
    """Zarr writes the two headers of a group at once; here one fails while the other is still on its way."""
    failed, late = threading.Event(), threading.Event()

    def one_fails_and_one_is_late(self, target):
        if Path(target).name == ".zgroup":
            failed.set()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))
        assert failed.wait(timeout=30)
        time.sleep(0.2)
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        Path(target).touch()
        late.set()

    monkeypatch.setattr(Path, "replace", one_fails_and_one_is_late)
    with pytest.raises(OutputError, match="disk is full"):
        write_store(tmp_path / "a.zarr")
    assert late.wait(timeout=30)
    assert list(tmp_path.iterdir()) == []


def test_failed_swap_keeps_the_old_store(store, monkeypatch):
    original = Path.rename

    def refuse_the_new(self, target):
        if Path(target) == store and self.parent == store.parent:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        return original(self, target)

    monkeypatch.setattr(Path, "rename", refuse_the_new)
    with pytest.raises(OutputError, match="busy"):
        write_store(store, (4,), overwrite=True)
    assert_episodes(open_store(store), [5, 2, 7])


def write_and_raise(path, error, **options):
    with ZarrWriter(path, SPEC, **options) as writer:
        writer.append(make_episode(4, 0))
        raise error


def test_overwrite_replaces_the_store_when_it_is_complete(store):
    with ZarrWriter(store, SPEC, overwrite=True) as writer:
        writer.append(make_episode(4, 0))
        assert_episodes(open_store(store), [5, 2, 7])
    assert_episodes(open_store(store), [4])
    assert [path.name for path in store.parent.iterdir()] == [store.name]


def test_overwrite_that_fails_keeps_old_and_new_episodes(store, caplog):
    with pytest.raises(RuntimeError, match="stop"):
        write_and_raise(store, RuntimeError("stop"), overwrite=True)
    assert_episodes(open_store(store), [5, 2, 7])
    (kept,) = [path for path in store.parent.iterdir() if path != store]
    assert str(kept) in caplog.text
    assert_episodes(open_store(kept), [4])


def test_interrupted_recording_keeps_finished_episodes(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        write_and_raise(tmp_path / "a.zarr", KeyboardInterrupt())
    assert_episodes(open_store(tmp_path / "a.zarr"), [4])


@pytest.mark.parametrize("allowed", range(0, 16))
def test_full_disk_at_any_write_keeps_finished_episodes(tmp_path, monkeypatch, allowed):
    """After two episodes the disk takes `allowed` more files and then no more, not even for tidying up."""
    left = [10**9]
    limit_file_writes(monkeypatch, left)
    path = tmp_path / "a.zarr"
    written = []

    def record():
        with ZarrWriter(path, SPEC) as writer:
            for index in range(4):
                if index == 2:
                    left[0] = allowed
                writer.append(make_episode(5, index), {"seed": index})
                written.append(5)

    with pytest.raises(OutputError, match=r"disk is full.*finished episodes are kept"):
        record()
    assert len(written) >= 2
    assert_episodes(open_store(path), written)


def test_a_kill_between_any_two_file_operations_keeps_finished_episodes(tmp_path, monkeypatch):
    """A copy of the store before and after each rename is what a kill at that moment would leave."""
    path, snapshots, done = tmp_path / "a.zarr", [], [0]
    original, lock = Path.replace, threading.Lock()

    def take_snapshot():
        copy = tmp_path / f"snapshot{len(snapshots)}"
        shutil.copytree(path, copy, ignore=shutil.ignore_patterns("*.partial"))  # these come and go
        snapshots.append((copy, done[0]))

    def watched(self, target):
        with lock:  # zarr writes some files at the same time
            take_snapshot()
            original(self, target)
            take_snapshot()

    monkeypatch.setattr(Path, "replace", watched)
    with ZarrWriter(path, SPEC) as writer:
        for index in range(3):
            writer.append(make_episode(5, index), {"seed": index})
            done[0] += 1
    unwritten = 0
    for copy, finished in snapshots:
        raw = zarr.open_group(copy, mode="r").get("meta/episode_ends") if (copy / ".zgroup").is_file() else None
        if raw is None or raw.shape[0] == 0 or raw[0] == -1:
            assert finished == 0
            with pytest.raises(DatasetError):
                open_dataset(copy)
            continue
        unwritten += int(raw[-1] == -1)
        dataset = open_dataset(copy)
        assert dataset.num_episodes in (finished, finished + 1)
        assert_episodes(dataset, [5] * dataset.num_episodes)
    assert unwritten > 0  # the moment between the growth of episode_ends and its value was among them


def test_kill_9_leaves_a_readable_store(tmp_path):
    code = """
import itertools, sys
import numpy as np
from scd_robot.datasets.zarr.writer import ZarrWriter
from scd_robot.types import ArraySpec, DatasetSpec
with ZarrWriter(sys.argv[1], DatasetSpec({"state": ArraySpec((3,))}, 2, 0.1)) as writer:
    for index in itertools.count():
        writer.append({"state": np.full((5, 3), index), "action": np.full((5, 2), index)})
        print(index, flush=True)
"""
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "a.zarr")], stdout=subprocess.PIPE) as process:
        for _ in range(5):
            last = int(process.stdout.readline())
        process.send_signal(signal.SIGKILL)
    dataset = open_dataset(tmp_path / "a.zarr")
    assert dataset.num_episodes > last
    expected = np.repeat(np.arange(dataset.num_episodes, dtype=np.float32), 5)
    np.testing.assert_array_equal(dataset.arrays["state"][:, 0], expected)


class TestReaderRefuses:
    def test_nothing_there(self, tmp_path):
        with pytest.raises(DatasetError, match="no dataset at"):
            open_dataset(tmp_path / "a.zarr")

    def test_a_folder_or_file_of_another_kind(self, tmp_path):
        (tmp_path / "a.bin").write_bytes(b"HDF")
        for path in (tmp_path, tmp_path / "a.bin"):
            with pytest.raises(DatasetError, match=r"not a dataset in a known format.*scd_robot\.datasets\.ZarrWriter"):
                open_dataset(path)

    def test_a_folder_with_datasets_in_it(self, store, tmp_path):
        (tmp_path / "shelf/of/more").mkdir(parents=True)
        for number in range(5):
            shutil.copytree(store, tmp_path / f"shelf/of/{number}.zarr")
        with pytest.raises(DatasetError, match=r"give one of them: .*shelf/of/0\.zarr, .*3\.zarr, \.\.\.$"):
            open_dataset(tmp_path / "shelf")

    @pytest.mark.parametrize("name", ["data/action", "data/state", "meta/episode_ends", "data", "meta"])
    def test_a_missing_array(self, store, name):
        shutil.rmtree(store / name)
        with pytest.raises((DatasetError, UnknownNameError), match=name.split("/")[-1]):
            open_dataset(store)

    def test_a_truncated_chunk(self, store):
        chunk = store / "data/state/0.0"
        chunk.write_bytes(chunk.read_bytes()[:40])
        with pytest.raises(DatasetError, match=r"data/state cannot be read.*damaged"):
            open_dataset(store)

    @pytest.mark.parametrize("key", ["state", "camera", "action"])
    def test_a_lost_chunk(self, store, key):
        (chunk,) = (store / "data" / key).glob("0.*")
        chunk.unlink()
        with pytest.raises(DatasetError, match=f"{key} has lost its chunk 0.0"):
            open_dataset(store)

    def test_metadata_that_is_no_json(self, store):
        (store / ".zattrs").write_text('{"scd_robot": {"sch')
        with pytest.raises(DatasetError, match="cannot be read"):
            open_dataset(store)

    def test_a_schema_of_the_future(self, store):
        attributes = json.loads((store / ".zattrs").read_text())
        attributes["scd_robot"]["schema"] = SCHEMA + 1
        (store / ".zattrs").write_text(json.dumps(attributes))
        with pytest.raises(DatasetError, match=f"has schema {SCHEMA + 1}, this version reads {SCHEMA}"):
            open_dataset(store)

    def test_a_header_without_specification(self, store):
        (store / ".zattrs").write_text(json.dumps({"scd_robot": {"schema": SCHEMA}}))
        with pytest.raises(DatasetError, match="KeyError: 'spec'"):
            open_dataset(store)

    def test_values_that_are_not_finite(self, store):
        array = zarr.open_group(store, mode="r+")["data/action"]
        array[6, 1] = np.nan
        with pytest.raises(DatasetError, match=r"'action' .* first in episode 1 at step 1"):
            open_dataset(store)

    @pytest.mark.parametrize("ends", [[5, 5, 14], [0, 7, 14], [5, 4, 14], [-1, 7, 14], [5, -1, 14]])
    def test_ends_that_do_not_increase(self, store, ends):
        zarr.open_group(store, mode="r+")["meta/episode_ends"][:] = ends
        with pytest.raises(DatasetError, match=r"episode_ends .* must increase"):
            open_dataset(store)

    def test_ends_beyond_the_data(self, store):
        zarr.open_group(store, mode="r+")["meta/episode_ends"][2] = 15
        with pytest.raises(DatasetError, match="has 14 rows, but its episodes have 15"):
            open_dataset(store)

    def test_an_episode_of_one_step(self, store):
        zarr.open_group(store, mode="r+")["meta/episode_ends"][1] = 6
        with pytest.raises(DatasetError, match="episode 1 has 1"):
            open_dataset(store)

    @pytest.mark.parametrize("place", ["dtype", "compressor", "filters"])
    def test_pickled_objects_without_running_them(self, store, tmp_path, place):
        class Payload:
            def __reduce__(self):
                return (Path.touch, (tmp_path / "was_run",))

        codec = numcodecs.Pickle()
        chunk = io.BytesIO(codec.encode(np.array([Payload()], dtype=object))).getvalue()
        folder = store / "data/state"
        header = json.loads((folder / ".zarray").read_text())
        changes = {
            "dtype": {"dtype": "|O", "filters": [{"id": "pickle", "protocol": 5}], "fill_value": None},
            "compressor": {"compressor": {"id": "pickle", "protocol": 5}},
            "filters": {"filters": [{"id": "pickle", "protocol": 5}], "compressor": None},
        }[place]
        (folder / ".zarray").write_text(json.dumps({**header, "compressor": None, **changes}))
        (folder / "0.0").write_bytes(chunk)
        with pytest.raises(DatasetError, match="data/state"):
            open_dataset(store)
        assert not (tmp_path / "was_run").exists()


def foreign_store(path, format_of_zarr=2):
    """As diffusion_policy writes them: no attributes, float64 allowed, one array without a second axis."""
    group = zarr.open_group(path, mode="w", zarr_format=format_of_zarr)
    rows = np.arange(10.0)
    arrays = {
        "data/state": np.stack([rows, rows], 1),
        "data/img": np.ones((10, 4, 4, 3), np.uint8),
        "data/n_contacts": np.arange(10),
        "data/action": np.stack([rows, -rows], 1),
        "meta/episode_ends": np.asarray([4, 10]),
    }
    for name, values in arrays.items():
        group.create_array(name, data=values)
    return path


@pytest.mark.parametrize("format_of_zarr", [2, 3])
def test_foreign_store_is_read(tmp_path, format_of_zarr):
    dataset = open_dataset(foreign_store(tmp_path / "a.zarr", format_of_zarr))
    assert dataset.episode_lengths.tolist() == [4, 6]
    assert dataset.spec.observation == {
        "img": ArraySpec((4, 4, 3), "uint8"), "n_contacts": ArraySpec((1,)), "state": ArraySpec((2,)),
    }  # fmt: skip
    assert dataset.arrays["state"].dtype == np.float32
    np.testing.assert_array_equal(dataset.episode(-1)["action"][:, 1], -np.arange(4, 10, dtype=np.float32))


def test_foreign_store_states_where_its_control_dt_comes_from(tmp_path):
    path = foreign_store(tmp_path / "a.zarr")
    assumed, given = open_dataset(path).spec, open_dataset(path, control_dt=0.02).spec
    assert (assumed.control_dt, given.control_dt) == (0.1, 0.02)
    assert "control_dt 0.1 s assumed" in assumed.source
    assert "assumed" not in given.source


def test_human_pusht_recording_is_read(recordings):
    path = recordings / "pusht_cchi_v7_zarr" / "pusht_cchi_v7_replay.zarr"
    if not path.is_dir():
        pytest.skip(f"no recording of PushT at {path}")
    dataset = open_dataset(path, keys=["state", "keypoint"])
    assert (dataset.num_episodes, dataset.num_steps) == (206, 25650)
    assert dataset.spec.observation == {"state": ArraySpec((5,)), "keypoint": ArraySpec((9, 2))}
    assert dataset.spec.action_dim == 2
    assert 0 <= dataset.arrays["state"].min() <= dataset.arrays["state"].max() <= 512


def test_episode_counts_from_both_ends():
    dataset = EpisodeDataset(SPEC, np.asarray([2, 5]), {"action": np.arange(10).reshape(5, 2)})
    np.testing.assert_array_equal(dataset.episode(-1)["action"], dataset.episode(1)["action"])
    assert dataset.episode(0)["action"].base is not None  # a view
    for index in (2, -3):
        with pytest.raises(IndexError, match="2 episodes"):
            dataset.episode(index)


def test_check_names_an_array_of_another_length():
    arrays = make_episode(6)
    arrays["state"] = arrays["state"][:5]
    with pytest.raises(DatasetError, match=r"'state' of here must be \(6, 3\).*got \(5, 3\)"):
        EpisodeDataset(SPEC, np.asarray([6]), arrays).check("here")


def test_check_refuses_no_episodes():
    with pytest.raises(DatasetError, match="no finished episode"):
        EpisodeDataset(SPEC, np.asarray([], np.int64), {}).check()


def test_large_rows_stay_on_disk_whatever_their_dtype(tmp_path):
    """Depth, for example; small ones are loaded."""
    depth = np.random.default_rng(0).random((6, 24, 24, 1)).astype(np.float32)
    spec = DatasetSpec({"depth": ArraySpec((24, 24, 1)), "points": ArraySpec((5, 3))}, 1, 0.1, "test")
    with ZarrWriter(tmp_path / "a.zarr", spec) as writer:
        writer.append({"depth": depth, "points": np.zeros((6, 5, 3)), "action": np.zeros((6, 1))})
    arrays = open_store(tmp_path / "a.zarr").arrays
    assert isinstance(arrays["depth"], LazyArray)
    np.testing.assert_array_equal(arrays["depth"][1:4], depth[1:4])
    assert isinstance(arrays["points"], np.ndarray)


def test_a_text_is_not_called_as_the_ends_of_another(tmp_path):
    with ZarrWriter(tmp_path / "a.zarr", SPEC) as writer, pytest.raises(ConfigError, match="'a_ends' cannot be"):
        writer.append(make_episode(3), text={"a": "x", "a_ends": "y"})


def test_half_a_character_in_a_text_costs_no_episode(tmp_path):
    with ZarrWriter(tmp_path / "a.zarr", SPEC) as writer:
        writer.append(make_episode(3), text={"task": "push \ud83d now"})
    assert open_store(tmp_path / "a.zarr").episode_text["task"][0] == "push ? now"


def test_depth_of_double_precision_is_read_as_any_other(tmp_path):
    """By other programs; ours stores float32."""
    depth = np.random.default_rng(0).random((6, 24, 24, 1))
    spec = DatasetSpec({"depth": ArraySpec((24, 24, 1))}, 1, 0.1, "test")
    with ZarrWriter(tmp_path / "a.zarr", spec) as writer:
        writer.append({"depth": depth.astype(np.float32), "action": np.zeros((6, 1))})
    group = zarr.open_group(tmp_path / "a.zarr", mode="a")
    del group["data/depth"]
    group.create_array("data/depth", shape=depth.shape, dtype=depth.dtype, chunks=depth.shape)[:] = depth
    found = open_store(tmp_path / "a.zarr").arrays["depth"]
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found[:], depth.astype(np.float32))


def test_a_damaged_episode_is_named_as_its_recording_counts_it(tmp_path):
    with ZarrWriter(tmp_path / "a.zarr", SPEC) as writer:
        writer.append(make_episode(5, 0))
        bad = make_episode(5, 1)
        bad["state"][3, 0] = np.nan
        with pytest.raises(DatasetError, match=r"first in episode 1 at step 3.*--drop 1"):
            writer.append(bad)
        with pytest.raises(DatasetError, match=r"first in episode 7 at step 3.*--drop 7"):
            writer.append(bad, number=7)
        short = {key: value[:1] for key, value in make_episode(5, 1).items()}
        with pytest.raises(DatasetError, match="but episode 1 has 1; leave out with --drop: 1"):
            writer.append(short)


def test_numbers_that_float32_cannot_tell_apart_are_told(tmp_path, caplog):
    with ZarrWriter(tmp_path / "a.zarr", SPEC) as writer:
        episode = make_episode(5, 0)
        writer.append(episode)
        assert caplog.text == ""
        episode["state"] = np.arange(episode["state"].size).reshape(episode["state"].shape) + 2.0**40
        writer.append(episode)
    assert "too large for float32 to tell apart" in caplog.text
