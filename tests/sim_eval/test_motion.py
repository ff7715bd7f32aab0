"""Motion quality on explicit numbers."""

import numpy as np
import pytest

from scd_robot.sim_eval import make_environment
from scd_robot.sim_eval.motion import mean_motion, motion_quality
from scd_robot.sim_eval.rollout import evaluate


def test_a_cubic_path_has_the_jerk_of_its_third_derivative():
    dt = 0.1
    time = dt * np.arange(20)
    hand = np.stack([2 * time**3, 0 * time], axis=1)
    found = motion_quality([np.zeros(1)] * 19, [], hand, dt)
    assert found["jerk"] == pytest.approx(12.0)
    assert found["path_length"] == pytest.approx(2 * time[-1] ** 3)
    assert found["boundary_jump"] is None


def test_the_path_of_two_hands_is_that_of_both():
    time = np.arange(5.0)
    hands = np.stack([np.stack([3 * time, 4 * time], axis=1), np.stack([0 * time, time**3], axis=1)], axis=1)
    found = motion_quality([np.zeros(1)] * 4, [], hands, 1.0)
    assert found["path_length"] == pytest.approx(5 * 4 + 4**3)
    assert found["jerk"] == pytest.approx(np.sqrt((0 + 6**2) / 2))


def test_seams_between_chunks_stand_out():
    values = np.array([0, 1, 2, 3, 8, 9, 10, 11, 16, 17.0])
    planned = [True, False, False, False] * 2 + [True, False]
    found = motion_quality(list(values[:, None]), planned, [], 0.1)
    assert found == {"path_length": None, "jerk": None, "boundary_jump": pytest.approx(5.0)}


@pytest.mark.parametrize("count", [0, 1])
def test_too_little_to_tell(count):
    found = motion_quality([np.zeros(1)] * count, [True] * count, [np.zeros(2)] * count, 0.1)
    assert set(found.values()) == {None}


def test_means_are_of_what_is_known():
    means = mean_motion([{"jerk": 1.0, "path_length": None}, {"jerk": 3.0}, {}])
    assert means == {"path_length": None, "jerk": 2.0, "boundary_jump": None}


class Expert:
    """The memory suite's expert, in the process of the policy: a second environment that follows the first."""

    def __init__(self, name, wrong):
        self._environment, self._wrong, self.path = make_environment(name), wrong, []

    def reset(self, rows=None, episodes=None):
        self._begin = True

    def act(self, observation):
        if self._begin:
            self._environment.reset(self.seed)
            self.path.append(self._environment.hand.copy())
            if self._wrong:
                self._environment._believed = (self._environment._believed + 1) % 4
            self._begin = False
        action = self._environment.expert_action()
        self._environment.step(action)
        self.path.append(self._environment.hand.copy())
        return action[None]


@pytest.mark.parametrize("wrong", [False, True])
def test_completed_apart_from_right(wrong):
    from scd_robot.seeding import EVALUATION, derive_seed

    name = "scd_memory/cue-reach:delay=5"
    policy = Expert(name, wrong)
    policy.seed = derive_seed(EVALUATION, 0)
    document = evaluate(policy, name, 1, num_envs=1, progress=False).to_json()
    (episode,) = document["episodes_detail"]
    assert (episode["completed"], episode["success"]) == (True, not wrong)
    assert document["contextual_success"]["completed"] == 1
    assert document["contextual_success"]["successes"] == int(not wrong)
    exact = np.linalg.norm(np.diff(policy.path, axis=0), axis=1).sum()  # not of what the noisy sensor says
    assert episode["path_length"] == pytest.approx(exact)
    assert document["motion"]["jerk"] == episode["jerk"] > 0
