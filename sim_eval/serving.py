"""A worker's process from the inside: makes the environments and answers the parent's commands; see `workers`."""

import contextlib
import ctypes
import dataclasses
import logging
import os
import signal
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scd_robot.errors import ConfigError, RenderError, ScdRobotError, SimulatorError
from scd_robot.sim_eval.messages import StepCodec, checked_observation, checked_result, receive_message
from scd_robot.sim_eval.provenance import collect_versions
from scd_robot.sim_eval.registry import make_environment
from scd_robot.types import ActionArray, Environment, StepResult

__all__ = ["EnvironmentSource", "load_environment", "serve"]

logger = logging.getLogger(__name__)

EnvironmentSource = str | Callable[[], Environment]
"""A registry name ("metaworld/push-v3"), a dotted name ("package.module:callable"), or a picklable callable."""


def load_environment(source: EnvironmentSource) -> Environment:
    """Makes the environment in this process.

    Raises:
        ScdRobotError: see `make_environment`.
    """
    if isinstance(source, str):
        return make_environment(source)
    if not callable(source):
        raise ConfigError(
            f"an environment is given by its name or by what makes it, got one that is made already, "
            f"{type(source).__name__}: give the class, or a function that can be pickled; each process makes its own"
        )
    return source()


def serve(connection: Connection, source: EnvironmentSource, count: int = 1, at_work: Any = None) -> None:
    """The worker's whole life: make the environments, answer commands until told to stop or abandoned.

    Args:
        connection: to the parent.
        source: which environment.
        count: so many of them.
        at_work: a shared integer that tells the parent, should this process die, which of them was at work.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    environments: list[Environment] = []
    at_work = at_work if at_work is not None else ctypes.c_int()
    try:
        try:
            environments += [load_environment(source) for _ in range(count)]
            codec = StepCodec(environments[0].spec)
            connection.send(("ok", environments[0].spec))
        except Exception as error:
            _send_error(connection, error, crash=False)
            return
        while True:
            try:
                message = receive_message(connection)
            except (EOFError, ConnectionResetError):  # the parent is gone
                return
            try:
                if isinstance(message, bytes):
                    results = []
                    for slot, action in zip(*codec.unpack_actions(message), strict=True):
                        at_work.value = slot
                        results.append(_step(environments[slot], action))
                    connection.send_bytes(codec.pack_results(results))
                    continue
                command, slot, args = message
                if command == "close":
                    return
                at_work.value = slot
                connection.send(("ok", _answer(environments[slot], command, args)))
            except BrokenPipeError:
                return
            except Exception as error:
                drawn = not isinstance(message, bytes) and message[0] == "render"
                _send_error(connection, error, crash=isinstance(error, SimulatorError) and not drawn)
    finally:
        for environment in environments:
            environment.close()


def _answer(environment: Environment, command: str, args: Sequence[Any]) -> Any:
    if command == "versions":
        return collect_versions()
    if command == "begin":
        observation = checked_observation(environment.reset(*args), environment.spec)
        return observation, _hash(environment), _hand(environment)
    if command == "render":
        return _frame(environment, *args)
    return getattr(environment, command)(*args)


def _step(environment: Environment, action: ActionArray) -> StepResult:
    result, hand = checked_result(environment.step(action), environment.spec), _hand(environment)
    return result if hand is None else dataclasses.replace(result, info={**result.info, "hand": hand})


def _hash(environment: Environment) -> str:
    found = environment.state_hash()
    if not isinstance(found, str):
        raise ConfigError(
            f"state_hash() of environment {environment.spec.name!r} must return hexadecimal digits as a str, got "
            f"{type(found).__name__}; scd_robot.sim_eval.adapter.digest makes them of arrays"
        )
    return found


def _frame(environment: Environment, height: int, width: int) -> NDArray[np.uint8]:
    if not hasattr(environment, "render"):
        raise RenderError(
            f"environment {environment.spec.name!r} has no render(height, width), which gives a picture uint8 (height, "
            "width, 3); docs/evaluation.md shows one"
        )
    frame = np.asarray(environment.render(height, width))
    if frame.dtype != np.uint8 or frame.shape != (height, width, 3):
        raise RenderError(
            f"render({height}, {width}) of environment {environment.spec.name!r} must return a picture uint8 "
            f"({height}, {width}, 3), got {frame.dtype} {frame.shape}"
        )
    return frame


def _hand(environment: Environment) -> NDArray[np.float64] | None:
    hand = getattr(environment, "hand", None)
    return None if hand is None else np.array(hand, np.float64)


def _send_error(connection: Connection, error: Exception, *, crash: bool) -> None:
    with contextlib.suppress(BrokenPipeError):
        if isinstance(error, ScdRobotError) and not crash:
            connection.send(("error", (type(error), str(error), vars(error))))
        else:
            logger.debug("crash in a worker", exc_info=error)
            frame = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{os.path.basename(frame.filename)}:{frame.lineno}"
            connection.send(("crash", f"{type(error).__name__} at {where}: {error}"))
