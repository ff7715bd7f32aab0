"""Episodes of B environments in lock-step with one batched policy: START HERE for what happens in a control step.

Environments that fail belong to workers that are replaced, and given up where they do not start again.

Shapes: B rows (environments), n some of them, Da action width.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scd_robot import seeding
from scd_robot.errors import SimulatorError
from scd_robot.sim_eval.faults import FaultInjector
from scd_robot.sim_eval.messages import Steps
from scd_robot.sim_eval.motion import motion_quality
from scd_robot.sim_eval.output import EpisodeLog
from scd_robot.sim_eval.policy_adapter import PolicyAdapter, PolicyError
from scd_robot.sim_eval.result import EpisodeRecord
from scd_robot.sim_eval.workers import EnvironmentWorker, WorkerCrashError
from scd_robot.types import ActionArray

__all__ = ["EpisodeObserver", "Rollout"]

logger = logging.getLogger(__name__)


class EpisodeObserver:
    """Told of every finished episode: the log on disk and the progress bar."""

    def __init__(self, log: EpisodeLog, episodes: int, progress: bool) -> None:
        from tqdm import tqdm

        self._log = log
        self._bar = tqdm(total=episodes, desc="evaluating", unit="episode", disable=not progress, dynamic_ncols=True)
        self._counts = {"successes": 0, "failures": 0, "invalid": 0}

    def __call__(self, record: EpisodeRecord) -> None:
        """Notes an episode that ended."""
        self._log.append(record.to_json())
        self._counts["invalid" if record.invalid else "successes" if record.success else "failures"] += 1
        self._bar.set_postfix(self._counts, refresh=False)
        self._bar.update()

    def close(self) -> None:
        """Ends the bar."""
        self._bar.close()


@dataclass(eq=False)
class _Row:
    """One environment of the batch and the episode that runs in it (None = no work left)."""

    number: int
    worker: EnvironmentWorker
    slot: int  # in its worker
    episode: int | None = None
    repeated: bool = False
    seed: int = 0
    initial_state_hash: str | None = None
    rewards: list[float] = field(default_factory=list)
    actions: list[ActionArray] = field(default_factory=list)
    planned: list[bool] = field(default_factory=list)  # whether each action began a chunk
    hand: list[NDArray[Any]] = field(default_factory=list)
    completed: bool | None = None


class Rollout:
    """All episodes, B at a time.

    Attributes:
        records: outcome by episode index.
        actions: (steps, Da) executed in each episode, by its index.
    """

    def __init__(
        self,
        policy: PolicyAdapter,
        workers: Sequence[EnvironmentWorker],
        indices: Sequence[int],
        seed_domain: int,
        max_steps: int,
        observer: EpisodeObserver,
        faults: FaultInjector | None = None,
    ) -> None:
        self.records: dict[int, EpisodeRecord] = {}
        self.actions: dict[int, ActionArray] = {}
        self._policy = policy
        self._spec = workers[0].spec
        self._waiting = iter(indices)
        self._seed_domain = seed_domain
        self._max_steps = max_steps
        self._observer = observer
        self._faults = faults
        most = max(worker.count for worker in workers)
        places = [(worker, slot) for slot in range(most) for worker in workers if slot < worker.count]
        self._rows = [_Row(number, *place) for number, place in enumerate(places)]
        self._observation = {
            key: np.zeros((len(places), *array.shape), array.dtype) for key, array in self._spec.observation.items()
        }  # (B, ...), a new array for each control step: the policy may keep what it was given
        self._executed: ActionArray | None = None

    def run(self) -> None:
        """Plays all episodes."""
        try:
            self._begin_episodes(self._rows)
            self._policy.begin([row.episode or 0 for row in self._rows])  # 0 stands for rows without work
            while any(row.episode is not None for row in self._rows):
                self._control_step()
        finally:
            self._observer.close()

    def _control_step(self) -> None:
        """One action in every row that has an episode; the others repeat their last observation to the policy."""
        actions = self._policy.act(self._seen(), self._executed, self._spec.action_dim)
        planned = self._policy.planned
        active = [row for row in self._rows if row.episode is not None]
        if not np.isfinite(actions).all():
            for row in active:
                _check_finite_action(actions[row.number], row)
        if planned is not None:
            for row in active:
                row.planned.append(bool(planned[row.number]))
        groups = _by_worker(active)
        for rows in groups:
            rows[0].worker.send_steps([row.slot for row in rows], actions[[row.number for row in rows]])
        self._executed = np.zeros_like(actions)
        self._observation = {key: array.copy() for key, array in self._observation.items()}
        ended = [row for rows in groups for row in self._receive_steps(rows)]
        started = self._begin_episodes(ended)
        if started:
            episodes = [row.episode for row in started if row.episode is not None]
            self._policy.reset([row.number for row in started], episodes)

    def _seen(self) -> dict[str, NDArray[Any]]:
        """What the policy sees of the environments in this control step: arrays (B, ...)."""
        if self._faults is None:
            return self._observation
        seen = {key: array.copy() for key, array in self._observation.items()}
        for row in self._rows:
            if row.episode is not None:
                for key, value in self._faults.deliver(row.number, self._observation_of(row)).items():
                    seen[key][row.number] = value
        return seen

    def _observation_of(self, row: _Row) -> dict[str, NDArray[Any]]:
        return {key: array[row.number] for key, array in self._observation.items()}

    def _take_in(self, rows: Sequence[_Row], observation: Mapping[str, NDArray[Any]]) -> None:
        """Puts the observations (n, ...) of some rows in their places.

        Raises:
            WorkerCrashError: there are NaN or infinite values.
        """
        numbers = [row.number for row in rows]
        for key, values in observation.items():
            if values.dtype.kind == "f" and not (finite := np.isfinite(values)).all():
                error = WorkerCrashError(f"the simulator returned NaN or infinite values in {key!r}")
                error.slot = rows[int(np.argwhere(~finite)[0, 0])].slot
                raise error
            self._observation[key][numbers] = values

    def _receive_steps(self, rows: Sequence[_Row]) -> list[_Row]:
        """Takes in a worker's results; returns the rows that need a (new or repeated) episode."""
        try:
            steps = rows[0].worker.receive_steps()
            self._take_in(rows, steps.observation)
            _check_rewards(rows, steps.reward)
        except WorkerCrashError as error:
            return self._replace(rows[0].worker, error)
        return [row for i, row in enumerate(rows) if self._has_ended(row, steps, i)]

    def _has_ended(self, row: _Row, steps: Steps, i: int) -> bool:
        """Notes the result of a row's step; True when it was the last of the episode."""
        assert self._executed is not None
        executed, info = steps.executed_action[i].copy(), steps.info[i]
        row.actions.append(executed)
        row.rewards.append(float(steps.reward[i]))
        row.hand += [info["hand"]] if "hand" in info else []
        if "completed" in info:
            row.completed = bool(row.completed or info["completed"])
        if steps.success[i]:
            self._end_episode(row, "success")
        elif steps.terminated[i]:
            self._end_episode(row, "terminated")
        elif steps.truncated[i] or len(row.actions) >= self._max_steps:
            self._end_episode(row, "time limit")
        else:
            self._executed[row.number] = executed
            return False
        return True

    def _begin_episodes(self, rows: Sequence[_Row]) -> list[_Row]:
        """Resets environments that need an episode until each runs one or no work is left; returns those that run."""
        started: dict[int, _Row] = {}
        pending = list(rows)
        while pending:
            for row in pending:
                if row.episode is None:
                    row.episode = next(self._waiting, None)
                    row.repeated = False
            pending = [row for row in pending if row.episode is not None]
            for row in pending:
                assert row.episode is not None
                row.seed = seeding.derive_seed(self._seed_domain, row.episode)
                row.initial_state_hash, row.rewards, row.actions = None, [], []
                row.planned, row.completed = [], None
                if self._executed is not None:
                    self._executed[row.number] = 0
                row.worker.send("begin", row.seed, slot=row.slot)
            started |= {row.number: row for row in pending}
            pending = [row for rows in _by_worker(pending) for row in self._receive_beginnings(rows)]
            for row in pending:
                started.pop(row.number, None)
        running = [row for row in started.values() if row.episode is not None]  # not those of a worker that is lost
        return sorted(running, key=lambda row: row.number)

    def _receive_beginnings(self, rows: Sequence[_Row]) -> list[_Row]:
        """Takes in the first observations of a worker's new episodes; returns the rows that have to begin again."""
        try:
            for row in rows:
                observation, row.initial_state_hash, hand = row.worker.receive()
                row.hand = [] if hand is None else [hand]
                self._take_in([row], {key: np.asarray(observation[key])[None] for key in self._spec.observation})
        except WorkerCrashError as error:
            return self._replace(rows[0].worker, error)
        for row in rows:
            if self._faults is not None and row.episode is not None:
                self._faults.begin(row.number, row.episode, self._observation_of(row))
        return []

    def _replace(self, worker: EnvironmentWorker, error: WorkerCrashError) -> list[_Row]:
        """Starts a worker anew after a crash; returns its rows, which all need a new or repeated episode.

        The episode that crashed is repeated the first time and invalid the second time. The others were bystanders.
        """
        rows = [row for row in self._rows if row.worker is worker and row.episode is not None]
        culprit = next((row for row in rows if row.slot == error.slot), rows[0])
        logger.warning("episode %s, control step %d: %s", culprit.episode, len(culprit.actions), error)
        try:
            worker.restart()
        except SimulatorError as failure:
            self._give_up(rows, f"crash: {error}; {failure}")
            return []
        if culprit.repeated:
            self._end_episode(culprit, f"crash: {error}", invalid=True)
        culprit.repeated = True
        return rows

    def _give_up(self, rows: Sequence[_Row], reason: str) -> None:
        """Ends the episodes of a worker that is lost, and, if it was the last one, those that were still to begin."""
        logger.error("a simulator is lost, with %d episodes that ran in it: %s", len(rows), reason)
        for row in rows:
            self._end_episode(row, reason, invalid=True)
        if not all(row.worker.closed for row in self._rows):
            return
        rest = list(self._waiting)
        logger.error("no simulator is left: the last %d episodes were not run, and count as invalid", len(rest))
        for episode in rest:
            seed = seeding.derive_seed(self._seed_domain, episode)
            self._end_episode(_Row(-1, rows[0].worker, 0, episode, seed=seed), reason, invalid=True)

    def _end_episode(self, row: _Row, reason: str, *, invalid: bool = False) -> None:
        assert row.episode is not None
        record = EpisodeRecord(
            index=row.episode,
            seed=row.seed,
            initial_state_hash=row.initial_state_hash,
            success=reason == "success",
            steps=len(row.actions),
            invalid=invalid,
            total_reward=sum(row.rewards),
            best_reward=max(row.rewards, default=None),
            reason=reason,
            completed=row.completed,
            motion=motion_quality(row.actions, row.planned, row.hand, self._spec.control_dt),
        )
        self.records[row.episode] = record
        self.actions[row.episode] = np.reshape(row.actions, (len(row.actions), self._spec.action_dim))
        row.episode = None
        self._observer(record)


def _check_finite_action(action: ActionArray, row: _Row) -> None:
    if not np.isfinite(action).all():
        raise PolicyError(
            f"the policy's actions must be finite, got {action.tolist()} in row {row.number} (episode {row.episode}) "
            f"at control step {len(row.actions)}; look at the policy's input normalisation and weights"
        )


def _check_rewards(rows: Sequence[_Row], rewards: NDArray[np.float64]) -> None:
    if not (finite := np.isfinite(rewards)).all():
        error = WorkerCrashError("the simulator returned a reward that is NaN or infinite")
        error.slot = rows[int(np.argmin(finite))].slot
        raise error


def _by_worker(rows: Sequence[_Row]) -> list[list[_Row]]:
    """Rows of each worker."""
    groups: dict[int, list[_Row]] = {}
    for row in rows:
        groups.setdefault(id(row.worker), []).append(row)
    return list(groups.values())
