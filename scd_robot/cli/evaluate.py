"""The verb `scd eval`."""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from scd_robot.cli.imagining import ImaginingOptions, choosing
from scd_robot.cli.policy_source import (
    exported_instructions,
    instructions,
    is_exported,
    is_named,
    known_task,
    make_exported,
    named_policies,
    note_instructions,
    refuse_checkpoint_options,
)

__all__ = ["evaluate", "headline", "make_policy"]


def evaluate(
    policy: Annotated[str, tyro.conf.Positional],
    /,
    *,
    env: str,
    episodes: int = 50,
    out: Path | None = None,
    first_episode: int = 0,
    num_envs: int | None = None,
    max_steps: int | None = None,
    num_denoising_steps: int | None = None,
    num_executed: int | None = None,
    guidance_scale: float | None = None,
    num_samples: int | None = None,
    seed: int | None = None,
    task: str | None = None,
    goal: str | None = None,
    device: str = "cpu",
    reproducible: bool = False,
    imagining: Annotated[ImaginingOptions, tyro.conf.arg(name="")] = ImaginingOptions(),  # noqa: B008 - frozen
    trust: bool = False,
    policy_options: tuple[str, ...] = (),
    policy_python: str | None = None,
    latency_ms: tuple[float, ...] = (0.0,),
    jitter_ms: float = 0.0,
    drop: float = 0.0,
    freeze: float = 0.0,
    env_python: str | None = None,
    ray: str | None = None,
    diagnose_history: int = 0,
    dataset: Path | None = None,
    num_videos: int = 3,
    overwrite: bool = False,
    json: Path | None = None,
) -> None:
    """Runs a policy in closed loop and reports its success rate with an interval, its times and its videos.

    Episode i always starts from the same state, whatever the policy. A crash of the simulator makes an episode
    invalid, which is neither success nor failure. OUT gets report.html, result.json, episodes.jsonl and videos/.

    Args:
        policy: a checkpoint's folder, or a training run's (its newest checkpoint), or a folder that 'scd export' wrote,
            or package.module:callable, something of your own that makes an object with reset and act
            (docs/evaluation.md), or the address of a server (ws://127.0.0.1:8000, see 'scd serve'; its API key is what
            SCD_API_KEY in the environment holds).
        env: environment, for example metaworld/push-v3 or metaworld/push-v3:goal_steps=5.
        episodes: how many.
        out: folder for the report; by default nothing is written.
        first_episode: index of the first episode; ranges that do not overlap have different start states.
        num_envs: environments side by side, divided among a process per core; changes neither start states nor noise.
        max_steps: control steps after which an episode fails; by default, and at most, the environment's own limit.
        num_denoising_steps: replaces the checkpoint's.
        num_executed: actions taken from one plan before the next; replaces the checkpoint's.
        guidance_scale: guidance by context corruption; replaces the checkpoint's (1 = off).
        num_samples: plans sampled at a time, of which the one that agrees best with the executed past is kept; replaces
            the checkpoint's (1 = off).
        seed: of the policy's noise; replaces the checkpoint's.
        task: in words, for a policy of several tasks (scd train --tasks); by default the one that is called as the
            environment.
        goal: DATASET:EPISODE whose last observation is the goal, for a policy that is shown goals (scd train --goals).
        device: torch device of the policy.
        reproducible: plan for all environments whenever one is due: with the same --num-envs and kind of CPU an episode
            is then bitwise the same however episodes are divided (--first-episode, --ray); takes more time.
        imagining: choice among several chunks by what a model of frames imagines of each.
        trust: run the native or pickled code of an export of the formats aoti and torch-export; ONNX needs no trust.
        policy_options: KEY=VALUE for a policy of your own, values in JSON or plain text, for example seed=1 run=runs/a;
            they are keyword arguments of the callable.
        policy_python: python of another environment for a policy of your own, with numpy and what that policy needs.
        latency_ms: the policy sees every observation so late; several values give a curve of success against delay,
            over the same start states, and an evaluation in a folder of its own for each.
        jitter_ms: and up to so much later, evenly distributed.
        drop: share of observations that never arrive.
        freeze: share of control steps in which the sensors freeze for 20 control steps.
        env_python: python of another environment, with scd_robot and a simulator whose requirements clash with those of
            the policy (robosuite: docs/install.md).
        ray: address of a running Ray cluster ("auto", "ray://host:10001") on whose nodes the episodes run; start states
            and noise are those of one machine. They need scd_robot and the simulator; connect to clusters you trust.
        diagnose_history: evaluate so many episodes again, at least 2, for each kind of history that is not the policy's
            own (cut short, shuffled, reversed, another episode's), and tell how it uses its history; 0 = not.
        dataset: demonstrations, for the copycat ratio of that diagnosis, which it needs.
        num_videos: successes and failures to replay into videos, so many of each; 0 = none.
        overwrite: replace an earlier evaluation in OUT.
        json: write the result to this file too ("-": standard output).
    """
    from scd_robot.checkpoint import read_checkpoint
    from scd_robot.errors import ConfigError
    from scd_robot.output import check_target, write_json
    from scd_robot.sim_eval.delay_curve import delay_curve, write_delay_curve
    from scd_robot.sim_eval.jobs import EvaluationJob, run_jobs
    from scd_robot.sim_eval.output import check_output_folder, remove_delay_curve

    if json is not None:
        check_target(json)
    if out is not None:
        check_output_folder(out, overwrite)
    troubles = _faults(latency_ms, jitter_ms, drop, freeze)
    if imagining.imagine is not None and diagnose_history:
        raise ConfigError("--diagnose-history is for policies that do not choose; leave out --imagine")
    overrides: dict[str, Any] = {
        "num_denoising_steps": num_denoising_steps,
        "num_executed": num_executed,
        "guidance_scale": guidance_scale,
        "num_samples": num_samples,
        "reproducible": reproducible,
    }
    source = Path(policy)
    named = named_policies([source], policy_options, policy_python, env_python)
    demonstrations: dict[str, Any] = {}
    local: dict[str, Any]
    told: dict[str, Any]
    load: Callable[[], Any]
    if policy.startswith(("ws://", "wss://")):
        local = {"goal": goal, "diagnose_history": diagnose_history or None, "dataset": dataset}
        _check_remote({**overrides, "reproducible": reproducible or None, "seed": seed, **local})
        load = functools.partial(_remote_policy, policy, env, task)
    elif is_named(source):
        local = {"task": task, "goal": goal, "diagnose_history": diagnose_history or None, "dataset": dataset}
        refuse_checkpoint_options(source, {**overrides, **local})
        load = named(source, env, seed)
    elif is_exported(source):
        if diagnose_history or dataset is not None:
            raise ConfigError(
                "--diagnose-history and --dataset are for checkpoints; diagnose the one that was exported"
            )
        exported_instructions(source, env, task, goal)  # tells at once what is wrong with them
        told = {"environment": env, "task": task, "goal": goal}
        load = functools.partial(make_exported, source.resolve(), device, trust, seed=seed, **told, **overrides)
    else:
        found = read_checkpoint(source)
        demonstrations = _check_diagnosis(found, diagnose_history, dataset, troubles)
        told = {"environment": env, "task": task, "goal": goal}
        load = functools.partial(make_policy, found, device, seed=seed, **told, **overrides)
    load = choosing(load, imagining, device, seed, own=not (policy.startswith(("ws://", "wss://")) or is_named(source)))
    where: dict[str, Any] = {"first_episode": first_episode, "max_steps": max_steps, "num_envs": num_envs}
    options = {**where, "overwrite": overwrite, "num_videos": num_videos}
    jobs = []
    for faults in troubles:
        folder = out / f"latency_{faults.latency_ms:g}ms" if out is not None and len(troubles) > 1 else out
        jobs.append(EvaluationJob(load, env, episodes, out=folder, policy_name=policy, faults=faults, **options))
    if out is not None and overwrite:  # of other delays, say
        remove_delay_curve(out)
    documents, quiet = [], str(json) == "-"
    for job, result in run_jobs(jobs, ray=ray, python=env_python, progress=not quiet):
        documents.append(result.to_json())
        if not quiet:  # before the file: a disk that is full by now must not take the result with it
            print(headline(documents[-1]))
            if job.out is not None:
                print(f"report: {job.out / 'report.html'}")
    documents.sort(key=lambda document: latency_ms.index(document["faults"]["latency_ms"]))
    document = documents[0] if len(documents) == 1 else delay_curve(documents)
    if out is not None and len(documents) > 1:
        write_delay_curve(document, out)
    if diagnose_history:
        if json is not None and not quiet:  # nor may a diagnosis that fails
            write_json(json, document)
        where["python"] = env_python
        document["history"] = _diagnose(load, env, diagnose_history, demonstrations, where, out, quiet)
    if json is not None:
        write_json(json, document)
    _check_valid(documents)


def _check_valid(documents: Sequence[Mapping[str, Any]]) -> None:
    """Raises SimulatorError where the simulator failed in every episode of an evaluation."""
    from scd_robot.errors import SimulatorError

    empty = [document for document in documents if document["success_rate"] is None]
    if empty:
        reason = empty[0]["episodes_detail"][0]["reason"]
        which = "no episode was valid" if len(documents) == 1 else f"{len(empty)} evaluations have no valid episode"
        raise SimulatorError(f"{which}; the first ended with: {reason}; 'scd doctor' tells whether the simulator works")


def _faults(latency_ms: Sequence[float], jitter_ms: float, drop: float, freeze: float) -> list[Any]:
    """What is done to the observations of each evaluation."""
    from scd_robot.errors import ConfigError
    from scd_robot.sim_eval.faults import ObservationFaults

    if not latency_ms or len(set(latency_ms)) < len(latency_ms):
        raise ConfigError(f"--latency-ms needs different delays [ms], at least one, got {list(latency_ms)}")
    return [ObservationFaults(delay, jitter_ms, drop, freeze) for delay in latency_ms]


def _check_diagnosis(checkpoint: Any, episodes: int, dataset: Path | None, troubles: Sequence[Any]) -> dict[str, Any]:
    """Looks at the options of a diagnosis before anything is evaluated; returns its demonstrations, if any."""
    from scd_robot.errors import ConfigError, ShapeError

    if not episodes:
        if dataset is not None:
            raise ConfigError("--dataset is for the diagnosis of the history only; give --diagnose-history as well")
        return {}
    if episodes < 2:
        raise ConfigError(f"--diagnose-history needs at least 2 episodes (0 = no diagnosis), got {episodes}")
    if len(troubles) > 1 or troubles[0].any:
        raise ConfigError("--diagnose-history needs prompt observations; leave out --latency-ms, --drop and the like")
    if dataset is None:
        return {}
    from scd_robot.datasets import open_dataset

    data = open_dataset(dataset)
    if data.spec.action_dim != checkpoint.dataset.action_dim:
        raise ShapeError(
            f"the actions of --dataset {dataset} are {data.spec.action_dim} wide, those of the policy "
            f"{checkpoint.dataset.action_dim}; name demonstrations of its task"
        )
    return {"demonstrations": data.arrays["action"][:], "demonstration_ends": data.episode_ends}


def make_policy(
    checkpoint: Any,
    device: str,
    *,
    environment: str = "",
    task: str | None = None,
    goal: str | None = None,
    **overrides: Any,
) -> Any:
    """The policy of a checkpoint that was read already, on one thread: batches are small, simulators need the cores.

    Args:
        checkpoint: see `read_checkpoint`.
        device: torch's.
        environment: where it is to be used; names its task where the user does not.
        task: what the user said.
        goal: likewise, see `instructions`.
        **overrides: of `load_policy`.
    """
    import torch

    from scd_robot.policies.loading import policy_of

    torch.set_num_threads(1)
    told = instructions(checkpoint.config["transforms"], environment, task, goal)
    return note_instructions(policy_of(checkpoint, device, **told, **overrides), told["task"], goal)


def _check_remote(options: Mapping[str, Any]) -> None:
    """Raises ConfigError where an option is given that only a policy in this process can keep."""
    from scd_robot.errors import ConfigError

    given = [f"--{name.replace('_', '-')}" for name, value in options.items() if value is not None]
    if given:
        raise ConfigError(
            f"{', '.join(given)} cannot be chosen through a server; give it to 'scd serve' where it has it"
        )


def _remote_policy(address: str, environment: str, task: str | None) -> Any:
    import os

    from scd_robot.serve import RemotePolicy

    policy = RemotePolicy(address, api_key=os.environ.get("SCD_API_KEY"))
    tasks = dict.fromkeys(policy.spec.tasks)
    # Where nothing tells which of several, the server's own task may.
    policy.task = known_task(environment, tasks, task) if task is not None or environment in tasks else None
    return note_instructions(policy, policy.prompt, None)


def _diagnose(
    load: Callable[[], Any],
    env: str,
    episodes: int,
    demonstrations: Mapping[str, Any],
    where: Mapping[str, Any],
    out: Path | None,
    quiet: bool,
) -> dict[str, Any]:
    from scd_robot.analysis.history import diagnose_history
    from scd_robot.analysis.history_report import format_history, write_history

    document = diagnose_history(load, env, episodes, **demonstrations, **where, progress=not quiet)
    if out is not None:
        write_history(document, out)
    if not quiet:
        print(format_history(document))
    return document


def headline(result: Mapping[str, Any]) -> str:
    """One line for people."""
    from scd_robot.sim_eval.faults import describe

    troubles = f" ({words})" if (words := describe(result["faults"])) else ""
    low, high = result["interval"]
    valid = result["episodes"] - result["invalid"]
    rate = "no valid episode" if result["success_rate"] is None else f"{100 * result['success_rate']:.1f} %"
    score = ""
    if result["score_definition"] and result["best_reward"] is not None:
        interval = result["best_reward_interval"]
        bounds = "" if interval is None else f" (95 % interval {interval[0]:.3f}-{interval[1]:.3f})"
        score = f"; score {result['best_reward']:.3f}{bounds} ({result['score_definition']})"
    batches = {"encoder": result["timing_batch_size"], "plan": result["plan_batch_size"]}
    times = [
        f"{name} {result[f'{name}_ms']['p50']:.1f} ms" + (f" (p50, batch {batch:.3g})" if batch else " (p50)")
        for name, batch in batches.items()
        if result[f"{name}_ms"]
    ]
    rates = f"{result['successes']}/{valid} successes, {rate} (95 % interval {100 * low:.1f}-{100 * high:.1f} %)"
    return (
        f"{result['env']}{troubles}: {rates}, {result['invalid']} invalid{score}"
        + "; " * bool(times)
        + ", ".join(times)
    )
