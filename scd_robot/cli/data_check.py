"""The verbs `scd data validate` and `scd data replay`: what is wrong with a dataset, told before training."""

from pathlib import Path
from typing import Annotated

import tyro

from scd_robot.datasets.formats import ReadOptions

__all__ = ["replay", "validate"]

Options = Annotated[ReadOptions, tyro.conf.arg(name="")]


def validate(
    path: Annotated[str, tyro.conf.Positional],
    /,
    *,
    read: Options = ReadOptions(),  # noqa: B008 - frozen
    window: int = 2,
    html: Path | None = None,
    json: Path | None = None,
) -> int:
    """Looks for what would spoil training, and tells where: NaN, frozen cameras, time gaps, unit jumps, lag, and more.

    Exit code 1 when something would spoil training, 0 when there are warnings and notes at most. Every image is read
    once.

    Args:
        path: dataset of any known format.
        read: what to read of it.
        window: control steps that an episode needs at the least, to be of use.
        html: write a page with the findings and pictures, in one file.
        json: write the findings to this file too ("-": standard output).
    """
    from scd_robot.datasets.validation.report import format_validation
    from scd_robot.datasets.validation.run import validate as run
    from scd_robot.output import check_target, write_json

    for target in (html, json):
        if target is not None:
            check_target(target)
    found = run(path, read, window=window)
    if html is not None:
        from scd_robot.datasets.validation.report import write_validation_page

        write_validation_page(found, html)
    if json is not None:
        write_json(json, found.to_json())
    if str(json) != "-":
        print(format_validation(found))
    return int(found.spoils_training)


def replay(
    path: Annotated[str, tyro.conf.Positional],
    /,
    *,
    env: str,
    episodes: int | None = None,
    read: Options = ReadOptions(),  # noqa: B008 - frozen
    tolerance: float = 0.01,
    json: Path | None = None,
) -> int:
    """Sets the recorded initial states and replays the actions open loop: how many succeed, how far states drift.

    A wrong simulator version or action convention shows here, before training. Exit code 1 when the recording is not
    reproduced.

    Args:
        path: dataset of any known format.
        env: the environment: metaworld/TASK, pusht, or robosuite (which environment, the recording says).
        episodes: replay the first so many; by default all.
        read: what to read of the dataset.
        tolerance: largest difference of a state that counts as reproduced, in the recording's units.
        json: write the results to this file too ("-": standard output).
    """
    from scd_robot.datasets import open_dataset
    from scd_robot.output import check_target, write_json
    from scd_robot.recording.replay import format_replay, replay_dataset

    if json is not None:
        check_target(json)
    result = replay_dataset(open_dataset(path, **vars(read)), env, episodes=episodes, tolerance=tolerance)
    if json is not None:
        write_json(json, result)
    if str(json) != "-":
        print(format_replay(result))
    return int(not result["reproduces"])
