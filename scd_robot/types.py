"""Types that every part shares: array specifications and the protocols of policies and environments.

numpy only, so that a robot's computer can import them without a simulator or a training stack.

Shapes: B rows (environments or robots) in a batch, Da action width, Ta chunk length.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from scd_robot.errors import ConfigError

__all__ = [
    "ActionArray",
    "ActionKind",
    "ArraySpec",
    "DatasetSpec",
    "Environment",
    "EnvironmentSpec",
    "GivenActions",
    "Observation",
    "Policy",
    "PolicySpec",
    "RunningChunk",
    "StepResult",
]

Observation = Mapping[str, NDArray[Any]]
ActionArray = NDArray[np.float32]
ActionKind = Literal["", "delta", "absolute"]
"""What actions ask a robot's arms for: changes of their poses (or joints), or absolute ones; "" where nobody tells."""


@dataclass(frozen=True)
class ArraySpec:
    """Shape and dtype of one array, without batch and time axes.

    Attributes:
        shape: for example (4,) for a vector, (H, W, 3) for an image.
        dtype: numpy name; vectors are "float32", images "uint8".
    """

    shape: tuple[int, ...]
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if not isinstance(self.shape, tuple):
            raise ConfigError(f"the shape of an array is a tuple such as (7,) or (96, 96, 3), got {self.shape!r}")

    def to_json(self) -> dict[str, Any]:
        """As plain JSON types."""
        return {"shape": list(self.shape), "dtype": self.dtype}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "ArraySpec":
        """Inverse of `to_json`."""
        return cls(tuple(int(n) for n in data["shape"]), str(data["dtype"]))


@dataclass(frozen=True)
class DatasetSpec:
    """What a dataset holds, as far as a policy depends on it.

    Attributes:
        observation: specification by observation key.
        action_dim: Da.
        control_dt: seconds between control steps.
        source: where it came from (environment name, format), for people.
        action_kind: what the actions ask for, as recorded.
    """

    observation: dict[str, ArraySpec]
    action_dim: int
    control_dt: float
    source: str = ""
    action_kind: ActionKind = ""

    def __post_init__(self) -> None:
        if not self.observation:
            raise ConfigError("a dataset needs at least one observation key, got none")
        if self.action_dim < 1:
            raise ConfigError(f"action_dim must be at least 1, got {self.action_dim}")
        if not self.control_dt > 0:
            raise ConfigError(f"control_dt must be positive [s], got {self.control_dt}")
        if self.action_kind not in get_args(ActionKind):
            raise ConfigError(f"action_kind must be delta, absolute or empty, got {self.action_kind!r}")

    def to_json(self) -> dict[str, Any]:
        """As plain JSON types."""
        return {
            "observation": {k: v.to_json() for k, v in self.observation.items()},
            "action_dim": self.action_dim,
            "control_dt": self.control_dt,
            "source": self.source,
            "action_kind": self.action_kind,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "DatasetSpec":
        """Inverse of `to_json`."""
        return cls(
            {k: ArraySpec.from_json(v) for k, v in data["observation"].items()},
            int(data["action_dim"]),
            float(data["control_dt"]),
            str(data.get("source", "")),
            data.get("action_kind", ""),
        )


@dataclass(frozen=True)
class GivenActions:
    """Numbers of a chunk that are known before it is planned: a gripper that stays closed, a joint that is locked.

    Attributes:
        actions: (B, Ta, Da), read where `mask` is True.
        mask: (Ta, Da) bool.
    """

    actions: ActionArray
    mask: NDArray[np.bool_]


@dataclass(frozen=True)
class RunningChunk:
    """What is left of a chunk under way, towards which the next plan is guided (arXiv 2506.07339).

    Attributes:
        actions: (B, n, Da), 1 <= n < Ta; action 0 is for the control step that the plan is for.
        delay_steps: d <= n, of them are carried out while the plan is made.
        max_gain: beta, bound of the guidance.
        exact: with the network's Jacobian, as published; False leaves it out, which is cheaper.
    """

    actions: ActionArray
    delay_steps: int
    max_gain: float = 5.0
    exact: bool = True


@dataclass(frozen=True)
class PolicySpec:
    """What a policy expects and gives.

    Attributes:
        observation: specification by key of what `observe` takes, without the batch axis.
        action_dim: Da.
        control_dt: seconds between control steps the policy was trained for.
        chunk_length: Ta, actions in one plan; action 0 is for the current control step.
        num_executed: actions taken from one plan before the next, 1 <= num_executed <= chunk_length.
        history_length: control steps each encoder layer attends to, the current one included (1 = memoryless).
        action_kind: what its actions ask for.
        tasks: in words, where it does several and has to be told which.
        max_delay_steps: most committed actions that training showed it clean (real-time chunking); 0 = it was not
            trained for delays, None = not known.
        optional: keys that `observe` takes None for, where nothing came in a control step.
    """

    observation: dict[str, ArraySpec]
    action_dim: int
    control_dt: float
    chunk_length: int
    num_executed: int
    history_length: int
    action_kind: ActionKind = ""
    tasks: tuple[str, ...] = ()
    max_delay_steps: int | None = None
    optional: tuple[str, ...] = ()


@runtime_checkable
class Policy(Protocol):
    """Anything that can be evaluated or put on a robot: a scripted expert, a baseline, a learned policy, a client."""

    def reset(self, rows: Sequence[int] | None = None, episodes: Sequence[int] | None = None) -> None:
        """Forgets the history of some rows of the batch.

        Args:
            rows: which rows begin a new episode; None = all (the next observation may then have another batch size).
            episodes: for each of `rows` the number of its new episode, which keys the policy's noise; None = the
                policy counts by itself.
        """

    def act(self, observation: Observation, executed_action: ActionArray | None = None) -> ActionArray:
        """One control step.

        Args:
            observation: arrays (B, ...) in the units and keys of the dataset.
            executed_action: (B, Da), what the robot really did in the last step, where that differs from what this
                policy asked for; None = the same.

        Returns:
            (B, Da) action in the units of the dataset.
        """
        ...


@dataclass(frozen=True)
class EnvironmentSpec:
    """What an environment offers.

    Attributes:
        name: the full name under which it is made, options included.
        observation: specification by key.
        action_dim: Da.
        action_low: (Da,) lower bound, as a tuple.
        action_high: (Da,) upper bound, as a tuple.
        control_dt: seconds per control step.
        max_steps: control steps after which an episode is truncated.
        success: one sentence that defines success.
        score: what the mean over episodes of the best reward is, where that is the score that is published; "" = it is
            not.
        hand_unit: of the numbers of the environment's `hand`.
        action_kind: what it takes actions for.
    """

    name: str
    observation: dict[str, ArraySpec]
    action_dim: int
    action_low: tuple[float, ...]
    action_high: tuple[float, ...]
    control_dt: float
    max_steps: int
    success: str
    score: str = ""
    hand_unit: str = "m"
    action_kind: ActionKind = ""


@dataclass(frozen=True)
class StepResult:
    """Outcome of one control step of an environment.

    Attributes:
        observation: after the step.
        reward: the task's own reward.
        success: True in the steps in which the success condition holds.
        terminated: the task ended by itself (a failure state, say); success alone does not set it.
        truncated: the time limit was reached.
        executed_action: (Da,) what was applied after clipping.
        info: what else the environment tells, "completed" for one: whether the manipulation was completed, rightly or
            not.
    """

    observation: dict[str, NDArray[Any]]
    reward: float
    success: bool
    terminated: bool
    truncated: bool
    executed_action: ActionArray
    info: dict[str, Any] = field(default_factory=dict)


class Environment(Protocol):
    """One simulated robot with a task. Unbatched; one lives in each worker process.

    It may have a property `hand`: where the hand is in the present state, (n,), or (hands, n) of several, exactly and
    in `spec.hand_unit`. How smoothly the robot moves is measured there, and nowhere without it.

    It may have a property `positions`: where the hand and other things are in the present state, exactly, by name (3,)
    in m; the same names in all states. No policy sees them: they are kept beside pictures, to judge imagined ones by.

    It may have a method `standstill`: the action (Da,) that moves nothing in the present state. Without it 0 is one, as
    where actions are increments or velocities.
    """

    spec: EnvironmentSpec

    def reset(self, seed: int) -> dict[str, NDArray[Any]]:
        """Starts an episode whose initial state is a function of `seed` alone, and returns its first observation."""
        ...

    def step(self, action: ActionArray) -> StepResult:
        """Applies one action (Da,), clipped to the bounds."""
        ...

    def state_hash(self) -> str:
        """Hexadecimal SHA-256 of the full simulator state (positions, velocities, goal), to compare start states."""
        ...

    def render(self, height: int, width: int) -> NDArray[np.uint8]:
        """An RGB frame (height, width, 3) of the present state, the right way up."""
        ...

    def expert_action(self) -> ActionArray:
        """The scripted expert's action (Da,) for the present state, clipped to the bounds and without noise.

        Raises:
            ConfigError: there is no expert.
        """
        ...

    def close(self) -> None:
        """Releases simulator and renderer; may be called twice."""
        ...
