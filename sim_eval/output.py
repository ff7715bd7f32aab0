"""The output folder of an evaluation: never mixed with other files, never half-written."""

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from scd_robot.errors import DatasetError, OutputError
from scd_robot.output import beside, to_plain
from scd_robot.sim_eval.faults import ObservationFaults
from scd_robot.types import ActionArray

__all__ = [
    "EpisodeLog",
    "check_output_folder",
    "episode_origin",
    "prepare_output_folder",
    "read_actions",
    "remove_comparison",
    "remove_delay_curve",
    "remove_evaluation",
    "write_actions",
]

_ACTIONS = "actions.safetensors"
_OUR_FILES = (
    *("result.json", "episodes.jsonl", "report.html", _ACTIONS, "videos/episode_*.mp4"),
    *("history.json", "history.html", "latency.json", "latency.html"),
)
_FILES_OF_A_COMPARISON = ("comparison.json", "comparison.html", "videos/episode_*_[ab].mp4")


def check_output_folder(out: Path, overwrite: bool) -> None:
    """Refuses a folder that holds something, without touching it.

    Raises:
        OutputError: `out` is a file, or a folder that is not empty (with `overwrite`: fine).
    """
    try:
        if out.exists() and not out.is_dir():
            raise OutputError(f"the output folder {out} is a file; choose another folder")
        if out.is_dir() and any(out.iterdir()) and not overwrite:
            raise OutputError(
                f"the output folder {out} is not empty; choose another one, or allow overwriting (--overwrite)"
            )
    except OSError as error:
        raise OutputError(f"cannot look into the output folder {out}: {error.strerror or error}") from error


def prepare_output_folder(out: Path) -> None:
    """Creates the folder and removes what an earlier evaluation wrote there; files of others stay.

    Raises:
        OutputError: the folder cannot be written.
    """
    try:
        (out / "videos").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot write to the output folder {out}: {error.strerror or error}") from error
    remove_evaluation(out)


def remove_evaluation(out: Path) -> None:
    """Removes what an evaluation wrote into a folder, which need not be there; files of others stay.

    Raises:
        OutputError: no permission.
    """
    _remove(out, _OUR_FILES)


def remove_delay_curve(out: Path) -> None:
    """Removes what an evaluation, or one per delay, wrote into a folder, which need not be there; files of others stay.

    Raises:
        OutputError: no permission.
    """
    remove_evaluation(out)
    for folder in out.glob("latency_*ms"):
        remove_evaluation(folder)
        for emptied in (folder / "videos", folder):
            with contextlib.suppress(OSError):  # something else is in it
                emptied.rmdir()


def remove_comparison(out: Path) -> None:
    """Removes what a comparison wrote into a folder, which need not be there, but for the evaluations in it.

    Raises:
        OutputError: no permission.
    """
    _remove(out, _FILES_OF_A_COMPARISON)


def _remove(out: Path, patterns: Sequence[str]) -> None:
    try:
        for pattern in map(Path, patterns):
            parts = pattern.with_name(f".{pattern.name}.*.part")  # see `scd_robot.output.beside`
            for path in (*out.glob(str(pattern)), *out.glob(str(parts))):
                path.unlink()
    except OSError as error:
        raise OutputError(f"cannot write to the output folder {out}: {error.strerror or error}") from error


def write_actions(out: Path, actions: Mapping[int, ActionArray]) -> None:
    """Keeps what was executed, so that any episode can be replayed.

    Args:
        out: the output folder.
        actions: (steps, Da) by episode index.

    Raises:
        OutputError: no permission, or the disk is full.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    part = beside(out / _ACTIONS)
    try:
        save_file({str(index): np.ascontiguousarray(array) for index, array in sorted(actions.items())}, part)
        part.replace(out / _ACTIONS)
    except (OSError, SafetensorError) as error:
        part.unlink(missing_ok=True)
        raise OutputError(f"cannot write {out / _ACTIONS}: {error}") from error


def read_actions(out: Path) -> dict[int, ActionArray]:
    """What an evaluation executed, (steps, Da) by episode index; empty where it was not kept.

    Raises:
        DatasetError: the file is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return {int(index): array for index, array in load_file(out / _ACTIONS).items()}
    except FileNotFoundError:
        return {}
    except (OSError, SafetensorError, ValueError) as error:
        raise DatasetError(f"cannot read {out / _ACTIONS}: {error}; evaluate again") from error


def episode_origin(
    environment: str, policy: str, made: Mapping[str, Any], faults: ObservationFaults | None
) -> dict[str, Any]:
    """What tells the lines of several evaluations apart once their files are one.

    Args:
        environment: its name.
        policy: its name.
        made: the policy's part of `provenance`; empty where it does not tell.
        faults: what is done to the observations; None = nothing.
    """
    return {
        "env": environment,
        "policy": policy,
        "policy_seed": made.get("settings", {}).get("seed"),
        "faults": (faults or ObservationFaults()).to_json(),
    }


class EpisodeLog:
    """A JSON-lines file that holds every finished episode even when the evaluation is killed.

    Args:
        path: of the file; None writes nothing.
        versions: of the packages that matter, for every line: lines are read without the rest.
        origin: see `episode_origin`, for every line as well.

    Raises:
        OutputError: no permission, or the disk is full.
    """

    def __init__(self, path: Path | None, versions: Mapping[str, str], origin: Mapping[str, Any]) -> None:
        self._path, self._origin, self._versions = path, dict(origin), dict(versions)

    def append(self, record: dict[str, Any]) -> None:
        """Adds one line and hands it to the operating system; a line that does not fit is taken back."""
        if self._path is None:
            return
        line = json.dumps(to_plain({**self._origin, **record, "versions": self._versions}), allow_nan=False) + "\n"
        size = 0
        try:
            size = self._path.stat().st_size if self._path.exists() else 0
            with self._path.open("a", encoding="utf-8") as file:
                file.write(line)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.truncate(self._path, size)
            raise OutputError(f"cannot write {self._path}: {error.strerror or error}") from error
