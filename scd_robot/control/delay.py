"""How many control steps pass while a plan is made, and what that leaves of a chunk.

Names of arXiv 2506.07339: H = chunk_length, s = num_executed, d = delay_steps; d <= s <= H - d.
"""

from collections import deque
from dataclasses import dataclass

import numpy as np

from scd_robot.errors import ConfigError

__all__ = ["DelayConfig", "DelayEstimator", "Split", "split_chunk"]


@dataclass(frozen=True)
class DelayConfig:
    """How the delay of the next plan is guessed from those before.

    Attributes:
        window: plans that are looked back on; what is older is forgotten.
        quantile: of their delays.
        warm_up: first plans of the process, which are slow and do not count.
        initial: delay_steps until there is one that counts.
    """

    window: int = 50
    quantile: float = 0.9
    warm_up: int = 3
    initial: int = 1

    def __post_init__(self) -> None:
        if self.window < 1 or self.warm_up < 0 or self.initial < 1:
            raise ConfigError(
                f"window and initial must be at least 1 and warm_up at least 0, got {self.window}, {self.initial} and "
                f"{self.warm_up}"
            )
        if not 0 < self.quantile <= 1:
            raise ConfigError(f"quantile must be in (0, 1], got {self.quantile}")


class DelayEstimator:
    """A quantile over a window of delays, in control steps that really passed.

    Not in actions that were consumed, by which a plan is joined to what runs (`ChunkExecutor.accept`): where plans are
    so late that actions run out, or are played slowly, those are fewer, and a guess from them would stay too short.
    """

    def __init__(self, config: DelayConfig) -> None:
        self._config = config
        self._seen = 0
        self._window: deque[int] = deque(maxlen=config.window)

    def add(self, steps: int) -> None:
        """Notes how many control steps passed between a plan's request and its arrival."""
        self._seen += 1
        if self._seen > self._config.warm_up:
            self._window.append(steps)

    @property
    def delay_steps(self) -> int:
        """The guess for the next plan, at least 1."""
        if not self._window:
            return self._config.initial
        return max(1, int(np.quantile(list(self._window), self._config.quantile, method="higher")))


@dataclass(frozen=True)
class Split:
    """How a chunk is used.

    Attributes:
        num_executed: s, actions after which the next plan is asked for.
        delay_steps: d, actions that are committed to while it is made.
        fits: False where the delay is too long for the chunk: the plan will be late, which the watchdog answers; or
            longer than the policy was trained for: fewer actions are committed to.
    """

    num_executed: int
    delay_steps: int
    fits: bool


def split_chunk(chunk_length: int, num_executed: int, delay_steps: int) -> Split:
    """Makes d <= s <= H - d true.

    A delay longer than s raises s to it; an s that leaves too little for the delay is lowered to H - d, so that plans
    are asked for earlier. A delay above H / 2 cannot be kept up with: it is taken as H // 2, and `fits` is False.
    """
    fits = 2 * delay_steps <= chunk_length
    delay = delay_steps if fits else chunk_length // 2
    return Split(min(max(num_executed, delay), chunk_length - delay), delay, fits)
