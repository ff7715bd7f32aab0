"""Two evaluations start state by start state: evidence that may be looked at at any time, numbers of episodes."""

import itertools

import numpy as np
import pytest

from scd_robot.sim_eval.paired import (
    PairedCounts,
    evidence,
    newcombe_interval,
    pairs_needed,
    pairs_not_inferior,
    smallest_count,
)


def test_evidence_is_a_martingale_of_fair_coins():
    for a, b in itertools.product(range(6), repeat=2):
        assert evidence(a, b) == pytest.approx((evidence(a + 1, b) + evidence(a, b + 1)) / 2)
    assert evidence(0, 0) == 1
    assert evidence(3000, 0) > 1e300
    assert evidence(8, 0) == pytest.approx(evidence(0, 8))


def test_evidence_rarely_misleads_whoever_looks_all_the_time():
    rng = np.random.default_rng(0)
    misled = 0
    for _ in range(400):
        heads = np.cumsum(rng.random(150) < 0.5)
        misled += any(evidence(int(h), n + 1 - int(h)) >= 20 for n, h in enumerate(heads))
    assert misled <= 0.05 * 400


def test_as_many_pairs_as_have_the_wanted_power():
    counts = PairedCounts(both=60, only_a=20, only_b=10, neither=10)
    needed = pairs_needed(counts)
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(600):
        only_a, only_b, same = rng.multinomial(needed, [0.2, 0.1, 0.7])
        hits += PairedCounts(int(same), int(only_a), int(only_b), 0).p_value < 0.05
    assert 0.72 < hits / 600 < 0.86
    assert pairs_needed(PairedCounts(5, 3, 3, 0)) is None


def test_the_exact_test_needs_six_discordant_pairs():
    assert pairs_needed(PairedCounts(both=99, only_a=1, only_b=0, neither=0)) >= 600
    assert pairs_needed(PairedCounts(both=0, only_a=10, only_b=0, neither=0)) == 6


@pytest.mark.parametrize("outcomes", [(96, 2, 2, 0), (192, 4, 4, 0), (40, 3, 5, 12), (10, 0, 0, 0), (50, 20, 5, 25)])
def test_the_smallest_number_that_shows_non_inferiority(outcomes):
    needed = pairs_not_inferior(PairedCounts(*outcomes), 0.05)
    shares = np.array(outcomes) / sum(outcomes)
    shown = [newcombe_interval(*(shares * n))[0] > -0.05 for n in range(1, 2 * needed)]
    assert shown.index(True) + 1 == needed
    assert all(shown[needed - 1 :])


def test_non_inferiority_that_no_number_shows():
    assert pairs_not_inferior(PairedCounts(90, 0, 5, 5), 0.05) is None
    assert smallest_count(lambda n: False) is None
