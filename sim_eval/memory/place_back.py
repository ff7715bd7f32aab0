"""Place back: a block is carried to a plate, lies there for a while, and is to be returned to where it was."""

from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike

from scd_robot.sim_eval.memory.environment import MemoryEnvironment, Vector, Verdict
from scd_robot.sim_eval.memory.scene import GREY, HOME, hand_scene, lamp, marker
from scd_robot.types import ActionArray, ArraySpec

__all__ = ["PlaceBack"]

_SIDE = 0.025  # [m] half the block's side
_PLATE_RADIUS = 0.05
_REGION = 0.22  # [m] half the side of the square in which the block begins
_APART = 0.12  # [m] from the plate's centre at least
_NEAR = 0.04  # [m] from where it was
_GRASP = _SIDE  # [m] of the hand from the middle of the block's top: anywhere on it
_WAIT_FROM = 48  # control step from which on it can be waited: before, the time would tell how far the way was
_HIGH, _LOW = 0.14, 2 * _SIDE  # [m] of the hand


class PlaceBack(MemoryEnvironment):
    """The hand has a suction cup: the fourth action above 0 holds the block whose top the hand touches.

    `block` (3) is its position [m], `origin` (3) zeros, or with `cue_visible=1` the place x, y where it was, and 1.
    First the block is to be put on the plate in the middle and the hand to go up. After 48 control steps, or when that
    is done, the wait begins: the block is put to the middle of the plate and the hand above it, and `delay` steps later
    the signal says to return it.
    """

    task: ClassVar[str] = "place-back"
    success: ClassVar[str] = "after it lay on the plate the block is put down, released, within 4 cm of where it was"
    action_dim: ClassVar[int] = 4
    steps_to_act: int = 180

    def _scene(self) -> str:
        block = (
            f'<body name="block" pos="0 0 {-_SIDE}"><joint name="block_x" type="slide" axis="1 0 0" damping="0.5"/>'
            '<joint name="block_y" type="slide" axis="0 1 0" damping="0.5"/>'
            '<joint name="block_z" type="slide" axis="0 0 1"/>'
            f'<geom name="block" type="box" size="{_SIDE} {_SIDE} {_SIDE}" mass="0.05" rgba="0.2 0.45 0.9 1"/></body>'
        )
        suction = '<connect name="suction" body1="hand" body2="block" anchor="0 0 0" active="false" solref="0.01 1"/>'
        places = marker("plate", (0, 0), _PLATE_RADIUS, (0.95, 0.95, 0.95)) + marker("origin", (0, 0), 0.02)
        contact = '<contact><exclude body1="hand" body2="block"/></contact>'
        scene = hand_scene(block + places + lamp("lamp", (0, 0.36, 0.12), 0.06), suction)
        return scene.replace("</worldbody>", "</worldbody>" + contact)

    def _keys(self) -> dict[str, ArraySpec]:
        return {"block": ArraySpec((3,)), "origin": ArraySpec((3,))}

    def _begin(self, rng: np.random.Generator) -> None:
        while True:
            self._origin = rng.uniform(-_REGION, _REGION, 2)
            if np.hypot(*self._origin) > _APART:
                break
        self._believed = self._origin
        self.model.geom("origin").pos[:2] = self._origin
        self._ready_at: int | None = None  # control step in which the block lay on the plate and the hand was up
        self.target = np.asarray(HOME) + rng.uniform(-0.03, 0.03, 3)
        self._hold(False)
        self.data.qpos[3:6] = (*self._origin, 2 * _SIDE)  # its joints are 0 where its top is at the hand's zero

    def _guess(self, rng: np.random.Generator) -> None:
        self._believed = rng.uniform(-_REGION, _REGION, 2)

    def _hidden(self) -> Vector:
        return self._origin

    def _signal(self) -> bool:
        return self._ready_at is not None and self.steps >= self._ready_at + self.delay

    def _is_free(self) -> bool:
        return self._ready_at is None or self._signal()

    def _block(self) -> Vector:
        """(3,) of the middle of its top."""
        return np.array(self.data.qpos[3:6])

    def _held(self) -> bool:
        return bool(self.data.eq_active[0])

    def _hold(self, held: bool) -> None:
        self.data.eq_active[0] = held

    def _suck(self, wanted: bool) -> None:
        touching = np.linalg.norm(self.hand - self._block()) < _GRASP
        self._hold(wanted and (self._held() or bool(touching)))

    def _sense(self) -> dict[str, ArrayLike]:
        shown = bool(self.options.cue_visible)
        return {"block": self.measured(self._block()), "origin": np.array([*self._origin, 1.0]) * shown}

    def _judge(self) -> Verdict:
        block = self._block()
        down = block[2] < 2 * _SIDE + 0.005 and not self._held()
        if self._ready_at is None:
            placed = down and np.hypot(*block[:2]) < _PLATE_RADIUS and self.hand[2] > _HIGH - 0.02
            if placed and self.steps >= _WAIT_FROM:
                self._ready_at = self.steps
                self.put_hand((0, 0, _HIGH))
                self.data.qpos[3:6], self.data.qvel[3:6] = (0, 0, 2 * _SIDE), 0.0
            return None
        left = np.hypot(*block[:2]) > _PLATE_RADIUS
        if left and not self._signal():
            return "failure"
        if left and down:
            return "success" if np.hypot(*(block[:2] - self._origin)) < _NEAR else "wrong"
        return None

    def _expert(self) -> Vector:
        block, waiting = self._block(), self._ready_at is not None and not self._signal()
        if waiting:
            return np.append(self.towards((0, 0, _HIGH)), -1.0)
        goal = np.zeros(2) if self._ready_at is None else self._believed
        there = np.hypot(*(block[:2] - goal)) < 0.02
        if self._held():
            settled = there and np.hypot(*(self.target[:2] - goal)) < 0.02
            if settled and block[2] < _LOW + 0.006:
                return np.append(self.towards((*goal, _LOW)), -1.0)
            return np.append(self.towards((*goal, _LOW if settled else _HIGH)), 1.0)
        if there:  # put down
            return np.append(self.towards((*goal, _HIGH)), -1.0)
        near = np.hypot(*(self.hand[:2] - block[:2])) < 0.02
        return np.append(self.towards((*block[:2], _LOW if near else _HIGH)), 1.0 if near else -1.0)

    def _before_physics(self, action: ActionArray) -> None:
        self._suck(bool(action[3] > 0))

    def _paint(self) -> None:
        self.paint("lamp", (1.0, 1.0, 1.0) if self._signal() else GREY)
        self.paint("origin", (0.9, 0.5, 0.1, 1.0 if self.options.cue_visible else 0.0))
