"""Numbers that summarise an evaluation: success rate with its interval, percentiles, time to success."""

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any

import numpy as np

from scd_robot.errors import ConfigError

__all__ = ["mean_and_median", "percentiles", "wilson_interval"]


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
