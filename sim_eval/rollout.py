"""Closed-loop evaluation: START HERE for how success rates come about.

B environments, divided among worker processes, step in lock-step with one batched policy. Episode e starts from
`environment.reset(derive_seed(seed_domain, e))`, so neither B nor the order of events changes an episode. Success ends
an episode. A simulator that crashes or hangs is replaced and its episode repeated once; then the episode is invalid,
which counts neither as success nor as failure. Episodes of other environments in the same process begin again, as if
nothing had happened. An exception of the policy ends the evaluation.

Shapes: B rows (environments), Da action width.
"""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scd_robot import seeding
from scd_robot.errors import ConfigError
from scd_robot.output import write_json
from scd_robot.sim_eval.faults import FaultInjector, ObservationFaults, injector
from scd_robot.sim_eval.messages import Steps
from scd_robot.sim_eval.motion import motion_quality
from scd_robot.sim_eval.output import (
    EpisodeLog,
    check_output_folder,
    episode_origin,
    prepare_output_folder,
    write_actions,
)
from scd_robot.sim_eval.policy_adapter import PolicyAdapter, PolicyError, check_policy_spec
from scd_robot.sim_eval.provenance import collect_provenance, collect_versions, usable_cores
from scd_robot.sim_eval.result import EpisodeRecord, EvaluationResult
from scd_robot.sim_eval.workers import (
    EnvironmentSource,
    EnvironmentWorker,
    WorkerCrashError,
    close_workers,
    start_workers,
)
from scd_robot.types import ActionArray

__all__ = ["evaluate", "write_outputs"]

logger = logging.getLogger(__name__)


def evaluate(
    policy: Any,
    environment: EnvironmentSource,
    episodes: int,
    *,
    first_episode: int = 0,
    seed_domain: int = seeding.EVALUATION,
    num_envs: int | None = None,
    processes: int | None = None,
    max_steps: int | None = None,
    out: Path | None = None,
    overwrite: bool = False,
    num_videos: int = 3,
    video_size: tuple[int, int] = (256, 256),
    timeout_s: float = 60.0,
    policy_name: str | None = None,
    faults: ObservationFaults | None = None,
    python: str | None = None,
    progress: bool = True,
) -> EvaluationResult:
    """Evaluates a policy in closed loop.

    Args:
        policy: any object with `reset()` and `act()`, see `scd_robot.types.Policy` and `PolicyAdapter`. One whose
            `reset` takes no rows is run in one environment at a time.
        environment: registry name, "module:callable", or a picklable callable that makes an `Environment`.
        episodes: how many.
        first_episode: index of the first; ranges that do not overlap have different start states.
        seed_domain: keeps start states of different purposes disjoint, see `scd_robot.seeding`.
        num_envs: B; None = at most 16, depending on the cores. Changes neither start states nor outcomes.
        processes: worker processes among which the environments are divided; None = one per core (with `python`, which
            has one environment per process, one per environment).
        max_steps: ends episodes earlier than the environment would.
        out: folder for `result.json`, `episodes.jsonl`, `report.html` and `videos/`; None writes nothing.
        overwrite: replace an earlier evaluation in `out`; files of others stay.
        num_videos: replays to record of successes, and as many of failures.
        video_size: height and width of the videos, in pixels.
        timeout_s: seconds after which a simulator that does not answer counts as hung.
        policy_name: for the report; None = the name of the policy's class.
        faults: late, lost and frozen observations; None = none.
        python: interpreter of another environment, with scd_robot and a simulator whose requirements clash with ours;
            `environment` is then a name.
        progress: shows a progress bar.

    Returns:
        The outcome; `to_json()` is what `result.json` holds.

    Raises:
        ConfigError: a number is out of range.
        ShapeError: policy and environment do not fit together.
        PolicyError: the policy asked for a NaN or infinite action.
        OutputError: `out` is not empty or cannot be written.
        ScdRobotError: the environment cannot be made, for a reason the user can mend.
    """
    _check_numbers(episodes, first_episode, num_envs, processes, max_steps, num_videos, video_size)
    if out is not None:
        from scd_robot.sim_eval.plots import require_matplotlib

        require_matplotlib()  # now, rather than after the last episode
        out = Path(out)
        check_output_folder(out, overwrite)
    adapter = PolicyAdapter(policy)
    rows = _choose_num_envs(adapter, num_envs, episodes)
    if processes is None:
        processes = rows if python is not None else min(rows, len(usable_cores()))
    workers = start_workers(environment, rows, processes=min(rows, processes), timeout_s=timeout_s, python=python)
    try:
        spec = workers[0].spec
        check_policy_spec(policy, spec)
        if out is not None:
            prepare_output_folder(out)
        limit = spec.max_steps if max_steps is None else min(max_steps, spec.max_steps)
        indices = range(first_episode, first_episode + episodes)
        faulty = injector(faults, spec.control_dt)
        versions = _versions(workers[0], python)
        name, made = policy_name or type(policy).__name__, getattr(policy, "provenance", {})
        origin = episode_origin(spec.name, name, made, faults)
        log = EpisodeLog(out / "episodes.jsonl" if out else None, versions, origin)
        observer = _Observer(log, episodes, progress)
        rollout = _Rollout(adapter, workers, indices, seed_domain, limit, observer, faulty)
        start = time.perf_counter()
        rollout.run()
        times, plan_rows = adapter.timings()
        result = EvaluationResult(
            environment=spec,
            policy=name,
            episodes_detail=[rollout.records[index] for index in indices],
            timings_ms=times,
            num_envs=rows,
            max_steps=limit,
            first_episode=first_episode,
            seed_domain=seed_domain,
            wall_s=time.perf_counter() - start,
            versions=versions,
            provenance=collect_provenance(policy),
            plan_batch_size=plan_rows,
            faults=faults or ObservationFaults(),
            out=out,
            actions=rollout.actions,
        )
        if out is not None:
            write_outputs(result, out, workers[0], num_videos, video_size)
    finally:
        close_workers(workers)
    return result


def _versions(worker: EnvironmentWorker, python: str | None) -> dict[str, str]:
    versions = collect_versions()
    if python is not None:
        versions |= {f"simulator/{name}": version for name, version in worker.call("versions").items()}
    return versions


def write_outputs(
    result: EvaluationResult,
    out: Path,
    worker: EnvironmentWorker | None,
    num_videos: int,
    video_size: tuple[int, int] = (256, 256),
) -> None:
    """Writes the documents, videos and report of an evaluation into a folder that was prepared for it.

    Args:
        result: its outcome; gets the list of videos.
        out: the folder.
        worker: an environment like the evaluation's, for the videos; None where there is none.
        num_videos: of failures, and as many of successes.
        video_size: height and width.

    Raises:
        OutputError: no permission, or the disk is full.
    """
    from scd_robot.sim_eval.report import write_report
    from scd_robot.sim_eval.video import record_videos

    write_json(out / "result.json", result.to_json())  # before anything that could fail
    write_actions(out, result.actions)
    if num_videos and worker is not None:
        result.videos, result.video_error = record_videos(worker, result, out, num_videos, video_size)
        write_json(out / "result.json", result.to_json())
    write_report(result, out / "report.html")


def _check_numbers(
    episodes: int,
    first_episode: int,
    num_envs: int | None,
    processes: int | None,
    max_steps: int | None,
    num_videos: int,
    video_size: tuple[int, int],
) -> None:
    smallest = {
        "episodes": (episodes, 1),
        "first_episode": (first_episode, 0),
        "num_envs": (num_envs, 1),
        "processes": (processes, 1),
        "max_steps": (max_steps, 1),
        "num_videos": (num_videos, 0),
        "video height": (video_size[0], 16),
        "video width": (video_size[1], 16),
    }
    for name, (value, least) in smallest.items():
        if value is not None and value < least:
            raise ConfigError(f"{name} must be at least {least}, got {value}")


def _choose_num_envs(policy: PolicyAdapter, num_envs: int | None, episodes: int) -> int:
    if not policy.takes_rows:
        if num_envs is not None and num_envs > 1:
            raise ConfigError(
                f"num_envs must be 1 for this policy, got {num_envs}: its reset takes no rows, so it cannot begin an "
                "episode in one environment while others go on"
            )
        return 1
    if num_envs is None:
        num_envs = min(16, max(8, len(usable_cores())))
    return min(num_envs, episodes)


class _Observer:
    """Told of every finished episode: the log on disk and the progress bar."""

    def __init__(self, log: EpisodeLog, episodes: int, progress: bool) -> None:
        from tqdm import tqdm

        self._log = log
        self._bar = tqdm(total=episodes, unit="episode", disable=not progress, dynamic_ncols=True)
        self._counts = {"successes": 0, "failures": 0, "invalid": 0}

    def __call__(self, record: EpisodeRecord) -> None:
        self._log.append(record.to_json())
        self._counts["invalid" if record.invalid else "successes" if record.success else "failures"] += 1
        self._bar.set_postfix(self._counts, refresh=False)
        self._bar.update()

    def close(self) -> None:
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


class _Rollout:
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
        observer: _Observer,
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
        return sorted(started.values(), key=lambda row: row.number)

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
        worker.restart()
        if culprit.repeated:
            self._end_episode(culprit, f"crash: {error}", invalid=True)
        culprit.repeated = True
        return rows

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


def _by_worker(rows: Sequence[_Row]) -> list[list[_Row]]:
    """Rows of each worker."""
    groups: dict[int, list[_Row]] = {}
    for row in rows:
        groups.setdefault(id(row.worker), []).append(row)
    return list(groups.values())
