"""Which plans are asked for, when, and what becomes of them.

Shapes: Da action width, d committed actions.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

from scd_robot.control.delay import DelayEstimator, Split, split_chunk
from scd_robot.control.executor import ChunkExecutor, ExecutionConfig
from scd_robot.control.interfaces import EncodingPolicy
from scd_robot.control.planner import Planner, PlanRequest, PlanResult
from scd_robot.latest import Latest
from scd_robot.types import ActionArray, RunningChunk

__all__ = ["KEPT_TIMES", "Fate", "Planning"]

Fate = Literal["followed", "too_late", "stale", "failed", "dropped"]
"""What becomes of a plan, see `LoopReport`."""

KEPT_TIMES = 10_000  # for reports: the latest of each kind


class Planning:
    """Keeps one plan in the making, and the executor in chunks.

    Args:
        policy: that plans.
        planner: where.
        config: how chunks are carried out.
        rest: (Da,) see `Limits`.
        max_age_s: of the observation that a plan was made from, when it begins to be followed.

    Attributes:
        executor: follows the chunks.
        epoch: plans of another one are dropped.
        counts: of plans, see `LoopReport`.
        times_ms: from a request to its plan being followed.
    """

    def __init__(
        self,
        policy: EncodingPolicy,
        planner: Planner,
        config: ExecutionConfig,
        rest: tuple[float | None, ...],
        max_age_s: float = float("inf"),
    ) -> None:
        self._policy, self._planner, self._config, self._max_age_s = policy, planner, config, max_age_s
        self._delay = DelayEstimator(config.delay)
        self._flying: PlanRequest | None = None
        self.executor = ChunkExecutor(config, rest)
        self.epoch = 0
        self.counts: Counter[str] = Counter()
        self.times_ms = Latest(KEPT_TIMES)

    @property
    def delay_steps(self) -> int:
        """The guess for the next plan."""
        return self._delay.delay_steps

    @property
    def split(self) -> Split:
        """How chunks are used at this delay."""
        spec = self._policy.spec
        executed = self._config.num_executed or spec.num_executed
        if self.rests:
            return Split(min(executed, spec.chunk_length), self.delay_steps, fits=True)
        split = split_chunk(spec.chunk_length, executed, self.delay_steps)
        return replace(split, fits=split.fits and split.delay_steps <= self._most_trained)

    @property
    def told_delay(self) -> str:
        """The guess for the next plan, in words."""
        most = self._most_trained
        trained = "" if most == float("inf") else f", trained was at most {most:g} (model.max_delay_steps)"
        return f"{self.delay_steps} control steps per plan{trained}"

    @property
    def _most_trained(self) -> float:
        """The longest delay that the strategy and the policy's training allow for."""
        trained = self._policy.spec.max_delay_steps if self._config.strategy == "prefix" else None
        return trained or float("inf")  # one that was not trained for delays is told of when the loop is made

    @property
    def rests(self) -> bool:
        """Whether standing still while a plan is made is what the strategy asks for."""
        return self._config.strategy == "synchronous"

    def drop(self) -> None:
        """Forgets all plans, also the one in the making."""
        self.epoch += 1
        self.executor.clear()

    def overdue(self, steps: int) -> bool:
        """Whether the plan in the making takes longer than was committed to; `steps` as of `ask`, after `collect`."""
        return self._flying is not None and steps - self._flying.steps >= self._flying.committed

    def collect(self, steps: int, now_s: float) -> tuple[PlanResult, Fate] | None:
        """A plan that is there, and what becomes of it; a good one of this epoch is followed from now on."""
        result = self._planner.poll()
        if result is None:
            return None
        request, self._flying = result.request, None
        self.times_ms.append(1e3 * (now_s - request.asked_s))
        fate = self._fate(result, steps, now_s)
        self.counts[fate] += 1
        return result, fate

    def _fate(self, result: PlanResult, steps: int, now_s: float) -> Fate:
        request = result.request
        if request.epoch != self.epoch:
            return "dropped"
        if result.chunk is None:
            return "failed"
        self._delay.add(steps - request.steps)
        if now_s - request.seen_s > self._max_age_s:
            return "stale"
        chunk = result.chunk[: self.split.num_executed] if self.rests else result.chunk
        followed = self.executor.accept(chunk, self.executor.consumed - request.consumed)
        return "followed" if followed else "too_late"

    def ask(self, steps: int, now_s: float, seen_s: float, ahead: Callable[[int], ActionArray | None]) -> Split | None:
        """Asks for the next plan if its time has come and no other is in the making.

        Args:
            steps: control steps of the loop so far.
            now_s: the time [s].
            seen_s: the stamp of the observation that was encoded last [s].
            ahead: gives what the running chunk will have carried out in up to so many control steps from this one on,
                (1, n, Da), or None.

        Returns:
            How the running chunk is split, where a plan was asked for.
        """
        split = self.split
        if self._planner.busy or not self._policy.may_plan or not self.executor.wants_plan(split):
            self._planner.skip()
            return None
        committed, running, delay = None, None, split.delay_steps
        if self._config.strategy == "prefix":
            committed = ahead(min(delay, self._policy.max_prefix))
        elif self._config.is_guided and (left := ahead(self._policy.spec.chunk_length)) is not None:
            exact = self._config.strategy == "guided"
            running = RunningChunk(left, min(delay, left.shape[1]), self._config.max_gain, exact)
        given, consumed = self._policy.snapshot(), self.executor.consumed
        self._flying = PlanRequest(self.epoch, given, committed, running, consumed, steps, delay, now_s, seen_s)
        self.counts["asked"] += 1
        self._planner.submit(self._flying)
        return split
