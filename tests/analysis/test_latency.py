"""Latencies taken in turns: how many of what are measured, whatever the policy's rhythm."""

import numpy as np
import pytest
import torch
from tiny import tiny_data, tiny_experiment

from scd_robot.analysis.latency import TIMES, take_turns
from scd_robot.model import build_model
from scd_robot.normalization import Normalizer, compute_statistics
from scd_robot.policies import ScdPolicy
from scd_robot.policies.scd import ScdPolicyConfig


def make_policy(num_executed: int, stride: int) -> ScdPolicy:
    data, experiment = tiny_data(), tiny_experiment(model={"past_action_input": "none", "history_stride": stride})
    torch.manual_seed(0)
    statistics = {key: compute_statistics(data.arrays[key], key) for key in ("position", "goal", "action")}
    normalizer = Normalizer(statistics, dict.fromkeys(statistics, "min_max"))
    return ScdPolicy(build_model(experiment.model), normalizer, data.spec, ScdPolicyConfig(num_executed=num_executed))


@pytest.mark.parametrize(("num_executed", "stride"), [(4, 1), (4, 2), (1, 1)])
def test_each_round_is_a_plan_and_the_control_steps_that_follow_it(num_executed: int, stride: int) -> None:
    policies = {name: make_policy(num_executed, stride) for name in ("a", "b")}
    one = {key: np.zeros((1, 2), np.float32) for key in ("position", "goal")}
    times = take_turns(policies, lambda: one, 10)
    assert set(times) == {"a", "b"}
    for found in times.values():
        counts = [len(found[name]) for name in TIMES]
        assert counts == [10, 10, 10, 10 * (num_executed - 1)]
        sums = np.add(found["encoder step"], found["plan"])
        np.testing.assert_allclose(sums, found["planning tick"])
