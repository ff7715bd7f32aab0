"""What is in a dataset, as numbers and as a table to read."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from scd_robot.datasets.schema import EpisodeDataset, row_blocks

__all__ = ["describe", "format_description"]

_MAX_DIMENSIONS = 64  # numbers per step above which statistics are taken over all but the last axis (channels)


def describe(dataset: EpisodeDataset) -> dict[str, Any]:
    """Sizes and statistics, as plain JSON types.

    Returns:
        `source`, `control_dt` [s], `episodes`, `steps`, `duration_s`, `length` (min, mean, max), `bytes` in memory,
        `metadata`, and `keys`: for each array `shape` (without time), `dtype`, `bytes`, and lists `min`, `max`, `mean`,
        `std` by dimension (by channel for images and other arrays of more than 64 numbers per step).
    """
    lengths = dataset.episode_lengths
    return {
        "source": dataset.spec.source,
        "control_dt": dataset.spec.control_dt,
        "episodes": dataset.num_episodes,
        "steps": dataset.num_steps,
        "duration_s": dataset.num_steps * dataset.spec.control_dt,
        "length": {"min": int(lengths.min()), "mean": float(lengths.mean()), "max": int(lengths.max())},
        "bytes": sum(array.nbytes for array in dataset.arrays.values()),
        "metadata": dict(dataset.metadata),
        "keys": {
            key: {
                "shape": list(array.shape[1:]),
                "dtype": str(array.dtype),
                "bytes": array.nbytes,
                **{name: values.tolist() for name, values in _statistics(array).items()},
            }
            for key, array in dataset.arrays.items()
        },
    }


def format_description(description: dict[str, Any]) -> str:
    """`describe`'s result as a table of one line per dimension."""
    length = description["length"]
    rate = 1.0 / description["control_dt"]
    lines = [
        f"source    {description['source']}",
        f"episodes  {description['episodes']}",
        f"steps     {description['steps']} ({description['duration_s']:.1f} s at {rate:.4g} Hz)",
        f"length    {length['min']} min, {length['mean']:.1f} mean, {length['max']} max [steps]",
        f"memory    {description['bytes'] / 1e6:.1f} MB",
        "",
    ]
    width = max(len("key"), *map(len, description["keys"]))
    head = f"{'key':<{width}}  {'shape':<12} {'dtype':<8} {'dim':>3}"
    lines.append(head + "".join(f" {name:>10}" for name in ("min", "max", "mean", "std")))
    for key, entry in description["keys"].items():
        shape = "x".join(map(str, entry["shape"]))
        for dimension, values in enumerate(zip(*(entry[n] for n in ("min", "max", "mean", "std")), strict=True)):
            first = (key, shape, entry["dtype"]) if dimension == 0 else ("", "", "")
            lines.append(
                f"{first[0]:<{width}}  {first[1]:<12} {first[2]:<8} {dimension:>3}"
                + "".join(f" {value:>10.4g}" for value in values)
            )
    return "\n".join(lines)


def _statistics(array: NDArray[Any]) -> dict[str, NDArray[np.float64]]:
    """min, max, mean, std (D,) of an array (N, ...), in float64, without a float64 copy of the whole."""
    flat = array.reshape(len(array), -1)
    if flat.shape[1] > _MAX_DIMENSIONS:
        flat = array.reshape(-1, array.shape[-1])
    mean = sum(block.sum(axis=0, dtype=np.float64) for _, block in row_blocks(flat)) / len(flat)
    square = sum(((block - mean) ** 2).sum(axis=0) for _, block in row_blocks(flat)) / len(flat)
    return {
        "min": flat.min(axis=0).astype(np.float64),
        "max": flat.max(axis=0).astype(np.float64),
        "mean": mean,
        "std": np.sqrt(square),
    }
