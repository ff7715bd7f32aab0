"""The verb `scd surprise`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from scd_robot.datasets.formats import ReadOptions

__all__ = ["surprise"]


def surprise(
    checkpoint: Annotated[Path, tyro.conf.Positional],
    /,
    *,
    dataset: Path,
    episode: tuple[int, ...] = (0,),
    calibration: Path | None = None,
    quantile: float | None = None,
    out: Path,
    read: Annotated[ReadOptions, tyro.conf.arg(name="")] = ReadOptions(),  # noqa: B008 - frozen
    num_denoising_steps: int = 1,
    seed: int | None = None,
    device: str = "cpu",
    overwrite: bool = False,
    json: Path | None = None,
) -> None:
    """Tells in which control steps a robot saw what a model of frames did not expect.

    In every control step the model predicts the next frame from what was seen and executed; the score is how much
    larger the error of the real one is than usual (docs/frames.md). OUT gets surprise.png (scores over each episode)
    and surprise.json (scores, alarms, and the calibration, which a program that watches a robot reads).

    Args:
        checkpoint: a checkpoint's folder, or a training run's (its newest checkpoint), of a model of frames
            (scd train frames_64) or of a policy that has one (scd train image_frames).
        dataset: recorded episodes of the same camera.
        episode: numbers of those to look at, from 0 on.
        calibration: what is usual: recorded episodes that the model was not trained on, or a surprise.json of the same
            checkpoint; by default the other episodes of the dataset. Of another recording all episodes are taken:
            --only, --drop and --mask are for the dataset.
        quantile: share of the frames of the calibration that are no alarm (default 0.99); a surprise.json has its own.
        out: folder for the results.
        read: what to read of the dataset.
        num_denoising_steps: of a prediction; one gives the expected frame.
        seed: of the noise; by default the checkpoint's.
        device: torch device.
        overwrite: replace results in OUT.
        json: write surprise.json to this file too ("-": standard output).
    """
    import torch

    from scd_robot.analysis.surprise import describe_surprise, episode_surprise, write_surprise
    from scd_robot.datasets import open_dataset
    from scd_robot.errors import OutputError
    from scd_robot.output import check_target, write_json
    from scd_robot.policies import load_imagination

    if (out / "surprise.json").exists() and not overwrite:
        raise OutputError(f"{out} already holds scores of surprise; choose another --out, or --overwrite them")
    for target in (out / "surprise.json", *(() if json is None else (json,))):
        check_target(target)
    torch.set_num_threads(1)
    overrides: dict[str, Any] = {"num_denoising_steps": num_denoising_steps, "guidance_scale": 1.0, "seed": seed}
    imagination = load_imagination(checkpoint, device, **overrides)
    data = open_dataset(dataset, **vars(read))
    _check_asked(data, episode, quantile)  # calibration takes minutes
    if calibration is not None and calibration.exists() and calibration.resolve() == dataset.resolve():
        calibration = None  # the same: without the episodes that are looked at
    quiet = str(json) == "-"
    usual = _calibration(imagination, data, episode, calibration, quantile, read, not quiet)
    found = [episode_surprise(imagination, usual, data, number) for number in episode]
    document = {
        "checkpoint": imagination.provenance["checkpoint"],
        "dataset": str(dataset),
        "calibrated_on": str(dataset if calibration is None else calibration),
        **describe_surprise(found, usual),
    }
    write_surprise(found, usual, out, document)
    if not quiet:
        for entry in document["episodes"]:
            alarms = ", ".join(f"{len(steps)} {kind}" for kind, steps in entry["alarms"].items())
            print(f"episode {entry['episode']}: alarms in {len(entry['scores']['moving']) - 1} frames: {alarms}")
        print(f"{out / 'surprise.png'}, {out / 'surprise.json'}")
    if json is not None:
        write_json(json, document)


def _check_asked(data: Any, episodes: Sequence[int], quantile: float | None) -> None:
    """Raises ConfigError where there are no such episodes to look at, or no such quantile."""
    from scd_robot.cli.imagine import check_distinct
    from scd_robot.errors import ConfigError

    check_distinct(episodes)
    for number in episodes:
        if not 0 <= number < data.num_episodes:
            raise ConfigError(f"there is no episode {number}: the recording has {data.num_episodes}, from 0 on")
        if data.episode_lengths[number] < 2:
            raise ConfigError(f"episode {number} has a single control step: nothing follows that could surprise")
    if quantile is not None and not 0 < quantile < 1:
        raise ConfigError(f"--quantile must be between 0 and 1, got {quantile:g}")


def _calibration(
    imagination: Any,
    data: Any,
    looked_at: tuple[int, ...],
    source: Path | None,
    quantile: float | None,
    read: ReadOptions,
    progress: bool,
) -> Any:
    from scd_robot.analysis.surprise import calibrate_surprise
    from scd_robot.datasets import open_dataset
    from scd_robot.errors import ConfigError
    from scd_robot.policies.surprise import load_calibration

    if source is not None and source.suffix == ".json":
        found = load_calibration(source)
        if quantile not in (None, found.quantile):
            raise ConfigError(
                f"{source} was calibrated for --quantile {found.quantile:g}, and does not keep scores; give recorded "
                "episodes as --calibration for another one"
            )
        return found
    if source is not None:
        data, looked_at = open_dataset(source, **{**vars(read), "only": None, "drop": None, "mask": None}), ()
    episodes = [number for number in range(data.num_episodes) if number not in looked_at]
    return calibrate_surprise(imagination, data, episodes, 0.99 if quantile is None else quantile, progress=progress)
