"""Demonstrations from a robomimic HDF5 file, as `scd data convert` writes it, and windows of them as LeRobot cuts them.

Shapes: N control steps of all episodes, E episodes, n windows, To observations of a window, H actions of a window, Do
and Da widths.
"""

from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
from numpy.typing import NDArray

__all__ = ["Demonstrations", "Windows", "read_demonstrations"]

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Demonstrations:
    """All episodes, one after the other.

    Attributes:
        widths: of the observation keys, in the order in which they are joined.
        observation: (N, Do) all keys.
        action: (N, Da).
        ends: (E,) cumulative.
    """

    widths: dict[str, int]
    observation: Array
    action: Array
    ends: NDArray[np.int64]


def read_demonstrations(path: Path) -> Demonstrations:
    """All vectors of a file; images are left out."""
    with h5py.File(path) as file:
        data = file["data"]
        demos = [data[name] for name in sorted(data, key=lambda name: int(name.removeprefix("demo_")))]
        keys = sorted(key for key, array in demos[0]["obs"].items() if array.ndim == 2)
        if not keys:
            raise ValueError(f"{path} has no vectors among its observations: {', '.join(demos[0]['obs'])}")
        rows = [np.concatenate([demo["obs"][key][:] for key in keys], axis=1) for demo in demos]
        actions = [demo["actions"][:] for demo in demos]
        widths = {key: int(demos[0]["obs"][key].shape[1]) for key in keys}
    return Demonstrations(
        widths,
        np.concatenate(rows).astype(np.float32),
        np.concatenate(actions).astype(np.float32),
        np.cumsum([len(part) for part in actions]),
    )


class Windows:
    """Pieces of episodes: To observations that end at a control step, and H actions from the first of these on.

    What would lie outside the episode is its first or last step, as in LeRobotDataset; the last control steps of each
    episode are no window's, as in its EpisodeAwareSampler.

    Args:
        demonstrations: the episodes.
        num_observations: To.
        horizon: H.
        dropped: so many of the last control steps.
    """

    def __init__(self, demonstrations: Demonstrations, num_observations: int, horizon: int, dropped: int) -> None:
        self._data = demonstrations
        ends = demonstrations.ends
        starts = np.concatenate([[0], ends[:-1]])
        spans = zip(starts, ends, strict=True)
        self.rows = np.concatenate([np.arange(start, max(start + 1, end - dropped)) for start, end in spans])
        episode = np.searchsorted(ends, np.arange(ends[-1]), side="right")
        self._first, self._last = starts[episode], ends[episode] - 1
        self._seen = np.arange(1 - num_observations, 1)
        self._planned = np.arange(1 - num_observations, 1 - num_observations + horizon)

    def at(self, rows: NDArray[np.int64]) -> tuple[Array, Array, NDArray[np.bool_]]:
        """Observations (n, To, Do), actions (n, H, Da), and which of these are outside the episode (n, H)."""
        first, last = self._first[rows, None], self._last[rows, None]
        seen, planned = rows[:, None] + self._seen, rows[:, None] + self._planned
        outside = (planned < first) | (planned > last)
        return (
            self._data.observation[np.clip(seen, first, last)],
            self._data.action[np.clip(planned, first, last)],
            outside,
        )
