"""The latest of many numbers, in memory that does not grow. numpy only."""

import numpy as np
from numpy.typing import NDArray

__all__ = ["Latest"]


class Latest:
    """The latest `most` of the numbers that were appended; their memory is taken at once.

    A deque of as many Python floats takes four times as much, and grows to that for as long as it is not full: over
    hours, in a control loop whose memory is to stay as it is.
    """

    def __init__(self, most: int) -> None:
        self._values = np.full(most, np.nan)  # written to, so that it is taken now
        self._count = 0

    def append(self, value: float) -> None:
        """Adds a number, in the place of the oldest where all places are taken."""
        self._values[self._count % len(self._values)] = value
        self._count += 1

    def values(self) -> NDArray[np.float64]:
        """What is kept, oldest first, as a copy."""
        kept = min(self._count, len(self._values))
        return self._values[np.arange(self._count - kept, self._count) % len(self._values)]
