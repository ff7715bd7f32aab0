"""Numbers of a recording as float32, in which models and robots have them here."""

import logging
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["as_float32"]

logger = logging.getLogger(__name__)

_LARGE = 2.0**20  # magnitude from which float32 tells times and counts apart badly
_COARSE = 1e-3  # the step between neighbouring float32 that is worth a word, relative to the range of a dimension


def as_float32(values: NDArray[Any], name: str) -> NDArray[np.float32]:
    """(N, ...) as float32; told are dimensions that lose what they tell: times since 1970, counts of many millions.

    What is too large for float32 becomes infinite, which `EpisodeDataset.check` refuses.
    """
    values = np.asarray(values)
    with np.errstate(over="ignore"):
        narrowed = values.astype(np.float32, copy=False)
    if values.dtype.itemsize < 4 or values.dtype == np.float32 or not values.size:
        return narrowed
    flat = values.reshape(len(values), -1)
    lowest, highest = (np.asarray(end, np.float64) for end in (np.fmin.reduce(flat), np.fmax.reduce(flat)))
    largest, spread = np.fmax(np.abs(lowest), np.abs(highest)), highest - lowest
    with np.errstate(over="ignore", invalid="ignore"):
        step = np.spacing(largest.astype(np.float32)).astype(np.float64)
        coarse = np.flatnonzero((largest >= _LARGE) & (spread > 0) & (step > _COARSE * spread))
    if len(coarse):
        first = coarse[0]
        logger.warning(
            "%s holds %s too large for float32 to tell apart: of dimension %d, %.9g to %.9g, only every %g is kept; "
            "subtract what they have in common and record them anew, or leave them out",
            name,
            values.dtype,
            first,
            lowest[first],
            highest[first],
            step[first],
        )
    return narrowed
