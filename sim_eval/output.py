"""The output folder of an evaluation: never mixed with other files, never half-written."""

import json
import math
import os
from pathlib import Path
from typing import Any

from scd_robot.errors import OutputError

__all__ = ["EpisodeLog", "check_output_folder", "prepare_output_folder", "write_file", "write_json"]

_OUR_FILES = ("result.json", "episodes.jsonl", "report.html", "videos/episode_*.mp4")


def check_output_folder(out: Path, overwrite: bool) -> None:
    """Refuses a folder that holds something, without touching it.

    Raises:
        OutputError: `out` is a file, or a folder that is not empty (with `overwrite`: fine).
    """
    try:
        if out.exists() and not out.is_dir():
            raise OutputError(f"the output folder {out} is a file; choose another folder")
        if out.is_dir() and any(out.iterdir()) and not overwrite:
            raise OutputError(f"the output folder {out} is not empty; choose another one, or allow overwriting")
    except OSError as error:
        raise OutputError(f"cannot look into the output folder {out}: {error.strerror or error}") from error


def prepare_output_folder(out: Path) -> None:
    """Creates the folder and removes what an earlier evaluation wrote there; files of others stay.

    Raises:
        OutputError: the folder cannot be written.
    """
    try:
        (out / "videos").mkdir(parents=True, exist_ok=True)
        for pattern in _OUR_FILES:
            for path in (*out.glob(pattern), *out.glob(pattern + ".part")):
                path.unlink()
    except OSError as error:
        raise OutputError(f"cannot write to the output folder {out}: {error.strerror or error}") from error


def write_file(path: Path, content: str) -> None:
    """Writes a text file beside its name and renames it, so that it is never seen half-written.

    Raises:
        OutputError: no permission, or the disk is full.
    """
    beside = path.with_name(path.name + ".part")
    try:
        beside.write_text(content, encoding="utf-8")
        os.replace(beside, path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Writes a JSON file as `write_file` does.

    Raises:
        OutputError: no permission, or the disk is full.
    """
    write_file(path, json.dumps(_finite(document), indent=2, allow_nan=False) + "\n")


class EpisodeLog:
    """A JSON-lines file that holds every finished episode even when the evaluation is killed.

    Args:
        path: of the file; None writes nothing.

    Raises:
        OutputError: no permission, or the disk is full.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path

    def append(self, record: dict[str, Any]) -> None:
        """Adds one line and hands it to the operating system."""
        if self._path is None:
            return
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(_finite(record), allow_nan=False) + "\n")
        except OSError as error:
            raise OutputError(f"cannot write {self._path}: {error.strerror or error}") from error


def _finite(value: Any) -> Any:
    """The same document with null for NaN and infinite numbers, which JSON does not know."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
