"""Rows of a LeRobot dataset's data files: columns of numbers, and images kept as files in a column.

Shapes: N rows of all episodes, H W C an image.
"""

import itertools
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scd_robot.datasets.lazy import LazyArray
from scd_robot.datasets.lerobot.tables import INFO, Episode, Info, open_parquet
from scd_robot.datasets.video import decode_image
from scd_robot.errors import DatasetError

__all__ = ["BOOKKEEPING", "ImageRows", "read_columns"]

logger = logging.getLogger(__name__)

BOOKKEEPING = ("timestamp", "frame_index", "episode_index", "index", "task_index", "subtask_index")


def read_columns(info: Info, episodes: Sequence[Episode], names: Sequence[str]) -> dict[str, NDArray[Any]]:
    """Values (N, width) of features; of images it is only seen to that they are there."""
    shapes = {name: feature.shape for name, feature in info.features.items() if feature.dtype != "video"}
    wanted = {name: shapes.get(name, (1,)) for name in ("episode_index", "frame_index", *names)}
    wanted = {name: shape for name, shape in wanted.items() if name in shapes or name in BOOKKEEPING}
    images = {name for name in wanted if name in shapes and info.features[name].dtype == "image"}
    parts: dict[str, list[NDArray[Any]]] = {name: [] for name in wanted if name not in images}
    for path, group in itertools.groupby(episodes, lambda episode: episode.data_file):
        inside = list(group)
        rows = sum(episode.length for episode in inside)
        with open_parquet(path, list(wanted)) as file:
            if file.metadata.num_rows != rows:
                which = inside[0].name + (f" to {inside[-1].position}" if len(inside) > 1 else "")
                raise DatasetError(
                    f"{path} has {file.metadata.num_rows} rows, but the table of episodes says {rows} for {which}; "
                    "one of them is damaged"
                )
            others = set(file.schema_arrow.names) - set(shapes)
            if others:
                logger.debug("%s: columns that %s does not list are not read: %s", path, INFO, sorted(others))
            table = file.read(columns=list(parts))
        found = {name: _column(table[name], wanted[name], name, path) for name in parts}
        _check_rows(path, inside, found)
        for name, values in found.items():
            parts[name].append(values)
    return {name: np.concatenate(values) for name, values in parts.items()}


def _column(column: Any, shape: tuple[int, ...], name: str, path: str) -> NDArray[Any]:
    values = _numbers(column, f"column {name!r} of {path}")
    if values.shape[1] != np.prod(shape):
        raise DatasetError(
            f"column {name!r} of {path} has {values.shape[1]} numbers per step; expected {int(np.prod(shape))} by the "
            f"shape {shape} in {INFO}"
        )
    return values


def _numbers(column: Any, what: str) -> NDArray[Any]:
    """Values (rows, width) of a column of numbers, or of lists of one length (nested ones too).

    Args:
        column: pyarrow.ChunkedArray.
        what: for messages.

    Raises:
        DatasetError: no numbers, missing ones, or lists of different lengths.
    """
    import pyarrow as pa

    array = column.combine_chunks()
    array = array.storage if isinstance(array.type, pa.BaseExtensionType) else array
    rows = len(array)
    while pa.types.is_list(array.type) or pa.types.is_large_list(array.type) or pa.types.is_fixed_size_list(array.type):
        lengths = array.value_lengths().to_numpy(zero_copy_only=False)
        if array.null_count or (lengths != lengths[0]).any():
            raise DatasetError(f"{what} holds lists of different lengths, or none in places; damaged")
        array = array.flatten()
    if not (pa.types.is_integer(array.type) or pa.types.is_floating(array.type) or pa.types.is_boolean(array.type)):
        raise DatasetError(f"{what} holds {array.type}; expected numbers")
    if array.null_count:
        raise DatasetError(f"{what} lacks {array.null_count} of its {len(array)} values; damaged")
    values: NDArray[Any] = array.to_numpy(zero_copy_only=False)
    return values.reshape(rows, -1)


def _check_rows(path: str, episodes: Sequence[Episode], columns: dict[str, NDArray[Any]]) -> None:
    """Refuses rows of a file that are not those of its episodes, in order."""
    lengths = [episode.length for episode in episodes]
    steps = np.concatenate([np.arange(length) for length in lengths])
    expected = {"episode_index": np.repeat([episode.index for episode in episodes], lengths), "frame_index": steps}
    for name, values in expected.items():
        wrong = np.flatnonzero(columns[name][:, 0] != values)
        if wrong.size:
            row = wrong[0]
            raise DatasetError(
                f"{name} of {path} must be {values[row]} in row {row} (episode {expected['episode_index'][row]}, step "
                f"{steps[row]}, by the table of episodes), got {columns[name][row, 0]}; the dataset is damaged"
            )


class ImageRows(LazyArray):
    """Images (N, H, W, C) kept as PNG or JPEG files in a column of the data files."""

    def __init__(self, episodes: Sequence[Episode], key: str, shape: tuple[int, int, int]) -> None:
        self._key = key
        groups = itertools.groupby(episodes, lambda episode: episode.data_file)
        lengths = {path: sum(episode.length for episode in inside) for path, inside in groups}
        self._paths = list(lengths)
        self._ends = np.cumsum(list(lengths.values()))
        self._kept: tuple[tuple[str, int], Any] | None = None  # the row group read last
        super().__init__((int(self._ends[-1]), *shape), np.uint8)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}

    def read(self, start: int, stop: int) -> NDArray[np.uint8]:
        """See `LazyArray.read`; raises DatasetError where a file or an image is damaged."""
        out, done = self._empty(stop - start), 0
        number = int(np.searchsorted(self._ends, start, side="right"))
        while done < len(out):
            path, end = self._paths[number], int(self._ends[number])
            begin = int(self._ends[number - 1]) if number else 0
            last = min(stop, end)
            for row, data in self._files(path, start + done - begin, last - begin):
                name = f"{self._key!r} in row {row} of {path}"
                image = decode_image(data, self.shape[3], name)
                if image.shape != self.shape[1:]:
                    raise DatasetError(f"{name} is an image {image.shape}; expected {self.shape[1:]} by {INFO}")
                out[done] = image
                done += 1
            number += 1
        return out

    def _files(self, path: str, start: int, stop: int) -> Iterator[tuple[int, bytes]]:
        """Row and bytes of the images in rows `start` up to `stop` of a file."""
        with open_parquet(path, [self._key]) as file:
            first = 0
            for group in range(file.num_row_groups):
                count = file.metadata.row_group(group).num_rows
                low, high = max(start, first), min(stop, first + count)
                if low < high:
                    encoded = self._group(file, path, group)
                    for row in range(low, high):
                        data = encoded[row - first].as_py()
                        if not isinstance(data, bytes):
                            raise DatasetError(
                                f"{self._key!r} in row {row} of {path} holds no image, only a path; expected the "
                                "image file itself, as LeRobot writes it"
                            )
                        yield row, data
                first += count

    def _group(self, file: Any, path: str, group: int) -> Any:
        """The images of a row group, as bytes in a pyarrow array."""
        import pyarrow as pa

        kept = self._kept
        if kept is None or kept[0] != (path, group):
            column = file.read_row_group(group, columns=[self._key])[self._key].combine_chunks()
            if not pa.types.is_struct(column.type) or column.type.get_field_index("bytes") < 0:
                raise DatasetError(f"column {self._key!r} of {path} holds {column.type}; expected images (bytes, path)")
            kept = self._kept = ((path, group), column.field("bytes"))
        return kept[1]
