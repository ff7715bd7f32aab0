"""Time for a control loop: the machine's monotonic clock, or a virtual one for tests, and a grid of deadlines."""

import math
import time
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from scd_robot.errors import ConfigError

__all__ = ["Clock", "MonotonicClock", "Pacer", "VirtualClock"]

_MOST_LATE = 0.5  # of a period: a tick that would come later is left out
LATENESS_EDGES_MS = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0)


class Clock(Protocol):
    """Seconds that never go back."""

    def now(self) -> float:
        """The present time [s]."""
        ...

    def sleep_until(self, time_s: float) -> None:
        """Returns at that time [s] or later; at once where it has passed."""
        ...


class MonotonicClock:
    """The system's monotonic clock, which all processes of a machine share."""

    def now(self) -> float:
        """The present time [s]."""
        return time.monotonic()

    def sleep_until(self, time_s: float) -> None:
        """Sleeps until that time [s]."""
        while (left := time_s - time.monotonic()) > 0:
            time.sleep(left)


class VirtualClock:
    """Time that passes only where somebody sleeps or `advance` is called.

    Attributes:
        late_s: the next sleep ends so much later than asked; then it is 0 again.
    """

    def __init__(self) -> None:
        self._now = 0.0
        self.late_s = 0.0

    def now(self) -> float:
        """The present time [s]."""
        return self._now

    def sleep_until(self, time_s: float) -> None:
        """Jumps to that time [s]."""
        self._now = max(self._now, time_s) + self.late_s
        self.late_s = 0.0

    def advance(self, seconds: float) -> None:
        """Lets time pass while something is computed [s]."""
        self._now += seconds


class Pacer:
    """Ticks at start + n * period, in absolute time, so that lateness does not add up.

    Ticks that were missed are not made up for: whoever comes back half a period late or more waits for the next one.

    Attributes:
        missed: ticks that were left out.
    """

    def __init__(self, clock: Clock, period_s: float) -> None:
        if not period_s > 0:
            raise ConfigError(f"the period must be positive [s], got {period_s}")
        self._clock = clock
        self._period = period_s
        self._start = clock.now()
        self._tick = -1
        self._late = np.zeros(len(LATENESS_EDGES_MS) + 1, np.int64)
        self._worst_s = 0.0
        self.missed = 0

    def wait(self) -> int:
        """Sleeps until the next tick and returns its number."""
        done = (self._clock.now() - self._start) / self._period  # in ticks
        following = self._tick + 1
        if self._tick >= 0:
            following = max(following, math.ceil(done - _MOST_LATE))
        self.missed += following - self._tick - 1
        self._tick = following
        self._clock.sleep_until(self._start + following * self._period)
        late = max(0.0, self.lateness_s)
        self._worst_s = max(self._worst_s, late)
        self._late[np.searchsorted(LATENESS_EDGES_MS, 1e3 * late, side="right")] += 1
        return following

    @property
    def lateness_s(self) -> float:
        """How long ago the tick that `wait` returned was due [s]."""
        return self._clock.now() - self._start - self._tick * self._period

    def report(self) -> dict[str, Any]:
        """Ticks, missed ones, and how late they came: counts below each edge [ms], and above the last."""
        counts: NDArray[np.int64] = self._late
        return {
            "ticks": int(counts.sum()),
            "missed": self.missed,
            "worst_late_ms": 1e3 * self._worst_s,
            "late_ms_edges": list(LATENESS_EDGES_MS),
            "late_counts": counts.tolist(),
        }
