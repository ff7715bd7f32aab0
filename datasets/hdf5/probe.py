"""Touches everything in HDF5 files that a reader will touch: a program, run in a process of its own.

HDF5 believes what it finds in a file. Damaged ones can crash it, or keep it busy for ever; then this process ends with
another code than 0, and not the one that reads the file. Errors that h5py raises are left to the reader.

Imports nothing but h5py, so that it starts quickly.
"""

import contextlib
import faulthandler
import os
import sys

import h5py

_LEFT_OUT = "next_obs"  # repeats `obs`, and nobody reads it


def main(path: str, patience_s: float) -> None:
    """Walks the file; ends the process where one object takes longer than `patience_s` [s]."""
    with contextlib.suppress(Exception), open(os.devnull, "w") as nowhere, _open(path) as file:
        seen, waiting = {file["/"]}, [file["/"]]
        while waiting:
            group = waiting.pop()
            faulthandler.dump_traceback_later(patience_s, exit=True, file=nowhere)
            _touch_attributes(group)
            for name in _names(group):
                faulthandler.dump_traceback_later(patience_s, exit=True, file=nowhere)
                with contextlib.suppress(Exception):
                    if not isinstance(group.get(name, getlink=True), h5py.HardLink) or name == _LEFT_OUT:
                        continue
                    item = group[name]
                    if isinstance(item, h5py.Dataset):
                        _touch_dataset(item)
                    elif isinstance(item, h5py.Group) and item not in seen:
                        seen.add(item)
                        waiting.append(item)


def _open(path: str) -> h5py.File:
    try:
        return h5py.File(path, "r")
    except BlockingIOError:  # it is being written; told by the reader
        raise
    except OSError:
        return h5py.File(path, "r", locking=False)  # its file system may have no locks


def _names(group: h5py.Group) -> list[str]:
    with contextlib.suppress(Exception):
        return list(group)
    return []


def _touch_attributes(group: h5py.Group) -> None:
    with contextlib.suppress(Exception):
        for name in group.attrs:
            with contextlib.suppress(Exception):
                if group.attrs.get_id(name).shape in ((), (1,)):
                    group.attrs[name]


def _touch_dataset(dataset: h5py.Dataset) -> None:
    is_text = h5py.check_string_dtype(dataset.dtype) is not None
    is_varying = not is_text and h5py.check_vlen_dtype(dataset.dtype) is not None
    if dataset.is_virtual or dataset.external:
        return
    settings = dataset.id.get_create_plist()
    for index in range(settings.get_nfilters()):
        settings.get_filter(index)
    if dataset.chunks is not None:
        dataset.id.get_num_chunks()
    if dataset.id.get_storage_size() > 0 and dataset.ndim == 1 and is_text:
        dataset[:]
    if dataset.id.get_storage_size() > 0 and dataset.ndim == 1 and is_varying:  # pictures: not all in memory at once
        for row in range(len(dataset)):
            dataset[row]


if __name__ == "__main__":
    for path in sys.argv[2:]:
        print(end=".", flush=True)  # tells which one was begun
        main(path, float(sys.argv[1]))
