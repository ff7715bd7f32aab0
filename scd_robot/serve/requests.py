"""What a client asks for: an observation, and what it tells about its episode beside it. docs/serving.md has the table.

Shapes: n control steps, d committed actions, m remaining actions, Da action width.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scd_robot.errors import ConfigError, ShapeError, UnknownNameError
from scd_robot.serve.observations import ObservationReader, flatten
from scd_robot.types import ActionArray, RunningChunk

__all__ = ["Request", "RequestReader"]

_GUIDANCE = ("scd/running", "scd/delay_steps", "scd/max_gain", "scd/identity")
_OURS = (
    "scd/reset",
    "scd/episode",
    "scd/step",
    "scd/executed",
    "scd/observe_only",
    "scd/prefix",
    *_GUIDANCE,
    "scd/snapshot",
    "scd/restore",
)
_DIALECTS = ("endpoint", "reset", "session_id", "prompt")
_LAST_STEP = 2**31
_INF = float("inf")


@dataclass(frozen=True)
class Request:
    """One message of a client, checked.

    Attributes:
        observation: by the checkpoint's keys, None for what did not come in this control step; None = there is none.
        reset: forget the history before this observation.
        episode: keys the noise of the history that begins; None = the server counts.
        step: control step of the observation, as the client counts; None = not told.
        executed: (n, Da) actions executed since the last observation, oldest first; None = as planned.
        observe_only: extend the history without a plan.
        prefix: (d, Da) actions already committed, from this control step on.
        running: (1, m, Da) what is left of the chunk that the client executes; the plan is guided towards it.
        snapshot: keep the history under this name, after the observation if there is one.
        restore: go on with the history kept under this name.
        session: name of the episode, in the dialect that has one.
        prompt: the task in words; None = there is none, or an empty one.
        wants_text: the answer to a reset is a text, as in the dialect with "endpoint".
    """

    observation: Mapping[str, NDArray[Any] | None] | None = None
    reset: bool = False
    episode: int | None = None
    step: int | None = None
    executed: ActionArray | None = None
    observe_only: bool = False
    prefix: ActionArray | None = None
    running: RunningChunk | None = None
    snapshot: str | None = None
    restore: str | None = None
    session: str | None = None
    prompt: str | None = None
    wants_text: bool = False

    @property
    def kind(self) -> str:
        """For counters."""
        if self.observation is None:
            return "control"
        return "observe" if self.observe_only else "plan"


class RequestReader:
    """Checks messages.

    Args:
        observations: for what was seen.
        action_dim: Da.
        chunk_length: more actions than d cannot be committed.
    """

    def __init__(self, observations: ObservationReader, action_dim: int, chunk_length: int) -> None:
        self.observations = observations
        self._action_dim = action_dim
        self._chunk_length = chunk_length

    def read(self, message: Mapping[str, Any]) -> Request:
        """The request that a message is.

        Raises:
            ScdRobotError: it is none; the message says why.
        """
        flat = flatten(message)
        own = {key: flat.pop(key) for key in [*_OURS, *_DIALECTS] if key in flat}
        for key in flat:
            if key.startswith("scd/"):
                raise UnknownNameError("key of a request", key, _OURS)
        endpoint = _text(own, "endpoint") or "infer"
        if endpoint not in ("infer", "reset"):
            raise UnknownNameError("endpoint", endpoint[:80], ("infer", "reset"))
        reset = _flag(own, "scd/reset") or _flag(own, "reset") or endpoint == "reset"
        restore, snapshot = _text(own, "scd/restore"), _text(own, "scd/snapshot")
        if reset and restore is not None:
            raise ConfigError("scd/reset and scd/restore exclude each other; send one")
        observation = None
        if endpoint != "reset" and (flat or not (reset or restore is not None or snapshot is not None)):
            observation = self.observations.read(flat)
        step, episode = _count(own, "scd/step"), _count(own, "scd/episode")
        if episode is not None and not reset:
            raise ConfigError("scd/episode numbers the history that begins; send scd/reset with it")
        return Request(
            observation=observation,
            reset=reset,
            episode=episode,
            step=step,
            executed=self._actions(own, "scd/executed"),
            observe_only=_flag(own, "scd/observe_only"),
            prefix=self._prefix(own),
            running=self._running(own),
            snapshot=snapshot,
            restore=restore,
            session=_text(own, "session_id"),
            prompt=_text(own, "prompt") or None,
            wants_text=endpoint == "reset",
        )

    def _prefix(self, own: Mapping[str, Any]) -> ActionArray | None:
        prefix = self._actions(own, "scd/prefix")
        if prefix is not None and len(prefix) >= self._chunk_length:
            raise ConfigError(f"scd/prefix holds {len(prefix)} actions, a plan has {self._chunk_length}; commit fewer")
        return prefix

    def _running(self, own: Mapping[str, Any]) -> RunningChunk | None:
        actions = self._actions(own, "scd/running")
        told = [key for key in _GUIDANCE[1:] if own.get(key) is not None]
        if actions is None:
            if told:
                raise ConfigError(f"{told[0]} goes with scd/running, the actions that the plan is guided towards")
            return None
        if len(actions) >= self._chunk_length:
            raise ConfigError(
                f"scd/running holds {len(actions)} actions, a plan has {self._chunk_length}; leave executed ones out"
            )
        delay, gain = _count(own, "scd/delay_steps"), own.get("scd/max_gain")
        gain = RunningChunk.max_gain if gain is None else gain
        if delay is None or delay > len(actions):
            raise ConfigError(
                "scd/running goes with scd/delay_steps, how many of its actions are carried out while a plan is made: "
                f"0 to {len(actions)}, got {'nothing' if delay is None else delay}"
            )
        if (
            isinstance(gain, bool)
            or not isinstance(gain, int | float | np.integer | np.floating)
            or not 0 < gain < _INF
        ):
            raise ConfigError(f"scd/max_gain must be a positive finite number, got {gain!r:.80}")
        return RunningChunk(actions[None], delay, float(gain), exact=not _flag(own, "scd/identity"))

    def _actions(self, own: Mapping[str, Any], key: str) -> ActionArray | None:
        value = own.get(key)
        if value is None:
            return None
        if not isinstance(value, np.ndarray):
            raise ShapeError(f"{key} must be an array, got {type(value).__name__}")
        actions = value[None] if value.ndim == 1 else value
        if actions.ndim != 2 or actions.shape[1] != self._action_dim or not len(actions):
            raise ShapeError(f"{key} must be (n, {self._action_dim}) with n >= 1, got {value.shape}")
        with np.errstate(over="ignore"):
            actions = actions.astype(np.float32)
        if not np.isfinite(actions).all():
            raise ShapeError(f"{key} holds a NaN or infinite value")
        return actions


def _flag(own: Mapping[str, Any], key: str) -> bool:
    value = own.get(key, False)
    if not isinstance(value, bool | np.bool_):
        raise ConfigError(f"{key} must be true or false, got {type(value).__name__}")
    return bool(value)


def _count(own: Mapping[str, Any], key: str) -> int | None:
    value = own.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or not 0 <= value <= _LAST_STEP:
        raise ConfigError(f"{key} must be a whole number from 0 to {_LAST_STEP}, got {value!r:.80}")
    return int(value)


def _text(own: Mapping[str, Any], key: str) -> str | None:
    value = own.get(key)
    if value is not None and not isinstance(value, str):
        raise ConfigError(f"{key} must be a text, got {type(value).__name__}")
    return None if value is None else value[:1000]
