"""What an autoencoder keeps of pictures: held-out episodes encoded and decoded, with the metrics of imagined frames.

What it loses no model of frames that uses it brings back. On moving pixels the frame before, repeated, stands beside
it: an autoencoder that is worse loses more than what happens in a control step.

Shapes: N pieces, Tf frames, H W C picture.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from scd_robot.analysis.frame_metrics import FrameErrors, FrameQuality, frame_errors
from scd_robot.datasets import EpisodeDataset
from scd_robot.errors import ConfigError
from scd_robot.nn import Autoencoder

__all__ = ["Reconstructed", "describe_reconstruction", "reconstruct"]

Frames = NDArray[np.uint8]

_FRAMES = 8  # of a piece, after the one that tells what moves
_MOST_PIECES = 32


@dataclass(frozen=True, eq=False)
class Reconstructed:
    """What `reconstruct` found.

    Attributes:
        recorded: (N, Tf, H, W, C) uint8.
        frames: (N, Tf, H, W, C) uint8, the same encoded and decoded.
        before: (N, H, W, C) uint8, the frame before the first of them.
        errors: of these frames, and of the one before, repeated.
    """

    recorded: Frames
    frames: Frames
    before: Frames
    errors: FrameErrors


def reconstruct(model: Autoencoder, data: EpisodeDataset, camera: str, episodes: Sequence[int]) -> Reconstructed:
    """Encodes and decodes pieces of episodes, evenly spaced.

    Args:
        model: trained.
        data: the episodes, after the transforms it was trained with.
        camera: key of the pictures.
        episodes: numbers of episodes that it was not trained on.

    Raises:
        ConfigError: no episode is given that has two control steps.
    """
    long = [int(number) for number in episodes if data.episode_lengths[number] > 1]
    if not long:
        raise ConfigError("no held-out episode has two control steps: there is nothing to measure an autoencoder with")
    length = min(_FRAMES, *(int(data.episode_lengths[number]) - 1 for number in long))
    places = []
    for number in long[:_MOST_PIECES]:
        rows = data.rows(number)
        last, count = rows.stop - 1 - length, max(1, _MOST_PIECES // len(long))
        starts = np.unique(np.linspace(rows.start, last, count).astype(np.int64))
        places += [(number, int(start)) for start in starts]
    pieces = np.stack([data.arrays[camera][start : start + length + 1] for _, start in places])
    before, recorded = pieces[:, 0], pieces[:, 1:]
    with torch.inference_mode():
        seen = (torch.from_numpy(np.ascontiguousarray(piece)).to(model.mean.device) for piece in recorded)
        frames = np.stack([model.decode(model.encode(piece)).cpu().numpy() for piece in seen])
    errors = frame_errors(recorded, frames, before, episodes=np.array([number for number, _ in places]))
    return Reconstructed(recorded, frames, before, errors)


def describe_reconstruction(found: Reconstructed) -> dict[str, Any]:
    """Means over all frames, as plain JSON types; None on moving pixels where none moves."""
    told: dict[str, Any] = {
        "episodes": len(np.unique(found.errors.episodes)),
        "frames": int(np.prod(found.recorded.shape[:2])),
        "moving_share": float(found.errors.moving_share.mean()),
    }
    for name in (field.name for field in fields(FrameQuality)):
        pair = {"reconstructed": found.errors.imagined, "repeated": found.errors.copied}
        told[name] = {who: _mean(getattr(quality, name)) for who, quality in pair.items()}
    return told


def _mean(values: NDArray[np.float64]) -> float | None:
    known = values[np.isfinite(values)]
    return float(known.mean()) if known.size else None
