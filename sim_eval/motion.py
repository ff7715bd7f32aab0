"""How an episode moved: length and jerk of the hand's path, and jumps where one chunk of actions follows another.

Shapes: T control steps, Da action width, n numbers of a hand's position.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["MOTION_NAMES", "mean_motion", "motion_quality"]

MOTION_NAMES = ("path_length", "jerk", "boundary_jump")
_DERIVATIVES = 3


def motion_quality(
    actions: Sequence[NDArray[Any]], planned: Sequence[bool], hand: Sequence[NDArray[Any]], control_dt: float
) -> dict[str, float | None]:
    """Of one episode.

    Args:
        actions: T executed actions (Da,).
        planned: whether each is the first of a new chunk; empty where the policy does not tell.
        hand: T + 1 positions, (n,) or (hands, n) of several, in the environment's unit; empty where it does not tell.
        control_dt: seconds per control step.

    Returns:
        `path_length` [unit], of all hands together; `jerk`, the root mean square of the third derivative of a hand's
        position [unit / s^3]; `boundary_jump`, the mean change of the action from the last of a chunk to the first of
        the next over the mean change within chunks (1 = seams cannot be told). None where there is too little to tell.
    """
    found: dict[str, float | None] = dict.fromkeys(MOTION_NAMES)
    if len(hand) > 1:
        path = np.asarray(hand, np.float64)
        found["path_length"] = float(np.linalg.norm(np.diff(path, axis=0), axis=-1).sum())
        if len(path) > _DERIVATIVES:
            jerk = np.diff(path, _DERIVATIVES, axis=0) / control_dt**_DERIVATIVES
            found["jerk"] = float(np.sqrt((jerk**2).sum(axis=-1).mean()))
    if len(planned) == len(actions) > 1:
        change = np.linalg.norm(np.diff(np.asarray(actions, np.float64), axis=0), axis=1)
        seam = np.asarray(planned[1:], bool)
        if seam.any() and not seam.all() and change[~seam].mean() > 0:
            found["boundary_jump"] = float(change[seam].mean() / change[~seam].mean())
    return found


def mean_motion(episodes: Sequence[dict[str, float | None]]) -> dict[str, float | None]:
    """Mean of each number over the episodes that have it."""
    means: dict[str, float | None] = {}
    for name in MOTION_NAMES:
        known = [value for episode in episodes if (value := episode.get(name)) is not None]
        means[name] = float(np.mean(known)) if known else None
    return means
