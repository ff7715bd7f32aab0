"""Files and folders that appear whole or not at all: written beside the target, then put in its place."""

import contextlib
import dataclasses
import errno
import hashlib
import importlib.metadata
import json
import math
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from scd_robot.errors import OutputError

__all__ = [
    "beside",
    "check_local",
    "check_target",
    "dataset_output",
    "file_digest",
    "package_versions",
    "replace_folder",
    "to_plain",
    "write_bytes",
    "write_json",
    "write_text",
]

_HINTS = {
    errno.ENOSPC: "the disk is full, free some space",
    errno.EDQUOT: "the disk quota is used up, free some space",
    errno.EACCES: "no write permission, choose another path",
    errno.EPERM: "no write permission, choose another path",
    errno.EROFS: "the file system is read-only, choose another path",
}


def check_target(path: str | Path) -> None:
    """Makes the folder of `path` and tries whether a file can be written there, before hours of work depend on it.

    Args:
        path: a file that will be written later and is not touched now; "-" = standard output.

    Raises:
        OutputError: it cannot be written.
    """
    if str(path) == "-":
        return
    target = Path(path)
    attempt = beside(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.is_dir():
            raise OutputError(f"cannot write {str(target)!r}: it is a folder; name a file")
        attempt.touch()
        attempt.unlink()
    except OSError as error:
        raise _refused(target, error) from error


def write_text(path: Path, text: str) -> None:
    """Writes a text file, in UTF-8, as `write_bytes` does."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a file; its folder is made where missing.

    Raises:
        OutputError: no permission, the disk is full; an earlier file of that name is left as it was.
    """
    part = beside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(data)
        part.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        raise _refused(path, error) from error


def write_json(path: str | Path, data: object) -> None:
    """Writes `data` as JSON, as `write_text` does.

    Args:
        path: the file; "-" = standard output.
        data: see `to_plain` for what it may hold.

    Raises:
        OutputError: the file cannot be written; an earlier file of that name is left as it was.
        TypeError: `data` holds something that is neither plain nor listed at `to_plain`.
    """
    text = json.dumps(to_plain(data), indent=2, allow_nan=False) + "\n"
    if str(path) == "-":
        sys.stdout.write(text)
    else:
        write_text(Path(path), text)


def to_plain(data: object) -> Any:
    """The same as types that JSON knows.

    Dataclasses and mappings become objects, sequences and numpy arrays lists, numpy scalars numbers, paths strings.
    JSON has neither NaN nor infinities: they become null.

    Raises:
        TypeError: for any other type.
    """
    if dataclasses.is_dataclass(data) and not isinstance(data, type):
        return {field.name: to_plain(getattr(data, field.name)) for field in dataclasses.fields(data)}
    if isinstance(data, Mapping):
        return {str(key): to_plain(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [to_plain(value) for value in data]
    if isinstance(data, np.ndarray | np.generic):
        return to_plain(data.tolist())
    if isinstance(data, os.PathLike):
        return os.fspath(data)
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if data is None or isinstance(data, bool | int | str):
        return data
    raise TypeError(f"JSON cannot hold a {type(data).__name__}: {data!r}")


@contextlib.contextmanager
def dataset_output(path: Path, kept: int = 0) -> Iterator[None]:
    """Turns what the system refuses while a dataset is written into one sentence.

    Args:
        path: of the dataset.
        kept: episodes that are readable all the same.

    Raises:
        OutputError: in the place of an OSError of the block.
    """
    try:
        yield
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        hint = _HINTS.get(error.errno or 0, "free some space or choose another path")
        finished = f" ({kept} finished episodes are kept)" if kept else ""
        raise OutputError(f"cannot write the dataset {path}: {reason}; {hint}{finished}") from error


def check_local(path: str | Path) -> None:
    """Refuses an address (s3://...) where a path is wanted: it would become a folder called "s3:".

    Raises:
        OutputError: it is one.
    """
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(path)):
        raise OutputError(f"{path} is an address, and datasets are written to local folders; write it there, then copy")


def replace_folder(new: Path, old: Path) -> None:
    """Puts the folder `new` in the place of `old`, where something may be; that goes last."""
    if not old.exists():
        new.rename(old)
        return
    retired = Path(tempfile.mkdtemp(prefix=f".{old.name}.", dir=old.parent))
    old.rename(retired / old.name)
    try:
        new.rename(old)
    except OSError:
        (retired / old.name).rename(old)
        retired.rmdir()
        raise
    shutil.rmtree(retired, ignore_errors=True)


def beside(target: Path) -> Path:
    """Where to write a file before it takes its place; no name that a user gives, nor another process."""
    return target.with_name(f".{target.name}.{os.getpid()}.part")


def file_digest(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    found = hashlib.sha256()
    with path.open("rb") as file:  # hashlib.file_digest is not in the Python 3.10 of robots
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()


def package_versions(names: Iterable[str]) -> dict[str, str]:
    """Of those of these distributions that are installed."""
    versions = {}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def _refused(target: Path, error: OSError) -> OutputError:
    not_a_folder = isinstance(error, FileExistsError | NotADirectoryError)
    reason = f"{str(target.parent)!r} is not a folder" if not_a_folder else (error.strerror or str(error)).lower()
    return OutputError(f"cannot write {str(target)!r}: {reason}; choose another path")
