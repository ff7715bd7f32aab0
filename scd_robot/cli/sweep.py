"""The verb `scd sweep`."""

import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from scd_robot.cli.policy_source import (
    is_named,
    named_policies,
    place_of_goal,
    read_trained,
    refuse_checkpoint_options,
)

__all__ = ["sweep"]


def sweep(
    policies: Annotated[tuple[Path, ...], tyro.conf.Positional],
    /,
    *,
    env: tuple[str, ...],
    out: Path,
    episodes: int = 50,
    first_episode: int = 0,
    seeds: tuple[int, ...] = (),
    num_envs: int | None = None,
    num_videos: int = 0,
    task: str | None = None,
    goal: str | None = None,
    device: str = "cpu",
    reproducible: bool = False,
    trust: bool = False,
    policy_options: tuple[str, ...] = (),
    policy_python: str | None = None,
    env_python: str | None = None,
    ray: str | None = None,
    json: Path | None = None,
) -> int:
    """Evaluates every policy in every environment, from the same start states, on one machine or a cluster.

    OUT gets an evaluation for each in OUT/ENVIRONMENT/POLICY, with a further folder for each of --seeds, and
    sweep.json. Started again, it does what is missing, has no report, or had no valid episode. Where one fails the
    others go on, and the exit code is 2.
    'scd compare' takes these folders, also as patterns: 'OUT/ENVIRONMENT/a_seed*' is an arm of several trainings.

    Args:
        policies: folders of checkpoints, or of training runs (their newest checkpoints), or folders that 'scd export'
            wrote, or package.module:callable, see 'scd eval --help'.
        env: environments.
        out: folder for the evaluations.
        episodes: how many in each.
        first_episode: index of the first.
        seeds: of the policies' noise, each evaluated; by default each policy's own.
        num_envs: environments side by side.
        num_videos: successes and failures to replay into videos, so many of each; 0 = none.
        task: in words, for policies of several tasks; by default the one that is called as each environment.
        goal: DATASET:EPISODE whose last observation is the goal of policies that are shown goals.
        device: torch device of the policies.
        reproducible: see 'scd eval --help'.
        trust: likewise.
        policy_options: KEY=VALUE for all policies that are named package.module:callable.
        policy_python: python of another environment for them.
        env_python: python of another environment, with scd_robot and the simulators, as in 'scd eval'.
        ray: address of a running Ray cluster ("auto", "ray://host:10001"), see 'scd eval --help'.
        json: write the table to this file too ("-": standard output).
    """
    from scd_robot.errors import ConfigError
    from scd_robot.output import check_target, write_json
    from scd_robot.sim_eval.jobs import EvaluationJob, run_jobs

    if json is not None:
        check_target(json)
    if not policies or not env:
        raise ConfigError("a sweep needs at least one policy and one --env")
    named = named_policies(policies, policy_options, policy_python, env_python)
    for source in filter(is_named, policies):
        refuse_checkpoint_options(source, {"reproducible": reproducible, "task": task, "goal": goal})
    loaded = {source: read_trained(source, device, trust, task, goal) for source in policies if not is_named(source)}
    jobs: dict[Path, EvaluationJob] = {}
    documents: dict[Path, dict[str, Any]] = {}
    for name, place in zip(env, _folder_names(env), strict=True):
        for source, label in zip(policies, short_names([str(path) for path in policies]), strict=True):
            for seed in seeds or (None,):
                target = out / place / label / (f"seed_{seed}" if seed is not None else "")
                if source in loaded:
                    how: dict[str, Any] = {"environment": name, "seed": seed, "reproducible": reproducible}
                    make = functools.partial(loaded[source].make, **how)
                    wanted = {**loaded[source].identity_in(name), "reproducible": reproducible}
                else:
                    make = named(source, name, seed)
                    wanted = {"module": dict(zip(("name", "options"), make.args, strict=False))}
                options: dict[str, Any] = {"first_episode": first_episode, "num_envs": num_envs}
                options |= {"num_videos": num_videos, "overwrite": True}
                options["policy_name"] = str(loaded[source].path if source in loaded else source)
                jobs[target] = EvaluationJob(make, name, episodes, target, **options)
                if document := _finished(target, range(first_episode, first_episode + episodes), seed, wanted):
                    documents[target] = document
    failures: dict[Path | None, str] = {}

    def note_failure(job: EvaluationJob, error: Exception) -> None:
        first_line = str(error).partition("\n")[0]
        failures[job.out] = f"{type(error).__name__}: {first_line}"

    missing = [job for target, job in jobs.items() if target not in documents]
    for job, result in run_jobs(
        missing, ray=ray, python=env_python, progress=str(json) != "-", on_failure=note_failure
    ):
        assert job.out is not None
        if result.valid:
            documents[job.out] = result.to_json()
        else:
            failures[job.out] = f"no valid episode, the first ended with: {result.episodes_detail[0].reason}"
    rows = [_row(target, documents[target]) for target in jobs if target in documents]
    lost = [
        {"env": job.environment, "policy": job.policy_name, "folder": str(target), "error": failures[target]}
        for target, job in jobs.items()
        if target in failures
    ]
    table = {"schema": 1, "episodes": episodes, "first_episode": first_episode, "evaluations": rows, "failed": lost}
    write_json(out / "sweep.json", table)
    if str(json) != "-":
        _print_table(rows, lost)
        print(f"evaluations: {out}")
    if json is not None:
        write_json(json, table)
    return 2 if lost else 0


def short_names(paths: Sequence[str]) -> list[str]:
    """A folder name for each: as many of its last parts as tell it from the others.

    Raises:
        ConfigError: one is given twice.
    """
    from scd_robot.errors import ConfigError

    parts = [[part for part in path.split("/") if part not in ("", ".", "..")] for path in paths]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["-".join(part[-count:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise ConfigError(f"each must be named once, got {', '.join(paths)}")


def _folder_names(environments: Sequence[str]) -> list[str]:
    """Whole names, so that a later sweep with other environments beside them finds the same folders."""
    from scd_robot.errors import ConfigError

    names = [re.sub(r"[^A-Za-z0-9.,=+-]+", "_", name) for name in environments]
    if len(set(names)) < len(names):
        raise ConfigError(f"each must be named once, got {', '.join(environments)}")
    return names


def _finished(target: Path, episodes: range, seed: int | None, wanted: dict[str, Any]) -> dict[str, Any] | None:
    """The evaluation in a folder; None where there is none, it was killed, or the simulator failed in every episode.

    Raises:
        OutputError: it is not the one that is asked for.
    """
    from scd_robot.errors import OutputError
    from scd_robot.sim_eval.saved import find_evaluations

    there = find_evaluations(target)
    if not there or there[0][0] != target:
        return None
    document = there[0][1]
    if difference := _difference(document, episodes, seed, wanted):
        raise OutputError(f"{target} holds another evaluation ({difference}); choose another --out")
    complete = (target / "report.html").is_file()  # the last that is written
    return document if complete and document["success_rate"] is not None else None


def _difference(document: dict[str, Any], episodes: range, seed: int | None, wanted: dict[str, Any]) -> str | None:
    """In what an evaluation differs from the one that is asked for, of a `wanted` policy; None = in nothing."""
    policy = document.get("provenance", {}).get("policy", {})
    if policy.get("weights_sha256") != wanted.get("weights_sha256", policy.get("weights_sha256")):
        return f"of other weights, {document['policy']}"
    exported = policy.get("export", {}).get("sha256")
    if exported != wanted.get("export"):
        return f"of {'no' if exported is None else 'another'} export, {document['policy']}"
    module = policy.get("module", {})
    if {key: module.get(key) for key in wanted.get("module", {})} != wanted.get("module", {}):
        return f"of {module.get('name', document['policy'])} with options {module.get('options')}"
    if seed is not None and policy["settings"].get("seed") != seed:
        return f"with seed {policy['settings'].get('seed')}"
    told = {"task": policy.get("task"), "goal": place_of_goal(policy.get("goal"))}  # older evaluations: as it was typed
    for what in told:
        if what in wanted and told[what] != wanted[what]:
            return f"with the {what} {policy[what]!r}" if what in policy else f"without a {what}"
    reproducible = wanted.get("reproducible", False)
    if policy.get("reproducible", False) != reproducible:
        return f"with{'out' if reproducible else ''} --reproducible"
    first, count = document["seeds"]["first_episode"], document["episodes"]
    if range(first, first + count) != episodes:
        return f"of episodes {first} to {first + count - 1}"
    return None


def _row(folder: Path, document: dict[str, Any]) -> dict[str, Any]:
    names = ("env", "policy", "successes", "invalid", "success_rate", "interval", "best_reward")
    row = {name: document[name] for name in names}
    row["best_reward_interval"] = document.get("best_reward_interval")  # older evaluations have none
    seed = document["provenance"]["policy"].get("settings", {}).get("seed")
    return {**row, "seed": seed, "valid": document["episodes"] - document["invalid"], "folder": str(folder)}


def _best_reward(row: dict[str, Any]) -> str:
    """For people."""
    if row["best_reward"] is None:
        return "-"
    interval = row["best_reward_interval"]
    return f"{row['best_reward']:.3f}" + ("" if interval is None else f" [{interval[0]:.3f}, {interval[1]:.3f}]")


def _print_table(rows: Sequence[dict[str, Any]], lost: Sequence[dict[str, Any]]) -> None:
    head = "environment | policy | seed of noise | successes | success, Wilson 95 % | best reward, 95 %"
    print(f"| {head} |\n|" + "---|" * (head.count("|") + 1))
    for row in rows:
        low, high = (100 * bound for bound in row["interval"])
        rate = f"{100 * row['success_rate']:.1f} % [{low:.1f}, {high:.1f}]"
        noise = "-" if row["seed"] is None else row["seed"]
        counted = f"{row['successes']}/{row['valid']}"
        print(f"| {row['env']} | {row['policy']} | {noise} | {counted} | {rate} | {_best_reward(row)} |")
    for one in lost:
        print(f"FAILED {one['policy']} in {one['env']}: {one['error']}")
