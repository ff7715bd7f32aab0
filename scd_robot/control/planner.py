"""Plans beside the loop: in a thread, or in virtual time.

What the two threads share: a request goes into one queue, its result comes out of another. A request holds a snapshot
that nobody changes; the weights are read only. Nothing is locked while a plan is made.
"""

import logging
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from scd_robot.control.clock import Clock
from scd_robot.control.interfaces import EncodingPolicy, StreamingPolicy
from scd_robot.types import ActionArray, PolicySpec, RunningChunk

__all__ = [
    "PlanRequest",
    "PlanResult",
    "Planner",
    "PlanningPolicy",
    "ThreadPlanner",
    "VirtualPlanner",
    "checked_plan",
    "make_plan",
]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PlanRequest:
    """One plan that is asked for.

    Attributes:
        epoch: what is planned in one epoch is never carried out in another.
        given: the policy's snapshot.
        prefix: (1, d, Da) committed actions; None = none.
        running: what the plan is guided towards; None = nothing.
        consumed: the executor's count of actions when it was asked for.
        steps: the loop's count of control steps then.
        committed: control steps within which it is expected.
        asked_s: when.
        seen_s: stamp of the observation that it is made from.
    """

    epoch: int
    given: Any
    prefix: ActionArray | None
    running: RunningChunk | None
    consumed: float
    steps: int
    committed: int
    asked_s: float
    seen_s: float


@dataclass(frozen=True)
class PlanResult:
    """What became of it: a finite chunk (Ta, Da), or None and why not."""

    request: PlanRequest
    chunk: ActionArray | None
    error: str = ""


@runtime_checkable
class Planner(Protocol):
    """Makes one plan at a time."""

    @property
    def busy(self) -> bool:
        """Whether a request is waited for; no other may be submitted."""
        ...

    def submit(self, request: PlanRequest) -> None:
        """Begins a plan of the observation of this control step, and returns at once."""
        ...

    def skip(self) -> None:
        """No plan of the observation of this control step is asked for."""
        ...

    def poll(self) -> PlanResult | None:
        """The result if it is there; never waits."""
        ...

    def close(self) -> None:
        """Ends; a plan that is under way is given up."""
        ...


class PlanningPolicy(EncodingPolicy, Planner, Protocol):
    """A policy that sees to its plans by itself, such as one behind a server."""


def make_plan(policy: StreamingPolicy, request: PlanRequest) -> PlanResult:
    """Plans, and turns whatever goes wrong into a result."""
    try:
        chunk = np.asarray(policy.plan_from(request.given, request.prefix, request.running))
        return checked_plan(policy.spec, request, chunk)
    except Exception as error:
        logger.debug("a plan failed", exc_info=error)
        return PlanResult(request, None, f"{type(error).__name__}: {error}")


def checked_plan(spec: PolicySpec, request: PlanRequest, chunk: ActionArray) -> PlanResult:
    """The result that a chunk (1, Ta, Da) is, or why it must not be followed."""
    shape = (spec.chunk_length, spec.action_dim)
    if chunk.shape != (1, *shape):
        return PlanResult(request, None, f"the policy planned {chunk.shape} instead of {(1, *shape)}")
    if not np.isfinite(chunk).all():
        return PlanResult(request, None, "the plan holds NaN or infinite actions")
    return PlanResult(request, chunk[0])


class ThreadPlanner:
    """Plans in a thread of its own, which ends with the process even where a plan hangs."""

    def __init__(self, policy: StreamingPolicy) -> None:
        self._requests: queue.SimpleQueue[PlanRequest | None] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[PlanResult] = queue.SimpleQueue()
        self._waiting = False  # only the loop's thread reads and writes it
        self._thread = threading.Thread(target=self._work, args=(policy,), name="planner", daemon=True)
        self._thread.start()

    @property
    def busy(self) -> bool:
        """Whether a request is waited for."""
        return self._waiting

    def submit(self, request: PlanRequest) -> None:
        """Begins a plan."""
        assert not self._waiting, "one plan at a time"
        self._waiting = True
        self._requests.put(request)

    def skip(self) -> None:
        """Nothing waits for it."""

    def poll(self) -> PlanResult | None:
        """The result if it is there."""
        try:
            result = self._results.get_nowait()
        except queue.Empty:
            return None
        self._waiting = False
        return result

    def close(self) -> None:
        """Lets the thread end after the plan under way."""
        self._requests.put(None)
        self._thread.join(timeout=1.0)

    def _work(self, policy: StreamingPolicy) -> None:
        while (request := self._requests.get()) is not None:
            self._results.put(make_plan(policy, request))


class VirtualPlanner:
    """Plans at once and hands the result over when it would be there: for virtual clocks, and for simulated latency.

    Args:
        policy: that plans.
        clock: the loop's.
        duration_s: how long the next plan takes [s], asked for once per plan.
    """

    def __init__(self, policy: StreamingPolicy, clock: Clock, duration_s: Callable[[], float]) -> None:
        self._policy, self._clock, self._duration_s = policy, clock, duration_s
        self._result: PlanResult | None = None
        self._there_s = 0.0

    @property
    def busy(self) -> bool:
        """Whether a result was not handed over yet."""
        return self._result is not None

    def submit(self, request: PlanRequest) -> None:
        """Plans."""
        assert self._result is None, "one plan at a time"
        self._there_s = self._clock.now() + self._duration_s()
        self._result = make_plan(self._policy, request)

    def skip(self) -> None:
        """Nothing waits for it."""

    def poll(self) -> PlanResult | None:
        """The result, from its time on."""
        if self._result is None or self._clock.now() < self._there_s:
            return None
        result, self._result = self._result, None
        return result

    def close(self) -> None:
        """Nothing is to be ended."""
