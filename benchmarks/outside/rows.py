"""A policy that plans action chunks from the last observations, with rows that begin and end by themselves.

LeRobot's own queues hold one batch whose rows all begin together, and an evaluation begins episodes one by one. What is
here does for each row what `DiffusionPolicy.select_action` does for a batch.

Shapes: B rows, n rows that plan, To observations, H actions of a plan, Do and Da widths.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["ChunkPolicy"]

Array = NDArray[np.float32]
Plan = Callable[[Array, Array], Array]


class ChunkPolicy:
    """See above; `reset` and `act` as in `scd_robot.types.Policy`.

    Args:
        plan: from observations (n, To, Do) and noise (n, H, Da) to the actions to execute (n, Ta, Da).
        keys: of the observation, in the order in which they are joined.
        num_observations: To; before an episode has so many, its first is repeated.
        noise_shape: (H, Da).
        seed: keys the noise, with the number of the episode and of the plan.
    """

    def __init__(
        self, plan: Plan, keys: Sequence[str], num_observations: int, noise_shape: tuple[int, int], seed: int
    ) -> None:
        self._plan, self._keys, self._shape, self._seed = plan, tuple(keys), noise_shape, seed
        self._num_observations = num_observations
        self._history: Array | None = None
        self._episodes: list[int] = []
        self.planned: NDArray[np.bool_] | None = None
        self._timings: dict[str, list[float]] = {"plan_ms": [], "plan_rows": []}

    def reset(self, rows: Sequence[int] | None = None, episodes: Sequence[int] | None = None) -> None:
        """Begins new episodes."""
        if rows is None:
            self._history, self._episodes = None, list(episodes or ())
            return
        for row, episode in zip(rows, episodes or rows, strict=True):
            self._episodes[row] = episode
            self._begins[row] = True

    def act(self, observation: Mapping[str, NDArray[Any]]) -> Array:
        """One control step: (B, Da)."""
        seen = np.concatenate([np.asarray(observation[key], np.float32) for key in self._keys], axis=1)
        batch = len(seen)
        if self._history is None:
            self._history = np.zeros((batch, self._num_observations, seen.shape[1]), np.float32)
            self._episodes = self._episodes or list(range(batch))
            self._begins, self._plans = np.ones(batch, bool), np.zeros(batch, np.int64)
            self._queues: list[list[Array]] = [[] for _ in range(batch)]
        self._history = np.concatenate([self._history[:, 1:], seen[:, None]], axis=1)
        for row in np.flatnonzero(self._begins):
            self._history[row], self._plans[row], self._queues[row] = seen[row], 0, []
        self._begins[:] = False
        self.planned = np.array([not queue for queue in self._queues])
        if self.planned.any():
            self._fill(np.flatnonzero(self.planned))
        return np.stack([queue.pop(0) for queue in self._queues])

    def drain_timings(self) -> dict[str, list[float]]:
        """Wall milliseconds of each plan, and its rows, since it was last asked."""
        told, self._timings = self._timings, {"plan_ms": [], "plan_rows": []}
        return told

    def _fill(self, rows: NDArray[np.int64]) -> None:
        assert self._history is not None
        keys = [(self._seed, self._episodes[row], int(self._plans[row])) for row in rows]
        noise = np.stack([np.random.default_rng(key).standard_normal(self._shape, np.float32) for key in keys])
        started = time.perf_counter()
        chunks = self._plan(self._history[rows], noise)
        self._timings["plan_ms"].append(1e3 * (time.perf_counter() - started))
        self._timings["plan_rows"].append(float(len(rows)))
        for row, chunk in zip(rows, chunks, strict=True):
            self._queues[row] = list(chunk)
        self._plans[rows] += 1
