"""The simulated robot keeps time by itself, and the control loop drives it for real."""

import functools
import os
import signal
import time
from dataclasses import replace

import numpy as np
import pytest

from scd_robot.control import ControlLoop, LoopConfig, WatchdogConfig
from scd_robot.control.clock import MonotonicClock
from scd_robot.control.inspection import InspectedRobot
from scd_robot.errors import SimulatorError
from scd_robot.sim_eval.simulated_robot import SimulatedRobot, limits_of
from scd_robot.types import ArraySpec, PolicySpec

POINT = "toy_environment:make_point"


class Planner:
    """Plans to the goal."""

    spec = PolicySpec({"position": ArraySpec((2,)), "goal": ArraySpec((2,))}, 2, 0.05, 8, 3, 1)
    may_plan = True
    max_prefix = 7

    def __init__(self):
        self.executed = []

    def reset(self, rows=None, episodes=None):
        pass

    def observe(self, observation, executed_action=None):
        self.executed.append(executed_action)
        self.seen = {key: value[0] for key, value in observation.items()}

    def snapshot(self):
        return self.seen

    def plan_from(self, given, prefix=None, running=None):
        at, chunk = given["position"].copy(), []
        for _ in range(8):
            chunk.append(np.clip(0.3 * (given["goal"] - at) / 0.2, -0.3, 0.3))  # gently: plans come late
            at = at + 0.2 * chunk[-1]
        return np.array([chunk], np.float32)


def test_time_goes_on_without_commands_after_the_first_one(toy):
    with SimulatedRobot(POINT, 3) as robot:
        start = robot.observe().observation["position"]
        robot.send(np.array([0.5, 0.0]))
        deadline = time.monotonic() + 30
        while robot.steps < 3 and time.monotonic() < deadline:
            robot.observe()
        sample = robot.observe()
        np.testing.assert_allclose(sample.observation["position"], [start[0] + 0.1 * robot.steps, start[1]], atol=1e-6)
        np.testing.assert_array_equal(sample.executed, [0.5, 0.0])
        assert sample.stamp_s <= time.monotonic()
        robot.hold()
        robot.observe()


def test_a_reader_that_does_not_come_does_not_hold_it_up(toy):
    with SimulatedRobot(functools.partial(toy.PointEnvironment, max_steps=10), 3, control_dt=0.002) as robot:
        robot.send(np.zeros(2))
        time.sleep(0.5)
        deadline = time.monotonic() + 30
        while not robot.finished and time.monotonic() < deadline:
            robot.observe()
        assert robot.finished
        assert robot.steps == 10


def make_filmed(max_steps=100_000):
    """The point, and a picture as cameras send them."""
    import toy_environment

    class Filmed(toy_environment.PointEnvironment):
        def __init__(self):
            super().__init__(max_steps=max_steps)
            picture = {"picture": ArraySpec((480, 640, 3), "uint8")}
            self.spec = replace(self.spec, observation={**self.spec.observation, **picture})

        def reset(self, seed):
            return {**super().reset(seed), "picture": np.full((480, 640, 3), 7, np.uint8)}

        def step(self, action):
            result = super().step(action)
            seen = {**result.observation, "picture": np.full((480, 640, 3), 7, np.uint8)}
            return replace(result, observation=seen)

    return Filmed()


def test_large_pictures_do_not_hold_it_up_either(toy):
    with SimulatedRobot(make_filmed, 3, control_dt=0.02) as robot:
        robot.send(np.zeros(2))
        robot.observe()
        before, seen = robot.steps, set()
        time.sleep(2.0)  # the loop is away
        deadline = time.monotonic() + 30
        while robot.steps < before + 20 and time.monotonic() < deadline:
            robot.observe()
            seen.add(robot.steps)
        assert robot.steps >= before + 20
        assert len(seen) <= 8, "but for those that were on their way, steps were made while nobody looked"


def test_the_loop_brings_the_simulated_robot_to_its_goal(toy):
    policy = Planner()
    with SimulatedRobot(functools.partial(toy.PointEnvironment, max_steps=100_000), 3) as robot:
        limits = limits_of(robot.spec, velocity=20.0)
        port = InspectedRobot(robot, limits, 0.05, MonotonicClock())
        watchdog = WatchdogConfig(max_age_s=5.0, give_up_s=20.0)
        loop = ControlLoop(port, policy, limits, LoopConfig(watchdog=watchdog))
        report = loop.run(max_steps=1000, until=lambda: robot.finished)
        assert robot.success
    assert port.violations == []
    assert report.state == "stopped"
    assert report.plans["followed"] >= 1
    assert any(executed is not None for executed in policy.executed)


@pytest.mark.parametrize("name", ["scd_memory/place-back", "pusht"])
def test_where_actions_name_places_it_stands_at_the_one_that_it_tells(name):
    with SimulatedRobot(name, 3, control_dt=0.01) as robot:
        limits = limits_of(robot.spec)
        assert limits.rest == (None,) * robot.spec.action_dim
        pose = robot.observe().pose
        robot.send(pose)
        robot.hold()
        deadline = time.monotonic() + 30
        while robot.steps < 5 and time.monotonic() < deadline:
            sample = robot.observe()
    np.testing.assert_allclose(sample.executed, pose, rtol=1e-6)
    np.testing.assert_allclose(sample.pose, pose, atol=1e-3 * np.ptp([limits.low, limits.high]))


def test_a_simulator_that_dies_is_a_fault_that_ends_in_giving_up(toy):
    with SimulatedRobot(POINT, 3) as robot:
        limits = limits_of(robot.spec)
        config = LoopConfig(watchdog=WatchdogConfig(max_age_s=0.3, give_up_s=0.5))
        loop = ControlLoop(robot, Planner(), limits, config)
        os.kill(robot._process.pid, signal.SIGKILL)
        report = loop.run(max_steps=400)
    assert report.state == "stopped"
    assert report.steps < 400
    assert report.faults["robot_observe"] == 1


def test_what_the_simulator_raises_is_told(toy):
    with SimulatedRobot(functools.partial(toy.PointEnvironment, faults={3: "raise"}), 3, control_dt=0.002) as robot:
        robot.send(np.zeros(2))
        with pytest.raises(SimulatorError, match="contact solver diverged"):
            observe_for_long(robot)


def observe_for_long(robot):
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        robot.observe()
        time.sleep(0.001)
