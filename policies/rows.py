"""What a policy remembers about each of its rows: history cache, the chunk being followed, executed actions.

Shapes: B rows, Ta chunk length, k past actions (at least 1 is kept), Da action width, S samples.
"""

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

    def current_action(self) -> ActionArray:
        """(B, Da) the chunk's action for the control step last observed; its last one once it is used up."""
        index = np.clip(self.position - 1 - self.origin, 0, self.chunk.shape[1] - 1)
        return self.chunk[np.arange(self.batch_size), index].copy()

    def upcoming(self, count: int) -> ActionArray:
        """(B, count, Da) the running chunks' actions from the current control step on."""
        left = self.chunk.shape[1] - self.age
        if (left < count).any():
            raise ConfigError(f"delay_steps {count} exceeds what is left of the running chunk, {max(0, left.min())}")
        index = self.age[:, None] + np.arange(count)
        return self.chunk[np.arange(self.batch_size)[:, None], index]

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
