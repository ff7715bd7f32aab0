"""The verb `scd compare`."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from scd_robot.cli.policy_source import is_named, named_policies, refuse_checkpoint_options

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
    seed: int | None = None,
    task: str | None = None,
    goal: str | None = None,
    device: str = "cpu",
    reproducible: bool = False,
    trust: bool = False,
    policy_options: tuple[str, ...] = (),
    policy_python: str | None = None,
    env_python: str | None = None,
    num_videos: int = 6,
    out: Path | None = None,
    overwrite: bool = False,
    json: Path | None = None,
) -> None:
    """Tells which of two policies is better, from the same start states.

    FIRST (A) and SECOND (B) are each an evaluation of 'scd eval' (its folder or result.json), several, one per training
    seed (a folder of them, or a quoted pattern like 'sweep/push/a_seed*'), or, with --env, a checkpoint (or run, or
    export), which is evaluated now, or several of them (a quoted pattern like 'runs/a_seed*'), or a policy of your own,
    package.module:callable. One evaluation each gives the exact McNemar test and a paired interval; several trainings
    in both arms an interval over seeds and start states, the wider of a bootstrap and Welch's t. Evaluations of the
    same weights count as one training; where an arm has only one, the verdict is about these checkpoints. A is
    non-inferior to B where the lower end of the 95 % interval of A - B is above -5 points.

    Args:
        first: arm A.
        second: arm B.
        env: environment in which checkpoints are evaluated, and evaluations replayed if they know it by another name.
        episodes: how many for checkpoints, with --sequential at most; where the other arm is evaluated already, only
            its episodes among them are run.
        first_episode: index of the first.
        sequential: evaluate checkpoints in blocks of so many episodes, and stop once the difference is decided; the
            error rate stays 5 % however often one looks. 0 = all episodes at once.
        num_envs: environments side by side for checkpoints.
        seed: of the noise of checkpoints; replaces their own.
        task: in words, for checkpoints of several tasks; by default the one that is called as the environment.
        goal: DATASET:EPISODE whose last observation is the goal of checkpoints that are shown goals.
        device: torch device for checkpoints.
        reproducible: see 'scd eval --help'.
        trust: likewise.
        policy_options: KEY=VALUE for arms that are named package.module:callable, the same for both.
        policy_python: python of another environment for them, as in 'scd eval'.
        env_python: python of another environment, with scd_robot and the simulator, as in 'scd eval'.
        num_videos: start states that only one arm solved to show side by side in the report, from the actions that the
            evaluations kept; 0 = none.
        out: folder for comparison.html, comparison.json, videos/ and, for checkpoints, the evaluations.
        overwrite: replace an earlier comparison in OUT.
        json: write the comparison to this file too ("-": standard output).
    """
    from scd_robot.cli.compare_arms import Settings, evaluate_arms, find_arm
    from scd_robot.errors import ConfigError
    from scd_robot.output import check_target, write_json
    from scd_robot.sim_eval.comparison import compare as run
    from scd_robot.sim_eval.comparison import format_comparison
    from scd_robot.sim_eval.output import check_output_folder

    if json is not None:
        check_target(json)
    if episodes < 1 or sequential < 0:
        raise ConfigError(f"episodes must be at least 1 and sequential 0 or more, got {episodes} and {sequential}")
    if out is not None:
        check_output_folder(out, overwrite)
    named = named_policies([first, second], policy_options, policy_python, env_python)
    for path in filter(is_named, (first, second)):
        refuse_checkpoint_options(path, {"reproducible": reproducible, "task": task, "goal": goal})
    arms = [find_arm(path, env) for path in (first, second)]
    if env is not None and any(arm.checkpoints for arm in arms):
        wanted = range(first_episode, first_episode + episodes)
        how = (device, seed, task, goal, reproducible, trust)
        settings = Settings(env, wanted, sequential, num_envs, env_python, *how)
        evaluate_arms(arms, settings, out, named)
    elif sequential:
        raise ConfigError("--sequential decides how much is evaluated, and both arms are evaluations already")
    elif task is not None or goal is not None:
        raise ConfigError("--task and --goal are for what is evaluated now, and both arms are evaluations already")
    documents = arms[0].documents, arms[1].documents
    comparison = run(*documents, str(first), str(second), sequential=bool(sequential))
    if out is not None:
        _write(comparison, arms, out, num_videos, env, env_python)
    if str(json) != "-":
        print(format_comparison(comparison))
        if out is not None:
            print(f"report: {out / 'comparison.html'}")
    if json is not None:
        write_json(json, comparison.to_json())


def _write(
    comparison: Any, arms: Sequence[Any], out: Path, num_videos: int, env: str | None, python: str | None
) -> None:
    """JSON, videos and report of a comparison, in the place of an earlier one's."""
    from scd_robot.output import write_json
    from scd_robot.sim_eval.comparison_report import write_comparison
    from scd_robot.sim_eval.output import read_actions, remove_comparison
    from scd_robot.sim_eval.side_by_side import film_pairs

    remove_comparison(out)
    write_json(out / "comparison.json", comparison.to_json())  # before anything that could fail
    videos, problem = film_pairs(
        comparison,
        [arm.documents[0] for arm in arms],
        [arm.actions or read_actions(arm.evaluations[0][0]) for arm in arms],
        out,
        num_videos,
        environment=env,
        python=python,
    )
    if problem:
        logger.warning("%s", problem)
    write_comparison(comparison, out / "comparison.html", *videos)
