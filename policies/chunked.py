"""What policies have in common that plan in chunks: rows, episodes, noise, and which plan is due when. No torch.

A subclass computes: a policy with its model in this process (`ScdPolicy`), or graphs that were made of one
(`scd_robot.export.ExportedPolicy`).

Shapes: B rows, Ta chunk length, Da action width, d committed actions.
"""

import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from scd_robot.errors import ActionError, ConfigError, ShapeError
from scd_robot.policies.inputs import checked_action, checked_given, checked_running, model_observation
from scd_robot.policies.instructions import Instructions
from scd_robot.policies.rows import Architecture, HistoryCache, PlanInput, Rows, plan_noise
from scd_robot.transforms import TASK, Transforms
from scd_robot.types import ActionArray, DatasetSpec, GivenActions, Observation, PolicySpec, RunningChunk

__all__ = ["Choice", "ChunkPolicy", "Settings", "recorded_chunk"]

_MOST_TIMINGS = 100_000  # a robot that runs for days and never asks for them must not run out of memory


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


class Choice(Protocol):
    """Which of several chunks is followed."""

    @property
    def num_candidates(self) -> int:
        """N, sampled for each plan."""
        ...

    def best(self, chunks: ActionArray, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """(n,) which of the chunks (n, N, Ta, Da) of some rows (n,)."""
        ...


class ChunkPolicy(ABC):
    """A policy in a control loop; numpy in and out, in the units and keys of the dataset.

    Rows are independent: each has its own history, position in its chunk, and noise keyed by (seed, episode, plan), so
    that a row does the same alone and in a batch.

    Args:
        architecture: of the model.
        keys: its observation keys.
        dataset: specification of its training data, as recorded.
        transforms: between the recording and the model; what they did to actions is undone.
        config: how to run it.
        reproducible: `act` computes plans for all rows whenever one is due, so that every computation has the same
            shape and a row's actions are bitwise the same whatever the others do; takes more time.
        task: of several, see `task` below.
        goal: what is to be reached, by observation key as recorded (without "goal.") and without a batch axis, where
            the model is shown goals. None = every observation brings it, as "goal.KEY".

    Attributes:
        spec: keys, shapes, rate and chunk length.
        planned: (B,) which rows the last `act` planned for; None before.
        instructions: its task and its goal.
        choice: among several chunks that are sampled for each plan of `act` and `plan`; None = the only one.
    """

    def __init__(
        self,
        architecture: Architecture,
        keys: Sequence[str],
        dataset: DatasetSpec,
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
        self.spec = PolicySpec(
            observation={key: recorded[key] for key in self._sources.values() if key not in told},
            action_dim=dataset.action_dim,
            control_dt=dataset.control_dt,
            chunk_length=architecture.chunk_length,
            num_executed=config.num_executed,
            history_length=architecture.history_length,
            action_kind=dataset.action_kind,
            tasks=tuple(self.instructions.tasks),
        )
        self.planned: NDArray[np.bool_] | None = None
        self.choice: Choice | None = None
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
    def _denoise(
        self,
        given: PlanInput,
        prefix: ActionArray | None,
        running: RunningChunk | None = None,
        fixed: GivenActions | None = None,
    ) -> ActionArray:
        """Chunks (n, Ta, Da) in the units of the dataset, which begin with `prefix` (n, d, Da).

        Raises:
            ActionError: one holds a NaN or infinite action.
            ConfigError: it cannot be guided towards `running`, or hold what is `fixed`.
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
        may_be_absent = self.architecture.observation_tokens == "per_key"
        observation = self.instructions.with_goal(observation)
        seen, present = model_observation(observation, self._sources, self.transforms, may_be_absent)
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
        rows.record_executed(executed_action)
        encodes = rows.position % self.architecture.history_stride == 0
        if encodes.any():
            started = time.perf_counter()
            state = {part.key: seen[part.key] for part in self.transforms.config.chunk_parts}
            self._context = self._encode(rows, seen, present, encodes, state)
            for key, value in state.items():
                self._state[key] = np.where(encodes[:, None], value, self._state.get(key, value))
            self._timings["encoder_ms"].append(1e3 * (time.perf_counter() - started))
        rows.position += 1

    def plan(
        self, prefix: ActionArray | None = None, delay_steps: int = 0, rows: Sequence[int] | None = None
    ) -> ActionArray:
        """Samples a chunk for every row, or some, from the last observation, and follows it from now on.

        Args:
            prefix: (n, d, Da) actions already committed from the current control step on; the chunk begins with them.
            delay_steps: commit so many actions of the running chunk instead (the control steps that will pass while
                this plan is computed). With `prefix`, its length must be this or `delay_steps` 0.
            rows: n numbers, ascending; None = all.

        A model trained with max_delay_steps = 0 was never shown clean actions: it sees the committed ones noised like
        the rest at every denoising step, which is less exact about how the plan goes on.

        Returns:
            (n, Ta, Da); action 0 is for the control step last observed.
        """
        everyone = self._observed("plan").batch_size
        chosen = np.arange(everyone) if rows is None else np.asarray(rows, np.int64)
        if (np.diff(chosen) < 1).any():
            raise ConfigError(f"rows must be different numbers in ascending order, got {chosen.tolist()}")
        remembered = self._plannable("plan", chosen)
        if delay_steps < 0:
            raise ConfigError(f"delay_steps must not be negative, got {delay_steps}")
        if prefix is None and delay_steps:
            prefix = remembered.upcoming(delay_steps, chosen)
        elif prefix is not None:
            count = delay_steps or (np.shape(prefix)[1] if np.ndim(prefix) == 3 else 0)
            prefix = checked_action("prefix", prefix, (len(chosen), count, self.spec.action_dim))
        chunk = self._sample_chunks(chosen, prefix)
        remembered.follow(chosen, chunk)
        return chunk

    @property
    def may_plan(self) -> bool:
        """Whether `snapshot` and `plan` are possible now: all rows were observed, and the encoder ran for them."""
        rows = self._rows
        if rows is None or self._context is None or not rows.position.all():
            return False
        return not ((rows.position - 1) % self.architecture.history_stride).any()

    @property
    def max_prefix(self) -> int:
        """Most actions that `plan_from` and `plan` take as committed."""
        return self.architecture.max_delay_steps or self.spec.chunk_length - 1

    def snapshot(self) -> PlanInput:
        """What a plan from the last observation is made from, for `plan_from`, in another thread say.

        Each snapshot has noise of its own, as each plan has.

        Raises:
            ConfigError: a plan is not due, see `may_plan`; or its chunks are chosen among several, which plans from
                snapshots are not.
        """
        if self.choice is not None:
            raise ConfigError("plans from snapshots choose among no candidates: use act, or take the choice away")
        rows = self._plannable("snapshot")
        given = self._plan_input(np.arange(rows.batch_size))
        rows.num_plans += 1
        return replace(given, context=self._of_rows(given.context, given.rows))

    def plan_from(
        self,
        given: PlanInput,
        prefix: ActionArray | None = None,
        running: RunningChunk | None = None,
        fixed: GivenActions | None = None,
    ) -> ActionArray:
        """Samples a chunk from a snapshot; changes nothing, so that `observe` may run in another thread meanwhile.

        Args:
            given: from `snapshot`.
            prefix: (B, d, Da) actions committed from the snapshot's control step on; the chunk begins with them.
            running: what is left of the chunk under way, towards which this one is guided; see `check_guidance`.
            fixed: numbers of the chunk that are given: a gripper that stays closed, say.

        Returns:
            (B, Ta, Da), without `running` and `fixed` what `plan` would have given; action 0 is for the snapshot's
            control step.
        """
        if prefix is not None:
            count = np.shape(prefix)[1] if np.ndim(prefix) == 3 else 0
            prefix = checked_action("prefix", prefix, (len(given.rows), count, self.spec.action_dim))
        if running is not None:
            self.check_guidance(running.max_gain)
            running = checked_running(running, len(given.rows), self.spec.action_dim)
        if fixed is not None:
            fixed = checked_given(fixed, (len(given.rows), self.spec.chunk_length, self.spec.action_dim))
        return self._denoise(given, prefix, running, fixed)

    @abstractmethod
    def check_guidance(self, max_gain: float) -> None:
        """Raises ConfigError where plans of this policy cannot be guided towards a running chunk with this gain."""

    def act(self, observation: Observation, executed_action: ActionArray | None = None) -> ActionArray:
        """Observes, plans for the rows whose plan is used up, and returns each row's next action (B, Da)."""
        self.observe(observation, executed_action)
        rows = self._observed("act")
        self.planned = rows.age >= self.spec.num_executed
        due = np.flatnonzero(self.planned)
        if self.reproducible and len(due):
            rows.follow(due, self._sample_chunks(np.arange(rows.batch_size), None)[due])
        elif len(due):
            rows.follow(due, self._sample_chunks(due, None))
        return rows.current_action()

    @property
    def context(self) -> Any:
        """(B, K, D) what the encoder made of each row's history when it ran last; plans are made from it.

        Raises:
            ConfigError: there was no observation yet.
        """
        if self._context is None:
            raise ConfigError("there is no context before the first observation: call observe(observation)")
        return self._context

    def drain_timings(self) -> dict[str, list[float]]:
        """Wall times [ms] of encoder steps and plans since the last call, and how many rows each plan was for.

        They are {"encoder_ms", "plan_ms", "plan_rows"}, of each the latest 100,000 at most.
        """
        drained, self._timings = self._timings, _empty_timings()
        return {name: list(values) for name, values in drained.items()}

    def _new_rows(self, episodes: Sequence[int]) -> Rows:
        return Rows(self._new_cache(len(episodes)), episodes, self.architecture, self.spec.action_dim)

    def _sample_chunks(self, chosen: NDArray[np.int64], prefix: ActionArray | None) -> ActionArray:
        """New chunks (rows, Ta, Da) for some rows."""
        started = time.perf_counter()
        if self.choice is None:
            chunk = self._denoise(self._plan_input(chosen), prefix)
        else:
            count = self.choice.num_candidates
            prefix = None if prefix is None else np.repeat(prefix, count, axis=0)
            sampled = self._denoise(self._plan_input(np.repeat(chosen, count), count), prefix)
            chunks = sampled.reshape(len(chosen), count, *sampled.shape[1:])
            chunk = chunks[np.arange(len(chosen)), self.choice.best(chunks, chosen)]
        self._timings["plan_ms"].append(1e3 * (time.perf_counter() - started))
        self._timings["plan_rows"].append(len(chosen))
        return chunk

    def _plan_input(self, chosen: NDArray[np.int64], candidates: int = 1) -> PlanInput:
        """Of some rows, each named so often in a row as it has candidates; the context of all rows is not copied."""
        rows = self._observed("plan")
        guided, copies = self.config.guidance_scale != 1.0, self.config.num_samples
        noise, corruption = plan_noise(
            self.architecture,
            rows,
            chosen,
            seed=self.config.seed,
            num_samples=copies,
            guided=guided,
            candidates=candidates,
        )
        context = self._context
        if candidates > 1 or len(chosen) < rows.batch_size:
            context = self._of_rows(context, chosen)
        state = {key: value[chosen] for key, value in self._state.items()}
        return PlanInput(chosen, context, state, noise, corruption, rows.past[chosen], rows.past_known[chosen])

    def _plannable(self, call: str, chosen: NDArray[np.int64] | None = None) -> Rows:
        """Raises ConfigError where a plan of the chosen rows (None = all) is not due."""
        rows = self._observed(call)
        chosen = np.arange(rows.batch_size) if chosen is None else chosen
        position = rows.position[chosen]
        late = chosen[(position - 1) % self.architecture.history_stride != 0]
        if len(late):
            raise ConfigError(
                f"{call}() of rows {late.tolist()} is due only in control steps in which the encoder runs, every "
                f"{self.architecture.history_stride} (history_stride)"
            )
        if not position.all():
            waiting = chosen[position == 0].tolist()
            raise ConfigError(f"{call}() needs an observation of rows {waiting} first, which were just reset")
        return rows

    def _observed(self, call: str) -> Rows:
        if self._rows is None or self._context is None:
            raise ConfigError(f"{call}() needs an observation first: call observe(observation)")
        return self._rows


def recorded_chunk(
    chunk: NDArray[Any],
    given: PlanInput,
    prefix: ActionArray | None,
    transforms: Transforms,
    fixed: GivenActions | None = None,
) -> ActionArray:
    """Chunks (n, Ta, Da) of the model, as recorded, beginning with exactly `prefix` (n, d, Da), and with what is fixed.

    Raises:
        ActionError: one holds a NaN or infinite action.
    """
    chunk = transforms.undo_action(transforms.undo_chunk(chunk, given.state)).astype(np.float32, copy=False)
    if not np.isfinite(chunk).all():
        row = int(given.rows[np.argwhere(~np.isfinite(chunk))[0][0]])
        raise ActionError(f"the plan of row {row} holds a NaN or infinite action; stop the robot and reset the row")
    if fixed is not None:
        chunk = np.where(fixed.mask, fixed.actions, chunk)
    if prefix is not None:
        chunk[:, : prefix.shape[1]] = prefix
    return chunk


def _empty_timings() -> dict[str, deque[float]]:
    return {name: deque(maxlen=_MOST_TIMINGS) for name in ("encoder_ms", "plan_ms", "plan_rows")}
