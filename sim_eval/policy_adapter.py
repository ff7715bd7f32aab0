"""Calls any object with `reset` and `act` as a batched policy, and checks what goes in and what comes out.

Shapes: B rows stepped side by side, Da action width.
"""

import logging
import math
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from scd_robot.dotted import begins_rows, takes
from scd_robot.errors import ConfigError, ScdRobotError, ShapeError
from scd_robot.types import ActionArray, ActionKind, EnvironmentSpec, Observation, PolicySpec

__all__ = ["PolicyAdapter", "PolicyError", "check_policy_spec"]

logger = logging.getLogger(__name__)

_ABSOLUTE = "actions=absolute"  # of robosuite's environments, the only ones that can be asked for it


class PolicyError(ScdRobotError):
    """A policy asked for an action that cannot be executed."""


class PolicyAdapter:
    """A policy behind one interface, whichever of the optional arguments it knows.

    Args:
        policy: has `reset()`, optionally with `rows` and `episodes`; `act(observation)`, optionally with
            `executed_action`; optionally `drain_timings()`: the wall milliseconds per call since it was last asked,
            under "encoder_ms" and "plan_ms", and the rows of each plan under "plan_rows"; and optionally `planned`
            (B,): for which rows the last `act` planned, and `takes_rows`: False where `reset` ignores its `rows`.
    """

    def __init__(self, policy: Any) -> None:
        for method in ("reset", "act"):
            if not callable(getattr(policy, method, None)):
                raise ConfigError(f"a policy needs the methods reset and act; {type(policy).__name__} has no {method}")
        self._policy = policy
        self._takes_executed_action = takes(policy.act, "executed_action")
        self._takes_episodes = takes(policy.reset, "episodes")
        self.takes_rows = begins_rows(policy)
        self.act_ms: list[float] = []
        self._drain()

    def begin(self, episodes: Sequence[int]) -> None:
        """Starts a new batch, with one episode in each of its rows.

        Args:
            episodes: B numbers.
        """
        if self._takes_episodes:
            self._policy.reset(episodes=list(episodes))
        else:
            self._policy.reset()

    def reset(self, rows: Sequence[int], episodes: Sequence[int]) -> None:
        """Begins new episodes in some rows of the running batch.

        Args:
            rows: which.
            episodes: the number of the new episode of each.
        """
        if not self.takes_rows:
            self.begin(episodes)
        elif self._takes_episodes:
            self._policy.reset(rows=list(rows), episodes=list(episodes))
        else:
            self._policy.reset(rows=list(rows))

    def act(self, observation: Observation, executed_action: ActionArray | None, action_dim: int) -> ActionArray:
        """One timed control step.

        Args:
            observation: arrays (B, ...).
            executed_action: (B, Da) what was executed in the last step, zeros in rows that begin an episode; None
                before the first step of all.
            action_dim: Da that the environment needs.

        Returns:
            (B, Da) float32, not yet checked for NaN.

        Raises:
            ShapeError: the action has another shape.
        """
        optional = {"executed_action": executed_action} if self._takes_executed_action else {}
        start = time.perf_counter()
        action = self._policy.act(observation, **optional)
        self.act_ms.append((time.perf_counter() - start) * 1e3)
        action = np.asarray(action, np.float32)
        expected = (len(next(iter(observation.values()))), action_dim)
        if action.shape != expected:
            raise ShapeError(
                f"the policy's action must be {expected} (rows, action width), got {action.shape}; "
                "return one action per row of the observation"
            )
        return action

    @property
    def planned(self) -> Sequence[bool] | None:
        """(B,) which rows' last action is the first of a new chunk; None where the policy does not tell."""
        return getattr(self._policy, "planned", None)

    def timings(self) -> tuple[dict[str, list[float]], float | None]:
        """Wall milliseconds per call, and the mean number of rows in a plan (None where the policy does not tell).

        Calls are "act", and "encoder" and "plan" where the policy measures them. The first of each is left out, which
        allocates and compiles, unless it is the only one.
        """
        own = dict(self._drain())
        rows = own.pop("plan_rows", [])
        times = {name.removesuffix("_ms"): [float(v) for v in values] for name, values in own.items()}
        times["act"] = self.act_ms
        return {name: values[1:] or values for name, values in times.items()}, float(np.mean(rows)) if rows else None

    def _drain(self) -> Mapping[str, Sequence[float]]:
        drain = getattr(self._policy, "drain_timings", None)
        return drain() if callable(drain) else {}


def check_policy_spec(policy: Any, environment: EnvironmentSpec) -> None:
    """Compares what a policy says about itself (`spec`, if it has one) with what the environment offers.

    Where only one of them tells what actions ask for, changes or absolute poses, a warning says so.

    Raises:
        ShapeError: they do not fit together.
        ConfigError: the policy's actions are absolute poses, and the environment takes changes, or the reverse.
    """
    spec = getattr(policy, "spec", None)
    if not isinstance(spec, PolicySpec):
        return
    name = environment.name
    for key, wanted in spec.observation.items():
        if key not in environment.observation:
            goal = key.startswith("goal.") and key.removeprefix("goal.") in environment.observation
            hint = "was the policy trained for another one?"
            if goal:
                hint = "the policy is shown goals, give it one (scd eval --goal DATASET:EPISODE)"
            raise ShapeError(
                f"the policy needs the observation {key!r}, which environment {name!r} does not give; "
                f"it gives {', '.join(sorted(environment.observation))}: {hint}"
            )
        given = environment.observation[key]
        if tuple(given.shape) != tuple(wanted.shape) or given.dtype != wanted.dtype:
            raise ShapeError(
                f"the policy needs {key!r} as {wanted.dtype} {tuple(wanted.shape)}, environment {name!r} gives "
                f"{given.dtype} {tuple(given.shape)}; was the policy trained for another one?"
            )
    if spec.action_dim != environment.action_dim:
        raise ShapeError(
            f"the policy's actions are {spec.action_dim} wide, environment {name!r} needs {environment.action_dim}; "
            "was the policy trained for another one?"
        )
    if not math.isclose(spec.control_dt, environment.control_dt, rel_tol=1e-3):
        raise ShapeError(
            f"the policy was trained for a control step of {spec.control_dt:g} s, environment {name!r} steps "
            f"{environment.control_dt:g} s; train it on data of this rate"
        )
    _check_action_kind(spec.action_kind, environment)


def _check_action_kind(trained: ActionKind, environment: EnvironmentSpec) -> None:
    name, taken = environment.name, environment.action_kind
    if not taken or trained == taken:
        return
    words = {"absolute": "absolute poses", "delta": "changes (deltas)"}
    asks = "train it on such actions"
    if taken == "delta" and name.startswith("robosuite/"):
        asks = f"add the option {_ABSOLUTE} to the environment's name"
    if _ABSOLUTE in name:
        asks = f"leave {_ABSOLUTE} out of the environment's name"
    if not trained and re.match(r"(metaworld|pusht|scd_memory)\b", name):
        return  # demonstrations of theirs have one kind of action only, and older ones do not say which
    if not trained:
        logger.warning(
            "nothing tells whether the policy was trained on changes or on absolute poses; %s takes actions for %s. If "
            "it was trained on the others, %s",
            name,
            words[taken],
            asks,
        )
        return
    raise ConfigError(
        f"the policy was trained on actions that are {words[trained]}, environment {name!r} takes them for "
        f"{words[taken]}; {asks}"
    )
