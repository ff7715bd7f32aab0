"""Features of a frozen image encoder, computed once instead of in every training step."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from scd_robot.datasets import PRESENT, EpisodeDataset
from scd_robot.errors import ShapeError, UnknownNameError
from scd_robot.types import ArraySpec

__all__ = ["replace_pictures"]


def replace_pictures(
    data: EpisodeDataset,
    key: str,
    encoder: Callable[[Tensor], Tensor],
    *,
    name: str | None = None,
    batch_size: int = 64,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> EpisodeDataset:
    """The dataset with an image observation replaced by its features; each frame is read and encoded once.

    Where frames are marked as absent (`present.KEY`), so are the features.

    `scd_robot.datasets.convert.write_zarr` keeps the result for later trainings. On the robot the same encoder must be
    applied before the policy.

    Args:
        data: the episodes.
        key: of the images, (N, H, W, C) uint8.
        encoder: frozen; takes (B, C, H, W) float in [0, 1] on `device`, returns (B, D).
        name: of the new observation; None = key + "_features".
        batch_size: frames encoded at once.
        device: torch device.
        progress: show a bar.

    Raises:
        UnknownNameError: there is no such observation.
        ShapeError: it is no image, or the encoder returns something else than (B, D).
    """
    if key not in data.spec.observation:
        raise UnknownNameError("observation key", key, data.spec.observation)
    if len(data.spec.observation[key].shape) != 3:
        raise ShapeError(f"features are made of images (H, W, C), {key!r} has shape {data.spec.observation[key].shape}")
    name = name or f"{key}_features"
    parts = []
    for start in tqdm(range(0, data.num_steps, batch_size), desc=f"encoding {key}", disable=not progress):
        frames = torch.from_numpy(np.ascontiguousarray(data.arrays[key][start : start + batch_size]))
        with torch.inference_mode():
            encoded = encoder(frames.to(device).movedim(-1, 1).float() / 255)
        if encoded.ndim != 2 or len(encoded) != len(frames):
            raise ShapeError(f"the encoder must return ({len(frames)}, D), got {tuple(encoded.shape)}")
        parts.append(encoded.float().cpu().numpy())
    features = np.concatenate(parts)
    others = {k: spec for k, spec in data.spec.observation.items() if k != key}
    spec = replace(data.spec, observation={**others, name: ArraySpec((features.shape[1],))})
    arrays = {PRESENT + name if k == PRESENT + key else k: array for k, array in data.arrays.items() if k != key}
    return replace(data, spec=spec, arrays={**arrays, name: features})
