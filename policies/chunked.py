"""What policies have in common that plan in chunks: from what, with which noise, and which plan is due when. No torch.

What they remember of their observations is in `observing.py`. A subclass computes: a policy with its model in this
process (`ScdPolicy`), or graphs that were made of one (`scd_robot.export.ExportedPolicy`).

Shapes: B rows, Ta chunk length, Da action width, d committed actions.
"""

import time
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from scd_robot.errors import ActionError, ConfigError
from scd_robot.policies.inputs import checked_action, checked_given, checked_running
from scd_robot.policies.observing import ObservingPolicy
from scd_robot.policies.rows import PlanInput, Rows, plan_noise, row_numbers
from scd_robot.transforms import Transforms
from scd_robot.types import ActionArray, GivenActions, Observation, RunningChunk

__all__ = ["Choice", "ChunkPolicy", "recorded_chunk"]


class Choice(Protocol):
    """Which of several chunks is followed."""

    @property
    def num_candidates(self) -> int:
        """N, sampled for each plan."""
        ...

    def best(self, chunks: ActionArray, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """(n,) which of the chunks (n, N, Ta, Da) of some rows (n,)."""
        ...


class ChunkPolicy(ObservingPolicy):
    """A policy in a control loop: plans in chunks from what it has observed; see `ObservingPolicy` for its arguments.

    Attributes:
        planned: (B,) which rows the last `act` planned for; None before.
        choice: among several chunks that are sampled for each plan of `act` and `plan`; None = the only one.
    """

    planned: NDArray[np.bool_] | None = None
    choice: Choice | None = None

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

    def plan(
        self,
        prefix: ActionArray | None = None,
        delay_steps: int = 0,
        rows: Sequence[int] | None = None,
        running: RunningChunk | None = None,
    ) -> ActionArray:
        """Samples a chunk for every row, or some, from the last observation, and follows it from now on.

        Args:
            prefix: (n, d, Da) actions already committed from the current control step on; the chunk begins with them.
            delay_steps: commit so many actions of the running chunk instead (the control steps that will pass while
                this plan is computed). With `prefix`, its length must be this or `delay_steps` 0.
            rows: n numbers, ascending, or a mask (B,); None = all.
            running: as in `plan_from`, (n, ., Da).

        A model trained with max_delay_steps = 0 was never shown clean actions: it sees the committed ones noised like
        the rest at every denoising step, which is less exact about how the plan goes on.

        Returns:
            (n, Ta, Da); action 0 is for the control step last observed.
        """
        everyone = self._observed("plan").batch_size
        chosen = np.arange(everyone) if rows is None else row_numbers(rows, everyone)
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
        if running is not None:
            self.check_guidance(running.max_gain)
            running = checked_running(running, len(chosen), self.spec.action_dim)
        chunk = self._sample_chunks(chosen, prefix, running)
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

    @property
    @abstractmethod
    def max_gain(self) -> float:
        """The largest gain with which a plan can be guided towards a running chunk; 0 = none can."""

    @abstractmethod
    def check_guidance(self, max_gain: float) -> None:
        """Raises ConfigError where plans of this policy cannot be guided towards a running chunk with this gain."""

    def act(self, observation: Observation, executed_action: ActionArray | None = None) -> ActionArray:
        """Observes, plans for the rows whose plan is used up, and returns each row's next action (B, Da)."""
        self.observe(observation, executed_action)
        return self.next_action()

    def next_action(self) -> ActionArray:
        """What `act` does after it has observed.

        A plan that is due between two encoder steps, after observations without plans say, is one of the earlier one.
        """
        rows = self._observed("act")
        self.planned = rows.age >= self.spec.num_executed
        due = np.flatnonzero(self.planned)
        if self.reproducible and len(due):
            rows.follow(due, self._sample_chunks(np.arange(rows.batch_size), None)[due])
        elif len(due):
            rows.follow(due, self._sample_chunks(due, None))
        return rows.current_action()

    def _sample_chunks(
        self, chosen: NDArray[np.int64], prefix: ActionArray | None, running: RunningChunk | None = None
    ) -> ActionArray:
        """New chunks (rows, Ta, Da) for some rows."""
        started = time.perf_counter()
        if self.choice is None:
            chunk = self._denoise(self._plan_input(chosen), prefix, running)
        else:
            count = self.choice.num_candidates
            prefix = None if prefix is None else np.repeat(prefix, count, axis=0)
            if running is not None:
                running = replace(running, actions=np.repeat(running.actions, count, axis=0))
            sampled = self._denoise(self._plan_input(np.repeat(chosen, count), count), prefix, running)
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
        if not position.all():
            waiting = chosen[position == 0].tolist()
            raise ConfigError(f"{call}() needs an observation of rows {waiting} first, which were just reset")
        late = chosen[(position - 1) % self.architecture.history_stride != 0]
        if len(late):
            raise ConfigError(
                f"{call}() of rows {late.tolist()} is due only in control steps in which the encoder runs, every "
                f"{self.architecture.history_stride} (history_stride)"
            )
        return rows


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
