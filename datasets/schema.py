"""The one form in which recorded episodes are handed around, whatever file they came from.

All arrays are concatenated in time; `episode_ends` cuts them into episodes, as in diffusion_policy's replay buffer.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scd_robot.datasets.lazy import LazyArray, RowArray, SelectedArray
from scd_robot.errors import DatasetError, UnknownNameError
from scd_robot.types import DatasetSpec

__all__ = [
    "ACTION",
    "DONE",
    "EXECUTED_ACTION",
    "MASK",
    "POSITION",
    "PRESENT",
    "REWARD",
    "SIM_STATE",
    "TIMESTAMP",
    "EpisodeDataset",
    "row_blocks",
    "tell_unread",
]

logger = logging.getLogger(__name__)

ACTION = "action"
# Arrays that are not observations have these names, whatever the file called them.
EXECUTED_ACTION = "executed_action"  # (N, Da) what the robot did, where that differs from what was asked for
SIM_STATE = "sim_state"  # (N, S) float64, a simulator's whole state before the action
REWARD = "reward"  # (N,) of the action
DONE = "done"  # (N,)
MASK = "mask_"  # begins the names in `episode_info` of lists of episodes: "mask_train" is 1 where it is in the list
POSITION = "position."  # begins the name of an array (N, 3) [m]: where a thing was, exactly; no observation
PRESENT = "present."  # begins the name of an array (N,): whether the observation of that key was there in each step
TIMESTAMP = "timestamp"  # (N,) float64 [s], of the observation, from the episode's beginning

_BLOCK_BYTES = 1 << 26  # of an array looked at in one go
_CHECKED_BYTES = 1 << 28
_MOST_NAMED = 20  # episodes in a message


@dataclass(frozen=True, eq=False)
class EpisodeDataset:
    """Episodes: small arrays in memory, images and other large ones read when they are indexed.

    Attributes:
        spec: observation keys, widths, `control_dt`.
        episode_ends: (E,) int64, cumulative: episode i is rows `episode_ends[i - 1]` (0 for the first) up to
            `episode_ends[i]`.
        arrays: by key (N, ...), N = `episode_ends[-1]`: every observation key of `spec` (vectors float32, images
            uint8), `action` (N, Da) float32, and what else was recorded (`EXECUTED_ACTION`, `SIM_STATE`, ...).
        metadata: what the recorder noted about the whole, plain JSON types.
        episode_info: by name (E,), numbers noted about each episode: its seed; "mask_NAME", whether it is in that list
            of the file; "success".
        episode_text: by name, E strings noted about each episode: "name" in the file, "task" in words, "model_xml".
        weights: (E,) how often control steps of each episode are drawn in training, relative to those of others; None =
            all alike.
        numbers: (E,) which episodes of the recording these are, where only some of it was read; None = 0 to E - 1.
        parts: (E,) number of the dataset that each episode comes from, where several were joined; None = all from one.
    """

    spec: DatasetSpec
    episode_ends: NDArray[np.int64]
    arrays: Mapping[str, RowArray]
    metadata: dict[str, Any] = field(default_factory=dict)
    episode_info: dict[str, NDArray[Any]] = field(default_factory=dict)
    episode_text: Mapping[str, Sequence[str]] = field(default_factory=dict)
    weights: NDArray[np.float64] | None = None
    numbers: NDArray[np.int64] | None = None
    parts: NDArray[np.int64] | None = None

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

    def episode(self, index: int, keys: Iterable[str] | None = None) -> dict[str, NDArray[Any]]:
        """Arrays (T, ...) of one episode, views where they are in memory; `index` may count from the end.

        Args:
            index: of the episode.
            keys: which arrays; None = all.

        Raises:
            IndexError: there is no such episode.
        """
        rows = self.rows(index)
        return {key: self.arrays[key][rows] for key in (self.arrays if keys is None else keys)}

    def rows(self, index: int) -> slice:
        """Where one episode lies in the arrays; `index` may count from the end.

        Raises:
            IndexError: there is no such episode.
        """
        if not -self.num_episodes <= index < self.num_episodes:
            raise IndexError(f"episode {index} of a dataset with {self.num_episodes} episodes")
        index %= self.num_episodes
        start = int(self.episode_ends[index - 1]) if index else 0
        return slice(start, int(self.episode_ends[index]))

    def number(self, index: int) -> int:
        """What the recording counts episode `index` as: for messages, and for `only` and `drop` of `ReadOptions`."""
        return index if self.numbers is None else int(self.numbers[index])

    def executed(self) -> RowArray:
        """(N, Da) what the robot did: `executed_action`, or `action` where the recorder made no difference."""
        return self.arrays.get(EXECUTED_ACTION, self.arrays[ACTION])

    def has_gaps(self, key: str) -> bool:
        """Whether an observation is marked as absent in some control step."""
        return PRESENT + key in self.arrays and not np.asarray(self.arrays[PRESENT + key][:]).all()

    def with_keys(self, keys: Sequence[str]) -> "EpisodeDataset":
        """Of the observations only these; arrays that are no observations stay.

        Raises:
            UnknownNameError: a key that is no observation here.
        """
        for key in keys:
            if key not in self.spec.observation:
                raise UnknownNameError("observation key", key, self.spec.observation)
        dropped = set(self.spec.observation) - set(keys)
        return replace(
            self,
            spec=replace(self.spec, observation={key: self.spec.observation[key] for key in keys}),
            arrays={key: array for key, array in self.arrays.items() if key not in dropped},
        )

    def select(self, episodes: Sequence[int] | NDArray[Any]) -> "EpisodeDataset":
        """The episodes of these numbers, or of a mask (E,), in this order.

        Raises:
            DatasetError: none is left, or a number is out of range.
        """
        chosen = np.asarray(episodes)
        chosen = np.flatnonzero(chosen) if chosen.dtype == bool else chosen.astype(np.int64)
        if not len(chosen):
            raise DatasetError(f"no episode is left of the {self.num_episodes} of {self.spec.source}")
        if not -self.num_episodes <= chosen.min() <= chosen.max() < self.num_episodes:
            raise DatasetError(f"there are {self.num_episodes} episodes (from 0 on), asked for {chosen.tolist()[:8]}")
        slices = [self.rows(int(i)) for i in chosen]
        rows = np.concatenate([np.arange(part.start, part.stop) for part in slices])
        arrays = {
            key: SelectedArray(array, rows) if isinstance(array, LazyArray) else array[rows]
            for key, array in self.arrays.items()
        }
        info = {name: values[chosen] for name, values in self.episode_info.items()}
        text = {name: [values[int(i)] for i in chosen] for name, values in self.episode_text.items()}
        ends = np.cumsum([part.stop - part.start for part in slices])
        weights = None if self.weights is None else self.weights[chosen]
        numbers = (np.arange(self.num_episodes) if self.numbers is None else self.numbers)[chosen]
        return replace(
            self,
            episode_ends=ends,
            arrays=arrays,
            episode_info=info,
            episode_text=text,
            weights=weights,
            numbers=numbers,
            parts=None if self.parts is None else self.parts[chosen],
        )

    def load(self, keys: Iterable[str] | None = None) -> "EpisodeDataset":
        """With these arrays in memory; None = all."""
        wanted = set(self.arrays if keys is None else keys)
        arrays: dict[str, RowArray] = {
            key: array[:] if key in wanted and isinstance(array, LazyArray) else array
            for key, array in self.arrays.items()
        }
        return replace(self, arrays=arrays)

    def check(self, name: str = "the dataset") -> None:
        """Refuses what would spoil training.

        Arrays on disk of over 256 MiB are not read for it; `scd data validate` reads all.

        Args:
            name: of the dataset in messages, its path for example.

        Raises:
            DatasetError: there are no episodes or some of one step, an array is missing or has another length or shape
                than the others say, or a value is NaN or infinite (the message says which key, episode and step).
        """
        self._check_episodes(name)
        expected: dict[str, tuple[int, ...]] = {key: array.shape[1:] for key, array in self.arrays.items()}
        expected |= {key: spec.shape for key, spec in self.spec.observation.items()}
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
            if isinstance(array, LazyArray) and array.nbytes > _CHECKED_BYTES:
                continue
            row = _first_bad_row(array)
            if row is not None:
                episode, step = self.locate(row)
                raise DatasetError(
                    f"{key!r} of {name} holds NaN or infinite values (or ones too large for float32), first in episode "
                    f"{self.number(episode)} at step {step}; record that episode again, or leave it out: --drop "
                    f"{self.number(episode)}"
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
            numbers = " ".join(str(self.number(int(index))) for index in short[:_MOST_NAMED])
            raise DatasetError(
                f"every episode of {name} must have at least 2 steps, but episode {self.number(int(short[0]))} has "
                f"{self.episode_lengths[short[0]]}; leave out with --drop: "
                f"{numbers}{' ...' if short.size > _MOST_NAMED else ''}"
            )

    def locate(self, row: int) -> tuple[int, int]:
        """Episode and step within it of a row of the arrays."""
        episode = int(np.searchsorted(self.episode_ends, row, side="right"))
        return episode, row - (int(self.episode_ends[episode - 1]) if episode else 0)


def tell_unread(dataset: EpisodeDataset, names: Iterable[str]) -> None:
    """Warns of arrays that another format has a place for, but that are not read back from it.

    Args:
        dataset: that is written.
        names: of arrays that are no observations and are read.
    """
    read = {*dataset.spec.observation, *names, ACTION, EXECUTED_ACTION, SIM_STATE, REWARD, DONE, TIMESTAMP}
    others = sorted(key for key in dataset.arrays if key not in read and not key.startswith((PRESENT, POSITION)))
    if others:
        logger.warning(
            "%s: written, but not read back by scd_robot, as they are no observations: %s",
            dataset.spec.source or "the dataset",
            ", ".join(others),
        )


def _first_bad_row(array: RowArray) -> int | None:
    """First row with a NaN or infinite value."""
    if not np.issubdtype(array.dtype, np.inexact):
        return None
    for start, block in row_blocks(array):
        finite = np.isfinite(block)
        if not finite.all():
            return start + int(np.argmin(finite.reshape(len(block), -1).all(axis=1)))
    return None


def row_blocks(array: RowArray) -> Iterator[tuple[int, NDArray[Any]]]:
    """First row and rows of successive parts, so that little of a large array is in memory at a time."""
    rows = max(1, _BLOCK_BYTES * len(array) // max(array.nbytes, 1))
    for start in range(0, len(array), rows):
        yield start, array[start : start + rows]
