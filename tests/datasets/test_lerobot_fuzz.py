"""Damaged datasets: refused, or read as the libraries for the bare files read them; never a crash or another error."""

import contextlib
import shutil

import av
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scd_robot.datasets.formats import ReadOptions
from scd_robot.datasets.lerobot.reader import open_lerobot
from scd_robot.datasets.lerobot.writer import write_lerobot
from scd_robot.datasets.schema import EpisodeDataset
from scd_robot.errors import DatasetError, ScdRobotError
from scd_robot.types import ArraySpec, DatasetSpec

pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

SIZE = (32, 48)
FRONT, WRIST = "observation.images.front", "observation.images.wrist"
FUZZ = settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@st.composite
def damages(draw):
    """A function of a file's bytes: some bits flipped, at the end more often, or the end cut off."""
    flips = draw(st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.booleans(), st.integers(0, 7)), max_size=3))
    keep = draw(st.one_of(st.none(), st.floats(0, 1, exclude_max=True))) if flips else draw(st.floats(0, 0.999))

    def damage(data):
        spoiled = bytearray(data)
        for where, late, bit in flips:
            begin = max(0, len(data) - 1500) if late else 0
            spoiled[begin + int(where * (len(data) - begin))] ^= 1 << bit
        return bytes(spoiled if keep is None else spoiled[: int(keep * len(spoiled))])

    return damage


@contextlib.contextmanager
def damaged(path, damage):
    """The file is damaged within the block."""
    good = path.read_bytes()
    path.chmod(0o644)
    path.write_bytes(damage(good))
    try:
        yield
    finally:
        path.write_bytes(good)


@pytest.fixture(scope="module")
def made_up(tmp_path_factory):
    """A small dataset v3.0 with a video, PNG files, and checksums in its tables."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[: SIZE[0], : SIZE[1]]
    levels = 60 + 12 * np.arange(12)[:, None, None, None]
    arrays = {
        "state": rng.normal(size=(12, 4)).astype(np.float32),
        "front": (levels + np.stack([x / 2, y, x / 3], -1)[None]).clip(0, 255).astype(np.uint8),
        "wrist": rng.integers(0, 256, (12, 5, 7, 3), dtype=np.uint8),
    }
    spec = DatasetSpec({key: ArraySpec(value.shape[1:], str(value.dtype)) for key, value in arrays.items()}, 2, 0.1)
    arrays["action"] = rng.normal(size=(12, 2)).astype(np.float32)
    dataset = EpisodeDataset(spec, np.array([5, 12]), arrays, episode_text={"task": ["push", "pull"]})
    path = tmp_path_factory.mktemp("fuzz") / "data"
    write_lerobot(dataset, path, progress=False)
    return path


@pytest.fixture
def recorded(recordings, tmp_path_factory):
    """The real dataset v2.1, in a folder that can be written."""
    path = tmp_path_factory.getbasetemp() / "cr5"
    if not path.exists():
        shutil.copytree(recordings / "cr5_5ep_lerobot_v21", path, copy_function=shutil.copyfile)
        for folder in (path, *(entry for entry in path.rglob("*") if entry.is_dir())):
            folder.chmod(0o755)
    return path


def read(path, **options):
    return open_lerobot(str(path), ReadOptions(**options))


def pyarrows(paths, column):
    """A column of files as pyarrow alone reads it."""
    values = [
        np.asarray(value) for path in paths for value in pq.read_table(path, columns=[column])[column].to_pylist()
    ]
    return np.stack(values).astype(np.float32)


@FUZZ
@given(damage=damages())
def test_numbers_in_a_damaged_table_with_checksums(made_up, damage):
    """Every page has a checksum, so whatever is read is what was written."""
    expected = read(made_up)
    with damaged(made_up / "data/chunk-000/file-000.parquet", damage), contextlib.suppress(DatasetError):
        found = read(made_up)
        for key in ("observation.state", "action", "timestamp", WRIST):
            np.testing.assert_array_equal(found.arrays[key][:], expected.arrays[key][:])


@FUZZ
@given(damage=damages(), number=st.integers(0, 4))
def test_numbers_in_a_damaged_table_without_checksums(recorded, damage, number):
    paths = sorted((recorded / "data").rglob("*.parquet"))
    with damaged(paths[number], damage), contextlib.suppress(DatasetError):
        found = read(recorded, keys=["observation.state"], check=False)
        for key in ("observation.state", "action"):
            np.testing.assert_array_equal(found.arrays[key], pyarrows(paths, key))


@FUZZ
@given(damage=damages())
def test_frames_of_a_damaged_video(made_up, damage):
    path = made_up / "videos" / FRONT / "chunk-000/file-000.mp4"
    with damaged(path, damage), contextlib.suppress(DatasetError):
        found = read(made_up).arrays[FRONT]
        last, whole = found[11], found[:]
        np.testing.assert_array_equal(last, whole[11])
        with av.open(str(path), metadata_errors="replace") as container:
            stream = container.streams.video[0]
            frames = [(frame.pts, frame.to_ndarray(format="rgb24")) for frame in container.decode(stream)]
            times = np.array([float((pts - (stream.start_time or 0)) * stream.time_base) for pts, _ in frames])
        nearest = np.abs(times - np.arange(12)[:, None] / 10).argmin(1)
        np.testing.assert_array_equal(whole, np.stack([image for _, image in frames])[nearest])


@settings(FUZZ, max_examples=25)
@given(damage=damages())
def test_frames_of_a_damaged_real_video(recorded, damage):
    """Only whether it is refused in the words of ours; which pixels came out is compared above."""
    path = recorded / "videos/chunk-000/observation.images.top/episode_000002.mp4"
    with damaged(path, damage), contextlib.suppress(DatasetError):
        dataset = read(recorded, keys=["observation.images.top"])
        assert dataset.episode(2, ["observation.images.top"])["observation.images.top"].shape == (76, 480, 640, 3)


@FUZZ
@given(damage=damages(), name=st.sampled_from(["info.json", "tasks.parquet", "episodes/chunk-000/file-000.parquet"]))
def test_everything_under_damaged_descriptions(made_up, damage, name):
    """A damaged name may hide an array or a task; the arrays that are read are those that were written."""
    expected = read(made_up)
    with damaged(made_up / "meta" / name, damage), contextlib.suppress(ScdRobotError):
        found = read(made_up)
        assert found.episode_lengths.tolist() == [5, 7]
        for key in found.arrays.keys() & expected.arrays.keys():
            np.testing.assert_array_equal(found.arrays[key][:], expected.arrays[key][:])


@FUZZ
@given(damage=damages(), name=st.sampled_from(["info.json", "tasks.jsonl", "episodes.jsonl"]))
def test_numbers_under_damaged_descriptions_of_an_older_dataset(recorded, damage, name):
    expected = read(recorded, keys=["observation.state"])
    with damaged(recorded / "meta" / name, damage), contextlib.suppress(ScdRobotError):
        found = read(recorded)
        for key in found.arrays.keys() & {"observation.state", "action", "timestamp"}:
            np.testing.assert_array_equal(found.arrays[key], expected.arrays[key])
