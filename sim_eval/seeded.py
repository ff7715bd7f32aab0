"""Two arms of several evaluations: of several trainings, or of the same training with other noise.

What differs between trainings of one recipe is told from trainings only. Evaluations of the same weights are therefore
averaged into one row before anything is resampled, and where an arm has a single training, intervals are over start
states: they are about these checkpoints, not about the recipes that made them.

Shapes: E evaluations of an arm, R trainings among them, N start states.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import stdtrit

from scd_robot.errors import ConfigError
from scd_robot.sim_eval.metrics import wilson_interval
from scd_robot.sim_eval.paired import joined_interval, newcombe_interval

__all__ = ["Arm", "SeededDifference", "arm_interval", "bootstrap_difference", "states_needed"]

Rates = NDArray[np.float64]


@dataclass(frozen=True)
class Arm:
    """The evaluations of one arm of a comparison.

    Attributes:
        name: of the arm.
        success: (E, N) by evaluation and start state.
        trainings: (E,) of which training each evaluation is, as numbers from 0.
    """

    name: str
    success: NDArray[np.bool_]
    trainings: tuple[int, ...]

    @functools.cached_property
    def rates(self) -> Rates:
        """(R, N) success by training and start state, averaged over evaluations of the same weights."""
        numbers = np.array(self.trainings)
        return np.array([self.success[numbers == number].mean(axis=0) for number in sorted(set(self.trainings))])

    @property
    def rate(self) -> float:
        """Success rate; every training counts alike."""
        return float(self.rates.mean())

    @functools.cached_property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the success rate, see `arm_interval`."""
        return arm_interval(self.rates, len(self.success))


@dataclass(frozen=True)
class SeededDifference:
    """Difference of two arms of several seeds each.

    Attributes:
        difference: mean success rate of the first minus that of the second.
        interval: 95 % interval.
        rates_a: success rate of each training of the first.
        rates_b: of the second.
    """

    difference: float
    interval: tuple[float, float]
    rates_a: tuple[float, ...]
    rates_b: tuple[float, ...]


def arm_interval(success: ArrayLike, evaluations: int | None = None) -> tuple[float, float]:
    """95 % interval of the success rate of an arm.

    Of one training it is Wilson's over start states. Trainings share start states, and differ as policies do, for which
    Wilson's alone is too narrow: with several of them it is widened to the bootstrap over both, and to Student's t
    interval of the trainings' rates.

    Args:
        success: (R, N), success or rates by training and start state.
        evaluations: how many the rows are averages of; None = one a row.
    """
    arm = np.asarray(success, np.float64)
    if len(arm) == 1:
        rate, size = float(arm.mean()), _effective_states(arm, evaluations or 1)
        return wilson_interval(rate * size, size)
    low, high = wilson_interval(float(arm.sum()), arm.size)
    drawn = np.percentile(_bootstrap(arm, np.zeros((1, arm.shape[1])), 10_000, seed=0), (2.5, 97.5))
    half = _half_of_t([arm])
    rate = float(arm.mean())
    return max(min(low, float(drawn[0]), rate - half), 0.0), min(max(high, float(drawn[1]), rate + half), 1.0)


def bootstrap_difference(
    first: ArrayLike,
    second: ArrayLike,
    draws: int = 10_000,
    seed: int = 0,
    evaluations: tuple[int, int] | None = None,
) -> SeededDifference:
    """Difference of the mean success rates of two arms, over training seeds and start states.

    Each draw takes trainings of either arm with replacement, and start states with replacement, the same ones for both
    arms (start states are paired, seeds are not). From few trainings a bootstrap sees too little spread (3 against 3
    would err in 7 to 16 % of all cases), so the interval is widened to Welch's t interval of the trainings' rates,
    which alone would leave out the start states. Where all outcomes are alike, neither sees any spread: it is never
    narrower than Newcombe's of as many independent pairs as there are in all.

    Where an arm has one training there is no spread of its seeds to be seen. Then trainings are not drawn, and the
    interval is over start states (and noise), about these checkpoints: Wilson's of either arm, for as many start states
    as have its spread, joined as Newcombe does. For one evaluation each that is Newcombe's interval itself.

    Args:
        first: (R, N) success, or rates over several evaluations of the same weights.
        second: (R', N) from the same start states.
        draws: of the bootstrap.
        seed: of the draws.
        evaluations: of either arm, how many its rows are averages of; None = one a row.

    Raises:
        ConfigError: not of these shapes.
    """
    a, b = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or not a.size or not b.size:
        raise ConfigError(f"outcomes must be (seeds, start states), as many states in both, got {a.shape}, {b.shape}")
    if min(len(a), len(b)) == 1:
        interval = _over_states(a, b, evaluations or (len(a), len(b)))
    else:
        interval = _over_seeds(a, b, draws, seed)
    rates = [tuple(float(rate) for rate in arm.mean(axis=1)) for arm in (a, b)]
    return SeededDifference(float(a.mean() - b.mean()), interval, rates[0], rates[1])


def _over_seeds(a: Rates, b: Rates, draws: int, seed: int) -> tuple[float, float]:
    low, high = (float(bound) for bound in np.percentile(_bootstrap(a, b, draws, seed), (2.5, 97.5)))
    mean_a, mean_b = a.mean(axis=0), b.mean(axis=0)
    cells = (mean_a * mean_b, mean_a * (1 - mean_b), (1 - mean_a) * mean_b, (1 - mean_a) * (1 - mean_b))
    least = newcombe_interval(*(min(len(a), len(b)) * float(cell.sum()) for cell in cells))
    difference, half = float(a.mean() - b.mean()), _half_of_t([a, b])
    return max(min(low, least[0], difference - half), -1.0), min(max(high, least[1], difference + half), 1.0)


def _bootstrap(a: Rates, b: Rates, draws: int, seed: int) -> Rates:
    """(draws,) differences of the means of (R, N) and (R', N)."""
    rng = np.random.default_rng(seed)
    differences = np.empty(draws)
    for i in range(draws):
        states = rng.integers(a.shape[1], size=a.shape[1])
        mean_a = a[rng.integers(len(a), size=len(a))].mean(axis=0)
        mean_b = b[rng.integers(len(b), size=len(b))].mean(axis=0)
        differences[i] = (mean_a - mean_b)[states].mean()
    return differences


def _half_of_t(arms: Sequence[Rates]) -> float:
    """Half the width of the 95 % t interval of an arm's rate, or of the difference of two (Welch 1947).

    Args:
        arms: (R, N) each, R at least 2.
    """
    variances = [float(arm.mean(axis=1).var(ddof=1)) / len(arm) for arm in arms]
    if not sum(variances):
        return 0.0
    return _t_quantile(0.975, arms) * math.sqrt(sum(variances))


def _t_quantile(probability: float, arms: Sequence[Rates]) -> float:
    """Of Student's t with Welch and Satterthwaite's degrees of freedom; of the fewest there can be without spread."""
    variances = [float(arm.mean(axis=1).var(ddof=1)) / len(arm) for arm in arms]
    if not sum(variances):
        return float(stdtrit(min(len(arm) for arm in arms) - 1, probability))
    parts = sum(variance**2 / (len(arm) - 1) for variance, arm in zip(variances, arms, strict=True))
    return float(stdtrit(sum(variances) ** 2 / parts, probability))


def _effective_states(arm: Rates, evaluations: int) -> float:
    """Start states of one evaluation each that would tell an arm's rate as well; from N to N times the evaluations.

    Several evaluations from the same start state tell more than one, but only of what noise and seeds do there.
    """
    rate, spread = float(arm.mean()), float(arm.mean(axis=0).var())
    variance = rate * (1 - rate)
    gain = 1.0 if variance <= 0 else variance / spread if spread * evaluations > variance else float(evaluations)
    return arm.shape[1] * max(gain, 1.0)


def _over_states(a: Rates, b: Rates, evaluations: tuple[int, int]) -> tuple[float, float]:
    """95 % interval of the difference over start states alone."""
    spans = []
    for arm, count in zip((a, b), evaluations, strict=True):
        rate, size = float(arm.mean()), _effective_states(arm, count)
        low, high = wilson_interval(rate * size, size)
        spans.append((rate - low, high - rate))
    by_state = a.mean(axis=0), b.mean(axis=0)
    together = float(np.mean(by_state[0] * by_state[1]) - by_state[0].mean() * by_state[1].mean())
    if together > 0:
        together = max(together - 1 / (2 * a.shape[1]), 0.0)  # Newcombe's correction
    apart = float(by_state[0].std() * by_state[1].std())
    correlation = max(together / apart, -1.0) if apart else 0.0
    return joined_interval(float(a.mean() - b.mean()), spans[0], spans[1], correlation)


def states_needed(first: ArrayLike, second: ArrayLike, power: float = 0.8, significance: float = 0.05) -> int | None:
    """Start states that would tell two arms of several evaluations apart, by the spread of seeds and states seen.

    The variance of the bootstrap is that of the seeds, which more start states do not lower, and, over the number of
    start states, that of their paired differences and of what each seed happens to solve; normal approximation. Welch's
    interval has the seeds' variance, and what they happen to solve, with the quantile of Student's t. The larger number
    counts. Where an arm has one training, only the start states' paired differences do.

    Args:
        first: (R, N) success, or rates over several evaluations of the same weights.
        second: (R', N) from the same start states.
        power: wanted probability of an interval without 0.
        significance: its level, two-sided.

    Returns:
        Start states in all, those seen included; None where no difference was seen, or the seeds alone hide it.
    """
    a, b = np.asarray(first, np.float64), np.asarray(second, np.float64)
    by_state = a.mean(axis=0) - b.mean(axis=0)
    difference = float(by_state.mean())
    of_states = float(by_state.var(ddof=1)) if len(by_state) > 1 else 0.0
    z_level, z_power = NormalDist().inv_cdf(1 - significance / 2), NormalDist().inv_cdf(power)
    if min(len(a), len(b)) == 1:
        return _states_for(difference / (z_level + z_power), 0.0, of_states)
    of_seeds = chance = 0.0
    for arm in (a, b):  # what the start states add to the spread of the seeds' rates is told from it
        within = float(arm.var(axis=0, ddof=1).mean())
        chance += within / len(arm)
        of_seeds += max(float(arm.mean(axis=1).var(ddof=1)) - within / arm.shape[1], 0.0) / len(arm)
    t_level = _t_quantile(1 - significance / 2, [a, b])
    numbers = (
        _states_for(difference / (z_level + z_power), of_seeds, of_states + chance),
        _states_for(difference / (t_level + z_power), of_seeds, chance),
    )
    return None if None in numbers else max(number for number in numbers if number is not None)


def _states_for(standard_error: float, of_seeds: float, of_states: float) -> int | None:
    """Start states that lower the standard error of a difference to this one."""
    left = standard_error**2 - of_seeds
    return max(math.ceil(of_states / left), 1) if left > 0 else None
