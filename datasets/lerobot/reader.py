"""Reads LeRobot datasets v2.0, v2.1 and v3.0, without LeRobot: tables with pyarrow, videos with PyAV.

Shapes: N rows of all episodes, E episodes, H W C an image.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scd_robot.datasets.float32 import as_float32
from scd_robot.datasets.formats import ReadOptions, kept_episodes
from scd_robot.datasets.lazy import RowArray, SelectedArray
from scd_robot.datasets.lerobot.rows import BOOKKEEPING, ImageRows, read_columns
from scd_robot.datasets.lerobot.tables import INFO, Episode, Info, read_episodes, read_info, read_tasks
from scd_robot.datasets.schema import (
    ACTION,
    DONE,
    EXECUTED_ACTION,
    POSITION,
    PRESENT,
    REWARD,
    SIM_STATE,
    TIMESTAMP,
    EpisodeDataset,
)
from scd_robot.datasets.video import PIXEL_FORMATS, VideoRows, VideoSegment
from scd_robot.errors import DatasetError, UnknownNameError
from scd_robot.types import ArraySpec, DatasetSpec

__all__ = ["open_lerobot"]

logger = logging.getLogger(__name__)

_OBSERVATION = "observation."
# Arrays that are not observations, by their names in LeRobot.
_EXTRAS = {
    "next.reward": REWARD,
    "reward": REWARD,
    "next.done": DONE,
    "done": DONE,
    EXECUTED_ACTION: EXECUTED_ACTION,
    SIM_STATE: SIM_STATE,
}
_SUCCESS = ("next.success", "success")


def open_lerobot(path: str, options: ReadOptions) -> EpisodeDataset:
    """Opens a dataset; names of observations are LeRobot's, numbers are loaded, images read when they are indexed.

    Observations are the features whose names begin with "observation.", or, where there are none, all but the action
    and what belongs to the episode. `options.keys` may name any feature of numbers or images. Texts are not read.

    Args:
        path: folder of the dataset.
        options: what to read.

    Raises:
        DatasetError: missing, damaged, contradicting itself, or of a version that is not read.
        UnknownNameError: a feature that was asked for is not there.
        MissingDependencyError: pyarrow is not installed.
    """
    info = read_info(Path(path))
    label = _label(info, options.action)
    keys = _keys(info, label, options.keys)
    cameras = [key for key in keys if info.features[key].dtype == "video" and info.video_path is not None]
    every = read_episodes(info, cameras)
    _compare_totals(info, every)
    numbers = kept_episodes(options, len(every), path)
    chosen = {every[i].index for i in numbers}
    episodes = [episode for episode in every if episode.index in chosen]
    files = {episode.data_file for episode in episodes}
    inside = [episode for episode in every if episode.data_file in files]  # a file is checked against all of its own
    keys = _present(info, keys, episodes, asked=options.keys is not None)
    names = [name for name in (*_EXTRAS, *_SUCCESS, "task_index") if name in info.features and name != label]
    names += [name for name in map(PRESENT.__add__, keys) if name in info.features]
    names += [name for name in info.features if name.startswith(POSITION) and info.features[name].is_number]
    columns = read_columns(info, inside, [label, "timestamp", *keys, *names])
    images: dict[str, RowArray] = {
        key: ImageRows(inside, key, _pixels(info, key)) for key in keys if info.features[key].dtype == "image"
    }
    if len(inside) > len(episodes):
        lengths = [episode.length for episode in inside]
        rows = np.flatnonzero(np.repeat([episode.index in chosen for episode in inside], lengths))
        columns = {name: values[rows] for name, values in columns.items()}
        images = {key: SelectedArray(array, rows) for key, array in images.items()}
    arrays = {**images, **_arrays(info, keys, episodes, columns, options)}
    arrays[ACTION] = as_float32(columns[label], f"{label!r} of {path}")
    spec = DatasetSpec(
        {key: ArraySpec(arrays[key].shape[1:], str(arrays[key].dtype)) for key in keys},
        action_dim=arrays[ACTION].shape[1],
        control_dt=options.control_dt or 1 / info.fps,
        source=f"{info.root.name} (LeRobot {info.version})",
    )
    return EpisodeDataset(
        spec,
        np.cumsum([episode.length for episode in episodes]),
        arrays,
        {"format": "lerobot", "version": info.version, "robot_type": info.raw.get("robot_type")},
        _success(episodes, columns),
        _tasks_in_words(info, episodes, columns.get("task_index")),
        numbers=numbers,
    )


def _label(info: Info, asked: str | None) -> str:
    """Feature that holds the action."""
    valid = [name for name, feature in info.features.items() if feature.is_number and name not in BOOKKEEPING]
    label = asked or next((name for name in (ACTION, "actions") if name in valid), None)
    if label is None:
        raise DatasetError(
            f"{info.root / INFO} lists no feature {ACTION!r}; say with the option action which one holds the actions: "
            + ", ".join(valid)
        )
    if label not in valid:
        raise UnknownNameError(f"action array of {info.root}", label, valid)
    return label


def _keys(info: Info, label: str, asked: Sequence[str] | None) -> list[str]:
    """Features to read as observations."""
    taken = {label, *BOOKKEEPING, *_EXTRAS, *_SUCCESS}
    available = [name for name in info.features if name not in taken and not name.startswith((PRESENT, POSITION))]
    for name in [name for name in available if not (info.features[name].is_number or info.features[name].is_visual)]:
        dtype = info.features[name].dtype
        level = logging.INFO if dtype == "string" else logging.WARNING
        logger.log(level, "%s: %r is not read, since it holds no numbers but %r", info.root, name, dtype)
        available.remove(name)
    if asked is not None:
        for key in asked:
            if key not in available:
                raise UnknownNameError(f"key of the dataset {info.root}", key, available)
        return list(asked)
    return [name for name in available if name.startswith(_OBSERVATION)] or [
        name for name in available if not name.startswith((ACTION, "next."))
    ]


def _present(info: Info, keys: Sequence[str], episodes: Sequence[Episode], asked: bool) -> list[str]:
    """Those of `keys` whose videos are there.

    A camera without any video is left out, and that is told; one that has lost some is an error.
    """
    present = []
    for key in keys:
        problem, all_of_them = _absent(info, key, episodes) if info.features[key].dtype == "video" else (None, False)
        if problem is None:
            present.append(key)
        elif asked:
            raise DatasetError(f"{key!r} was asked for, but {problem}; fetch the videos, or leave the key out")
        elif not all_of_them:
            raise DatasetError(
                f"{key!r} of {info.root}: {problem}; fetch them, leave their episodes out with --drop, or name other "
                "keys with --keys"
            )
        else:
            logger.warning("%s: %r is left out: %s", info.root, key, problem)
    if not present:
        raise DatasetError(f"{info.root} has no observations: {INFO} lists {', '.join(info.features)}")
    return present


def _absent(info: Info, key: str, episodes: Sequence[Episode]) -> tuple[str | None, bool]:
    """What is wrong, where videos are not there; and whether none is."""
    if info.video_path is None:
        return f"{info.root / INFO} says that there are no videos", True
    paths = dict.fromkeys(episode.clips[key].path for episode in episodes)
    missing = [path for path in paths if not Path(path).is_file()]
    if not missing:
        return None, False
    return f"{len(missing)} of its {len(paths)} video files are missing, first {missing[0]}", len(missing) == len(paths)


def _compare_totals(info: Info, episodes: Sequence[Episode]) -> None:
    """Tells of wrong totals; refuses a table of episodes that lost some of them."""
    found = {"total_episodes": len(episodes), "total_frames": sum(episode.length for episode in episodes)}
    for name, value in found.items():
        told = info.raw.get(name, value)
        if told != value:
            logger.warning(
                "%s says %s = %r, but its table of episodes has %d; the table is taken",
                *(info.root / INFO, name, told, value),
            )
        files = {str(path) for path in info.root.glob("data/*/*.parquet")} if told != value else set()
        others = sorted(files - {episode.data_file for episode in episodes})
        if others and isinstance(told, int) and told > value:
            raise DatasetError(
                f"{info.root / INFO} says {name} = {told}, but its table of episodes has {value} and does not list "
                f"{others[0]}: the table has lost episodes, copy it again"
            )


def _arrays(
    info: Info, keys: Sequence[str], episodes: Sequence[Episode], columns: dict[str, NDArray[Any]], options: ReadOptions
) -> dict[str, RowArray]:
    """Observations but images, and what has a name of ours; `check` compares the headers of videos with the rows."""
    arrays: dict[str, RowArray] = {}
    timestamps = columns["timestamp"].reshape(-1).astype(np.float64)
    for key in keys:
        feature = info.features[key]
        if feature.dtype == "video":
            arrays[key] = videos = _videos(info, key, episodes, timestamps, options.frame_tolerance)
            if options.check:
                videos.check()
        elif feature.dtype != "image":
            arrays[key] = as_float32(columns[key], f"{key!r} of {info.root}").reshape(-1, *feature.shape)
    for name, key in _EXTRAS.items():
        if name in columns:
            arrays.setdefault(key, columns[name][:, 0] if columns[name].shape[1] == 1 else columns[name])
    for name, values in columns.items():
        if name.startswith(PRESENT):
            arrays[name] = (values[:, 0] != 0).astype(np.uint8)
        elif name.startswith(POSITION):
            arrays[name] = values
    arrays[TIMESTAMP] = timestamps
    return arrays


def _success(episodes: Sequence[Episode], columns: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Whether there was success in some step of each episode, where that was recorded."""
    starts = np.cumsum([0, *(episode.length for episode in episodes[:-1])])
    recorded = [columns[name][:, 0] for name in _SUCCESS if name in columns]
    return {"success": np.maximum.reduceat(recorded[0] > 0, starts)} if recorded else {}


def _tasks_in_words(
    info: Info, episodes: Sequence[Episode], task_index: NDArray[Any] | None
) -> dict[str, Sequence[str]]:
    """The task of each episode; of several in one episode all, in their order."""
    table = read_tasks(info)
    texts, several = [], []
    first = 0
    for episode in episodes:
        tasks = list(episode.tasks)
        if task_index is not None and table:
            found = dict.fromkeys(task_index[first : first + episode.length, 0].tolist())
            unknown = [number for number in found if number not in table]
            if unknown:
                raise DatasetError(
                    f"{episode.name} of {info.root} has the task_index {unknown[0]}, but the table of tasks "
                    f"lists {sorted(table)[:8]}; one of them is damaged"
                )
            tasks = [table[number] for number in found]
        if len(tasks) > 1:
            several.append(episode.name)
        texts.append("; ".join(tasks))
        first += episode.length
    if several:
        shown = ", ".join(several[:5]) + (", ..." if len(several) > 5 else "")
        logger.warning(
            "%s: the task changes within %d episodes (%s); each counts as one of all its tasks together, in words "
            "'first; second'",
            info.root, len(several), shown,
        )  # fmt: skip
    return {"task": texts} if any(texts) else {}


def _pixels(info: Info, key: str) -> tuple[int, int, int]:
    """(H, W, C) of a camera."""
    height, width, channels = info.features[key].shape
    if channels not in PIXEL_FORMATS:
        raise DatasetError(
            f"{key!r} of {info.root} has images of {channels} channels by {INFO}; expected one of {list(PIXEL_FORMATS)}"
        )
    return height, width, channels


def _videos(
    info: Info, key: str, episodes: Sequence[Episode], timestamps: NDArray[np.float64], tolerance: float
) -> VideoRows:
    segments = []
    first = 0
    for episode in episodes:
        times = timestamps[first : first + episode.length]
        if not np.isfinite(times).all():
            raise DatasetError(f"{episode.name} of {info.root} has NaN or infinite time stamps")
        clip = episode.clips[key]
        segments.append(VideoSegment(clip.path, clip.begin + times, clip.begin, clip.end, episode.name))
        first += episode.length
    return VideoRows(segments, _pixels(info, key), info.fps, tolerance)
