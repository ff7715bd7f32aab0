"""Two arms with one evaluation each, start state by start state: exact test, interval, evidence, episodes needed."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

from scd_robot.sim_eval.metrics import wilson_interval

__all__ = [
    "DECIDED",
    "PairedCounts",
    "evidence",
    "joined_interval",
    "newcombe_interval",
    "pairs_needed",
    "pairs_not_inferior",
    "smallest_count",
]

DECIDED = 20.0  # of `evidence`: an error rate of 1 / 20
_LARGEST_LOG = 700.0  # beyond which there is no float
_FEWEST_DISCORDANT = 6  # 2 / 2^6 < 0.05 < 2 / 2^5
_PRIOR = 0.5  # of the beta mixture of `evidence` (Jeffreys')
_MOST = 2**40  # episodes, beyond which a difference is one of rounding


@dataclass(frozen=True)
class PairedCounts:
    """Outcomes of two arms from the same start states.

    Attributes:
        both: solved by both.
        only_a: solved by the first only.
        only_b: solved by the second only.
        neither: solved by none.
    """

    both: int
    only_a: int
    only_b: int
    neither: int

    @property
    def total(self) -> int:
        """Start states compared."""
        return self.both + self.only_a + self.only_b + self.neither

    @property
    def difference(self) -> float:
        """Success rate of the first minus that of the second."""
        return (self.only_a - self.only_b) / self.total

    @property
    def p_value(self) -> float:
        """Exact two-sided McNemar test: under no difference, discordant pairs fall either way like a fair coin."""
        discordant = self.only_a + self.only_b
        tail = sum(math.comb(discordant, k) for k in range(min(self.only_a, self.only_b) + 1))
        return min(1.0, 2 * tail / 2**discordant)

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the difference: Newcombe's method 10 for paired proportions.

        Newcombe, "Improved confidence intervals for the difference between binomial proportions based on paired data",
        Statistics in Medicine 17 (1998): Wilson intervals of the two rates, joined with the correlation of outcomes.
        """
        return newcombe_interval(self.both, self.only_a, self.only_b, self.neither)


def newcombe_interval(a: float, b: float, c: float, d: float) -> tuple[float, float]:
    """The interval of `PairedCounts`, of counts that need not be whole.

    Args:
        a: solved by both.
        b: by the first only.
        c: by the second only.
        d: by none.
    """
    n = a + b + c + d
    found_a, found_b = min(a + b, n), min(a + c, n)  # sums of fractions may be a hair off
    margins = (a + b) * (c + d) * (a + c) * (b + d)
    product = a * d - b * c
    corrected = max(product - n / 2, 0.0) if product > 0 else float(product)
    phi = corrected / math.sqrt(margins) if margins else 0.0
    return joined_interval((b - c) / n, _spans(found_a, n), _spans(found_b, n), phi)


def _spans(successes: float, n: float) -> tuple[float, float]:
    """How far Wilson's interval reaches below and above a rate."""
    low, high = wilson_interval(successes, n)
    return successes / n - low, high - successes / n


def joined_interval(
    difference: float, first: tuple[float, float], second: tuple[float, float], correlation: float
) -> tuple[float, float]:
    """Interval of the difference of two rates from how far the interval of each reaches below and above it.

    Args:
        difference: of the rates.
        first: below and above the first.
        second: below and above the second.
        correlation: of their outcomes.
    """

    def joined(x: float, y: float) -> float:
        return math.sqrt(max(x * x - 2 * correlation * x * y + y * y, 0.0))

    return difference - joined(first[0], second[1]), difference + joined(first[1], second[0])


def pairs_needed(counts: PairedCounts, power: float = 0.8, significance: float = 0.05) -> int | None:
    """Start states that would tell the two arms apart if the shares of discordant pairs are those seen.

    Connor, "Sample size for testing differences in proportions for the paired-sample design", Biometrics 43 (1987); at
    least as many as are expected to hold 6 discordant pairs, without which no outcome of the exact test is significant.

    Args:
        counts: what was seen.
        power: wanted probability of a significant McNemar test.
        significance: its level, two-sided.

    Returns:
        Start states in all, those seen included; None where no difference was seen.
    """
    difference, discordant = abs(counts.difference), (counts.only_a + counts.only_b) / counts.total
    if difference == 0:
        return None
    z_level, z_power = NormalDist().inv_cdf(1 - significance / 2), NormalDist().inv_cdf(power)
    root = z_level * math.sqrt(discordant) + z_power * math.sqrt(max(discordant - difference**2, 0.0))
    return math.ceil(max((root / difference) ** 2, _FEWEST_DISCORDANT / discordant))


def pairs_not_inferior(counts: PairedCounts, margin: float) -> int | None:
    """Start states that would show the first arm not inferior if the shares of outcomes are those seen.

    Args:
        counts: what was seen.
        margin: the lower end of Newcombe's interval must be above -margin.

    Returns:
        The smallest number of start states in all; None where the difference itself is not above -margin.
    """
    shares = [count / counts.total for count in (counts.both, counts.only_a, counts.only_b, counts.neither)]
    return smallest_count(lambda n: newcombe_interval(*(share * n for share in shares))[0] > -margin)


def smallest_count(holds: Callable[[int], bool]) -> int | None:
    """The smallest number from 1 on for which something holds that goes on to hold once it does; None where none is."""
    high = 1
    while not holds(high):
        high *= 2
        if high > _MOST:
            return None
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def evidence(only_a: int, only_b: int) -> float:
    """Evidence against "no difference" that may be looked at after every episode (an e-value).

    Under no difference each discordant pair is a fair coin, and this is the wealth of a gambler who bets on a coin of
    unknown bias, with Jeffreys' prior: a martingale that begins at 1, so the probability that it ever reaches 20 is at
    most 1/20 (Ville), however often one looks. Stopping once it is 20 or more therefore keeps an error rate of 5 %.

    Args:
        only_a: start states that only the first arm solved.
        only_b: start states that only the second arm solved.
    """
    n = only_a + only_b
    log_beta = math.lgamma(only_a + _PRIOR) + math.lgamma(only_b + _PRIOR) - math.lgamma(n + 2 * _PRIOR)
    log_prior = 2 * math.lgamma(_PRIOR) - math.lgamma(2 * _PRIOR)
    return math.exp(min(n * math.log(2) + log_beta - log_prior, _LARGEST_LOG))
