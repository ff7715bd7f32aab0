"""Control steps as bytes: the messages that travel between an evaluation and its workers by the million.

Everything else travels as a pickle. What steps say keeps to the environment's specification, so the results of several
environments are rows of one array, which is sent as it lies in memory.

Shapes: n steps of a message, Da action width.
"""

import pickle
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scd_robot.errors import ConfigError, ShapeError
from scd_robot.types import ActionArray, EnvironmentSpec, StepResult

__all__ = ["StepCodec", "Steps", "checked_observation", "checked_result", "receive_message"]

_STEPS = b"\x00"  # no pickle begins with it
_HEAD = struct.Struct("<cxH4x")  # _STEPS, how many
_KEY = "observation/"


@dataclass(frozen=True)
class Steps:
    """Results of one control step in each of some environments; fields as of `StepResult`, arrays not writable.

    Attributes:
        observation: (n, ...) by key.
        reward: (n,).
        success: (n,) bool.
        terminated: (n,) bool.
        truncated: (n,) bool.
        executed_action: (n, Da).
        info: n dictionaries.
    """

    observation: dict[str, NDArray[Any]]
    reward: NDArray[np.float64]
    success: NDArray[np.bool_]
    terminated: NDArray[np.bool_]
    truncated: NDArray[np.bool_]
    executed_action: ActionArray
    info: Sequence[dict[str, Any]]


def receive_message(connection: Connection) -> Any:
    """The next message: bytes if it is packed steps, whatever was sent otherwise."""
    message = connection.recv_bytes()
    return message if message.startswith(_STEPS) else pickle.loads(message)


def checked_observation(observation: dict[str, NDArray[Any]], spec: EnvironmentSpec) -> dict[str, NDArray[Any]]:
    """Passes on an observation that keeps to the environment's own specification.

    Raises:
        ConfigError: it is no dictionary.
        ShapeError: a key is missing, or has another shape or kind of numbers.
    """
    if not isinstance(observation, Mapping):
        raise ConfigError(
            f"environment {spec.name!r} must give an observation as a dictionary of arrays, got "
            f"{type(observation).__name__}; reset(seed) returns it alone, without gymnasium's info"
        )
    for key, wanted in spec.observation.items():
        got = f"only {', '.join(sorted(observation))}"
        if key in observation:
            value = np.asarray(observation[key])
            if value.shape == wanted.shape and (value.dtype == wanted.dtype or np.can_cast(value, wanted.dtype, _KIND)):
                continue
            got = f"{value.dtype} {value.shape}"
        raise ShapeError(
            f"environment {spec.name!r} promises the observation {key!r} as {wanted.dtype} {tuple(wanted.shape)} but "
            f"gave {got}; mend its spec"
        )
    return observation


_KIND: Any = "same_kind"
_NUMBERS = "biuf"  # kinds of dtypes


def checked_result(result: StepResult, spec: EnvironmentSpec) -> StepResult:
    """Passes on what an environment's `step` returned, if it is a result; its observation is not looked at.

    Raises:
        ConfigError: it is something else, or its reward, success, terminated or truncated is no single number.
        ShapeError: its executed action is not (Da,).
    """
    if not isinstance(result, StepResult):
        raise ConfigError(
            f"step(action) of environment {spec.name!r} must return a scd_robot.types.StepResult, got "
            f"{type(result).__name__}"
        )
    for name in ("reward", "success", "terminated", "truncated"):
        value = getattr(result, name)
        if not isinstance(value, bool | float) and (np.ndim(value) or np.asarray(value).dtype.kind not in _NUMBERS):
            wanted = "a number" if name == "reward" else "True or False"
            raise ConfigError(
                f"{name} in a StepResult of environment {spec.name!r} must be {wanted}, got {value!r:.80}"
            )
    executed = np.asarray(result.executed_action)
    if executed.shape != (spec.action_dim,) or executed.dtype.kind not in _NUMBERS:
        raise ShapeError(
            f"executed_action in a StepResult of environment {spec.name!r} must be the ({spec.action_dim},) action "
            f"that was applied after clipping, got {executed.dtype} {executed.shape}"
        )
    return result


class StepCodec:
    """Packs the actions and results of environments of one kind.

    Args:
        spec: the environment's specification.
    """

    def __init__(self, spec: EnvironmentSpec) -> None:
        self._spec = spec
        self._row = np.dtype(
            [
                ("reward", "<f8"),
                ("success", "?"),
                ("terminated", "?"),
                ("truncated", "?"),
                ("executed_action", "<f4", (spec.action_dim,)),
                *((_KEY + key, array.dtype, tuple(array.shape)) for key, array in spec.observation.items()),
            ],
            align=True,
        )

    def pack_actions(self, slots: Sequence[int], actions: ActionArray) -> bytes:
        """A message that asks for one step in each of some slots (n), with actions (n, Da)."""
        head = _HEAD.pack(_STEPS, len(slots)) + np.array(slots, np.uint16).tobytes()
        return head + np.ascontiguousarray(actions, np.float32).tobytes()

    def unpack_actions(self, message: bytes) -> tuple[list[int], ActionArray]:
        """Slots (n) and actions (n, Da)."""
        count = _HEAD.unpack_from(message)[1]
        slots = np.frombuffer(message, np.uint16, count, _HEAD.size).tolist()
        actions = np.frombuffer(message, np.float32, offset=_HEAD.size + 2 * count)
        return slots, actions.reshape(count, self._spec.action_dim).copy()

    def pack_results(self, results: Sequence[StepResult]) -> bytes:
        """A message for the results of n steps.

        Raises:
            ShapeError: an observation is not as the specification says.
        """
        rows = np.zeros(len(results), self._row)
        columns = {name: rows[name] for name in self._row.names or ()}
        for i, result in enumerate(results):
            observation = checked_observation(result.observation, self._spec)
            for key in self._spec.observation:
                columns[_KEY + key][i] = observation[key]
            for name in ("reward", "success", "terminated", "truncated", "executed_action"):
                columns[name][i] = getattr(result, name)
        message = _HEAD.pack(_STEPS, len(results)) + rows.tobytes()
        info = [_plain(result.info) for result in results]
        return message + pickle.dumps(info, pickle.HIGHEST_PROTOCOL) if any(info) else message

    def unpack_results(self, message: bytes) -> Steps:
        """The results of n steps."""
        count = _HEAD.unpack_from(message)[1]
        rows, end = np.frombuffer(message, self._row, count, _HEAD.size), _HEAD.size + count * self._row.itemsize
        return Steps(
            observation={key: rows[_KEY + key] for key in self._spec.observation},
            reward=rows["reward"],
            success=rows["success"],
            terminated=rows["terminated"],
            truncated=rows["truncated"],
            executed_action=rows["executed_action"],
            info=pickle.loads(memoryview(message)[end:]) if end < len(message) else [{}] * count,
        )


def _plain(info: Mapping[str, Any]) -> dict[str, Any]:
    """Arrays as lists: pickles of arrays are not the same in numpy 1 and 2, which may be at either end."""
    return {key: x.tolist() if isinstance(x, np.ndarray | np.generic) else x for key, x in info.items()}
