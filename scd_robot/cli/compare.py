"""The verb `scd compare`."""

import logging
from glob import has_magic
from pathlib import Path
from typing import Annotated, Any

import tyro

__all__ = ["compare"]

logger = logging.getLogger(__name__)


def compare(
    first: Annotated[Path, tyro.conf.Positional],
    second: Annotated[Path, tyro.conf.Positional],
    /,
    *,
    env: str | None = None,
    episodes: int = 100,
    first_episode: int = 0,
    sequential: int = 0,
    num_envs: int | None = None,
    env_python: str | None = None,
    num_videos: int = 6,
    out: Path | None = None,
    overwrite: bool = False,
    json: Path | None = None,
) -> None:
    """Tells which of two policies is better, from the same start states.

    FIRST (A) and SECOND (B) are each an evaluation of 'scd eval' (its folder or result.json), several, one per training
    seed (a folder of them, or a quoted pattern like 'sweep/push/a_seed*'), or, with --env, a checkpoint (or run), which
    is evaluated now. One evaluation each gives the exact McNemar test and a paired interval; several give a bootstrap
    over seeds and start states. A is non-inferior to B where the lower end of the 95 % interval of A - B is above -5
    points.

    Args:
        first: arm A.
        second: arm B.
        env: environment in which checkpoints are evaluated, and evaluations replayed if they know it by another name.
        episodes: how many for checkpoints; with --sequential at most.
        first_episode: index of the first.
        sequential: evaluate checkpoints in blocks of so many episodes, and stop once the difference is decided; the
            error rate stays 5 % however often one looks. 0 = all episodes at once.
        num_envs: environments side by side for checkpoints.
        env_python: python of another environment, with scd_robot and the simulator, as in 'scd eval'.
        num_videos: start states that only one arm solved to show side by side in the report, from the actions that the
            evaluations kept; 0 = none.
        out: folder for comparison.html, comparison.json, videos/ and, for checkpoints, the evaluations.
        overwrite: replace an earlier comparison in OUT.
        json: write the comparison to this file too ("-": standard output).
    """
    from scd_robot.errors import ConfigError
    from scd_robot.output import check_target, write_json
    from scd_robot.sim_eval.comparison import compare as run
    from scd_robot.sim_eval.comparison import format_comparison
    from scd_robot.sim_eval.comparison_report import write_comparison
    from scd_robot.sim_eval.output import check_output_folder, read_actions
    from scd_robot.sim_eval.saved import find_evaluations
    from scd_robot.sim_eval.side_by_side import film_pairs

    if json is not None:
        check_target(json)
    if episodes < 1 or sequential < 0:
        raise ConfigError(f"episodes must be at least 1 and sequential 0 or more, got {episodes} and {sequential}")
    for path in (first, second):
        if not path.exists() and not has_magic(str(path)):
            raise ConfigError(f"there is no {path}; name an evaluation, a folder of them, or a checkpoint")
    if out is not None:
        check_output_folder(out, overwrite)
    arms = [[] if env is not None and _is_checkpoint(path) else find_evaluations(path) for path in (first, second)]
    played: list[dict[int, Any]] = [{}, {}]
    if not all(arms):
        if env is None:
            missing = first if not arms[0] else second
            raise ConfigError(f"{missing} holds no evaluation of 'scd eval'; give --env to evaluate a checkpoint there")
        paths = [None if found else path for path, found in zip((first, second), arms, strict=True)]
        where = {"num_envs": num_envs, "python": env_python}
        _check_found(arms, env, range(first_episode, first_episode + episodes), sequential, env_python)
        results = _evaluate(paths, arms, env, range(first_episode, first_episode + episodes), sequential, where, out)
        for arm, result in enumerate(results):
            if result is not None:
                arms[arm], played[arm] = [((out or Path()) / "ab"[arm], result.to_json())], result.actions
    elif sequential:
        raise ConfigError("--sequential decides how much is evaluated, and both arms are evaluations already")
    documents = [[document for _, document in arm] for arm in arms]
    comparison = run(documents[0], documents[1], str(first), str(second), sequential=bool(sequential))
    if out is not None:
        write_json(out / "comparison.json", comparison.to_json())  # before anything that could fail
        videos, problem = film_pairs(
            comparison,
            [arm[0] for arm in documents],
            [made or read_actions(arm[0][0]) for made, arm in zip(played, arms, strict=True)],
            out,
            num_videos,
            environment=env,
            python=env_python,
        )
        if problem:
            logger.warning("%s", problem)
        write_comparison(comparison, out / "comparison.html", *videos)
    if str(json) != "-":
        print(format_comparison(comparison))
        if out is not None:
            print(f"report: {out / 'comparison.html'}")
    if json is not None:
        write_json(json, comparison.to_json())


def _is_checkpoint(path: Path) -> bool:
    """Whether a checkpoint, or the run of a training, lies there."""
    from scd_robot.checkpoint import list_checkpoints

    return (path / "model.safetensors").is_file() or bool(list_checkpoints(path))


def _check_found(
    arms: list[list[tuple[Path, dict[str, Any]]]], env: str, episodes: range, sequential: int, python: str | None
) -> None:
    """Raises ConfigError where an arm that is evaluated already cannot be compared with what would be evaluated now."""
    from scd_robot.errors import ConfigError
    from scd_robot.sim_eval.workers import close_workers, start_workers

    found = [evaluation for arm in arms for evaluation in arm]
    if not found:
        return
    if sequential and len(found) > 1:
        raise ConfigError(f"--sequential is for one evaluation of each arm, and {len(found)} were found")
    workers = start_workers(env, 1, python=python)
    close_workers(workers)
    for folder, document in found:
        if document["env"] != workers[0].spec.name:
            raise ConfigError(f"{folder} is an evaluation in {document['env']}, and --env is {workers[0].spec.name}")
        if not set(episodes) & {episode["index"] for episode in document["episodes_detail"]}:
            raise ConfigError(f"{folder} has none of the episodes {episodes.start} to {episodes.stop - 1}")


def _evaluate(
    checkpoints: list[Path | None],
    found: list[list[tuple[Path, dict[str, Any]]]],
    env: str,
    episodes: range,
    sequential: int,
    where: dict[str, Any],
    out: Path | None,
) -> list[Any]:
    """An `EvaluationResult` for each checkpoint, made block by block until the difference is decided; None for others.

    With `out` they are in its folders a and b, also where it was decided early.
    """
    import time

    import torch

    from scd_robot.policies import load_policy
    from scd_robot.sim_eval import evaluate as run
    from scd_robot.sim_eval.comparison import DECIDED, compare_pair, evidence
    from scd_robot.sim_eval.output import EpisodeLog
    from scd_robot.sim_eval.result import join_results
    from scd_robot.sim_eval.rollout import write_outputs

    torch.set_num_threads(1)  # small batches; the simulators have the other cores
    policies = [None if path is None else load_policy(path) for path in checkpoints]
    results: list[Any] = [None, None]
    block, started = sequential or len(episodes), time.perf_counter()
    for start in range(episodes.start, episodes.stop, block):
        count = min(block, episodes.stop - start)
        for arm, policy in enumerate(policies):
            if policy is None:
                continue
            folder = out / "ab"[arm] if out is not None else None
            options: dict[str, Any] = {
                "policy_name": str(checkpoints[arm]),
                "num_videos": 0,
                "overwrite": True,
                **where,
            }
            first = results[arm] is None
            new = run(policy, env, count, first_episode=start, out=folder if first else None, **options)
            results[arm] = new if first else join_results([results[arm], new], time.perf_counter() - started)
            if folder is not None and not first:
                log = EpisodeLog(folder / "episodes.jsonl", new.versions)
                for record in new.episodes_detail:
                    log.append(record.to_json())
                write_outputs(results[arm], folder, None, 0)
        if sequential:
            documents = [found[arm][0][1] if results[arm] is None else results[arm].to_json() for arm in (0, 1)]
            counts = compare_pair(documents[0], documents[1])
            if evidence(counts.only_a, counts.only_b) >= DECIDED:
                break
    return results
