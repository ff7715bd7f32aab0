"""A robot for the control loop under a virtual clock: every command is a control step of a simulator.

With `scd_robot.control.planner.VirtualPlanner` it tells what a policy is worth where its plans take so long, however
fast the machine is that computes them: observations are new in every control step, and the simulator goes on while a
plan is made. What happens where the observations themselves come late is `scd_robot.sim_eval.faults`.

Shapes: T control steps so far, Da action width.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scd_robot.control.clock import Clock
from scd_robot.control.interfaces import Command, Sample
from scd_robot.types import Environment

__all__ = ["VirtualRobot"]


class VirtualRobot:
    """A `scd_robot.control.Robot`. Its simulator stands until the first command and after the episode's end.

    Args:
        environment: whose control step is the loop's (`servo_steps` 1).
        seed: of its start state.
        clock: the loop's.

    Attributes:
        success: whether there was a step that its success condition held in.
        finished: whether the episode is over.
        initial_state_hash: of the start state.
        actions: T executed actions (Da,).
        hand: T + 1 positions of the hand, in the environment's unit; empty where it does not tell.
    """

    def __init__(self, environment: Environment, seed: int, clock: Clock) -> None:
        self._environment, self._clock = environment, clock
        self._observation: Mapping[str, NDArray[Any]] = environment.reset(seed)
        still = getattr(environment, "standstill", None)  # where commands are velocities or increments it is 0
        self._held = np.zeros(environment.spec.action_dim) if still is None else np.array(still(), np.float64)
        self.success = self.finished = False
        self.initial_state_hash = environment.state_hash()
        self.actions: list[NDArray[Any]] = []
        self.hand: list[NDArray[Any]] = []
        self._look()

    def observe(self) -> Sample:
        """What the sensors say now.

        As pose it tells the last command, and before the first one what the environment calls its standstill.
        """
        executed = self.actions[-1].astype(np.float32) if self.actions else None
        return Sample(self._observation, self._clock.now(), self._held, executed)

    def send(self, command: Command) -> None:
        """Takes a control step."""
        if self.finished:
            return
        result = self._environment.step(np.asarray(command, np.float32))
        self._observation, self._held = result.observation, np.array(command)
        self.actions.append(np.asarray(result.executed_action))
        self._look()
        self.success = self.success or result.success
        self.finished = result.terminated or result.truncated or result.success

    def hold(self) -> None:
        """Time stands until the next command."""

    def _look(self) -> None:
        hand = getattr(self._environment, "hand", None)
        if hand is not None:
            self.hand.append(np.array(hand, np.float64))
