"""What the checks of a dataset report, and where.

Shapes: N control steps of all episodes together, E episodes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "SEVERITIES",
    "Finding",
    "Place",
    "Severity",
    "at_rows",
    "counted",
    "episode_of",
    "episode_slices",
    "follows",
    "in_episodes",
    "overall",
    "runs",
]

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")
Place = tuple[int, int | None]  # episode, step in it (None = all of it)

Dimensions = Sequence[int] | NDArray[np.integer[Any]]

_MAX_PLACES = 20


@dataclass(frozen=True)
class Finding:
    """What one check found in one array, all places together.

    Attributes:
        check: its name.
        severity: "error" would spoil training, "warning" may, "note" is good to know.
        key: of the array; "" = the dataset as a whole.
        count: of steps, episodes or dimensions, as the message says.
        message: one sentence.
        places: the first 20.
        dimensions: of the array (numbered as if it was flat) that are concerned; () = all.
    """

    check: str
    severity: Severity
    key: str
    count: int
    message: str
    places: tuple[Place, ...] = ()
    dimensions: tuple[int, ...] = ()

    @property
    def episode(self) -> int | None:
        """Of the first place; None where it is everywhere."""
        return self.places[0][0] if self.places else None

    @property
    def step(self) -> int | None:
        """Of the first place, in its episode; None where it is all of the episode."""
        return self.places[0][1] if self.places else None

    def to_json(self) -> dict[str, Any]:
        """As plain JSON types."""
        return {
            "check": self.check,
            "severity": self.severity,
            "key": self.key,
            "episode": self.episode,
            "step": self.step,
            "count": self.count,
            "message": self.message,
            "places": [list(place) for place in self.places],
            "dimensions": list(self.dimensions),
        }


def at_rows(
    check: str,
    severity: Severity,
    key: str,
    rows: NDArray[np.integer[Any]],
    ends: NDArray[np.int64],
    message: str,
    dimensions: Dimensions = (),
    count: int | None = None,
) -> list[Finding]:
    """One finding at these rows of the arrays, ascending; none where there are none. `count` is theirs if not given."""
    if not len(rows):
        return []
    first = np.asarray(rows[:_MAX_PLACES], np.int64)
    episodes = episode_of(first, ends)
    begins = np.concatenate(([0], ends))[episodes]
    places = tuple((int(e), int(row - begin)) for e, row, begin in zip(episodes, first, begins, strict=True))
    number = len(rows) if count is None else count
    return [Finding(check, severity, key, number, message, places, tuple(map(int, dimensions)))]


def in_episodes(
    check: str,
    severity: Severity,
    key: str,
    episodes: Sequence[int] | NDArray[np.integer[Any]],
    message: str,
    dimensions: Dimensions = (),
) -> list[Finding]:
    """One finding about whole episodes, none where there are none."""
    if not len(episodes):
        return []
    places = tuple((int(episode), None) for episode in episodes[:_MAX_PLACES])
    return [Finding(check, severity, key, len(episodes), message, places, tuple(map(int, dimensions)))]


def overall(
    check: str, severity: Severity, key: str, message: str, dimensions: Dimensions = (), count: int = 1
) -> list[Finding]:
    """One finding about an array or a dataset as a whole."""
    return [Finding(check, severity, key, count, message, (), tuple(map(int, dimensions)))]


def counted(number: int, noun: str) -> str:
    """A number with its noun, in the plural where there is not one."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def episode_of(rows: NDArray[np.integer[Any]], ends: NDArray[np.int64]) -> NDArray[np.int64]:
    """Numbers of the episodes in which rows lie, in the shape of `rows`."""
    return np.searchsorted(ends, rows, side="right")


def episode_slices(ends: NDArray[np.int64]) -> list[slice]:
    """E slices, the rows of each episode; empty ones are possible."""
    return [slice(int(start), int(stop)) for start, stop in zip(np.concatenate(([0], ends[:-1])), ends, strict=True)]


def follows(ends: NDArray[np.int64], count: int) -> NDArray[np.bool_]:
    """(N,) whether the row before is of the same episode; `count` is N."""
    inside = np.ones(count, bool)
    inside[:1] = False
    inside[ends[ends < count]] = False
    return inside


def runs(flags: NDArray[np.bool_]) -> NDArray[np.int64]:
    """(R, 2) first row and one past the last row of each stretch of True in flags (N,)."""
    edges = np.diff(np.concatenate(([False], flags, [False])).astype(np.int8))
    return np.flatnonzero(edges).reshape(-1, 2)
