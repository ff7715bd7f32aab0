"""The loop: epochs, start guard, pauses, committed actions, and how it ends."""

import sys
import threading
from dataclasses import replace

import numpy as np
import pytest

from scd_robot.control import (
    ControlLoop,
    DelayConfig,
    ExecutionConfig,
    Limits,
    LoopConfig,
    RecorderConfig,
    StartGuard,
    VirtualClock,
    WatchdogConfig,
)
from scd_robot.control.planner import VirtualPlanner
from scd_robot.control.recorder import FlightRecorder, find_record, read_record, write_record
from scd_robot.control.rehearsal import SPEC, Script, ScriptedPolicy, ScriptedRobot
from scd_robot.errors import ConfigError, OutputError
from scd_robot.types import ArraySpec

DT = SPEC.control_dt
WIDE = Limits.of_box((-10.0, -10.0), (10.0, 10.0))


class Constant(ScriptedPolicy):
    """Plans to stay at `goal`, as it was when the plan was asked for; keeps what it is given."""

    def __init__(self, script, goal):
        super().__init__(script, 0)
        self.goal, self.prefixes, self.executed, self.resets = np.array(goal), [], [], 0
        self.running, self.seen = [], []

    def reset(self, rows=None, episodes=None):
        super().reset()
        self.resets += 1

    def observe(self, observation, executed_action=None):
        super().observe({key: x for key, x in observation.items() if x is not None}, executed_action)
        self.seen.append(observation)
        self.executed.append(executed_action)

    def snapshot(self):
        return self.goal.copy()

    def plan_from(self, given, prefix=None, running=None):
        self.prefixes.append(prefix)
        self.running.append(running)
        chunk = np.tile(given, (1, SPEC.chunk_length, 1)).astype(np.float32)
        if prefix is not None:
            chunk[:, : prefix.shape[1]] = prefix
        return chunk


class Scene:
    """A loop in virtual time; `sent` holds the commands, `at[step]()` is called before a control step."""

    def __init__(self, config=None, limits=WIDE, goal=(1.0, 1.0), plan_steps=1.5, tells_executed=False, spec=None):
        config = config or LoopConfig()
        self.clock = VirtualClock()
        script = Script([], self.clock, DT)
        self.robot = ScriptedRobot(script, self.clock, np.zeros(2), tells_executed)
        self.policy = Constant(script, goal)
        self.policy.spec = spec = spec or self.policy.spec
        self.plan_steps, self.sent, self.at, self.states = plan_steps, [], {}, []
        send = self.robot.send

        def watched(command):
            self.sent.append((round(self.clock.now() / DT, 3), *command))
            send(command)

        self.robot.send = watched
        planner = VirtualPlanner(self.policy, self.clock, lambda: self.plan_steps * DT)
        recorder = FlightRecorder(config.recorder, spec.observation, 2, DT, background=False)
        self.loop = ControlLoop(
            self.robot, self.policy, limits, config, clock=self.clock, planner=planner, recorder=recorder
        )

    def run(self, steps):
        def before():
            self.states.append(self.loop.state)
            self.at.pop(len(self.states) - 1, lambda: None)()
            return False

        return self.loop.run(steps, before)

    def places(self):
        return np.array([row[1] for row in self.sent])


def test_commands_stay_apart_where_one_reached_the_robot_late():
    """As where the loop's thread waits for the processor between its last look at the clock and the robot."""
    scene, late = Scene(), []
    send = scene.robot.send

    def preempted(command):
        if len(scene.sent) == 10 and not late:
            late.append(command)
            scene.clock.advance(0.6 * DT)
        send(command)

    scene.robot.send = preempted
    scene.run(30)
    apart = np.diff([row[0] for row in scene.sent])
    assert apart.max() == pytest.approx(1.6, abs=2e-3)
    assert apart.min() >= 0.5 - 2e-3


def test_a_chunk_planned_before_a_reset_is_never_executed_after_it():
    scene = Scene(plan_steps=3.5)

    def change_the_goal():
        scene.policy.goal = np.array([-2.0, -2.0])
        scene.loop.reset()

    scene.at[10] = change_the_goal  # a plan for the old goal is in the making: one was asked for in step 8 or so
    scene.loop._planning._config = ExecutionConfig(num_executed=1)
    report = scene.run(30)
    after = np.array([row[1] for row in scene.sent if row[0] >= 10])
    assert report.plans["dropped"] == 1
    assert set(np.round(after, 3)) == {1.0, -2.0}
    assert (np.diff(after) <= 0).all(), "it stays until there is a plan of after the reset, and then follows that"
    assert scene.policy.resets >= 3  # at the start, at the reset and at the end


@pytest.mark.parametrize(("max_plan_age_s", "followed"), [(1.0, 3.0), (float("inf"), 1.0)])
def test_a_robot_that_stood_still_does_not_begin_with_a_plan_of_what_was_long_ago(max_plan_age_s, followed):
    scene = Scene(LoopConfig(watchdog=WatchdogConfig(late_plan="stop", max_plan_age_s=max_plan_age_s)), plan_steps=40)
    scene.at[10] = lambda: (setattr(scene, "plan_steps", 1.5), setattr(scene.policy, "goal", np.array([3.0, 3.0])))
    report = scene.run(60)
    stale = int(np.isfinite(max_plan_age_s))
    assert (report.plans.get("stale", 0), report.faults.get("stale_plan", 0)) == (stale, stale)
    path = scene.places()
    assert path[path > 0][0] == followed
    assert np.argmax(path > 0) >= 40
    assert report.steps >= 60, "nothing was followed, so there was nothing to stop"


@pytest.mark.parametrize(("max_plan_age_s", "stale"), [(0.24, True), (0.26, False)])
def test_a_plan_is_as_old_as_what_it_was_made_from(max_plan_age_s, stale):
    """Samples are 150 ms old, and a plan takes two control steps of 50 ms."""
    config = LoopConfig(watchdog=WatchdogConfig(max_plan_age_s=max_plan_age_s))
    scene = Scene(config)
    observe = scene.robot.observe
    scene.robot.observe = lambda: replace(observe(), stamp_s=scene.clock.now() - 0.15)
    report = scene.run(40)
    assert (report.plans.get("stale", 0) > 2, report.plans.get("followed", 0) > 2) == (stale, not stale)
    assert report.faults.get("stale_plan", 0) == int(stale), "one that goes on counts once"


def test_it_slows_down_with_the_first_action_that_was_not_committed_to():
    """d = 3 actions are committed to while the plan is made; the fourth is of the old chunk alone."""
    execution = ExecutionConfig("prefix", 4, delay=DelayConfig(initial=3, warm_up=1000))
    scene = Scene(LoopConfig(execution=execution, watchdog=WatchdogConfig(late_plan="slow")), plan_steps=2.5)
    asked = []
    ask = scene.loop._planner.submit
    scene.loop._planner.submit = lambda request: (asked.append(request.steps), ask(request))
    scene.at[20] = lambda: setattr(scene, "plan_steps", 6.5)
    scene.run(60)
    assert "slow" not in scene.states[: 1 + 20], "a plan that comes in time is no reason"
    late = next(step for step in asked if step >= 20)
    assert scene.states[1:].index("slow") == late + 3


def test_a_far_start_is_blended_into():
    scene = Scene(LoopConfig(start=StartGuard((0.5, 0.5), "blend", blend_s=10 * DT)))
    report = scene.run(30)
    path = scene.places()
    assert report.faults["far_start"] == 1
    np.testing.assert_allclose(np.diff(path[path > 0]), [*[0.1] * 9, *[0.0] * (np.sum(path > 0) - 10)], atol=1e-6)


def test_a_far_start_is_refused():
    scene = Scene(LoopConfig(start=StartGuard((0.5, 0.5), "refuse")))
    report = scene.run(30)
    assert (report.faults["far_start"], report.state) == (1, "stopped")
    np.testing.assert_array_equal(scene.places(), 0)
    assert scene.robot.held >= 2  # at the start and at the end


def test_a_near_start_is_no_fault():
    scene = Scene(LoopConfig(start=StartGuard((1.5, 1.5), "refuse")))
    assert scene.run(10).faults == {}
    assert scene.places()[-1] == 1


def test_a_human_takes_over_and_the_loop_goes_on_from_where_the_robot_is():
    slow = Limits((-10.0, -10.0), (10.0, 10.0), (4.0, 4.0), (1e3, 1e3), (None, None))
    scene = Scene(limits=slow)

    def move():
        assert scene.loop.state == "paused"
        scene.robot.pose = np.array([5.0, 5.0])

    scene.at |= {10: scene.loop.pause, 20: move, 25: scene.loop.resume}
    scene.run(40)
    times = np.array([row[0] for row in scene.sent])
    assert not ((times >= 12) & (times < 25)).any(), "nothing is sent while a human moves the robot"
    first = next(row for row in scene.sent if row[0] >= 25)
    assert abs(first[1] - 5.0) <= 4.0 * DT + 1e-9
    assert scene.places()[-1] < 4.0
    assert "paused" in scene.states


def test_a_robot_that_was_left_outside_of_its_limits_is_not_commanded():
    narrow = Limits.of_box((-1.0, -1.0), (1.0, 1.0))
    scene = Scene(limits=narrow, goal=(0.5, 0.5))
    scene.robot.pose = np.array([1.5, 0.0])
    scene.at[20] = lambda: setattr(scene.robot, "pose", np.array([0.9, 0.0]))
    report = scene.run(40)
    assert report.faults == {"bad_pose": 1}
    assert scene.sent[0][0] >= 20
    assert scene.places()[-1] == 0.5


def test_committed_actions_are_what_is_carried_out_behind_the_limits():
    slow = Limits((-10.0, -10.0), (10.0, 10.0), (2.0, 2.0), (1e3, 1e3), (None, None))
    config = LoopConfig(execution=ExecutionConfig("prefix", 4, delay=DelayConfig(warm_up=0)))
    scene = Scene(config, limits=slow, goal=(3.0, 3.0), plan_steps=2.5)
    scene.run(30)
    prefixes = [prefix for prefix in scene.policy.prefixes if prefix is not None]
    assert len(prefixes) > 3
    assert {prefix.shape for prefix in prefixes} == {(1, 3, 2)}
    path = scene.places().astype(np.float32)
    for prefix in prefixes[:-1]:
        runs = [np.allclose(path[i : i + 3], prefix[0, :, 0]) for i in range(len(path) - 2)]
        assert any(runs), "the three commands that were sent while it was planned"


def test_a_guided_plan_is_given_all_that_is_left_of_the_running_chunk():
    execution = ExecutionConfig("guided_identity", 4, max_gain=3.0, delay=DelayConfig(warm_up=0))
    scene = Scene(LoopConfig(execution=execution), plan_steps=2.5)
    left = SPEC.chunk_length - 4  # asked for after s = 4 of them
    scene.run(30)
    given = [running for running in scene.policy.running if running is not None]
    assert len(given) > 3
    assert scene.policy.running[0] is None, "the first plan has nothing to go on from"
    assert {running.actions.shape for running in given} == {(1, left, 2)}
    assert {(running.max_gain, running.exact) for running in given} == {(3.0, False)}
    assert [running.delay_steps for running in given][-1] == 3
    assert all(prefix is None for prefix in scene.policy.prefixes)
    ramp = np.tile(np.arange(16.0)[:, None] / 2, (1, 2))
    scene.loop._planning.executor.accept(ramp, 4)
    np.testing.assert_allclose(scene.loop._ahead(99)[0], ramp[4:])


def test_a_guided_plan_that_comes_too_late_splits_the_chunk_in_half():
    """d <= s <= H - d: a delay above H / 2 counts as H // 2, which is recorded."""
    config = LoopConfig(execution=ExecutionConfig("guided", 2, delay=DelayConfig(warm_up=0)))
    scene = Scene(config, plan_steps=11.5)
    report = scene.run(60)
    last = scene.policy.running[-1]
    assert report.faults["delay_too_long"] == 1
    assert (last.actions.shape[1], last.delay_steps) == (8, 8)


def test_a_policy_whose_plans_cannot_be_guided_is_refused_at_once():
    class Regression(Constant):
        def check_guidance(self, max_gain):
            raise ConfigError("a guided chunk needs the velocity at each flow time")

    clock = VirtualClock()
    policy = Regression(Script([], clock, DT), (0.0, 0.0))
    config = LoopConfig(execution=ExecutionConfig("guided"))
    threads = set(threading.enumerate())
    with pytest.raises(ConfigError, match="guided chunk"):
        ControlLoop(ScriptedRobot(Script([], clock, DT), clock, np.zeros(2), False), policy, WIDE, config, clock=clock)
    assert set(threading.enumerate()) <= threads, "no thread is left"


def test_a_synchronous_robot_stands_still_while_its_plan_is_made():
    config = LoopConfig(execution=ExecutionConfig("synchronous", 4, delay=DelayConfig(warm_up=0)))
    velocities = Limits.of_box((-10.0, -10.0), (10.0, 10.0), (0.0, 0.0))
    scene = Scene(config, limits=velocities, plan_steps=2.5)
    report = scene.run(25)
    assert report.faults == {}
    moves = scene.places()
    first = int(np.argmax(moves > 0))
    np.testing.assert_array_equal(moves[first : first + 18], ([1.0] * 4 + [0.0] * 3) * 2 + [1.0] * 4)


def test_the_history_advances_in_every_control_step_and_learns_what_was_sent():
    scene = Scene(plan_steps=5.5)
    scene.run(30)
    assert scene.policy.encoded == 29  # the first sample is of the instant in which the robot was told to hold
    sent = scene.places()
    told = [executed[0, 0] for executed in scene.policy.executed if executed is not None]
    np.testing.assert_allclose(told, sent[: len(told)].astype(np.float32))


def test_what_was_done_is_told_by_a_newer_sample_of_the_same_time_and_once():
    scene = Scene()
    scene.run(12)
    newer = replace(scene.loop._encoded, executed=np.full(2, 7.0))
    np.testing.assert_array_equal(scene.loop._executed(newer), [[7.0, 7.0]])
    scene.loop._encoded = newer
    assert scene.loop._executed(newer) is None, "the loop is over: nothing was sent since"


def test_servo_steps_lie_between_the_goals():
    ramp = Scene(LoopConfig(servo_steps=4), goal=(1.0, 1.0))
    ramp.run(10)
    path = ramp.places()
    start = int(np.flatnonzero(path > 0)[0])
    np.testing.assert_allclose(path[start : start + 5], [0.25, 0.5, 0.75, 1.0, 1.0])
    np.testing.assert_allclose(np.diff([row[0] for row in ramp.sent]), 0.25, atol=2e-3)


def test_increments_are_not_interpolated_and_standing_still_is_rest():
    limits = Limits.of_box((-1.0, -1.0), (1.0, 1.0), rest=(0.0, 0.0))
    scene = Scene(LoopConfig(servo_steps=2), limits=limits, goal=(0.5, 0.5))
    scene.at[10] = scene.loop.pause
    scene.run(12)
    assert set(np.round(scene.places(), 6)) == {0.0, 0.5}
    assert scene.places()[-1] == 0


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ZeroDivisionError("a bug")])
def test_whatever_is_raised_lets_the_robot_hold_and_leaves_a_record(tmp_path, error):
    scene = Scene(LoopConfig(recorder=RecorderConfig(tmp_path)))

    def fail():
        raise error

    scene.at[10] = fail
    with pytest.raises(type(error)):
        scene.run(30)
    assert scene.robot.held >= 2
    arrays, document = read_record(tmp_path / "flight-001-loop_error")
    assert document["faults"] == {"loop_error": 1}
    assert len(arrays["step"]) == 10
    np.testing.assert_allclose(arrays["command"][-1], [1.0, 1.0])
    np.testing.assert_allclose(arrays["observation/state"][-1], [1.0, 1.0])


def test_a_record_that_cannot_be_made_is_a_fault_whatever_the_reason(tmp_path):
    def fail(*_):
        raise TypeError("a setting that JSON does not know")

    scene = Scene(LoopConfig(recorder=RecorderConfig(tmp_path, least_apart_s=0.2)))
    scene.loop._journal._recorder._write = fail
    scene.at[10] = lambda: scene.loop._journal.fault("plan_error", "for the record")
    report = scene.run(30)
    assert report.faults["recorder_error"] >= 2, "it is tried again"


def test_a_planner_that_cannot_be_closed_costs_no_record(tmp_path):
    scene = Scene(LoopConfig(recorder=RecorderConfig(tmp_path, least_apart_s=60.0)))
    scene.at[5] = lambda: scene.loop._journal.fault("plan_error", "the first, for a record")
    scene.at[10] = lambda: scene.loop._journal.fault("plan_error", "the second, for that of the end")

    def fail():
        raise KeyboardInterrupt

    scene.loop._planner.close, interval_s = fail, sys.getswitchinterval()
    with pytest.raises(KeyboardInterrupt):
        scene.run(30)
    assert sys.getswitchinterval() == interval_s
    assert scene.robot.held >= 2
    assert scene.loop._journal._recorder.unsaved.total() == 0


def test_the_ring_keeps_the_last_steps_only(tmp_path):
    scene = Scene(LoopConfig(recorder=RecorderConfig(tmp_path, seconds=8 * DT)))
    scene.at[29] = lambda: scene.loop._journal.fault("plan_error", "for the record")
    scene.run(30)
    arrays, document = read_record(next(tmp_path.iterdir()))
    np.testing.assert_array_equal(arrays["step"], np.arange(22, 30))
    assert [event["kind"] for event in document["events"] if event["fault"]] == ["plan_error"]
    assert document["settings"]["limits"]["low"] == [-10.0, -10.0]


def test_a_folder_that_is_no_record_is_refused(tmp_path):
    with pytest.raises(OutputError, match="no flight record"):
        read_record(tmp_path)
    (tmp_path / "record.json").write_text("{")
    with pytest.raises(OutputError, match="damaged"):
        read_record(tmp_path)


def test_runs_with_one_folder_number_their_records_on(tmp_path):
    (tmp_path / "flight-0999-bad_pose").mkdir()
    for _ in range(2):
        scene = Scene(LoopConfig(recorder=RecorderConfig(tmp_path)))
        scene.at[5] = lambda loop=scene.loop: loop._journal.fault("plan_error", "for the record")
        assert scene.run(10).faults == {"plan_error": 1}
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"flight-0999-bad_pose", "flight-1000-plan_error", "flight-1001-plan_error"}
    assert find_record(tmp_path).name == "flight-1001-plan_error"


def test_records_that_could_not_be_written_do_not_count_among_the_most(tmp_path):
    config = RecorderConfig(tmp_path, least_apart_s=2 * DT, most=3)
    scene, full = Scene(LoopConfig(recorder=config)), [True]

    def write(target, arrays, document):
        if full[0]:
            raise OutputError("no space left on device")
        write_record(target, arrays, document)

    scene.loop._journal._recorder._write = write
    for step in range(5, 35, 5):
        scene.at[step] = lambda: scene.loop._journal.fault("plan_error", "for the record")
    scene.at[36] = lambda: full.clear() or full.append(False)
    kept = []
    scene.at[45] = lambda: kept.extend(tmp_path.iterdir())
    assert scene.run(50).faults["recorder_error"] > config.most
    assert len(kept) == 1, "while it runs, not only at its end"


@pytest.mark.parametrize("at_end", [False, True])
def test_a_run_without_faults_leaves_a_record_where_one_is_asked_for(tmp_path, at_end):
    scene = Scene(LoopConfig(recorder=RecorderConfig(tmp_path, at_end=at_end)))
    assert scene.run(30).faults == {}
    assert [path.name for path in tmp_path.iterdir()] == (["flight-001-end"] if at_end else [])
    if at_end:
        arrays, document = read_record(tmp_path / "flight-001-end")
        assert document["faults"] == {}
        assert np.isfinite(arrays["command"][-1]).all()


def test_a_folder_in_which_no_record_can_be_made_is_told_before_the_robot_moves(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"cannot be written to .*flights: .*file is no folder"):
        Scene(LoopConfig(recorder=RecorderConfig(tmp_path / "file" / "flights")))


def test_another_interruption_while_the_robot_is_told_to_hold_does_not_keep_it_from_holding():
    scene, interruptions = Scene(), []
    hold = scene.robot.hold

    def interrupt():
        raise KeyboardInterrupt("the first")

    def interrupted():
        if len(interruptions) < 2:
            interruptions.append(scene.robot.held)
            raise KeyboardInterrupt("again")
        hold()

    scene.at |= {9: lambda: setattr(scene.robot, "hold", interrupted), 10: interrupt}
    with pytest.raises(KeyboardInterrupt, match="again"):
        scene.run(30)
    assert interruptions == [1, 1], "it held at the start"
    assert (scene.robot.held, scene.loop.state) == (2, "stopped")


def test_a_robot_may_change_the_command_that_it_gets():
    scene = Scene()
    send = scene.robot.send

    def in_degrees(command):
        send(command)
        command *= 57.3

    scene.robot.send = in_degrees
    scene.run(20)
    assert max(np.abs(executed).max() for executed in scene.policy.executed if executed is not None) == 1.0


def test_a_loop_that_has_run_says_so():
    scene = Scene()
    scene.run(5)
    with pytest.raises(ConfigError, match="has run already; make another one"):
        scene.run(5)


class Foreign:
    """A robot of somebody, which tells what it is made to."""

    def __init__(self, robot, told):
        self.send, self.hold = robot.send, robot.hold
        self.observe = lambda: told(robot.observe())


@pytest.mark.parametrize(
    ("told", "words"),
    [
        (lambda sample: None, "must give a Sample(observation, stamp_s, ...), got NoneType"),
        (lambda sample: sample.observation, "must give a Sample(observation, stamp_s, ...), got dict"),
        (lambda sample: replace(sample, stamp_s=None), "must be a number of seconds, got None"),
        (lambda sample: replace(sample, stamp_s=1.7e9), "time.monotonic() of this machine"),
        (lambda sample: replace(sample, executed=np.zeros((1, 2))), "`executed` must be (2,) like a command"),
        (lambda sample: seen(sample, camera=np.zeros((4, 4))), "'camera' must hold uint8 from 0 to 255, got float64"),
        (lambda sample: seen(sample, state=[0.0, 0.0]), "'state' must be an array, got list"),
        (lambda sample: seen(sample, state=np.array(["a", "b"])), "'state' must hold numbers, got <U1"),
        (lambda sample: seen(sample, state=np.zeros((1, 2))), "(2,), got (1, 2): leave the batch axis out"),
        (lambda sample: seen(sample, state=None), "'state' is missing; got ['camera', 'state']"),
    ],
)
def test_what_a_robot_tells_wrongly_is_a_bad_observation_and_told_once(told, words, caplog):
    scene = Scene()
    scene.loop._robot = Foreign(scene.robot, told)
    report = scene.run(20)
    assert (report.faults, report.commands, report.state) == ({"bad_observation": 1}, 0, "stopped")
    assert caplog.text.count(words) == 1


SEES = replace(
    SPEC,
    observation={"state": ArraySpec((2,)), "camera": ArraySpec((4, 4, 1), "uint8"), "force": ArraySpec((1,))},
    optional=("camera", "force"),
)
RAMP = np.arange(16, dtype=np.uint8).reshape(4, 4, 1)


@pytest.mark.parametrize("bad", [{"camera": 0 * RAMP}, {"state": np.full(2, np.nan)}], ids=["black", "nan"])
def test_a_picture_of_nothing_is_not_taken_in_and_costs_no_history(bad):
    scene = Scene(spec=SEES)
    good = {"camera": RAMP, "force": np.zeros(1)}
    scene.loop._robot = Foreign(
        scene.robot, lambda sample: seen(sample, **{**good, **(bad if round(sample.stamp_s / DT) == 20 else {})})
    )
    scene.at[30] = lambda: resets.append(scene.policy.resets)
    resets = []
    report = scene.run(40)
    assert report.faults == {"bad_observation": 1}
    assert resets == [1], "that of the start"
    assert len(scene.policy.seen) == 39, "every control step but the last, which stops"
    assert all((one["camera"] == RAMP).all() for one in scene.policy.seen)


def test_what_did_not_come_is_none_to_the_policy_and_nan_in_the_record(tmp_path):
    config = LoopConfig(recorder=RecorderConfig(tmp_path, at_end=True))
    scene = Scene(config, spec=SEES)

    def told(sample):
        comes = round(sample.stamp_s / DT) % 2 == 0
        return seen(sample, camera=RAMP if comes else None, force=np.ones(1) if comes else None)

    scene.loop._robot = Foreign(scene.robot, told)
    assert scene.run(10).faults == {}
    absent = [[one[key] is None for key in ("state", "camera", "force")] for one in scene.policy.seen]
    assert absent[:8] in ([[False] * 3, [False, True, True]] * 4, [[False, True, True], [False] * 3] * 4)
    arrays, _ = read_record(find_record(tmp_path))
    assert np.isnan(arrays["observation/force"][:8, 0]).tolist() in ([False, True] * 4, [True, False] * 4)


def seen(sample, **changes):
    return replace(sample, observation={**sample.observation, **changes})


@pytest.mark.parametrize(
    ("told", "faults", "words"),
    [
        (
            lambda sample: replace(sample, stamp_s=sample.stamp_s - 50.0),
            {"stale_observation"},
            "50.000 s old: is it of",
        ),
        (lambda sample: replace(sample, pose=None), {"bad_pose"}, "must give Sample(..., pose=...)"),
    ],
)
def test_why_a_robot_never_moves_is_told_at_once_and_when_the_loop_gives_up(told, faults, words, caplog):
    scene = Scene(LoopConfig(watchdog=WatchdogConfig(give_up_s=1.0)))
    scene.loop._robot = Foreign(scene.robot, told)
    report = scene.run(100)
    assert (report.faults.keys(), report.commands) == (faults | {"gave_up"}, 0)
    assert words in caplog.text
    assert f"s: {', '.join(faults)})" in caplog.text


def test_a_clock_of_the_robot_that_jumps_back_is_told_as_such(caplog):
    scene, back = Scene(), []
    scene.loop._robot = Foreign(scene.robot, lambda sample: replace(sample, stamp_s=sample.stamp_s - sum(back)))
    scene.at[20] = lambda: back.append(100.0)
    assert scene.run(40).faults == {"stale_observation": 1}
    assert "did its clock jump?" in caplog.text


def test_the_log_has_a_line_a_second_of_a_fault_that_comes_in_every_step_and_says_how_many_it_left_out(caplog):
    scene = Scene(LoopConfig(watchdog=WatchdogConfig(give_up_s=100.0)))

    def lost(command):
        raise ConnectionError("no carrier")

    scene.robot.send = lost
    report = scene.run(200)
    lines = [line.getMessage() for line in caplog.records if "no carrier" in line.getMessage()]
    per_second = round(1 / scene.policy.spec.control_dt)
    assert report.faults["robot_send"] > 100
    assert len(lines) == -(-report.faults["robot_send"] // per_second)
    assert f"{per_second - 1} more of them since the last line" in lines[1]


@pytest.mark.parametrize(
    ("kind", "rest", "told"),
    [
        ("delta", (None, None), "standing still would repeat the last change"),
        ("absolute", (0.0, 0.0), "standing still would send the robot there"),
        ("delta", (0.0, None), None),
        ("absolute", (None, 0.0), None),
        ("", (None, None), None),
        ("", (0.0, 0.0), None),
    ],
)
def test_what_stands_still_goes_with_the_kind_of_the_actions(kind, rest, told):
    scene = Scene()
    policy = scene.policy
    policy.spec = replace(policy.spec, action_kind=kind)
    limits = replace(WIDE, rest=rest)
    if told is None:
        ControlLoop(scene.robot, policy, limits)
    else:
        with pytest.raises(ConfigError, match=told):
            ControlLoop(scene.robot, policy, limits)


def test_what_is_no_robot_or_no_policy_is_told_when_the_loop_is_made():
    scene = Scene()

    class NoHold:
        observe = send = None

    for robot, policy, told in (
        (scene.policy, scene.robot, r"has no send\(\)"),
        (NoHold(), scene.policy, r"NoHold has no observe\(\)"),
        (scene.robot, "ws://robot:8000", r"RemoteStream\.connect\(address\).*this str has no spec"),
        (scene.robot, scene.robot, "ScriptedRobot has no spec"),
    ):
        with pytest.raises(ConfigError, match=told):
            ControlLoop(robot, policy, WIDE)


@pytest.mark.parametrize(("trained", "strategy", "told"), [(0, "prefix", 1), (0, "guided", 0), (4, "prefix", 0)])
def test_a_policy_that_was_not_trained_for_delays_is_told_of_once(trained, strategy, told, caplog, monkeypatch):
    monkeypatch.setattr("scd_robot.control.rehearsal.SPEC", replace(SPEC, max_delay_steps=trained))
    scene = Scene(LoopConfig(execution=ExecutionConfig(strategy)))
    assert scene.policy.spec.max_delay_steps == trained
    scene.run(40)
    assert caplog.text.count("was not trained for delays (model.max_delay_steps is 0)") == told


@pytest.mark.parametrize(("trained", "faults"), [(2, {"delay_too_long": 1}), (4, {})])
def test_a_delay_that_is_longer_than_what_was_trained_is_told(trained, faults, caplog, monkeypatch):
    monkeypatch.setattr("scd_robot.control.rehearsal.SPEC", replace(SPEC, max_delay_steps=trained))
    scene = Scene(LoopConfig(execution=ExecutionConfig(delay=DelayConfig(warm_up=0))), plan_steps=3.5)
    scene.policy.max_prefix = trained
    assert scene.run(60).faults == faults
    assert max(prefix.shape[1] for prefix in scene.policy.prefixes if prefix is not None) == trained
    if faults:
        assert "4 control steps per plan, trained was at most 2 (model.max_delay_steps)" in caplog.text


@pytest.mark.parametrize(
    ("config", "limits", "told"),
    [
        ({}, Limits.of_box((0.0,), (1.0,)), "2 actions"),
        ({"start": StartGuard((1.0,))}, WIDE, "max_distance"),
        ({"watchdog": WatchdogConfig(frozen_keys=("wrist",))}, WIDE, "wrist"),
    ],
)
def test_settings_that_do_not_fit_the_policy_are_refused(config, limits, told):
    with pytest.raises(ConfigError, match=told):
        Scene(LoopConfig(**config), limits=limits)


SLOW = Limits((-10.0, -10.0), (10.0, 10.0), (1.0, 1.0), (5.0, 5.0), (None, None))


def jumps(scene, after):
    """Largest distance of a command from where the robot was when it came, in control steps from `after` on."""
    seen, send, far = [], scene.robot.send, []

    def watched(command):
        if scene.clock.now() / DT >= after:
            seen.append(scene.clock.now() / DT)
            far.append(np.abs(command - scene.robot.pose).max())
        send(command)

    scene.robot.send = watched
    return far


@pytest.mark.parametrize("where", ["between two control steps", "in observe()", "in the encoder"])
def test_after_a_standstill_of_the_loop_commands_begin_where_the_robot_is_then(where):
    scene, calls = Scene(limits=SLOW, goal=(3.0, 3.0)), []

    def stall():
        scene.clock.advance(2.0)
        scene.robot.pose = np.array([-2.0, -2.0])  # the robot's own watchdog let it go

    def stalls(method):
        def called(*arguments):
            calls.append(method)
            if len(calls) == 25:
                stall()
            return method(*arguments)

        return called

    if where == "between two control steps":
        scene.at[25] = stall
    elif where == "in observe()":
        scene.robot.observe = stalls(scene.robot.observe)
    else:
        scene.policy.observe = stalls(scene.policy.observe)
    far = jumps(scene, after=30)
    report = scene.run(60)
    assert report.faults == {"clock_gap": 1}
    assert len(far) > 20
    assert max(far) <= 0.05 + 1e-9, "a command's velocity from where it is"
    assert scene.robot.held >= 3, "at the start, after the standstill, and at the end"


def test_nothing_is_sent_to_a_robot_that_is_not_seen_and_commands_begin_where_it_is_seen_next():
    scene = Scene(LoopConfig(watchdog=WatchdogConfig(give_up_s=60.0)), limits=SLOW, goal=(3.0, 3.0))
    observe, frozen = scene.robot.observe, []

    def lost():
        sample = observe()
        frozen.append(sample)
        scene.robot.observe = lambda: sample

    def back():
        scene.robot.pose = np.array([-2.0, -2.0])
        scene.robot.observe = observe

    scene.at |= {25: lost, 85: back}
    far = jumps(scene, after=80)
    report = scene.run(120)
    assert report.faults == {"stale_observation": 1}
    times = np.array([row[0] for row in scene.sent])
    assert not ((times > 50) & (times < 85)).any(), "it has braked and holds by its own means"
    assert len(far) > 20
    assert max(far) <= 0.05 + 1e-9


@pytest.mark.parametrize("servo_steps", [1, 3])
@pytest.mark.parametrize("acceleration", [4.0, np.inf])
def test_committed_actions_are_those_that_are_sent_whatever_limits_and_servo_steps(servo_steps, acceleration):
    limits = Limits((-2.0,) * 2, (2.0,) * 2, (1.0,) * 2, (acceleration,) * 2, (None,) * 2)
    config = LoopConfig(servo_steps=servo_steps, execution=ExecutionConfig("prefix", num_executed=6))
    scene, rng, given = Scene(config, limits=limits, plan_steps=3.2), np.random.default_rng(0), []
    plan_from = scene.policy.plan_from

    def plan(snapshot, prefix=None, running=None):
        given.append((round(scene.clock.now() / DT), prefix))
        scene.policy.goal = rng.uniform(-1, 1, 2)
        return plan_from(snapshot, prefix, running)

    scene.policy.plan_from = plan
    scene.run(200)
    ends = {int(time + 1e-3): place for time, *place in scene.sent}  # the last one of each control step
    committed = [
        (ends[step + i], action)
        for step, prefix in given
        if prefix is not None
        for i, action in enumerate(prefix[0, :4])  # what is sent until the plan is there
        if step + i < 199  # then it brakes
    ]
    assert len(committed) > 60
    np.testing.assert_allclose(*map(np.array, zip(*committed, strict=True)), atol=1e-6)


def test_a_plan_that_nobody_asked_for_while_nothing_was_seen_is_not_late():
    watchdog = WatchdogConfig(stale_observation="slow", late_plan="stop", give_up_s=60.0)
    scene = Scene(LoopConfig(watchdog=watchdog), limits=SLOW, goal=(3.0, 3.0))
    observe = scene.robot.observe

    def lost():
        sample = observe()
        scene.robot.observe = lambda: sample

    scene.at |= {10: lost, 60: lambda: setattr(scene.robot, "observe", observe)}
    report = scene.run(100)
    assert report.faults == {"stale_observation": 1}
    assert report.steps >= 100


def test_changes_in_servo_steps_are_told_of(caplog):
    changes = replace(SPEC, action_kind="delta")
    rest = Limits.of_box((-1.0, -1.0), (1.0, 1.0), rest=(0.0, 0.0))
    Scene(LoopConfig(servo_steps=4), limits=rest, spec=changes)
    assert "not add it up" in caplog.text


@pytest.mark.parametrize("sleeps", [0.0, 0.5, 1.2])
def test_a_loop_that_is_always_too_slow_says_so(sleeps, caplog):
    """Control steps are missed, one at a time, and the policy runs slower than it was trained."""
    scene = Scene(plan_steps=0.5)
    observe = scene.robot.observe

    def slow():
        scene.clock.advance(sleeps * DT)
        return observe()

    scene.robot.observe = slow
    report = scene.run(60)
    assert report.faults.get("slow_loop", 0) == (sleeps > 1)
    assert ("before 6 of the last" in caplog.text) == (sleeps > 1)


def test_flight_records_go_to_a_folder_that_is_named_by_a_text(tmp_path):
    scene = Scene(LoopConfig(recorder=RecorderConfig(str(tmp_path / "flights"), at_end=True)))
    scene.run(5)
    assert find_record(tmp_path / "flights").name == "flight-001-end"
