"""The examples for robots, from end to end against the interfaces' fakes, by the wall clock."""

import argparse
import builtins
import functools
import importlib.util
import json
import re
import subprocess
import sys
import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from fake_ros import Arm, FakeRos
from robot_fakes import FRONT, NAMES, SPEC, STATE, FakeLeRobot, Walks, virtual_clock

from scd_robot.control import ControlLoop, Limits
from scd_robot.control.inspection import InspectedRobot
from scd_robot.control.names import NameMap
from scd_robot.control.planner import VirtualPlanner

EXAMPLES = Path(__file__).parents[2] / "examples"


def load(name, monkeypatch, policy):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "load_source", lambda path: policy)
    return module


def test_a_robot_of_ones_own_as_the_documentation_shows_it():
    """The class of docs/control.md, as it stands there, over a driver that sees, follows and stops."""
    text = (EXAMPLES.parent / "docs" / "control.md").read_text(encoding="utf-8")
    names = {}
    exec(next(code for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "class MyRobot" in code), names)
    clock, at, calls = virtual_clock(), np.zeros(3), Counter()
    picture = np.arange(6 * 8 * 3, dtype=np.uint8).reshape(6, 8, 3)

    def follow(command):
        at[:] = command
        calls["command"] += 1

    driver = SimpleNamespace(
        newest=lambda: (at.copy(), picture, clock.now()), command=follow, stop=lambda: calls.update(["stop"])
    )

    class ItsKeys(Walks):
        def observe(self, observation, executed_action=None):
            super().observe({STATE: observation["proprio"], FRONT: observation["front"]}, executed_action)

    seen = {"proprio": SPEC.observation[STATE], "front": SPEC.observation[FRONT]}
    policy = ItsKeys(clock, replace(SPEC, observation=seen))
    limits = Limits((-50.0,) * 3, (50.0,) * 3, (50.0,) * 3, (500.0,) * 3, (None,) * 3)
    port = InspectedRobot(names["MyRobot"](driver), limits, SPEC.control_dt, clock)
    planner = VirtualPlanner(policy, clock, lambda: 0.5 * SPEC.control_dt)
    report = ControlLoop(port, policy, limits, clock=clock, planner=planner).run(max_steps=40)
    assert (report.faults, port.violations, calls["stop"]) == ({}, [], 2)
    assert calls["command"] == report.commands > 30
    assert np.abs(at).max() > 0


def write_dataset(folder, names, low, high):
    """What is read of one; positions and commands from `low` to `high`."""
    numbers = {STATE: names.vectors[STATE], "action": names.action}
    features = {key: {"dtype": "float32", "shape": [3], "names": list(called)} for key, called in numbers.items()}
    features[FRONT] = {"dtype": "video", "shape": [6, 8, 3], "names": ["height", "width", "channels"]}
    statistics = {
        key: {"min": [low[name] for name in called], "max": [high[name] for name in called]}
        for key, called in numbers.items()
    }
    (folder / "meta").mkdir()
    (folder / "meta" / "info.json").write_text(json.dumps({"features": features}))
    (folder / "meta" / "stats.json").write_text(json.dumps(statistics))


def options(folder, dry_run, **more):
    given = {"policy": Path("x"), "dataset": folder, "seconds": 0.5, "speed": 0.5, "flights": None, "dry_run": dry_run}
    given["max_plan_age"] = 60.0
    return argparse.Namespace(**given, **more)


@pytest.mark.parametrize("dry_run", [False, True])
def test_a_robot_of_lerobot(monkeypatch, tmp_path, capsys, dry_run):
    device, made = FakeLeRobot(), []
    modules = {
        "lerobot": {},
        "lerobot.cameras": {},
        "lerobot.cameras.opencv": {"OpenCVCameraConfig": lambda source, **how: (source, how)},
        "lerobot.robots": {},
        "lerobot.robots.so_follower": {
            "SOFollowerRobotConfig": SimpleNamespace,
            "SO101Follower": lambda config: made.append(config) or device,
        },
    }
    for name, members in modules.items():
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    asked = []
    monkeypatch.setattr(builtins, "input", lambda text: asked.append(device.connected))
    write_dataset(tmp_path, NAMES, dict.fromkeys(NAMES.action, -90.0), dict.fromkeys(NAMES.action, 90.0))
    example = load("lerobot_robot", monkeypatch, Walks(virtual_clock()))
    example.main(options(tmp_path, dry_run, port="/dev/null", id="x", camera=["front=2"]))
    assert made[0].cameras == {"front": (2, {"fps": 30, "width": 8, "height": 6})}
    assert "stopped after" in capsys.readouterr().out
    assert asked == [True], "it is asked to support the arm while the motors are still on"
    assert not device.connected
    assert bool(device.sent) is not dry_run


@pytest.mark.parametrize("dry_run", [False, True])
def test_a_ros_node(monkeypatch, tmp_path, capsys, dry_run):
    names = NameMap(
        {STATE: ("elbow.pos", "gripper.pos", "shoulder.pos")}, {}, ("gripper.pos", "shoulder.pos", "elbow.pos")
    )
    write_dataset(tmp_path, names, dict.fromkeys(names.action, -1.0), dict.fromkeys(names.action, 1.0))
    ros = FakeRos(waits=False).install(monkeypatch)
    arm = Arm(ros, {"shoulder": 0.3, "elbow": -0.2, "gripper": 0.04}, topic="/commands")
    over = threading.Event()

    def live():
        arm.tick()
        while not over.wait(0.02):
            arm.tick()

    thread = threading.Thread(target=live)
    thread.start()
    example = load("ros2_node", monkeypatch, Walks(virtual_clock(), SPEC, names, step=0.02))
    # On a busy machine the arm, a thread of this process, is silent for longer than the example allows.
    monkeypatch.setattr(example, "RosRobot", functools.partial(example.RosRobot, max_age_s=20.0))
    try:
        topics = {"joint_states": "/joint_states", "command": "/commands", "camera": ["front=/front"]}
        example.main(options(tmp_path, dry_run, array_joints=[], **topics))
    finally:
        over.set()
        thread.join()
    assert "stopped after" in capsys.readouterr().out
    assert ros.destroyed == ["scd_robot"]
    assert bool(arm.commands) is not dry_run
    assert all(np.isfinite(list(command.values())).all() for command in arm.commands)


@pytest.mark.parametrize("name", ["lerobot_robot", "ros2_node"])
def test_help_needs_neither_lerobot_nor_ros(name):
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "--dry-run" in done.stdout
