"""A robot behind ROS 2 topics under the control loop.

A sample's time is when its messages arrived, by this machine's monotonic clock, which is the loop's. Stamps in headers
are of the sender's clock, or of a simulated one, or 0; an age by them is as wrong as those clocks are. What a header is
good for is kept: a message with the same stamp as the one before is the same measurement, and does not count as new.

Shapes: Da action width.
"""

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal

import numpy as np

from scd_robot.control.clock import Clock, MonotonicClock
from scd_robot.control.interfaces import Command, Sample
from scd_robot.control.names import PRESENT_STEPS, NameMap, Rest
from scd_robot.control.ros_messages import joint_values, picture, stamp_of
from scd_robot.control.ros_node import RosNode, Subscription
from scd_robot.errors import (
    ActionError,
    ConfigError,
    ScdRobotError,
    ShapeError,
    UnknownNameError,
    nearest_names,
)
from scd_robot.types import PolicySpec

__all__ = ["RosRobot", "RosTopics"]

_MOST_NODES = 10  # that publish joint states in the same moment


@dataclass(frozen=True)
class RosTopics:
    """Where messages come from and go to.

    Attributes:
        joint_states: of sensor_msgs/JointState; several nodes may publish there, each its joints.
        command: what the controller listens to.
        command_type: "trajectory" for trajectory_msgs/JointTrajectory (joint_trajectory_controller), "array" for
            std_msgs/Float64MultiArray (forward_command_controller and its kind).
        array_joints: for "array": the controller's own list of joints, whose order its messages have; they carry no
            names.
        cameras: by name of the camera, the topic of sensor_msgs/Image.
    """

    joint_states: str = "/joint_states"
    command: str = "/joint_trajectory_controller/joint_trajectory"
    command_type: Literal["trajectory", "array"] = "trajectory"
    array_joints: tuple[str, ...] = ()
    cameras: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.command_type not in ("trajectory", "array"):
            raise ConfigError(f"command_type must be 'trajectory' or 'array', got {self.command_type!r}")


@dataclass(frozen=True)
class _Number:
    """A number that came, when, and the stamp of its message."""

    value: float
    arrived_s: float
    stamp: tuple[int, int] | None


@dataclass
class _Picture:
    """A message that came, when, and its stamp; its pixels once somebody asked for them."""

    message: Any
    arrived_s: float
    stamp: tuple[int, int] | None
    pixels: Any = None


class RosRobot:
    """A `scd_robot.control.Robot` behind topics; `with` starts and ends its node.

    Args:
        spec: of the policy.
        names: of its observations and actions: <joint>.pos, <joint>.vel or <joint>.effort.
        topics: where messages come from and go to.
        rest: (Da,) see `Limits`; None = all actions name places, as <joint>.pos does.
        reach_s: when a trajectory's point is to be reached; None = in a control step. With servo steps: in one of them.
        max_age_s: a topic that was silent for longer is told by its name.
        clock: of the loop; None = the machine's.
        node_name: of the node.

    Raises:
        ConfigError: names that are not for the policy, the topics or the kind of command.
        UnknownNameError: a camera without a topic.
    """

    def __init__(
        self,
        spec: PolicySpec,
        names: NameMap,
        topics: RosTopics,
        *,
        rest: Rest | None = None,
        reach_s: float | None = None,
        max_age_s: float = 0.2,
        clock: Clock | None = None,
        node_name: str = "scd_robot",
    ) -> None:
        names.check(spec)
        _check_commands(names, topics, rest)
        self._cameras = {names.cameras[key]: "" for key in spec.observation if key in names.cameras}
        for camera in self._cameras:
            if camera not in topics.cameras:
                raise UnknownNameError("camera among the topics", camera, topics.cameras)
            self._cameras[camera] = topics.cameras[camera]
        self._spec, self._names, self._topics, self._rest = spec, names, topics, rest
        self._reach_s = spec.control_dt if reach_s is None else reach_s
        self._max_age_s = max_age_s
        self._clock: Clock = clock or MonotonicClock()
        self._node_name = node_name
        places = zip(names.action, rest or (None,) * len(names.action), strict=True)
        self._pose_names = [name for name, still in places if still is None]
        vectors = [name for key in spec.observation if key in names.vectors for name in names.vectors[key]]
        self._number_names = list(dict.fromkeys([*vectors, *self._pose_names]))
        self._came = threading.Condition()  # guards the next three
        self._numbers: dict[str, _Number] = {}
        self._pictures: dict[str, _Picture] = {}
        self._bad: ShapeError | None = None
        self._sent: Command | None = None
        self._node: RosNode | None = None

    def connect(self, timeout_s: float = 10.0) -> None:
        """Starts the node and waits for the first sample.

        Args:
            timeout_s: for how long.

        Raises:
            MissingDependencyError: there is no ROS 2 in this Python.
            TimeoutError: a topic is silent.
            ShapeError: messages that do not hold what the policy needs.
            ConfigError: joints in other units than the data's.
        """
        with self._came:  # what came to an earlier node is too old
            self._numbers, self._pictures, self._bad, self._sent = {}, {}, None, None
        self._node = self._start()
        try:
            with self._came:
                self._came.wait_for(self._complete, timeout_s)
            self._names.check_start(self.observe().observation, self._spec.observation)
        except BaseException:
            self.close()
            raise

    def observe(self) -> Sample:
        """The newest numbers and pictures.

        Its stamp is when the oldest of its numbers arrived; of a sample of pictures alone, the oldest of those.

        Raises:
            ConnectionError: the node has ended.
            TimeoutError: a topic is silent.
            ShapeError: messages that do not hold what the policy needs.
        """
        self._running()
        now = self._clock.now()
        with self._came:
            if self._bad is not None:
                raise ShapeError(f"{self._topics.joint_states}: {self._bad}")
            arrived_s = self._check_numbers(self._number_names, now, self._max_age_s)
            values: dict[str, Any] = {name: self._numbers[name].value for name in self._number_names}
            pictures = {camera: self._pictures.get(camera) for camera in self._cameras}
        for camera, came in pictures.items():
            values[camera] = self._pixels(came, self._cameras[camera], now)
        if not self._number_names:
            arrived_s = min(came.arrived_s for came in pictures.values() if came is not None)
        observation = self._names.observation(values, self._spec.observation)
        return Sample(observation, arrived_s, self._names.pose(values, self._rest))

    def send(self, command: Command) -> None:
        """Publishes a command.

        Raises:
            ConnectionError: the node has ended, or nobody listens.
        """
        if not np.isfinite(command).all():
            raise ActionError(f"a command must be finite, got {command}")
        node = self._running()
        if not node.publisher.get_subscription_count():
            raise ConnectionError(f"nobody listens to {self._topics.command}: is the controller active?")
        self._sent = np.array(command)
        node.publisher.publish(self._message(self._names.named(command), node.messages))

    def hold(self) -> None:
        """Commands the present position, and rest where commands name none.

        Raises:
            ConnectionError: the node has ended, or nobody listens.
            TimeoutError: joint states did not tell it in the last two control steps: an old one would be a jump back.
                Joints are told to stay at what they were commanded last, and what is a velocity to rest.
        """
        self._running()
        with self._came:
            try:
                self._check_numbers(self._pose_names, self._clock.now(), PRESENT_STEPS * self._spec.control_dt)
            except (TimeoutError, ShapeError):
                resting = self._names.resting(self._sent, self._rest)
                if resting is not None:
                    self.send(resting)
                raise
            values = {name: self._numbers[name].value for name in self._pose_names}
        self.send(self._names.pose(values, self._rest))

    def close(self) -> None:
        """Ends the node; may be called twice."""
        if self._node is not None:
            self._node.close()

    def __enter__(self) -> "RosRobot":
        self.connect()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # The node.

    def _start(self) -> RosNode:
        joints = Subscription("JointState", self._topics.joint_states, self._take_joints, depth=_MOST_NODES)
        cameras = [Subscription("Image", topic, self._taker(camera)) for camera, topic in self._cameras.items()]
        kind = "JointTrajectory" if self._topics.command_type == "trajectory" else "Float64MultiArray"
        return RosNode(self._node_name, kind, self._topics.command, [joints, *cameras], self._wake)

    def _running(self) -> RosNode:
        if self._node is None:
            raise ConnectionError("the ROS 2 node was not started: call connect(), or use 'with'")
        if self._node.ended:
            raise ConnectionError(f"the ROS 2 node does not run: {self._node.ended}")
        return self._node

    def _wake(self) -> None:
        with self._came:
            self._came.notify_all()

    def _take_joints(self, message: Any) -> None:
        now, stamp = self._clock.now(), stamp_of(message)
        with self._came:
            try:
                values = joint_values(message)
            except ShapeError as error:
                self._bad = error
                return
            self._bad = None
            for name, value in values.items():
                if stamp is None or name not in self._numbers or self._numbers[name].stamp != stamp:
                    self._numbers[name] = _Number(value, now, stamp)
            self._came.notify_all()

    def _taker(self, camera: str) -> Any:
        def take(message: Any) -> None:
            now, stamp = self._clock.now(), stamp_of(message)
            with self._came:
                last = self._pictures.get(camera)
                if stamp is None or last is None or last.stamp != stamp:
                    self._pictures[camera] = _Picture(message, now, stamp)
                self._came.notify_all()

        return take

    # What came.

    def _complete(self) -> bool:
        """Whether everything has come once, or nothing more will."""
        alive = self._node is not None and not self._node.ended
        numbers = all(name in self._numbers for name in self._number_names)
        return not alive or (numbers and all(camera in self._pictures for camera in self._cameras))

    def _check_numbers(self, names: list[str], now: float, max_age_s: float) -> float:
        """When the oldest of these numbers came [s]; raises where one is missing or too old."""
        topic = self._topics.joint_states
        if not names:
            return now
        if not self._numbers:
            raise TimeoutError(f"no message has come on {topic}: ros2 topic info --verbose {topic}")
        missing = [name for name in names if name not in self._numbers]
        if missing:
            near = nearest_names(missing[0], self._numbers)
            told = f"; did it mean {near[0]!r}?" if near else f"; there are {', '.join(sorted(self._numbers)[:12])}"
            raise ShapeError(f"no {missing[0]!r} comes on {topic}, which the policy needs{told}")
        oldest = min(names, key=lambda name: self._numbers[name].arrived_s)
        arrived_s = self._numbers[oldest].arrived_s
        if now - arrived_s > max_age_s:
            raise TimeoutError(f"no new {oldest!r} has come on {topic} for {now - arrived_s:.3f} s")
        return arrived_s

    def _pixels(self, came: _Picture | None, topic: str, now: float) -> Any:
        if came is None:
            raise TimeoutError(f"no picture has come on {topic}: ros2 topic info --verbose {topic}")
        if now - came.arrived_s > self._max_age_s:
            raise TimeoutError(f"no new picture has come on {topic} for {now - came.arrived_s:.3f} s")
        if came.pixels is None:
            try:
                came.pixels = picture(came.message)
            except ScdRobotError as error:
                raise ShapeError(f"{topic}: {error}") from error
        return came.pixels

    # What goes.

    def _message(self, command: Mapping[str, float], kinds: Mapping[str, Any]) -> Any:
        """A message, of one of these kinds, of a command by names."""
        by_joint = {_joint(name): value for name, value in command.items()}
        if self._topics.command_type == "array":
            array = kinds["Float64MultiArray"]()
            array.data = [by_joint[joint] for joint in self._topics.array_joints]
            return array
        trajectory, point = kinds["JointTrajectory"](), kinds["JointTrajectoryPoint"]()
        point.positions = list(by_joint.values())
        point.time_from_start.sec, point.time_from_start.nanosec = divmod(round(1e9 * self._reach_s), 10**9)
        trajectory.joint_names, trajectory.points = list(by_joint), [point]
        return trajectory  # its stamp stays 0: from when it arrives on


def _joint(name: str) -> str:
    return name.rpartition(".")[0]


def _check_commands(names: NameMap, topics: RosTopics, rest: Rest | None) -> None:
    """Raises ConfigError where names do not go with the kind of command."""
    if rest is not None and len(rest) != len(names.action):
        raise ConfigError(f"the policy has {len(names.action)} actions, rest is for {len(rest)}")
    for key, called in {**names.vectors, "action": names.action}.items():
        odd = [name for name in called if not name.endswith((".pos", ".vel", ".effort"))]
        if odd:
            raise ConfigError(f"{key!r} must name <joint>.pos, <joint>.vel or <joint>.effort, got {odd[0]!r}")
    joints = [_joint(name) for name in names.action]
    if len(set(joints)) < len(joints):
        raise ConfigError(f"each joint takes one command, got {', '.join(names.action)}")
    if topics.command_type == "trajectory":
        odd = [name for name in names.action if not name.endswith(".pos")]
        if odd or rest is not None:
            got = odd[0] if odd else f"rest {rest}"
            raise ConfigError(f"a trajectory is of places, <joint>.pos without rest, got {got}")
    elif sorted(topics.array_joints) != sorted(joints):
        raise ConfigError(
            f"array_joints must be the joints {', '.join(joints)} in the order of the controller's parameter 'joints', "
            f"got {topics.array_joints}"
        )
