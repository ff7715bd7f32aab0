"""Reads ALOHA's recordings, as ACT, Mobile ALOHA and many others write them: a file for each episode.

episode_N.hdf5            attributes sim, compress, and others
    action                (T, Da) labels; others beside it (base_action)
    observations/qpos     (T, Dq); qvel, effort and others likewise
    observations/images/CAMERA
                          (T, H, W, 3) uint8; or JPEG files: (T, bytes) uint8 with zeros behind, or (T,) of bytes
    compress_len          (cameras, T) bytes of the JPEG files; not read: nothing tells which row is which camera's, and
                          a JPEG file does not end in zeros

Nothing tells the order of the colours. Arrays are taken as they are, JPEG files as any viewer shows them: whoever gave
RGB to cv2.imencode, which takes it for BGR, stored red for blue.
"""

import logging
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from scd_robot.datasets.float32 import as_float32
from scd_robot.datasets.formats import ReadOptions, kept_episodes
from scd_robot.datasets.hdf5.files import (
    Hdf5Rows,
    arrays_below,
    check_length,
    child,
    hdf5_file,
    is_varying_bytes,
    probe_files,
    scalar_attributes,
    shared_notes,
    where,
)
from scd_robot.datasets.images import as_stored
from scd_robot.datasets.lazy import ConcatenatedArray, LazyArray, RowArray
from scd_robot.datasets.schema import ACTION, DONE, EXECUTED_ACTION, REWARD, SIM_STATE, TIMESTAMP, EpisodeDataset
from scd_robot.datasets.video import decode_image
from scd_robot.errors import DatasetError, UnknownNameError
from scd_robot.types import ArraySpec, DatasetSpec

__all__ = ["is_aloha", "open_aloha", "read_aloha"]

logger = logging.getLogger(__name__)

ASSUMED_CONTROL_DT = 0.02  # [s]; ALOHA's, and nothing in the format tells it

_EPISODE = re.compile(r"episode_(\d+)\.hdf5")  # names of files
_OBSERVATIONS, _IMAGES = "observations", "images/"
_DAMAGED = "the episode is damaged, leave it out with --drop"
_NO_LABELS = ("compress_len",)
_NO_NOTES = ("compress", "name")
_RESERVED = (ACTION, EXECUTED_ACTION, SIM_STATE, REWARD, DONE, TIMESTAMP)


def is_aloha(file: h5py.File) -> bool:
    """Whether a file is an episode of ALOHA."""
    return isinstance(child(file, _OBSERVATIONS), h5py.Group)


def open_aloha(path: str, options: ReadOptions) -> EpisodeDataset:
    """Opens a folder of files episode_N.hdf5, in the order of their numbers.

    Raises:
        ConfigError: `only` or `drop` name episodes that there are not.
        DatasetError, UnknownNameError: as `read_aloha`.
    """
    folder = Path(path)
    numbered = [(int(match[1]), entry) for entry in folder.iterdir() if (match := _EPISODE.fullmatch(entry.name))]
    files = [entry for _, entry in sorted(numbered)]
    others = sorted(entry.name for entry in folder.glob("*.hdf5") if entry not in files)
    if others:
        logger.warning(
            "%s: %d files that are not named episode_N.hdf5 are left out: %s", path, len(others), ", ".join(others[:8])
        )
    kept = kept_episodes(options, len(files), path)
    chosen = [str(files[index]) for index in kept]
    probe_files(chosen)
    return read_aloha(path, chosen, kept, options)


def read_aloha(path: str, files: Sequence[str], numbers: NDArray[np.int64], options: ReadOptions) -> EpisodeDataset:
    """Reads episodes of one file each.

    Observations are `qpos`, `qvel`, `effort` and the cameras by their names, and whatever else lies there, with dots
    for groups ("images_depth.cam_high"). The label is `action`, or what `options.action` names: another array beside
    it, or several joined by "+" (Mobile ALOHA: action+base_action).

    Args:
        path: of the whole, for messages.
        files: E of them, that `probe_files` has seen.
        numbers: (E,) what the recording counts them as.
        options: what to read; `only` and `drop` have been seen to.

    Raises:
        DatasetError: a file is damaged, not of this form, or unlike the first one.
        UnknownNameError: a key or action array that was asked for is not there.
    """
    episodes = [_read_episode(file, int(number), options) for file, number in zip(files, numbers, strict=True)]
    first, label = episodes[0], options.action or ACTION
    for episode in episodes[1:]:
        _check_alike(episode, first)
    if options.action is None and (others := [name for name in first.labels if "action" in name and name != ACTION]):
        logger.info("%s: the labels are 'action'; --action takes others there are: %s", path, ", ".join(others))
    if any(isinstance(array, _JpegRows) for array in first.observations.values()):
        logger.info("%s: its JPEG pictures are read as RGB; cv2.imdecode gives the same ones as BGR", path)
    arrays = {
        key: _joined([episode.observations[key] for episode in episodes], f"{key!r} of {path}")
        for key in first.observations
    }
    spec_of = {key: ArraySpec(array.shape[1:], str(array.dtype)) for key, array in arrays.items()}
    arrays[ACTION] = np.concatenate([episode.action for episode in episodes])
    control_dt, note = options.control_dt or ASSUMED_CONTROL_DT, ""
    if options.control_dt is None:
        logger.warning("%s does not tell its rate: %g s per control step assumed (--control-dt)", path, control_dt)
        note = f", control_dt {control_dt} s assumed"
    spec = DatasetSpec(
        spec_of,
        action_dim=arrays[ACTION].shape[1],
        control_dt=control_dt,
        source=f"{Path(path).resolve().name} (ALOHA{note})",
    )
    info, text = shared_notes([episode.noted for episode in episodes])
    text["name"] = [Path(file).stem for file in files]
    ends = np.cumsum([len(episode.action) for episode in episodes])
    return EpisodeDataset(spec, ends, arrays, {"format": "aloha", "action": label}, info, text, numbers=numbers)


@dataclass(frozen=True, eq=False)
class _Episode:
    """One file.

    Attributes:
        path: of it.
        number: as `ReadOptions.drop` counts it.
        action: (T, Da).
        labels: names of the arrays that can be labels.
        observations: (T, ...) by key: vectors loaded, pictures and other large arrays not.
        noted: numbers and texts.
    """

    path: str
    number: int
    action: NDArray[np.float32]
    labels: list[str]
    observations: dict[str, RowArray]
    noted: dict[str, str | int | float]


def _read_episode(path: str, number: int, options: ReadOptions) -> _Episode:
    with hdf5_file(path, probed=True) as file:
        group = child(file, _OBSERVATIONS)
        if not isinstance(group, h5py.Group):
            raise DatasetError(
                f"{path} has no group 'observations'; it is not an episode of ALOHA. It holds: "
                f"{', '.join(sorted(file)) or 'nothing'}"
            )
        labels = [name for name in file if isinstance(child(file, name), h5py.Dataset) and name not in _NO_LABELS]
        action = _action(path, file, labels, options.action)
        datasets = _datasets(group)
        for key in options.keys or ():
            if key not in datasets:
                raise UnknownNameError(f"key of the episode {path}", key, datasets)
        observations: dict[str, RowArray] = {}
        for key in options.keys or datasets:
            array = observations[key] = _rows(path, datasets[key])
            check_length(where(datasets[key]), len(array), len(action), _DAMAGED)
        noted = {name: value for name, value in scalar_attributes(file).items() if name not in _NO_NOTES}
    if not observations:
        raise DatasetError(f"{path} has no observations: its group 'observations' holds no arrays")
    return _Episode(path, number, action, labels, observations, noted)


def _action(path: str, file: h5py.File, labels: Sequence[str], name: str | None) -> NDArray[np.float32]:
    """The labels (T, Da); several arrays are joined by "+"."""
    if name is None and ACTION not in labels:
        raise DatasetError(
            f"{path} has no array 'action'; name the array of the labels with --action, one of: "
            f"{', '.join(labels) or 'none is there'}"
        )
    columns: list[NDArray[np.float32]] = []
    for part in (name or ACTION).split("+"):
        if part not in labels:
            raise UnknownNameError(f"action array of {path}", part, labels)
        rows = Hdf5Rows(path, [child(file, part)])
        values = rows[:].reshape(len(rows), math.prod(rows.shape[1:]))
        columns.append(as_float32(values, f"{part!r} of {path}"))
        check_length(f"{part!r} of {path}", len(values), len(columns[0]), _DAMAGED)
    action = np.concatenate(columns, axis=1)
    if action.shape[1] == 0:
        raise DatasetError(f"{name or ACTION!r} of {path} holds no numbers: its shape is {rows.shape}")
    return action


def _datasets(group: h5py.Group) -> dict[str, h5py.Dataset]:
    """What was observed, by key; what holds no numbers, (T, 0), is left out."""
    found: dict[str, h5py.Dataset] = {}
    for name, dataset in arrays_below(group).items():
        key = name.removeprefix(_IMAGES).replace("/", ".")
        key = f"obs.{key}" if key in _RESERVED else key
        if key in found:
            raise DatasetError(f"{where(dataset)} and {found[key].name!r} are the same key {key!r}; rename one")
        if not dataset.shape or 0 not in dataset.shape[1:]:
            found[key] = dataset
    return found


def _rows(path: str, dataset: h5py.Dataset) -> RowArray:
    """One array of an episode: vectors are loaded, all else is not."""
    name = where(dataset)
    is_packed = str(dataset.name).startswith(f"/{_OBSERVATIONS}/{_IMAGES}") and (
        (dataset.ndim == 2 and dataset.dtype == np.uint8)
        or (dataset.ndim == 1 and (dataset.dtype.kind == "S" or is_varying_bytes(dataset)))
    )
    rows = Hdf5Rows(path, [dataset], packed=is_packed, keep_open=False)
    if is_packed and len(rows):
        return _JpegRows(rows, name)
    return rows if rows.ndim > 2 else as_stored(rows, name)


class _JpegRows(LazyArray):
    """Rows of bytes that are JPEG files, as pictures (T, H, W, 3) of the first one's size."""

    def __init__(self, rows: Hdf5Rows, name: str) -> None:
        self._rows, self._name = rows, name
        super().__init__((len(rows), *self._picture(rows[:1][0], 0).shape), np.uint8)

    def read(self, start: int, stop: int) -> NDArray[np.uint8]:
        """See `LazyArray.read`; raises DatasetError where a picture is damaged or of another size."""
        out = self._empty(stop - start)
        for index, row in enumerate(self._rows[start:stop]):
            picture = self._picture(row, start + index)
            if picture.shape != self.shape[1:]:
                raise DatasetError(
                    f"{self._name} has a picture of shape {picture.shape} at step {start + index}, but its first one "
                    f"is {self.shape[1:]}; leave the episode out with --drop"
                )
            out[index] = picture
        return out

    def _picture(self, row: Any, step: int) -> NDArray[np.uint8]:
        return decode_image(bytes(row).rstrip(b"\0"), 3, f"step {step} of {self._name}")


def _check_alike(episode: _Episode, first: _Episode) -> None:
    """Refuses an episode with other keys, or arrays of another form, than the first one."""
    advice = f"leave the episode out with --drop {episode.number}"
    different = sorted(episode.observations.keys() ^ first.observations.keys())
    if different:
        raise DatasetError(
            f"observations of {episode.path} and {first.path} differ: not both have {', '.join(different)}; {advice}, "
            "or choose keys that all have with --keys"
        )
    both: list[tuple[str, RowArray, RowArray]] = [("the labels", episode.action, first.action)]
    both += [(repr(key), array, first.observations[key]) for key, array in episode.observations.items()]
    for name, array, expected in both:
        if array.shape[1:] != expected.shape[1:] or array.dtype != expected.dtype:
            raise DatasetError(
                f"rows of {name} of {episode.path} are {array.shape[1:]} ({array.dtype}), but in {first.path} they are "
                f"{expected.shape[1:]} ({expected.dtype}); {advice}"
            )


def _joined(parts: Sequence[RowArray], name: str) -> RowArray:
    if isinstance(parts[0], LazyArray):
        return as_stored(ConcatenatedArray(parts), name)
    return np.concatenate([np.asarray(part) for part in parts])
