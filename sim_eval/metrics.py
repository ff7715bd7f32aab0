"""Numbers that summarise an evaluation: success rate with its interval, percentiles, time to success."""

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any

import numpy as np

from scd_robot.errors import ConfigError

__all__ = ["bootstrap_mean_interval", "mean_and_median", "percentiles", "wilson_interval"]

_DRAWN_AT_ONCE = 1_000_000  # numbers


def wilson_interval(successes: float, n: float, confidence: float = 0.95) -> tuple[float, float]:
    """Score interval of a proportion (Wilson 1927); sensible for few episodes and for rates of 0 and 1.

    Args:
        successes: number of successes, 0 <= successes <= n; need not be whole (expected counts).
        n: number of trials; 0 gives (0.0, 1.0), nothing is known.
        confidence: of the two-sided interval, between 0 and 1.

    Returns:
        Lower and upper bound in [0, 1].

    Raises:
        ConfigError: a number is out of range.
    """
    if not 0 <= successes <= n:
        raise ConfigError(f"successes must be between 0 and n = {n}, got {successes}")
    if not 0 < confidence < 1:
        raise ConfigError(f"confidence must be between 0 and 1, got {confidence}")
    if n == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    rate = successes / n
    centre = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    # At the ends the bounds are exactly 0 and 1; rounding would put them a hair off.
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == n else centre + half
    return low, high


def bootstrap_mean_interval(values: Sequence[float], draws: int = 10_000, seed: int = 0) -> tuple[float, float] | None:
    """95 % percentile interval of a mean by the bootstrap (Efron 1979); None of fewer than two values.

    Args:
        values: (N,), independent of each other.
        draws: of the bootstrap.
        seed: of the draws: the same values have the same interval.
    """
    if len(values) < 2:
        return None
    array, rng = np.asarray(values, np.float64), np.random.default_rng(seed)
    means = np.empty(draws)
    block = max(_DRAWN_AT_ONCE // len(array), 1)
    for start in range(0, draws, block):
        count = min(block, draws - start)
        means[start : start + count] = array[rng.integers(len(array), size=(count, len(array)))].mean(axis=1)
    low, high = np.percentile(means, (2.5, 97.5))
    return float(low), float(high)


def percentiles(values: Sequence[float]) -> dict[str, Any] | None:
    """The 50th, 95th and 99th percentile as `{"p50", "p95", "p99", "count"}`, or None without values."""
    if not len(values):
        return None
    p50, p95, p99 = (float(p) for p in np.percentile(np.asarray(values, np.float64), (50, 95, 99)))
    return {"p50": p50, "p95": p95, "p99": p99, "count": len(values)}


def mean_and_median(values: Sequence[float]) -> dict[str, float] | None:
    """Mean and median as `{"mean", "median"}`, or None without values."""
    if not len(values):
        return None
    array = np.asarray(values, np.float64)
    return {"mean": float(array.mean()), "median": float(np.median(array))}
