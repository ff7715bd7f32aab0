"""Count and press: a number is shown, hidden for a while, and then a button is to be pressed that many times."""

from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike

from scd_robot.sim_eval.memory.environment import MemoryEnvironment, Vector, Verdict
from scd_robot.sim_eval.memory.scene import GREY, HOME, hand_scene, lamp, marker
from scd_robot.types import ArraySpec

__all__ = ["CountPress"]

_CUE_STEPS = 10
_BUTTON, _PAD = np.array([-0.12, 0.0]), np.array([0.18, 0.0])
_TOP, _TRAVEL = 0.08, 0.05  # [m] of the button: at rest, and how far it goes down
_PRESSED, _RELEASED = 0.01, 0.004  # [m] of its travel
_PAD_RADIUS = 0.05
# Places of the hand [m]. It comes down from above the button, 3 cm farther than a press takes, and goes up beside it:
# where it is tells which of the two it does, so that only the number of presses has to be remembered.
_HIGH = 0.13
_ABOVE, _DOWN, _BESIDE = (np.array([*place]) for place in ((-0.12, 0, _HIGH), (-0.12, 0, 0.035), (-0.04, 0, _HIGH)))


class CountPress(MemoryEnvironment):
    """A row of lamps shows how often a button is to be pressed; a pad is to be touched when that is done.

    `cue` (choices) is 1 at the number of presses that remain, as far as it is shown: in the first 10 control steps, or
    always with `cue_visible=1`, where at the last place of its `choices + 1` it says that none remains. `button` (1) is
    how far it is down [m]. After `delay` steps comes the signal, and the robot is free to move. One press too many, or
    the pad after too few of them, ends the episode.
    """

    task: ClassVar[str] = "count-press"
    has_choices: ClassVar[bool] = True
    success: ClassVar[str] = "after the signal the button is pressed as often as was shown, and then the pad touched"

    def _scene(self) -> str:
        self.steps_to_act = _CUE_STEPS + 60 + 20 * self.options.choices
        x, y = _BUTTON
        button = (
            f'<body name="button" pos="{x} {y} 0" gravcomp="1"><joint name="button" type="slide" axis="0 0 -1" '
            f'range="0 {_TRAVEL}" limited="true" stiffness="80" damping="3"/><geom name="button" type="cylinder" '
            f'fromto="0 0 0 0 0 {_TOP}" size="0.03" mass="0.05" rgba="0.85 0.2 0.15 1" '
            'contype="2" conaffinity="2"/></body>'  # passes through the table
        )
        lamps = [lamp(f"lamp_{i}", (-0.24 + 0.07 * i, 0.36, 0.1)) for i in range(self.options.choices)]
        return hand_scene(button + marker("pad", _PAD, _PAD_RADIUS) + "".join(lamps) + lamp("go", (0.36, 0.36, 0.1)))

    def _keys(self) -> dict[str, ArraySpec]:
        return {"cue": ArraySpec((self.options.choices + 1,)), "button": ArraySpec((1,))}

    def _begin(self, rng: np.random.Generator) -> None:
        self._count = self._believed = int(rng.integers(1, self.options.choices + 1))
        self._presses, self._down = 0, False
        self.target = np.asarray(HOME) + rng.uniform(-0.03, 0.03, 3)

    def _guess(self, rng: np.random.Generator) -> None:
        self._believed = int(rng.integers(1, self.options.choices + 1))

    def _hidden(self) -> Vector:
        return np.array([self._count], np.float64)

    def _signal(self) -> bool:
        return self.steps >= _CUE_STEPS + self.delay

    def _remaining(self) -> int | None:
        """Presses that the lamps show; None = they are off."""
        if self.options.cue_visible:
            return max(0, self._count - self._presses)
        return self._count if self.steps < _CUE_STEPS else None

    def _sense(self) -> dict[str, ArrayLike]:
        cue, remaining = np.zeros(self.options.choices + 1), self._remaining()
        if remaining is not None:
            cue[remaining - 1] = 1.0  # none remaining is the last place
        return {"cue": cue, "button": self.measured(self.data.joint("button").qpos)}

    def _judge(self) -> Verdict:
        travel = float(self.data.joint("button").qpos[0])
        if not self._down and travel > _PRESSED:
            self._down = True
            self._presses += 1
            if self._presses > self._count:
                return "wrong"
        elif self._down and travel < _RELEASED:
            self._down = False
        if self.hand[2] < 0.03 and np.hypot(*(self.hand[:2] - _PAD)) < _PAD_RADIUS:
            return "success" if self._presses == self._count else "wrong"
        return None

    def _expert(self) -> Vector:
        if not self._signal():
            return self.towards(HOME)
        (x, y, z), (bx, by, _) = self.hand, _ABOVE
        over = np.hypot(x - bx, y - by) < 0.012
        if z < _HIGH - 0.015 and np.hypot(x - _PAD[0], y - _PAD[1]) > _PAD_RADIUS:  # on the way down, or up again
            return self.towards(_DOWN if over and z > _DOWN[2] + 0.015 else _BESIDE)
        if self._presses < self._believed:
            return self.towards(_DOWN if over else _ABOVE)
        near = np.hypot(x - _PAD[0], y - _PAD[1]) < 0.02
        return self.towards((*_PAD, 0.02 if near else _HIGH))

    def _paint(self) -> None:
        remaining = self._remaining() or 0
        for i in range(self.options.choices):
            self.paint(f"lamp_{i}", (1.0, 0.9, 0.2) if i < remaining else GREY)
        self.paint("go", (1.0, 1.0, 1.0) if self._signal() else GREY)
