"""A robot with LeRobot's interface, a policy that walks, and a loop in virtual time that both are tried in."""

import threading
from collections import Counter

import numpy as np

from scd_robot.control import ControlLoop, Limits, LoopConfig, VirtualClock
from scd_robot.control.inspection import InspectedRobot
from scd_robot.control.names import NameMap
from scd_robot.control.planner import VirtualPlanner
from scd_robot.control.recorder import FlightRecorder
from scd_robot.control.rehearsal import Script, ScriptedPolicy
from scd_robot.types import ArraySpec, PolicySpec

DT = 0.05
STATE, FRONT = "observation.state", "observation.images.front"
MOTORS = ("shoulder_pan", "elbow_flex", "gripper")
NAMES = NameMap(  # in another order than the robot's
    {STATE: ("elbow_flex.pos", "gripper.pos", "shoulder_pan.pos")},
    {FRONT: "front"},
    ("gripper.pos", "shoulder_pan.pos", "elbow_flex.pos"),
)
SPEC = PolicySpec({STATE: ArraySpec((3,)), FRONT: ArraySpec((6, 8, 3), "uint8")}, 3, DT, 16, 8, 8)
LIMITS = Limits((0.0, -90.0, -90.0), (100.0, 90.0, 90.0), (60.0, 40.0, 40.0), (600.0, 400.0, 400.0), (None,) * 3)


class Walks(ScriptedPolicy):
    """Random walks from where the robot is; `step` is how far in a control step."""

    def __init__(self, clock, spec=SPEC, names=NAMES, step=2.0):
        super().__init__(Script([], clock, DT), 0)
        self.spec, self.step, self.seen, self.executed = spec, step, [], []
        self._order = [names.vectors[STATE].index(name) for name in names.action]

    def observe(self, observation, executed_action=None):
        super().observe({"state": observation[STATE][:, self._order]}, executed_action)
        self.seen.append(observation)
        self.executed.append(executed_action)

    def snapshot(self):
        walk = self._rng.normal(0, self.step, (SPEC.chunk_length, len(self._order)))
        return {"state": self._state[0].copy(), "walk": walk}


class FakeLeRobot:
    """What LeRobot's robots do, with their signatures: follows at once, camera pictures change with every reading.

    `spoil` is called with each observation; `lag` is how much of the way it goes; `pass_on` is cleared to block, and
    `blocked` is set once a reading has come to that.
    """

    name = "fake_follower"

    def __init__(self, calibrated=True, size=(6, 8, 3)):
        self.positions = dict(zip(MOTORS, (10.0, -20.0, 30.0), strict=True))
        self.size, self.calibrated, self.connected = size, calibrated, False
        self.calls, self.sent, self.readings, self.frozen = [], [], 0, False
        self.spoil = lambda values: None
        self.clip = lambda action: action
        self.pass_on, self.blocked = threading.Event(), threading.Event()
        self.pass_on.set()

    @property
    def observation_features(self):
        return {**{f"{motor}.pos": float for motor in MOTORS}, "front": self.size}

    @property
    def action_features(self):
        return {f"{motor}.pos": float for motor in MOTORS}

    @property
    def is_connected(self):
        return self.connected

    @property
    def is_calibrated(self):
        return self.calibrated

    def connect(self, calibrate=True):
        assert not self.connected, "already connected"
        self.calls.append(("connect", calibrate))
        self.connected = True

    def get_observation(self):
        assert self.connected
        values = {f"{motor}.pos": at for motor, at in self.positions.items()}
        self.readings += not self.frozen
        values["front"] = np.full(self.size, self.readings % 251, np.uint8)
        values["front"][0, 0] = 255  # a picture of one colour is none
        self.spoil(values)
        if not self.pass_on.is_set():
            self.blocked.set()
        self.pass_on.wait()
        return values

    def send_action(self, action):
        assert self.connected
        assert list(action) == [f"{name}" for name in NAMES.action]
        assert all(type(value) is float and np.isfinite(value) for value in action.values())
        action = self.clip(dict(action))
        self.sent.append(action)
        self.positions.update({name.removesuffix(".pos"): value for name, value in action.items()})
        return action

    def disconnect(self):
        assert self.connected
        self.calls.append("disconnect")
        self.connected = False


class Stage:
    """A loop in virtual time over a robot, with every command inspected; `at[step]()` is called before that step."""

    def __init__(self, robot, clock, place, *, config=None, limits=LIMITS, policy=None):
        config = config or LoopConfig()
        self.policy = policy or Walks(clock)
        self.port = InspectedRobot(robot, limits, DT / config.servo_steps, clock, place)
        self.states, self.at, self._steps = Counter(), {}, 0
        spec = self.policy.spec
        recorder = FlightRecorder(config.recorder, spec.observation, spec.action_dim, DT, background=False)
        planner = VirtualPlanner(self.policy, clock, lambda: 1.5 * DT)
        self.loop = ControlLoop(self.port, self.policy, limits, config, clock=clock, planner=planner, recorder=recorder)

    def run(self, steps):
        return self.loop.run(steps, self._each)

    def _each(self):
        self.states[self.loop.state] += 1
        self.at.pop(self._steps, lambda: None)()
        self._steps += 1
        return False


def virtual_clock():
    """Not at 0, so that a time of 0 is seen to be wrong."""
    clock = VirtualClock()
    clock.advance(100.0)
    return clock
