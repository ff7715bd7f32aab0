"""Arrays of an HDF5 file that somebody else wrote: numbers only, stored in that file alone, and all of them there.

HDF5 takes a part that was never stored for zeros, follows links into other files, and allocates whatever a header
declares. Here each of these is an error.
"""

import contextlib
import errno
import importlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from scd_robot.datasets.hdf5 import probe
from scd_robot.datasets.lazy import LazyArray
from scd_robot.datasets.tasks import TASK_TEXT
from scd_robot.errors import DatasetError, MissingDependencyError, ScdRobotError

__all__ = [
    "Hdf5Rows", "arrays_below", "check_length", "child", "hdf5_file", "is_varying_bytes", "probe_files", "read_texts",
    "scalar_attributes", "shared_notes", "where",
]  # fmt: skip

PATIENCE_S = 60.0  # for one object of a file
MAX_CHUNK_BYTES = 1 << 30
MAX_RATIO = 1100  # of the sizes of an array after and before decompression; deflate reaches 1032
_PLAIN_BYTES = 1 << 26  # arrays up to this size may shrink as they like
_MAX_LINKS = 8  # soft links that lead to an object
_PROBED_FILES = 1000  # by one process
_CACHE_BYTES = 1 << 20  # of chunks, for each open array
_OPEN_ARRAYS = 64  # kept open by an `Hdf5Rows`
_FILTERS = (h5py.h5z.FILTER_DEFLATE, h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_FLETCHER32, h5py.h5z.FILTER_LZF)
_PLUGINS = range(32001, 33000)  # numbers of filters that come as plugins

# What h5py and numpy raise on damaged files.
_READ_ERRORS = (
    OSError, ValueError, KeyError, TypeError, RuntimeError, AttributeError, IndexError, ArithmeticError, MemoryError,
)  # fmt: skip


@contextlib.contextmanager
def _read_errors(what: str) -> Iterator[None]:
    """Turns whatever a library raises on damaged files into a `DatasetError` about `what`."""
    try:
        yield
    except ScdRobotError:
        raise
    except _READ_ERRORS as error:
        reason = " ".join(str(error).split())[:300]
        raise DatasetError(
            f"{what} cannot be read ({type(error).__name__}: {reason}); it is damaged, or of a kind that is not read"
        ) from error


@contextlib.contextmanager
def hdf5_file(path: str, probed: bool = False) -> Iterator[h5py.File]:
    """Opens a file for reading, after another process has shown that HDF5 survives it.

    Args:
        path: of the file.
        probed: `probe_files` has shown it already.

    Raises:
        DatasetError: not an HDF5 file, damaged (also where that shows only inside the block), or being written.
    """
    if not probed:
        probe_files([path])
    with _read_errors(path), _open(path) as file:
        yield file


def probe_files(paths: Sequence[str]) -> None:
    """Lets another process touch the files first, with the same packages.

    Raises:
        DatasetError: HDF5 crashes on one of them, or does not come to an end.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    for start in range(0, len(paths), _PROBED_FILES):
        some = paths[start : start + _PROBED_FILES]
        command = [sys.executable, "-P", probe.__file__, str(PATIENCE_S), *some]
        run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment, check=False)
        if run.returncode != 0:
            path = some[max(0, len(run.stdout) - 1)]  # a byte for each that was begun
            fate = "crashes on it" if run.returncode < 0 else f"does not come to an end with it in {PATIENCE_S:g} s"
            raise DatasetError(f"{path} cannot be read: HDF5 {fate}; the file is damaged, copy or record it again")


def _open(path: str) -> h5py.File:
    try:
        return h5py.File(path, "r", rdcc_nbytes=_CACHE_BYTES)
    except OSError as error:
        if "unable to lock file" not in str(error):
            raise
        if error.errno in (errno.EAGAIN, errno.EACCES):
            raise DatasetError(
                f"{path} is being written by another program; let it finish, or close the file"
            ) from None
        return h5py.File(path, "r", rdcc_nbytes=_CACHE_BYTES, locking=False)  # its file system has no locks


def where(item: h5py.HLObject) -> str:
    """Of an object, for messages: its place in the file, and the file."""
    return f"{str(item.name).strip('/') or '/'!r} of {item.file.filename}"


def child(group: h5py.Group, name: str) -> Any:
    """The group or dataset of this name, or None where there is none.

    Raises:
        DatasetError: it is a link that leaves the file, or leads nowhere.
    """
    link = group.get(name, getlink=True)
    if link is None or isinstance(link, h5py.HardLink):
        return None if link is None else group[name]
    return _follow(group, name, _MAX_LINKS)


def _follow(group: Any, name: str, links: int) -> Any:
    link = group.get(name, getlink=True) if isinstance(group, h5py.Group) else None
    if isinstance(link, h5py.HardLink):
        return group[name]
    if isinstance(link, h5py.ExternalLink):
        raise DatasetError(
            f"{name!r} in {where(group)} is a link to the file {link.filename!r}; put the data into one file"
        )
    if link is None or links == 0:
        raise DatasetError(f"a link leads to {name!r} in {where(group)}, and nowhere from there; damaged")
    place = group.file if link.path.startswith("/") else group
    for part in filter(None, link.path.split("/")):
        place = _follow(place, part, links - 1)
    return place


def arrays_below(group: h5py.Group) -> dict[str, h5py.Dataset]:
    """All datasets in a group and in its subgroups, by their names from there on ("robot/joint_pos"), sorted.

    Raises:
        DatasetError: a link leaves the file or leads nowhere, a name is not printable, or groups hold each other.
    """
    found: dict[str, h5py.Dataset] = {}
    seen, waiting = {group}, [("", group)]
    while waiting:
        prefix, parent = waiting.pop()
        for name in parent:
            item, full = child(parent, name), f"{prefix}{name}"
            if not full.isprintable() or item is None:
                raise DatasetError(f"{full!r} in {where(group)} is a name or a link that cannot be read; damaged")
            if isinstance(item, h5py.Dataset):
                found[full] = item
            elif item in seen:
                raise DatasetError(f"the group {where(item)} lies in several groups at once; damaged")
            elif isinstance(item, h5py.Group):
                seen.add(item)
                waiting.append((f"{full}/", item))
    return dict(sorted(found.items()))


class Hdf5Rows(LazyArray):
    """Datasets of one HDF5 file one after the other, read when they are indexed; opened anew in each process.

    Attributes:
        lengths: (E,) int64 rows of each dataset.
    """

    def __init__(
        self, path: str, datasets: Sequence[h5py.Dataset], packed: bool = False, keep_open: bool = True
    ) -> None:
        """Checks the datasets, and uses them as long as their file is open.

        Args:
            path: of the file.
            datasets: E of them, with the same shape but for the first axis.
            packed: rows of bytes (of varying or one length) are taken as they are.
            keep_open: after a read; otherwise each opens the file anew, so that there may be any number of files.

        Raises:
            DatasetError: not of numbers, not stored in this file, not stored completely, or not alike.
            MissingDependencyError: they are compressed by a plugin that is not installed.
        """
        file_bytes = os.path.getsize(path)
        for dataset in datasets:
            _check_numbers(dataset, packed)
            _check_filters(dataset)
            _check_storage(dataset, file_bytes)
            if dataset.shape[1:] != datasets[0].shape[1:]:
                is_bytes = dataset.dtype == np.uint8 and dataset.ndim == 2
                what = "store pictures decoded, if compressed ones are in these bytes, or " if is_bytes else ""
                raise DatasetError(
                    f"{where(dataset)} has rows of shape {dataset.shape[1:]}, but those of "
                    f"{str(datasets[0].name).strip('/')!r} are {datasets[0].shape[1:]}; {what}leave one of them out"
                )
            if dataset.ndim == 4 and dataset.dtype != datasets[0].dtype:
                raise DatasetError(
                    f"{where(dataset)} holds {dataset.dtype} images, but {str(datasets[0].name).strip('/')!r} "
                    f"{datasets[0].dtype} ones; leave one of them out"
                )
        self.lengths = np.asarray([len(dataset) for dataset in datasets], np.int64)
        self._path, self._names = os.path.abspath(path), [str(dataset.name) for dataset in datasets]
        self._ends = np.cumsum(self.lengths)
        self._keep_open, self._is_own = keep_open, False  # the first file is the caller's to close
        # By which process; a closed file is false.
        self._opened: tuple[int, h5py.File, dict[int, h5py.Dataset]] | None = None
        self._opened = (os.getpid(), datasets[0].file, dict(enumerate(datasets)))
        dtype = np.result_type(*(dataset.dtype for dataset in datasets))
        super().__init__((int(self.lengths.sum()), *datasets[0].shape[1:]), dtype)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """See `LazyArray.read`; raises DatasetError where the file is damaged."""
        out = self._empty(stop - start)
        number = int(np.searchsorted(self._ends, start, side="right"))
        done = 0
        while done < len(out):
            begin = int(self._ends[number] - self.lengths[number])
            low, high = start + done - begin, min(stop, int(self._ends[number])) - begin
            with _read_errors(f"{self._names[number].strip('/')!r} of {self._path}"):
                out[done : done + high - low] = self._dataset(number)[low:high]
            done += high - low
            number += 1
        if self._is_own and not self._keep_open and self._opened is not None:
            self._opened[1].close()
            self._opened = None
        return out

    def _dataset(self, number: int) -> h5py.Dataset:
        if self._opened is None or self._opened[0] != os.getpid() or not self._opened[1]:
            self._opened, self._is_own = (os.getpid(), _open(self._path), {}), True
        _, file, datasets = self._opened
        if number not in datasets:
            if len(datasets) >= _OPEN_ARRAYS:
                datasets.clear()
            dataset = file[self._names[number]]
            if dataset.shape != (self.lengths[number], *self.shape[1:]):
                raise DatasetError(f"{where(dataset)} has changed since it was opened; open the dataset again")
            _check_filters(dataset)  # brings plugins into this process
            datasets[number] = dataset
        return datasets[number]


def check_length(name: str, length: int, expected: int, damaged: str) -> None:
    """Raises DatasetError, which ends in `damaged`, where an array has another number of steps than the actions."""
    if length != expected:
        what = damaged
        if length == expected + 1:
            what = "if the last one was seen after the last action, as some recorders keep it, cut it off"
        raise DatasetError(f"{name} has {length} steps, but its actions have {expected}; {what}")


def is_varying_bytes(dataset: h5py.Dataset) -> bool:
    """Whether each row is bytes, as many as it likes."""
    return h5py.check_vlen_dtype(dataset.dtype) == np.uint8


def _check_numbers(dataset: h5py.Dataset, packed: bool) -> None:
    if dataset.dtype.kind not in "biuf" and not (packed and (dataset.dtype.kind == "S" or is_varying_bytes(dataset))):
        text = h5py.check_string_dtype(dataset.dtype) is not None
        varying = not text and h5py.check_vlen_dtype(dataset.dtype) is not None
        what = "rows of different lengths (compressed pictures?)" if varying else f"{dataset.dtype} objects"
        raise DatasetError(
            f"{where(dataset)} holds {what}, which are not read; store numbers, pictures as uint8 (T, height, width, "
            "channel), or name other keys with --keys"
        )
    if not dataset.shape:
        raise DatasetError(f"{where(dataset)} is a single value; expected one row per control step")
    if dataset.is_virtual or dataset.external:
        raise DatasetError(f"the values of {where(dataset)} lie in other arrays or files; store them in this array")


def _check_filters(dataset: h5py.Dataset) -> None:
    """Refuses compression that this installation cannot undo, and kinds with which HDF5 crashes on damaged files."""
    settings = dataset.id.get_create_plist()
    for code in (settings.get_filter(i)[0] for i in range(settings.get_nfilters())):
        if code in _PLUGINS and not h5py.h5z.filter_avail(code):
            with contextlib.suppress(ImportError):
                importlib.import_module("hdf5plugin")  # adds what it has to h5py
            if not h5py.h5z.filter_avail(code):
                raise MissingDependencyError(
                    f"{where(dataset)} is compressed by the HDF5 plugin {code}: pip install hdf5plugin"
                )
        elif code not in _FILTERS and code not in _PLUGINS:
            raise DatasetError(
                f"{where(dataset)} is compressed by the filter {code}, which is not read; use gzip: h5repack -f GZIP=4"
            )


def _check_storage(dataset: h5py.Dataset, file_bytes: int) -> None:
    """Refuses arrays of which parts were lost or never stored, and those that are small only in the file."""
    item_bytes = dataset.id.get_type().get_size()
    needed, stored = math.prod(dataset.shape) * item_bytes, dataset.id.get_storage_size()
    if needed == 0:
        return
    if dataset.chunks is None:
        complete = stored >= needed
    else:
        if math.prod(dataset.chunks) * item_bytes > MAX_CHUNK_BYTES:
            raise DatasetError(f"{where(dataset)} has chunks of over {MAX_CHUNK_BYTES >> 30} GiB; damaged")
        chunks = math.prod(-(-size // step) for size, step in zip(dataset.shape, dataset.chunks, strict=True))
        complete = dataset.id.get_num_chunks() >= chunks
    if not complete or stored > file_bytes:
        raise DatasetError(
            f"{where(dataset)} is declared as {dataset.shape}, but parts of it are not stored; the dataset is damaged, "
            "copy or record it again"
        )
    if needed > _PLAIN_BYTES and needed > MAX_RATIO * stored:
        raise DatasetError(f"{where(dataset)} would grow from {stored} to {needed} bytes; refused as a bomb")


def read_texts(dataset: h5py.Dataset) -> list[str]:
    """The texts of a dataset (n,), of fixed or variable length.

    Raises:
        DatasetError: it holds something else, or is not stored in this file completely.
    """
    if h5py.check_string_dtype(dataset.dtype) is None or dataset.ndim != 1:
        raise DatasetError(f"{where(dataset)} must be a list of texts, got {dataset.dtype} {dataset.shape}")
    if dataset.is_virtual or dataset.external:
        raise DatasetError(f"the values of {where(dataset)} lie in other arrays or files; store them in this array")
    _check_filters(dataset)
    _check_storage(dataset, os.path.getsize(dataset.file.filename))
    return [bytes(value).decode(errors="replace") for value in dataset[:]]


def scalar_attributes(item: h5py.HLObject) -> dict[str, str | int | float]:
    """Texts and numbers noted at a group; other attributes are left out."""
    found: dict[str, str | int | float] = {}
    for name in item.attrs:
        if item.attrs.get_id(name).shape not in ((), (1,)):  # told before it is read: a damaged one may be huge
            continue
        value = np.asarray(item.attrs[name]).reshape(-1)[0]
        if isinstance(value, bytes):
            found[name] = value.decode(errors="replace")
        elif isinstance(value, str):
            found[name] = value.encode(errors="surrogateescape").decode(errors="replace")
        elif isinstance(value, np.bool_ | np.integer):
            found[name] = int(value)
        elif isinstance(value, np.floating):
            found[name] = float(value)
    return found


def shared_notes(noted: Sequence[Mapping[str, str | int | float]]) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """What is noted at all of E >= 1 episodes under one name, as numbers (E,) and as texts (E of them).

    "task" is what is noted so, or else where others note the task in words.
    """
    info: dict[str, NDArray[Any]] = {}
    text: dict[str, Any] = {}
    for name in noted[0]:
        values = [attributes.get(name) for attributes in noted]
        if all(isinstance(value, str) for value in values):
            text[name] = values
        elif all(isinstance(value, int | float) for value in values):
            info[name] = np.asarray(values)
    tasks = [_task(attributes) for attributes in noted]
    if TASK_TEXT not in info and None not in tasks:
        text[TASK_TEXT] = tasks
    return info, text


def _task(noted: Mapping[str, str | int | float]) -> str | None:
    """Words of the task: `task`, `language_instruction`, or `lang` in the JSON object `ep_meta` (robocasa)."""
    inner: Any = None
    with contextlib.suppress(ValueError, RecursionError):  # a text that is no JSON tells no task
        inner = json.loads(str(noted.get("ep_meta", "")))
    lang = inner.get("lang") if isinstance(inner, dict) else None
    words = (noted.get(TASK_TEXT), noted.get("language_instruction"), lang)
    return next((text for text in words if isinstance(text, str) and text), None)
