"""The verbs `scd data record` and `scd data info`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import tyro

from scd_robot.datasets.formats import ReadOptions

__all__ = ["info", "record"]


def record(
    env: Annotated[str, tyro.conf.Positional],
    /,
    *,
    episodes: int,
    out: Path,
    seed: int = 0,
    action_noise: float = 0.0,
    steps_after_success: int = 10,
    disturbances: float = 0.0,
    keep_positions: bool = False,
    noise_correlation: float = 0.0,
    policy: Path | None = None,
    max_delay_steps: int = 0,
    workers: int | None = None,
    overwrite: bool = False,
    json: Path | None = None,
) -> None:
    """Records demonstrations of the expert that comes with a simulator, into a Zarr store.

    Failed attempts are dropped and counted. The store depends on the environment, the number of episodes, the seed and
    the noise only: any number of processes writes the same bytes. If the recording is interrupted, the finished
    episodes stay readable.

    With --policy it is a trained policy that acts, and the expert only says what it would do: demonstrations of the
    states that the policy gets itself into (DAgger). Failed attempts are kept then.

    Args:
        env: an environment with an expert: metaworld/TASK, scd_memory/TASK, or MODULE:CALLABLE of your own; options
            follow a colon, as in metaworld/push-v3:goal_steps=5, which shows the goal in the first 5 control steps only
            (docs/evaluation.md lists environments and options).
        episodes: successful demonstrations to record.
        out: folder of the new store.
        seed: start states and noise follow from it; evaluations never start from the same states.
        action_noise: standard deviation of normal noise on the executed actions, in their units (0.1 is usual for
            Meta-World); the stored labels are the expert's clean actions.
        steps_after_success: control steps recorded after the first success.
        disturbances: probability that in a control step a disturbance begins: for 3 to 8 steps one random action is
            executed in the place of the expert's, whose labels then show how to mend that (0.02 for tasks of memory).
        keep_positions: keep where the hand and other things were, in arrays "position.NAME" beside the observations:
            no policy sees them; imagined pictures are judged by them.
        noise_correlation: of the noise in a control step with that one before, 0 to less than 1. A policy's own errors
            last; 0.9 makes noise that lasts for about ten steps.
        policy: checkpoint, run, or folder that 'scd export' wrote, of the policy that acts in the expert's place; train
            on the result beside the first demonstrations.
        max_delay_steps: with --policy, the most control steps that its plans take; each attempt draws from 0 to this.
        workers: simulator processes; by default one per CPU, fewer for few episodes.
        overwrite: replace a store that exists at OUT, once the new one is complete.
        json: write the summary to this file too ("-": standard output).
    """
    from scd_robot.output import check_target, write_json
    from scd_robot.recording import record_demonstrations

    if json is not None:
        check_target(json)
    acting, told = None, None
    if policy is not None:
        from scd_robot.cli.policy_source import read_trained

        trained = read_trained(policy, "cpu")
        acting, told = trained.make(environment=env), trained.identity_in(env)
    summary = record_demonstrations(
        env,
        episodes,
        out,
        seed=seed,
        action_noise=action_noise,
        steps_after_success=steps_after_success,
        disturbances=disturbances,
        keep_positions=keep_positions,
        noise_correlation=noise_correlation,
        policy=acting,
        max_delay_steps=max_delay_steps,
        told=told,
        workers=workers,
        overwrite=overwrite,
    )
    if json is not None:
        write_json(json, summary)
    if str(json) != "-":
        failed = "failed attempts dropped" if policy is None else "of which failed"
        print(
            f"{summary['path']}: {summary['episodes']} episodes, {summary['steps']} steps "
            f"(mean length {summary['mean_length']:.1f}), {summary['failures']} {failed}, {summary['seconds']:.1f} s"
        )


def info(
    path: Annotated[str, tyro.conf.Positional],
    /,
    *,
    read: Annotated[ReadOptions, tyro.conf.arg(name="")] = ReadOptions(),  # noqa: B008 - frozen
    plot: Path | None = None,
    env_args: Path | None = None,
    json: Path | None = None,
) -> None:
    """Checks a dataset and shows what it holds: episodes, lengths, keys, shapes, and the range of each dimension.

    Args:
        path: dataset of any known format: a Zarr store of ours or of diffusion_policy (folder, .zip, or an address such
            as s3://bucket/name.zarr), HDF5 of robomimic, robosuite or ALOHA, LeRobot v2.0 to v3.0.
        read: what to read of it.
        plot: write pictures into this folder: traces of actions and states, histograms, episode lengths, frames.
        env_args: write the robosuite environment it was recorded in to this JSON file, so that policies are evaluated
            in the same: --env robosuite/TASK:recorded=FILE.
        json: write the description to this file too ("-": standard output).
    """
    from scd_robot.datasets.open import open_dataset
    from scd_robot.datasets.summary import describe, format_description
    from scd_robot.output import check_target, write_json

    for target in (env_args, json):
        if target is not None:
            check_target(target)
    dataset = open_dataset(path, **vars(read))
    description = describe(dataset)
    if plot is not None:
        from scd_robot.datasets.plots import plot_dataset

        description["pictures"] = [str(picture) for picture in plot_dataset(dataset, plot)]
    if env_args is not None:
        write_json(env_args, _recorded_environment(dataset.metadata, path))
    if json is not None:
        write_json(json, description)
    if str(json) != "-":
        print(format_description(description))
        if plot is not None:
            print(f"\n{len(description['pictures'])} pictures in {plot}")


def _recorded_environment(metadata: Mapping[str, Any], path: str) -> dict[str, Any]:
    """The notes of robomimic or robosuite about a recording's environment, as their files have them."""
    from scd_robot.errors import DatasetError

    notes = metadata.get("env_args")
    if isinstance(notes, Mapping) and "env_name" in notes:
        return dict(notes)
    names = ("env", "env_info", "repository_version")
    if "env" in metadata:
        return {name: metadata[name] for name in names if name in metadata}
    raise DatasetError(f"{path} does not tell a robosuite environment: it has neither env_args nor env")
