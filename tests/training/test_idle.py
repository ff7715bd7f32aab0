"""Control steps at which the robot waits can be trained on less often."""

from dataclasses import replace

import numpy as np
import pytest
from tiny import tiny_data, tiny_experiment

from scd_robot.errors import ConfigError
from scd_robot.training.batches import SegmentDataset, idle_rows


def test_idle_rows_by_hand():
    action = np.array([[0], [0], [0], [1], [1], [2], [2], [2], [2], [3]], np.float32)
    ends = np.array([6, 10])
    np.testing.assert_array_equal(
        idle_rows(action, ends, 3), [True, False, False, False, False, True, True, False, False, True]
    )
    np.testing.assert_array_equal(idle_rows(action, ends, 1), np.ones(10, bool))


def waiting_data():
    """Every episode begins with three quarters of waiting."""
    data = tiny_data()
    action, starts = data.arrays["action"].copy(), np.r_[0, data.episode_ends[:-1]]
    for start, end in zip(starts, data.episode_ends, strict=True):
        action[start : start + 3 * (end - start) // 4] = 0
    return replace(data, arrays={**data.arrays, "action": action})


def share_of_idle(idle_weight, validation=False):
    data = waiting_data()
    experiment = tiny_experiment(
        max_steps=100, idle_weight=idle_weight, positions_per_segment=1, segment_length=24, virtual_reset_probability=0
    )
    episodes = np.arange(len(data.episode_ends))
    batches = SegmentDataset(data, experiment, episodes, validation=validation)
    idle, found = idle_rows(data.arrays["action"], data.episode_ends, experiment.model.chunk_length), []
    for step in range(len(batches)):
        batch = batches[step]
        segments = (
            batches._index.ordered(range(step * 4, step * 4 + len(batch.draws.position)))
            if validation
            else (batches._index.batch(step, range(4), 4))
        )
        found += list(idle[segments.start + batch.draws.position[:, 0].numpy()])
    return np.mean(found), idle.mean()


def test_idle_steps_are_chosen_by_their_weight():
    uniform, idle = share_of_idle(1.0)
    assert abs(uniform - idle) < 0.08
    weighted, _ = share_of_idle(0.1)
    odds = idle / (1 - idle)
    assert abs(weighted - 0.1 * odds / (1 + 0.1 * odds)) < 0.08
    assert share_of_idle(0.1, validation=True) == share_of_idle(1.0, validation=True)


@pytest.mark.parametrize("weight", [0.0, -1.0, 2.0])
def test_a_weight_out_of_range_is_refused(weight):
    with pytest.raises(ConfigError, match=r"idle_weight must be in \(0, 1\]"):
        tiny_experiment(idle_weight=weight)
