"""Writes results for machines: JSON that appears whole or not at all."""

import contextlib
import dataclasses
import json
import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from scd_robot.errors import OutputError

__all__ = ["to_plain", "write_json"]


def write_json(path: str | Path, data: object) -> None:
    """Writes `data` as JSON, beside the target first and then renamed over it.

    Args:
        path: the file to write, its folder made where missing; "-" = standard output.
        data: see `to_plain` for what it may hold.

    Raises:
        OutputError: the file cannot be written; an earlier file of that name is left as it was.
        TypeError: `data` holds something that is neither plain nor listed at `to_plain`.
    """
    text = json.dumps(to_plain(data), indent=2, allow_nan=False) + "\n"
    if str(path) == "-":
        sys.stdout.write(text)
        return
    target = Path(path)
    beside = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(text, encoding="utf-8")
        beside.replace(target)
    except OSError as error:
        with contextlib.suppress(OSError):
            beside.unlink()
        not_a_folder = isinstance(error, FileExistsError | NotADirectoryError)
        reason = f"{str(target.parent)!r} is not a folder" if not_a_folder else (error.strerror or str(error)).lower()
        raise OutputError(f"cannot write the JSON file {str(target)!r}: {reason}; choose another path") from error


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
