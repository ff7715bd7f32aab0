"""Which of two policies is better, told from the same start states: START HERE at `compare`.

Two arms that begin alike are compared episode by episode: what counts are the start states that one solves and the
other does not. With several training seeds per arm the seeds are drawn again as well, since they differ by as much as
policies do.

Shapes: R seeds (runs) of an arm, N start states.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scd_robot.errors import ConfigError, DatasetError
from scd_robot.sim_eval.metrics import wilson_interval

__all__ = [
    "NON_INFERIORITY_MARGIN",
    "Comparison",
    "PairedCounts",
    "SeededDifference",
    "arm_interval",
    "bootstrap_difference",
    "check_same_starts",
    "compare",
    "compare_pair",
    "evidence",
    "format_comparison",
    "outcomes",
    "pairs_needed",
    "states_needed",
]

SCHEMA = 1  # of a comparison's JSON
NON_INFERIORITY_MARGIN = 0.05
SIGNIFICANCE = 0.05  # of the exact test, without which a pair is not told apart
DECIDED = 20.0  # of `evidence`: an error rate of 1 / 20
_LARGEST_LOG = 700.0  # beyond which there is no float
_FEW_SEEDS = 5
_FEWEST_DISCORDANT = 6  # 2 / 2^6 < 0.05 < 2 / 2^5
_PRIOR = 0.5  # of the beta mixture of `evidence` (Jeffreys')

Document = Mapping[str, Any]


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
        return _newcombe(self.both, self.only_a, self.only_b, self.neither)


def _newcombe(a: float, b: float, c: float, d: float) -> tuple[float, float]:
    """The interval of `PairedCounts`, of counts that need not be whole: both, only the first, only the second, none."""
    n = a + b + c + d
    rate_a, rate_b = (a + b) / n, (a + c) / n
    low_a, high_a = wilson_interval(min(a + b, n), n)  # sums of fractions may be a hair off
    low_b, high_b = wilson_interval(min(a + c, n), n)
    margins = (a + b) * (c + d) * (a + c) * (b + d)
    product = a * d - b * c
    corrected = max(product - n / 2, 0.0) if product > 0 else float(product)
    phi = corrected / math.sqrt(margins) if margins else 0.0

    def joined(x: float, y: float) -> float:
        return math.sqrt(max(x * x - 2 * phi * x * y + y * y, 0.0))

    below = joined(rate_a - low_a, high_b - rate_b)
    above = joined(high_a - rate_a, rate_b - low_b)
    return (b - c) / n - below, (b - c) / n + above


@dataclass(frozen=True)
class SeededDifference:
    """Difference of two arms of several seeds each.

    Attributes:
        difference: mean success rate of the first minus that of the second.
        interval: 95 % percentile interval of the bootstrap over seeds and start states.
        rates_a: success rate of each seed of the first.
        rates_b: of the second.
    """

    difference: float
    interval: tuple[float, float]
    rates_a: tuple[float, ...]
    rates_b: tuple[float, ...]


@dataclass(frozen=True)
class Comparison:
    """Two arms, A and B, over the start states that all their evaluations have in common.

    Attributes:
        environment: its name.
        name_a: of arm A.
        name_b: of arm B.
        indices: (N,) numbers of the compared episodes.
        success_a: (R, N) by seed and episode.
        success_b: (R', N).
        left_out: episodes of some of the evaluations that are not valid in all.
        sequential: the outcomes decided how many episodes there are: only `evidence` tells the arms apart then.
        notes: what a reader has to know before believing the numbers, one sentence each.
    """

    environment: str
    name_a: str
    name_b: str
    indices: NDArray[np.int64]
    success_a: NDArray[np.bool_]
    success_b: NDArray[np.bool_]
    left_out: int = 0
    sequential: bool = False
    notes: tuple[str, ...] = ()

    @property
    def pair(self) -> PairedCounts | None:
        """Of one seed each; None with more."""
        if len(self.success_a) > 1 or len(self.success_b) > 1:
            return None
        a, b = self.success_a[0], self.success_b[0]
        return PairedCounts(int((a & b).sum()), int((a & ~b).sum()), int((~a & b).sum()), int((~a & ~b).sum()))

    def discordant(self, most: int) -> list[int]:
        """Columns of start states that only one arm's first seed solved, A's losses and B's in turn.

        Args:
            most: of them.
        """
        a, b = self.success_a[0], self.success_b[0]
        losses = itertools.zip_longest(np.flatnonzero(~a & b).tolist(), np.flatnonzero(a & ~b).tolist())
        return [column for pair in losses for column in pair if column is not None][:most]

    @property
    def difference(self) -> float:
        """Success rate of A minus that of B."""
        return float(self.success_a.mean() - self.success_b.mean())

    @functools.cached_property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the difference: paired Newcombe for one seed each, else bootstrap over seeds and states.

        After sequential stopping it covers less often than that.
        """
        pair = self.pair
        return bootstrap_difference(self.success_a, self.success_b).interval if pair is None else pair.interval

    @property
    def verdict(self) -> str:
        """What can be said, in one sentence."""
        if self.sequential:
            return self._verdict_of_evidence()
        low, high = self.interval
        margin = 100 * NON_INFERIORITY_MARGIN
        significant = self.pair is None or self.pair.p_value < SIGNIFICANCE
        if low > 0 and significant:
            return f"{self.name_a} is better than {self.name_b}."
        if high < 0 and significant:
            return f"{self.name_a} is worse than {self.name_b}."
        if low > -NON_INFERIORITY_MARGIN and high < NON_INFERIORITY_MARGIN:
            return f"They are equivalent within {margin:g} points."
        if low > -NON_INFERIORITY_MARGIN:
            return f"{self.name_a} is not worse than {self.name_b} by {margin:g} points or more; it may be better."
        return "These episodes do not tell them apart."

    def _verdict_of_evidence(self) -> str:
        pair = self.pair
        assert pair is not None, "sequential stopping is for one evaluation of each arm"
        if evidence(pair.only_a, pair.only_b) < DECIDED:
            return "These episodes do not tell them apart."
        better, worse = (self.name_a, self.name_b) if pair.only_a > pair.only_b else (self.name_b, self.name_a)
        return f"{better} is better than {worse}: decided after {pair.total} episodes, with an error rate of 5 %."

    @property
    def episodes_needed(self) -> int | None:
        """Start states in all that tell such a difference in 4 of 5 cases; None where no number of them does."""
        pair = self.pair
        return states_needed(self.success_a, self.success_b) if pair is None else pairs_needed(pair)

    def to_json(self) -> dict[str, Any]:
        """As plain JSON types; `docs/evaluation.md` describes them."""
        pair = self.pair
        p_value = None if pair is None or self.sequential else pair.p_value
        counted = None if pair is None else dataclasses.asdict(pair) | {"p_value": p_value}
        return {
            "schema": SCHEMA,
            "env": self.environment,
            "episodes": len(self.indices),
            "left_out": self.left_out,
            "sequential": self.sequential,
            "a": _arm_json(self.name_a, self.success_a),
            "b": _arm_json(self.name_b, self.success_b),
            "difference": self.difference,
            "interval": None if self.sequential else list(self.interval),
            "interval_method": "bootstrap over seeds and start states" if pair is None else "paired Newcombe",
            "non_inferior": None if self.sequential else self.interval[0] > -NON_INFERIORITY_MARGIN,
            "margin": NON_INFERIORITY_MARGIN,
            "pair": counted,
            "evidence": None if pair is None else evidence(pair.only_a, pair.only_b),
            "episodes_needed": self.episodes_needed,
            "verdict": self.verdict,
            "notes": list(self.notes),
        }


def compare(
    first: Sequence[Document],
    second: Sequence[Document],
    name_a: str = "A",
    name_b: str = "B",
    *,
    sequential: bool = False,
) -> Comparison:
    """Compares two arms by the evaluations of their seeds (`result.json` of each).

    Only episodes that are valid in all of them count.

    Args:
        first: of arm A, one for each training seed.
        second: of arm B.
        name_a: of arm A.
        name_b: of arm B.
        sequential: the outcomes decided how many episodes there are.

    Raises:
        ConfigError: an arm has no evaluation, or, sequentially, several.
        DatasetError: they did not start from the same states, or were made under other conditions.
    """
    if not first or not second:
        raise ConfigError("a comparison needs at least one evaluation of each arm")
    if sequential and len(first) + len(second) > 2:
        raise ConfigError("sequential stopping is for one evaluation of each arm, not for several seeds")
    for document in (*first, *second):
        check_same_starts(first[0], document)
        _check_same_conditions(first[0], document)
    found = [outcomes(document) for document in (*first, *second)]
    indices = sorted(set.intersection(*(set(successes) for successes in found)))
    if not indices:
        raise DatasetError(f"no episode of {first[0]['env']} is valid in all evaluations; evaluate the same numbers")
    table = np.array([[successes[index] for index in indices] for successes in found], bool)
    seen = {e["index"] for document in (*first, *second) for e in document["episodes_detail"]}
    arms = table[: len(first)], table[len(first) :]
    left_out, notes = len(seen) - len(indices), tuple(_notes(first, second, name_a, name_b))
    return Comparison(first[0]["env"], name_a, name_b, np.array(indices), *arms, left_out, sequential, notes)


def _notes(first: Sequence[Document], second: Sequence[Document], name_a: str, name_b: str) -> list[str]:
    """What a reader has to know before believing the numbers."""
    notes = []
    several = len(first) + len(second) > 2
    if several and min(len(first), len(second)) < _FEW_SEEDS:
        notes.append(f"With fewer than {_FEW_SEEDS} seeds in each arm, intervals over seeds are too narrow.")
    for name, arm in ((name_a, first), (name_b, second)):
        weights = [document.get("provenance", {}).get("policy", {}).get("weights_sha256") for document in arm]
        if len(arm) > 1 and weights[0] is not None and len(set(weights)) < len(arm):
            notes.append(f"{name}: several evaluations are of the same training, so its seeds are those of the noise.")
    versions = [document["versions"] for document in (*first, *second) if "versions" in document]
    for package in sorted(set.union(set(), *versions)):
        found = sorted({version[package] for version in versions if package in version})
        if len(found) > 1:
            notes.append(f"The evaluations were made with different versions of {package}: {', '.join(found)}.")
    return notes


def format_comparison(comparison: Comparison) -> str:
    """A few lines for people."""
    document = comparison.to_json()
    low, high = (100 * bound for bound in comparison.interval)
    lines = [f"{comparison.environment}, {document['episodes']} episodes from the same start states"]
    if comparison.left_out:
        lines.append(f"  ({comparison.left_out} others are not valid in all evaluations, and left out)")
    for name in ("a", "b"):
        arm = document[name]
        bounds = f"95 % interval {100 * arm['interval'][0]:.1f}-{100 * arm['interval'][1]:.1f} %"
        seeds = "" if len(arm["seeds"]) == 1 else f"; by seed: {', '.join(f'{100 * r:.1f}' for r in arm['seeds'])} %"
        lines.append(f"  {name.upper()} {arm['name']}: {100 * arm['success_rate']:.1f} % ({bounds}{seeds})")
    bounds = (
        "" if comparison.sequential else f", 95 % interval {low:+.1f} to {high:+.1f} ({document['interval_method']})"
    )
    lines.append(f"  A - B: {100 * comparison.difference:+.1f} points{bounds}")
    pair = comparison.pair
    if pair is not None:
        lines.append(
            f"  only A solved {pair.only_a}, only B {pair.only_b}, both {pair.both}, none {pair.neither}"
            + ("" if comparison.sequential else f"; exact McNemar p = {pair.p_value:.3g}")
        )
        lines.append(f"  evidence {document['evidence']:.3g}, decided from {DECIDED:g} on, however often one looks")
    more = (document["episodes_needed"] or 0) - document["episodes"]
    if more > 0:
        lines.append(f"  about {more} more episode{'s' * (more > 1)} would tell such a difference in 4 of 5 cases")
    elif pair is None and document["episodes_needed"] is None and comparison.difference:
        lines.append(
            "  no number of episodes would tell such a difference: the seeds differ too much, train more of them"
        )
    lines += [f"  {note}" for note in comparison.notes]
    lines.append(f"  {comparison.verdict}")
    return "\n".join(lines)


def _arm_json(name: str, success: NDArray[np.bool_]) -> dict[str, Any]:
    return {
        "name": name,
        "seeds": [float(rate) for rate in success.mean(axis=1)],
        "successes": int(success.sum()),
        "episodes": int(success.size),
        "success_rate": float(success.mean()),
        "interval": list(arm_interval(success)),
    }


def arm_interval(success: NDArray[np.bool_]) -> tuple[float, float]:
    """95 % interval of the success rate of an arm: Wilson's, widened to the bootstrap over several seeds.

    Seeds share start states, and differ as policies do: Wilson's alone is too narrow.

    Args:
        success: (R, N), seeds and start states.
    """
    low, high = wilson_interval(int(success.sum()), int(success.size))
    if len(success) > 1:
        arm = success.astype(np.float64)
        drawn = np.percentile(_bootstrap(arm, np.zeros((1, arm.shape[1])), 10_000, seed=0), (2.5, 97.5))
        low, high = min(low, float(drawn[0])), max(high, float(drawn[1]))
    return low, high


def outcomes(document: Document) -> dict[int, bool]:
    """Success by episode index of an evaluation's JSON; episodes that a crash made invalid are left out."""
    return {e["index"]: bool(e["success"]) for e in document["episodes_detail"] if not e["invalid"]}


def check_same_starts(first: Document, second: Document) -> None:
    """Refuses to compare evaluations that did not begin alike.

    Raises:
        DatasetError: other environments, or the hash of a common episode's start state differs, or none is common.
    """
    if first["env"] != second["env"]:
        raise DatasetError(f"these evaluations are of different environments, {first['env']} and {second['env']}")
    hashes = {e["index"]: e["initial_state_hash"] for e in second["episodes_detail"] if not e["invalid"]}
    common = [e for e in first["episodes_detail"] if not e["invalid"] and e["index"] in hashes]
    if not common:
        raise DatasetError(f"these evaluations of {first['env']} have no episode in common; evaluate the same numbers")
    for episode in common:
        if episode["initial_state_hash"] != hashes[episode["index"]]:
            raise DatasetError(
                f"episode {episode['index']} of {first['env']} did not start from the same state in both evaluations: "
                "another version of the simulator, or of this package; evaluate both anew"
            )


def _check_same_conditions(first: Document, second: Document) -> None:
    """Raises DatasetError where two evaluations differ in more than the policy."""
    for name in ("max_steps", "faults", "success_definition"):
        if name in first and name in second and first[name] != second[name]:
            raise DatasetError(
                f"these evaluations of {first['env']} were made under other conditions ({name}: {first[name]} and "
                f"{second[name]}): the policies cannot be told apart by them"
            )


def compare_pair(first: Document, second: Document) -> PairedCounts:
    """Compares two evaluations start state by start state.

    Raises:
        DatasetError: they did not start from the same states.
    """
    check_same_starts(first, second)
    a, b = outcomes(first), outcomes(second)
    counts = {(x, y): 0 for x in (True, False) for y in (True, False)}
    for index in a.keys() & b.keys():
        counts[a[index], b[index]] += 1
    return PairedCounts(counts[True, True], counts[True, False], counts[False, True], counts[False, False])


def bootstrap_difference(
    first: NDArray[np.bool_], second: NDArray[np.bool_], draws: int = 10_000, seed: int = 0
) -> SeededDifference:
    """Difference of the mean success rates of two arms over training seeds and start states.

    Each draw takes seeds of either arm with replacement, and start states with replacement, the same ones for both arms
    (start states are paired, seeds are not). With fewer than about five seeds the interval is too narrow; it says at
    least how much of the difference a few seeds explain. Where all outcomes are alike, a bootstrap sees no spread:
    the interval is never narrower than Newcombe's of as many independent pairs as there are in all.

    Args:
        first: (R, N) success.
        second: (R', N) success from the same start states.
        draws: of the bootstrap.
        seed: of the draws.

    Raises:
        ConfigError: not of these shapes.
    """
    a, b = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or not a.size or not b.size:
        raise ConfigError(f"outcomes must be (seeds, start states), as many states in both, got {a.shape}, {b.shape}")
    low, high = np.percentile(_bootstrap(a, b, draws, seed), (2.5, 97.5))
    mean_a, mean_b = a.mean(axis=0), b.mean(axis=0)
    cells = (mean_a * mean_b, mean_a * (1 - mean_b), (1 - mean_a) * mean_b, (1 - mean_a) * (1 - mean_b))
    least = _newcombe(*(min(len(a), len(b)) * float(cell.sum()) for cell in cells))
    low, high = min(low, least[0]), max(high, least[1])
    rates = [tuple(float(rate) for rate in arm.mean(axis=1)) for arm in (a, b)]
    return SeededDifference(float(a.mean() - b.mean()), (float(low), float(high)), rates[0], rates[1])


def _bootstrap(a: NDArray[np.float64], b: NDArray[np.float64], draws: int, seed: int) -> NDArray[np.float64]:
    """(draws,) differences of the means of (R, N) and (R', N)."""
    rng = np.random.default_rng(seed)
    differences = np.empty(draws)
    for i in range(draws):
        states = rng.integers(a.shape[1], size=a.shape[1])
        mean_a = a[rng.integers(len(a), size=len(a))].mean(axis=0)
        mean_b = b[rng.integers(len(b), size=len(b))].mean(axis=0)
        differences[i] = (mean_a - mean_b)[states].mean()
    return differences


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


def states_needed(
    first: NDArray[np.bool_], second: NDArray[np.bool_], power: float = 0.8, significance: float = 0.05
) -> int | None:
    """Start states that would tell two arms of several seeds apart, by the spread of seeds and of start states seen.

    The variance of the bootstrap is that of the seeds, which more start states do not lower, and, over the number of
    start states, that of their paired differences and of what each seed happens to solve; normal approximation.

    Args:
        first: (R, N) success.
        second: (R', N) success from the same start states.
        power: wanted probability of an interval without 0.
        significance: its level, two-sided.

    Returns:
        Start states in all, those seen included; None where no difference was seen, or the seeds alone hide it.
    """
    a, b = np.asarray(first, np.float64), np.asarray(second, np.float64)
    by_state = a.mean(axis=0) - b.mean(axis=0)
    of_states = float(by_state.var(ddof=1)) if len(by_state) > 1 else 0.0
    of_seeds = 0.0
    for arm in (a, b):
        if len(arm) > 1:  # what the start states add to the spread of the seeds' rates is told from it
            within = float(arm.var(axis=0, ddof=1).mean())
            of_states += within / len(arm)
            of_seeds += max(float(arm.mean(axis=1).var(ddof=1)) - within / arm.shape[1], 0.0) / len(arm)
    wanted = NormalDist().inv_cdf(1 - significance / 2) + NormalDist().inv_cdf(power)
    left = (float(by_state.mean()) / wanted) ** 2 - of_seeds
    return math.ceil(of_states / left) if left > 0 else None


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
