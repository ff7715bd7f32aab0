"""Tells images from other arrays, and brings them into one form: uint8, (N, H, W, C)."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from scd_robot.datasets.float32 import as_float32
from scd_robot.datasets.lazy import MappedArray, RowArray
from scd_robot.datasets.schema import row_blocks
from scd_robot.errors import DatasetError

__all__ = ["as_stored", "is_image"]

_CHANNELS = (1, 3, 4)
_SAMPLED_ROWS = 8
_COMPRESSED = {b"\xff\xd8\xff": "JPEG", b"\x89PN": "PNG"}  # first bytes of such files
_SMALLEST_SIDE = 24  # of an array (N, H, W) that is taken for pictures


def is_image(shape: tuple[int, ...], dtype: np.dtype[Any]) -> bool:
    """Whether an array (N, ...) of this shape is one of images, (N, H, W, C) or (N, C, H, W)."""
    if len(shape) != 4 or min(shape[1:]) < 1:
        return False
    if dtype == np.uint8:
        return True
    last, first = shape[3] in _CHANNELS and min(shape[1:3]) > 4, shape[1] in _CHANNELS and min(shape[2:]) > 4
    return (last or first) and dtype.kind in "uif"


def as_stored(array: RowArray, name: str) -> RowArray:
    """An array of a recording as `EpisodeDataset` wants it.

    Images become uint8 (N, H, W, C): floating-point ones of 0 to 255, or of 0 to 1, only where nothing is lost by it
    (others, depth and masks for example, stay float32). Pictures without a channel axis (N, H, W) get one. All else
    becomes float32 (N, ...), and a vector (N, 1).

    Raises:
        DatasetError: rows (N, bytes) of JPEG or PNG files, which would pass for vectors; or the pictures of several
            cameras in one array.
    """
    if array.dtype == np.uint8 and len(array.shape) > 4 and array.shape[1] > 1 and max(array.shape[2:]) > _CHANNELS[-1]:
        raise DatasetError(
            f"{name} holds pictures {tuple(array.shape)} of several cameras in one array, which are not read; store "
            "each camera in one of its own, uint8 (T, height, width, channel), or name other keys with --keys"
        )
    if len(array.shape) == 3 and min(array.shape[1:]) >= _SMALLEST_SIDE:
        array = MappedArray(array, _with_channel, (*array.shape[1:], 1), array.dtype)
    if is_image(array.shape, array.dtype):
        if array.shape[3] not in _CHANNELS and array.shape[1] in _CHANNELS:
            array = MappedArray(array, _channels_last, (*array.shape[2:], array.shape[1]), array.dtype)
        if array.dtype == np.uint8:
            return array
        scale = _scale(array)
        if scale is not None:
            return MappedArray(array, _ToBytes(scale, name), array.shape[1:], np.uint8)
        return MappedArray(array, _to_float, array.shape[1:], np.float32)
    if array.dtype == np.uint8 and len(array.shape) == 2 and len(array) and bytes(array[0][:3]) in _COMPRESSED:
        raise DatasetError(
            f"{name} holds compressed pictures ({_COMPRESSED[bytes(array[0][:3])]}), a row of bytes each, which are "
            "not read; store them decoded, uint8 (T, height, width, channel), or name other keys with --keys"
        )
    values = np.asarray(array[:])
    return as_float32(values[:, None] if values.ndim == 1 else values, name)


def _scale(array: RowArray) -> int | None:
    """255 for images of 0 to 1, 1 for whole numbers of 0 to 255, None for others.

    Whole numbers, which may be those of objects, are all looked at, others in some rows.
    """
    if not len(array):
        return None
    if array.dtype.kind in "ui":
        return 1 if all(block.min() >= 0 and block.max() <= 255 for _, block in row_blocks(array)) else None
    rows = np.unique(np.linspace(0, len(array) - 1, min(len(array), _SAMPLED_ROWS)).astype(np.int64))
    some = np.asarray(array[rows], np.float64)
    if not np.isfinite(some).all() or some.min() < 0 or some.max() > 255:
        return None
    if array.dtype.kind == "f" and np.isin(some, (0, 1)).all():
        return None  # a mask
    if array.dtype.kind == "f" and some.max() <= 1:
        return 255 if np.abs(some * 255 - np.round(some * 255)).max() < 1e-2 else None
    return 1 if (some == np.round(some)).all() else None


class _ToBytes:
    """Floating-point images to uint8, refused where that would change them."""

    def __init__(self, scale: int, name: str) -> None:
        self._scale, self._name = scale, name

    def __call__(self, images: NDArray[Any]) -> NDArray[np.uint8]:
        scaled = images * self._scale if self._scale != 1 else images
        whole = np.round(scaled)
        # NaN fails both comparisons.
        fits = (np.abs(scaled - whole) < 1e-2) & (np.abs(whole - 127.5) <= 127.5)
        if not fits.all():
            raise DatasetError(
                f"{self._name} holds whole numbers of 0 to 255 in some rows that were looked at"
                f"{', divided by 255' if self._scale != 1 else ''}, but {images[~fits][0]} in others; leave it out "
                "with --keys, or store its pictures as uint8"
            )
        return whole.astype(np.uint8)


def _with_channel(images: NDArray[Any]) -> NDArray[Any]:
    return images[..., None]


def _channels_last(images: NDArray[Any]) -> NDArray[Any]:
    return np.ascontiguousarray(np.moveaxis(images, 1, -1))


def _to_float(images: NDArray[Any]) -> NDArray[np.float32]:
    return images.astype(np.float32)
