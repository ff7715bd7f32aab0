import numpy as np
import pytest

from scd_robot.errors import ConfigError
from scd_robot.sim_eval import metrics
from scd_robot.sim_eval.metrics import bootstrap_mean_interval, mean_and_median, percentiles, wilson_interval


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [(9, 10, 0.596, 0.982), (45, 50, 0.786, 0.957), (180, 200, 0.851, 0.934), (5, 10, 0.237, 0.763)],
)
def test_wilson_interval_has_the_known_values(successes, n, low, high):
    assert wilson_interval(successes, n) == pytest.approx((low, high), abs=5e-4)


def test_wilson_interval_is_symmetric_and_exact_at_the_ends():
    low, high = wilson_interval(3, 10)
    assert wilson_interval(7, 10) == pytest.approx((1 - high, 1 - low))
    assert wilson_interval(0, 10)[0] == 0.0
    assert wilson_interval(10, 10)[1] == 1.0
    assert 0 < wilson_interval(0, 10)[1] < wilson_interval(0, 10, confidence=0.99)[1]


def test_wilson_interval_of_nothing_is_everything():
    assert wilson_interval(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize(("successes", "n", "confidence"), [(11, 10, 0.95), (-1, 10, 0.95), (1, 10, 1.0), (1, 10, 0.0)])
def test_wilson_interval_refuses_impossible_numbers(successes, n, confidence):
    with pytest.raises(ConfigError, match="must be between"):
        wilson_interval(successes, n, confidence)


def test_percentiles_of_known_values():
    assert percentiles(list(range(101))) == {"p50": 50.0, "p95": 95.0, "p99": 99.0, "count": 101}
    assert percentiles([]) is None


def test_mean_and_median_of_known_values():
    assert mean_and_median([1, 2, 9]) == {"mean": 4.0, "median": 2.0}
    assert mean_and_median([]) is None


def test_bootstrap_of_many_values_is_the_normal_interval(monkeypatch):
    values = np.random.default_rng(0).normal(3, 2, 400)
    half = 1.96 * values.std() / 20
    found = bootstrap_mean_interval(values)
    assert found == pytest.approx((values.mean() - half, values.mean() + half), abs=0.01)
    assert bootstrap_mean_interval(values) == found
    assert bootstrap_mean_interval(values, seed=1) != found
    monkeypatch.setattr(metrics, "_DRAWN_AT_ONCE", 30 * 400)  # the last block is smaller
    assert bootstrap_mean_interval(values) == pytest.approx(found, abs=0.02)


def test_bootstrap_needs_two_values():
    assert bootstrap_mean_interval([]) is None
    assert bootstrap_mean_interval([1.0]) is None
    assert bootstrap_mean_interval([1.0, 1.0]) == (1.0, 1.0)
