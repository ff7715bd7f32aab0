"""The verb `scd imagine`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from scd_robot.datasets.formats import ReadOptions

__all__ = ["check_distinct", "imagine"]


def imagine(
    checkpoint: Annotated[Path, tyro.conf.Positional],
    /,
    *,
    dataset: Path,
    episode: tuple[int, ...] = (),
    context: int = 16,
    length: int | None = None,
    out: Path,
    read: Annotated[ReadOptions, tyro.conf.arg(name="")] = ReadOptions(),  # noqa: B008 - frozen
    num_denoising_steps: int | None = None,
    guidance_scale: float | None = None,
    seed: int | None = None,
    lpips_weights: Path | None = None,
    fvd_weights: Path | None = None,
    device: str = "cpu",
    overwrite: bool = False,
    json: Path | None = None,
) -> None:
    """Shows what a model of frames imagines beside what was recorded.

    The model sees the first control steps of an episode, then imagines frame after frame what its recorded actions lead
    to. OUT gets frames.mp4 (side by side), frames.png (recorded, imagined, difference) and frames.json (PSNR and SSIM
    against the number of frames ahead, on all and on moving pixels, beside the last frame repeated; docs/frames.md).

    Args:
        checkpoint: a checkpoint's folder, or a training run's (its newest checkpoint), of a model of frames
            (scd train frames_64) or of a policy that has one (scd train image_frames).
        dataset: recorded episodes of the same camera.
        episode: their numbers, from 0 on; 'scd data info' tells how many there are. By default the first that the
            training held out, or 0 of another recording.
        context: control steps that the model sees.
        length: frames that it imagines then; by default up to the end of the shortest of the episodes.
        out: folder for the results.
        read: what to read of the dataset.
        num_denoising_steps: per frame; by default the checkpoint's, or of a policy 8.
        guidance_scale: guidance by context corruption, 1 = off; by default the checkpoint's, or of a policy 1.
        seed: of the noise; by default the checkpoint's.
        lpips_weights: file of AlexNet's or VGG-16's weights (torchvision's), to tell LPIPS too.
        fvd_weights: file of I3D's weights (rgb_imagenet.pt), to tell FVD too, of two episodes or more
            (docs/analysis.md).
        device: torch device.
        overwrite: replace results in OUT.
        json: write frames.json to this file too ("-": standard output).
    """
    import torch

    from scd_robot.analysis.imagination import describe, format_errors, imagine_episodes, write_imagined
    from scd_robot.analysis.probes import held_out_episodes
    from scd_robot.checkpoint import read_checkpoint
    from scd_robot.datasets import open_dataset
    from scd_robot.errors import OutputError
    from scd_robot.output import check_target, write_json
    from scd_robot.policies.imagination import imagination_of

    if (out / "frames.json").exists() and not overwrite:
        raise OutputError(f"{out} already holds imagined frames; choose another --out, or --overwrite them")
    for target in (out / "frames.json", *(() if json is None else (json,))):
        check_target(target)
    torch.set_num_threads(1)
    overrides = {"num_denoising_steps": num_denoising_steps, "guidance_scale": guidance_scale, "seed": seed}
    check_distinct(episode)
    source = read_checkpoint(checkpoint)
    imagination = imagination_of(source, device, **overrides)
    data = open_dataset(dataset, **vars(read))
    held_out = held_out_episodes(source, imagination, data)
    episode = episode or ((held_out or [0])[0],)
    weights = {"lpips_weights": lpips_weights, "fvd_weights": fvd_weights}
    found = imagine_episodes(imagination, data, episode, context, length, **weights)
    document = {
        "checkpoint": str(source.path),
        "step": source.step,
        "weights_sha256": source.weights_sha256,
        "dataset": str(dataset),
        "read": {name: value for name, value in vars(read).items() if value != getattr(ReadOptions(), name)},
        "held_out": None if held_out is None else set(episode) <= set(held_out),
        **describe(found, imagination),
    }
    write_imagined(found, out, 1 / data.spec.control_dt, document)
    if str(json) != "-":
        told = {None: "another recording than the training's", True: "held out from training"}
        print(f"episodes {', '.join(map(str, episode))}: {told.get(document['held_out'], 'TRAINED ON, some of them')}")
        print(format_errors(document))
        print(f"{out / 'frames.png'}, {out / 'frames.mp4'}, {out / 'frames.json'}")
    if json is not None:
        write_json(json, document)


def check_distinct(episodes: Sequence[int]) -> None:
    """Raises ConfigError where an episode is named twice, which would count twice."""
    from scd_robot.errors import ConfigError

    if twice := sorted({number for number in episodes if list(episodes).count(number) > 1}):
        raise ConfigError(f"--episode names {', '.join(map(str, twice))} twice")
