"""Driving a robot with a policy: numpy only, so that a robot's computer needs nothing else. START HERE: `loop`."""

from scd_robot.control.clock import Clock, MonotonicClock, VirtualClock
from scd_robot.control.delay import DelayConfig
from scd_robot.control.executor import ExecutionConfig
from scd_robot.control.interfaces import Command, Robot, Sample, StreamingPolicy
from scd_robot.control.limits import Limits, Workspace
from scd_robot.control.loop import ControlLoop
from scd_robot.control.recorder import RecorderConfig
from scd_robot.control.settings import LoopConfig, LoopReport
from scd_robot.control.watchdog import StartGuard, WatchdogConfig

__all__ = [
    "Clock",
    "Command",
    "ControlLoop",
    "DelayConfig",
    "ExecutionConfig",
    "Limits",
    "LoopConfig",
    "LoopReport",
    "MonotonicClock",
    "RecorderConfig",
    "Robot",
    "Sample",
    "StartGuard",
    "StreamingPolicy",
    "VirtualClock",
    "WatchdogConfig",
    "Workspace",
]
