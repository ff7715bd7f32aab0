"""What a policy remembers about each of its rows: history cache, the chunk being followed, executed actions.

Shapes: B rows, Ta chunk length, k past actions (at least 1 is kept), Da action width, S samples.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from scd_robot.errors import ConfigError, ShapeError
from scd_robot.model import ActionModel
from scd_robot.types import ActionArray

__all__ = ["PlanInput", "Rows"]


@dataclass(frozen=True)
class PlanInput:
    """All that a plan is made from besides the weights; nothing that the policy does later changes it.

    Attributes:
        rows: (n,) which rows of the policy.
        context: of those rows.
        state: (n, Do) by key, what chunks are relative to.
        noise: (n, S, L, Da) where the sampler begins.
        corruption: (n or 0, K, D) of guidance.
        past: (n, k, Da) executed actions, newest last, in the dataset's units.
        past_known: (n, k) bool.
    """

    rows: NDArray[np.int64]
    context: Any
    state: dict[str, NDArray[np.float32]]
    noise: NDArray[np.float32]
    corruption: NDArray[np.float32]
    past: NDArray[np.float32]
    past_known: NDArray[np.bool_]


_PER_ROW = ("position", "origin", "chunk", "past", "past_known", "num_plans", "episode")


class Rows:
    """State of B rows.

    Attributes:
        cache: keys and values of the encoder.
        position: (B,) control steps observed since the row's last reset.
        origin: (B,) control step of the chunk's action 0, -1 = no chunk.
        chunk: (B, Ta, Da) in the dataset's units.
        past: (B, k, Da) the last executed actions, newest last, in the dataset's units.
        past_known: (B, k) bool, which of them are known: not before the reset, and not while nothing was planned.
        num_plans: (B,) plans made in the row's episode.
        episode: (B,) number of the row's episode.
        next_episode: number that no row has had yet.
    """

    def __init__(self, model: ActionModel[Any], episodes: Sequence[int], action_dim: int) -> None:
        config = model.config
        batch, kept = len(episodes), max(1, config.num_past_actions)
        self.cache = model.new_cache(batch)
        self.position = np.zeros(batch, np.int64)
        self.origin = np.full(batch, -1, np.int64)
        self.chunk = np.zeros((batch, config.chunk_length, action_dim), np.float32)
        self.past = np.zeros((batch, kept, action_dim), np.float32)
        self.past_known = np.zeros((batch, kept), bool)
        self.num_plans = np.zeros(batch, np.int64)
        self.episode = _episode_numbers(episodes, batch)
        self.next_episode = int(self.episode.max()) + 1
        self._stride = config.history_stride

    @classmethod
    def join(cls, parts: Sequence["Rows"]) -> "Rows":
        """A copy of the rows of several, one after the other."""
        joined = copy.copy(parts[0])
        with torch.inference_mode():
            joined.cache = type(joined.cache).join([part.cache for part in parts])
        for name in _PER_ROW:
            setattr(joined, name, np.concatenate([getattr(part, name) for part in parts]))
        joined.next_episode = max(part.next_episode for part in parts)
        return joined

    def select(self, chosen: Sequence[int]) -> "Rows":
        """A copy of some rows, which later steps do not change."""
        index = np.asarray(chosen, np.int64)
        some = copy.copy(self)
        with torch.inference_mode():
            some.cache = self.cache.select(torch.as_tensor(index, device=self.cache.position.device))
        for name in _PER_ROW:
            setattr(some, name, getattr(self, name)[index])
        return some

    @property
    def num_bytes(self) -> int:
        """Memory held, in bytes."""
        return self.cache.num_bytes + sum(getattr(self, name).nbytes for name in _PER_ROW)

    @property
    def batch_size(self) -> int:
        """B."""
        return len(self.position)

    @property
    def age(self) -> NDArray[np.int64]:
        """(B,) index into the chunk for the control step last observed; very large where there is no chunk."""
        return np.where(self.origin < 0, np.iinfo(np.int64).max, self.position - 1 - self.origin)

    def reset(self, rows: Sequence[int] | NDArray[np.bool_], episodes: Sequence[int] | None) -> None:
        """Begins new episodes in some rows, given as numbers or as a mask (B,)."""
        chosen = np.asarray(rows)
        if chosen.dtype == bool and chosen.shape == (self.batch_size,):
            chosen = np.flatnonzero(chosen)
        if chosen.ndim != 1 or (len(chosen) and not np.issubdtype(chosen.dtype, np.integer)):
            raise ShapeError(f"rows must be numbers or a mask ({self.batch_size},), got {rows}")
        chosen = chosen.astype(np.int64)
        if len(chosen) and not (chosen.min() >= 0 and chosen.max() < self.batch_size):
            raise ShapeError(f"rows {chosen.tolist()} are out of range for a batch of {self.batch_size}")
        mask = torch.zeros(self.batch_size, dtype=torch.bool, device=self.cache.position.device)
        mask[torch.as_tensor(chosen, device=mask.device)] = True
        with torch.inference_mode():
            self.cache.reset(mask)
        if episodes is None:
            episodes = range(self.next_episode, self.next_episode + len(chosen))
        self.episode[chosen] = _episode_numbers(episodes, len(chosen))
        self.next_episode = max(self.next_episode, int(self.episode.max()) + 1)
        self.position[chosen], self.origin[chosen], self.num_plans[chosen] = 0, -1, 0
        self.past_known[chosen] = False

    def record_executed(self, executed: ActionArray | None) -> None:
        """Appends the last step's action (B, Da), as reported or as the chunk said, to the rows that have begun.

        A row that observed without following a chunk did something that nobody told: its action stays unknown.
        """
        begun = np.flatnonzero(self.position > 0)
        if not len(begun):
            return
        known = np.ones(self.batch_size, bool) if executed is not None else self.age < self.chunk.shape[1]
        last = self.current_action() if executed is None else executed
        for store, value in ((self.past, last), (self.past_known, known)):
            store[begun, :-1] = store[begun, 1:]
            store[begun, -1] = value[begun]

    def skip(self, steps: int, executed: ActionArray | None = None) -> None:
        """Lets control steps pass that nobody observed; the rows must have begun.

        Args:
            steps: how many.
            executed: (B, steps, Da) the actions that preceded them, the first one that of the step last observed;
                None = what the chunk said.
        """
        unrecorded = max(0, steps - self.past.shape[1])  # their actions are forgotten again at once
        self._pass(unrecorded)
        for step in range(unrecorded, steps):
            self.record_executed(None if executed is None else executed[:, step])
            self._pass(1)

    def _pass(self, steps: int) -> None:
        encoded = -(-(self.position + steps) // self._stride) - -(-self.position // self._stride)
        with torch.inference_mode():
            self.cache.position += torch.as_tensor(encoded, device=self.cache.position.device)
        self.position += steps

    def current_action(self) -> ActionArray:
        """(B, Da) the chunk's action for the control step last observed; its last one once it is used up."""
        index = np.clip(self.position - 1 - self.origin, 0, self.chunk.shape[1] - 1)
        return self.chunk[np.arange(self.batch_size), index].copy()

    def upcoming(self, count: int, chosen: NDArray[np.int64]) -> ActionArray:
        """(n, count, Da) the running chunks' actions from the current control step on, of some rows (n,)."""
        left = self.chunk.shape[1] - self.age[chosen]
        if (left < count).any():
            raise ConfigError(f"delay_steps {count} exceeds what is left of the running chunk, {max(0, left.min())}")
        index = self.age[chosen, None] + np.arange(count)
        return self.chunk[chosen[:, None], index]

    def follow(self, chosen: NDArray[np.int64], chunk: ActionArray) -> None:
        """Sets the chunks of some rows; action 0 is for the control step last observed."""
        self.chunk[chosen] = chunk
        self.origin[chosen] = self.position[chosen] - 1
        self.num_plans[chosen] += 1


def _episode_numbers(episodes: Sequence[int], count: int) -> NDArray[np.int64]:
    numbers = np.asarray(episodes, np.int64)
    if numbers.shape != (count,):
        raise ShapeError(f"{count} rows begin new episodes, got {len(episodes)} episode numbers")
    if count and numbers.min() < 0:
        raise ConfigError(f"episode numbers must not be negative, got {numbers.min()}")
    return numbers
