"""The one form in which recorded episodes are handed around, whatever file they came from.

All arrays are concatenated in time; `episode_ends` cuts them into episodes, as in diffusion_policy's replay buffer.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scd_robot.errors import DatasetError
from scd_robot.types import DatasetSpec

__all__ = ["ACTION", "EXECUTED_ACTION", "EpisodeDataset", "row_blocks"]

ACTION = "action"
EXECUTED_ACTION = "executed_action"

_BLOCK_BYTES = 1 << 26  # of an array looked at in one go


@dataclass(frozen=True, eq=False)
class EpisodeDataset:
    """Episodes in memory.

    Attributes:
        spec: observation keys, widths, `control_dt`.
        episode_ends: (E,) int64, cumulative: episode i is rows `episode_ends[i - 1]` (0 for the first) up to
            `episode_ends[i]`.
        arrays: by key (N, ...), N = `episode_ends[-1]`: every observation key of `spec`, `action`, and
            `executed_action` where it was recorded. Vectors float32, images uint8.
        metadata: what the recorder noted about the whole, plain JSON types.
        episode_info: by name (E,), what the recorder noted about each episode (its seed, say).
    """

    spec: DatasetSpec
    episode_ends: NDArray[np.int64]
    arrays: dict[str, NDArray[Any]]
    metadata: dict[str, Any] = field(default_factory=dict)
    episode_info: dict[str, NDArray[Any]] = field(default_factory=dict)

    @property
    def num_episodes(self) -> int:
        """E."""
        return len(self.episode_ends)

    @property
    def num_steps(self) -> int:
        """N, control steps of all episodes together."""
        return int(self.episode_ends[-1]) if self.num_episodes else 0

    @property
    def episode_lengths(self) -> NDArray[np.int64]:
        """(E,) control steps of each episode."""
        return np.diff(self.episode_ends, prepend=0)

    def episode(self, index: int) -> dict[str, NDArray[Any]]:
        """Views (T, ...) of all arrays for one episode; `index` may count from the end.

        Raises:
            IndexError: there is no such episode.
        """
        if not -self.num_episodes <= index < self.num_episodes:
            raise IndexError(f"episode {index} of a dataset with {self.num_episodes} episodes")
        index %= self.num_episodes
        start = int(self.episode_ends[index - 1]) if index else 0
        rows = slice(start, int(self.episode_ends[index]))
        return {key: array[rows] for key, array in self.arrays.items()}

    def executed(self) -> NDArray[np.float32]:
        """(N, Da) what the robot did: `executed_action`, or `action` where the recorder made no difference."""
        return self.arrays.get(EXECUTED_ACTION, self.arrays[ACTION])

    def check(self, name: str = "the dataset") -> None:
        """Refuses what would spoil training.

        Args:
            name: of the dataset in messages, its path for example.

        Raises:
            DatasetError: there are no episodes or some of one step, an array is missing or has another length or shape
                than the others say, or a value is NaN or infinite (the message says which key, episode and step).
        """
        self._check_episodes(name)
        expected = {key: spec.shape for key, spec in self.spec.observation.items()}
        expected[ACTION] = (self.spec.action_dim,)
        if EXECUTED_ACTION in self.arrays:
            expected[EXECUTED_ACTION] = (self.spec.action_dim,)
        for key, shape in expected.items():
            if key not in self.arrays:
                raise DatasetError(f"{name} has no array {key!r}; it holds {', '.join(sorted(self.arrays))}")
            if self.arrays[key].shape != (self.num_steps, *shape):
                raise DatasetError(
                    f"{key!r} of {name} must be {(self.num_steps, *shape)} by its specification and episode_ends, "
                    f"got {self.arrays[key].shape}"
                )
        for key, array in self.arrays.items():
            row = _first_bad_row(array)
            if row is not None:
                episode, step = self._locate(row)
                raise DatasetError(
                    f"{key!r} of {name} holds NaN or infinite values, first in episode {episode} at step {step}; "
                    "record that episode again or leave it out"
                )

    def _check_episodes(self, name: str) -> None:
        if self.episode_ends.ndim != 1 or not np.issubdtype(self.episode_ends.dtype, np.integer):
            raise DatasetError(
                f"episode_ends of {name} must be a vector of integers, "
                f"got {self.episode_ends.dtype} {self.episode_ends.shape}"
            )
        if self.num_episodes == 0:
            raise DatasetError(f"{name} holds no finished episode; record some first")
        short = np.flatnonzero(self.episode_lengths < 2)
        if short.size:
            raise DatasetError(
                f"every episode of {name} must have at least 2 steps, but episode {short[0]} has "
                f"{self.episode_lengths[short[0]]}; leave it out ({short.size} such episodes in all)"
            )

    def _locate(self, row: int) -> tuple[int, int]:
        """Episode and step within it of a row of the arrays."""
        episode = int(np.searchsorted(self.episode_ends, row, side="right"))
        return episode, row - (int(self.episode_ends[episode - 1]) if episode else 0)


def _first_bad_row(array: NDArray[Any]) -> int | None:
    """First row with a NaN or infinite value."""
    if not np.issubdtype(array.dtype, np.inexact):
        return None
    for start, block in row_blocks(array):
        finite = np.isfinite(block)
        if not finite.all():
            return start + int(np.argmin(finite.reshape(len(block), -1).all(axis=1)))
    return None


def row_blocks(array: NDArray[Any]) -> Iterator[tuple[int, NDArray[Any]]]:
    """First row and rows of successive parts, so that temporaries stay small beside a large array."""
    rows = max(1, _BLOCK_BYTES * len(array) // max(array.nbytes, 1))
    for start in range(0, len(array), rows):
        yield start, array[start : start + rows]
