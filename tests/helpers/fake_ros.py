"""What is used of rclpy and its messages, with their signatures: topics in this process, and an arm on them."""

import queue
import sys
import threading
from array import array
from types import ModuleType, SimpleNamespace
from typing import ClassVar

import numpy as np

WAIT_S = 20.0  # of the wall clock, for what comes at once


class Message:
    """Fields as in the definition; others cannot be set, as in ROS."""

    fields: ClassVar = {}

    def __init__(self, **given):
        for name, default in self.fields.items():
            setattr(self, name, given.pop(name) if name in given else default())
        assert not given, given

    def __setattr__(self, name, value):
        assert name in self.fields, f"{type(self).__name__} has no field {name!r}"
        object.__setattr__(self, name, value)


def _time():
    return SimpleNamespace(sec=0, nanosec=0)


def _header():
    return SimpleNamespace(stamp=_time(), frame_id="")


def _floats():
    return array("d")


class JointState(Message):
    fields: ClassVar = {"header": _header, "name": list, "position": _floats, "velocity": _floats, "effort": _floats}


class Image(Message):
    fields: ClassVar = {
        "header": _header, "height": int, "width": int, "encoding": str, "is_bigendian": int, "step": int,
        "data": lambda: array("B"),
    }  # fmt: skip


class JointTrajectoryPoint(Message):
    fields: ClassVar = {
        "positions": _floats, "velocities": _floats, "accelerations": _floats, "effort": _floats,
        "time_from_start": _time,
    }  # fmt: skip


class JointTrajectory(Message):
    fields: ClassVar = {"header": _header, "joint_names": list, "points": list}


class Float64MultiArray(Message):
    fields: ClassVar = {"layout": SimpleNamespace, "data": _floats}


class ExternalShutdownException(Exception):
    pass


class QoSProfile:
    def __init__(self, history=None, depth=None, reliability=None, durability=None):
        assert history is not None
        assert depth is not None
        self.history, self.depth, self.reliability = history, depth, reliability


class Context:
    def __init__(self):
        self.running = False

    def ok(self):
        return self.running


class Publisher:
    def __init__(self, ros, msg_type, topic, qos):
        self._ros, self._type, self._topic, self.qos = ros, msg_type, topic, qos

    def publish(self, msg):
        if not isinstance(msg, self._type):
            raise TypeError(f"Expected {self._type}, got {type(msg)}")
        if self._ros.broken:
            raise RuntimeError("publisher's context is invalid")
        if self.get_subscription_count():
            self._ros.listeners[self._topic][0](msg)

    def get_subscription_count(self):
        _, reliability = self._ros.listeners.get(self._topic, (None, None))
        if reliability is None:
            return 0
        return int(reliability == "best_effort" or self.qos.reliability == "reliable")


class Node:
    def __init__(self, ros, name, context):
        self._ros, self.name, self.context, self._topics = ros, name, context, []

    def create_publisher(self, msg_type, topic, qos_profile, *, callback_group=None, event_callbacks=None):
        return Publisher(self._ros, msg_type, topic, qos_profile)

    def create_subscription(
        self, msg_type, topic, callback, qos_profile, *, callback_group=None, event_callbacks=None, raw=False
    ):
        assert qos_profile.reliability == "best_effort", "a sensor's best-effort messages would never come"
        self._ros.subscriptions[topic] = (msg_type, callback)
        self._topics.append(topic)
        for message in self._ros.early.pop(topic, []):
            self._ros.work.put((topic, message, threading.Event()))

    def destroy_node(self):
        self._ros.destroyed.append(self.name)
        for topic in self._topics:
            del self._ros.subscriptions[topic]


class SingleThreadedExecutor:
    def __init__(self, *, context=None):
        self._context, self._nodes = context, []

    def add_node(self, node):
        self._nodes.append(node)
        return True

    def spin_once(self, timeout_sec=None):
        ros = self._nodes[0]._ros
        try:
            topic, message, done = ros.work.get(timeout=timeout_sec)
        except queue.Empty:
            return
        if isinstance(message, Exception):
            done.set()
            raise message
        try:
            ros.subscriptions[topic][1](message)
        finally:
            done.set()

    def shutdown(self, timeout_sec=None):
        return True


class FakeRos:
    """Everything that goes through the topics.

    Attributes:
        listeners: by topic, what a message is given to, and the reliability that is asked for.
        waits: whether `publish` returns when the callback is through, or at once.
        contexts: that were initialised; None = the default one, for which rclpy would catch Ctrl-C.
    """

    def __init__(self, waits=True):
        self.waits = waits
        self.work, self.subscriptions, self.listeners, self.early = queue.Queue(), {}, {}, {}
        self.contexts, self.destroyed, self.broken = [], [], False

    def publish(self, topic, message):
        """Before there is a subscription, the message waits for it."""
        if topic not in self.subscriptions:
            self.early.setdefault(topic, []).append(message)
            return
        done = threading.Event()
        self.work.put((topic, message, done))
        assert not self.waits or done.wait(WAIT_S)

    def install(self, monkeypatch):
        """As the modules of ROS."""
        ros = self

        def init(*, args=None, context=None, domain_id=None, signal_handler_options=None):
            ros.contexts.append(context)
            context.running = True

        def shutdown(*, context=None, uninstall_handlers=None):
            assert context.running
            context.running = False

        def create_node(node_name, *, context=None, namespace=None):
            assert context.running
            return Node(ros, node_name, context)

        modules = {
            "rclpy": {"init": init, "shutdown": shutdown, "create_node": create_node},
            "rclpy.context": {"Context": Context},
            "rclpy.executors": {"SingleThreadedExecutor": SingleThreadedExecutor},
            "rclpy.qos": {
                "QoSProfile": QoSProfile,
                "QoSHistoryPolicy": SimpleNamespace(KEEP_LAST="keep_last"),
                "QoSReliabilityPolicy": SimpleNamespace(BEST_EFFORT="best_effort", RELIABLE="reliable"),
            },
            "sensor_msgs": {},
            "sensor_msgs.msg": {"JointState": JointState, "Image": Image},
            "std_msgs": {},
            "std_msgs.msg": {"Float64MultiArray": Float64MultiArray},
            "trajectory_msgs": {},
            "trajectory_msgs.msg": {
                "JointTrajectory": JointTrajectory,
                "JointTrajectoryPoint": JointTrajectoryPoint,
            },
        }
        for name, members in modules.items():
            module = ModuleType(name)
            vars(module).update(members)
            monkeypatch.setitem(sys.modules, name, module)
        return self


def joint_state(positions, stamp=0, velocities=None):
    message = JointState(name=list(positions), position=array("d", positions.values()))
    message.velocity = array("d", velocities or [])
    message.header.stamp.sec = stamp
    return message


def image(pixels, encoding="rgb8", padding=0, stamp=0):
    """A message of (H, W, C), whose rows end in so many bytes of rubbish."""
    height, width, channels = pixels.shape
    rows = b"".join(row.tobytes() + b"\xee" * padding for row in pixels)
    step = width * channels + padding
    message = Image(height=height, width=width, encoding=encoding, step=step, data=array("B", rows))
    message.header.stamp.sec = stamp
    return message


class Arm:
    """Joints that follow at once, told in two messages of different nodes, and a camera, at `tick`.

    `spoil` is called with all three messages before they are published; what it takes out is not.
    """

    def __init__(self, ros, positions, kind="trajectory", topic="/controller", order=()):
        self.ros, self.positions, self.order = ros, dict(positions), order
        self.commands, self.ticks, self.spoil = [], 0, lambda messages: None
        self.topic = topic
        ros.listeners[topic] = (self._follow if kind == "trajectory" else self._follow_array, "reliable")

    def tick(self):
        self.ticks += 1
        front = np.full((6, 8, 3), self.ticks % 251, np.uint8)
        front[0, 0] = 255  # a picture of one colour is none
        arm = {name: at for name, at in self.positions.items() if name != "gripper"}
        messages = {
            "arm": ("/joint_states", joint_state(arm, self.ticks, [0.25] * len(arm))),
            "gripper": ("/joint_states", joint_state({"gripper": self.positions["gripper"]}, self.ticks)),
            "camera": ("/front", image(front, padding=4, stamp=self.ticks)),
        }
        self.spoil(messages)
        for topic, message in messages.values():
            self.ros.publish(topic, message)

    def _follow(self, message):
        assert (message.header.stamp.sec, message.header.stamp.nanosec) == (0, 0)
        (point,) = message.points
        self.reach_s = point.time_from_start.sec + 1e-9 * point.time_from_start.nanosec
        self._take(dict(zip(message.joint_names, point.positions, strict=True)))

    def _follow_array(self, message):
        self._take(dict(zip(self.order, message.data, strict=True)))

    def _take(self, command):
        assert all(type(value) is float for value in command.values())
        self.commands.append(command)
        self.positions.update(command)
