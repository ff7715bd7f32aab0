"""The files of a LeRobot dataset but for its pictures: description, tables of episodes and tasks, columns of numbers.

v2.0, v2.1   meta/info.json, meta/episodes.jsonl, meta/tasks.jsonl; a data file and video files for each episode
v3.0         meta/info.json, meta/tasks.parquet, meta/episodes/chunk-*/file-*.parquet; several episodes in a file

Which file an episode is in follows from templates in info.json; statistics in meta/ are not used.

Shapes: T control steps of an episode.
"""

import contextlib
import itertools
import json
import math
import re
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from scd_robot.datasets.zarr.files import read_errors
from scd_robot.errors import DatasetError, MissingDependencyError

__all__ = [
    "INFO",
    "Clip",
    "Episode",
    "Feature",
    "Info",
    "import_parquet",
    "open_parquet",
    "read_episodes",
    "read_info",
    "read_tasks",
]

INFO = "meta/info.json"
VERSIONS = ("v2.0", "v2.1", "v3.0")

_VISUAL = ("image", "video")
_SAME_S = 1e-2  # differences of times that are rounding


@dataclass(frozen=True)
class Feature:
    """One column, or one camera.

    Attributes:
        dtype: "video", "image" (files in the data file's column), or numpy's name; other names are no numbers.
        shape: of a control step; images (H, W, C).
    """

    dtype: str
    shape: tuple[int, ...]

    @property
    def is_visual(self) -> bool:
        """Whether it is a camera."""
        return self.dtype in _VISUAL

    @property
    def is_number(self) -> bool:
        """Whether it holds numbers; texts do not."""
        return re.fullmatch(r"bool|u?int(8|16|32|64)|float(16|32|64)", self.dtype) is not None


@dataclass(frozen=True)
class Info:
    """meta/info.json.

    Attributes:
        root: folder of the dataset.
        version: one of `VERSIONS`.
        fps: control steps per second.
        features: by name, as in the file.
        data_path: template of the data files' paths.
        video_path: of the video files'; None = there are none.
        chunk_size: files in a folder, before v3.0.
        raw: all of it.
    """

    root: Path
    version: str
    fps: float
    features: dict[str, Feature]
    data_path: str
    video_path: str | None
    chunk_size: int
    raw: dict[str, Any]

    def file(self, template: str, **fields: int | str) -> str:
        """Path of the file that a template names.

        Raises:
            DatasetError: the template has other fields, or leads out of the dataset's folder.
        """
        try:
            parts = list(string.Formatter().parse(template))
        except ValueError as error:
            raise DatasetError(f"{self.root / INFO} has the path template {template!r}: {error}; damaged") from error
        for _, name, form, conversion in parts:
            # Python's own formatting would look into attributes, and write paths of any length.
            allowed = r"(0?\d\d?d)?" if isinstance(fields.get(name or ""), int) else ""
            if name is not None and (name not in fields or conversion or not re.fullmatch(allowed, form or "")):
                raise DatasetError(
                    f"{self.root / INFO} has the path template {template!r}; expected fields such as "
                    + ", ".join(f"{{{field}}}" for field in fields)
                )
        relative = PurePosixPath(template.format(**fields))
        if relative.is_absolute() or ".." in relative.parts or "\0" in str(relative):
            raise DatasetError(f"{self.root / INFO} names a file {str(relative)!r} outside of its folder; refused")
        return str(self.root / relative)


@dataclass(frozen=True)
class Clip:
    """Where the frames of an episode are: in `path`, from `begin` up to `end` [s]."""

    path: str
    begin: float
    end: float


@dataclass(frozen=True)
class Episode:
    """A row of the table of episodes.

    Attributes:
        index: its number in LeRobot's files, which may have gaps.
        length: T.
        tasks: in words.
        data_file: path of the file with its rows.
        clips: by camera.
        position: its number by our count, which `--only` and `--drop` take.
    """

    index: int
    length: int
    tasks: tuple[str, ...]
    data_file: str
    clips: dict[str, Clip]
    position: int = 0

    @property
    def name(self) -> str:
        """For messages."""
        return f"episode {self.position}" + (f" (episode_index {self.index})" if self.index != self.position else "")


def read_info(root: Path) -> Info:
    """Reads meta/info.json.

    Raises:
        DatasetError: missing, damaged, or of a version that is not read.
    """
    path = root / INFO
    if not path.is_file():
        if (root / "meta_data" / "info.json").is_file():
            raise DatasetError(
                f"{root} is a LeRobot dataset of version 1, which is not read; expected one of {', '.join(VERSIONS)}: "
                "convert it with LeRobot's own scripts"
            )
        raise DatasetError(f"{root} is not a LeRobot dataset: it has no {INFO}")
    with read_errors(path):
        raw = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(raw, dict):
        raise DatasetError(f"{path} must hold an object, got {type(raw).__name__}; damaged")
    version = raw.get("codebase_version")
    if version not in VERSIONS:
        raise DatasetError(
            f"{root} is a LeRobot dataset of version {version!r}; expected one of {', '.join(VERSIONS)}: "
            "convert it with LeRobot's own scripts"
        )
    fps = raw.get("fps")
    if isinstance(fps, bool) or not isinstance(fps, int | float) or not 0 < fps < 1e6:
        raise DatasetError(f"fps in {path} must be a positive number of control steps per second, got {fps!r}")
    features = raw.get("features")
    if not isinstance(features, dict) or not isinstance(raw.get("data_path"), str):
        raise DatasetError(f"{path} must hold an object 'features' and a text 'data_path'; damaged")
    if not isinstance(raw.get("video_path"), str | None):
        raise DatasetError(f"video_path in {path} must be a text or null, got {raw['video_path']!r}")
    return Info(
        root=root,
        version=version,
        fps=float(fps),
        features={name: _feature(name, value, path) for name, value in features.items()},
        data_path=raw["data_path"],
        video_path=raw.get("video_path"),
        chunk_size=_whole(raw.get("chunks_size", 1000), f"chunks_size in {path}", 1),
        raw=raw,
    )


def _feature(name: str, value: Any, path: Path) -> Feature:
    what = f"feature {name!r} in {path}"
    if not isinstance(value, dict) or not isinstance(value.get("dtype"), str):
        raise DatasetError(f"{what} must be an object with 'dtype' and 'shape', got {value!r}")
    shape = value.get("shape")
    if not isinstance(shape, list):
        raise DatasetError(f"the shape of {what} must be a list, got {shape!r}")
    sizes = tuple(_whole(size, f"a size of {what}", 1) for size in shape) or (1,)
    if value["dtype"] in _VISUAL:
        if len(sizes) != 3:
            raise DatasetError(f"the shape of {what} must be (height, width, channels), got {sizes}")
        sizes = _height_width_channels(sizes, value.get("names"))
    return Feature(value["dtype"], sizes)


def _height_width_channels(sizes: tuple[int, ...], names: object) -> tuple[int, ...]:
    """An image's sizes in our order: by the names of its axes, or, where these do not tell, channels are the few."""
    told = [str(name) for name in names] if isinstance(names, list) else []
    places = [[i for i, name in enumerate(told) if name.startswith(axis)] for axis in ("height", "width", "channel")]
    if [len(found) for found in places] == [1, 1, 1]:
        return tuple(sizes[place] for (place,) in places)
    return (*sizes[1:], sizes[0]) if sizes[2] > 4 and sizes[0] <= 4 else sizes


def read_tasks(info: Info) -> dict[int, str]:
    """Tasks in words by number; none where the dataset has no table of them."""
    if info.version == "v3.0":
        path = info.root / "meta" / "tasks.parquet"
        rows = _rows(path, None) if path.is_file() else []
    else:
        path = info.root / "meta" / "tasks.jsonl"
        rows = _lines(path) if path.is_file() else []
    tasks = {}
    for number, row in enumerate(rows):
        words = [value for value in row.values() if isinstance(value, str)]  # the column's name differs
        if not words:
            raise DatasetError(f"row {number} of {path} holds no task in words, got {row!r}")
        tasks[_whole(row.get("task_index"), f"task_index in row {number} of {path}")] = words[0]
    return tasks


def read_episodes(info: Info, cameras: Sequence[str]) -> list[Episode]:
    """The table of episodes.

    Args:
        info: of the dataset.
        cameras: features of dtype video whose clips are wanted; `info.video_path` must be there.

    Raises:
        DatasetError: missing, damaged, or contradicting itself.
    """
    if info.version == "v3.0":
        episodes = _episodes_of_tables(info, cameras)
    else:
        path = info.root / "meta" / "episodes.jsonl"
        episodes = [
            _episode_by_itself(info, cameras, row, f"line {line} of {path}") for line, row in enumerate(_lines(path), 1)
        ]
    where = info.root / "meta"
    if not episodes:
        raise DatasetError(f"the table of episodes in {where} is empty; record some episodes first")
    for before, after in itertools.pairwise(episodes):
        if after.index <= before.index:
            raise DatasetError(
                f"episode {after.index} follows episode {before.index} in the table of episodes in {where}; they must "
                "be in order, each once"
            )
    return [replace(episode, position=position) for position, episode in enumerate(episodes)]


def _episode_by_itself(info: Info, cameras: Sequence[str], row: dict[str, Any], where: str) -> Episode:
    """v2.0 and v2.1: files of its own."""
    index = _whole(row.get("episode_index"), f"episode_index in {where}")
    place: dict[str, int] = {"episode_chunk": index // info.chunk_size, "episode_index": index}
    clips = {key: Clip(info.file(str(info.video_path), video_key=key, **place), 0.0, math.inf) for key in cameras}
    length = _whole(row.get("length"), f"length in {where}", 1)
    return Episode(index, length, _tasks(row), info.file(info.data_path, **place), clips)


def _episodes_of_tables(info: Info, cameras: Sequence[str]) -> list[Episode]:
    """v3.0: files shared by episodes."""
    folder = info.root / "meta" / "episodes"
    columns = ["episode_index", "length", "data/chunk_index", "data/file_index"]
    optional = ["tasks", "dataset_from_index", "dataset_to_index"]
    for key in cameras:
        columns += [f"videos/{key}/{name}" for name in ("chunk_index", "file_index", "from_timestamp", "to_timestamp")]
    episodes: list[Episode] = []
    first = 0
    paths = sorted(folder.glob("*/*.parquet"), key=lambda path: [int(n) for n in re.findall(r"\d+", str(path))])
    for path in paths:
        for row in _rows(path, columns, optional):
            where = f"row {len(episodes)} of {path}"
            index = _whole(row["episode_index"], f"episode_index in {where}")
            length = _whole(row["length"], f"length in {where}", 1)
            found = (row.get("dataset_from_index", first), row.get("dataset_to_index", first + length))
            if found != (first, first + length):
                raise DatasetError(
                    f"episode {index} has {length} steps and follows {first}, so dataset_from_index and "
                    f"dataset_to_index must be {(first, first + length)}, got {found} in {path}"
                )
            data_file = info.file(info.data_path, **_place(row, "data", where))
            clips = {key: _clip(info, key, row, length, f"episode {index}", where) for key in cameras}
            episodes.append(Episode(index, length, _tasks(row), data_file, clips))
            first += length
    for key in cameras:
        _check_overlap(key, episodes)
    return episodes


def _clip(info: Info, key: str, row: dict[str, Any], length: int, episode: str, where: str) -> Clip:
    begin, end = (row[f"videos/{key}/{name}_timestamp"] for name in ("from", "to"))
    if not all(isinstance(time, int | float) and math.isfinite(time) for time in (begin, end)) or begin < 0:
        raise DatasetError(f"the times of {key} in {where} must be numbers from 0 on, got {begin!r} and {end!r}")
    path = info.file(str(info.video_path), video_key=key, **_place(row, f"videos/{key}", where))
    frames = (end - begin) * info.fps
    if frames < length - 0.5:
        raise DatasetError(
            f"{path} is shorter than the rows of {episode}: expected {length} frames, found {round(frames)} from "
            f"{begin:.4f} to {end:.4f} s; the video is truncated, copy or record it again"
        )
    return Clip(path, float(begin), float(end))


def _check_overlap(key: str, episodes: Sequence[Episode]) -> None:
    by_place = sorted(episodes, key=lambda episode: (episode.clips[key].path, episode.clips[key].begin))
    for before, after in itertools.pairwise(by_place):
        first, second = before.clips[key], after.clips[key]
        if first.path == second.path and second.begin < first.end - _SAME_S:
            raise DatasetError(
                f"episodes {before.index} and {after.index} share frames of {first.path}: one ends at {first.end:.4f} "
                f"s, the other begins at {second.begin:.4f} s; the table of episodes is damaged"
            )


def _place(row: dict[str, Any], prefix: str, where: str) -> dict[str, int]:
    names = ("chunk_index", "file_index")
    return {name: _whole(row[f"{prefix}/{name}"], f"{prefix}/{name} in {where}") for name in names}


def _tasks(row: dict[str, Any]) -> tuple[str, ...]:
    tasks = row.get("tasks")
    return tuple(task for task in tasks if isinstance(task, str)) if isinstance(tasks, list) else ()


def _whole(value: Any, what: str, least: int = 0) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 1 << 48:
        raise DatasetError(f"{what} must be a whole number from {least} on, got {value!r}; the dataset is damaged")
    return value


def _lines(path: Path) -> list[dict[str, Any]]:
    """Objects of a file with one on each line."""
    with read_errors(path):
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise DatasetError(f"line {number} of {path} must hold an object, got {type(row).__name__}; damaged")
    return rows


def _rows(path: Path, columns: Sequence[str] | None, optional: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Rows of a small table; all its columns, or those named."""
    with open_parquet(path, columns or ()) as file:
        names = file.schema_arrow.names
        chosen = names if columns is None else [*columns, *(name for name in optional if name in names)]
        table = file.read(columns=chosen)
        rows: list[dict[str, Any]] = table.select(chosen).to_pylist()
    return rows


def import_parquet() -> Any:
    """The module pyarrow.parquet.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise MissingDependencyError("LeRobot datasets need pyarrow: pip install 'scd_robot[formats]'") from error
    return pyarrow.parquet


@contextlib.contextmanager
def open_parquet(path: Path | str, columns: Sequence[str]) -> Iterator[Any]:
    """A pyarrow.parquet.ParquetFile that has these columns; checksums of pages, where there are any, are compared.

    Raises:
        DatasetError: missing, damaged, or without one of the columns; also for errors within the block.
        MissingDependencyError: pyarrow is not installed.
    """
    pq = import_parquet()
    import pyarrow as pa

    with read_errors(path):
        try:
            with pq.ParquetFile(path, page_checksum_verification=True) as file:
                names = file.schema_arrow.names
                for column in columns:
                    if column not in names:
                        raise DatasetError(f"{path} has no column {column!r}, which is expected; found {names}")
                yield file
        except (pa.ArrowException, MemoryError, OverflowError) as error:
            raise ValueError(str(error)) from error
