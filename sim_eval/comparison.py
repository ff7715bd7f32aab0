"""Which of two policies is better, told from the same start states: START HERE at `compare`.

Two arms that begin alike are compared episode by episode: what counts are the start states that one solves and the
other does not. With several trainings in both arms the trainings are drawn again as well, since they differ by as much
as policies do; with one training in an arm, what is said is about these checkpoints.

Shapes: E evaluations of an arm, R trainings among them, N start states.
"""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from scd_robot.errors import ConfigError, DatasetError
from scd_robot.sim_eval.paired import DECIDED, PairedCounts, evidence, pairs_needed, pairs_not_inferior
from scd_robot.sim_eval.same_starts import (
    Document,
    check_same_conditions,
    check_same_starts,
    compare_pair,
    is_decided,
    outcomes,
)
from scd_robot.sim_eval.seeded import Arm, arm_interval, bootstrap_difference, states_needed

__all__ = [
    "DECIDED",
    "NON_INFERIORITY_MARGIN",
    "Comparison",
    "PairedCounts",
    "arm_interval",
    "check_same_starts",
    "compare",
    "compare_pair",
    "evidence",
    "format_comparison",
    "is_decided",
    "outcomes",
]

SCHEMA = 1  # of a comparison's JSON
NON_INFERIORITY_MARGIN = 0.05
SIGNIFICANCE = 0.05  # of the exact test, without which a pair is not told apart
NO_COUNT = "How many more episodes would tell is not said: outcomes that decide when to stop mislead there."
_FEW_SEEDS = 5


@dataclass(frozen=True)
class Comparison:
    """Two arms, A and B, over the start states that all their evaluations have in common.

    Attributes:
        environment: its name.
        a: arm A.
        b: arm B.
        indices: (N,) numbers of the compared episodes.
        left_out: episodes of some of the evaluations that are not valid in all.
        sequential: the outcomes decided how many episodes there are: only `evidence` tells the arms apart then.
        notes: what a reader has to know before believing the numbers, one sentence each.
    """

    environment: str
    a: Arm
    b: Arm
    indices: NDArray[np.int64]
    left_out: int = 0
    sequential: bool = False
    notes: tuple[str, ...] = ()

    @property
    def about(self) -> Literal["recipes", "checkpoints"]:
        """What the numbers are about: from a single training of an arm nothing follows about its recipe's others."""
        return "recipes" if min(len(self.a.rates), len(self.b.rates)) > 1 else "checkpoints"

    @functools.cached_property
    def pair(self) -> PairedCounts | None:
        """Of one evaluation each; None with more."""
        if len(self.a.success) > 1 or len(self.b.success) > 1:
            return None
        a, b = self.a.success[0], self.b.success[0]
        return PairedCounts(int((a & b).sum()), int((a & ~b).sum()), int((~a & b).sum()), int((~a & ~b).sum()))

    def discordant(self, most: int) -> list[int]:
        """Columns of start states that only one arm's first evaluation solved, A's losses and B's in turn.

        Args:
            most: of them.
        """
        a, b = self.a.success[0], self.b.success[0]
        losses = itertools.zip_longest(np.flatnonzero(~a & b).tolist(), np.flatnonzero(a & ~b).tolist())
        return [column for pair in losses for column in pair if column is not None][:most]

    @property
    def difference(self) -> float:
        """Success rate of A minus that of B."""
        return self.a.rate - self.b.rate

    @functools.cached_property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the difference: paired Newcombe for one evaluation each, else see `bootstrap_difference`.

        After sequential stopping it covers less often than that.
        """
        if self.pair is not None:
            return self.pair.interval
        evaluations = len(self.a.success), len(self.b.success)
        return bootstrap_difference(self.a.rates, self.b.rates, evaluations=evaluations).interval

    @property
    def interval_method(self) -> str:
        """How `interval` comes about, in words."""
        if self.pair is not None:
            return "paired Newcombe"
        if self.about == "checkpoints":
            return "over start states, of these checkpoints"
        return "bootstrap over seeds and start states, or Welch's t over seeds where that is wider"

    @property
    def decided(self) -> bool:
        """Whether the evidence is enough to stop, however often one has looked; never with several evaluations."""
        return self.pair is not None and evidence(self.pair.only_a, self.pair.only_b) >= DECIDED

    @property
    def verdict(self) -> str:
        """What can be said, in one sentence; a second one where it is not about the recipes."""
        if self.sequential:
            return self._verdict_of_evidence()
        if self.pair is None and self.about == "checkpoints":
            return f"{self._verdict_of_interval()} This is about these checkpoints, not about the recipes behind them."
        return self._verdict_of_interval()

    def _verdict_of_interval(self) -> str:
        low, high = self.interval
        margin = 100 * NON_INFERIORITY_MARGIN
        significant = self.pair is None or self.pair.p_value < SIGNIFICANCE
        if low > 0 and significant:
            return f"{self.a.name} is better than {self.b.name}."
        if high < 0 and significant:
            return f"{self.a.name} is worse than {self.b.name}."
        if low > -NON_INFERIORITY_MARGIN and high < NON_INFERIORITY_MARGIN:
            return f"They are equivalent within {margin:g} points."
        if low > -NON_INFERIORITY_MARGIN:
            return f"{self.a.name} is not worse than {self.b.name} by {margin:g} points or more; it may be better."
        return "These episodes do not tell them apart."

    def _verdict_of_evidence(self) -> str:
        pair = self.pair
        assert pair is not None, "sequential stopping is for one evaluation of each arm"
        if not self.decided:
            return "These episodes do not tell them apart."
        better, worse = (self.a.name, self.b.name) if pair.only_a > pair.only_b else (self.b.name, self.a.name)
        return f"{better} is better than {worse}: decided after {pair.total} episodes, with an error rate of 5 %."

    @property
    def episodes_needed(self) -> int | None:
        """Start states in all that tell such a difference in 4 of 5 cases; None where no number of them does.

        None after sequential stopping as well: the difference that was seen is too large on average where it made the
        comparison stop, too small where it did not, and the evidence has less power than the exact test.
        """
        if self.sequential:
            return None
        pair = self.pair
        return states_needed(self.a.rates, self.b.rates) if pair is None else pairs_needed(pair)

    @property
    def episodes_not_inferior(self) -> int | None:
        """Start states in all that show A non-inferior at the shares seen, by Newcombe's interval.

        None where no number of them does, with several evaluations of an arm, and after sequential stopping.
        """
        pair = self.pair
        return None if pair is None or self.sequential else pairs_not_inferior(pair, NON_INFERIORITY_MARGIN)

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
            "about": self.about,
            "a": _arm_json(self.a),
            "b": _arm_json(self.b),
            "difference": self.difference,
            "interval": None if self.sequential else list(self.interval),
            "interval_method": self.interval_method,
            "non_inferior": None if self.sequential else self.interval[0] > -NON_INFERIORITY_MARGIN,
            "margin": NON_INFERIORITY_MARGIN,
            "pair": counted,
            "evidence": None if pair is None else evidence(pair.only_a, pair.only_b),
            "episodes_needed": self.episodes_needed,
            "episodes_not_inferior": self.episodes_not_inferior,
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

    Only episodes that are valid in all of them count. Evaluations of the same weights are one training with other
    noise; where a document does not tell its weights, it is taken for a training of its own.

    Args:
        first: of arm A, one or more for each training seed.
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
        check_same_conditions(first[0], document)
    found = [outcomes(document) for document in (*first, *second)]
    indices = sorted(set.intersection(*(set(successes) for successes in found)))
    if not indices:
        raise DatasetError(f"no episode of {first[0]['env']} is valid in all evaluations; evaluate the same numbers")
    table = np.array([[successes[index] for index in indices] for successes in found], bool)
    seen = {e["index"] for document in (*first, *second) for e in document["episodes_detail"]}
    a = Arm(name_a, table[: len(first)], _trainings(first))
    b = Arm(name_b, table[len(first) :], _trainings(second))
    notes = (*_notes_on_seeds(a, b), *_notes_on_versions((*first, *second)))
    return Comparison(first[0]["env"], a, b, np.array(indices), len(seen) - len(indices), sequential, notes)


def _trainings(documents: Sequence[Document]) -> tuple[int, ...]:
    """Which training each evaluation is of, as numbers from 0: those of the same weights are of the same."""
    numbers: dict[Any, int] = {}
    weights = [document.get("provenance", {}).get("policy", {}).get("weights_sha256") for document in documents]
    return tuple(numbers.setdefault(known or place, len(numbers)) for place, known in enumerate(weights))


def _notes_on_seeds(a: Arm, b: Arm) -> list[str]:
    """What the seeds of two arms leave open."""
    notes = []
    trainings = [len(arm.rates) for arm in (a, b)]
    single = [arm.name for arm, count in zip((a, b), trainings, strict=True) if count == 1]
    if len(a.success) + len(b.success) > 2 and single:
        notes.append(
            f"There is only one training of {' and of '.join(single)}, so nothing is known of how its seeds would "
            "differ: interval, verdict and non-inferiority are about these checkpoints, not about recipes."
        )
    elif len(a.success) + len(b.success) > 2 and min(trainings) < _FEW_SEEDS:
        notes.append(
            f"With fewer than {_FEW_SEEDS} seeds in each arm, little is known of how they differ: intervals are wide."
        )
    for arm in (a, b):
        if len(arm.rates) < len(arm.success):
            notes.append(
                f"{arm.name}: several evaluations are of the same training, and averaged: their seeds are noise."
            )
    return notes


def _notes_on_versions(documents: Sequence[Document]) -> list[str]:
    """In which packages the evaluations differ."""
    notes = []
    versions = [document["versions"] for document in documents if "versions" in document]
    for package in sorted(set.union(set(), *versions)):
        found = sorted({version[package] for version in versions if package in version})
        if len(found) > 1:
            notes.append(f"The evaluations were made with different versions of {package}: {', '.join(found)}.")
    return notes


def format_comparison(comparison: Comparison) -> str:
    """A few lines for people."""
    document = comparison.to_json()
    lines = [f"{comparison.environment}, {document['episodes']} episodes from the same start states"]
    if comparison.left_out:
        lines.append(f"  ({comparison.left_out} others are not valid in all evaluations, and left out)")
    for name in ("a", "b"):
        arm = document[name]
        bounds = f"95 % interval {100 * arm['interval'][0]:.1f}-{100 * arm['interval'][1]:.1f} %"
        seeds = "" if len(arm["seeds"]) == 1 else f"; by seed: {', '.join(f'{100 * r:.1f}' for r in arm['seeds'])} %"
        lines.append(f"  {name.upper()} {arm['name']}: {100 * arm['success_rate']:.1f} % ({bounds}{seeds})")
    low, high = (100 * bound for bound in comparison.interval)
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
    lines += [f"  {line}" for line in (*_lines_on_episodes(comparison), *comparison.notes, comparison.verdict)]
    return "\n".join(lines)


def _lines_on_episodes(comparison: Comparison) -> list[str]:
    """How many more episodes would tell what these do not."""
    if comparison.sequential:
        return [] if comparison.decided else [NO_COUNT]
    lines, seen = [], len(comparison.indices)
    needed, not_inferior = comparison.episodes_needed, comparison.episodes_not_inferior
    if (more := (needed or 0) - seen) > 0:
        lines.append(f"about {more} more episode{'s' * (more > 1)} would tell such a difference in 4 of 5 cases")
    elif comparison.about == "recipes" and needed is None and comparison.difference:
        lines.append(
            "no number of episodes would tell such a difference: the seeds differ too much, train more of them"
        )
    if (more := (not_inferior or 0) - seen) > 0:
        margin = 100 * NON_INFERIORITY_MARGIN
        lines.append(
            f"{more} more episode{'s' * (more > 1)} like these would show that A is not worse by {margin:g} points"
        )
    return lines


def _arm_json(arm: Arm) -> dict[str, Any]:
    return {
        "name": arm.name,
        "seeds": [float(rate) for rate in arm.rates.mean(axis=1)],
        "evaluations": len(arm.success),
        "successes": int(arm.success.sum()),
        "episodes": int(arm.success.size),
        "success_rate": arm.rate,
        "interval": list(arm.interval),
    }
