"""Streams of observations that a policy saw, and plans it makes after histories of any kind.

Shapes: T control steps of an episode, B rows, R histories, Ta chunk length, Da action width, K context tokens, D width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scd_robot.policies.scd import ScdPolicy
from scd_robot.types import ActionArray, Observation

__all__ = ["Stream", "StreamRecorder", "plans_after"]


@dataclass
class Stream:
    """What a policy saw and did in one episode.

    Attributes:
        episode: its number.
        observation: T observations, arrays by key.
        action: T actions (Da,) that it asked for.
        executed: T actions (Da,) executed one control step before each observation; zeros before the first.
        context: T contexts (K, D) that the policy had after each observation; empty where nobody noted them.
    """

    episode: int
    observation: list[dict[str, NDArray[Any]]] = field(default_factory=list)
    action: list[NDArray[np.float32]] = field(default_factory=list)
    executed: list[NDArray[np.float32]] = field(default_factory=list)
    context: list[NDArray[np.float32]] = field(default_factory=list)

    def see(self, row: int, observation: Observation, executed: ActionArray) -> None:
        """Adds what a row of a batch saw (B, ...) and what was executed (B, Da) before."""
        self.observation.append({key: np.array(value[row]) for key, value in observation.items()})
        self.executed.append(executed[row].copy())

    def cut(self, length: int) -> "Stream":
        """Its first control steps: rows without work go on repeating their last observation."""
        observation, action = self.observation[:length], self.action[:length]
        return Stream(self.episode, observation, action, self.executed[:length], self.context[:length])

    def __len__(self) -> int:
        return len(self.observation)


class StreamRecorder:
    """A policy that does as another one and remembers what it saw.

    Attributes:
        streams: by episode.
    """

    def __init__(self, policy: ScdPolicy) -> None:
        self._policy = policy
        self._present: dict[int, Stream] = {}
        self.streams: dict[int, Stream] = {}
        self.spec = policy.spec

    def reset(self, rows: Sequence[int] | None = None, episodes: Sequence[int] | None = None) -> None:
        """As the policy's."""
        self._policy.reset(rows, episodes)
        numbers = list(episodes or [])
        for row, episode in zip(range(len(numbers)) if rows is None else rows, numbers, strict=True):
            self._present[row] = self.streams[episode] = Stream(episode)

    def act(self, observation: Observation, executed_action: ActionArray | None = None) -> ActionArray:
        """As the policy's."""
        action = self._policy.act(observation, executed_action)
        context = self._policy.context.cpu().numpy()
        for row, stream in self._present.items():
            stream.see(row, observation, np.zeros_like(action) if executed_action is None else executed_action)
            stream.action.append(action[row].copy())
            stream.context.append(context[row].copy())
        return action


def plans_after(policy: ScdPolicy, histories: Sequence[Stream], episodes: Sequence[int]) -> ActionArray:
    """The plan (R, Ta, Da) that a policy makes after each history, which may differ in length.

    Args:
        policy: is reset.
        histories: R, each at least one control step long.
        episodes: R numbers, which key the noise: the same number gives the same noise.
    """
    longest = max(len(history) for history in histories)
    begins = np.array([longest - len(history) for history in histories])
    policy.reset(episodes=list(episodes))
    for step in range(longest):
        beginning = np.flatnonzero(begins == step)
        if step > 0 and len(beginning):  # what these rows saw before was nothing but padding
            policy.reset([int(row) for row in beginning], [episodes[int(row)] for row in beginning])
        places = np.maximum(step - begins, 0)
        policy.observe(_stacked([h.observation[p] for h, p in zip(histories, places, strict=True)]),
                       np.stack([h.executed[p] for h, p in zip(histories, places, strict=True)]))  # fmt: skip
    return policy.plan()


def _stacked(observations: Sequence[Mapping[str, NDArray[Any]]]) -> dict[str, NDArray[Any]]:
    return {key: np.stack([observation[key] for observation in observations]) for key in observations[0]}
