"""Writes datasets as HDF5 files that robomimic (0.2 and later) trains on; `robomimic.py` tells what lies where."""

import contextlib
import io
import json
import math
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from scd_robot.datasets.hdf5.demos import ACTIONS, ATTRIBUTE, EXTRAS, told_control_dt
from scd_robot.datasets.schema import ACTION, DONE, MASK, REWARD, EpisodeDataset, tell_unread
from scd_robot.errors import ConfigError, OutputError
from scd_robot.output import beside, check_local, dataset_output, to_plain

__all__ = ["write_robomimic"]

_GYM = 2  # robomimic's number for environments that it makes by their names
_FILE_NAMES = {key: name for name, key in EXTRAS.items()} | {ACTION: ACTIONS}
_GROUPS = ("obs", "next_obs")


def write_robomimic(
    dataset: EpisodeDataset, path: Path | str, *, overwrite: bool = False, progress: bool = True
) -> dict[str, Any]:
    """Writes all episodes as data/demo_0, data/demo_1, ..., one in memory at a time.

    Images are stored as uint8 (T, H, W, C) without compression, one chunk per frame. `next_obs` is `obs` one step later
    with the last step repeated. Where the dataset has no rewards they are zeros; where it has no ends of episodes,
    `dones` is 1 at the last step: robomimic wants them. The attribute "scd_robot" tells what is made up, and keeps the
    metadata. The lists "mask_NAME" of `episode_info` become mask/NAME; other numbers and texts about episodes become
    attributes.

    Args:
        dataset: to write.
        path: of the new file.
        overwrite: replace an HDF5 file at `path`.
        progress: show a bar.

    Returns:
        `path`, `episodes`, `steps` and `bytes` of the file.

    Raises:
        ConfigError: a key cannot be the name of an array in HDF5.
        DatasetError: the dataset cannot be read; `path` is as it was.
        OutputError: something is at `path` already, or it cannot be written; `path` is as it was.
    """
    target = Path(path)
    _check_names(dataset)
    _check_target(target, overwrite)
    tell_unread(dataset, _FILE_NAMES)
    part = beside(target)
    try:
        with dataset_output(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            with _Sink(part, "w+") as sink:
                with h5py.File(sink, "w") as file:
                    _write(dataset, file, sink, target.name if progress else None)
                sink.check()
            part.replace(target)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink()
        raise
    return {
        "path": str(target),
        "episodes": dataset.num_episodes,
        "steps": dataset.num_steps,
        "bytes": target.stat().st_size,
    }


class _Sink(io.FileIO):
    """A file that keeps the errors of writing to itself until it is asked: they would crash HDF5 later on."""

    _error: OSError | None = None

    def check(self) -> None:
        """Raises the first error there was."""
        if self._error is not None:
            raise self._error

    def write(self, data: Any) -> int:
        """See `io.FileIO.write`; writes all of it."""
        view = memoryview(data).cast("B")
        try:
            done = 0
            while done < len(view):
                done += super().write(view[done:]) or 0
        except OSError as error:
            self._error = self._error or error
        return len(view)

    def truncate(self, size: int | None = None) -> int:
        """See `io.FileIO.truncate`."""
        try:
            return super().truncate(size)
        except OSError as error:
            self._error = self._error or error
            return size or 0


def _write(dataset: EpisodeDataset, file: h5py.File, sink: _Sink, shown: str | None) -> None:
    """Writes all; `shown` is the name at the progress bar, None = no bar."""
    data = file.create_group("data")
    data.attrs["total"] = dataset.num_steps
    data.attrs["env_args"] = json.dumps(to_plain(_env_args(dataset)))
    filled = [_FILE_NAMES[key] for key in (REWARD, DONE) if key not in dataset.arrays]
    notes = {"filled": filled, "action_kind": dataset.spec.action_kind, "metadata": to_plain(dataset.metadata)}
    data.attrs[ATTRIBUTE] = json.dumps(notes)
    episodes = range(dataset.num_episodes)
    for index in tqdm(episodes, f"writing {shown}", unit="episode", disable=shown is None):
        _write_episode(data.create_group(f"demo_{index}"), dataset, index)
        sink.check()
    for name, values in dataset.episode_info.items():
        if name.startswith(MASK):
            listed = [f"demo_{index}".encode() for index in np.flatnonzero(values)]
            file[f"mask/{name.removeprefix(MASK)}"] = np.asarray(listed, "S")


def _write_episode(demo: h5py.Group, dataset: EpisodeDataset, index: int) -> None:
    episode = dataset.episode(index)
    length = len(episode[ACTION])
    end = np.zeros(length, np.int64)
    end[-1:] = 1
    arrays: dict[str, NDArray[Any]] = {REWARD: np.zeros(length, np.float32), DONE: end, **episode}
    for key, array in arrays.items():
        if key in dataset.spec.observation:
            _write_array(demo, f"obs/{key}", array)
            _write_array(demo, f"next_obs/{key}", np.concatenate([array[1:], array[-1:]]))
        else:
            _write_array(demo, _FILE_NAMES.get(key, key), array)
    demo.attrs["num_samples"] = length
    for name, numbers in dataset.episode_info.items():
        if not name.startswith(MASK):
            demo.attrs[name] = numbers[index]
    for name, texts in dataset.episode_text.items():
        if name != "name":  # becomes demo_N
            demo.attrs["model_file" if name == "model_xml" else name] = texts[index].replace("\0", "")


def _write_array(demo: h5py.Group, name: str, array: NDArray[Any]) -> None:
    chunks = (1, *array.shape[1:]) if array.ndim == 4 and array.size else None
    demo.create_dataset(name, data=array, chunks=chunks)


def _env_args(dataset: EpisodeDataset) -> dict[str, Any]:
    """The arguments of the environment as they were recorded, with the dataset's rate."""
    frequency = 1 / dataset.spec.control_dt
    frequency = round(frequency) if math.isclose(frequency, round(frequency), rel_tol=1e-9) else frequency
    recorded = dataset.metadata.get("env_args")
    arguments: dict[str, Any] = {"env_name": dataset.spec.source, "type": _GYM, "env_kwargs": {}}
    if isinstance(recorded, dict):
        arguments = dict(recorded)
    if not _tells(arguments, dataset.spec.control_dt):
        kwargs = arguments.get("env_kwargs")
        arguments["env_kwargs"] = {**(kwargs if isinstance(kwargs, dict) else {}), "control_freq": frequency}
    if not _tells(arguments, dataset.spec.control_dt):
        arguments["control_freq"] = frequency  # comes before what else tells a rate
    return arguments


def _tells(arguments: dict[str, Any], control_dt: float) -> bool:
    return math.isclose(told_control_dt(arguments) or 0, control_dt, rel_tol=1e-6)


def _check_names(dataset: EpisodeDataset) -> None:
    taken = [*_GROUPS, *_FILE_NAMES.values()]
    names = [*dataset.arrays, *dataset.episode_info, *dataset.episode_text]
    for key in names:
        if not key or "/" in key or "\0" in key or key in (".", MASK):
            raise ConfigError(f"{key!r} cannot be the name of an array in an HDF5 file; rename it")
    for key in dataset.arrays:
        if key not in dataset.spec.observation and key not in _FILE_NAMES and key in taken:
            raise ConfigError(f"the array {key!r} has the name that robomimic gives to another; rename it")


def _check_target(path: Path, overwrite: bool) -> None:
    check_local(path)
    if path.is_dir():
        raise OutputError(f"cannot write {str(path)!r}: it is a folder; name a file")
    if path.exists() and not overwrite:
        raise OutputError(f"{path} exists already; choose another path, or overwrite it with --overwrite")
    if path.exists() and not h5py.is_hdf5(path):
        raise OutputError(f"{path} is not an HDF5 file and will not be replaced; choose another path")
