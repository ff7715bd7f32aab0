"""The output folder of an evaluation: never mixed with other files, never half-written."""

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from scd_robot.errors import OutputError
from scd_robot.output import to_plain

__all__ = ["EpisodeLog", "check_output_folder", "prepare_output_folder"]

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
        """Adds one line and hands it to the operating system; a line that does not fit is taken back."""
        if self._path is None:
            return
        line = json.dumps(to_plain(record), allow_nan=False) + "\n"
        size = 0
        try:
            size = self._path.stat().st_size if self._path.exists() else 0
            with self._path.open("a", encoding="utf-8") as file:
                file.write(line)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.truncate(self._path, size)
            raise OutputError(f"cannot write {self._path}: {error.strerror or error}") from error
