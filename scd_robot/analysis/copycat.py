"""Whether a policy repeats its last action where its demonstrators did not.

Shapes: T control steps of an episode, E episodes, R resamples of them, Da action width.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scd_robot.analysis.resampling import interval_of, resampled_sums
from scd_robot.analysis.streams import Stream
from scd_robot.normalization import is_constant

__all__ = ["copycat"]

Array = NDArray[np.float64]
_STILL = 1e-9  # variance of what does not move, in units of the variance over all episodes


def copycat(
    streams: Sequence[Stream],
    demonstrations: NDArray[np.float32] | None = None,
    demonstration_ends: NDArray[np.int64] | None = None,
) -> dict[str, Any]:
    """How well the last action predicts the next, linearly: unexplained share of the variance (arXiv 2505.09561).

    It is the mean over numbers of the action, of which those that are constant (here or in the demonstrations) are left
    out. Episodes count up to the length of the longest demonstration: a policy that is stuck until the time limit would
    be judged by its standstill otherwise.

    Args:
        streams: of the policy.
        demonstrations: (N, Da) actions; None = no ratio.
        demonstration_ends: (E,) of their episodes, cumulative.

    Returns:
        `policy`, `demonstrations` (None without), and `ratio`, the first over the second: far below 1 the policy
        repeats itself where the demonstrator did not; and `intervals`, of the same names: 95 % bootstrap intervals over
        the episodes of both, None where there are fewer than two.
    """
    arms = {"policy": [np.stack(stream.action) for stream in streams]}
    if demonstrations is not None and demonstration_ends is not None:
        arms["demonstrations"] = np.split(demonstrations, demonstration_ends[:-1])
        longest = max(map(len, arms["demonstrations"]))
        arms["policy"] = [actions[:longest] for actions in arms["policy"]]
    together = [np.concatenate(episodes) for episodes in arms.values()]
    moving = ~np.any([is_constant(actions.min(axis=0), actions.max(axis=0)) for actions in together], axis=0)
    found: dict[str, Array | None] = dict.fromkeys(("policy", "demonstrations", "ratio"))
    for key, (name, episodes) in enumerate(arms.items()):
        found[name] = _unexplained(episodes, moving, key)
    own, expert = found["policy"], found["demonstrations"]
    if own is not None and expert is not None and expert[0] > 0:
        found["ratio"] = own / np.where(expert > 0, expert, np.nan)
    numbers = {name: None if shares is None else float(shares[0]) for name, shares in found.items()}
    intervals = {name: None if shares is None else interval_of(shares[1:]) for name, shares in found.items()}
    return numbers | {"intervals": intervals}


def _unexplained(episodes: Sequence[NDArray[np.float32]], moving: NDArray[np.bool_], key: int) -> Array | None:
    """The share of all episodes, then of each resample: (1 + R,). None where nothing can be said."""
    chosen = [actions[:, moving].astype(np.float64) for actions in episodes if len(actions) > 1]
    if not moving.any() or sum(len(actions) - 1 for actions in chosen) < 3:
        return None
    together = np.concatenate(chosen)
    centre, scale = together.mean(axis=0), together.std(axis=0)
    parts = np.stack([_moments((actions - centre) / scale) for actions in chosen])
    shares = _shares(np.concatenate([parts.sum(axis=0, keepdims=True), resampled_sums(parts, key)]))
    return shares if np.isfinite(shares[0]) else None


def _moments(actions: Array) -> Array:
    """Sums (1 + 2 Da, 1 + 2 Da) of products of 1, the last action and the next, over an episode's actions (T, Da)."""
    rows = np.concatenate([np.ones((len(actions) - 1, 1)), actions[:-1], actions[1:]], axis=1)
    return np.asarray(rows.T @ rows)


def _shares(moments: Array) -> Array:
    """Unexplained shares (n,) by linear regression with a constant, of sums of moments (n, 1 + 2 Da, 1 + 2 Da)."""
    shares = np.full(len(moments), np.nan)
    known = np.isfinite(moments[:, 0, 0])
    average = moments[known] / moments[known, :1, :1]
    mean = average[:, 0, 1:]
    covariance = average[:, 1:, 1:] - mean[:, :, None] * mean[:, None, :]
    last, now = np.split(np.arange(covariance.shape[1]), 2)
    across = covariance[:, last[:, None], now]
    inverse = np.linalg.pinv(covariance[:, last[:, None], last], rcond=1e-9, hermitian=True)
    variance = covariance[:, now, now]
    explained = np.einsum("nij,nik,nkj->nj", across, inverse, across)
    moves = variance > _STILL
    rest = np.where(moves, np.maximum(variance - explained, 0) / np.where(moves, variance, 1.0), 0.0).sum(axis=1)
    shares[known] = np.divide(rest, moves.sum(axis=1), out=np.full(len(rest), np.nan), where=moves.any(axis=1))
    return shares
