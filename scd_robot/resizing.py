"""Crops and resizes pictures: by torch where it is loaded, otherwise as torch does, to the bit, without it.

Bilinear with antialiasing, uint8. Both ways follow Pillow: one pass along each axis with integer weights, rounded to
uint8 after each.

Shapes: (..., H, W, C) pictures.
"""

import functools
import json
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["crop_and_resize", "resize", "told_resizing"]

_MOST_BITS = 22


def crop_and_resize(
    images: NDArray[np.uint8], crop: tuple[int, ...] = (), size: tuple[int, ...] = ()
) -> NDArray[np.uint8]:
    """Images (..., H, W, C) uint8 cropped about their centre, then resized (bilinear, with antialiasing)."""
    height, width = images.shape[-3:-1]
    if crop:
        top, left = (height - crop[0]) // 2, (width - crop[1]) // 2
        images = images[..., top : top + crop[0], left : left + crop[1], :]
    if not size or tuple(size) == images.shape[-3:-1]:
        return images
    if "torch" not in sys.modules:  # a policy that was exported: the same to the bit, but ten times slower
        return resize(images, size)
    import torch

    tensor = torch.from_numpy(images.reshape(-1, *images.shape[-3:]))
    resized = torch.nn.functional.interpolate(
        tensor.movedim(-1, 1), tuple(size), mode="bilinear", antialias=True, align_corners=False
    )
    return resized.movedim(1, -1).numpy().reshape(*images.shape[:-3], *size, images.shape[-1])


def resize(images: NDArray[np.uint8], size: tuple[int, ...]) -> NDArray[np.uint8]:
    """Pictures (..., H, W, C) as (..., *size, C)."""
    return _along(_along(images, -2, size[1]), -3, size[0])


def _along(images: NDArray[np.uint8], axis: int, target: int) -> NDArray[np.uint8]:
    source = images.shape[axis]
    if source == target:
        return images
    indices, weights, bits = _taps(source, target)
    shape = [target if i == images.ndim + axis else 1 for i in range(images.ndim)]
    total: Any = np.int32(1 << (bits - 1))
    for index, weight in zip(indices, weights, strict=True):
        total = total + images.take(index, axis) * weight.reshape(shape)
    return np.clip(total >> bits, 0, 255).astype(np.uint8)


@functools.lru_cache(maxsize=64)
def _taps(source: int, target: int) -> tuple[NDArray[np.int64], NDArray[np.int32], int]:
    """Of each output place the input places (taps, target), their weights, and the bits of a weight's fraction."""
    support = max(1.0, source / target)
    centre = source / target * (np.arange(target) + 0.5)
    first = np.maximum((centre - support + 0.5).astype(np.int64), 0)
    last = np.minimum((centre + support + 0.5).astype(np.int64), source)
    index = first[:, None] + np.arange(int((last - first).max()))
    weight = np.maximum(0, 1 - np.abs((index - centre[:, None] + 0.5) / support)) * (index < last[:, None])
    weight /= weight.sum(axis=1, keepdims=True)
    bits = 0
    while bits < _MOST_BITS and 0.5 + weight.max() * 2 ** (bits + 1) < 2**15:  # weights are 16 bits wide
        bits += 1
    return np.minimum(index, source - 1).T, np.floor(weight * 2**bits + 0.5).astype(np.int32).T, bits


def told_resizing(key: str, size: Sequence[int]) -> str:
    """What a message says that is to be done, for a shell: pictures of an observation made H x W."""
    transforms = {"images": [{"key": key, "crop": [], "size": list(size)}]}
    return f"resize them with --transforms '{json.dumps(transforms)}'"
