"""Recordings in which a policy acts and the expert labels."""

import dataclasses
import json

import numpy as np
import pytest

from scd_robot.datasets.open import open_dataset
from scd_robot.errors import ConfigError, ShapeError
from scd_robot.recording import record_demonstrations
from scd_robot.recording.acting import ActingPolicy
from scd_robot.recording.attempt import RecordingConfig, run_attempt
from scd_robot.types import ArraySpec, EnvironmentSpec, PolicySpec, StepResult

LENGTH, EXECUTED = 12, 3


class Line:
    """The observation counts control steps; where the seed is even, the attempt succeeds at step 20."""

    spec = EnvironmentSpec("line", {"x": ArraySpec((1,))}, 1, (-1000.0,), (1000.0,), 0.1, max_steps=24, success="20")

    def reset(self, seed):
        self.seed, self.steps = seed, 0
        return {"x": np.zeros(1, np.float32)}

    def step(self, action):
        self.steps += 1
        seen = {"x": np.full(1, self.steps, np.float32)}
        success = self.steps >= 20 and self.seed % 2 == 0
        return StepResult(seen, 0.0, success, False, self.steps == self.spec.max_steps, np.asarray(action) + 0.5)

    def expert_action(self):
        return np.full(1, -self.steps, np.float32)

    def close(self):
        pass


class Planner:
    """Plan number n, made at control step t, asks for 100 n + t + 0, + 1, ... after what is committed."""

    spec = PolicySpec({"x": ArraySpec((1,))}, 1, 0.1, LENGTH, EXECUTED, 8)
    max_prefix = 6
    stride = 1

    def __init__(self, **spec):
        self.spec = dataclasses.replace(self.spec, **spec)
        self.episodes, self.planned, self.told = [], [], []

    def reset(self, rows=None, episodes=None):
        self.episodes += episodes
        self.time, self.plans, self.planned = -1, 0, []

    def observe(self, observation, executed_action=None):
        self.time += 1
        assert observation["x"].tolist() == [[self.time]]
        self.told.append(executed_action)

    @property
    def may_plan(self):
        return self.time % self.stride == 0

    def plan(self, prefix=None, delay_steps=0):
        chunk = 100.0 * self.plans + self.time + np.arange(LENGTH, dtype=np.float32)[None, :, None]
        if delay_steps:
            before = self.time - self.planned[-1]
            chunk[0, :delay_steps] = self.chunk[0, before : before + delay_steps]
        self.planned.append(self.time)
        self.chunk, self.plans = chunk, self.plans + 1
        return chunk


def test_the_policy_acts_and_the_expert_labels():
    planner = Planner()
    attempt = run_attempt(Line(), RecordingConfig("line"), 5, planner)
    steps = np.arange(len(attempt.episode["action"]))
    np.testing.assert_array_equal(attempt.episode["action"][:, 0], -steps)
    plans = steps // EXECUTED
    np.testing.assert_array_equal(attempt.episode["executed_action"][:, 0], 100 * plans + steps + 0.5)
    assert planner.episodes == [5]
    assert planner.told[0] is None
    np.testing.assert_array_equal(np.ravel(planner.told[1:]), attempt.episode["executed_action"][:-1, 0])


@pytest.mark.parametrize("delay", [2, 5])
def test_plans_that_take_control_steps_begin_with_what_was_committed(delay):
    planner, every = Planner(), max(EXECUTED, delay)
    acting = ActingPolicy(planner, delay)
    acting.reset(0)
    done = [acting.act({"x": np.full(1, step)}, None)[0] for step in range(40)]
    assert planner.planned == list(range(0, 40, every))
    for step, action in enumerate(done):
        plan = step // every
        late = plan > 0 and step - plan * every < delay  # what the plan before asked for is still carried out
        assert action == 100 * (plan - late) + step


def test_plans_wait_for_a_control_step_in_which_the_encoder_runs():
    planner = Planner()
    planner.stride = 4
    acting = ActingPolicy(planner, 2)
    acting.reset(0)
    for step in range(20):
        acting.act({"x": np.full(1, step)}, None)
    assert planner.planned == [0, 4, 8, 12, 16]


def test_a_chunk_that_ends_before_the_next_plan_is_told():
    planner = Planner()
    planner.stride = 16
    acting = ActingPolicy(planner, 2)
    acting.reset(0)
    for step in range(LENGTH):
        acting.act({"x": np.full(1, step)}, None)
    with pytest.raises(ConfigError, match="chunk of 12 actions ends before the next plan"):
        acting.act({"x": np.full(1, LENGTH)}, None)


@pytest.mark.parametrize("delay", [-1, 7])
def test_delays_that_do_not_fit_are_refused(delay):
    with pytest.raises(ConfigError, match=f"delay_steps must be from 0 to [56] .* got {delay}"):
        ActingPolicy(Planner(), delay)


def test_failed_attempts_of_a_policy_are_kept_and_marked(monkeypatch, tmp_path):
    monkeypatch.setattr("scd_robot.recording.record.make_environment", lambda name: Line())
    out, planner = tmp_path / "a.zarr", Planner()
    summary = record_demonstrations(
        "line", 8, out, policy=planner, max_delay_steps=4, told={"weights_sha256": "abc"}, progress=False
    )
    data = open_dataset(out)
    succeeded = data.episode_info["success"][:].tolist()
    assert planner.episodes == list(range(8))
    assert (summary["attempts"], summary["successes"]) == (8, sum(succeeded))
    assert 0 < sum(succeeded) < 8
    assert summary["failures"] == 8 - sum(succeeded)
    attributes = json.loads((out / ".zattrs").read_text())["scd_robot"]
    assert attributes["metadata"]["policy"] == {"weights_sha256": "abc"}
    assert attributes["metadata"]["max_delay_steps"] == 4


def test_delays_are_drawn_for_each_attempt(monkeypatch):
    seen = []
    monkeypatch.setattr(
        "scd_robot.recording.attempt.ActingPolicy",
        lambda policy, delay: seen.append(delay) or ActingPolicy(policy, delay),
    )
    for index in range(40):
        run_attempt(Line(), RecordingConfig("line", max_delay_steps=3), index, Planner())
    assert set(seen) == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_delay_steps": 2}, "max_delay_steps is of a policy's plans"),
        ({"policy": Planner(), "workers": 2}, "acts in one process, got 2 workers"),
        ({"policy": Planner(), "max_delay_steps": 20}, "delay_steps must be from 0"),
        ({"policy": Planner(control_dt=0.05)}, "trained for a control step of 0.05 s, environment 'line' steps 0.1 s"),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_anything_is_written(monkeypatch, tmp_path, options, message):
    monkeypatch.setattr("scd_robot.recording.record.make_environment", lambda name: Line())
    with pytest.raises((ConfigError, ShapeError), match=message):
        record_demonstrations("line", 1, tmp_path / "a.zarr", progress=False, **options)
    assert list(tmp_path.iterdir()) == []


def test_what_a_policy_raises_is_no_crash_of_the_simulator(monkeypatch, tmp_path):
    class Breaks(Planner):
        def plan(self, *args, **options):
            raise RuntimeError("out of memory on the GPU")

    monkeypatch.setattr("scd_robot.recording.record.make_environment", lambda name: Line())
    with pytest.raises(RuntimeError, match="out of memory on the GPU"):
        record_demonstrations("line", 1, tmp_path / "a.zarr", policy=Breaks(), progress=False)
    monkeypatch.setattr(Line, "step", lambda self, action: 1 / 0)
    crashed = run_attempt(Line(), RecordingConfig("line"), 0, Planner())
    assert crashed.crash == "ZeroDivisionError: division by zero"
