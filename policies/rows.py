"""What a policy remembers about each of its rows: history cache, the chunk being followed, executed actions. No torch.

Shapes: B rows, Ta chunk length, k past actions (at least 1 is kept), Da action width, S samples.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from scd_robot.errors import ConfigError, ShapeError
from scd_robot.seeding import POLICY_NOISE, keyed_rng
from scd_robot.types import ActionArray

__all__ = ["Architecture", "HistoryCache", "PlanInput", "Rows", "plan_noise", "row_numbers"]


@dataclass(frozen=True)
class Architecture:
    """What a policy knows of its model, whatever computes it: the fields of `ScdConfig` that have these names."""

    action_dim: int
    chunk_length: int
    history_length: int
    history_stride: int
    max_delay_steps: int
    num_context_tokens: int
    num_past_actions: int
    observation_tokens: str
    past_action_input: str
    width: int

    @classmethod
    def of(cls, config: Any) -> "Architecture":
        """Of a `ScdConfig`."""
        return cls(**{field.name: getattr(config, field.name) for field in fields(cls)})


class HistoryCache(Protocol):
    """What an encoder remembers of B rows, whatever computes with it."""

    @property
    def num_bytes(self) -> int:
        """Memory held, in bytes."""
        ...

    def reset(self, rows: NDArray[np.bool_]) -> None:
        """Empties the rows where `rows` (B,) is True."""
        ...

    def advance(self, steps: NDArray[np.int64]) -> None:
        """Lets encoder steps (B,) pass without an observation."""
        ...

    def select(self, rows: NDArray[np.int64]) -> "HistoryCache":
        """A copy of some rows (n,)."""
        ...

    def join(self, others: Sequence[Any]) -> "HistoryCache":
        """A copy of its rows and those of others of its kind, one after the other."""
        ...


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

    Args:
        cache: an empty history of theirs.
        episodes: (B,) numbers of their episodes.
        architecture: of the model.
        unknown_action: (Da,) float32 that stands where an action is not known, see `Transforms.unknown_action`.

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

    def __init__(
        self, cache: HistoryCache, episodes: Sequence[int], architecture: Architecture, unknown_action: ActionArray
    ) -> None:
        batch, kept, action_dim = len(episodes), max(1, architecture.num_past_actions), len(unknown_action)
        self.cache = cache
        self.position = np.zeros(batch, np.int64)
        self.origin = np.full(batch, -1, np.int64)
        self.chunk = np.zeros((batch, architecture.chunk_length, action_dim), np.float32)
        self.past = np.tile(unknown_action, (batch, kept, 1))
        self.past_known = np.zeros((batch, kept), bool)
        self.num_plans = np.zeros(batch, np.int64)
        self.episode = _episode_numbers(episodes, batch)
        self.next_episode = int(self.episode.max()) + 1
        self._stride = architecture.history_stride
        self._unknown_action = unknown_action

    @classmethod
    def join(cls, parts: Sequence["Rows"]) -> "Rows":
        """A copy of the rows of several, one after the other."""
        joined = copy.copy(parts[0])
        joined.cache = joined.cache.join([part.cache for part in parts[1:]])
        for name in _PER_ROW:
            setattr(joined, name, np.concatenate([getattr(part, name) for part in parts]))
        joined.next_episode = max(part.next_episode for part in parts)
        return joined

    def select(self, chosen: Sequence[int]) -> "Rows":
        """A copy of some rows, which later steps do not change."""
        index = np.asarray(chosen, np.int64)
        some = copy.copy(self)
        some.cache = self.cache.select(index)
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
        chosen = row_numbers(rows, self.batch_size)
        mask = np.zeros(self.batch_size, bool)
        mask[chosen] = True
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
        last = np.where(known[:, None], self.current_action() if executed is None else executed, self._unknown_action)
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
        self.cache.advance(encoded)
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
        """Sets the chunks of some rows; action 0 is for the control step in which the encoder last ran for them."""
        self.chunk[chosen] = chunk
        self.origin[chosen] = (self.position[chosen] - 1) // self._stride * self._stride
        self.num_plans[chosen] += 1


def row_numbers(rows: Sequence[int] | NDArray[np.bool_], batch: int) -> NDArray[np.int64]:
    """(n,) numbers of rows that are given as numbers, or as a mask (B,).

    Raises:
        ShapeError: neither; a row that a batch of this size does not have.
    """
    chosen = np.asarray(rows)
    if chosen.dtype == bool and chosen.shape == (batch,):
        chosen = np.flatnonzero(chosen)
    if chosen.ndim != 1 or (len(chosen) and not np.issubdtype(chosen.dtype, np.integer)):
        raise ShapeError(f"rows must be numbers or a mask ({batch},), got {rows}")
    chosen = chosen.astype(np.int64)
    if len(chosen) and not (chosen.min() >= 0 and chosen.max() < batch):
        raise ShapeError(f"rows {chosen.tolist()} are out of range for a batch of {batch}")
    return chosen


def _episode_numbers(episodes: Sequence[int], count: int) -> NDArray[np.int64]:
    numbers = np.asarray(episodes, np.int64)
    if numbers.shape != (count,):
        raise ShapeError(f"{count} rows begin new episodes, got {len(episodes)} episode numbers")
    if count and numbers.min() < 0:
        raise ConfigError(f"episode numbers must not be negative, got {numbers.min()}")
    return numbers


def plan_noise(
    architecture: Architecture,
    rows: Rows,
    chosen: NDArray[np.int64],
    *,
    seed: int,
    num_samples: int,
    guided: bool,
    candidates: int = 1,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Of the sampler (rows, S, L, Da) and of guidance (rows or 0, K, D), keyed by (seed, episode, plan).

    With several samples L counts the past actions too, by which one of them is chosen. Of `candidates`, for which each
    row is named so often in a row, the first has the noise of a plan without any, the others are numbered in their key.
    """
    length = architecture.chunk_length + (architecture.num_past_actions if num_samples > 1 else 0)
    noise = np.empty((len(chosen), num_samples, length, architecture.action_dim), np.float32)
    context = (architecture.num_context_tokens, architecture.width)
    corruption = np.empty((len(chosen) * guided, *context), np.float32)
    for i, row in enumerate(chosen):
        number = (i % candidates,) if i % candidates else ()
        rng = keyed_rng(POLICY_NOISE, seed, rows.episode[row], rows.num_plans[row], *number)
        rng.standard_normal(dtype=np.float32, out=noise[i])
        if guided:
            rng.standard_normal(dtype=np.float32, out=corruption[i])
    return noise, corruption
