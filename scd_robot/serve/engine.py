"""Histories of several connections and one policy: requests that wait together become one forward pass.

Plain and synchronous: the server calls it from its one worker thread.

Shapes: B requests computed together, n control steps, Ta chunk length, Da action width.
"""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scd_robot.errors import ConfigError, ScdRobotError, ShapeError, UnknownNameError
from scd_robot.serve.requests import Request
from scd_robot.transforms import TASK
from scd_robot.usable import problem_of

__all__ = ["Answer", "Engine", "Session"]

logger = logging.getLogger(__name__)

_LONGEST_GAP = 1_000_000  # control steps


@dataclass(eq=False)
class Session:
    """What is remembered of one connection.

    Attributes:
        history: the policy's memory of it; None = nothing was observed yet.
        step: control step of the last observation, as the client counts.
        planned: whether the last observation was answered with a plan.
        ticks: the client sends every control step, for it has sent some without the wish for a plan.
        snapshots: histories kept, by name.
        prompt: last one; None = there was none.
        name: last session_id.
        evicted: the history was dropped while the client was silent, and it was not told yet.
    """

    history: Any = None
    step: int = -1
    planned: bool = False
    ticks: bool = False
    snapshots: dict[str, tuple[Any, int, bool]] = field(default_factory=dict)
    prompt: str | None = None
    name: str | None = None
    evicted: bool = False


@dataclass(frozen=True)
class Answer:
    """To one request.

    Attributes:
        message: to send.
        rows: requests that were computed together.
    """

    message: dict[str, Any]
    rows: int = 0


@dataclass
class _Job:
    session: Session
    request: Request
    history: Any  # what the session's becomes; the rest of the session stays as it was if the request is refused
    step: int
    planned: bool
    new: bool  # a history begins
    gap: int  # control steps since the last observation
    task: NDArray[np.float32] | None = None  # vector of it, for policies of several
    result: Answer | Exception | None = None


class Engine:
    """Runs batches of requests.

    Args:
        policy: see `scd_robot.policies.ScdPolicy`; used by nobody else.
        steps_per_plan: control steps that a client lets pass after a plan if it does not tell; None = `num_executed`.
        max_history_bytes: of a connection, snapshots included.
        prompt_resets: a new prompt begins a new history.

    Raises:
        ConfigError: one history is larger than that.
    """

    def __init__(
        self,
        policy: Any,
        steps_per_plan: int | None = None,
        max_history_bytes: int = 2**30,
        prompt_resets: bool = False,
    ) -> None:
        self.policy = policy
        self.steps_per_plan = policy.spec.num_executed if steps_per_plan is None else steps_per_plan
        if self.steps_per_plan < 1:
            raise ConfigError(f"steps_per_plan must be at least 1, got {self.steps_per_plan}")
        self._stride = policy.architecture.history_stride
        if self.steps_per_plan % self._stride:
            raise ConfigError(
                f"steps_per_plan {self.steps_per_plan} must be a multiple of {self._stride}: the policy's "
                "history_stride, since it plans in every so many control steps only"
            )
        self._next_episode = 0
        self._prompt_resets = prompt_resets
        self._warned: set[str] = set()
        self.history_bytes = policy.new_history(0).num_bytes
        self._most_histories = max_history_bytes // self.history_bytes
        if self._most_histories < 1:
            raise ConfigError(
                f"one history takes {self.history_bytes / 2**20:.1f} MB, a connection may have "
                f"{max_history_bytes / 2**20:.1f} MB; allow more"
            )

    def warm_up(self) -> None:
        """Plans once from nothing in particular, so that the first request is not the slow one."""
        task = next(iter(self.policy.spec.tasks), None)
        request = Request(observation=self.policy.transforms.stand_in(), prompt=task)
        with self.policy.unwatched():
            result = self.run([(Session(), request)])[0]
        if isinstance(result, Exception):
            raise result
        self._next_episode = 0
        self._warned.clear()

    def run(self, requests: Sequence[tuple[Session, Request]]) -> list[Answer | Exception]:
        """Answers requests of different sessions.

        Returns:
            For each its answer or the error that it gets. What is refused, by an `ScdRobotError`, leaves its session as
            it was, but that the observation is part of it where only the plan failed. Where the policy fails at
            something else the history is forgotten, and the next observation begins one.
        """
        results: list[_Job | Exception] = []
        for session, request in requests:
            try:
                results.append(self._prepare(session, request))
            except ScdRobotError as error:
                results.append(error)
        jobs = [job for job in results if isinstance(job, _Job)]
        for group in self._groups([job for job in jobs if job.request.observation is not None]):
            self._answer(group)
        for job in jobs:
            if job.request.observation is None:
                _keep(job)
            if not isinstance(job.result, Exception):
                self._finish(job)
        return [job if isinstance(job, Exception) else job.result for job in results]  # type: ignore[misc]

    def forget(self, session: Session) -> bool:
        """Drops the history of a client that has been silent; tells whether there was any."""
        had = session.history is not None
        session.history, session.evicted = None, session.evicted or had
        session.snapshots.clear()
        return had

    def _prepare(self, session: Session, request: Request) -> _Job:
        """Checks all that can be wrong, then does what comes before the observation."""
        if request.observation is not None:
            problem = problem_of(request.observation, self.policy.spec.observation, self.policy.spec.optional)
            if problem is not None:
                raise ShapeError(f"observation {problem}")
        task = self._task(session, request)
        reset = request.reset or (request.session is not None and session.name not in (None, request.session))
        reset = reset or (self._prompt_resets and request.prompt is not None and request.prompt != session.prompt)
        history, step, planned = session.history, session.step, session.planned
        if request.restore is not None:
            if request.restore not in session.snapshots:
                raise UnknownNameError("snapshot", request.restore, session.snapshots)
            history, step, planned = session.snapshots[request.restore]
            history = None if history is None else history.select([0])
        if reset:
            history, planned = None, False
        self._notice(session, request, goes_on=history is not None)
        kept = len(set(session.snapshots) | {request.snapshot}) if request.snapshot is not None else 0
        if kept >= self._most_histories:
            raise ConfigError(
                f"a connection may keep {self._most_histories - 1} snapshots of {self.history_bytes / 2**20:.1f} MB; "
                "start the server with a larger --max-history-mb"
            )
        gap = 1
        if history is not None and request.observation is not None:
            gap = self._gap(request, step, planned and not session.ticks and not request.observe_only)
        if request.running is not None:
            self.policy.check_guidance(request.running.max_gain)
        position = 0 if history is None else int(history.position[0]) - 1 + gap
        if request.kind == "plan" and position % self._stride:
            raise ConfigError(
                f"this policy plans every {self._stride} control steps, and this is number {position} of its history; "
                "send scd/observe_only here"
            )
        new = history is None
        if history is None and request.observation is not None:
            history = self._begin(request)
            step = (request.step or 0) - 1
        elif gap > 1:
            executed = None if request.executed is None else request.executed[None, :-1]
            history.skip(gap - 1, executed)
        if request.observation is not None:
            step = step + gap if request.step is None else request.step
        return _Job(session, request, history, step, planned, new, gap, task)

    def _task(self, session: Session, request: Request) -> NDArray[np.float32] | None:
        """The vector of a request's task; None = it needs none. No prompt is remembered."""
        if not self.policy.spec.tasks or request.observation is None:
            return None
        if request.prompt is None and session.prompt is not None:
            raise ConfigError(
                f"this observation has no prompt, those before it had {session.prompt!r}; a connection that has sent "
                "one sends one with every observation (by PolicyClient: prompt=...)"
            )
        vector: NDArray[np.float32] = self.policy.task_vector(request.prompt)
        return vector

    def _begin(self, request: Request) -> Any:
        episode = self._next_episode if request.episode is None else request.episode
        self._next_episode += request.episode is None
        return self.policy.new_history(episode)

    def _gap(self, request: Request, last_step: int, follows: bool) -> int:
        """Control steps from the last observation to this one; `follows`: it may have followed a plan."""
        told = None if request.executed is None else len(request.executed)
        if request.step is None:
            gap = told if told is not None else self.steps_per_plan if follows else 1
        else:
            gap = request.step - last_step
            if not 1 <= gap <= _LONGEST_GAP:
                raise ConfigError(
                    f"scd/step must be that of a later control step than {last_step} (at most {_LONGEST_GAP} later), "
                    f"got {request.step}; send scd/reset where an episode begins"
                )
            if told not in (None, gap):
                raise ConfigError(f"scd/executed must hold the {gap} actions since step {last_step}, got {told}")
        return gap

    def _notice(self, session: Session, request: Request, goes_on: bool) -> None:
        """Says once what a plain client cannot know; `goes_on`: a history does."""
        plain = goes_on and session.planned and not session.ticks
        if request.kind == "plan" and plain and request.step is None and request.executed is None:
            self._warn_once(
                "a client sends one observation per plan: positions in the history are control steps, and without "
                f"scd/step each plan counts for {self.steps_per_plan} (--steps-per-plan)"
            )
        if request.prefix is not None and self.policy.spec.max_delay_steps == 0:
            self._warn_once(
                "a client sends committed actions, and this policy was not trained for delays (model.max_delay_steps "
                "is 0): its plans begin with them, but may go on with a jump"
            )
        if goes_on and request.prompt is not None and session.prompt not in (None, request.prompt):
            self._warn_once("a client sends a new prompt; its history goes on (--prompt-resets begins a new one)")

    def _warn_once(self, sentence: str) -> None:
        if sentence not in self._warned:
            self._warned.add(sentence)
            logger.warning("%s", sentence)

    def _groups(self, jobs: Sequence[_Job]) -> list[list[_Job]]:
        """What can be computed together: the same keys are there, and executed actions are told by all or by nobody."""
        groups: dict[tuple[Any, ...], list[_Job]] = {}
        for job in sorted(jobs, key=lambda job: job.new):  # where a history begins nothing was executed, so it fits any
            assert job.request.observation is not None
            keys = frozenset(key for key, value in job.request.observation.items() if value is not None)
            told = job.request.executed is not None
            place = (keys, told)
            if job.new:
                place = (keys, (keys, True) in groups)
            groups.setdefault(place, []).append(job)
        return list(groups.values())

    def _answer(self, group: list[_Job]) -> None:
        """Computes a group; where that is refused, each alone, so that nobody gets an error of another."""
        try:
            self._compute(group)
        except Exception as error:
            if isinstance(error, ScdRobotError) and len(group) > 1:  # histories were joined as copies
                for job in group:
                    self._answer([job])
                return
            for job in group:
                job.result = error
                if not isinstance(error, ShapeError) or job.gap > 1:  # not just looked at: it may have changed
                    job.session.history = None

    def _compute(self, group: list[_Job]) -> None:
        """One step of the encoder, then the plans that are wanted."""
        started = time.perf_counter()
        self.policy.resume([job.history for job in group])
        seen: list[Mapping[str, Any]] = [job.request.observation or {} for job in group]
        observation: dict[str, Any] = {
            key: None if value is None else np.stack([one[key] for one in seen]) for key, value in seen[0].items()
        }
        if self.policy.spec.tasks:
            observation[TASK] = np.stack([job.task for job in group if job.task is not None])
        told = any(job.request.executed is not None and not job.new for job in group)
        executed = np.zeros((len(group), self.policy.spec.action_dim), np.float32)
        for row, job in enumerate(group):
            if job.request.executed is not None:
                executed[row] = job.request.executed[-1]
        self.policy.observe(observation, executed if told else None)
        encoder_ms = 1e3 * (time.perf_counter() - started)
        alike: dict[tuple[Any, ...], list[int]] = {}
        for row, job in enumerate(group):
            if job.request.kind == "plan":
                alike.setdefault(_kind_of_plan(job.request), []).append(row)
        for rows in alike.values():
            self._plan(group, rows)
        for job, history in zip(group, self.policy.release(), strict=True):
            job.history = history
            job.planned = job.request.kind == "plan" and not isinstance(job.result, Exception)
            _keep(job)
        infer_ms = 1e3 * (time.perf_counter() - started)
        for job in group:
            if not isinstance(job.result, Exception):
                actions = {} if job.result is None else job.result.message
                times = {"infer_ms": infer_ms, "encoder_ms": encoder_ms}
                job.result = Answer({**actions, "policy_timing": times}, rows=len(group))

    def _plan(self, group: list[_Job], rows: list[int]) -> None:
        """Plans for some rows, of one kind."""
        requests = [group[row].request for row in rows]
        prefix, running = None, requests[0].running
        if requests[0].prefix is not None:
            prefix = np.stack([one.prefix for one in requests if one.prefix is not None])
        if running is not None:
            actions = [one.running.actions for one in requests if one.running is not None]
            running = replace(running, actions=np.concatenate(actions))
        try:
            chunks = self.policy.plan(prefix=prefix, rows=rows, running=running)
        except ScdRobotError as error:
            if len(rows) == 1:
                group[rows[0]].result = error
            else:  # of which row that is, each finds out alone
                for row in rows:
                    self._plan(group, [row])
            return
        for row, chunk in zip(rows, chunks, strict=True):
            group[row].result = Answer({"actions": chunk.copy()})

    def _finish(self, job: _Job) -> None:
        """Keeps a snapshot, and adds what a client may want to know: numbers and truths only, no arrays."""
        session, request = job.session, job.request
        if request.snapshot is not None:
            copy = None if session.history is None else session.history.select([0])
            session.snapshots[request.snapshot] = (copy, session.step, session.planned)
        answer = job.result if isinstance(job.result, Answer) else Answer({})
        message = dict(answer.message)
        if request.observation is not None:
            message |= {"scd/step": session.step, "scd/new_history": job.new, "scd/rows": answer.rows}
        if session.evicted and job.new:
            message["scd/evicted"] = True
        session.evicted = session.evicted and not job.new
        job.result = Answer(message, answer.rows)


def _keep(job: _Job) -> None:
    """Makes what a request has done part of its session."""
    session, request = job.session, job.request
    session.history, session.step, session.planned = job.history, job.step, job.planned
    session.ticks = session.ticks or request.observe_only
    session.name, session.prompt = request.session or session.name, request.prompt or session.prompt


def _kind_of_plan(request: Request) -> tuple[Any, ...]:
    """Plans of one kind are sampled together."""
    running, committed = request.running, 0 if request.prefix is None else len(request.prefix)
    if running is None:
        return (committed,)
    return committed, running.actions.shape[1], running.delay_steps, running.max_gain, running.exact
