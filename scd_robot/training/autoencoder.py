"""Trains an autoencoder on the pictures of one camera, before the model of frames that uses it is trained.

Maths and architecture are in `nn/autoencoder.py`, the folder it is kept in is `autoencoder_file.py`.

Shapes: N pictures, H W C picture.
"""

import logging
import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import mse_loss
from tqdm import trange

from scd_robot.datasets import PRESENT, EpisodeDataset
from scd_robot.datasets.windows import split_episodes
from scd_robot.errors import ConfigError, DatasetError, TrainingDivergedError, UnknownNameError
from scd_robot.nn import Autoencoder, AutoencoderConfig
from scd_robot.seeding import AUTOENCODER, derive_seed, keyed_rng
from scd_robot.training.start import check_pictures

__all__ = ["AutoencoderTraining", "camera_of", "train_autoencoder"]

logger = logging.getLogger(__name__)

_WARM_UP = 50  # updates, at most a tenth of all
_GRADIENT_NORM = 1.0
_IN_STATISTICS, _BLOCK = 2048, 64  # pictures


@dataclass(frozen=True)
class AutoencoderTraining:
    """How an autoencoder is trained.

    Attributes:
        updates: of the optimiser.
        batch_size: pictures of an update.
        learning_rate: peak; it falls to 0 along a cosine.
        noise: standard deviation of what is added to latents in training.
        penalty: of the mean squared latent, beside the mean squared error of pictures in -1..1.
        held_out: share of the episodes that are not trained on; with the same seed those that `scd train` holds out.
        seed: keys every random draw.
        images_in_memory_gb: pictures are read once and kept; of more than this evenly spaced ones are taken.
    """

    updates: int = 3000
    batch_size: int = 16
    learning_rate: float = 2e-3
    noise: float = 0.1
    penalty: float = 1e-4
    held_out: float = 0.05
    seed: int = 0
    images_in_memory_gb: float = 2.0

    def __post_init__(self) -> None:
        if min(self.updates, self.batch_size) < 1:
            raise ConfigError(f"updates and batch_size must be at least 1, got {self.updates} and {self.batch_size}")
        if not self.learning_rate > 0 or not self.images_in_memory_gb > 0:
            raise ConfigError(
                f"learning_rate and images_in_memory_gb must be positive, got {self.learning_rate} and "
                f"{self.images_in_memory_gb}"
            )
        if min(self.noise, self.penalty, self.seed) < 0:
            raise ConfigError(
                f"noise, penalty and seed must not be negative, got {self.noise}, {self.penalty} and {self.seed}"
            )
        if not 0 <= self.held_out < 1:
            raise ConfigError(f"held_out must be in [0, 1), got {self.held_out}")

    def split(self, data: EpisodeDataset) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Numbers of the episodes that are trained on, and of those that are not."""
        return split_episodes(data.num_episodes, self.held_out, self.seed, data.parts)


def camera_of(data: EpisodeDataset, camera: str | None = None) -> str:
    """The camera of that name, or the only one.

    Raises:
        UnknownNameError: there is none of that name.
        DatasetError: there is none at all, or one has to be chosen.
    """
    cameras = [key for key, spec in data.spec.observation.items() if len(spec.shape) == 3]
    if camera is not None and camera not in cameras:
        raise UnknownNameError("camera", camera, cameras)
    if camera is None and len(cameras) != 1:
        raise DatasetError(
            f"an autoencoder is trained on the pictures of one camera, the dataset has {', '.join(cameras) or 'none'}"
            + (": choose one with --camera" if cameras else "")
        )
    return camera or cameras[0]


def train_autoencoder(
    data: EpisodeDataset,
    camera: str,
    config: AutoencoderConfig | None = None,
    training: AutoencoderTraining | None = None,
    *,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> Autoencoder:
    """Trains on the pictures of one camera, and normalises the latents.

    Args:
        data: the episodes, after transforms.
        camera: key of the pictures.
        config: architecture; None = the default one.
        training: settings; None = the defaults.
        device: torch device.
        progress: show a bar.

    Raises:
        DatasetError, UnknownNameError: there are no such pictures, or they are no pictures.
        ConfigError: their size is no multiple of the autoencoder's factor.
        TrainingDivergedError: the loss became NaN.
    """
    config, training = config or AutoencoderConfig(), training or AutoencoderTraining()
    shape = data.spec.observation[camera_of(data, camera)].shape
    config.check_shape(camera, shape)
    check_pictures(data, camera)
    pictures = torch.from_numpy(_read(data, camera, training))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(AUTOENCODER, training.seed))
        model = Autoencoder(config, shape[2]).to(device)
    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(learned, training.learning_rate, betas=(0.9, 0.99))
    rng = keyed_rng(AUTOENCODER, training.seed, 1)
    generator = torch.Generator(device).manual_seed(derive_seed(AUTOENCODER, training.seed, 2))
    bar = trange(training.updates, desc="training an autoencoder", unit="update", disable=not progress)
    for update in bar:
        seen = pictures[torch.from_numpy(rng.integers(0, len(pictures), training.batch_size))].to(device)
        latents = model.raw_latents(seen)
        noise = torch.randn(latents.shape, generator=generator, device=device)
        error = mse_loss(model.raw_pictures(latents + training.noise * noise), model.scaled(seen))
        loss = error + training.penalty * latents.square().mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(learned, _GRADIENT_NORM)
        for group in optimizer.param_groups:
            group["lr"] = training.learning_rate * _factor(update, training.updates)
        optimizer.step()
        if update % 50 == 0 or update == training.updates - 1:
            if not torch.isfinite(loss):
                raise TrainingDivergedError(
                    f"the autoencoder's loss became {loss.item()} at update {update}; take a smaller learning rate "
                    f"than {training.learning_rate}"
                )
            bar.set_postfix_str(f"PSNR {10 * math.log10(4 / max(error.item(), 1e-9)):.1f} dB", refresh=False)
    _normalise(model, pictures, training.noise)
    return model.requires_grad_(False).eval()


def _read(data: EpisodeDataset, camera: str, training: AutoencoderTraining) -> NDArray[np.uint8]:
    """Pictures (N, H, W, C) of the training episodes, as many as memory is given to."""
    chosen, _ = training.split(data)
    rows = np.concatenate([np.arange(data.rows(int(e)).start, data.rows(int(e)).stop) for e in chosen])
    if PRESENT + camera in data.arrays:
        rows = rows[np.asarray(data.arrays[PRESENT + camera][:])[rows] != 0]
    if not len(rows):
        raise DatasetError(f"the training episodes hold no pictures {camera!r}")
    array = data.arrays[camera]
    most = max(1, int(training.images_in_memory_gb * 1e9 // max(1, array.nbytes // len(array))))
    if len(rows) > most:
        logger.info("%d of %d pictures are trained on (images_in_memory_gb)", most, len(rows))
        rows = rows[np.linspace(0, len(rows) - 1, most).astype(np.int64)]
    return np.ascontiguousarray(array[rows])


def _factor(update: int, updates: int) -> float:
    """Of the learning rate."""
    return min(1.0, (update + 1) / min(_WARM_UP, -(-updates // 10))) * 0.5 * (1 + math.cos(math.pi * update / updates))


@torch.no_grad()
def _normalise(model: Autoencoder, pictures: Tensor, noise: float) -> None:
    """Lets latents have mean 0 and variance 1; less in a channel that tells nothing, varying less than the noise."""
    some = pictures[:: max(1, len(pictures) // _IN_STATISTICS)]
    blocks = (model.raw_latents(block.to(model.mean.device)).cpu() for block in some.split(_BLOCK))
    latents = torch.cat(list(blocks)).double()  # which not every accelerator has
    model.mean.copy_(latents.mean(dim=(0, 1, 2)))
    model.scale.copy_(latents.std(dim=(0, 1, 2), correction=0).clamp(min=max(noise, 1e-3)))
