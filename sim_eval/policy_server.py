"""A policy in a process of its own: the program of that process, and the messages it understands.

The process may belong to any Python from 3.11 on that has numpy and what the policy needs: `policy_process` starts this
file there by its path and lends it `errors`, `types` and `dotted` of this scd_robot, so that nothing need be installed.

A message is a JSON object and arrays of numbers, and never a pickle:

    4 bytes, length of the JSON | JSON, with names, types and shapes of the arrays as "arrays" | their bytes

Shapes: B rows, Da action width.
"""

import dataclasses
import json
import logging
import os
import signal
import struct
import sys
import traceback
from collections.abc import Mapping
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scd_robot.dotted import begins_rows, call_with_options, describe_module, import_dotted, takes
from scd_robot.errors import ConfigError, ScdRobotError
from scd_robot.types import ArraySpec, EnvironmentSpec, PolicySpec

__all__ = ["build_policy", "main", "pack", "spec_from_json", "unpack"]

_HEAD = struct.Struct("<I")
_NUMBERS = "biuf"  # kinds of numpy types that may travel


# -------------------------------------------------------------------------------------------------------- messages


def pack(message: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]] | None = None) -> bytes:
    """A JSON object and arrays as bytes."""
    ready = {name: np.ascontiguousarray(array) for name, array in (arrays or {}).items()}
    for name, array in ready.items():
        if array.dtype.kind not in _NUMBERS:
            raise ConfigError(f"the array {name!r} must hold numbers to travel to another process, got {array.dtype}")
    head = {**message, "arrays": [[name, array.dtype.str, array.shape] for name, array in ready.items()]}
    text = json.dumps(head).encode()
    return b"".join([_HEAD.pack(len(text)), text, *(array.tobytes() for array in ready.values())])


def unpack(data: bytes) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """Inverse of `pack`; arrays may be written to.

    Raises:
        ConfigError: it is not such a message.
    """
    try:
        (length,) = _HEAD.unpack_from(data)
        message, offset = json.loads(data[_HEAD.size : _HEAD.size + length]), _HEAD.size + length
        arrays = {}
        for name, kind, shape in message.pop("arrays"):
            dtype = np.dtype(kind)
            if dtype.kind not in _NUMBERS:
                raise ValueError(f"{name!r} of type {kind}")
            count = int(np.prod(shape, dtype=np.int64))
            arrays[name] = np.frombuffer(data, dtype, count, offset).reshape(shape).copy()
            offset += count * dtype.itemsize
        if offset != len(data):
            raise ValueError(f"{len(data)} bytes where {offset} were told")
    except (struct.error, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(f"a message between processes is damaged: {error}") from error
    return message, arrays


def spec_from_json(kind: type[Any], fields: Mapping[str, Any]) -> Any:
    """An `EnvironmentSpec` or a `PolicySpec` from the JSON of `dataclasses.asdict`."""
    known = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in fields.items()
        if name != "observation"
    }
    return kind(observation={key: ArraySpec.from_json(spec) for key, spec in fields["observation"].items()}, **known)


# ---------------------------------------------------------------------------------------------------------- policy


def build_policy(name: str, options: Mapping[str, Any], environment: EnvironmentSpec | None) -> Any:
    """The policy that a dotted name makes; its attribute `provenance` tells where it came from.

    Args:
        name: `package.module:callable`.
        options: its keyword arguments.
        environment: is passed where the callable has a parameter `environment`; None = nothing is.

    Raises:
        ConfigError: there is no such callable, or it makes something without `reset` and `act`.
        UnknownNameError: it does not know an option.
    """
    offered = {} if environment is None else {"environment": environment}
    policy = call_with_options(import_dotted(name, "policy"), name, options, **offered)
    for method in ("reset", "act"):
        if not callable(getattr(policy, method, None)):
            raise ConfigError(f"{name} must make an object with reset and act; {type(policy).__name__} has no {method}")
    told = dict(getattr(policy, "provenance", {}))
    module = {"name": name, "options": dict(options), **describe_module(name)}
    try:
        policy.provenance = {"type": name, "settings": dict(options), **told, "module": module}
    except AttributeError as error:
        raise ConfigError(f"{name} must make an object that lets its attribute `provenance` be set: {error}") from error
    return policy


class _Server:
    """Answers the calls of one evaluation."""

    def __init__(self, policy: Any) -> None:
        self._policy = policy

    def describe(self) -> dict[str, Any]:
        """What the other side must know."""
        spec = getattr(self._policy, "spec", None)
        return {
            "takes_rows": begins_rows(self._policy),
            "spec": dataclasses.asdict(spec) if isinstance(spec, PolicySpec) else None,
            "provenance": self._policy.provenance,
            "name": type(self._policy).__name__,
        }

    def answer(self, call: dict[str, Any], arrays: dict[str, NDArray[Any]]) -> bytes:
        """One call, see `policy_process`."""
        if call["call"] == "reset":
            arguments = {key: call[key] for key in ("rows", "episodes") if call[key] is not None}
            self._policy.reset(**{k: v for k, v in arguments.items() if takes(self._policy.reset, k)})
            return pack({"ok": None})
        if call["call"] == "timings":
            drain = getattr(self._policy, "drain_timings", dict)
            return pack({"ok": {name: [float(v) for v in values] for name, values in drain().items()}})
        executed = arrays.pop("executed_action", None)
        observation = {name.removeprefix("observation/"): array for name, array in arrays.items()}
        optional = {"executed_action": executed} if takes(self._policy.act, "executed_action") else {}
        action = np.asarray(self._policy.act(observation, **optional))
        planned = getattr(self._policy, "planned", None)
        return pack({"ok": None if planned is None else [bool(p) for p in planned]}, {"action": action})


def main(descriptor: int) -> None:
    """The life of the process: makes the policy it is told to, answers calls, ends when the other side does.

    Args:
        descriptor: of its end of a socket pair.
    """
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the other side's to handle
    connection = Connection(descriptor)
    server: _Server | None = None
    while True:
        try:
            call, arrays = unpack(connection.recv_bytes())
        except (EOFError, ConnectionResetError):
            return
        try:
            if server is None:
                environment = call["environment"]
                spec = None if environment is None else spec_from_json(EnvironmentSpec, environment)
                server = _Server(build_policy(call["name"], call["options"], spec))
                reply = pack({"ok": server.describe()})
            else:
                reply = server.answer(call, arrays)
        except Exception as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{type(error).__name__} at {os.path.basename(frame.filename)}:{frame.lineno}"
            kind, text = (
                ("refused", str(error)) if isinstance(error, ScdRobotError) else ("failed", f"{where}: {error}")
            )
            reply = pack({"error": kind, "message": text, "traceback": traceback.format_exc()})
        try:
            connection.send_bytes(reply)
        except (BrokenPipeError, ConnectionResetError):
            return


if __name__ == "scd_policy_server":  # as `policy_process` starts it
    main(int(sys.argv[1]))
