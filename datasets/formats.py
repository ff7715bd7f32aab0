"""What every reader takes and gives; the readers themselves are listed in `open.py`."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scd_robot.datasets.schema import EpisodeDataset
from scd_robot.errors import ConfigError, DatasetError

__all__ = ["ReadOptions", "choose", "kept_episodes", "measured_control_dt", "parse_episodes"]

_LONGEST_DT = 2.0  # [s] between control steps; what is more is in other units
_WHOLE_RATE = 5e-4  # relative; half as far as 30 Hz is from television's 29.97


@dataclass(frozen=True)
class ReadOptions:
    """What to read of a recording, where its file leaves a choice.

    Attributes:
        keys: observation keys; None = all.
        action: array that holds the labels; None = the format's usual one.
        control_dt: seconds between control steps; None = what the file says.
        mask: only episodes in this list of the file (robomimic's mask/NAME); None = all.
        only: numbers of the episodes to read: 3, 5-9 (both included), 20- (to the last); None = all.
        drop: numbers of episodes to leave out, given likewise: damage in them then does not matter.
        frame_tolerance: how far the time of a video's frame may be from its row's [control steps].
        fill_missing: take Zarr chunks that are not there for fill values, as some writers mean it.
        cache: folder that keeps what was read from a remote store; None = nothing is kept.
        check: refuse NaN and infinite values, and episodes of one step.
    """

    keys: Sequence[str] | None = None
    action: str | None = None
    control_dt: float | None = None
    mask: str | None = None
    only: Sequence[str] | None = None
    drop: Sequence[str] | None = None
    frame_tolerance: float = 0.5
    fill_missing: bool = False
    cache: str | None = None
    check: bool = True

    def __post_init__(self) -> None:
        if self.control_dt is not None and not 0 < self.control_dt < float("inf"):
            raise ConfigError(f"control_dt must be a positive time [s], got {self.control_dt}")
        if self.keys is not None and not self.keys:
            raise ConfigError("keys must name at least one observation; leave it out for all")
        if not self.frame_tolerance > 0:
            raise ConfigError(f"frame_tolerance must be a positive number of control steps, got {self.frame_tolerance}")


def measured_control_dt(times: NDArray[np.float64], ends: NDArray[np.int64]) -> float | None:
    """Seconds between control steps by the times (N,) [s] of N steps, in episodes that end at `ends` (E,), cumulative.

    It is the median within episodes, and of a rate that is nearly a whole number of hertz, as times that were rounded
    give it, the exact one; None where time does not pass, or too fast for seconds.
    """
    inner = ends[(ends > 0) & (ends < len(times))]
    steps = np.delete(np.diff(times), inner - 1)
    median = float(np.median(steps)) if len(steps) else 0.0
    if not 1e-6 < median < _LONGEST_DT:
        return None
    rate = round(1 / median)
    return 1 / rate if rate and abs(rate * median - 1) < _WHOLE_RATE else round(median, 9)


def choose(dataset: EpisodeDataset, options: ReadOptions) -> EpisodeDataset:
    """The episodes that `only` and `drop` leave of a dataset; raises as `kept_episodes`."""
    if options.only is None and options.drop is None:
        return dataset
    return dataset.select(kept_episodes(options, dataset.num_episodes, dataset.spec.source))


def kept_episodes(options: ReadOptions, count: int, source: str) -> NDArray[np.int64]:
    """Numbers of the episodes that `only` and `drop` leave of `count`, ascending.

    Raises:
        ConfigError: they are malformed, or name episodes that there are not.
        DatasetError: none is left.
    """
    keep = np.ones(count, bool)
    if options.only is not None:
        keep &= np.isin(np.arange(count), parse_episodes(options.only, count))
    if options.drop is not None:
        keep &= ~np.isin(np.arange(count), parse_episodes(options.drop, count))
    if count and not keep.any():
        raise DatasetError(f"no episode is left of the {count} of {source}; choose others")
    return np.flatnonzero(keep)


def parse_episodes(texts: Sequence[str], count: int) -> NDArray[np.int64]:
    """Episode numbers from texts such as "3", "5-9" (both included) and "20-".

    Raises:
        ConfigError: not of that form, or there is no such episode.
    """
    chosen: list[int] = []
    for text in texts:
        match = re.fullmatch(r"(\d+)(?:(-)(\d*))?", text)
        if match is None:
            raise ConfigError(f"episodes are given as NUMBER, FIRST-LAST or FIRST-, got {text!r}")
        first = int(match[1])
        last = first if match[2] is None else int(match[3] or count - 1)
        if last < first or last >= count:
            raise ConfigError(f"{text!r} does not name episodes of 0 to {count - 1}")
        chosen += range(first, last + 1)
    return np.array(chosen, np.int64)
