"""Writes LeRobot datasets of version 3.0.

    meta/info.json                                  features, control steps per second, templates of the paths below
    meta/stats.json                                 statistics of all episodes
    meta/tasks.parquet                              tasks in words
    meta/episodes/chunk-000/file-000.parquet        which files an episode is in, and its statistics
    data/chunk-000/file-000.parquet                 numbers, and images that are not in videos, as PNG files
    videos/KEY/chunk-000/file-000.mp4               images

Shapes: T control steps of an episode, H W C an image.
"""

import contextlib
import json
import logging
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from scd_robot.datasets.lazy import RowArray
from scd_robot.datasets.lerobot.statistics import histogram, image_stats, joined, number_stats
from scd_robot.datasets.lerobot.tables import import_parquet
from scd_robot.datasets.schema import DONE, PRESENT, REWARD, TIMESTAMP, EpisodeDataset, tell_unread
from scd_robot.datasets.video import PIXEL_FORMATS, encode_png, encode_video, exact_rate
from scd_robot.errors import ConfigError, DatasetError, OutputError
from scd_robot.output import check_local, dataset_output, replace_folder, write_json

__all__ = ["write_lerobot"]

logger = logging.getLogger(__name__)

DATA_BYTES = 100 << 20  # of a file, after which the next episode begins another
VIDEO_BYTES = 200 << 20
CHUNK_SIZE = 1000  # files in a folder

_DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
_VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
_PREFIX = "observation."
_EXTRAS = {REWARD: "next.reward", DONE: "next.done"}
_SUCCESS = "next.success"
_BOOKKEEPING = {"timestamp": "float32"} | dict.fromkeys(
    ("frame_index", "episode_index", "index", "task_index"), "int64"
)
_BLOCK_BYTES = 1 << 26  # of images in memory at a time
_TIME_TOLERANCE_S = 1e-4  # LeRobot's


@dataclass(frozen=True)
class _Column:
    """A feature: `key` in the dataset, `name` in LeRobot, `kind` "number", "image" or "video"."""

    key: str
    name: str
    kind: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class _Episode:
    """A row of the table of episodes, and statistics by feature; both are filled while the files are written."""

    row: dict[str, Any]
    stats: dict[str, dict[str, NDArray[Any]]]
    rows: slice
    task: str


@dataclass(frozen=True)
class _Job:
    """What is written where; `fps` control steps per second, `shown` the name at progress bars, None = no bars."""

    dataset: EpisodeDataset
    columns: Sequence[_Column]
    folder: Path
    fps: float
    episodes: Sequence[_Episode]
    tasks: Sequence[str]
    shown: str | None

    def bar(self, what: str) -> Any:
        return tqdm(total=len(self.episodes), desc=f"{self.shown}: {what}", unit="episode", disable=self.shown is None)


def write_lerobot(
    dataset: EpisodeDataset, path: Path | str, *, overwrite: bool = False, video: bool = True, progress: bool = True
) -> dict[str, Any]:
    """Writes all episodes as a LeRobot dataset v3.0, at most an episode's numbers and some images in memory at a time.

    Observations without it get the prefix "observation.", images "observation.images."; rewards and ends become
    "next.reward" and "next.done", an episode's success "next.success" in its last step. Numbers are kept exactly.
    Images with three channels and even sizes become H.264 video (yuv420p, crf 18): at least 35 dB peak signal-to-noise
    ratio on camera pictures. Other images, and all where `video` is False, become PNG files in the tables, without
    loss. Times are step / rate, as LeRobot wants them. Other numbers and texts about episodes than the task and the
    success have no place in the format.

    Args:
        dataset: to write.
        path: of the new folder.
        overwrite: replace a LeRobot dataset at `path`.
        video: write videos.
        progress: show bars.

    Returns:
        `path`, `episodes`, `steps` and `bytes` of all files.

    Raises:
        ConfigError: a key cannot be the name of a feature.
        DatasetError: there are no episodes, or the dataset cannot be read; `path` is as it was.
        OutputError: something is at `path` already, or it cannot be written; `path` is as it was.
        MissingDependencyError: pyarrow is not installed.
    """
    import_parquet()
    target = Path(path)
    columns = _columns(dataset, video)
    if dataset.num_episodes == 0:
        raise DatasetError(f"{dataset.spec.source or 'the dataset'} holds no episode to write")
    _check_target(target, overwrite)
    _tell_losses(dataset)
    with dataset_output(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        try:
            folder.chmod(0o755)
            _write(_job(dataset, columns, folder, target.name if progress else None))
            size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
            replace_folder(folder, target)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
    return {"path": str(target), "episodes": dataset.num_episodes, "steps": dataset.num_steps, "bytes": size}


def _columns(dataset: EpisodeDataset, video: bool) -> list[_Column]:
    """What to write of the dataset's arrays, and how."""
    columns = []
    for key, array in dataset.arrays.items():
        shape = array.shape[1:] or (1,)
        name, kind = _EXTRAS.get(key, key), "number"
        if key in dataset.spec.observation:
            name = _feature_name(dataset, key)
            if _is_image(array):
                fits = shape[2] == 3 and shape[0] % 2 == shape[1] % 2 == 0
                kind = "video" if video and fits else "image"
        elif (seen := key.removeprefix(PRESENT)) != key and seen in dataset.spec.observation:
            name = PRESENT + _feature_name(dataset, seen)
        if key != TIMESTAMP:
            columns.append(_Column(key, name, kind, str(array.dtype), shape))
    taken = Counter([*(column.name for column in columns), *_BOOKKEEPING])
    if "success" in dataset.episode_info:
        taken[_SUCCESS] += 1
    for column in columns:
        if "/" in column.name or taken[column.name] > 1:
            why = "holds '/'" if "/" in column.name else "is there twice"
            raise ConfigError(f"{column.key!r} cannot be a feature {column.name!r} of LeRobot's: it {why}; rename it")
        if np.dtype(column.dtype).kind not in "biuf" or len(column.shape) > 5 or 0 in column.shape:
            raise ConfigError(
                f"{column.key!r} must hold numbers in at most 5 axes, got {column.dtype} {column.shape}; leave it out"
            )
    return columns


def _is_image(array: RowArray) -> bool:
    return array.dtype == np.uint8 and len(array.shape) == 4 and array.shape[3] in PIXEL_FORMATS


def _feature_name(dataset: EpisodeDataset, key: str) -> str:
    """What LeRobot calls an observation."""
    if key.startswith(_PREFIX):
        return key
    return f"{_PREFIX}images.{key}" if _is_image(dataset.arrays[key]) else _PREFIX + key


def _tell_losses(dataset: EpisodeDataset) -> None:
    lost = (set(dataset.episode_info) | set(dataset.episode_text)) - {"success", "task"}
    tell_unread(dataset, _EXTRAS)
    if lost:
        logger.info("LeRobot's format has no place for what is noted about episodes: %s", ", ".join(sorted(lost)))
    if TIMESTAMP in dataset.arrays:
        steps = np.concatenate([np.arange(length) for length in dataset.episode_lengths])
        off = np.abs(np.asarray(dataset.arrays[TIMESTAMP][:], np.float64) - steps * dataset.spec.control_dt).max()
        if off > _TIME_TOLERANCE_S:
            logger.warning("recorded times differ by up to %.4g s from regular ones, which are written instead", off)


def _job(dataset: EpisodeDataset, columns: Sequence[_Column], folder: Path, shown: str | None) -> _Job:
    rate = exact_rate(1 / dataset.spec.control_dt)  # one for all files: clocks that differ drift apart
    fps = rate.numerator if rate.denominator == 1 else float(rate)
    texts = dataset.episode_text.get("task") or [""] * dataset.num_episodes
    episodes = []
    for index, task in enumerate(texts):
        rows = dataset.rows(index)
        row = {"episode_index": index, "tasks": [task], "length": rows.stop - rows.start}
        row |= {"dataset_from_index": rows.start, "dataset_to_index": rows.stop}
        episodes.append(_Episode(row, {}, rows, task))
    return _Job(dataset, columns, folder, fps, episodes, list(dict.fromkeys(texts)), shown)


def _write(job: _Job) -> None:
    """Writes all files."""
    _write_data(job)
    for column in job.columns:
        if column.kind == "video":
            _write_videos(job, column)
    _write_tables(job)
    features = {column.name: _feature(column, job.fps) for column in job.columns}
    features |= {name: {"dtype": dtype, "shape": [1], "names": None} for name, dtype in _BOOKKEEPING.items()}
    if "success" in job.dataset.episode_info:
        features[_SUCCESS] = {"dtype": "bool", "shape": [1], "names": None}
    info = {
        "codebase_version": "v3.0",
        "robot_type": job.dataset.metadata.get("robot_type"),
        "total_episodes": job.dataset.num_episodes,
        "total_frames": job.dataset.num_steps,
        "total_tasks": len(job.tasks),
        "chunks_size": CHUNK_SIZE,
        "data_files_size_in_mb": DATA_BYTES >> 20,
        "video_files_size_in_mb": VIDEO_BYTES >> 20,
        "fps": job.fps,
        "splits": {"train": f"0:{job.dataset.num_episodes}"},
        "data_path": _DATA_PATH,
        "video_path": _VIDEO_PATH if any(column.kind == "video" for column in job.columns) else None,
        "features": features,
    }
    write_json(job.folder / "meta" / "info.json", info)
    stats = {name: joined([episode.stats[name] for episode in job.episodes]) for name in job.episodes[0].stats}
    write_json(job.folder / "meta" / "stats.json", stats)


def _feature(column: _Column, fps: float) -> dict[str, Any]:
    """Entry in info.json."""
    if column.kind == "number":
        return {"dtype": column.dtype, "shape": column.shape, "names": None}
    # LeRobot tells the order of an image's axes from their names.
    feature: dict[str, Any] = {"dtype": column.kind, "shape": column.shape, "names": ["height", "width", "channels"]}
    if column.kind == "image":
        return feature
    video: dict[str, Any] = {"height": column.shape[0], "width": column.shape[1], "channels": 3, "fps": fps}
    video |= {"codec": "h264", "pix_fmt": "yuv420p", "is_depth_map": False}
    return feature | {"info": {f"video.{name}": value for name, value in video.items()} | {"has_audio": False}}


def _write_data(job: _Job) -> None:
    """Writes data/."""
    pq = import_parquet()
    columns = [column for column in job.columns if column.kind != "video"]
    number, path, writer = 0, Path(), None
    with contextlib.ExitStack() as stack, job.bar("numbers") as bar:
        for index, episode in enumerate(job.episodes):
            if writer is not None and path.stat().st_size >= DATA_BYTES:
                stack.close()
                number, writer = number + 1, None
            for table in _episode_tables(job, columns, index):
                if writer is None:
                    path = _new_file(job, _DATA_PATH, number)
                    writer = stack.enter_context(pq.ParquetWriter(path, table.schema, write_page_checksum=True))
                writer.write_table(table)
            episode.row.update({f"data/{name}": value for name, value in _place(number).items()})
            bar.update()


def _episode_tables(job: _Job, columns: Sequence[_Column], index: int) -> Iterator[Any]:
    """Tables of successive steps of an episode; its statistics are complete after the last of them."""
    import pyarrow as pa

    arrays, episode = job.dataset.arrays, job.episodes[index]
    steps = np.arange(episode.rows.stop - episode.rows.start)
    values = {c.name: np.asarray(arrays[c.key][episode.rows]) for c in columns if c.kind == "number"}
    counts = {"timestamp": steps / job.fps, "frame_index": steps, "index": steps + episode.rows.start}
    counts["episode_index"] = np.full(len(steps), index)
    counts["task_index"] = np.full(len(steps), job.tasks.index(episode.task))
    values |= {name: counts[name].astype(dtype) for name, dtype in _BOOKKEEPING.items()}
    if "success" in job.dataset.episode_info:
        values[_SUCCESS] = (steps == steps[-1]) & bool(job.dataset.episode_info["success"][index] > 0)
    episode.stats.update({name: number_stats(array) for name, array in values.items()})

    images = [column for column in columns if column.kind == "image"]
    histograms = {column.name: np.zeros((column.shape[2], 256), np.int64) for column in images}
    block = max(1, _BLOCK_BYTES // max(1, sum(int(np.prod(column.shape)) for column in images)))
    for begin in range(0, len(steps), block):
        table = {name: _arrow(array[begin : begin + block]) for name, array in values.items()}
        first = episode.rows.start + begin
        for column in images:
            pictures = arrays[column.key][first : min(first + block, episode.rows.stop)]
            histograms[column.name] += histogram(pictures)
            files = [{"bytes": encode_png(picture), "path": None} for picture in pictures]
            table[column.name] = pa.array(files, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
        yield pa.table(table)
    episode.stats.update({name: image_stats(counted, len(steps)) for name, counted in histograms.items()})


def _arrow(values: NDArray[Any]) -> Any:
    """(T, ...) as LeRobot stores it: numbers, lists of a fixed size, or nested lists."""
    import pyarrow as pa

    array = pa.array(np.ascontiguousarray(values).reshape(-1))
    if values.ndim == 2 and values.shape[1] > 1:
        return pa.FixedSizeListArray.from_arrays(array, values.shape[1])
    for size in reversed(values.shape[1:] if values.ndim > 2 else ()):
        array = pa.ListArray.from_arrays(np.arange(0, len(array) + 1, size, dtype=np.int32), array)
    return array


def _write_videos(job: _Job, column: _Column) -> None:
    """Writes the files of one camera."""
    remaining, number = list(job.episodes), 0
    with job.bar(column.name) as bar:
        while remaining:
            path = _new_file(job, _VIDEO_PATH, number, video_key=column.name)
            encode_video(path, _frames(job, column, remaining, number, path, bar), job.fps)
            number += 1


def _frames(
    job: _Job, column: _Column, remaining: list[_Episode], number: int, path: Path, bar: Any
) -> Iterator[NDArray[np.uint8]]:
    """Images of so many of the `remaining` episodes, which are taken off, as fit into the file at `path`."""
    array, first = job.dataset.arrays[column.key], 0
    block = max(1, _BLOCK_BYTES // int(np.prod(column.shape)))
    while remaining and (first == 0 or (path.stat().st_size if path.exists() else 0) < VIDEO_BYTES):
        episode = remaining.pop(0)
        rows, counted = episode.rows, np.zeros((3, 256), np.int64)
        for begin in range(rows.start, rows.stop, block):
            pictures = array[begin : min(begin + block, rows.stop)]
            counted += histogram(pictures)
            yield from pictures
        length = rows.stop - rows.start
        times = {"from_timestamp": first / job.fps, "to_timestamp": (first + length) / job.fps}
        for name, value in (_place(number) | times).items():
            episode.row[f"videos/{column.name}/{name}"] = value
        episode.stats[column.name] = image_stats(counted, length)
        first += length
        bar.update()


def _place(number: int) -> dict[str, Any]:
    return {"chunk_index": number // CHUNK_SIZE, "file_index": number % CHUNK_SIZE}


def _new_file(job: _Job, template: str, number: int, **fields: str) -> Path:
    """Path of a file, whose folder is made."""
    path = job.folder / template.format(**_place(number), **fields)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _write_tables(job: _Job) -> None:
    """Writes the tables of episodes and of tasks."""
    pq = import_parquet()
    import pyarrow as pa

    rows = []
    for episode in job.episodes:
        stats = {
            f"stats/{name}/{which}": value.tolist()
            for name, values in episode.stats.items()
            for which, value in values.items()
        }
        rows.append(episode.row | stats | {"meta/episodes/chunk_index": 0, "meta/episodes/file_index": 0})
    path = _new_file(job, "meta/episodes/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet", 0)
    pq.write_table(pa.Table.from_pylist(rows), path, write_page_checksum=True)
    # LeRobot reads this table with pandas, and wants the texts as its index.
    columns = [
        {"name": name, "field_name": name, "pandas_type": kind, "numpy_type": numpy_type, "metadata": None}
        for name, kind, numpy_type in (("task_index", "int64", "int64"), ("task", "unicode", "object"))
    ]
    pandas = {"index_columns": ["task"], "column_indexes": [], "columns": columns, "pandas_version": "2.0.0"}
    table = pa.table({"task_index": np.arange(len(job.tasks)), "task": pa.array(job.tasks, pa.string())})
    table = table.replace_schema_metadata({"pandas": json.dumps(pandas)})
    pq.write_table(table, job.folder / "meta" / "tasks.parquet", write_page_checksum=True)


def _check_target(path: Path, overwrite: bool) -> None:
    check_local(path)
    if not path.exists() and not path.is_symlink():
        return
    if not overwrite:
        raise OutputError(f"{path} exists already; choose another path, or overwrite it with --overwrite")
    if not (path / "meta" / "info.json").is_file():
        raise OutputError(f"{path} is not a LeRobot dataset and will not be replaced; choose another path")
