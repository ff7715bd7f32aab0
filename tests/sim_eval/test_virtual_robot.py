"""The robot in virtual time: what a plan that takes long is late for, and nothing else."""

import numpy as np
import pytest

from scd_robot.control import ControlLoop, DelayConfig, ExecutionConfig, LoopConfig, VirtualClock
from scd_robot.control.planner import VirtualPlanner
from scd_robot.sim_eval.simulated_robot import limits_of
from scd_robot.sim_eval.virtual_robot import VirtualRobot
from scd_robot.types import ArraySpec, PolicySpec


class Counting:
    """Plans the numbers of the control steps that its actions are for, in hundredths."""

    spec = PolicySpec({"position": ArraySpec((2,)), "goal": ArraySpec((2,))}, 2, 0.05, 16, 4, 1)
    may_plan = True
    max_prefix = 15

    def __init__(self):
        self.seen, self.planned = [], []

    def reset(self):
        pass

    def observe(self, observation, executed_action=None):
        self.seen.append(observation["position"][0])

    def snapshot(self):
        return len(self.seen) - 1

    def plan_from(self, given, prefix=None, running=None):
        self.planned.append(given)
        return np.tile((given + np.arange(16.0))[None, :, None] / 100, (1, 1, 2)).astype(np.float32)


def drive(toy, delay_steps, strategy="receding"):
    clock, policy = VirtualClock(), Counting()
    environment = toy.PointEnvironment(max_steps=40)
    robot = VirtualRobot(environment, 3, clock)
    planner = VirtualPlanner(policy, clock, lambda: max(0.0, 0.05 * delay_steps - 1e-6))
    execution = ExecutionConfig(strategy, delay=DelayConfig(warm_up=0, initial=max(1, delay_steps)))
    limits = limits_of(environment.spec)
    loop = ControlLoop(robot, policy, limits, LoopConfig(execution=execution), clock=clock, planner=planner)
    report = loop.run(until=lambda: robot.finished)
    return robot, policy, np.round(100 * np.array(robot.actions)[:, 0]).astype(int), report


@pytest.mark.parametrize("delay_steps", [0, 1, 3, 8])
def test_every_action_is_of_its_control_step_however_long_a_plan_takes(toy, delay_steps):
    robot, policy, actions, report = drive(toy, delay_steps)
    assert robot.finished
    assert len(actions) == 40
    joined = 2 * delay_steps + max(4, delay_steps)  # when the second plan is there
    np.testing.assert_array_equal(actions[:delay_steps], 0)  # it stands still, so the first plan is still right then
    np.testing.assert_array_equal(actions[delay_steps:joined], np.arange(joined - delay_steps))
    np.testing.assert_array_equal(actions[joined:], np.arange(joined, 40))
    assert report.faults == {}
    assert report.delay_steps == max(1, delay_steps)
    assert np.diff(policy.planned).min() == max(4, delay_steps), "d <= s"
    assert len(robot.hand) in (0, 41)
    assert len({tuple(position) for position in policy.seen[delay_steps + 1 :]}) == 40 - delay_steps - 1, "all are new"


def test_a_synchronous_robot_carries_out_each_plan_from_its_first_action_on(toy):
    _, policy, actions, _ = drive(toy, 3, "synchronous")
    assert policy.planned == list(range(0, 40, 7))
    expected = [step + action for step in policy.planned for action in [-step] * 3 + [0, 1, 2, 3]]
    np.testing.assert_array_equal(actions, np.array(expected)[:40])
