"""Bootstrap intervals over episodes: control steps of one episode depend on each other, episodes do not.

Shapes: E episodes, R resamples of them.
"""

import numpy as np
from numpy.typing import NDArray

from scd_robot.seeding import keyed_rng

__all__ = ["interval_of", "resampled_sums"]

_KEY = 4712
_RESAMPLES = 1000


def resampled_sums(parts: NDArray[np.float64], key: int = 0) -> NDArray[np.float64]:
    """Sums (R, ...) over E episodes drawn with replacement, of what each contributes (cluster bootstrap).

    Args:
        parts: (E, ...); fewer than two give NaN.
        key: other keys draw other episodes.
    """
    count = len(parts)
    if count < 2:
        return np.full((_RESAMPLES, *parts.shape[1:]), np.nan)
    rng, flat, even = keyed_rng(_KEY, key), parts.reshape(count, -1), np.full(count, 1 / count)
    sums = np.stack([rng.multinomial(count, even) @ flat for _ in range(_RESAMPLES)])
    return sums.reshape(_RESAMPLES, *parts.shape[1:])


def interval_of(values: NDArray[np.float64]) -> list[float] | None:
    """95 % percentile interval of resampled values (R,); None where none is known."""
    known = values[np.isfinite(values)]
    return [float(bound) for bound in np.percentile(known, (2.5, 97.5))] if len(known) else None
