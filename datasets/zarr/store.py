"""Reads the Zarr store that `ZarrWriter` writes; what lies where is told there."""

import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scd_robot.datasets.float32 import as_float32
from scd_robot.datasets.formats import ReadOptions, choose
from scd_robot.datasets.lazy import RowArray
from scd_robot.datasets.schema import ACTION, EXECUTED_ACTION, EpisodeDataset
from scd_robot.datasets.zarr.files import ATTRIBUTE, ENDS, UNWRITTEN, ZarrFiles, read_ends, read_errors
from scd_robot.datasets.zarr.writer import SCHEMA
from scd_robot.errors import DatasetError, UnknownNameError
from scd_robot.types import DatasetSpec

__all__ = ["StoredText", "open_store"]

_PICTURE = 576  # numbers in a row (24 x 24) from which on it is not loaded with the others, whatever its dtype

logger = logging.getLogger(__name__)


def open_store(path: Path | str, options: ReadOptions | None = None) -> EpisodeDataset:
    """Opens a store that `ZarrWriter` wrote; vectors are loaded, images are read when they are indexed.

    Args:
        path: folder, zip archive or address.
        options: what to read; None = everything.

    Raises:
        DatasetError: not such a store, arrays or chunks missing, damaged, or of another schema.
        UnknownNameError: a key that the store does not have.
    """
    options = options or ReadOptions()
    files = ZarrFiles.at(str(path), options)
    header = files.attributes().get(ATTRIBUTE)
    if header is None:
        raise DatasetError(f"{files.address} was not written by scd_robot: it has no attribute {ATTRIBUTE!r}")
    spec = _read_spec(files, header)
    if options.control_dt is not None:
        spec = replace(spec, control_dt=options.control_dt)
    dropped = set(spec.observation) - set(options.keys if options.keys is not None else spec.observation)
    for key in options.keys or ():
        if key not in spec.observation:
            raise UnknownNameError(f"key of the dataset {files.address}", key, spec.observation)
    if options.action not in (None, ACTION):
        raise UnknownNameError(f"action array of {files.address}", options.action, [ACTION])
    ends = read_ends(files, unfinished=True)
    spec = replace(spec, observation={key: spec.observation[key] for key in options.keys or spec.observation})
    names = [name for name in files.names("data") if name not in dropped]
    for key in (*spec.observation, ACTION):
        if key not in names:
            raise DatasetError(f"{files.address} has no array data/{key}; it is not a recording, or a damaged one")
    rows = int(ends[-1]) if len(ends) else 0
    arrays: dict[str, RowArray] = {}
    for key in sorted(names, key=[*spec.observation, ACTION, *names].index):
        array = files.rows(f"data/{key}", rows)
        pictures = array.ndim > 2 and (array.dtype == np.uint8 or math.prod(array.shape[1:]) >= _PICTURE)
        arrays[key] = array if pictures else array[:]
        if arrays[key].dtype == np.float64 and key in (*spec.observation, ACTION, EXECUTED_ACTION):
            arrays[key] = as_float32(np.asarray(arrays[key]), f"data/{key} of {files.address}")  # by other programs
    meta = files.names("meta")
    info = {
        name.removeprefix("episode_"): files.rows(f"meta/{name}", len(ends))[:]
        for name in meta
        if name.startswith("episode_") and name != ENDS and _is_of_all(files, name, len(ends))
    }
    text = {
        name.removeprefix("text_"): StoredText(files, name, files.rows(f"meta/{name}_ends", len(ends))[:])
        for name in meta
        if name.startswith("text_") and f"{name}_ends" in meta and _is_of_all(files, f"{name}_ends", len(ends))
    }
    return choose(EpisodeDataset(spec, ends, arrays, header.get("metadata", {}), info, text), options)


def _is_of_all(files: ZarrFiles, name: str, episodes: int) -> bool:
    """Whether a note is there of every episode: earlier versions wrote it of those only that came with it."""
    noted = min(episodes, files.array(f"meta/{name}").shape[0])
    if name.startswith("text_"):  # by its ends
        noted = int(np.count_nonzero(files.rows(f"meta/{name}", noted)[:] != UNWRITTEN))
    if noted < episodes:
        logger.warning("%s: meta/%s is left out: %d of %d episodes have it", files.address, name, noted, episodes)
    return noted == episodes


class StoredText(Sequence[str]):
    """One text per episode, read when it is indexed."""

    def __init__(self, files: ZarrFiles, name: str, ends: NDArray[np.int64]) -> None:
        self._bytes = files.rows(f"meta/{name}", int(ends[-1]) if len(ends) else 0)
        self._ends = ends

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"text {index} of {len(self)}")
        index %= len(self)
        begin = int(self._ends[index - 1]) if index else 0
        return self._bytes[begin : int(self._ends[index])].tobytes().decode("utf-8", "replace")


def _read_spec(files: ZarrFiles, header: Any) -> DatasetSpec:
    with read_errors(files.address):
        if header["schema"] != SCHEMA:
            raise DatasetError(
                f"{files.address} has schema {header['schema']}, this version reads {SCHEMA}; update scd_robot or "
                "record again"
            )
        spec = DatasetSpec.from_json(header["spec"])
        return replace(spec, source=spec.source or files.name)
