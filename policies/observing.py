"""The half of a policy that observes: rows, their episodes and histories, one encoder step in a control step. No torch.

Shapes: B rows, Da action width, K context tokens, D width.
"""

import contextlib
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from scd_robot.errors import ConfigError, ShapeError
from scd_robot.latest import Latest
from scd_robot.policies.inputs import FarInputs, checked_action, model_observation, optional_keys
from scd_robot.policies.instructions import Instructions
from scd_robot.policies.rows import Architecture, HistoryCache, Rows
from scd_robot.transforms import TASK, Transforms
from scd_robot.types import ActionArray, DatasetSpec, Observation, PolicySpec

__all__ = ["ObservingPolicy", "Settings"]

_MOST_TIMINGS = 10_000  # a robot that runs for days and never asks for them must not run out of memory


class Settings(Protocol):
    """How a model is run; fields of `ScdPolicyConfig`."""

    @property
    def num_executed(self) -> int:
        """Actions taken from one plan before the next."""
        ...

    @property
    def num_samples(self) -> int:
        """Plans sampled at a time."""
        ...

    @property
    def guidance_scale(self) -> float:
        """1 = off."""
        ...

    @property
    def seed(self) -> int:
        """Of the noise."""
        ...


class ObservingPolicy(ABC):
    """What a `ChunkPolicy` remembers; numpy in and out, in the units and keys of the dataset.

    Rows are independent: each has its own history, position in its chunk, and noise keyed by (seed, episode, plan), so
    that a row does the same alone and in a batch.

    Args:
        architecture: of the model.
        keys: its observation keys.
        dataset: specification of its training data, as recorded.
        ranges: of its vectors in training, see `FarInputs`.
        transforms: between the recording and the model; what they did to actions is undone.
        config: how to run it.
        reproducible: `act` computes plans for all rows whenever one is due, so that every computation has the same
            shape and a row's actions are bitwise the same whatever the others do; takes more time.
        task: of several, see `task` below.
        goal: what is to be reached, by observation key as recorded (without "goal.") and without a batch axis, where
            the model is shown goals. None = every observation brings it, as "goal.KEY".

    Attributes:
        spec: keys, shapes, rate and chunk length.
        instructions: its task and its goal.
    """

    def __init__(
        self,
        architecture: Architecture,
        keys: Sequence[str],
        dataset: DatasetSpec,
        ranges: Mapping[str, tuple[Sequence[float], Sequence[float]]],
        transforms: Transforms,
        config: Settings,
        reproducible: bool = False,
        task: str | None = None,
        goal: Observation | None = None,
    ) -> None:
        self.architecture, self.transforms, self.reproducible = architecture, transforms, reproducible
        self.config: Any = config
        sources, recorded = transforms.sources, transforms.recorded.observation
        self._sources = {key: sources[key] for key in keys if key in sources}
        self.instructions = Instructions(transforms.config.tasks, task, goal, self._sources.values(), recorded)
        told = self.instructions.goal
        self._per_key = architecture.observation_tokens == "per_key"
        self.spec = PolicySpec(
            observation={key: recorded[key] for key in self._sources.values() if key not in told},
            action_dim=dataset.action_dim,
            control_dt=dataset.control_dt,
            chunk_length=architecture.chunk_length,
            num_executed=config.num_executed,
            history_length=architecture.history_length,
            action_kind=dataset.action_kind,
            tasks=tuple(self.instructions.tasks),
            max_delay_steps=architecture.max_delay_steps,
            optional=tuple(sorted(optional_keys(self._sources, transforms, self._per_key) - set(told))),
        )
        self._far = FarInputs({key: ranges[key] for key in self._sources if key in ranges})
        self._timings = _empty_timings()
        self._rows: Rows | None = None
        self._context: Any = None  # what plans are made from, of all rows
        self._state: dict[str, NDArray[np.float32]] = {}  # what chunks are relative to
        self._first_episodes: list[int] | None = None
        self._next_episode = 0

    # What computes.

    @abstractmethod
    def _new_cache(self, batch_size: int) -> HistoryCache:
        """An empty history."""

    @abstractmethod
    def _encode(
        self,
        rows: Rows,
        seen: Mapping[str, NDArray[Any]],
        present: Mapping[str, bool],
        encodes: NDArray[np.bool_],
        state: Mapping[str, NDArray[Any]],
    ) -> Any:
        """One encoder step.

        Args:
            rows: all; the cache is advanced.
            seen: arrays (B, ...) by the model's keys.
            present: False for keys that are absent.
            encodes: (B,) rows that take the step.
            state: (B, Do) by key, what past actions are relative to.

        Returns:
            The context of all rows; of those that take no step what it was before.
        """

    @abstractmethod
    def _of_rows(self, context: Any, rows: NDArray[np.int64]) -> Any:
        """A copy of the context of some rows (n,)."""

    # What a control loop calls.

    @property
    def task(self) -> str | None:
        """What it does, in words; one of `spec.tasks`, or None where it was not told yet. May change at any time.

        Raises:
            UnknownNameError: it does not know the task.
        """
        return self.instructions.task

    @task.setter
    def task(self, text: str) -> None:
        self.instructions.task = text

    def task_vector(self, text: str | None = None) -> NDArray[np.float32]:
        """(n,) what the model is shown of a task; None = of `task`. Errors: see `Instructions.vector`."""
        return self.instructions.vector(text)

    def reset(self, rows: Sequence[int] | None = None, episodes: Sequence[int] | None = None) -> None:
        """Begins new episodes; see `types.Policy.reset`. Without `episodes` they are counted on, from 0."""
        if rows is None:
            if self._rows is not None:
                self._next_episode = self._rows.next_episode
            self._rows, self._context, self._state = None, None, {}
            self._first_episodes = None if episodes is None else list(episodes)
            return
        if self._rows is None:
            raise ConfigError("reset(rows=...) before the first observation: the number of rows is not known yet")
        self._rows.reset(rows, episodes)

    def new_history(self, episode: int) -> Rows:
        """The memory of one row that has observed nothing yet, for `resume`; `episode` keys its noise."""
        return self._new_rows([episode])

    def resume(self, histories: Sequence[Rows]) -> None:
        """Goes on with these memories as its rows, in this order, and forgets what it had; `observe` comes next.

        They belong to the policy until `release` hands them back.

        Args:
            histories: one of each row, from `new_history` or `release`.
        """
        self._rows = histories[0] if len(histories) == 1 else Rows.join(histories)
        self._context, self._state = None, {}

    def release(self) -> list[Rows]:
        """Hands over the memory of each row, for `resume`, and forgets it: rows may come and go between control steps.

        What the encoder made of the last observation is not part of it: whoever wants a plan of it plans first.
        """
        rows, self._rows, self._context, self._state = self._rows, None, None, {}
        if rows is None or rows.batch_size == 1:
            return [] if rows is None else [rows]
        return [rows.select([row]) for row in range(rows.batch_size)]

    def observe(self, observation: Observation, executed_action: ActionArray | None = None) -> None:
        """Advances every row's history by one control step, without planning.

        Args:
            observation: arrays (B, ...), all keys of `spec.observation` (others are ignored), pictures (B, H, W, C)
                uint8. A model with a token for each key does without some of them: what is left out, or None, is absent
                in this step. Pictures may be None in any model. Where rows do different tasks, "task" (B, n) holds
                their vectors, see `task_vector`.
            executed_action: (B, Da) what the robot did in the last step; None = what the policy asked for.

        Raises:
            ShapeError: missing keys, wrong widths, a batch size other than before, NaN or infinite values; pictures of
                another size or type, or of one colour.
        """
        observation = self.instructions.with_goal(observation)
        seen, present = model_observation(observation, self._sources, self.transforms, self._per_key)
        self._far.look(seen, present)
        batch = len(next(iter(seen.values())))
        if self.spec.tasks:
            seen[TASK] = self.instructions.task_rows(observation, batch)
        if executed_action is not None:
            executed_action = checked_action("executed_action", executed_action, (batch, self.spec.action_dim))
        if self._rows is None:
            episodes = self._first_episodes
            if episodes is None:
                episodes = list(range(self._next_episode, self._next_episode + batch))
            if len(episodes) != batch:
                raise ShapeError(f"reset() was given {len(episodes)} episodes, the observation has {batch} rows")
            self._rows = self._new_rows(episodes)
        elif batch != self._rows.batch_size:
            raise ShapeError(f"batch has {batch} rows, the policy runs {self._rows.batch_size}; call reset() first")
        rows = self._rows
        past, past_known = rows.past.copy(), rows.past_known.copy()
        rows.record_executed(executed_action)
        encodes = rows.position % self.architecture.history_stride == 0
        if encodes.any():
            started = time.perf_counter()
            state = {part.key: seen[part.key] for part in self.transforms.config.chunk_parts}
            try:
                self._context = self._encode(rows, seen, present, encodes, state)
            except BaseException:  # this control step has not been, whoever tries it again
                rows.past, rows.past_known = past, past_known
                raise
            for key, value in state.items():
                self._state[key] = np.where(encodes[:, None], value, self._state.get(key, value))
            self._timings["encoder_ms"].append(1e3 * (time.perf_counter() - started))
        rows.position += 1

    @property
    def context(self) -> Any:
        """(B, K, D) what the encoder made of each row's history when it ran last; plans are made from it.

        Raises:
            ConfigError: there was no observation yet.
        """
        if self._context is None:
            raise ConfigError("there is no context before the first observation: call observe(observation)")
        return self._context

    @contextlib.contextmanager
    def unwatched(self) -> Iterator[None]:
        """Within it observations are made up: none is compared with what was trained on."""
        watching, self._far = self._far, FarInputs({})
        try:
            yield
        finally:
            self._far = watching

    def drain_timings(self) -> dict[str, list[float]]:
        """Wall times [ms] of encoder steps and plans since the last call, and how many rows each plan was for.

        They are {"encoder_ms", "plan_ms", "plan_rows"}, of each the latest 10,000 at most.
        """
        drained, self._timings = self._timings, _empty_timings()
        return {name: kept.values().tolist() for name, kept in drained.items()}

    def _new_rows(self, episodes: Sequence[int]) -> Rows:
        return Rows(self._new_cache(len(episodes)), episodes, self.architecture, self.transforms.unknown_action())

    def _observed(self, call: str) -> Rows:
        if self._rows is None or self._context is None:
            raise ConfigError(f"{call}() needs an observation first: call observe(observation)")
        return self._rows


def _empty_timings() -> dict[str, Latest]:
    return {name: Latest(_MOST_TIMINGS) for name in ("encoder_ms", "plan_ms", "plan_rows")}
