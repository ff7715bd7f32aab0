"""Copycat ratios and intervals over episodes."""

import numpy as np
import pytest

from scd_robot.analysis.copycat import copycat
from scd_robot.analysis.resampling import interval_of, resampled_sums
from scd_robot.analysis.streams import Stream

ENDS = np.arange(200, 4001, 200)


def walk(correlation, seed=0, length=4000):
    rng = np.random.default_rng(seed)
    values = np.zeros((length, 2), np.float32)
    for i in range(1, length):
        values[i] = correlation * values[i - 1] + np.sqrt(1 - correlation**2) * rng.standard_normal(2)
    return values


def streams_of(actions, ends=ENDS):
    return [Stream(number, action=list(part)) for number, part in enumerate(np.split(actions, ends[:-1]))]


def test_copycats_are_more_predictable_than_demonstrators():
    found = copycat(streams_of(walk(0.9)), walk(0.6, seed=1), ENDS)
    assert found["policy"] == pytest.approx(1 - 0.9**2, rel=0.1)
    assert found["demonstrations"] == pytest.approx(1 - 0.6**2, rel=0.1)
    assert found["ratio"] == pytest.approx(found["policy"] / found["demonstrations"])
    for name, number in (("policy", 1 - 0.9**2), ("demonstrations", 1 - 0.6**2), ("ratio", 0.19 / 0.64)):
        low, high = found["intervals"][name]
        assert low < found[name] < high
        assert low < number < high
    low, high = found["intervals"]["ratio"]
    assert high - low < 0.3 * found["ratio"]


def test_the_share_is_that_of_a_least_squares_fit():
    actions, ends = walk(0.8) @ np.array([[1, 5], [0, 0.1]], np.float32) + np.float32(100), ENDS
    inside = ~np.isin(np.arange(4000), [0, *ends[:-1]])
    last = np.c_[actions[np.flatnonzero(inside) - 1], np.ones(inside.sum())].astype(np.float64)
    now = actions[inside].astype(np.float64)
    rest = now - last @ np.linalg.lstsq(last, now, rcond=None)[0]
    assert copycat(streams_of(actions))["policy"] == pytest.approx((rest.var(0) / now.var(0)).mean(), rel=1e-4)


def test_nothing_is_said_where_nothing_moves_and_without_demonstrations():
    still = copycat([Stream(0, action=[np.ones(2, np.float32)] * 9)])
    assert still["policy"] is None
    assert still["intervals"] == dict.fromkeys(("policy", "demonstrations", "ratio"))
    alone = copycat(streams_of(walk(0.9), ENDS[-1:]))
    assert alone["ratio"] is None
    assert alone["policy"] == pytest.approx(1 - 0.9**2, rel=0.1)
    assert alone["intervals"]["policy"] is None  # of one episode


def test_a_standstill_after_the_longest_demonstration_does_not_count():
    stuck = [Stream(s.episode, action=[*s.action, *([s.action[-1]] * 2000)]) for s in streams_of(walk(0.6))]
    assert copycat(stuck, walk(0.6, seed=1), ENDS)["ratio"] == pytest.approx(1, rel=0.15)


def test_numbers_that_are_constant_up_to_rounding_do_not_count():
    actions, demonstrations = walk(0.9), walk(0.6, seed=1)
    noise = np.random.default_rng(0).standard_normal((4000, 1)).astype(np.float32)
    still = np.float32(0.7) + np.float32(3e-8) * noise
    found = copycat(streams_of(np.c_[actions, still]), np.c_[demonstrations, noise], ENDS)
    plain = copycat(streams_of(actions), demonstrations, ENDS)
    assert found["ratio"] == pytest.approx(plain["ratio"])


def test_plans_of_an_episode_that_are_alike_count_as_one():
    values = np.random.default_rng(0).standard_normal(100)
    drawn = resampled_sums(np.stack([10 * values, np.full(100, 10)], axis=1))  # ten plans each
    low, high = interval_of(drawn[:, 0] / drawn[:, 1])
    assert low < values.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 10, rel=0.15)
    other = resampled_sums(np.stack([10 * values, np.full(100, 10)], axis=1), key=1)
    assert not np.array_equal(drawn, other)
    assert interval_of(resampled_sums(np.ones((1, 2)))[:, 0]) is None
