"""From chunks of actions to one target per control step.

- `receding`: actions in order; the next chunk replaces the rest as soon as it is there.
- `prefix`: the same, and the next plan is given the actions that will be carried out while it is made, and begins with
  them (training-time real-time chunking, arXiv 2512.05964), so that chunks join without a jump.
- `guided`: the same, and the next plan is guided towards all that is left of the running chunk, less the farther ahead
  it is (arXiv 2506.07339): no training for it, a pass back through the network at each denoising step.
  `guided_identity` leaves that pass out.
- `synchronous`: s actions, then the robot stands still until the next chunk is there.
- `ensemble`: plans as often as they come, and the mean of what all chunks say about this control step, older chunks
  with more weight (arXiv 2304.13705).

Shapes: Ta chunk length, Da action width.
"""

from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from scd_robot.control.delay import DelayConfig, Split
from scd_robot.control.interfaces import Command
from scd_robot.errors import ConfigError
from scd_robot.types import ActionArray

__all__ = ["ChunkExecutor", "ExecutionConfig", "Strategy"]

Strategy = Literal["receding", "prefix", "guided", "guided_identity", "synchronous", "ensemble"]


@dataclass(frozen=True)
class ExecutionConfig:
    """How chunks are carried out.

    Attributes:
        strategy: see above.
        num_executed: actions between requests for plans (not for `ensemble`); None = the policy's.
        max_gain: beta of the guided strategies; no more than the policy has denoising steps.
        ensemble_decay: m of the weights exp(-m i), i = 0 for the oldest chunk.
        delay: how the delay of a plan is guessed.
    """

    strategy: Strategy = "prefix"
    num_executed: int | None = None
    max_gain: float = 5.0
    ensemble_decay: float = 0.01
    delay: DelayConfig = field(default_factory=DelayConfig)

    def __post_init__(self) -> None:
        if self.strategy not in get_args(Strategy):
            raise ConfigError(f"strategy must be one of {', '.join(get_args(Strategy))}, got {self.strategy!r}")
        if self.num_executed is not None and self.num_executed < 1:
            raise ConfigError(f"num_executed must be at least 1, got {self.num_executed}")
        if not self.ensemble_decay >= 0:
            raise ConfigError(f"ensemble_decay must not be negative, got {self.ensemble_decay}")
        if not 0 < self.max_gain < float("inf"):
            raise ConfigError(f"max_gain must be positive and finite, got {self.max_gain}")

    @property
    def is_guided(self) -> bool:
        """Whether plans are guided towards the running chunk."""
        return self.strategy in ("guided", "guided_identity")


@dataclass
class _Running:
    chunk: NDArray[np.float64]  # (Ta, Da)
    at: float  # index of the next action


class ChunkExecutor:
    """Follows chunks, and counts actions that were consumed: at the rate 1 one per control step, less when slowed down.

    Args:
        config: how.
        rest: (Da,) see `Limits`: a slowed increment is shorter, a slowed place is reached later.

    Attributes:
        consumed: actions since the beginning.
    """

    def __init__(self, config: ExecutionConfig, rest: tuple[float | None, ...]) -> None:
        self._ensemble = config.strategy == "ensemble"
        self._decay = config.ensemble_decay
        self._rest = np.array([np.nan if value is None else value for value in rest], np.float64)
        self._running: list[_Running] = []  # oldest first
        self.consumed = 0.0

    def clear(self) -> None:
        """Forgets all chunks."""
        self._running = []

    def accept(self, chunk: ActionArray, consumed: float) -> bool:
        """Follows a new chunk from now on.

        Args:
            chunk: (Ta, Da).
            consumed: actions that were consumed since the observation that it was made from.

        Returns:
            False where nothing of it is left to be done.
        """
        if consumed > len(chunk) - 1:
            return False
        kept = self._running if self._ensemble else []
        self._running = [*kept, _Running(np.asarray(chunk, np.float64), consumed)]
        return True

    def take(self, rate: float = 1.0) -> Command | None:
        """The target (Da,) of this control step; None where no chunk has one.

        Args:
            rate: of the playing of the chunk, in (0, 1].
        """
        self._running = [one for one in self._running if one.at <= len(one.chunk) - 1]
        if not self._running:
            return None
        said = np.stack([_at(one.chunk, one.at) for one in self._running])
        weights = np.exp(-self._decay * np.arange(len(said)))
        target: Command = weights @ said / weights.sum() if len(said) > 1 else said[0]
        for one in self._running:
            one.at += rate
        self.consumed += rate
        return np.where(np.isnan(self._rest), target, self._rest + rate * (target - self._rest))

    def upcoming(self, count: int) -> NDArray[np.float64]:
        """(n, Da) the next targets at the rate 1, at most `count`."""
        if not self._running:
            return np.zeros((0, len(self._rest)))
        newest = self._running[-1]
        indices = newest.at + np.arange(count)
        there = indices[indices <= len(newest.chunk) - 1 + 1e-9]
        return np.reshape([_at(newest.chunk, index) for index in there], (len(there), len(self._rest)))

    def wants_plan(self, split: Split) -> bool:
        """Whether the next plan is to be asked for in this control step."""
        if self._ensemble or not self._running:
            return True
        return self._running[-1].at >= split.num_executed - 1e-9


def _at(chunk: NDArray[np.float64], index: float) -> Command:
    """The action at an index, between two of them linearly."""
    lower = min(int(index), len(chunk) - 1)
    share = index - lower
    if share <= 0 or lower + 1 >= len(chunk):
        return np.array(chunk[lower])
    return np.asarray((1 - share) * chunk[lower] + share * chunk[lower + 1])
