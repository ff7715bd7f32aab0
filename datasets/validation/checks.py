"""Checks of the values of one array: each takes all its numbers and where episodes end, and gives what it finds.

NaN is passed over by all checks but the one that looks for it.

Shapes: N control steps of all episodes together, E episodes, D dimensions of an array that was made flat: `values`
(N, D), `ends` (E,) cumulative.
"""

import re
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from scd_robot.datasets.schema import ACTION
from scd_robot.datasets.validation.findings import (
    Finding,
    at_rows,
    counted,
    episode_of,
    episode_slices,
    follows,
    in_episodes,
    overall,
)

__all__ = [
    "constant_dimensions",
    "few_values",
    "jumps",
    "not_finite",
    "quaternion_blocks",
    "quaternion_norms",
    "quaternion_signs",
    "saturated",
    "silent",
    "switch_values",
    "unit_changes",
]

Values = NDArray[Any]
Ends = NDArray[np.int64]

_FEW = 3  # values of a dimension that is a switch: a gripper's command
_SATURATED_SHARE = 0.2
_LEVELS = 16  # values up to which a dimension is a choice of levels, by keys say, whose ends are as usual as the others
_SILENT_SHARE = 0.01  # of steps that may be 0 where a sensor is on
_JUMP_SIGMAS = 20.0
_SIGMA = 1.4826  # standard deviations in a median absolute deviation of normal noise
_JUMP_RANGE = 0.1  # of a dimension's range, below which a jump does no harm
_JUMP_NEIGHBOURS = 4  # steps on either side that a jump must exceed by far
_ZERO_SHARE, _REST_SHARE = 0.05, 0.5  # of steps that are zero, or nearly so, from which that stands for rest
_UNIT_NORM = 1e-3
_UNIT_NAMED = 1e-2
_QUATERNION = re.compile(r"quat|orn|rot")
# How much larger an episode's numbers are, and what may have happened.
_UNITS = {57.29578: ("degrees", "radians"), 100.0: ("centimetres", "metres"), 1000.0: ("millimetres", "metres")}
_UNIT_LEAST, _UNIT_MOST = np.log(33), np.log(3000)  # smaller than the least may be chance, than the most a rest
_UNIT_FINE = np.log(10)
_AGREEING = 0.75  # of the episodes, with one of two units
_MIN_EPISODES = 3  # to tell which one differs


def not_finite(key: str, values: Values, ends: Ends) -> list[Finding]:
    """Steps with NaN or infinite values."""
    bad = ~np.isfinite(values)
    rows = np.flatnonzero(bad.any(axis=1))
    dimensions = np.flatnonzero(bad.any(axis=0))
    message = (
        f"{counted(len(rows), 'step')} with NaN or infinite values in {_name(key, dimensions)}; "
        "record the episodes again or leave them out"
    )
    return at_rows("not_finite", "error", key, rows, ends, message, dimensions)


def constant_dimensions(key: str, values: Values) -> list[Finding]:
    """Dimensions that never change."""
    lowest, highest = np.fmin.reduce(values), np.fmax.reduce(values)
    dimensions = np.flatnonzero(lowest == highest)
    if not len(dimensions) or len(values) < 2:
        return []
    held = ", ".join(f"{lowest[d] + 0.0:.6g}" for d in dimensions[:6]) + (", ..." if len(dimensions) > 6 else "")
    word = "is" if len(dimensions) == 1 else "are"
    message = f"{_name(key, dimensions)} {word} the same in every step ({held})"
    if key == ACTION:
        message += ": a policy learns to send just this"
    return overall("constant", "warning" if key == ACTION else "note", key, message, dimensions, count=len(dimensions))


def saturated(key: str, values: Values, ends: Ends) -> list[Finding]:
    """Dimensions that lie at the end of their range in many steps.

    Exempt are commands that take few values (keys that are pressed), and an end at zero, which stands for rest.
    """
    found = []
    for dimension in range(values.shape[1]):
        column = values[:, dimension]
        if few_values(column, _LEVELS):
            continue
        low, high = np.fmin.reduce(column), np.fmax.reduce(column)
        at_end = ((column == low) | (column == high)) & (column != 0)
        share = at_end.mean()
        if share > _SATURATED_SHARE:
            message = (
                f"{key}[{dimension}] is at an end of its range in {100 * share:.0f} % of the steps "
                f"({100 * (column == low).mean():.0f} % at {low:.6g}, {100 * (column == high).mean():.0f} % at "
                f"{high:.6g}): clipped by the recorder or the controller?"
            )
            found += at_rows("saturated", "warning", key, np.flatnonzero(at_end), ends, message, [dimension])
    return found


def jumps(key: str, values: Values, ends: Ends, exempt: frozenset[int] = frozenset()) -> list[Finding]:
    """Single steps that are far larger than those around them.

    A jump exceeds 20 robust standard deviations of the dimension's steps, a tenth of its range, five times the steps
    around it, does not go on in the same direction, and is no start from or stop at zero where that stands for rest.
    Where most episodes have some, they are what this dimension does (a note), unless they are right after the first
    step. Jumps by a full turn are told apart: an angle that wraps.

    Args:
        key: of the array.
        values: (N, D).
        ends: (E,).
        exempt: dimensions not to look at.
    """
    episode, inside = episode_of(np.arange(len(values)), ends), follows(ends, len(values))
    plain: dict[int, NDArray[np.int64]] = {}
    wraps: dict[int, NDArray[np.int64]] = {}
    sizes: dict[int, tuple[float, float]] = {}  # of the usual step, and of the longest jump
    for dimension in set(range(values.shape[1])) - exempt:
        column = values[:, dimension].astype(np.float64)
        steps = np.diff(column, prepend=np.nan)
        steps[~inside] = np.nan
        rows = _jumping_rows(steps, column, episode)
        turn = _full_turn(column)
        is_wrap = np.abs(np.abs(steps[rows]) - turn) < 0.05 * turn
        plain[dimension], wraps[dimension] = rows[~is_wrap], rows[is_wrap]
        if len(rows[~is_wrap]):
            moved = np.abs(steps[np.abs(steps) > 0])
            sizes[dimension] = float(np.median(moved)), float(np.abs(steps[rows[~is_wrap]]).max())
    found = []
    for check, where in (("jump", plain), ("angle_wrap", wraps)):
        dimensions = [dimension for dimension, rows in where.items() if len(rows)]
        if not dimensions:
            continue
        rows = np.unique(np.concatenate([where[dimension] for dimension in dimensions]))
        at_start = (~inside[rows - 1]).mean() > 0.5
        usual = check == "jump" and not at_start and len(np.unique(episode[rows])) > len(ends) / 2
        message = f"{counted(len(rows), 'step')} in which {_name(key, np.asarray(dimensions))} "
        if check == "angle_wrap":
            message += "jumps by a full turn: the angle wraps, and one pose has two far numbers; give sine and cosine"
        else:
            largest = max(dimensions, key=lambda dimension: sizes[dimension][1] / sizes[dimension][0])
            usual_step, longest = sizes[largest]
            message += f"jumps by more than {_JUMP_SIGMAS:g} times its usual step"
            message += f" (up to {longest:.3g} in [{largest}], where {usual_step:.3g} is usual)"
            if at_start:
                message += ", mostly right after the first: is the first observation a stale one?"
            else:
                message += "; most episodes have some" if usual else ": a glitch, or a cut in the recording?"
        found += at_rows(check, "note" if usual else "warning", key, rows, ends, message, dimensions)
    return found


def silent(key: str, values: Values, ends: Ends) -> list[Finding]:
    """Episodes in which a measurement is 0 throughout, which in the others hardly ever is: a sensor that was not on."""
    lengths = np.maximum(np.diff(ends, prepend=0), 1)[:, None]
    zero = np.stack([(part == 0).sum(axis=0) for part in np.split(values, ends[:-1])]) / lengths  # (E, D)
    found = []
    for dimension in np.flatnonzero((zero == 1).any(axis=0) & (zero < 1).any(axis=0)).tolist():
        off = zero[:, dimension] == 1
        if zero[~off, dimension].max() > _SILENT_SHARE or off.sum() > (~off).sum():
            continue
        message = (
            f"{key}[{dimension}] is 0 in all steps of {counted(int(off.sum()), 'episode')}, and hardly ever in the "
            "others: was the sensor off? leave them out, or record them again"
        )
        found += in_episodes("silent", "warning", key, np.flatnonzero(off), message, [dimension])
    return found


def switch_values(key: str, values: Values, ends: Ends) -> list[Finding]:
    """Switches that have other values in some episodes: -1 and 1 in some, 0 and 1 in others."""
    found = []
    for dimension in range(values.shape[1]):
        column = values[:, dimension]
        if not few_values(column, _FEW + 1):
            continue
        pairs = [tuple(np.unique(part[~np.isnan(part)]).tolist()) for part in np.split(column, ends[:-1])]
        kinds = sorted({pair for pair in pairs if len(pair) == 2})
        if len(kinds) != 2 or any(len(pair) > 2 for pair in pairs):
            continue
        counts = [pairs.count(kind) for kind in kinds]
        rare = kinds[counts.index(min(counts))]
        told = " and ".join(
            f"{low:g} or {high:g} in {counted(n, 'episode')}" for (low, high), n in zip(kinds, counts, strict=True)
        )
        others = [episode for episode, pair in enumerate(pairs) if pair == rare]
        message = f"{key}[{dimension}] is {told}: two conventions of one switch? bring them to one"
        found += in_episodes("switch_values", "warning", key, others, message, [dimension])
    return found


def _jumping_rows(
    steps: NDArray[np.float64], column: NDArray[np.float64], episode: NDArray[np.int64]
) -> NDArray[np.int64]:
    sizes = np.abs(steps)
    moved = sizes[sizes > 0]
    if not len(moved):
        return np.empty(0, np.int64)
    low, high = np.nanpercentile(column, [1, 99])
    sigma = _SIGMA * float(np.median(moved))
    rows = np.flatnonzero(sizes > max(_JUMP_SIGMAS * sigma, _JUMP_RANGE * float(high - low)))
    rest = np.abs(column) <= 3 * sigma
    if (column == 0).mean() > _ZERO_SHARE or rest.mean() > _REST_SHARE:
        rows = rows[~_starts_or_stops(rest, rows)]
    around = rows[:, None] + np.concatenate((np.arange(-_JUMP_NEIGHBOURS, 0), np.arange(1, _JUMP_NEIGHBOURS + 1)))
    known = (around >= 0) & (around < len(steps))
    around = np.where(known, around, rows[:, None])
    known &= (episode[around] == episode[rows][:, None]) & np.isfinite(steps[around])
    near = np.where(known, steps[around], 0)
    # A spike comes back in one of the next steps; what goes on in the same direction is a motion.
    onwards = near[:, [_JUMP_NEIGHBOURS - 1, _JUMP_NEIGHBOURS]] * np.sign(steps[rows])[:, None]
    typical = np.median(np.abs(near), axis=1)
    return rows[sizes[rows] > 5 * np.maximum(typical, onwards.max(axis=1, initial=0))]


def _starts_or_stops(rest: NDArray[np.bool_], rows: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether a motion of more than one step begins or ends at each of `rows`."""
    after, before = np.minimum(rows + 1, len(rest) - 1), np.maximum(rows - 2, 0)
    starts = rest[rows - 1] & ~rest[rows] & ~rest[after]
    return np.asarray(starts | (~rest[before] & ~rest[rows - 1] & rest[rows]))


def _full_turn(column: NDArray[np.float64]) -> float:
    """360 or 2 pi, by the range of the values; NaN where they cover neither."""
    extent = np.fmax.reduce(column) - np.fmin.reduce(column)
    for turn in (2 * np.pi, 360.0):
        if 0.95 * turn < extent < 1.05 * turn:
            return float(turn)
    return float("nan")


def unit_changes(key: str, values: Values, ends: Ends) -> list[Finding]:
    """Episodes whose numbers are larger or smaller than those of the others by what units differ by.

    Compared are the 90th percentile of the magnitude, in dimensions where the other episodes agree within a factor of
    two, and the finest steps: a joint that rests in other episodes has the same noise in this one. Smaller numbers must
    show in two dimensions or all: a joint may just rest.
    """
    slices = [(number, part) for number, part in enumerate(episode_slices(ends)) if part.stop > part.start]
    if len(slices) < _MIN_EPISODES:
        return []
    with np.errstate(divide="ignore", invalid="ignore"):
        sizes = np.log([np.quantile(np.abs(values[part]), 0.9, axis=0) for _, part in slices])
        size, fine = _deviation(sizes), _deviation(np.log([_finest_steps(values[part]) for _, part in slices]))
        reliable = np.nanmedian(np.where(np.isfinite(size), np.abs(size), np.inf), axis=0) < np.log(2)
        # Where half of the episodes are in another unit, most are far from any median, but near one of the two.
        nearer = np.minimum(np.abs(size), np.abs(_deviation(sizes, "higher")))
        nearer = np.where(np.isfinite(nearer), nearer, np.inf)
        reliable |= np.quantile(nearer, _AGREEING, axis=0, method="higher") < np.log(2)
    found = []
    for larger in (True, False):
        ratio = size if larger else -size
        off = reliable & (ratio > _UNIT_LEAST) & ((fine if larger else -fine) > _UNIT_FINE)
        if not larger:
            off &= ratio < _UNIT_MOST
            off &= off.sum(axis=1, keepdims=True) >= min(2, int(reliable.sum()))
        typical = np.asarray([np.exp(np.median(r[o])) if o.any() else np.nan for r, o in zip(ratio, off, strict=True)])
        nearest = np.argmin(np.abs(np.log(typical[:, None] / list(_UNITS))), axis=1)
        for number, units in enumerate(_UNITS.values()):
            chosen = np.flatnonzero(np.isfinite(typical) & (nearest == number))
            dimensions = np.flatnonzero(off[chosen].any(axis=0))
            guess = " for ".join(units if larger else units[::-1])
            times = f"{np.median(typical[chosen]):.2g}" if len(chosen) else ""
            message = (
                f"{_name(key, dimensions)} of {counted(len(chosen), 'episode')} about {times} times "
                f"{'larger' if larger else 'smaller'} than in the others: {guess}? bring all to one unit"
            )
            found += in_episodes("unit", "error", key, [slices[row][0] for row in chosen], message, dimensions)
    return found


def _finest_steps(values: Values) -> Values:
    """(D,) 25th percentile of the steps of an episode that are not zero; 0 where nothing moves."""
    if len(values) < 2:
        return np.zeros(values.shape[1])
    steps = np.sort(np.abs(np.diff(values, axis=0)), axis=0)
    still = (steps == 0).sum(axis=0)
    quarter = np.minimum(still + (len(steps) - still) // 4, len(steps) - 1)
    return np.take_along_axis(steps, quarter[None], axis=0)[0]


def _deviation(logarithms: NDArray[np.float64], median: Literal["lower", "higher"] = "lower") -> NDArray[np.float64]:
    """(E, D) from the median over episodes, taken as one of the values so that two groups do not meet in between."""
    finite = np.where(np.isfinite(logarithms), logarithms, np.nan)
    seen = ~np.isnan(finite).all(axis=0)
    middle = np.full(finite.shape[1], np.nan)
    if seen.any():
        middle[seen] = np.nanquantile(finite[:, seen], 0.5, axis=0, method=median)
    return np.asarray(logarithms - middle)


def quaternion_blocks(key: str, values: Values, width: int) -> tuple[list[int], bool]:
    """First dimensions of the quaternions in an array, and whether its name says so.

    Args:
        key: of the array; one with quat, orn or rot in its name is believed if its last axis is 4 (and, but for quat,
            if most of its norms are about 1).
        values: (N, D), in which otherwise four neighbouring dimensions of norm 1 in 99 % of the steps are looked for.
        width: of the array's last axis.
    """
    total = values.shape[1]
    if width == 4 and _QUATERNION.search(key.lower()):
        offsets = list(range(0, total, 4))
        norms = np.linalg.norm(values.reshape(len(values), -1, 4), axis=2)
        if "quat" in key.lower() or (np.abs(norms - 1) < 0.05).mean() > 0.5:
            return offsets, True
    offsets, first = [], 0
    while first <= total - 4:
        if _is_unit(values[:200, first : first + 4]) and _is_unit(values[:, first : first + 4]):
            offsets.append(first)
            first += 4
        else:
            first += 1
    return offsets, False


def _is_unit(block: Values) -> bool:
    return bool((np.abs(np.linalg.norm(block, axis=1) - 1) < _UNIT_NORM).mean() >= 0.99)


def quaternion_signs(key: str, values: Values, ends: Ends, first: int) -> list[Finding]:
    """Steps in which a quaternion (dimensions `first` to `first + 3`) changes to its negative."""
    block = values[:, first : first + 4].astype(np.float64)
    dots = np.einsum("nd,nd->n", block[1:], block[:-1])
    rows = 1 + np.flatnonzero((dots < 0) & follows(ends, len(values))[1:])
    message = (
        f"{counted(len(rows), 'step')} in which the quaternion {key}[{first}:{first + 4}] changes its sign: the same "
        "rotation, but far numbers; make it continuous or use a 6D rotation"
    )
    return at_rows("quaternion_sign", "warning", key, rows, ends, message, range(first, first + 4))


def quaternion_norms(key: str, values: Values, ends: Ends, first: int) -> list[Finding]:
    """Steps in which a quaternion is not of norm 1."""
    norms = np.linalg.norm(values[:, first : first + 4], axis=1)
    rows = np.flatnonzero(np.abs(norms - 1) > _UNIT_NAMED)
    example = f", {norms[rows[0]]:.4g} in the first" if len(rows) else ""
    message = f"{counted(len(rows), 'step')} in which {key}[{first}:{first + 4}] is no unit quaternion (norm{example})"
    return at_rows("quaternion_norm", "warning", key, rows, ends, message, range(first, first + 4))


def few_values(column: Values, most: int = _FEW) -> bool:
    """Whether a dimension (N,) takes at most so many values: up to three, it is a switch, not a measurement."""
    if len(np.unique(column[:1000])) > most + 1:  # NaN may be one more
        return False
    return len(np.unique(column[~np.isnan(column)])) <= most


def _name(key: str, dimensions: NDArray[Any]) -> str:
    """The array with the dimensions concerned: state[0, 3]."""
    shown = ", ".join(map(str, dimensions[:6])) + (f", ... ({len(dimensions)} in all)" if len(dimensions) > 6 else "")
    return f"{key}[{shown}]"
