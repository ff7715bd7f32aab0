"""Two tasks that do not wait: acting on what was seen 200 ms ago fails in them."""

from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike

from scd_robot.errors import ConfigError
from scd_robot.sim_eval.memory.environment import MemoryEnvironment, MemoryOptions, Vector, Verdict
from scd_robot.sim_eval.memory.scene import hand_scene, world
from scd_robot.types import ArraySpec

__all__ = ["MovingTarget", "TrayBalance"]


class _Dynamic(MemoryEnvironment):
    """At 40 Hz, without a cue; `signal` is always 1."""

    control_dt: ClassVar[float] = 0.025
    sim_dt: ClassVar[float] = 0.0025

    def __init__(self, options: MemoryOptions | None = None) -> None:
        given = options or MemoryOptions()
        if given.delay != MemoryOptions().delay or given.cue_visible or given.expert != MemoryOptions().expert:
            raise ConfigError(f"scd_memory/{self.task} has no cue: leave out delay, cue_visible and expert")
        super().__init__(given)

    def _signal(self) -> bool:
        return True

    def _completion(self, verdict: Verdict) -> dict[str, bool]:
        return {}  # there is nothing to complete but the task


class MovingTarget(_Dynamic):
    """A ball moves about, each axis as a sum of two sines of its own; the hand is to stay with it.

    `ball` (3) is its position [m]. Where a plan takes 0.2 s the ball must be foreseen for 0.2 to 0.4 s, which its path
    of the last second allows.
    """

    task: ClassVar[str] = "moving-target"
    success: ClassVar[str] = "the hand stays within 3 cm of the moving ball for 60 control steps on end"
    reach_per_step: ClassVar[float] = 0.02
    target_low: ClassVar[tuple[float, ...]] = (-0.4, -0.4, 0.03)
    target_high: ClassVar[tuple[float, ...]] = (0.4, 0.4, 0.4)
    steps_to_act: int = 190  # with the default of `delay` 240 control steps
    _NEAR, _HELD = 0.03, 60

    def _scene(self) -> str:
        ball = (
            '<body name="ball" mocap="true"><geom name="ball" type="sphere" size="0.025" rgba="0.9 0.2 0.1 1" '
            'contype="0" conaffinity="0"/></body>'
        )
        return hand_scene(ball)

    def _keys(self) -> dict[str, ArraySpec]:
        return {"ball": ArraySpec((3,))}

    def _begin(self, rng: np.random.Generator) -> None:
        self._size = rng.uniform((0.09, 0.03), (0.12, 0.05), (3, 2)) * np.array([[1.0], [1.0], [0.5]])
        self._rate = 2 * np.pi * rng.uniform((0.25, 0.3), (0.4, 0.5), (3, 2))  # [rad/s]
        self._phase = rng.uniform(0, 2 * np.pi, (3, 2))
        self._held = 0
        self.target = np.array([0, 0, 0.2]) + rng.uniform(-0.1, 0.1, 3)
        self.data.mocap_pos[0] = self._ball(0)

    def _hidden(self) -> Vector:
        return np.concatenate([self._size.ravel(), self._rate.ravel(), self._phase.ravel()])

    def _ball(self, step: int) -> Vector:
        waves = self._size * np.sin(self._rate * step * self.control_dt + self._phase)
        place: Vector = np.array([0, 0, 0.2]) + waves.sum(axis=1)
        return place

    def _sense(self) -> dict[str, ArrayLike]:
        return {"ball": self.measured(self._ball(self.steps))}

    def _judge(self) -> Verdict:
        ball = self._ball(self.steps)
        self.data.mocap_pos[0] = ball
        self._held = self._held + 1 if np.linalg.norm(self.hand - ball) < self._NEAR else 0
        return "success" if self._held >= self._HELD else None

    def _expert(self) -> Vector:
        return self.asking_for(self._ball(self.steps + 2))  # the hand follows its target within about two control steps


class TrayBalance(_Dynamic):
    """A ball rolls on a tray that tilts about two axes; it is to come to rest in the middle.

    `proprio` (2) are the tilts [rad], `ball` (4) its position [m] and velocity [m/s] on the tray. It gets a
    kick every 50 control steps on average, which nobody foresees: so weak that whoever plans 0.2 s ahead without an
    error keeps it. An action asks for tilts.
    """

    task: ClassVar[str] = "tray-balance"
    success: ClassVar[str] = "the ball stays within 4 cm of the middle for 60 control steps on end, and never falls off"
    action_dim: ClassVar[int] = 2
    reach_per_step: ClassVar[float] = 0.03  # [rad]
    hand_unit: ClassVar[str] = "rad"
    target_low: ClassVar[tuple[float, ...]] = (-0.25, -0.25)
    target_high: ClassVar[tuple[float, ...]] = (0.25, 0.25)
    steps_to_act: int = 250
    _EDGE, _NEAR, _HELD = 0.2, 0.04, 60
    _FREQUENCY, _DAMPING = 4.5, 0.7  # of the closed loop [rad/s]

    def _scene(self) -> str:
        tray = f"""
    <body name="tray" pos="0 0 0.2">
      <joint name="tilt_x" type="hinge" axis="1 0 0" damping="0.5"/>
      <joint name="tilt_y" type="hinge" axis="0 1 0" damping="0.5"/>
      <geom name="tray" type="box" size="{self._EDGE} {self._EDGE} 0.005" mass="1" rgba="0.6 0.65 0.7 1"
            contype="0" conaffinity="0"/>
      <geom name="middle" type="cylinder" pos="0 0 0.006" size="{self._NEAR} 0.001" mass="0" rgba="0.2 0.7 0.3 1"
            contype="0" conaffinity="0"/>
      <body name="ball" pos="0 0 0.025">
        <joint name="ball_x" type="slide" axis="1 0 0" damping="0.002"/>
        <joint name="ball_y" type="slide" axis="0 1 0" damping="0.002"/>
        <geom name="ball" type="sphere" size="0.02" mass="0.05" rgba="0.9 0.3 0.1 1" contype="0" conaffinity="0"/>
      </body>
    </body>"""
        actuators = "".join(
            f'<position name="{axis}" joint="tilt_{axis}" kp="60" kv="2.5" forcerange="-20 20"/>' for axis in "xy"
        )
        return world(tray, f"<actuator>{actuators}</actuator>")

    def _keys(self) -> dict[str, ArraySpec]:
        return {"ball": ArraySpec((4,))}

    def _begin(self, rng: np.random.Generator) -> None:
        self.target = np.zeros(2)
        self._held = 0
        self._start = rng.uniform(-0.1, 0.1, 2)
        self._kicks = (rng.random((self.spec.max_steps + 1, 1)) < 1 / 50) * rng.normal(
            0, 0.06, (self.spec.max_steps + 1, 2)
        )
        self.data.qpos[2:4] = self._start
        self.data.qvel[2:4] = rng.normal(0, 0.05, 2)

    def _hidden(self) -> Vector:
        return self._kicks.ravel()

    def _sense(self) -> dict[str, ArrayLike]:
        return {"ball": self.measured(np.concatenate([self.data.qpos[2:4], self.data.qvel[2:4]]))}

    def _judge(self) -> Verdict:
        self.data.qvel[2:4] += self._kicks[self.steps]
        place = self.data.qpos[2:4]
        if np.abs(place).max() > self._EDGE:
            return "failure"
        self._held = self._held + 1 if np.hypot(*place) < self._NEAR else 0
        return "success" if self._held >= self._HELD else None

    def _expert(self) -> Vector:
        place, speed = self.data.qpos[2:4], self.data.qvel[2:4]
        wanted = -(self._FREQUENCY**2) * place - 2 * self._DAMPING * self._FREQUENCY * speed  # [m/s^2]
        tilt = np.array([-wanted[1], wanted[0]]) / 9.81  # about x it rolls to -y, about y to x
        return self.asking_for(tilt)
