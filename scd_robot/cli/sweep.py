"""The verb `scd sweep`."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

__all__ = ["sweep"]


def sweep(
    checkpoints: Annotated[tuple[Path, ...], tyro.conf.Positional],
    /,
    *,
    env: tuple[str, ...],
    out: Path,
    episodes: int = 50,
    first_episode: int = 0,
    seeds: tuple[int, ...] = (),
    num_envs: int | None = None,
    num_videos: int = 0,
    device: str = "cpu",
    ray: str | None = None,
    json: Path | None = None,
) -> None:
    """Evaluates every checkpoint in every environment, from the same start states, on one machine or a cluster.

    OUT gets an evaluation for each in OUT/ENVIRONMENT/CHECKPOINT, with a further folder for each of --seeds, and
    sweep.json. Started again, it does what is missing. 'scd compare' takes two of these folders.

    Args:
        checkpoints: folders of checkpoints, or of training runs (their newest checkpoints).
        env: environments.
        out: folder for the evaluations.
        episodes: how many in each.
        first_episode: index of the first.
        seeds: of the policies' noise, each evaluated; by default each checkpoint's own.
        num_envs: environments side by side.
        num_videos: successes and failures to replay into videos, so many of each; 0 = none.
        device: torch device of the policies.
        ray: address of a running Ray cluster ("auto", "ray://host:10001"), see 'scd eval --help'.
        json: write the table to this file too ("-": standard output).
    """
    from scd_robot.checkpoint import find_checkpoint, read_checkpoint
    from scd_robot.cli.evaluate import make_policy
    from scd_robot.errors import ConfigError
    from scd_robot.output import check_target, write_json
    from scd_robot.sim_eval.jobs import EvaluationJob, run_jobs
    from scd_robot.sim_eval.saved import find_evaluations

    if json is not None:
        check_target(json)
    if not checkpoints or not env:
        raise ConfigError("a sweep needs at least one checkpoint and one --env")
    jobs: list[EvaluationJob] = []
    labels = short_names([str(path) for path in checkpoints])
    for name, place in zip(env, short_names(env), strict=True):
        for path, label in zip(checkpoints, labels, strict=True):
            folder = find_checkpoint(path)
            checkpoint = read_checkpoint(folder)
            for seed in seeds or (None,):
                target = out / place / label / (f"seed_{seed}" if seed is not None else "")
                policy = functools.partial(make_policy, checkpoint, device, seed=seed)
                options: dict[str, Any] = {
                    "first_episode": first_episode,
                    "num_envs": num_envs,
                    "num_videos": num_videos,
                }
                jobs.append(EvaluationJob(policy, name, episodes, target, True, policy_name=str(folder), **options))
    documents: dict[Path | None, dict[str, Any]] = {}
    for job in jobs:
        there = find_evaluations(job.out) if job.out is not None else []
        if there and _is_of(there[0][1], job):
            documents[job.out] = there[0][1]
    missing = [job for job in jobs if job.out not in documents]
    for job, result in run_jobs(missing, ray=ray, progress=str(json) != "-"):
        documents[job.out] = result.to_json()
    rows = [_row(job.out, documents[job.out]) for job in jobs if job.out is not None]
    table = {"schema": 1, "episodes": episodes, "first_episode": first_episode, "evaluations": rows}
    write_json(out / "sweep.json", table)
    if str(json) != "-":
        print("| environment | policy | successes | success, Wilson 95 % |\n|---|---|---|---|")
        for row in rows:
            low, high = (100 * bound for bound in row["interval"])
            rate = "-" if row["success_rate"] is None else f"{100 * row['success_rate']:.1f} % [{low:.1f}, {high:.1f}]"
            print(f"| {row['env']} | {row['policy']} | {row['successes']}/{row['valid']} | {rate} |")
        print(f"evaluations: {out}")
    if json is not None:
        write_json(json, table)


def short_names(paths: Sequence[str]) -> list[str]:
    """A folder name for each: as many of its last parts as tell it from the others.

    Raises:
        ConfigError: one is given twice.
    """
    from scd_robot.errors import ConfigError

    parts = [[part for part in path.replace(":", "/").split("/") if part not in ("", ".", "..")] for path in paths]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["-".join(part[-count:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise ConfigError(f"each must be named once, got {', '.join(paths)}")


def _is_of(document: dict[str, Any], job: Any) -> bool:
    """Whether an evaluation is the one that a job asks for: same checkpoint, same episodes."""
    found = document["policy"], document["episodes"], document["seeds"]["first_episode"]
    return found == (job.policy_name, job.episodes, job.first_episode)


def _row(folder: Path, document: dict[str, Any]) -> dict[str, Any]:
    names = ("env", "policy", "successes", "invalid", "success_rate", "interval", "best_reward")
    row = {name: document[name] for name in names}
    return {**row, "valid": document["episodes"] - document["invalid"], "folder": str(folder)}
