"""Late, lost and frozen observations: what the policy sees, and that nothing else changes."""

import json

import numpy as np
import pytest

from scd_robot.errors import ConfigError
from scd_robot.sim_eval.delay_curve import delay_curve, write_delay_curve
from scd_robot.sim_eval.faults import FaultInjector, ObservationFaults, describe
from scd_robot.sim_eval.rollout import evaluate

DT = 0.05


def seen(faults, steps=200, episode=0, row=0):
    """Numbers of the control steps whose observations the policy sees; -1 = the one before the first."""
    injector = FaultInjector(faults, DT)
    injector.begin(row, episode, {"x": np.array(-1)})
    return [int(injector.deliver(row, {"x": np.array(step)})["x"]) for step in range(steps)]


@pytest.mark.parametrize(("latency_ms", "late"), [(0, 0), (49.9, 1), (50, 1), (50.1, 2), (200, 4)])
def test_latency_delays_by_whole_control_steps(latency_ms, late):
    assert seen(ObservationFaults(latency_ms=latency_ms), 10) == [max(-1, step - late) for step in range(10)]


def test_jitter_never_goes_back_in_time_nor_beyond_its_bounds():
    steps = seen(ObservationFaults(latency_ms=50, jitter_ms=120))
    assert (np.diff(steps) >= 0).all()
    late = np.arange(200)[10:] - steps[10:]
    assert set(late) <= {1, 2, 3, 4}
    assert len(set(late)) > 1


def test_lost_observations_are_those_before_them():
    steps = np.array(seen(ObservationFaults(drop=0.3), 2000))
    lost = steps != np.arange(2000)
    assert lost.mean() == pytest.approx(0.3, abs=0.04)
    assert (steps[1:][lost[1:]] == steps[:-1][lost[1:]]).all()


def test_frozen_sensors_repeat_for_so_many_steps():
    steps = np.array(seen(ObservationFaults(freeze=0.02, freeze_steps=7), 3000))
    frozen = np.flatnonzero(np.diff(steps, prepend=-2) == 0)
    starts = frozen[np.diff(frozen, prepend=-9) > 1]
    assert len(starts) > 20
    for start in starts:
        length = np.argmax(np.diff(steps[start - 1 :]) != 0)
        assert length % 7 == 0  # two may follow each other


def test_an_episode_has_the_same_troubles_in_any_row():
    faults = ObservationFaults(jitter_ms=200, drop=0.2, freeze=0.05)
    assert seen(faults, episode=3, row=0) == seen(faults, episode=3, row=5)
    assert seen(faults, episode=3) != seen(faults, episode=4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"latency_ms": -1}, "0 ms or more"),
        ({"jitter_ms": float("nan")}, "0 ms or more"),
        ({"drop": 1.0}, r"in \[0, 1\)"),
        ({"freeze": -0.1}, r"in \[0, 1\)"),
        ({"freeze_steps": 0}, "at least 1"),
    ],
)
def test_what_cannot_be(options, message):
    with pytest.raises(ConfigError, match=message):
        ObservationFaults(**options)


def test_words_for_people():
    assert describe(ObservationFaults().to_json()) == ""
    text = describe(ObservationFaults(latency_ms=50, jitter_ms=20, drop=0.1, freeze=0.01).to_json())
    assert text == "observations 50 + 0 to 20 ms late, 10 % lost, frozen for 20 steps with 1 % per step"


class Watcher:
    """Remembers what it sees; `rows` and `episodes` as an evaluation gives them."""

    def __init__(self):
        self.seen = []

    def reset(self, rows=None, episodes=None):
        pass

    def act(self, observation):
        self.seen.append(observation["position"].copy())
        return np.ones((len(observation["position"]), 2), np.float32)


def test_an_evaluation_changes_only_what_the_policy_sees(toy):
    results, positions = [], []
    for latency in (0, 100):
        policy = Watcher()
        faults = ObservationFaults(latency_ms=latency)
        results.append(
            evaluate(policy, "toy_environment:make_point", 1, num_envs=1, max_steps=8, faults=faults, progress=False)
        )
        positions.append(np.concatenate(policy.seen))
    now, late = positions
    np.testing.assert_array_equal(late[2:], now[:-2])
    np.testing.assert_array_equal(late[:2], now[[0, 0]])
    assert results[0].episodes_detail == results[1].episodes_detail
    assert results[1].to_json()["faults"]["latency_ms"] == 100


def test_outcomes_do_not_depend_on_the_number_of_environments(toy):
    faults = ObservationFaults(latency_ms=50, jitter_ms=100, drop=0.2)
    found = [
        evaluate(toy.GoToGoal(), "toy_environment:make_point", 6, num_envs=n, faults=faults, progress=False)
        for n in (1, 4)
    ]
    assert found[0].episodes_detail == found[1].episodes_detail


def test_a_curve_over_delays_is_one_document_and_one_page(toy, tmp_path):
    documents = [
        evaluate(
            toy.GoToGoal(), "toy_environment:make_point", 4, num_envs=2, progress=False,
            faults=ObservationFaults(latency_ms=latency),
        ).to_json()
        for latency in (0, 400)
    ]  # fmt: skip
    document = delay_curve(documents)
    assert [point["latency_ms"] for point in document["curve"]] == [0, 400]
    write_delay_curve(document, tmp_path)
    assert json.loads((tmp_path / "latency.json").read_text())["curve"] == document["curve"]
    assert "<svg" in (tmp_path / "latency.html").read_text()
