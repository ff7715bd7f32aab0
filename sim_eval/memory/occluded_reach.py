"""Occluded reach: something slides under a cover, where it stops; after a while it is to be touched there."""

from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike

from scd_robot.sim_eval.memory.environment import MemoryEnvironment, Vector, Verdict
from scd_robot.sim_eval.memory.scene import GREY, HOME, hand_scene, lamp
from scd_robot.types import ArraySpec

__all__ = ["OccludedReach"]

_SEEN_STEPS = 12  # it slides and is seen
_SLIDE_STEPS = 16  # it slides
_NEAR = 0.05  # [m]
_REGION = 0.22  # [m] half the side of the square in which it stops


class OccludedReach(MemoryEnvironment):
    """A puck slides at constant speed for 16 control steps, of which 12 are seen, and lies still then.

    `puck` (3) is its position x, y [m] and 1, or zeros while it is covered. `delay` steps after it stopped the signal
    is given and the robot is free to move. Coming down anywhere else ends the episode.
    """

    task: ClassVar[str] = "occluded-reach"
    success: ClassVar[str] = "after the signal the hand comes down within 5 cm of the covered puck's centre"
    steps_to_act: int = _SLIDE_STEPS + 60

    def _scene(self) -> str:
        puck = (
            '<body name="puck" mocap="true"><geom name="puck" type="cylinder" size="0.05 0.004" '
            'rgba="0.9 0.2 0.1 1" contype="0" conaffinity="0"/></body>'
        )
        return hand_scene(puck + lamp("lamp", (0, 0.36, 0.12), 0.06))

    def _keys(self) -> dict[str, ArraySpec]:
        return {"puck": ArraySpec((3,))}

    def _begin(self, rng: np.random.Generator) -> None:
        self._end = rng.uniform(-_REGION, _REGION, 2)
        angle = rng.uniform(0, 2 * np.pi)
        self._speed = rng.uniform(0.003, 0.007) * np.array([np.cos(angle), np.sin(angle)])  # [m] per control step
        self._believed = self._end
        self.target = np.asarray(HOME) + rng.uniform(-0.03, 0.03, 3)
        self._put_puck()

    def _guess(self, rng: np.random.Generator) -> None:
        self._believed = rng.uniform(-_REGION, _REGION, 2)

    def _hidden(self) -> Vector:
        return np.concatenate([self._end, self._speed])

    def _signal(self) -> bool:
        return self.steps >= _SLIDE_STEPS + self.delay

    def _shown(self) -> bool:
        return self.steps < _SEEN_STEPS or bool(self.options.cue_visible)

    def _place(self) -> Vector:
        place: Vector = self._end - self._speed * max(0, _SLIDE_STEPS - self.steps)
        return place

    def _put_puck(self) -> None:
        self.data.mocap_pos[0] = (*self._place(), 0.004)

    def _sense(self) -> dict[str, ArrayLike]:
        return {"puck": np.array([*self.measured(self._place()), 1.0]) * self._shown()}

    def _judge(self) -> Verdict:
        self._put_puck()
        if self.hand[2] > 0.03:
            return None
        near = np.hypot(*(self.hand[:2] - self._end)) < _NEAR
        return "success" if near else "wrong"

    def _expert(self) -> Vector:
        if not self._signal():
            return self.towards(HOME)
        near = np.hypot(*(self.target[:2] - self._believed)) < 0.02
        return self.towards((*self._believed, 0.02 if near else 0.12))

    def _paint(self) -> None:
        self.paint("lamp", (1.0, 1.0, 1.0) if self._signal() else GREY)
        self.paint("puck", (0.9, 0.2, 0.1, 1.0 if self._shown() else 0.0))
