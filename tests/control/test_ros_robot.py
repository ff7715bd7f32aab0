"""Robots behind ROS 2 topics under the loop: messages, names, time, faults, and what arrives at the controller."""

import subprocess
import sys

import numpy as np
import pytest
from fake_ros import (
    WAIT_S,
    Arm,
    ExternalShutdownException,
    FakeRos,
    JointState,
    Node,
    SingleThreadedExecutor,
    image,
    joint_state,
)
from robot_fakes import DT, FRONT, SPEC, STATE, Stage, Walks, virtual_clock

from scd_robot.control import Limits, LoopConfig
from scd_robot.control.dry_run import DryRun
from scd_robot.control.names import NameMap
from scd_robot.control.ros_messages import joint_values, picture
from scd_robot.control.ros_robot import RosRobot, RosTopics
from scd_robot.errors import ActionError, ConfigError, MissingDependencyError, ShapeError, UnknownNameError

NAMES = NameMap(
    {STATE: ("elbow.pos", "gripper.pos", "elbow.vel")}, {FRONT: "front"}, ("gripper.pos", "shoulder.pos", "elbow.pos")
)
START = {"shoulder": 0.3, "elbow": -0.2, "gripper": 0.04}
LIMITS = Limits((0.0, -3.0, -3.0), (0.1, 3.0, 3.0), (0.1, 0.8, 0.8), (1.0, 8.0, 8.0), (None,) * 3)
TOPICS = RosTopics(command="/controller", cameras={"front": "/front"})
ORDER = ("elbow", "gripper", "shoulder")
ARRAY = RosTopics(command="/controller", command_type="array", array_joints=ORDER, cameras={"front": "/front"})


class Scene:
    def __init__(self, monkeypatch, topics=TOPICS, **options):
        self.ros = FakeRos().install(monkeypatch)
        self.clock = virtual_clock()
        self.arm = Arm(self.ros, START, topics.command_type, order=topics.array_joints)
        self.robot = RosRobot(SPEC, NAMES, topics, clock=self.clock, **options)

    def __enter__(self):
        self.arm.tick()
        self.robot.connect(WAIT_S)
        return self

    def __exit__(self, *unused):
        self.robot.close()

    def tick(self, seconds=DT):
        self.clock.advance(seconds)
        self.arm.tick()

    def stage(self, robot=None, **options):
        def place():
            return np.array([self.arm.positions[name.removesuffix(".pos")] for name in NAMES.action])

        robot = Ticking(robot or self.robot, self.arm)
        return Stage(robot, self.clock, place, limits=LIMITS, policy=WalksByPose(self.clock), **options)


class Ticking:
    """Messages come once in each control step, right before the loop looks."""

    def __init__(self, robot, arm):
        self._robot, self._arm = robot, arm
        self.send, self.hold = robot.send, robot.hold

    def observe(self):
        self._arm.tick()
        return self._robot.observe()


class WalksByPose(Walks):
    """Sees no shoulder, and leaves it where it is."""

    def __init__(self, clock):
        super().__init__(clock, SPEC, NameMap({STATE: NAMES.action}, {}, NAMES.action), step=0.03)

    def observe(self, observation, executed_action=None):
        elbow, gripper, _ = observation[STATE][0]
        pose = np.array([[gripper, 0.3, elbow]], np.float32)
        super().observe({**observation, STATE: pose}, executed_action)


@pytest.fixture
def scene(monkeypatch):
    with Scene(monkeypatch) as scene:
        yield scene


class TestMessages:
    PIXELS = np.arange(6 * 8 * 3, dtype=np.uint8).reshape(6, 8, 3)

    @pytest.mark.parametrize("padding", [0, 5])
    def test_pictures(self, padding):
        np.testing.assert_array_equal(picture(image(self.PIXELS, "rgb8", padding)), self.PIXELS)
        swapped = picture(image(self.PIXELS, "bgr8", padding))
        np.testing.assert_array_equal(swapped, self.PIXELS[..., [2, 1, 0]])
        assert swapped.flags.c_contiguous
        np.testing.assert_array_equal(picture(image(self.PIXELS[..., :1], "mono8", padding)), self.PIXELS[..., :1])

    @pytest.mark.parametrize(
        ("spoil", "told"),
        [
            ({"encoding": "16UC1"}, "got '16UC1'"),
            ({"step": 23}, "rows of at least 24 bytes"),
            ({"height": 7}, "got 144 bytes"),
        ],
    )
    def test_pictures_that_are_none(self, spoil, told):
        message = image(self.PIXELS)
        for name, value in spoil.items():
            setattr(message, name, value)
        with pytest.raises(ShapeError, match=told):
            picture(message)

    def test_numbers_of_joints_are_optional_but_never_too_few(self):
        message = joint_state({"a": 1.0, "b": 2.0}, velocities=[3.0, 4.0])
        assert joint_values(message) == {"a.pos": 1, "b.pos": 2, "a.vel": 3, "b.vel": 4}
        assert joint_values(JointState(name=["a"])) == {}
        message.velocity = message.velocity[:1]
        with pytest.raises(ShapeError, match="2 joints and holds 1 numbers as velocity"):
            joint_values(message)


class TestSamples:
    def test_numbers_come_in_the_policys_order_from_all_who_tell_them(self, scene):
        sample = scene.robot.observe()
        np.testing.assert_allclose(sample.observation[STATE], [-0.2, 0.04, 0.25])
        np.testing.assert_allclose(sample.pose, [0.04, 0.3, -0.2])
        assert sample.observation[FRONT].shape == (6, 8, 3)
        assert (sample.observation[FRONT][1:] == 1).all()

    def test_its_time_is_the_arrival_of_its_oldest_number_whatever_the_header_says(self, scene):
        began = scene.clock.now()
        scene.clock.advance(0.1)
        scene.ros.publish("/joint_states", joint_state({"elbow": 0.0}, 10**9, [0.0]))
        assert scene.robot.observe().stamp_s == began, "the others did not come again"
        scene.tick(0.05)
        assert scene.robot.observe().stamp_s == scene.clock.now()

    def test_a_message_that_is_repeated_is_no_new_one(self, scene):
        began = scene.robot.observe().stamp_s
        for _ in range(3):
            scene.arm.ticks -= 1
            scene.tick()
        assert scene.robot.observe().stamp_s == began
        scene.clock.advance(0.1)
        with pytest.raises(TimeoutError, match=r"'elbow\.pos' has come on /joint_states for 0\.250 s"):
            scene.robot.observe()

    def test_a_camera_that_stops_is_told_by_its_topic(self, scene):
        scene.arm.spoil = lambda messages: messages.pop("camera")
        for _ in range(5):
            scene.tick()
        with pytest.raises(TimeoutError, match="new picture has come on /front for"):
            scene.robot.observe()

    def test_a_message_that_holds_too_few_numbers_is_told_until_a_good_one_comes(self, scene):
        scene.ros.publish("/joint_states", JointState(name=["elbow"], position=[]))
        scene.robot.observe()
        bad = joint_state({"elbow": 0.0}, velocities=[0.0, 0.0])
        scene.ros.publish("/joint_states", bad)
        with pytest.raises(ShapeError, match="/joint_states: a message names 1 joints"):
            scene.robot.observe()
        scene.tick()
        scene.robot.observe()


class TestNode:
    def test_its_context_is_its_own_so_that_ctrl_c_is_the_loops(self, scene):
        assert None not in scene.ros.contexts
        assert len(scene.ros.contexts) == 1

    def test_closing_ends_everything_and_twice_is_once(self, scene):
        scene.robot.close()
        scene.robot.close()
        assert scene.ros.destroyed == ["scd_robot"]
        assert not scene.ros.contexts[0].ok()
        with pytest.raises(ConnectionError, match="it was shut down"):
            scene.robot.observe()

    def test_a_node_that_dies_is_told(self, scene):
        scene.ros.publish("/joint_states", ExternalShutdownException("context"))
        scene.robot._node.thread.join(WAIT_S)
        for call in (scene.robot.observe, scene.robot.hold, lambda: scene.robot.send(np.zeros(3))):
            with pytest.raises(ConnectionError, match="ExternalShutdownException: context"):
                call()

    def test_without_ros_the_error_says_what_to_do(self):
        if "rclpy" in sys.modules:
            pytest.skip("ROS 2 is there")
        with pytest.raises(MissingDependencyError, match="setup file"):
            RosRobot(SPEC, NAMES, TOPICS).connect()

    def test_a_missing_joint_is_told_with_the_nearest_name(self, monkeypatch):
        scene = Scene(monkeypatch)
        scene.arm.positions["shoulder_1"] = scene.arm.positions.pop("shoulder")
        scene.arm.tick()
        monkeypatch.setattr(RosRobot, "_complete", lambda robot: "shoulder_1.pos" in robot._numbers)  # wait for no more
        with pytest.raises(ShapeError, match=r"no 'shoulder\.pos' comes on /joint_states.*'shoulder_1\.pos'"):
            scene.robot.connect(WAIT_S)
        assert scene.ros.destroyed == ["scd_robot"]

    def test_a_silent_topic_is_told(self, monkeypatch):
        with pytest.raises(TimeoutError, match="no message has come on /joint_states"):
            Scene(monkeypatch).robot.connect(0.05)

    def test_a_silent_topic_that_speaks_again_is_connected_to(self, monkeypatch):
        scene = Scene(monkeypatch)
        with pytest.raises(TimeoutError):
            scene.robot.connect(0.05)
        with scene:
            scene.robot.observe()
        with pytest.raises(TimeoutError, match="no message has come"):  # to this node; those before are forgotten
            scene.robot.connect(0.05)

    @pytest.mark.parametrize("failing", ["create_node", "create_subscription", "add_node"])
    def test_what_fails_halfway_leaves_neither_node_nor_context(self, monkeypatch, failing):
        scene = Scene(monkeypatch)
        owner = {"create_node": sys.modules["rclpy"], "create_subscription": Node, "add_node": SingleThreadedExecutor}

        def fail(*_, **__):
            raise RuntimeError("the middleware refuses")

        monkeypatch.setattr(owner[failing], failing, fail)
        with pytest.raises(RuntimeError, match="refuses"):
            scene.robot.connect(WAIT_S)
        assert [context.ok() for context in scene.ros.contexts] == [False]
        assert scene.ros.destroyed == ([] if failing == "create_node" else ["scd_robot"])
        scene.robot.close()

    def test_degrees_are_not_taken_for_radians(self, monkeypatch):
        scene = Scene(monkeypatch)
        ranges = {STATE: ((-1.5, 0.0, -1.0), (1.5, 0.1, 1.0))}
        names = NameMap(NAMES.vectors, NAMES.cameras, NAMES.action, ranges)
        scene.arm.positions["elbow"] = -30.0
        scene.arm.tick()
        with pytest.raises(ConfigError, match=r"'elbow\.pos' is -30.*other units"):
            RosRobot(SPEC, names, TOPICS, clock=scene.clock).connect(WAIT_S)


@pytest.mark.parametrize(
    ("names", "topics", "rest", "kind", "told"),
    [
        (NAMES, RosTopics(), None, UnknownNameError, "camera among the topics 'front'"),
        (NameMap(NAMES.vectors, NAMES.cameras, ("a", "b", "c")), TOPICS, None, ConfigError, "got 'a'"),
        (NameMap(NAMES.vectors, NAMES.cameras, ("a.pos", "a.vel", "b.pos")), ARRAY, None, ConfigError, "one command"),
        (NameMap(NAMES.vectors, NAMES.cameras, ("a.vel", "b.pos", "c.pos")), TOPICS, None, ConfigError, r"a\.vel"),
        (NAMES, RosTopics(command_type="array", cameras={"front": "/f"}), None, ConfigError, "array_joints"),
        (NAMES, ARRAY, (0.0,), ConfigError, "rest is for 1"),
        (NAMES, TOPICS, (0.0, None, None), ConfigError, "without rest"),
    ],
)
def test_settings_that_do_not_fit_are_refused(names, topics, rest, kind, told):
    with pytest.raises(kind, match=told):
        RosRobot(SPEC, names, topics, rest=rest)


def test_another_kind_of_command_is_refused():
    with pytest.raises(ConfigError, match="'twist'"):
        RosTopics(command_type="twist")


class TestCommands:
    @pytest.mark.parametrize("topics", [TOPICS, ARRAY], ids=["trajectory", "array"])
    def test_they_go_to_the_joints_of_their_names(self, monkeypatch, topics):
        with Scene(monkeypatch, topics, reach_s=1.25) as scene:
            scene.robot.send(np.array([0.05, 0.4, -0.1]))
        assert scene.arm.positions == {"gripper": 0.05, "shoulder": 0.4, "elbow": -0.1}
        if topics is TOPICS:
            assert scene.arm.reach_s == pytest.approx(1.25)

    def test_holding_commands_the_present_position_or_nothing(self, scene):
        scene.robot.hold()
        assert scene.arm.commands == [START]
        scene.clock.advance(2.5 * DT)
        scene.robot.observe()
        with pytest.raises(TimeoutError, match="has come on /joint_states for"):
            scene.robot.hold()
        assert scene.arm.commands == [START]

    def test_what_is_a_velocity_rests_where_nobody_knows_the_place_of_the_others(self, monkeypatch):
        with Scene(monkeypatch, ARRAY, rest=(0.0, None, None)) as scene:
            scene.robot.send(np.array([0.05, 0.4, -0.1]))
            scene.clock.advance(2.5 * DT)
            with pytest.raises(TimeoutError, match="has come on /joint_states for"):
                scene.robot.hold()
        assert scene.arm.commands[-1] == {"gripper": 0.0, "shoulder": 0.4, "elbow": -0.1}

    def test_nobody_who_listens_is_a_failure(self, scene):
        del scene.ros.listeners["/controller"]
        with pytest.raises(ConnectionError, match="nobody listens to /controller"):
            scene.robot.send(np.zeros(3))

    def test_nan_is_never_sent(self, scene):
        scene.arm.positions["elbow"] = float("nan")
        scene.tick()
        with pytest.raises(ActionError, match="finite"):
            scene.robot.hold()
        assert scene.arm.commands == []


def _without(*names):
    return lambda messages: [messages.pop(name) for name in names]


def _nan(messages):
    messages["arm"][1].position[1] = float("nan")


def _small(messages):
    messages["camera"] = ("/front", image(np.zeros((3, 8, 3), np.uint8)))


class TestLoop:
    @pytest.mark.parametrize("topics", [TOPICS, ARRAY], ids=["trajectory", "array"])
    def test_it_runs_and_all_that_arrives_is_within_the_limits(self, monkeypatch, topics):
        with Scene(monkeypatch, topics) as scene:
            stage = scene.stage(config=LoopConfig(servo_steps=2))
            report = stage.run(60)
        assert (report.faults, stage.port.violations) == ({}, [])
        assert stage.states["running"] >= 54
        assert len(scene.arm.commands) == report.commands + 2, "the commands, and a hold before and after them"
        path = np.array([[command[name] for name in START] for command in scene.arm.commands])
        assert (np.abs(np.diff(path, axis=0)) <= np.array([0.8, 0.8, 0.1]) * DT / 2 + 1e-9).all()
        assert np.ptp(path[:, 1]) > 0.01

    @pytest.mark.parametrize(
        ("spoil", "faults"),
        [
            (_without("arm", "gripper", "camera"), {"robot_observe", "stale_observation", "robot_hold"}),
            (_without("gripper"), {"robot_observe", "stale_observation", "robot_hold"}),
            (_without("camera"), {"robot_observe", "stale_observation"}),
            (_nan, {"bad_observation", "stale_observation", "robot_hold"}),
            (_small, {"bad_observation", "stale_observation"}),
        ],
        ids=["silence", "a joint's silence", "a camera's silence", "NaN", "camera size"],
    )
    def test_faults_of_the_sensors_make_it_hold_and_it_goes_on_after_them(self, scene, spoil, faults):
        stage = scene.stage()
        stage.at[30] = lambda: setattr(scene.arm, "spoil", spoil)
        stage.at[50] = lambda: setattr(scene.arm, "spoil", lambda messages: None)
        report = stage.run(85)
        assert (report.faults.keys(), stage.port.violations) == (faults, [])
        assert stage.states["holding"] >= 8
        assert stage.states["running"] >= 50

    def test_an_arm_is_seen_in_every_step_beside_a_gripper_that_tells_its_place_rarely(self, scene):
        scene.arm.spoil = lambda messages: scene.arm.ticks % 3 and messages.pop("gripper")
        stage, seen = scene.stage(), []
        observe = stage.policy.observe

        def watched(observation, executed_action=None):
            seen.append((observation[STATE][0, 0], scene.arm.positions["elbow"]))
            observe(observation, executed_action)

        stage.policy.observe = watched
        report = stage.run(40)
        assert (report.faults, stage.port.violations) == ({}, [])
        told, true = np.array(seen).T
        assert len(np.unique(true)) > 20, "the arm moves"
        np.testing.assert_allclose(told, true, atol=1e-6)

    def test_a_controller_that_is_gone_for_a_while_is_not_commanded_from_where_it_was(self, scene):
        stage = scene.stage()
        stage.at[30] = lambda: stage.at.update(back=scene.ros.listeners.pop("/controller"))
        stage.at[40] = lambda: scene.ros.listeners.update({"/controller": stage.at.pop("back")})
        report = stage.run(80)
        assert report.faults.keys() == {"robot_send", "robot_hold"}
        assert stage.port.violations == []
        assert stage.states["running"] >= 55

    def test_a_dry_run_sends_nothing(self, scene):
        dry = DryRun(scene.robot)
        report = scene.stage(dry).run(40)
        assert scene.arm.commands == []
        assert (report.faults, dry.kept) == ({}, report.commands)


def test_neither_lerobot_nor_ros_nor_torch_is_loaded_by_the_adapters():
    code = (
        "import sys, scd_robot.control.lerobot_robot, scd_robot.control.ros_robot, scd_robot.control.dry_run\n"
        "print(sorted({'torch', 'lerobot', 'rclpy', 'sensor_msgs', 'scipy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
