"""Pictures of a training batch are moved and coloured at random, the same way all through an episode segment.

A camera does not jump about between two control steps: what moves in the pictures of a segment has moved.

Shapes: B segments, T control steps, V cameras (their keys sorted), H W C picture.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scd_robot.errors import ConfigError

__all__ = ["AugmentationConfig", "augmented", "color_jitter"]


@dataclass(frozen=True)
class AugmentationConfig:
    """What is done to pictures in training only; all 0 = nothing.

    Attributes:
        shift: pictures are moved by up to this part of their sides, whole pixels, edges repeated, which is a random
            crop of the padded picture (Kostrikov et al., arXiv 2004.13649). Where the camera stands still and places in
            the picture matter, it costs precision.
        brightness: factors are drawn from 1 - this to 1 + this; likewise the others.
        contrast: about the mean grey.
        saturation: about each pixel's grey.
    """

    shift: float = 0.03
    brightness: float = 0.1
    contrast: float = 0.1
    saturation: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.shift < 0.5:
            raise ConfigError(f"augmentation.shift must be in [0, 0.5), got {self.shift}")
        for name in ("brightness", "contrast", "saturation"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"augmentation.{name} must be in [0, 1], got {getattr(self, name)}")

    @property
    def is_on(self) -> bool:
        """Whether anything is done."""
        return any((self.shift, self.brightness, self.contrast, self.saturation))

    def draw(self, cameras: int, rng: np.random.Generator) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Of one segment the shifts (V, 2) in units of height and width, and the colour factors (V, 3)."""
        spread = (self.brightness, self.contrast, self.saturation)
        shift = self.shift * rng.uniform(-1, 1, (cameras, 2))
        colour = 1 + np.array(spread) * rng.uniform(-1, 1, (cameras, 3))
        return shift.astype(np.float32), colour.astype(np.float32)


def augmented(observation: Mapping[str, Tensor], shift: Tensor, colour: Tensor) -> dict[str, Tensor]:
    """Observations with their pictures (B, T, H, W, C), uint8 by key, moved and coloured.

    Args:
        observation: by key; what is not uint8 stays as it is.
        shift: (B, V, 2) as `AugmentationConfig.draw` gives it, or (0, ...) = pictures stay as they are.
        colour: (B, V, 3).
    """
    changed = dict(observation)
    if not len(shift):
        return changed
    keys = sorted(key for key, value in observation.items() if value.dtype == torch.uint8)
    for camera, key in enumerate(keys):
        changed[key] = _coloured(_moved(observation[key], shift[:, camera]), colour[:, camera])
    return changed


def _moved(images: Tensor, shift: Tensor) -> Tensor:
    """One copy of pictures (B, T, H, W, C), moved by `shift` (B, 2)."""
    height, width = images.shape[2:4]
    pixels = (shift * shift.new_tensor((height, width))).round().long()
    row = (torch.arange(height, device=images.device) - pixels[:, :1]).clamp(0, height - 1)
    column = (torch.arange(width, device=images.device) - pixels[:, 1:]).clamp(0, width - 1)
    source = (row[:, :, None] * width + column[:, None]).flatten(1)
    flat = images.flatten(2, 3)
    moved = torch.empty_like(flat)
    for segment, index in enumerate(source):
        torch.index_select(flat[segment], 1, index, out=moved[segment])
    return moved.view_as(images)


def _coloured(images: Tensor, factors: Tensor) -> Tensor:
    """Pictures (B, T, H, W, C) changed in place, a segment at a time, so that little of them is floating-point at once.

    Grey pictures have no saturation; a fourth channel is no colour and stays.
    """
    for segment, factor in zip(images, factors, strict=True):
        colours = segment[..., :3].movedim(-1, 1).float() / 255
        jittered = color_jitter(colours.expand(-1, 3, -1, -1), factor.expand(len(segment), -1))
        segment[..., :3] = (jittered[:, : colours.shape[1]] * 255).round().to(torch.uint8).movedim(1, -1)
    return images


def color_jitter(images: Tensor, factors: Tensor) -> Tensor:
    """Brightness, contrast and saturation of images (B, 3, H, W) in [0, 1], each blended by a factor, then clipped.

    Args:
        images: float.
        factors: (B, 3) of brightness (times black), contrast (from the mean grey) and saturation (from the pixel's
            grey); 1 changes nothing.
    """
    brightness, contrast, saturation = (factor[:, None, None, None] for factor in factors.unbind(1))
    images = (images * brightness).clamp(0, 1)
    mean = _grey(images).mean(dim=(2, 3), keepdim=True)
    images = (mean + contrast * (images - mean)).clamp(0, 1)
    grey = _grey(images)
    return (grey + saturation * (images - grey)).clamp(0, 1)


def _grey(images: Tensor) -> Tensor:
    """(B, 1, H, W) luminance, ITU-R BT.601."""
    weight = images.new_tensor((0.299, 0.587, 0.114))
    return (images * weight[:, None, None]).sum(1, keepdim=True)
