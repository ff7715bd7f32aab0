"""Closed-loop evaluation: START HERE for how success rates come about.

B environments, divided among worker processes, step in lock-step with one batched policy. Episode e starts from
`environment.reset(derive_seed(seed_domain, e))`, so neither B nor the order of events changes an episode. Success ends
an episode. A simulator that crashes or hangs is replaced and its episode repeated once; then the episode is invalid,
which counts neither as success nor as failure. Episodes of other environments in the same process begin again, as if
nothing had happened. Where a process cannot be replaced, the episodes that ran in it are invalid and the others go on;
when no process is left, so is all that was not run. An exception of the policy ends the evaluation.

Shapes: B rows (environments), Da action width.
"""

import logging
import time
from pathlib import Path
from typing import Any

from scd_robot import seeding
from scd_robot.errors import ConfigError
from scd_robot.output import write_json
from scd_robot.sim_eval.faults import ObservationFaults, injector
from scd_robot.sim_eval.lockstep import EpisodeObserver, Rollout
from scd_robot.sim_eval.output import (
    EpisodeLog,
    check_output_folder,
    episode_origin,
    prepare_output_folder,
    write_actions,
)
from scd_robot.sim_eval.policy_adapter import PolicyAdapter, check_policy_spec
from scd_robot.sim_eval.provenance import collect_provenance, collect_versions, usable_cores
from scd_robot.sim_eval.result import EvaluationResult
from scd_robot.sim_eval.workers import (
    EnvironmentSource,
    EnvironmentWorker,
    close_workers,
    start_workers,
)

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
        max_steps: ends episodes earlier than the environment would; no more than its limit.
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
        limit = spec.max_steps if max_steps is None else max_steps
        if limit > spec.max_steps:
            raise ConfigError(
                f"max_steps can end episodes earlier than {spec.name} does, after {spec.max_steps} control steps, not "
                f"later; got {limit}"
            )
        indices = range(first_episode, first_episode + episodes)
        faulty = injector(faults, spec.control_dt)
        versions = _versions(workers[0], python)
        name, made = policy_name or type(policy).__name__, getattr(policy, "provenance", {})
        origin = episode_origin(spec.name, name, made, faults)
        log = EpisodeLog(out / "episodes.jsonl" if out else None, versions, origin)
        observer = EpisodeObserver(log, episodes, progress)
        rollout = Rollout(adapter, workers, indices, seed_domain, limit, observer, faulty)
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
            alive = next((worker for worker in workers if not worker.closed), None)
            if num_videos and alive is None:
                result.video_error = "no simulator was left to replay episodes in"
            write_outputs(result, out, alive, num_videos, video_size)
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
