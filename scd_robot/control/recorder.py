"""Flight recorder: the last minutes of a control loop in memory, written to disk when something goes wrong.

A record is a folder with `record.json` (faults, settings, counts) and `steps.npz` (arrays with a row per control step).

Shapes: N control steps kept, Da action width.
"""

import json
import logging
import os
import queue
import shutil
import threading
import zipfile
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scd_robot.errors import ConfigError, OutputError
from scd_robot.output import check_local, to_plain
from scd_robot.types import ArraySpec

__all__ = ["SCHEMA", "FlightRecorder", "RecorderConfig", "find_record", "read_record", "write_record"]

logger = logging.getLogger(__name__)

SCHEMA = 1
# What every record has.
_DOCUMENT = ("steps", "state", "plans", "faults", "events")
_ARRAYS = ("step", "time_s", "late_ms", "age_s", "state", "command")
_MOST_EVENTS = 5000
_CLOSE_TIMEOUT_S = 10.0
Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class RecorderConfig:
    """What is kept, and where it goes.

    Attributes:
        folder: in which each record becomes a folder of its own, numbered on from those that are there; None = nothing
            is written.
        seconds: that are kept.
        least_apart_s: between two records; what happened in between is in the next one, or in that of the end.
        most: records of one run; those that could not be written do not count.
        at_end: write one (`flight-001-end`) of a run that ends with nothing left to record, too: of a dry run, say.
    """

    folder: Path | None = None
    seconds: float = 120.0
    least_apart_s: float = 10.0
    most: int = 20
    at_end: bool = False

    def __post_init__(self) -> None:
        if self.folder is not None:
            object.__setattr__(self, "folder", Path(self.folder))  # texts will do
        if not self.seconds > 0 or self.least_apart_s < 0 or self.most < 1:
            raise ConfigError(
                f"seconds must be positive, least_apart_s not negative and most at least 1, got {self.seconds}, "
                f"{self.least_apart_s} and {self.most}"
            )


@dataclass(frozen=True)
class _Job:
    """A record to be written; `fresh` faults are in it for the first time."""

    target: Path
    arrays: Arrays
    document: dict[str, Any]
    kind: str
    fresh: Counter[str]


class FlightRecorder:
    """A ring of control steps, and the events among them.

    Args:
        config: see there.
        observation: specification by key; arrays of one axis are kept, images are not.
        action_dim: Da.
        control_dt: seconds.
        background: write in a thread of its own, so that a slow disk does not hold up the loop.
        write: puts one record into a folder that does not exist yet.

    Attributes:
        counts: faults by kind, over the whole run.
        unsaved: those of them that no record on disk holds.
        written: records on disk.

    Raises:
        OutputError: the folder cannot be written to.
    """

    def __init__(
        self,
        config: RecorderConfig,
        observation: Mapping[str, ArraySpec],
        action_dim: int,
        control_dt: float,
        background: bool = True,
        write: "Callable[[Path, Arrays, Mapping[str, Any]], None] | None" = None,
    ) -> None:
        rows = max(1, round(config.seconds / control_dt))
        self._config, self._write = config, write or write_record
        self._vectors = [key for key, spec in observation.items() if len(spec.shape) == 1]
        widths = dict.fromkeys(("target", "command", "executed", "pose"), action_dim)
        widths |= {f"observation/{key}": observation[key].shape[0] for key in self._vectors}
        self._ring: dict[str, NDArray[Any]] = {name: np.full((rows, width), np.nan) for name, width in widths.items()}
        self._ring |= {name: np.full(rows, np.nan) for name in ("step", "time_s", "late_ms", "age_s", "rate", "epoch")}
        self._ring["state"] = np.full(rows, "", "<U8")
        self._next = self._count = 0
        self._events: deque[dict[str, Any]] = deque(maxlen=_MOST_EVENTS)
        self._pending: str | None = None  # the first fault that no record holds yet
        self._fresh: Counter[str] = Counter()  # faults since the last record
        self._last_s = -np.inf
        self._number = 0 if config.folder is None else _last_number(config.folder)  # runs may share a folder
        self._kept = 0  # records of this run, written or on their way
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[tuple[_Job, str | None]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="recorder", daemon=True) if background else None
        if self._thread is not None and config.folder is not None:
            self._thread.start()
        self.about: dict[str, Any] = {}
        self.counts: Counter[str] = Counter()
        self.unsaved: Counter[str] = Counter()
        self.written: list[Path] = []

    def step(self, values: Mapping[str, Any], observation: Mapping[str, NDArray[Any]] | None) -> None:
        """Keeps one control step; what is left out or None is NaN."""
        row = self._next
        for name, column in self._ring.items():
            value = values.get(name)
            if name.startswith("observation/") and observation is not None:
                value = observation[name.removeprefix("observation/")]
            column[row] = ("" if name == "state" else np.nan) if value is None else value
        self._next, self._count = (row + 1) % len(self._ring["step"]), self._count + 1

    def event(self, time_s: float, step: int, kind: str, detail: str, fault: bool) -> None:
        """Notes what happened; a fault asks for a record."""
        self._events.append({"time_s": time_s, "step": step, "kind": kind, "detail": detail, "fault": fault})
        if fault:
            self.counts[kind] += 1
            self.unsaved[kind] += 1
            self._fresh[kind] += 1
            self._pending = self._pending or kind

    def flush(self, now_s: float, summary: Mapping[str, Any], last: bool = False) -> None:
        """Writes a record if a fault is in none yet and the last one is long enough ago (`last`: however that is)."""
        if last and self._config.at_end:
            self._pending = self._pending or "end"
        if self._config.folder is None or self._pending is None:
            return
        if not last and (now_s < self._last_s + self._config.least_apart_s or self._kept >= self._config.most):
            return
        self._number, self._kept, self._last_s = self._number + 1, self._kept + 1, now_s
        target = self._config.folder / f"flight-{self._number:03d}-{self._pending}"
        document = {"schema": SCHEMA, **self.about, **summary, "events": list(self._events)}
        job = _Job(target, self.arrays(), document, self._pending, self._fresh)
        self._pending, self._fresh = None, Counter()
        if self._thread is None:
            self._save(job)
        else:
            self._jobs.put(job)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """What is kept, oldest first, as copies."""
        kept = min(self._count, len(self._ring["step"]))
        order = (self._next - kept + np.arange(kept)) % len(self._ring["step"])
        return {name: column[order] for name, column in self._ring.items()}

    def failure(self) -> str | None:
        """Why a record could not be written, of each once; what was to be in it will be in the next one."""
        while not self._done.empty():
            job, problem = self._done.get()
            if problem is None:
                self.unsaved -= job.fresh
                self.written.append(job.target)
            else:
                self._kept -= 1
                self._pending = self._pending or job.kind
                self._fresh += job.fresh
                return problem
        return None

    def close(self) -> None:
        """Waits for what is being written."""
        if self._thread is not None and self._thread.is_alive():
            self._jobs.put(None)
            self._thread.join(_CLOSE_TIMEOUT_S)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            self._save(job)
            del job  # a minute of arrays, which would be kept until the next fault

    def _save(self, job: _Job) -> None:
        problem = None
        try:
            self._write(job.target, job.arrays, job.document)
        except Exception as error:  # whatever it is, the loop is told, and the next record is tried
            known = isinstance(error, OSError | OutputError)
            logger.error("no flight record %s: %s", job.target, error, exc_info=None if known else error)
            problem = str(error) or type(error).__name__
        self._done.put((replace(job, arrays={}, document={}), problem))


def write_record(target: Path, arrays: Arrays, document: Mapping[str, Any]) -> None:
    """Writes a folder that appears whole or not at all.

    Raises:
        OutputError: there is one of that name, or the disk is full, or may not be written to.
    """
    check_local(target)
    beside = target.with_name(f".{target.name}.part")
    try:
        if target.exists():
            raise OutputError(f"there is a flight record at {target} already; choose another folder for this run")
        beside.mkdir(parents=True, exist_ok=True)
        named: dict[str, Any] = {name.replace("/", "."): array for name, array in arrays.items()}
        np.savez(beside / "steps.npz", **named)
        (beside / "record.json").write_text(json.dumps(to_plain(document), indent=1, allow_nan=False), encoding="utf-8")
        beside.rename(target)
    except BaseException as error:
        shutil.rmtree(beside, ignore_errors=True)
        if not isinstance(error, OSError):
            raise
        raise OutputError(
            f"cannot write the flight record {target}: {(error.strerror or str(error)).lower()}"
        ) from error


def find_record(folder: Path) -> Path:
    """The folder itself if it is a record, else the last record in it.

    Raises:
        OutputError: there is none.
    """
    if (folder / "record.json").exists():
        return folder
    records = [path.parent for path in folder.glob("flight-*/record.json")]
    if not records:
        raise OutputError(f"{folder} holds no flight record (a folder flight-001-... with record.json and steps.npz)")
    return max(records, key=lambda path: (_number_of(path), path.name))


def _number_of(record: Path) -> int:
    """Of a record's folder; 0 = it has none."""
    number = record.name.removeprefix("flight-").partition("-")[0]
    return int(number) if number.isascii() and number.isdigit() else 0


def _last_number(folder: Path) -> int:
    """The greatest number of a record in a folder; 0 = there is none.

    Raises:
        OutputError: no record can be written there.
    """
    check_local(folder)
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise OutputError(f"flight records cannot be written to {folder}: {there} is no folder that may be written to")
    return max(map(_number_of, folder.glob("flight-*")), default=0)


def read_record(folder: Path) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """Arrays and document of a record.

    Raises:
        OutputError: it is no record, or damaged, or of a later version.
    """
    try:
        document = json.loads((folder / "record.json").read_text(encoding="utf-8"))
        with np.load(folder / "steps.npz", allow_pickle=False) as stored:
            arrays = {name.replace(".", "/", 1): stored[name] for name in stored.files}
    except FileNotFoundError as error:
        raise OutputError(f"{folder} is no flight record: it has no {Path(error.filename).name}") from error
    except (ValueError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise OutputError(f"the flight record {folder} is damaged: {error}") from error
    schema = document.get("schema") if isinstance(document, dict) else None
    if schema != SCHEMA:
        raise OutputError(f"the flight record {folder} has schema {schema}, this version reads {SCHEMA}")
    lacking = [repr(name) for name in _DOCUMENT if name not in document]
    lacking += [f"the array {name!r}" for name in _ARRAYS if name not in arrays]
    if lacking:
        raise OutputError(f"the flight record {folder} is damaged: it lacks {', '.join(lacking)}")
    if len(lengths := {len(array) for array in arrays.values() if array.ndim}) != 1:
        raise OutputError(f"the flight record {folder} is damaged: its arrays have {sorted(lengths)} control steps")
    return arrays, document
