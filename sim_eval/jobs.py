"""Evaluations as values, so that one machine or a cluster can run them one after the other."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scd_robot.errors import ConfigError, OutputError, ScdRobotError
from scd_robot.sim_eval.faults import ObservationFaults
from scd_robot.sim_eval.output import EpisodeLog, check_output_folder, episode_origin, prepare_output_folder
from scd_robot.sim_eval.result import EvaluationResult
from scd_robot.sim_eval.rollout import evaluate, write_outputs
from scd_robot.sim_eval.workers import EnvironmentSource, close_workers, start_workers

__all__ = ["EvaluationJob", "run_jobs"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvaluationJob:
    """One evaluation: the arguments of `evaluate`.

    Attributes:
        make_policy: makes the policy where the evaluation runs; picklable for a cluster.
        environment: which.
        episodes: how many.
        out: folder for the outputs; None = none.
        overwrite: replace an earlier evaluation there.
        first_episode: index of the first.
        num_envs: environments side by side; None = depending on the cores.
        max_steps: ends episodes earlier than the environment would.
        num_videos: of failures, and as many of successes.
        policy_name: for people.
        faults: late, lost and frozen observations.
    """

    make_policy: Callable[[], Any]
    environment: EnvironmentSource
    episodes: int
    out: Path | None = None
    overwrite: bool = False
    first_episode: int = 0
    num_envs: int | None = None
    max_steps: int | None = None
    num_videos: int = 3
    policy_name: str | None = None
    faults: ObservationFaults | None = None


def run_jobs(
    jobs: Sequence[EvaluationJob],
    *,
    ray: str | None = None,
    python: str | None = None,
    progress: bool = True,
    on_failure: Callable[[EvaluationJob, Exception], None] | None = None,
) -> Iterator[tuple[EvaluationJob, EvaluationResult]]:
    """Evaluates, and writes the outputs of each job as it ends.

    Args:
        jobs: what to evaluate.
        ray: address of a cluster, see `cluster.connect`; None = this machine.
        python: as in `evaluate`, on this machine only.
        progress: shows progress bars.
        on_failure: told of a job that failed, also of what nobody foresaw (a GPU's memory that is used up), after which
            the others go on, unless nothing can be written any more; None = the error is raised.

    Yields:
        Each job with its result: in their order on this machine, on a cluster as they end.

    Raises:
        ConfigError: `python` on a cluster.
        OutputError: a folder is not empty, or cannot be written.
        ScdRobotError: as `evaluate` does, like any other error.
    """
    for job in jobs:
        if job.out is not None:
            check_output_folder(job.out, job.overwrite)
    if ray is not None and python is not None:
        raise ConfigError("a cluster's nodes run the simulators in their own environment; leave the other python out")
    for job, result in _run_here(jobs, python, progress) if ray is None else _run_there(jobs, ray, progress):
        if isinstance(result, EvaluationResult):
            yield job, result
        elif on_failure is None or isinstance(result, OutputError):
            raise result
        else:
            if not isinstance(result, ScdRobotError):
                logger.error("%s in %s failed", job.policy_name, job.environment, exc_info=result)
            on_failure(job, result)


_Outcomes = Iterator[tuple[EvaluationJob, EvaluationResult | Exception]]


def _run_there(jobs: Sequence[EvaluationJob], ray: str, progress: bool) -> _Outcomes:
    from scd_robot.sim_eval.cluster import evaluate_on_cluster

    begun: set[int] = set()

    def keep(number: int, shard: EvaluationResult) -> None:
        out = jobs[number].out
        if out is None:
            return
        if number not in begun:
            prepare_output_folder(out)
            begun.add(number)
        origin = episode_origin(shard.environment.name, shard.policy, shard.provenance["policy"], shard.faults)
        log = EpisodeLog(out / "episodes.jsonl", shard.versions, origin)
        for record in shard.episodes_detail:
            log.append(record.to_json())

    for number, result in evaluate_on_cluster(jobs, ray, progress, keep):
        job = jobs[number]
        if job.out is not None and isinstance(result, EvaluationResult):
            result.out = job.out
            try:
                _write(job, result, job.out)
            except Exception as error:  # which is this job's alone, as on one machine
                result = error
        yield job, result


def _run_here(jobs: Sequence[EvaluationJob], python: str | None, progress: bool) -> _Outcomes:
    for job in jobs:
        try:
            result: EvaluationResult | Exception = _evaluate(job, python, progress)
        except Exception as error:
            result = error
        yield job, result


def _evaluate(job: EvaluationJob, python: str | None, progress: bool) -> EvaluationResult:
    return evaluate(
        job.make_policy(),
        job.environment,
        job.episodes,
        first_episode=job.first_episode,
        num_envs=job.num_envs,
        max_steps=job.max_steps,
        out=job.out,
        overwrite=job.overwrite,
        num_videos=job.num_videos,
        policy_name=job.policy_name,
        faults=job.faults,
        python=python,
        progress=progress,
    )


def _write(job: EvaluationJob, result: EvaluationResult, out: Path) -> None:
    """The outputs of what a cluster evaluated, with videos if the simulator is here as well."""
    workers = []
    try:
        if job.num_videos:
            workers = start_workers(job.environment, 1)
    except ScdRobotError as error:  # which the report says
        result.video_error = f"no simulator to replay episodes in: {error}"
    try:
        write_outputs(result, out, workers[0] if workers else None, job.num_videos)
    finally:
        close_workers(workers)
