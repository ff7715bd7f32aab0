"""Hidden friction: how far a puck slides is to be learned from one push, and used after a while in the next."""

from typing import ClassVar, Literal

import numpy as np
from numpy.typing import ArrayLike

from scd_robot.sim_eval.memory.environment import MemoryEnvironment, Vector, Verdict
from scd_robot.sim_eval.memory.scene import GREY, hand_scene, lamp
from scd_robot.types import ArraySpec

__all__ = ["HiddenFriction"]

_START = -0.14  # [m] along the rail, of the puck
_RELEASE = -0.03  # at the white line, where a stop holds the hand, and the puck slides on
_HALF = 0.03  # [m] half the puck's length along the rail
_TIP = 0.015  # [m] radius of the hand's tip
_TRY_STEPS = 60  # control steps of the first push
_HOLD_STEPS = 40  # of them, after which the expert takes the hand back
_RETURN_STEPS = 20  # more, in which the hand goes back
_FIRST_SPEED = 0.4  # [m/s]
_DECELERATION = (0.2, 1.0)  # [m/s^2], drawn log-uniformly: no guess is much better than others
_BEST_GUESS = 0.7  # [m/s^2]: of constant beliefs one of the best; 0.3 to 0.8 succeed about alike
_NEAR = 0.04  # [m] of the goal
_MASS = 0.2
_LEFT_AT = _RELEASE + _HALF + _TIP  # [m], of the puck when it leaves the hand
_LAG = 0.033  # [s] by which a moving hand trails its target, kv / kp of its servos
_CONTACT = _START - _HALF - _TIP  # [m], of the hand when it touches the puck
_HEIGHT = 0.03
_BACK = np.array([_CONTACT - 0.01, 0.0, _HEIGHT])


class HiddenFriction(MemoryEnvironment):
    """A puck on a rail slides on when the hand that pushes it stops, as far as its friction lets it.

    `puck` (1) is its position along the rail [m], `goal` (1) where it is to stop, `friction` (1) 0, or with
    `cue_visible=1` its deceleration [m/s^2], `trial` (1, in pictures a second lamp) 1 in the first 60 control steps, in
    which the puck may be pushed once to see how far it goes. Then it is put back, and 20 steps later the hand; both are
    held for `delay` steps, until the signal. The second push counts. A stop holds the hand at the white line: it cannot
    carry the puck to the goal, and how fast it arrives decides how far the puck goes.
    """

    task: ClassVar[str] = "hidden-friction"
    success: ClassVar[str] = (
        "pushed for the second time, up to the line, the puck comes to rest within 4 cm of the goal"
    )
    control: ClassVar[Literal["position", "velocity"]] = "velocity"
    reach_per_step: ClassVar[float] = 0.035  # [m]: 0.7 m/s
    target_high: ClassVar[tuple[float, ...]] = (_RELEASE, 0.35, 0.35)
    steps_to_act: int = _TRY_STEPS + _RETURN_STEPS + 80

    def _scene(self) -> str:
        puck = (
            f'<body name="puck" pos="0 0 {_HEIGHT}"><joint name="puck" type="slide" axis="1 0 0" frictionloss="0.1"/>'
            f'<geom name="puck" type="box" size="{_HALF} 0.04 0.02" mass="{_MASS}" rgba="0.9 0.5 0.1 1"/></body>'
            '<body name="goal" mocap="true"><geom name="goal" type="box" size="0.004 0.08 0.002" '
            'rgba="0.1 0.7 0.2 1" contype="0" conaffinity="0"/></body>'
            f'<geom name="line" type="box" pos="{_RELEASE + _TIP} 0 0.001" size="0.002 0.08 0.001" '
            'rgba="1 1 1 1" contype="0" conaffinity="0"/>'
            '<geom name="gauge" type="box" pos="-0.36 0.36 0.01" size="0.02 0.02 0.01" '
            'rgba="0.9 0.9 0.1 1" contype="0" conaffinity="0"/>'
        )
        return hand_scene(puck + lamp("lamp", (0, 0.36, 0.12), 0.06) + lamp("trial", (0.36, 0.36, 0.1)))

    def _keys(self) -> dict[str, ArraySpec]:
        return {key: ArraySpec((1,)) for key in ("puck", "goal", "friction", "trial")}

    def _begin(self, rng: np.random.Generator) -> None:
        self._deceleration = self._believed = float(np.exp(rng.uniform(*np.log(_DECELERATION))))
        self._goal = float(_LEFT_AT + rng.uniform(0.12, 0.24))
        self.model.joint("puck").frictionloss = _MASS * self._deceleration
        self.data.mocap_pos[0] = (self._goal, 0, 0.002)
        self.target = _BACK + rng.uniform(-0.005, 0.005, 3)
        self.data.joint("puck").qpos[0] = _START
        self._pushed = False

    def _guess(self, rng: np.random.Generator) -> None:
        self._believed = _BEST_GUESS

    def _hidden(self) -> Vector:
        return np.array([self._deceleration, self._goal])

    def _signal(self) -> bool:
        return self.steps >= _TRY_STEPS + _RETURN_STEPS + self.delay

    def _puck(self) -> float:
        return float(self.data.joint("puck").qpos[0])

    def _sense(self) -> dict[str, ArrayLike]:
        shown = self._deceleration if self.options.cue_visible else 0.0
        trial = float(self.steps < _TRY_STEPS)
        return {"puck": self.measured([self._puck()]), "goal": [self._goal], "friction": [shown], "trial": [trial]}

    def _is_free(self) -> bool:
        return self.steps < _TRY_STEPS + _RETURN_STEPS or self._signal()

    def _judge(self) -> Verdict:
        if not self._signal():
            if self.steps >= _TRY_STEPS:
                self.data.joint("puck").qpos[0], self.data.joint("puck").qvel[0] = _START, 0.0
            if self.steps == _TRY_STEPS + _RETURN_STEPS:
                self.put_hand(_BACK)
            self._pushed = False
            return None
        self._pushed |= self._puck() > _START + 0.02
        apart = self._puck() - _HALF - _TIP > self.hand[0] + 0.005
        if not (self._pushed and apart and abs(float(self.data.joint("puck").qvel[0])) < 1e-3):
            return None
        return "success" if abs(self._puck() - self._goal) < _NEAR else "wrong"

    def _expert(self) -> Vector:
        if self.steps >= _HOLD_STEPS and not self._signal():
            return self.towards(_BACK)
        # It does not stop pushing at the line: there the stop holds the hand, and nothing has to be timed.
        speed = self._speed_for_goal() if self._signal() else _FIRST_SPEED
        # Gently at first: struck, the puck would run ahead of the hand.
        gain = np.clip(0.4 + 0.6 * (self.target[0] - _BACK[0]) / 0.06, 0.4, 1.0)
        step = speed * self.control_dt * gain
        return np.array([step, *(np.array([0.0, _HEIGHT]) - self.target[1:])]) / self.reach_per_step

    def _speed_for_goal(self) -> float:
        """[m/s] with which the hand has to arrive: v^2 / 2a = distance + v * lag, as it trails its target."""
        lost = _LAG * self._believed
        return float(lost + np.sqrt(lost**2 + 2 * self._believed * (self._goal - _LEFT_AT)))

    def _paint(self) -> None:
        height = 0.15 * self._deceleration if self.options.cue_visible else 0.001
        self.model.geom("gauge").size[2] = height
        self.model.geom("gauge").pos[2] = height
        self.paint("lamp", (1.0, 1.0, 1.0) if self._signal() else GREY)
        self.paint("trial", (0.2, 0.8, 0.9) if self.steps < _TRY_STEPS else GREY)
