"""Looks through a dataset for all that would spoil training, or may, before a night is spent on it."""

import hashlib
import logging
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from scd_robot.datasets.formats import ReadOptions
from scd_robot.datasets.images import is_image
from scd_robot.datasets.lazy import RowArray
from scd_robot.datasets.open import open_dataset
from scd_robot.datasets.schema import ACTION, EXECUTED_ACTION, TIMESTAMP, EpisodeDataset
from scd_robot.datasets.validation import checks, motion
from scd_robot.datasets.validation.findings import SEVERITIES, Finding, Severity, at_rows, counted, overall
from scd_robot.datasets.validation.frame_scan import FrameScan, scan_frames
from scd_robot.datasets.zarr.files import is_address
from scd_robot.errors import DatasetError

__all__ = ["Validation", "check_dataset", "is_vector", "validate"]

_MAX_NUMBERS = 256  # per step, up to which an array is looked at dimension by dimension


@dataclass(frozen=True)
class Validation:
    """What `validate` found.

    Attributes:
        path: of the dataset.
        window: control steps that an episode should have.
        findings: errors first.
        keys: by array, `shape` (without time), `dtype`, `min` and `max` (None where infinite).
        dataset: the dataset, for pictures; None where it cannot be opened.
    """

    path: str
    window: int
    findings: tuple[Finding, ...]
    keys: dict[str, dict[str, Any]] = field(default_factory=dict)
    dataset: EpisodeDataset | None = field(default=None, repr=False)

    @property
    def spoils_training(self) -> bool:
        """Whether there is an error among the findings."""
        return any(finding.severity == "error" for finding in self.findings)

    @property
    def counts(self) -> dict[Severity, int]:
        """Findings by severity."""
        return {severity: sum(f.severity == severity for f in self.findings) for severity in SEVERITIES}

    def to_json(self) -> dict[str, Any]:
        """As plain JSON types."""
        return {
            "path": self.path,
            "spoils_training": self.spoils_training,
            "counts": dict(self.counts),
            "episodes": self.dataset.num_episodes if self.dataset else None,
            "steps": self.dataset.num_steps if self.dataset else None,
            "control_dt": self.dataset.spec.control_dt if self.dataset else None,
            "window": self.window,
            "findings": [self._told(finding).to_json() for finding in self.findings],
            "keys": self.keys,
        }

    def _told(self, finding: Finding) -> Finding:
        """With episodes as the recording counts them, where only some of it was read."""
        if self.dataset is None:
            return finding
        return replace(finding, places=tuple((self.dataset.number(episode), step) for episode, step in finding.places))


def validate(
    path: Path | str, options: ReadOptions | None = None, *, window: int = 1, progress: bool = True
) -> Validation:
    """Opens a dataset and runs all checks on it; images are read once.

    Args:
        path: as in `open_dataset`.
        options: what to read; `check` does not matter.
        window: control steps that training takes from an episode.
        progress: show a bar while images are read.

    Returns:
        The findings; a dataset that is there but cannot be opened is one of them.

    Raises:
        DatasetError: nothing is there.
        UnknownNameError: a key, action array or mask that the dataset does not have.
        MissingDependencyError: a package that this format needs is not installed.
    """
    told = _Told()
    try:
        with told:
            dataset = open_dataset(path, **vars(replace(options or ReadOptions(), check=False)))
    except DatasetError as error:
        if not is_address(path) and not Path(path).exists():
            raise
        return Validation(str(path), window, (*told.findings, *overall("open", "error", "", str(error))))
    with np.errstate(over="ignore", invalid="ignore"):  # of damaged numbers, which are found
        findings, keys = check_dataset(dataset, window=window, progress=progress)
    findings = sorted([*findings, *told.findings], key=lambda finding: SEVERITIES.index(finding.severity))
    return Validation(str(path), window, tuple(findings), keys, dataset)


class _Told(logging.Handler):
    """What readers warn of while they open a dataset, as findings: wrong totals, lists of nothing, lost cameras."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.findings: list[Finding] = []

    def __enter__(self) -> "_Told":
        logging.getLogger("scd_robot.datasets").addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger("scd_robot.datasets").removeHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        """See `logging.Handler.emit`."""
        self.findings += overall("reading", "warning", "", record.getMessage())


def check_dataset(
    dataset: EpisodeDataset, *, window: int = 1, progress: bool = False
) -> tuple[list[Finding], dict[str, dict[str, Any]]]:
    """All checks: the findings, errors first, and what is told about each array (see `Validation.keys`)."""
    ends = dataset.episode_ends
    if not dataset.num_steps:
        return overall("structure", "error", "", "there is no episode with steps in it; record some first"), {}
    findings = _structure(dataset) + motion.short_episodes(ends, window)
    sound = {key: array for key, array in dataset.arrays.items() if len(array) == dataset.num_steps and array.nbytes}
    flat, unread = _load({key: array for key, array in sound.items() if is_vector(array)}, ends)
    findings += unread
    keys = {key: _entry(array) for key, array in dataset.arrays.items()}
    digests = {key: _digests(values, ends) for key, values in flat.items()}
    for key, values in flat.items():
        keys[key] |= _limits(float(np.fmin.reduce(values, axis=None)), float(np.fmax.reduce(values, axis=None)))
    findings += _check_vectors(dataset, flat)
    scans = _scan({key: array for key, array in sound.items() if not is_vector(array)}, ends, progress)
    for key, scan in scans.items():
        keys[key] |= _limits(scan.lowest, scan.highest)
        digests[key] = scan.digests
        findings += _check_frames(dataset, key, scan, flat)
    findings += _floating_pictures(dataset)
    compared = [digests[key] for key in (*dataset.spec.observation, ACTION) if key in digests]
    findings += motion.duplicate_episodes([_joined(parts) for parts in zip(*compared, strict=True)], dataset.number)
    return sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity)), keys


def is_vector(array: RowArray) -> bool:
    """Whether an array is looked at dimension by dimension: no images, and few numbers per step."""
    return not is_image(array.shape, array.dtype) and int(np.prod(array.shape[1:])) <= _MAX_NUMBERS


def _floating_pictures(dataset: EpisodeDataset) -> list[Finding]:
    """Observations in the shape of pictures that are not uint8: no policy is trained on them."""
    findings: list[Finding] = []
    for key in dataset.spec.observation:
        array = dataset.arrays.get(key)
        if array is not None and array.dtype != np.uint8 and is_image(array.shape, array.dtype):
            message = (
                f"{key} holds {array.dtype} pictures {array.shape[1:]}, not of whole numbers of 0 to 255 or 255ths: "
                "training leaves them out; record them as uint8"
            )
            findings += overall("pictures", "warning", key, message)
    return findings


def _structure(dataset: EpisodeDataset) -> list[Finding]:
    """Arrays that are missing, or of another length or shape than the specification says."""
    shapes: dict[str, tuple[int, ...]] = {key: array.shape[1:] for key, array in dataset.arrays.items()}
    shapes |= {key: spec.shape for key, spec in dataset.spec.observation.items()}
    shapes[ACTION] = (dataset.spec.action_dim,)
    found = []
    for key, shape in shapes.items():
        expected = (dataset.num_steps, *shape)
        if key not in dataset.arrays:
            message = f"there is no array {key!r}; the dataset holds {', '.join(sorted(dataset.arrays))}"
            found += overall("structure", "error", key, message)
        elif dataset.arrays[key].shape != expected:
            message = f"{key!r} must be {expected} by specification and episodes, got {dataset.arrays[key].shape}"
            found += overall("structure", "error", key, message)
    return found


def _load(arrays: dict[str, RowArray], ends: NDArray[np.int64]) -> tuple[dict[str, NDArray[Any]], list[Finding]]:
    """Arrays of few numbers, flat (N, D), and findings about those that cannot be read."""
    flat, found = {}, []
    for key, array in arrays.items():
        try:
            flat[key] = np.asarray(array[:]).reshape(len(array), -1)
        except DatasetError:
            found += _unreadable(key, scan_frames(array, ends), ends)
    return flat, found


def _unreadable(key: str, scan: FrameScan, ends: NDArray[np.int64]) -> list[Finding]:
    rows = np.asarray([row for row, _ in scan.unreadable], np.int64)
    why = scan.unreadable[0][1] if scan.unreadable else ""
    message = f"{key} cannot be read from here on, in {counted(len(rows), 'episode')}: {why}"
    return at_rows("unreadable", "error", key, rows, ends, message)


def _check_vectors(dataset: EpisodeDataset, flat: dict[str, NDArray[Any]]) -> list[Finding]:
    ends = dataset.episode_ends
    found: list[Finding] = []
    usable: dict[str, NDArray[Any]] = {}
    for key, values in flat.items():
        if np.issubdtype(values.dtype, np.inexact):
            found += checks.not_finite(key, values, ends)
            usable[key] = np.where(np.isinf(values), np.nan, values)
        else:
            usable[key] = values.astype(np.float64)
    action = usable.get(ACTION)
    observed = {key: usable[key] for key in dataset.spec.observation if key in usable}
    for key, values in usable.items():
        if key in observed or key in (ACTION, EXECUTED_ACTION):
            found += _check_values(key, values, dataset)
    if action is not None:
        for key, values in observed.items():
            if not dataset.has_gaps(key):
                found += motion.frozen(key, values, action, ends)
        states = {key: values for key, values in observed.items() if ACTION not in key}  # the last action is no effect
        found += motion.action_lag(action, states, ends, dataset.spec.control_dt)
        found += motion.idle(action, ends)
    if TIMESTAMP in usable:
        found += motion.clock(TIMESTAMP, usable[TIMESTAMP][:, 0], ends, dataset.spec.control_dt)
    return found


def _check_values(key: str, values: NDArray[Any], dataset: EpisodeDataset) -> list[Finding]:
    ends = dataset.episode_ends
    found = checks.constant_dimensions(key, values)
    blocks, named = checks.quaternion_blocks(key, values, dataset.arrays[key].shape[-1])
    found += [finding for first in blocks for finding in checks.quaternion_signs(key, values, ends, first)]
    if named:
        found += [finding for first in blocks for finding in checks.quaternion_norms(key, values, ends, first)]
    rotations = frozenset(first + offset for first in blocks for offset in range(4))
    found += checks.jumps(key, values, ends, rotations)
    found += checks.unit_changes(key, values, ends)
    found += checks.silent(key, values, ends)
    found += checks.switch_values(key, values, ends)
    return found + (checks.saturated(key, values, ends) if key == ACTION else [])


def _scan(frames: dict[str, RowArray], ends: NDArray[np.int64], progress: bool) -> dict[str, FrameScan]:
    total = sum(len(array) for array in frames.values())
    with tqdm(total=total, desc="images", unit="frame", disable=not progress or not total) as bar:
        return {key: scan_frames(array, ends, bar.update) for key, array in frames.items()}


def _check_frames(dataset: EpisodeDataset, key: str, scan: FrameScan, flat: dict[str, NDArray[Any]]) -> list[Finding]:
    ends = dataset.episode_ends
    found = _unreadable(key, scan, ends)
    bad = np.flatnonzero(scan.not_finite)
    found += at_rows(
        "not_finite", "error", key, bad, ends, f"{counted(len(bad), 'step')} of {key} with NaN or infinite values"
    )
    observed = [name for name in dataset.spec.observation if name in flat] or [
        name for name in (ACTION,) if name in flat
    ]
    if observed and key in dataset.spec.observation and not dataset.has_gaps(key):
        state = np.concatenate([flat[name] for name in observed], axis=1)
        found += motion.repeated_frames(key, scan.same, state, ends)
    return found


def _digests(values: NDArray[Any], ends: NDArray[np.int64]) -> list[bytes | None]:
    parts = np.split(values, ends[:-1])
    return [hashlib.blake2b(np.ascontiguousarray(part).tobytes(), digest_size=16).digest() for part in parts]


def _joined(digests: Iterable[bytes | None]) -> bytes | None:
    known = list(digests)
    return None if None in known else b"".join(digest for digest in known if digest is not None)


def _entry(array: RowArray) -> dict[str, Any]:
    return {"shape": list(array.shape[1:]), "dtype": str(array.dtype)}


def _limits(lowest: float, highest: float) -> dict[str, float | None]:
    """Of finite numbers; None where there are none."""
    low, high = (value if np.isfinite(value) else None for value in (lowest, highest))
    return {"min": low, "max": high}
