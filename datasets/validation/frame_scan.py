"""One pass over the images of a dataset, reading each once: what equals what, and what cannot be read.

Shapes: N control steps of all episodes together, E episodes.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scd_robot.datasets.lazy import RowArray
from scd_robot.datasets.validation.findings import episode_of, episode_slices, follows
from scd_robot.errors import DatasetError

__all__ = ["FrameScan", "scan_frames"]

_BLOCK_BYTES = 1 << 26


@dataclass(frozen=True)
class FrameScan:
    """What one pass saw.

    Attributes:
        same: (N,) whether a frame equals the one before, of the same episode.
        not_finite: (N,) whether it holds NaN or infinite values.
        unreadable: first row that cannot be read in an episode, and why; the rest of that episode counts for nothing.
        digests: E, of all frames of an episode; None where some cannot be read.
        lowest: number in all frames.
        highest: number in all frames.
    """

    same: NDArray[np.bool_]
    not_finite: NDArray[np.bool_]
    unreadable: list[tuple[int, str]]
    digests: list[bytes | None]
    lowest: float
    highest: float


def scan_frames(array: RowArray, ends: NDArray[np.int64], tick: Callable[[int], object] = int) -> FrameScan:
    """Looks at every row of an array (N, ...) once, in blocks.

    Args:
        array: of images, or anything else.
        ends: (E,) cumulative.
        tick: called with the number of rows just read.
    """
    same = follows(ends, len(array))
    not_finite = np.zeros(len(array), bool)
    unreadable: list[tuple[int, str]] = []
    hashes = [hashlib.blake2b(digest_size=16) for _ in ends]
    lowest, highest = np.inf, -np.inf
    last: tuple[int, NDArray[Any]] | None = None  # number and values of the last row that was read
    done = 0
    slices = episode_slices(ends)
    for start, block in _readable_blocks(array, ends, unreadable):
        stop = start + len(block)
        same[start + 1 : stop] &= _equal(block[1:], block[:-1])
        same[start] &= last is not None and last[0] == start - 1 and bool(_equal(block[:1], last[1][None])[0])
        last = (stop - 1, block[-1].copy())
        if np.issubdtype(block.dtype, np.inexact):
            not_finite[start:stop] = ~np.isfinite(block).reshape(len(block), -1).all(axis=1)
        lowest = min(lowest, float(np.fmin.reduce(block, axis=None)))
        highest = max(highest, float(np.fmax.reduce(block, axis=None)))
        for number in range(int(episode_of(np.asarray(start), ends)), int(episode_of(np.asarray(stop - 1), ends)) + 1):
            rows = slices[number]
            part = block[max(rows.start, start) - start : min(rows.stop, stop) - start]
            hashes[number].update(np.ascontiguousarray(part).tobytes())
        tick(stop - done)
        done = stop
    tick(len(array) - done)
    digests: list[bytes | None] = [known.digest() for known in hashes]
    for row, _ in unreadable:
        number = int(episode_of(np.asarray(row), ends))
        digests[number] = None
        same[row : int(ends[number])] = False
    return FrameScan(same, not_finite, unreadable, digests, lowest, highest)


def _equal(first: NDArray[Any], second: NDArray[Any]) -> NDArray[np.bool_]:
    return np.asarray((first == second).all(axis=tuple(range(1, first.ndim))))


def _readable_blocks(
    array: RowArray, ends: NDArray[np.int64], unreadable: list[tuple[int, str]]
) -> Iterator[tuple[int, NDArray[Any]]]:
    """First row and rows of successive parts that can be read; what cannot is added to `unreadable`."""
    size = max(1, _BLOCK_BYTES * len(array) // max(array.nbytes, 1))
    for start in range(0, len(array), size):
        stop = min(start + size, len(array))
        block, error = _try(array, start, stop)
        if error is None:
            yield start, block
            continue
        for rows in episode_slices(ends):
            begin, end = max(rows.start, start), min(rows.stop, stop)
            if begin >= end or any(rows.start <= row < rows.stop for row, _ in unreadable):
                continue
            part, error = _try(array, begin, end)
            if error is not None:
                first = _first_unreadable(array, begin, end)
                unreadable.append((first, error))
                part, _ = _try(array, begin, first)
            if len(part):
                yield begin, part


def _try(array: RowArray, start: int, stop: int) -> tuple[NDArray[Any], str | None]:
    try:
        return array[start:stop], None
    except DatasetError as error:
        return np.empty((0, *array.shape[1:]), array.dtype), str(error)


def _first_unreadable(array: RowArray, start: int, stop: int) -> int:
    """First row of a part that cannot be read, by halves."""
    while stop - start > 1:
        middle = (start + stop) // 2
        if _try(array, start, middle)[1] is None:
            start = middle
        else:
            stop = middle
    return start
