"""The verb `scd train-autoencoder`."""

import logging
from pathlib import Path
from typing import Annotated, Any

import tyro

from scd_robot.datasets.formats import ReadOptions

__all__ = ["train_autoencoder"]

logger = logging.getLogger(__name__)

_COLUMNS = 4  # of the sheet, so many frames apart


def train_autoencoder(
    *,
    dataset: list[str],
    camera: str | None = None,
    out: Path,
    read: Annotated[ReadOptions, tyro.conf.arg(name="")] = ReadOptions(),  # noqa: B008 - frozen
    transforms: str | None = None,
    updates: int = 3000,
    latent_channels: int = 8,
    channels: tuple[int, ...] = (16, 32, 64),
    batch_size: int = 16,
    learning_rate: float = 2e-3,
    seed: int = 0,
    images_in_memory_gb: float = 2.0,
    device: str | None = None,
    threads: int | None = None,
    overwrite: bool = False,
    json: Path | None = None,
) -> None:
    """Trains an autoencoder on a camera's pictures, so that large ones can be imagined.

    The second step is: scd train frames_latent --dataset PATH --autoencoder OUT, whose checkpoints hold the
    autoencoder; the same --transforms belong to both. OUT gets autoencoder.safetensors (weights), autoencoder.json
    (what it is, and its errors on held-out episodes: PSNR and SSIM, on all and on moving pixels, beside the frame
    before repeated; docs/frames.md) and autoencoder.png (recorded, encoded and decoded, difference). A picture of 96 x
    96 takes a core about 5 ms of an update; nothing is written before the end.

    Args:
        dataset: dataset of any known format (see 'scd data info --help'), or several of one kind.
        camera: key of the pictures, after the transforms; by default the only one.
        out: folder for the autoencoder.
        read: what to read of the datasets.
        transforms: what to do between the recording and the model, as for 'scd train' JSON or a file: sides must be
            multiples of 8 (with three layers), and of 16 for frames_latent.
        updates: of the optimiser; more are sharper.
        latent_channels: numbers that each place (8 x 8 pixels, with three layers) becomes; more keep more, and more
            have to be imagined.
        channels: features of the layers, each of which halves the sides.
        batch_size: pictures of an update.
        learning_rate: peak.
        seed: keys every random draw, and which episodes are held out: those that 'scd train' holds out.
        images_in_memory_gb: pictures are read once; of more than this evenly spaced ones are taken.
        device: torch device; by default a GPU where there is one.
        threads: CPU threads; by default all cores, at most 8.
        overwrite: replace an autoencoder in OUT.
        json: write autoencoder.json to this file too ("-": standard output).
    """
    import time

    import torch

    from scd_robot.cli.threads import use_training_threads
    from scd_robot.cli.train import open_datasets, read_transforms
    from scd_robot.config import to_json
    from scd_robot.errors import OutputError
    from scd_robot.nn import AutoencoderConfig
    from scd_robot.output import check_target, write_json
    from scd_robot.policies.sampling import usable_device
    from scd_robot.training.autoencoder import AutoencoderTraining, camera_of
    from scd_robot.training.autoencoder import train_autoencoder as run
    from scd_robot.training.autoencoder_file import write_autoencoder
    from scd_robot.training.transformed import transformed
    from scd_robot.transforms import TransformConfig

    if (out / "autoencoder.json").exists() and not overwrite:
        raise OutputError(f"{out} already holds an autoencoder; choose another --out, or --overwrite it")
    for target in (out / "autoencoder.json", *(() if json is None else (json,))):
        check_target(target)
    config = AutoencoderConfig(channels, latent_channels)
    training = AutoencoderTraining(
        updates, batch_size, learning_rate, seed=seed, images_in_memory_gb=images_in_memory_gb
    )
    changes = read_transforms(transforms) or TransformConfig()
    data = transformed(open_datasets(dataset, None, read), changes)
    key = camera_of(data, camera)
    shape = data.spec.observation[key].shape
    device = str(usable_device(device or ("cuda" if torch.cuda.is_available() else "cpu")))
    count, name = use_training_threads(threads), " + ".join(dataset)
    logger.info("training an autoencoder on %s %s of %s, %s, %d threads", key, shape, name, device, count)
    started = time.monotonic()
    model = run(data, key, config, training, device=device, progress=str(json) != "-")
    told: dict[str, Any] = {
        "dataset": name,
        "transforms": to_json(changes),
        "training": {**to_json(training), "seconds": round(time.monotonic() - started, 1)},
        "parameters": sum(p.numel() for p in model.parameters()),
        "held_out": _held_out(model, data, key, training.split(data)[1], out),
    }
    document = write_autoencoder(model, key, shape, out, told)
    if str(json) != "-":
        print(_summary(out, document))
    if json is not None:
        write_json(json, document)


def _held_out(model: Any, data: Any, camera: str, episodes: Any, out: Path) -> dict[str, Any] | None:
    """Errors on held-out episodes, and OUT/autoencoder.png; None where there are none to look at."""
    from scd_robot.analysis.frame_sheet import write_sheet
    from scd_robot.analysis.reconstruction import describe_reconstruction, reconstruct

    if not any(data.episode_lengths[number] > 1 for number in episodes):
        logger.warning("no episode of two control steps is held out: errors are not known")
        return None
    if data.has_gaps(camera):
        logger.warning("%r is absent in some control steps: errors on held-out episodes are not told", camera)
        return None
    found = reconstruct(model, data, camera, episodes)
    shown = slice(0, 2)
    every = max(1, found.recorded.shape[1] // _COLUMNS)
    write_sheet(
        out / "autoencoder.png",
        found.recorded[shown],
        found.frames[shown],
        every,
        last_context=found.before[shown],
        name="decoded",
    )
    return describe_reconstruction(found)


def _summary(out: Path, document: dict[str, Any]) -> str:
    training, held_out = document["training"], document["held_out"]
    done = f"{out}: {training['updates']} updates in {training['seconds']:.0f} s"
    if held_out is None:
        return done
    moving = held_out["psnr_moving"]
    told = f"{done}, held-out episodes: PSNR {held_out['psnr']['reconstructed']:.1f} dB"
    if moving["reconstructed"] is None:
        return told
    repeated = f"the frame before repeated: {moving['repeated']:.1f}"
    return f"{told}, on moving pixels {moving['reconstructed']:.1f} dB ({repeated})"
