"""What is in a dataset, as numbers and as a table to read."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from scd_robot.datasets.lazy import LazyArray, RowArray
from scd_robot.datasets.schema import EpisodeDataset, row_blocks

__all__ = ["describe", "format_description"]

_SAMPLED_ROWS = 256  # of an array on disk
_MAX_DIMENSIONS = 64  # numbers per step above which statistics are taken over all but the last axis (channels)


def describe(dataset: EpisodeDataset) -> dict[str, Any]:
    """Sizes and statistics, as plain JSON types.

    Returns:
        `source`, `control_dt` [s], `action_kind` (see `types.ActionKind`), `episodes`, `steps`, `duration_s`, `length`
        (min, mean, max), `bytes` in memory, `metadata`, and `keys`: for each array `shape` (without time), `dtype`,
        `bytes`, and lists `min`, `max`, `mean`, `std` by dimension (by channel for images and other arrays of more than
        64 numbers per step), and `sampled`, the number of steps they were taken from: all, but of images on disk 256
        that are evenly spaced.
    """
    lengths = dataset.episode_lengths
    return {
        "source": dataset.spec.source,
        "control_dt": dataset.spec.control_dt,
        "action_kind": dataset.spec.action_kind,
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
                "sampled": len(sample := _sample(array)),
                **{name: values.tolist() for name, values in _statistics(sample).items()},
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
        *([f"actions   {description['action_kind']}"] if description["action_kind"] else []),
        f"unpacked  {description['bytes'] / 1e6:.1f} MB",
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
    sampled = [key for key, entry in description["keys"].items() if entry["sampled"] < description["steps"]]
    if sampled:
        lines.append(f"statistics of {', '.join(sampled)}: of {_SAMPLED_ROWS} frames, evenly spaced")
    return "\n".join(lines)


def _sample(array: RowArray) -> RowArray:
    if not isinstance(array, LazyArray) or len(array) <= _SAMPLED_ROWS:
        return array
    return array[np.linspace(0, len(array) - 1, _SAMPLED_ROWS).astype(np.int64)]


def _statistics(array: RowArray) -> dict[str, NDArray[np.float64]]:
    """min, max, mean, std (D,) of an array (N, ...), in float64, without a float64 copy of the whole."""
    numbers = int(np.prod(array.shape[1:]))
    width = numbers if numbers <= _MAX_DIMENSIONS else array.shape[-1]
    count = array.shape[0] * numbers / width
    total, lowest, highest = np.zeros(width), np.full(width, np.inf), np.full(width, -np.inf)
    squares = np.zeros(width)
    shift = np.asarray(array[:1], np.float64).reshape(-1, width).mean(axis=0)  # near the mean: squares stay small
    for _, block in row_blocks(array):
        flat = block.reshape(-1, width).astype(np.float64) - shift
        total += flat.sum(axis=0)
        squares += (flat**2).sum(axis=0)
        lowest, highest = np.minimum(lowest, flat.min(axis=0)), np.maximum(highest, flat.max(axis=0))
    mean = total / count
    return {
        "min": lowest + shift,
        "max": highest + shift,
        "mean": mean + shift,
        "std": np.sqrt(np.maximum(squares / count - mean**2, 0)),
    }
