"""A policy in the expert's place while a recording is made: it acts, and the labels remain the expert's.

What a policy meets are the states that it gets itself into, which no demonstration holds (Ross et al., "A reduction of
imitation learning and structured prediction to no-regret online learning", 2011: DAgger). On a robot plans take control
steps, in which it carries out what it has committed to; recorded so, the actions of those steps hold no sign of what
came after the plan was begun, as an expert's do.
"""

from typing import Any, Protocol

import numpy as np

from scd_robot.control.interfaces import EncodingPolicy
from scd_robot.errors import ConfigError
from scd_robot.types import ActionArray

__all__ = ["ActingPolicy", "ChunkingPolicy"]


class ChunkingPolicy(EncodingPolicy, Protocol):
    """A policy that plans in chunks, as those of checkpoints do."""

    def plan(self, prefix: None = None, delay_steps: int = 0) -> ActionArray:
        """(1, Ta, Da) actions from now on, the first `delay_steps` of which are those of the plan before."""
        ...


class ActingPolicy:
    """Carries out the plans of a policy, each of which takes `delay_steps` control steps after the first.

    A plan is begun after as many actions as the policy carries out of one (`num_executed`), and not before the one
    before is there.

    Args:
        policy: of the environment's observations and actions.
        delay_steps: that a plan takes.

    Attributes:
        error: what the policy raised; None = nothing.

    Raises:
        ConfigError: it cannot commit to so many actions, or its chunks are too short for that.
    """

    def __init__(self, policy: ChunkingPolicy, delay_steps: int) -> None:
        spec = policy.spec
        self._every = max(spec.num_executed, delay_steps)
        most = min(policy.max_prefix, spec.chunk_length - self._every)
        if not 0 <= delay_steps <= most:
            raise ConfigError(
                f"delay_steps must be from 0 to {most} for a policy with chunks of {spec.chunk_length}, of which "
                f"{self._every} are carried out, and at most {policy.max_prefix} committed actions; got {delay_steps}"
            )
        self._policy, self._delay = policy, delay_steps
        self._chunk: ActionArray | None = None
        self._at = 0
        self.error: Exception | None = None

    def reset(self, episode: int) -> None:
        """Begins an episode, whose number keys the policy's noise."""
        self._policy.reset(episodes=[episode])
        self._chunk = None

    def act(self, observation: dict[str, Any], executed_action: ActionArray | None) -> ActionArray:
        """(Da,) the action of this control step; `executed_action` (Da,) is what was done in the one before."""
        try:
            return self._act(observation, executed_action)
        except Exception as error:
            self.error = error
            raise

    def _act(self, observation: dict[str, Any], executed_action: ActionArray | None) -> ActionArray:
        before = None if executed_action is None else executed_action[None]
        self._policy.observe({key: np.asarray(x)[None] for key, x in observation.items()}, before)
        if self._chunk is None:
            self._chunk, self._at = self._policy.plan()[0], 0
        elif self._at >= self._every and self._policy.may_plan:
            self._chunk, self._at = self._policy.plan(delay_steps=self._delay)[0], 0
        elif self._at == len(self._chunk):
            raise ConfigError(
                f"a chunk of {len(self._chunk)} actions ends before the next plan can begin: plans are made in some "
                "control steps only (model.history_stride); lower delay_steps"
            )
        action: ActionArray = self._chunk[self._at]
        self._at += 1
        return action
