"""Checks of what happens in time: clocks, sensors that stand still, actions and their effect, whole episodes.

Shapes: N control steps of all episodes together, E episodes, D dimensions of an array that was made flat: `values`
(N, D), `ends` (E,) cumulative; Da action width.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scd_robot.datasets.schema import ACTION
from scd_robot.datasets.validation.checks import few_values
from scd_robot.datasets.validation.findings import (
    Finding,
    at_rows,
    counted,
    episode_of,
    episode_slices,
    follows,
    in_episodes,
    overall,
    runs,
)

__all__ = [
    "action_lag",
    "clock",
    "duplicate_episodes",
    "frozen",
    "idle",
    "repeated_frames",
    "short_episodes",
]

Values = NDArray[Any]
Ends = NDArray[np.int64]

_FROZEN_RUN = 5  # equal rows that are no chance
_MOVES = 0.02  # of a dimension's range, that something moves by in a run
_MOVES_IN_STEP = 0.01  # the same in one step
_STILL_SHARE = 0.2  # of equal frames, from which they are worth a word
_GAP = 1.5  # of the usual time between steps
_JITTER = 0.1
_RATE = 0.1
_IDLE_RUN = 5
_LAGS = 10
_LAG_ROWS = 20_000
_MIN_LAG_ROWS = 100
_STRONG = 0.7  # correlation
_CLEARLY = 0.02  # more correlation than at a lag that is in order
_MAX_LAG = 2


def clock(key: str, times: NDArray[Any], ends: Ends, control_dt: float) -> list[Finding]:
    """Timestamps (N,) [s] that go backwards, leave gaps, jitter, or tick at another rate than `control_dt` [s]."""
    inside = follows(ends, len(times))
    steps = np.diff(times.astype(np.float64), prepend=np.nan)
    steps[~inside] = np.nan
    forward = steps[steps > 0]
    backward = np.flatnonzero(steps <= 0)
    found = at_rows(
        "time_order",
        "error",
        key,
        backward,
        ends,
        f"time stands still or goes back in {counted(len(backward), 'step')}",
    )
    if not len(forward):
        return found
    usual = float(np.median(forward))
    gaps = np.flatnonzero(steps > _GAP * usual)
    if len(gaps):
        longest = float(steps[gaps].max())
        message = (
            f"{counted(len(gaps), 'gap')} of more than {_GAP:g} control steps, the longest {longest:.4g} s "
            f"({longest / usual:.1f} steps): recordings were dropped, and histories jump there"
        )
        found += at_rows("time_gap", "warning", key, gaps, ends, message)
    regular = np.where((steps > 0) & (steps <= _GAP * usual), steps, np.nan)
    parts = [regular[rows] for rows in episode_slices(ends)]
    spread = [float(np.nanstd(part)) if np.isfinite(part).any() else 0.0 for part in parts]
    shaky = np.flatnonzero(np.asarray(spread) > _JITTER * usual)
    if len(shaky):
        message = (
            f"the time between steps varies by {1e3 * spread[shaky[0]]:.3g} ms (standard deviation) around "
            f"{1e3 * usual:.4g} ms, in {len(shaky):,} of {counted(len(ends), 'episode')}"
        )
        found += in_episodes("time_jitter", "warning", key, shaky, message)
    if abs(usual / control_dt - 1) > _RATE:
        message = (
            f"timestamps are {usual:.4g} s apart, but control_dt is {control_dt:.4g} s: one of them is wrong "
            "(--control-dt gives the right one; time stamps are in seconds)"
        )
        found += overall("time_rate", "warning", key, message)
    return found


def frozen(key: str, values: Values, action: Values, ends: Ends) -> list[Finding]:
    """Stretches of at least five equal steps of an array while the actions change: a sensor that hangs.

    An array of switches (up to three values), or one that is the same throughout every episode (a goal), is no finding;
    where most episodes have such a stretch it is what this array does (an object that waits to be touched): a note.
    """
    if all(few_values(column) for column in values.T):
        return []
    same = follows(ends, len(values))
    same[1:] &= (values[1:] == values[:-1]).all(axis=1)
    long = [run for run in _equal_rows(same) if run[1] - run[0] >= _FROZEN_RUN]
    moving = [run for run, moves in zip(long, _moves(action, long), strict=True) if moves]
    is_goal = sum(_is_whole(run, ends) for run in long) == np.count_nonzero(np.diff(ends, prepend=0) >= _FROZEN_RUN)
    if not moving or is_goal:
        return []
    starts = np.asarray([run[0] for run in moving])
    episodes = len(np.unique(episode_of(starts, ends)))
    usual = episodes > len(ends) / 2
    steps = sum(int(run[1] - run[0]) for run in moving)
    longest = max(int(run[1] - run[0]) for run in moving)
    message = (
        f"{key} stands still for {_FROZEN_RUN} steps or more while the actions change, {counted(len(moving), 'time')} "
        f"in {episodes:,} of {counted(len(ends), 'episode')} ({steps:,} steps, the longest {longest:,})"
        + ("; usual for a gripper, or an object that waits to be moved" if usual else ": did the sensor hang?")
    )
    return at_rows("frozen", "note" if usual else "warning", key, starts, ends, message)


def repeated_frames(key: str, same: NDArray[np.bool_], state: Values, ends: Ends) -> list[Finding]:
    """Frames that equal the one before.

    Args:
        key: of the images.
        same: (N,) whether a frame equals the one before, in the same episode.
        state: (N, D) that tells whether something moves: the vectors observed, or the actions where there are none.
        ends: (E,).
    """
    long = [run for run in _equal_rows(same) if run[1] - run[0] >= _FROZEN_RUN]
    whole = [run for run in long if _is_whole(run, ends)]
    episodes = [int(episode_of(run[:1], ends)[0]) for run in whole]
    found = in_episodes(
        "frozen",
        "error",
        key,
        episodes,
        f"{key} shows one and the same frame throughout {counted(len(whole), 'episode')}",
    )
    others = [run for run in long if not _is_whole(run, ends)]
    moving = [run for run, moves in zip(others, _moves(state, others), strict=True) if moves]
    if moving:
        longest = max(int(run[1] - run[0]) for run in moving)
        message = (
            f"{key} hangs: {counted(len(moving), 'run')} of {_FROZEN_RUN} or more equal frames while the robot moves, "
            f"the longest of {longest:,}"
        )
        found += at_rows("frozen", "warning", key, np.asarray([run[0] for run in moving]), ends, message)
    hanging = np.zeros(len(same), bool)
    for start, stop in (*whole, *moving):
        hanging[start:stop] = True
    rest = same & ~hanging
    measured = state[:, [d for d in range(state.shape[1]) if not few_values(state[:, d])]]
    changes = np.abs(np.diff(measured, axis=0, prepend=measured[:1]))
    moved = rest & (changes > _MOVES_IN_STEP * _extent(measured)).any(axis=1)
    share = rest.sum() / max(1, follows(ends, len(same)).sum())
    rows = np.flatnonzero(moved if moved.any() else rest)
    if moved.any() or share > _STILL_SHARE:
        longest = max(int(stop - start) for start, stop in _equal_rows(rest))
        message = (
            f"{100 * share:.1f} % of the frames equal the one before (longest run {longest:,}), {moved.sum():,} of "
            "them although something moved: a camera slower than the control steps?"
        )
        found += at_rows("repeated_frames", "note", key, rows, ends, message, count=int(rest.sum()))
    return found


def _equal_rows(same: NDArray[np.bool_]) -> list[NDArray[np.int64]]:
    """(start, stop) of each stretch of equal rows; `same` tells whether a row equals the one before."""
    return [np.asarray((start - 1, stop)) for start, stop in runs(same)]


def _is_whole(run: NDArray[np.int64], ends: Ends) -> bool:
    number = int(episode_of(run[:1], ends)[0])
    return bool(run[0] == (ends[number - 1] if number else 0) and run[1] == ends[number])


def _moves(values: Values, stretches: Sequence[NDArray[np.int64]]) -> list[bool]:
    """Whether some dimension of `values` changes in each stretch, by more than a bit of its range."""
    least = _MOVES * _extent(values)
    return [bool((np.ptp(values[start:stop], axis=0) > least).any()) for start, stop in stretches]


def _extent(values: Values) -> NDArray[Any]:
    return np.asarray(np.fmax.reduce(values) - np.fmin.reduce(values))


def idle(action: Values, ends: Ends) -> list[Finding]:
    """Five or more actions of zeros at the beginning or end of episodes; dimensions that are switches do not count."""
    moving = [d for d in range(action.shape[1]) if not few_values(action[:, d])]
    if not moving:
        return []
    zero = (action[:, moving] == 0).all(axis=1)
    found = []
    for place, order in (("begin", 1), ("end", -1)):
        lengths = np.asarray([_leading(zero[part][::order]) for part in episode_slices(ends)])
        episodes = np.flatnonzero(lengths >= _IDLE_RUN)
        if len(episodes):
            message = (
                f"{len(episodes):,} of {counted(len(ends), 'episode')} {place} with actions of zero, "
                f"{lengths[episodes].mean():.1f} steps in the mean, {lengths.max():,} at most: a policy learns to wait"
            )
            found += in_episodes("idle", "note", ACTION, episodes, message, moving)
    return found


def _leading(flags: NDArray[np.bool_]) -> int:
    return len(flags) if flags.all() else int(np.argmin(flags))


def short_episodes(ends: Ends, window: int) -> list[Finding]:
    """Episodes of one step or none, which cannot be trained on, and those shorter than `window` steps."""
    lengths = np.diff(ends, prepend=0)
    useless = np.flatnonzero(lengths < 2)
    short = np.flatnonzero((lengths >= 2) & (lengths < window))
    message = f"{counted(len(useless), 'episode')} of fewer than 2 steps; leave them out"
    found = in_episodes("short_episode", "error", "", useless, message)
    message = f"{len(short):,} of {counted(len(ends), 'episode')} shorter than a window of {window} steps"
    return found + in_episodes("short_episode", "warning", "", short, message)


def duplicate_episodes(digests: Sequence[bytes | None], number: Callable[[int], int] = int) -> list[Finding]:
    """Episodes with the same digest of all their arrays as an earlier one; None is like no other.

    Args:
        digests: one per episode.
        number: what the recording counts an episode as.
    """
    first: dict[bytes, int] = {}
    again, of = [], []
    for episode, digest in enumerate(digests):
        if digest is None:
            continue
        if digest in first:
            again.append(episode)
            of.append(first[digest])
        first.setdefault(digest, episode)
    pairs = ", ".join(f"{number(a)} = {number(b)}" for a, b in zip(again[:6], of, strict=False))
    pairs += ", ..." if len(again) > 6 else ""
    message = (
        f"{counted(len(again), 'episode')} the same as an earlier one ({pairs}): counted double, and perhaps both "
        "trained on and held out"
    )
    return in_episodes("duplicate_episode", "warning", "", again, message)


def action_lag(action: Values, states: Mapping[str, Values], ends: Ends, control_dt: float) -> list[Finding]:
    """After how many control steps the observations show an action, where a dimension follows it clearly.

    Steps of the action, or the action itself where it is a difference, are correlated with the steps of every observed
    dimension, -10 to 10 control steps later than the next observation (lag 0: the next observation shows it). A policy
    cannot know what is yet to come (negative lags), and long ones hide which action did what.

    Args:
        action: (N, Da).
        states: by key (N, D).
        ends: (E,).
        control_dt: [s].
    """
    names = [(key, dimension) for key, values in states.items() for dimension in range(values.shape[1])]
    dimensions = [d for d in range(action.shape[1]) if not few_values(action[:, d])]
    stop = int(ends[ends <= max(_LAG_ROWS, ends[0])][-1])
    if stop < _MIN_LAG_ROWS or not names or not dimensions:
        return []
    commanded = action[:stop, dimensions].astype(np.float64)
    state = np.concatenate([values[:stop] for values in states.values()], axis=1).astype(np.float64)
    episode = episode_of(np.arange(stop), ends)
    inside = follows(ends, stop)
    shown = _steps(state, inside)
    lags = np.arange(-_LAGS, _LAGS + 1)
    # (2, lags, Da, D): by steps of the action, and by the action itself
    table = np.asarray(
        [
            [_correlation(signal, shown, int(lag) + 1, episode) for lag in lags]
            for signal in (_steps(commanded, inside), commanded)
        ]
    )
    best = table.max(axis=(0, 1, 3))
    strong = np.flatnonzero(best >= _STRONG)
    if not len(strong):
        return []
    picks = [np.unravel_index(int(table[:, :, j].argmax()), table[:, :, j].shape) for j in strong]
    number = int(np.sort([lags[pick[1]] for pick in picks])[(len(picks) - 1) // 2])
    usable = (lags >= 0) & (lags <= _MAX_LAG)
    clear = any(
        table[mode, at, j, d] > table[mode, usable, j, d].max() + _CLEARLY
        for j, (mode, at, d) in zip(strong, picks, strict=True)
        if lags[at] == number
    )
    wrong = not 0 <= number <= _MAX_LAG and clear
    pairs = ", ".join(
        f"{ACTION}[{dimensions[j]}] in {names[int(d)][0]}[{names[int(d)][1]}] ({best[j]:.2f})"
        for j, (_, _, d) in list(zip(strong, picks, strict=True))[:4]
    )
    when = f"{counted(abs(number), 'control step')} ({abs(number) * control_dt:.3g} s)"
    if number == 0:
        message = "actions show in the next observation"
    elif number > 0:
        message = f"actions show {when} later than in the next observation"
    else:
        message = f"actions show {when} earlier than in the next observation: they were recorded after their effect"
    return overall("action_lag", "warning" if wrong else "note", ACTION, f"{message}; correlation: {pairs}")


def _steps(values: NDArray[np.float64], inside: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Differences (N, D) from the row before; NaN in the first of an episode."""
    steps = np.diff(values, axis=0, prepend=np.nan)
    steps[~inside] = np.nan
    return steps


def _correlation(
    signal: NDArray[np.float64], shown: NDArray[np.float64], delay: int, episode: NDArray[np.int64]
) -> NDArray[np.float64]:
    """(Da, D) of `signal` (N, Da) with `shown` (N, D) `delay` rows later in the same episode; 0 where undefined."""
    early = np.arange(max(0, -delay), len(signal) - max(0, delay))
    early = early[episode[early] == episode[early + delay]]
    early = early[np.isfinite(signal[early]).all(axis=1) & np.isfinite(shown[early + delay]).all(axis=1)]
    if len(early) < _MIN_LAG_ROWS // 2:
        return np.zeros((signal.shape[1], shown.shape[1]))
    x, y = signal[early], shown[early + delay]
    x, y = x - x.mean(axis=0), y - y.mean(axis=0)
    size = np.linalg.norm(x, axis=0)[:, None] * np.linalg.norm(y, axis=0)
    return np.asarray(np.divide(x.T @ y, size, out=np.zeros_like(size), where=size > 1e-12))
