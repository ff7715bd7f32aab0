"""Sensors at different rates, brought to the control steps of one episode.

Shapes: T control steps, n samples of one sensor.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from scd_robot.datasets.schema import PRESENT
from scd_robot.errors import ConfigError, DatasetError

__all__ = ["Stream", "align_streams", "latest_before"]


@dataclass(frozen=True)
class Stream:
    """What one sensor gave, at its own times.

    Attributes:
        time_s: (n,) increasing, on the clock of the other streams [s]; when the sample was available to the robot.
        values: (n, ...).
        mode: "latest" takes for each control step the newest sample that was there by then, as a robot would;
            "linear" interpolates, and looks into the future: for labels and records, not for what a policy sees.
        max_age_s: oldest sample that still counts with "latest"; older ones are marked as absent.
    """

    time_s: NDArray[np.float64]
    values: NDArray[Any]
    mode: Literal["latest", "linear"] = "latest"
    max_age_s: float = float("inf")


def align_streams(
    streams: Mapping[str, Stream], control_dt: float, mark_new: tuple[str, ...] = ()
) -> dict[str, NDArray[Any]]:
    """Arrays (T, ...) by key, at the control steps from when all streams have begun until the first one ends.

    Args:
        streams: by key.
        control_dt: seconds between control steps.
        mark_new: keys whose samples count only in the control step that first has them: a slow camera's frame is then
            encoded once, and absent in the steps until the next.

    Returns:
        The streams' values; "timestamp" (T,) [s] from the first control step on; and "present.KEY" (T,) bool for keys
        that may be absent in some steps (a finite `max_age_s`, or in `mark_new`): also where none is, since a store
        wants the same arrays in all episodes.

    Raises:
        DatasetError: times that do not increase, or no time at which all streams are there.
        ConfigError: `control_dt` is not positive; `mark_new` names no stream; a stream that is interpolated, and so is
            always there, has a `max_age_s` or is in `mark_new`.
    """
    if not control_dt > 0:
        raise ConfigError(f"control_dt must be positive [s], got {control_dt}")
    if unknown := sorted(set(mark_new) - streams.keys()):
        raise ConfigError(f"mark_new names {', '.join(unknown)}, but the streams are {', '.join(streams)}")
    for key, stream in streams.items():
        if stream.mode == "linear" and (key in mark_new or np.isfinite(stream.max_age_s)):
            raise ConfigError(
                f"stream {key!r} is interpolated and never absent: leave out its max_age_s and mark_new, or give it "
                "mode 'latest'"
            )
    for key, stream in streams.items():
        time = np.asarray(stream.time_s)
        if time.ndim != 1 or len(time) != len(stream.values) or not len(time):
            raise DatasetError(f"stream {key!r} has {time.shape} times for {len(stream.values)} samples")
        if not np.isfinite(time).all() or (np.diff(time) <= 0).any():
            step = int(np.argmax(~(np.diff(time) > 0))) + 1 if len(time) > 1 else 0
            raise DatasetError(f"times of stream {key!r} must increase; sample {step} does not")
    begin = max(float(stream.time_s[0]) for stream in streams.values())
    end = min(float(stream.time_s[-1]) for stream in streams.values())
    if end < begin:
        raise DatasetError(f"the streams {', '.join(streams)} have no time in common")
    # Times of equal samples differ by their rounding, which on a clock of this century is a quarter of a microsecond.
    tolerance = max(1e-6 * control_dt, 4 * float(np.spacing(max(abs(begin), abs(end)))))
    count = int(np.floor((end - begin + tolerance) / control_dt)) + 1
    elapsed = np.asarray(control_dt * np.arange(count), np.float64)
    time = begin + elapsed
    arrays: dict[str, NDArray[Any]] = {"timestamp": elapsed}
    for key, stream in streams.items():
        if stream.mode == "linear":
            arrays[key] = _interpolate(time, stream)
            continue
        index = latest_before(np.asarray(stream.time_s), time + tolerance)
        arrays[key] = stream.values[index]
        there = time - stream.time_s[index] <= stream.max_age_s + tolerance
        if key in mark_new:
            there &= np.diff(index, prepend=-1) > 0
        if key in mark_new or np.isfinite(stream.max_age_s):
            arrays[PRESENT + key] = there
    return arrays


def latest_before(time_s: NDArray[np.float64], wanted_s: NDArray[np.float64]) -> NDArray[np.int64]:
    """(T,) index of the newest sample no later than each wanted time; the first sample where there is none."""
    return np.maximum(np.searchsorted(time_s, wanted_s, side="right") - 1, 0)


def _interpolate(time: NDArray[np.float64], stream: Stream) -> NDArray[np.float32]:
    flat = np.asarray(stream.values, np.float64).reshape(len(stream.values), -1)
    columns = [np.interp(time, stream.time_s, column) for column in flat.T]
    return np.stack(columns, axis=1).reshape(len(time), *stream.values.shape[1:]).astype(np.float32)
