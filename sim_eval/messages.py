"""Control steps as bytes: the messages that travel between an evaluation and its workers by the million.

Everything else travels as a pickle. A step's observation keeps to the environment's specification, so its numbers
alone are sent, in the specification's order; that takes a fraction of the time of a pickle of arrays.
"""

import pickle
import struct
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scd_robot.types import EnvironmentSpec, StepResult

__all__ = ["StepCodec", "receive_message"]

_STEP = b"\x00"  # no pickle begins with it
_HEAD = struct.Struct("<cB6xd")  # _STEP, flags, padding, reward
_SUCCESS, _TERMINATED, _TRUNCATED, _INFO = 1, 2, 4, 8


def receive_message(connection: Connection) -> Any:
    """The next message: bytes if it is a packed step, whatever was sent otherwise."""
    message = connection.recv_bytes()
    return message if message.startswith(_STEP) else pickle.loads(message)


class StepCodec:
    """Packs the actions and results of one environment.

    Args:
        spec: the environment's specification.
    """

    def __init__(self, spec: EnvironmentSpec) -> None:
        self._action_shape, self._action_bytes = (spec.action_dim,), 4 * spec.action_dim
        self._layout = [
            (key, shape, dtype, int(np.prod(shape)) * dtype.itemsize)
            for key, shape, dtype in (
                (key, tuple(array.shape), np.dtype(array.dtype)) for key, array in spec.observation.items()
            )
        ]

    def pack_action(self, action: Any) -> bytes | None:
        """A message for an action (Da,) float32; None where it is something else, which has to be pickled."""
        fits = isinstance(action, np.ndarray) and action.dtype == np.float32 and action.shape == self._action_shape
        return _STEP + action.tobytes() if fits else None

    def unpack_action(self, message: bytes) -> NDArray[np.float32]:
        """The action (Da,)."""
        return np.frombuffer(message, np.float32, offset=1).copy()

    def pack_result(self, result: StepResult) -> bytes | None:
        """A message for a result; None where it is not as the specification says, and has to be pickled."""
        observation, executed = result.observation, result.executed_action
        if len(observation) != len(self._layout) or not _is_array(executed, self._action_shape, np.dtype(np.float32)):
            return None
        parts = [executed.tobytes()]
        for key, shape, dtype, _ in self._layout:
            array = observation.get(key)
            if not _is_array(array, shape, dtype):
                return None
            parts.append(array.tobytes())  # type: ignore[union-attr]
        flags = _SUCCESS * bool(result.success) | _TERMINATED * bool(result.terminated)
        flags |= _TRUNCATED * bool(result.truncated) | _INFO * bool(result.info)
        if result.info:
            parts.append(pickle.dumps(result.info, pickle.HIGHEST_PROTOCOL))
        return _HEAD.pack(_STEP, flags, float(result.reward)) + b"".join(parts)

    def unpack_result(self, message: bytes) -> StepResult:
        """The result; its arrays own their memory together and may be written to."""
        _, flags, reward = _HEAD.unpack_from(message)
        data, at = bytearray(message), _HEAD.size + self._action_bytes
        observation: dict[str, NDArray[Any]] = {}
        for key, shape, dtype, size in self._layout:
            observation[key] = np.ndarray(shape, dtype, data, at)
            at += size
        return StepResult(
            observation=observation,
            reward=reward,
            success=bool(flags & _SUCCESS),
            terminated=bool(flags & _TERMINATED),
            truncated=bool(flags & _TRUNCATED),
            executed_action=np.ndarray(self._action_shape, np.float32, data, _HEAD.size),
            info=pickle.loads(message[at:]) if flags & _INFO else {},
        )


def _is_array(array: Any, shape: tuple[int, ...], dtype: np.dtype[Any]) -> bool:
    return isinstance(array, np.ndarray) and array.dtype == dtype and array.shape == shape
