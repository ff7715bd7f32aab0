"""Robots of LeRobot under the loop: names, units, time, faults, and what arrives at the motors."""

import contextlib
import json
import math

import numpy as np
import pytest
from robot_fakes import DT, FRONT, LIMITS, MOTORS, NAMES, SPEC, STATE, FakeLeRobot, Stage, virtual_clock

from scd_robot.control import LoopConfig, StartGuard, WatchdogConfig
from scd_robot.control.dry_run import DryRun
from scd_robot.control.lerobot_robot import LeRobotRobot, names_of_robot
from scd_robot.control.names import NameMap
from scd_robot.errors import ActionError, ConfigError, DatasetError, ShapeError, UnknownNameError
from scd_robot.types import ArraySpec, PolicySpec

PATIENT_S = 20.0  # of the wall clock, for what comes at once: no test waits so long


@pytest.fixture
def clock():
    return virtual_clock()


@pytest.fixture
def device():
    yield (fake := FakeLeRobot())
    fake.pass_on.set()


def make(device, clock, patience_s=PATIENT_S, **options):
    return LeRobotRobot(device, SPEC, NAMES, patience_s=patience_s, clock=clock, **options)


def place(device):
    return lambda: np.array([device.positions[name.removesuffix(".pos")] for name in NAMES.action])


def wait_for_the_reading(robot):
    with robot._told:
        assert robot._told.wait_for(lambda: not robot._wanted, PATIENT_S)


class TestNames:
    def test_numbers_come_in_the_policys_order_whatever_the_robots(self, device, clock):
        with make(device, clock) as robot:
            device.spoil = lambda values: values.update(reversed(list(values.items())))
            sample = robot.observe()
        np.testing.assert_array_equal(sample.observation[STATE], [-20, 30, 10])
        np.testing.assert_array_equal(sample.pose, [30, 10, -20])
        assert {key: (value.shape, str(value.dtype)) for key, value in sample.observation.items()} == {
            STATE: ((3,), "float32"),
            FRONT: ((6, 8, 3), "uint8"),
        }

    def test_commands_go_to_the_motors_of_their_names(self, device, clock):
        with make(device, clock) as robot:
            robot.send(np.array([31.0, 11.0, -21.0]))
        assert device.positions == {"shoulder_pan": 11, "elbow_flex": -21, "gripper": 31}

    def test_pictures_are_the_policys_own(self, device, clock):
        frame = np.zeros((6, 8, 3), np.uint8)
        device.spoil = lambda values: values.update(front=frame)
        with make(device, clock) as robot:
            seen = robot.observe().observation[FRONT]
            frame += 7
        assert not seen.any()

    def test_names_of_a_robot_are_those_that_it_is_recorded_with(self, device):
        names = names_of_robot(device)
        motors = tuple(f"{motor}.pos" for motor in MOTORS)
        assert (names.vectors, names.cameras, names.action) == ({STATE: motors}, {FRONT: "front"}, motors)

    @pytest.mark.parametrize("wrap", [lambda names: names, lambda names: {"motors": names}])
    def test_names_and_ranges_of_a_dataset(self, tmp_path, wrap):
        features = {
            STATE: {"dtype": "float32", "shape": [2], "names": wrap(["b.pos", "a.pos"])},
            "observation.other": {"dtype": "float32", "shape": [1], "names": None},
            "action": {"dtype": "float32", "shape": [2], "names": wrap(["a.pos", "b.pos"])},
            FRONT: {"dtype": "video", "shape": [6, 8, 3], "names": ["height", "width", "channels"]},
            "index": {"dtype": "int64", "shape": [1], "names": None},
        }
        (tmp_path / "meta").mkdir()
        (tmp_path / "meta" / "info.json").write_text(json.dumps({"features": features}))
        names = NameMap.of_dataset(tmp_path)
        assert (names.vectors, names.cameras) == ({STATE: ("b.pos", "a.pos")}, {FRONT: "front"})
        assert (names.action, names.ranges) == (("a.pos", "b.pos"), {})
        statistics = {STATE: {"min": [0, 1], "max": [2, 3]}, "action": {"mean": [0, 0]}, FRONT: {"min": [[[0]]]}}
        (tmp_path / "meta" / "stats.json").write_text(json.dumps(statistics))
        assert NameMap.of_dataset(tmp_path).ranges == {STATE: ((0, 1), (2, 3))}

    @pytest.mark.parametrize(
        ("text", "told"),
        [("{", "cannot read"), ("[]", "an object"), ('{"features": {}}', "'action'"), (None, "cannot read")],
    )
    def test_what_is_no_dataset_is_refused(self, tmp_path, text, told):
        (tmp_path / "meta").mkdir()
        if text is not None:
            (tmp_path / "meta" / "info.json").write_text(text)
        with pytest.raises(DatasetError, match=told):
            NameMap.of_dataset(tmp_path)

    def test_a_dataset_that_does_not_name_its_actions_is_refused(self, tmp_path):
        (tmp_path / "meta").mkdir()
        features = {"action": {"dtype": "float32", "shape": [2], "names": None}}
        (tmp_path / "meta" / "info.json").write_text(json.dumps({"features": features}))
        with pytest.raises(DatasetError, match="does not name the numbers of 'action'"):
            NameMap.of_dataset(tmp_path)


MOTOR_NAMES = NAMES.vectors[STATE]


@pytest.mark.parametrize(
    ("vectors", "cameras", "action", "kind", "told"),
    [
        ({STATE: ("elbow.pos", *MOTOR_NAMES[1:])}, NAMES.cameras, NAMES.action, UnknownNameError, "elbow_flex.pos"),
        (NAMES.vectors, NAMES.cameras, ("grip.pos", *NAMES.action[1:]), UnknownNameError, "gripper.pos"),
        (NAMES.vectors, {FRONT: "wrist"}, NAMES.action, UnknownNameError, "camera of the robot 'wrist'"),
        ({STATE: MOTOR_NAMES[:2]}, NAMES.cameras, NAMES.action, ConfigError, "has 2 names"),
        (NAMES.vectors, NAMES.cameras, NAMES.action[:2], ConfigError, "3 actions, and they have 2 names"),
        ({"state": MOTOR_NAMES}, NAMES.cameras, NAMES.action, ConfigError, f"'{STATE}' has no names"),
        (NAMES.vectors, NAMES.cameras, NAMES.action[:1] * 3, ConfigError, "more than once"),
    ],
)
def test_names_that_do_not_fit_are_refused_before_anything_moves(device, vectors, cameras, action, kind, told):
    with pytest.raises(kind, match=told):
        LeRobotRobot(device, SPEC, NameMap(vectors, cameras, action))
    assert device.calls == []


def test_a_motor_that_the_policy_does_not_command_is_refused(device):
    spec = PolicySpec(SPEC.observation, 2, DT, 16, 8, 8)
    with pytest.raises(ConfigError, match=r"wants an action for 'elbow_flex\.pos'"):
        LeRobotRobot(device, spec, NameMap(NAMES.vectors, NAMES.cameras, NAMES.action[:2]))


def test_a_camera_of_another_size_is_refused_before_anything_moves():
    with pytest.raises(ShapeError, match=r"'front' gives \(12, 8, 3\)"):
        LeRobotRobot(FakeLeRobot(size=(12, 8, 3)), SPEC, NAMES)


def test_an_action_whose_place_nobody_tells_is_refused_unless_it_is_a_velocity(clock):
    class Base(FakeLeRobot):
        @property
        def observation_features(self):
            return {name: kind for name, kind in super().observation_features.items() if name != "gripper.pos"}

    spec = PolicySpec({STATE: ArraySpec((2,))}, 3, DT, 16, 8, 8)
    names = NameMap({STATE: ("elbow_flex.pos", "shoulder_pan.pos")}, {}, NAMES.action)
    with pytest.raises(ConfigError, match=r"does not tell where 'gripper\.pos' is"):
        LeRobotRobot(Base(), spec, names)
    device = Base()
    with LeRobotRobot(device, spec, names, rest=(0.0, None, None), clock=clock, patience_s=PATIENT_S) as robot:
        robot.hold()
    assert device.sent == [{"gripper.pos": 0, "shoulder_pan.pos": 10, "elbow_flex.pos": -20}]


@pytest.mark.parametrize("rest", [(0.0, 0.0, 0.0), (0.0, None, None)])
def test_velocities_rest_when_the_robot_is_to_hold_and_nobody_knows_where_it_is(device, clock, rest):
    with make(device, clock, rest=rest) as robot:
        robot.send(np.array([31.0, 11.0, -21.0]))
        device.spoil = lambda values: 1 / 0
        clock.advance(1.0)
        held = contextlib.nullcontext() if None not in rest else pytest.raises(TimeoutError, match="cannot hold")
        with held:
            robot.hold()
    places = {"shoulder_pan.pos": 0, "elbow_flex.pos": 0} if None not in rest else {}
    assert device.sent[-1] == {"gripper.pos": 0, "shoulder_pan.pos": 11, "elbow_flex.pos": -21} | places


class TestConnecting:
    def test_it_can_be_connected_again(self, device, clock):
        robot = make(device, clock)
        for run in range(2):
            with robot:
                device.positions["gripper"] = 30.0 + run
                wait = [robot.observe() for _ in range(3)]
                robot.send(np.array([31.0, 11.0, -21.0]))
            assert wait[-1].observation[STATE][1] == 30.0 + run
        assert device.calls == [("connect", False), "disconnect"] * 2

    def test_it_never_asks_for_a_calibration_and_lets_go_of_one_that_has_none(self, clock):
        device = FakeLeRobot(calibrated=False)
        with pytest.raises(ConfigError, match="lerobot-calibrate"):
            make(device, clock).connect()
        assert device.calls == [("connect", False), "disconnect"]

    def test_one_that_is_connected_is_not_connected_again_and_closing_twice_is_once(self, device, clock):
        device.connected = True
        robot = make(device, clock)
        robot.connect()
        robot.close()
        robot.close()
        assert device.calls == ["disconnect"]
        with pytest.raises(ConnectionError, match="disconnected"):
            robot.observe()

    def test_it_is_told_to_connect_first(self, device, clock):
        robot, depths = make(device, clock), []
        for _ in range(3):
            with pytest.raises(ConnectionError, match=r"connect\(\)") as told:
                robot.observe()
            depths.append(len(told.traceback))
        assert len(set(depths)) == 1, "what is raised again and again does not grow"

    def test_what_a_reading_raised_says_where_each_time_and_does_not_grow(self, device, clock):
        def unplugged(values):
            raise OSError("no status packet")

        with make(device, clock) as robot:
            device.spoil, depths = unplugged, []
            for _ in range(3):
                with pytest.raises(OSError, match="no status packet") as told:
                    robot.observe()
                depths.append(len(told.traceback))
                assert told.traceback[-1].name == "unplugged"
        assert len(set(depths)) == 1

    @pytest.mark.parametrize(("unit", "fits"), [(1.0, True), (180 / math.pi, False)])
    def test_other_units_than_the_datas_are_refused(self, device, clock, unit, fits):
        state = np.array([-20.0, 30.0, 10.0]) / unit
        ranges = {STATE: (tuple(state - 0.5), tuple(state + 0.5))}
        names = NameMap(NAMES.vectors, NAMES.cameras, NAMES.action, ranges)
        robot = LeRobotRobot(device, SPEC, names, clock=clock, patience_s=PATIENT_S)
        if fits:
            robot.connect()
            robot.close()
            return
        with pytest.raises(ConfigError, match="other units"):
            robot.connect()
        assert device.calls[-1] == "disconnect"
        assert device.sent == []


class TestTime:
    def test_a_sample_is_of_when_its_reading_began(self, device, clock):
        device.spoil = lambda values: clock.advance(0.03)
        with make(device, clock) as robot:
            assert robot.observe().stamp_s == pytest.approx(clock.now() - 0.03)

    def test_a_reading_that_does_not_come_back_gives_the_last_sample_and_then_its_own_time(self, device, clock):
        with make(device, clock) as robot:
            first = robot.observe()
            device.pass_on.clear()
            robot._patience_s = 0.01
            clock.advance(1.0)
            began = clock.now()
            for _ in range(3):
                assert robot.observe() is first
                assert device.blocked.wait(PATIENT_S)
                clock.advance(1.0)
            device.pass_on.set()
            wait_for_the_reading(robot)
            assert robot._outcome.stamp_s == began

    def test_no_command_is_sent_while_it_is_read(self, device, clock):
        with make(device, clock, patience_s=0.01) as robot:
            device.pass_on.clear()
            robot.observe()
            assert device.blocked.wait(PATIENT_S)
            with pytest.raises(TimeoutError, match="not sent"):
                robot.send(np.zeros(3))
            assert device.sent == []
            device.pass_on.set()
            robot._patience_s = PATIENT_S
            robot.send(np.zeros(3))
            assert len(device.sent) == 1

    def test_what_was_really_sent_is_told_with_the_next_sample(self, device, clock):
        device.clip = lambda action: {**action, "gripper.pos": 31.5}
        with make(device, clock) as robot:
            assert robot.observe().executed is None
            robot.send(np.array([50.0, 11.0, -21.0]))
            np.testing.assert_array_equal(robot.observe().executed, [31.5, 11.0, -21.0])


class TestHolding:
    def test_it_commands_the_present_position(self, device, clock):
        with make(device, clock) as robot:
            robot.send(np.array([31.0, 11.0, -21.0]))
            device.positions["shoulder_pan"] = 10.5  # it sags
            clock.advance(60.0)  # nobody observed for long
            robot.hold()
        assert device.sent[-1] == {"gripper.pos": 31, "shoulder_pan.pos": 10.5, "elbow_flex.pos": -21}

    @pytest.mark.parametrize("nan", [False, True])
    def test_a_position_that_is_not_known_any_more_is_not_commanded(self, device, clock, nan):
        def spoil(values):
            if not nan:
                raise TimeoutError("no status packet")
            values["elbow_flex.pos"] = float("nan")

        with make(device, clock) as robot:
            device.spoil = spoil
            clock.advance(1.5 * DT)
            robot.hold()  # the last one is young enough
            clock.advance(DT)
            with pytest.raises(TimeoutError, match="cannot hold"):
                robot.hold()
        assert device.sent == [{"gripper.pos": 30, "shoulder_pan.pos": 10, "elbow_flex.pos": -20}]

    def test_nan_is_never_sent(self, device, clock):
        with make(device, clock) as robot, pytest.raises(ActionError, match="finite"):
            robot.send(np.array([np.nan, 0, 0]))
        assert device.sent == []


class TestLoop:
    @pytest.mark.parametrize("servo_steps", [1, 3])
    def test_it_runs_and_all_that_arrives_is_within_the_limits(self, device, clock, servo_steps):
        with make(device, clock) as robot:
            stage = Stage(robot, clock, place(device), config=LoopConfig(servo_steps=servo_steps))
            report = stage.run(60)
        assert (report.faults, stage.port.violations) == ({}, [])
        assert stage.states["running"] >= 54
        assert len(device.sent) == report.commands + 2, "the commands, and a hold before and after them"
        path = np.array([list(action.values()) for action in device.sent])
        assert np.ptp(path, axis=0).min() > 1.0
        assert (np.abs(np.diff(path, axis=0)) <= np.array(LIMITS.velocity) * DT / servo_steps + 1e-9).all()
        told = [executed[0] for executed in stage.policy.executed if executed is not None]
        np.testing.assert_allclose(told, path[::servo_steps][: len(told)], rtol=1e-6)

    @pytest.mark.parametrize(
        ("spoil", "faults"),
        [
            (lambda values: values.pop("elbow_flex.pos"), {"robot_observe", "stale_observation", "robot_hold"}),
            (
                lambda values: values.update({"gripper.pos": "28 %"}),
                {"robot_observe", "stale_observation", "robot_hold"},
            ),
            (
                lambda values: values.update({"gripper.pos": float("nan")}),
                {"bad_observation", "stale_observation", "robot_hold"},
            ),
            (lambda values: values.update(front=values["front"][:4]), {"bad_observation", "stale_observation"}),
            (
                lambda values: values.update(front=values["front"] / 255),
                {"robot_observe", "stale_observation", "robot_hold"},
            ),
            (lambda values: 1 / 0, {"robot_observe", "stale_observation", "robot_hold"}),
        ],
        ids=["missing motor", "no number", "NaN", "camera size", "camera dtype", "exception"],
    )
    def test_faults_of_the_sensors_make_it_hold_and_it_goes_on_after_them(self, device, clock, spoil, faults):
        with make(device, clock) as robot:
            stage = Stage(robot, clock, place(device))
            stage.at[30] = lambda: setattr(device, "spoil", spoil)
            stage.at[45] = lambda: setattr(device, "spoil", lambda values: None)
            report = stage.run(80)
        assert (report.faults.keys(), stage.port.violations) == (faults, [])
        assert stage.states["holding"] >= 8
        assert stage.states["running"] >= 55

    def test_a_reading_that_blocks_sends_nothing_and_it_goes_on_afterwards(self, device, clock):
        def block():
            device.pass_on.clear()
            robot._patience_s = 0.1

        def come_back():
            device.pass_on.set()
            wait_for_the_reading(robot)
            robot._patience_s = PATIENT_S

        with make(device, clock) as robot:
            stage = Stage(robot, clock, place(device))
            sent = []
            stage.at[30] = block
            stage.at[31] = lambda: device.blocked.wait(PATIENT_S)
            stage.at[32] = lambda: sent.append(len(device.sent))
            stage.at[44] = lambda: sent.append(len(device.sent))
            stage.at[45] = come_back
            report = stage.run(80)
        assert report.faults["robot_send"] >= 1
        assert report.faults["robot_hold"] >= 1
        assert sent[0] == sent[1]
        assert (stage.port.violations, report.state) == ([], "stopped")
        assert stage.states["running"] >= 45

    def test_a_camera_that_repeats_itself_is_seen(self, device, clock):
        watchdog = WatchdogConfig(frozen_keys=(FRONT,), max_frozen_s=0.3)
        with make(device, clock) as robot:
            stage = Stage(robot, clock, place(device), config=LoopConfig(watchdog=watchdog))
            stage.at[30] = lambda: setattr(device, "frozen", True)
            report = stage.run(50)
        assert report.faults == {"frozen_observation": 1}

    def test_a_robot_in_radians_is_not_moved_by_a_policy_in_degrees(self, device, clock):
        """Small numbers lie within the range of large ones: what tells them is how far off the first action is."""
        start = dict.fromkeys(MOTORS, 0.5)
        device.positions = dict(start)
        with make(device, clock) as robot:
            stage = Stage(robot, clock, place(device), config=LoopConfig(start=StartGuard((10.0,) * 3, "refuse")))
            stage.policy.snapshot = lambda: {"state": np.array([30.0, 40.0, -60.0]), "walk": np.zeros((16, 3))}
            report = stage.run(30)
        assert (report.faults, report.state) == ({"far_start": 1}, "stopped")
        assert device.positions == start

    def test_a_dry_run_sends_nothing(self, device, clock):
        with make(device, clock) as robot:
            dry = DryRun(robot)
            stage = Stage(dry, clock, None)
            report = stage.run(40)
        assert device.sent == []
        assert (report.faults, dry.kept) == ({}, report.commands)
        assert stage.states["running"] >= 34
        assert dry.last is not None


def test_limits_of_a_dataset_hold_what_was_commanded_and_what_was_measured():
    names = NameMap(
        {STATE: ("b.pos", "a.pos")},
        {},
        ("a.pos", "b.pos"),
        {"action": ((0, 10), (10, 20)), STATE: ((12, -10), (30, 5))},
    )
    limits = names.limits(0.5, 2.0, margin=0.1)
    assert (limits.low, limits.high) == ((-12, 8), (12, 32))
    assert (limits.velocity, limits.acceleration, limits.rest) == ((10, 10), (40, 40), (None, None))
    with pytest.raises(DatasetError, match=r"stats\.json"):
        NAMES.limits(0.5, 2.0)
