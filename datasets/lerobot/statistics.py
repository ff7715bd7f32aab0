"""Statistics that a LeRobot dataset carries for each episode and for all: ranges, moments, quantiles.

Shapes: T steps of an episode, n images H W C; "count" of steps or images is (1,).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["histogram", "image_stats", "joined", "number_stats"]

_QUANTILES = {"q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}


def number_stats(values: NDArray[Any]) -> dict[str, NDArray[Any]]:
    """Statistics (...) over the steps of (T, ...), (1,) where there is one number per step."""
    numbers = values.astype(np.float64).reshape(len(values), *(values.shape[1:] or (1,)))
    stats = {"min": numbers.min(0), "max": numbers.max(0), "mean": numbers.mean(0), "std": numbers.std(0)}
    stats["count"] = np.array([len(values)])
    return stats | dict(zip(_QUANTILES, np.quantile(numbers, list(_QUANTILES.values()), axis=0), strict=True))


def histogram(images: NDArray[np.uint8]) -> NDArray[np.int64]:
    """(C, 256) how often each value occurs in images (n, H, W, C)."""
    return np.stack([np.bincount(images[..., c].reshape(-1), minlength=256) for c in range(images.shape[-1])])


def image_stats(counts: NDArray[np.int64], images: int) -> dict[str, NDArray[Any]]:
    """Statistics (C, 1, 1) of images with values of 0 to 1, from their `histogram` (C, 256)."""
    values = np.arange(256) / 255
    total = counts.sum(1)
    below = np.cumsum(counts, 1) / total[:, None]
    mean = counts @ values / total
    stats = {
        "min": values[np.argmax(counts > 0, 1)],
        "max": values[255 - np.argmax(counts[:, ::-1] > 0, 1)],
        "mean": mean,
        "std": np.sqrt(np.maximum(counts @ values**2 / total - mean**2, 0)),
    }
    stats |= {name: values[np.argmax(below >= share, 1)] for name, share in _QUANTILES.items()}
    return {name: value[:, None, None] for name, value in stats.items()} | {"count": np.array([images])}


def joined(parts: Sequence[dict[str, NDArray[Any]]]) -> dict[str, NDArray[Any]]:
    """Statistics of all episodes from those of each; quantiles are averaged, as LeRobot does."""
    counts = np.array([part["count"][0] for part in parts])

    def average(values: Sequence[NDArray[Any]]) -> NDArray[Any]:
        return np.asarray(np.tensordot(counts / counts.sum(), np.stack(values), axes=1))

    mean = average([part["mean"] for part in parts])
    squares = average([part["std"] ** 2 + (part["mean"] - mean) ** 2 for part in parts])
    return {
        "min": np.min([part["min"] for part in parts], axis=0),
        "max": np.max([part["max"] for part in parts], axis=0),
        "mean": mean,
        "std": np.sqrt(squares),
        "count": counts.sum(keepdims=True),
        **{name: average([part[name] for part in parts]) for name in _QUANTILES},
    }
