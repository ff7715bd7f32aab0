"""Cue, then reach: a colour is shown, hidden for a while, and then the pad of that colour is to be touched."""

from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike

from scd_robot.sim_eval.memory.environment import MemoryEnvironment, Vector, Verdict
from scd_robot.sim_eval.memory.scene import COLOURS, GREY, HOME, hand_scene, lamp, marker
from scd_robot.types import ArraySpec

__all__ = ["CueReach"]

_CUE_STEPS = 10
_RADIUS = 0.22  # [m] of the circle of pads
_PAD = 0.04


class CueReach(MemoryEnvironment):
    """Pads lie on a circle, each of its colour; a lamp shows one of the colours for 10 control steps.

    `cue` (choices) is 1 for the colour that is shown, all 0 while none is. Then nothing shows it for `delay` steps,
    until `signal` is 1 (a white lamp) and the robot is free to move. Touching any other pad ends the episode.
    """

    task: ClassVar[str] = "cue-reach"
    has_choices: ClassVar[bool] = True
    success: ClassVar[str] = (
        "after the signal the hand touches the pad of the colour that was shown, and none before it"
    )
    steps_to_act: int = _CUE_STEPS + 60

    def _scene(self) -> str:
        self._pads = [_place(i, self.options.choices) for i in range(self.options.choices)]
        pads = [marker(f"pad_{i}", pad, _PAD, COLOURS[i]) for i, pad in enumerate(self._pads)]
        return hand_scene("".join(pads) + lamp("lamp", (0, 0.36, 0.12), 0.06) + lamp("go", (0.36, 0.36, 0.1)))

    def _keys(self) -> dict[str, ArraySpec]:
        return {"cue": ArraySpec((self.options.choices,))}

    def _begin(self, rng: np.random.Generator) -> None:
        self._cue = self._believed = int(rng.integers(self.options.choices))
        self.target = np.asarray(HOME) + rng.uniform(-0.03, 0.03, 3)

    def _guess(self, rng: np.random.Generator) -> None:
        self._believed = int(rng.integers(self.options.choices))

    def _hidden(self) -> Vector:
        return np.array([self._cue], np.float64)

    def _signal(self) -> bool:
        return self.steps >= _CUE_STEPS + self.delay

    def _shown(self) -> bool:
        return self.steps < _CUE_STEPS or bool(self.options.cue_visible)

    def _sense(self) -> dict[str, ArrayLike]:
        return {"cue": np.eye(self.options.choices)[self._cue] * self._shown()}

    def _judge(self) -> Verdict:
        if self.hand[2] > 0.03:
            return None
        touched = [i for i, pad in enumerate(self._pads) if np.hypot(*(self.hand[:2] - pad)) < _PAD]
        if not touched:
            return None
        return "success" if touched == [self._cue] else "wrong"

    def _expert(self) -> Vector:
        if not self._signal():
            return self.towards(HOME)
        pad = self._pads[self._believed]
        near = np.hypot(*(self.target[:2] - pad)) < 0.02
        return self.towards((*pad, 0.02 if near else 0.12))

    def _paint(self) -> None:
        self.paint("lamp", COLOURS[self._cue] if self._shown() else GREY)
        self.paint("go", (1.0, 1.0, 1.0) if self._signal() else GREY)


def _place(number: int, count: int) -> Vector:
    """(2,) of a pad; the first lies at the right, and none under the lamp."""
    angle = 2 * np.pi * (number + 0.5) / count
    return _RADIUS * np.array([np.cos(angle), np.sin(angle)])
