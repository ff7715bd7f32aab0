"""A ROS 2 node with a context and a thread of its own: rclpy catches no signals for such a context.

So after Ctrl-C the control loop can still hold its robot.
"""

import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from scd_robot.errors import MissingDependencyError

__all__ = ["RosNode", "Subscription"]

_SPIN_S = 0.1  # how often the thread looks whether it is to end
_CLOSE_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Subscription:
    """What a node listens to.

    Attributes:
        kind: name of the messages' type.
        topic: where they come from.
        take: called with each of them, in the node's thread.
        depth: how many may wait for that; older ones are dropped.
    """

    kind: str
    topic: str
    take: Callable[[Any], None]
    depth: int = 1


class RosNode:
    """Publishes to one topic and listens to others, from construction to `close`.

    Args:
        name: of the node.
        kind: name of the type of what it publishes.
        topic: where.
        subscriptions: what it listens to.
        on_end: called in its thread when it ends, whatever the reason.

    Attributes:
        messages: types of messages, by name.
        publisher: rclpy's.
        thread: which calls what takes messages.
        ended: why it does not run any more; empty while it runs.

    Raises:
        MissingDependencyError: there is no ROS 2 in this Python.
    """

    def __init__(
        self, name: str, kind: str, topic: str, subscriptions: Sequence[Subscription], on_end: Callable[[], None]
    ) -> None:
        rclpy, self.messages = _import_ros()
        from rclpy.context import Context
        from rclpy.executors import SingleThreadedExecutor
        from rclpy.qos import QoSHistoryPolicy, QoSProfile, QoSReliabilityPolicy

        self._on_end, self._closing, self.ended = on_end, False, ""
        # Commands are reliable: a controller that asks for that would otherwise get none, while one that does not takes
        # them as well. Of what sensors tell, the newest message is all that counts.
        last, unsure = QoSHistoryPolicy.KEEP_LAST, QoSReliabilityPolicy.BEST_EFFORT
        commanding = QoSProfile(history=last, depth=1, reliability=QoSReliabilityPolicy.RELIABLE)
        with ExitStack() as opened:  # ends what there is, if the rest fails
            self._context = Context()
            rclpy.init(context=self._context)
            opened.callback(self._end_context, rclpy)
            node = rclpy.create_node(name, context=self._context)
            opened.callback(node.destroy_node)
            self.publisher = node.create_publisher(self.messages[kind], topic, commanding)
            for one in subscriptions:
                sensing = QoSProfile(history=last, depth=one.depth, reliability=unsure)
                node.create_subscription(self.messages[one.kind], one.topic, one.take, sensing)
            self._executor = SingleThreadedExecutor(context=self._context)
            opened.callback(self._executor.shutdown, timeout_sec=_CLOSE_TIMEOUT_S)
            self._executor.add_node(node)
            self.thread = threading.Thread(target=self._spin, name="rclpy", daemon=True)
            self.thread.start()
            self._opened = opened.pop_all()

    def close(self) -> None:
        """Ends it; may be called twice."""
        self._closing = True
        self.thread.join(_CLOSE_TIMEOUT_S)
        self.ended = self.ended or "it was shut down"
        self._opened.close()

    def _end_context(self, rclpy: ModuleType) -> None:
        if self._context.ok():
            rclpy.shutdown(context=self._context)

    def _spin(self) -> None:
        """The thread: callbacks, which only keep what came."""
        try:
            while not self._closing and self._context.ok():
                self._executor.spin_once(timeout_sec=_SPIN_S)
            self.ended = "it was shut down"
        except Exception as error:  # told by whoever uses it next
            self.ended = f"{type(error).__name__}: {error}"
        self._on_end()


def _import_ros() -> tuple[ModuleType, dict[str, Any]]:
    """rclpy, and the messages that are used."""
    try:
        import rclpy
        from sensor_msgs.msg import Image, JointState
        from std_msgs.msg import Float64MultiArray
        from trajectory_msgs.msg import JointTrajectory, JointTrajectoryPoint
    except ImportError as error:
        raise MissingDependencyError(
            f"ROS 2 is not there ({error}); source its setup file, and use the Python that it was built for"
        ) from error
    kinds = (Image, JointState, Float64MultiArray, JointTrajectory, JointTrajectoryPoint)
    return rclpy, {kind.__name__: kind for kind in kinds}
