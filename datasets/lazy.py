"""Arrays that stay on disk until rows of them are asked for, and that are indexed as numpy arrays are.

A reader gives images and other large arrays in this form; whoever trains on them decides what fits into memory.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Union

import numpy as np
from numpy.typing import DTypeLike, NDArray

from scd_robot.errors import ShapeError

__all__ = ["ConcatenatedArray", "LazyArray", "MappedArray", "RowArray", "SelectedArray"]


class LazyArray(ABC):
    """Array (N, ...) whose rows are read when it is indexed on its first axis.

    Indexing gives numpy arrays: with a slice (step 1), an integer, a boolean mask (N,), or integers of any shape. Rows
    that are asked for more than once are read once, neighbouring rows in one go and in ascending order. Subclasses say
    how `read` is done; they can be pickled, so that worker processes open the files for themselves.

    Attributes:
        shape: (N, ...).
        dtype: of the rows that come out.
    """

    def __init__(self, shape: tuple[int, ...], dtype: DTypeLike) -> None:
        self.shape = shape
        self.dtype = np.dtype(dtype)

    @abstractmethod
    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Rows `start` up to `stop`, 0 <= start < stop <= N."""

    def read_into(self, start: int, stop: int, out: NDArray[Any]) -> None:
        """The same into `out` (stop - start, ...); overridden where that saves a copy."""
        out[:] = self.read(start, stop)

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes it would take in memory."""
        return int(np.prod(self.shape)) * self.dtype.itemsize

    def __getitem__(self, rows: Any) -> NDArray[Any]:
        if isinstance(rows, slice):
            start, stop, step = rows.indices(len(self))
            if step != 1:
                return self._take(np.arange(start, stop, step))
            return self.read(start, stop) if stop > start else self._empty(0)
        index = np.asarray(rows)
        if index.dtype == bool:
            if index.shape != (len(self),):
                raise ShapeError(f"a mask must be ({len(self)},), got {index.shape}")
            index = np.flatnonzero(index)
        if index.size == 0:
            index = index.astype(np.int64)
        if not np.issubdtype(index.dtype, np.integer):
            raise IndexError(f"rows must be integers, a mask or a slice, got {index.dtype}")
        return self._take(index)

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray[Any]:
        if copy is False:
            raise ValueError("an array on disk cannot be had without a copy")
        return np.asarray(self[:], dtype=dtype)

    def _empty(self, count: int) -> NDArray[Any]:
        return np.empty((count, *self.shape[1:]), self.dtype)

    def _take(self, index: NDArray[np.integer[Any]]) -> NDArray[Any]:
        """Rows at `index` (any shape)."""
        if not index.size:
            return self._empty(0).reshape(*index.shape, *self.shape[1:])
        wanted = index.astype(np.int64, copy=False).reshape(-1)
        if not -len(self) <= wanted.min() <= wanted.max() < len(self):
            raise IndexError(f"rows {wanted.min()} to {wanted.max()} of an array with {len(self)} rows")
        wanted = np.where(wanted < 0, wanted + len(self), wanted)
        out = self._empty(len(wanted))
        begins = np.flatnonzero(np.diff(wanted, prepend=-2) != 1)  # of windows of successive rows
        ends = np.append(begins[1:], len(wanted))
        windows = sorted(zip(wanted[begins].tolist(), (wanted[ends - 1] + 1).tolist(), begins.tolist(), strict=True))
        for start, stop, parts in _joined(windows):
            if len(parts) == 1:
                place = parts[0][2]
                self.read_into(start, stop, out[place : place + stop - start])
                continue
            rows = self.read(start, stop)
            for first, last, place in parts:
                out[place : place + last - first] = rows[first - start : last - start]
        return out.reshape(*index.shape, *self.shape[1:])


Window = tuple[int, int, int]  # first row, last + 1, and where in the result they belong


def _joined(windows: Sequence[Window]) -> Iterator[tuple[int, int, list[Window]]]:
    """Windows in ascending order, those that touch or overlap together: first row, last + 1, and which they are."""
    start, stop, parts = windows[0][0], windows[0][1], [windows[0]]
    for window in windows[1:]:
        if window[0] > stop:
            yield start, stop, parts
            start, stop, parts = window[0], window[1], []
        stop = max(stop, window[1])
        parts.append(window)
    yield start, stop, parts


RowArray = Union[NDArray[Any], LazyArray]  # noqa: UP007 - NDArray[Any] has no `|` with a class at run time


class ConcatenatedArray(LazyArray):
    """Arrays one after the other; all have the same shape but for the first axis, and the same dtype."""

    def __init__(self, parts: Sequence[RowArray]) -> None:
        shapes = {(part.shape[1:], part.dtype) for part in parts}
        if len(shapes) != 1:
            raise ShapeError(f"arrays that are joined must have one shape and dtype, got {sorted(map(str, shapes))}")
        self._parts = list(parts)
        self._ends = np.cumsum([len(part) for part in parts])
        super().__init__((int(self._ends[-1]), *parts[0].shape[1:]), parts[0].dtype)

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """See `LazyArray.read`."""
        out, done = self._empty(stop - start), 0
        first = int(np.searchsorted(self._ends, start, side="right"))
        for number in range(first, len(self._parts)):
            begin = int(self._ends[number]) - len(self._parts[number])
            low, high = max(start, begin), min(stop, int(self._ends[number]))
            if low >= high:
                break
            out[done : done + high - low] = self._parts[number][low - begin : high - begin]
            done += high - low
        return out


class SelectedArray(LazyArray):
    """Some rows of another array, in the order given."""

    def __init__(self, base: RowArray, rows: NDArray[np.int64]) -> None:
        super().__init__((len(rows), *base.shape[1:]), base.dtype)
        self._base, self._rows = base, rows

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """See `LazyArray.read`."""
        return self._base[self._rows[start:stop]]


class MappedArray(LazyArray):
    """Another array after a function of its rows, (n, ...) -> (n, ...)."""

    def __init__(
        self, base: RowArray, function: Callable[[NDArray[Any]], NDArray[Any]], shape: tuple[int, ...], dtype: DTypeLike
    ) -> None:
        super().__init__((len(base), *shape), dtype)
        self._base, self._function = base, function

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """See `LazyArray.read`."""
        return self._function(self._base[start:stop])
