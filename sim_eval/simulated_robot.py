"""A robot for the control loop: a simulator that goes on by the wall clock in a process of its own.

It does not wait for the loop: a control step is over when its time is, and where no new command has come it goes on
with the last one, or stands still. So the loop is tried against time as it will be on a robot.

Shapes: Da action width.
"""

import contextlib
import multiprocessing
import signal
import threading
import time
from collections.abc import Mapping
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from types import TracebackType
from typing import Any, Self

import numpy as np

from scd_robot.control.interfaces import Command, Sample
from scd_robot.control.limits import Limits
from scd_robot.errors import SimulatorError
from scd_robot.sim_eval.serving import EnvironmentSource, load_environment
from scd_robot.types import Environment, EnvironmentSpec

__all__ = ["SimulatedRobot", "limits_of"]

_CREDIT = 4  # samples that may be on their way
_STARTUP_TIMEOUT_S = 180.0
_CLOSE_TIMEOUT_S = 5.0


class SimulatedRobot:
    """A `scd_robot.control.Robot` in a simulator.

    Args:
        source: which environment.
        seed: of its start state.
        rest: (Da,) what its commands are at a standstill, see `Limits`; None = as `limits_of` has it.
        pose_key: the observation that is the robot's pose, in the units of commands; None = what the environment calls
            its standstill, if it does.
        control_dt: seconds per control step; None = the environment's. Longer is slow motion.

    Attributes:
        spec: of the environment.
        success: whether there was a step that its success condition held in.
        finished: whether the episode is over; from then on it stands still.
        steps: control steps of the simulator, in the newest sample.

    Raises:
        SimulatorError: the simulator does not start. Later, from `observe` and `send`, that its process has died.
    """

    def __init__(
        self,
        source: EnvironmentSource,
        seed: int,
        *,
        rest: tuple[float | None, ...] | None = None,
        pose_key: str | None = None,
        control_dt: float | None = None,
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        arguments = (theirs, source, seed, rest, control_dt)
        self._process = context.Process(target=_live, args=arguments, daemon=True)
        self._process.start()
        theirs.close()
        self._pose_key = pose_key
        self._sample: Sample | None = None
        self.success = self.finished = False
        self.steps = 0
        if not self._connection.poll(_STARTUP_TIMEOUT_S):
            self.close()
            raise SimulatorError(f"the simulator did not start within {_STARTUP_TIMEOUT_S:g} s")
        self.spec: EnvironmentSpec = self._receive()

    def observe(self) -> Sample:
        """The newest sample."""
        while self._sample is None or self._connection.poll():
            told = self._receive()
            self._send_message(("more", None))
            observation: Mapping[str, np.ndarray[Any, Any]] = told["observation"]
            pose = told["pose"] if self._pose_key is None else np.asarray(observation[self._pose_key], np.float64)
            self._sample = Sample(observation, told["stamp_s"], pose, told["executed"])
            self.steps, self.finished = told["steps"], told["finished"]
            self.success = self.success or told["success"]
        return self._sample

    def send(self, command: Command) -> None:
        """Follows this command from the simulator's next control step on."""
        self._send_message(("command", np.asarray(command, np.float32)))

    def hold(self) -> None:
        """Stands still."""
        self._send_message(("hold", None))

    def close(self) -> None:
        """Ends the process; may be called twice."""
        if self._connection.closed:
            return
        with contextlib.suppress(SimulatorError):
            self._send_message(("close", None))
        self._process.join(_CLOSE_TIMEOUT_S)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _send_message(self, message: tuple[str, Any]) -> None:
        try:
            self._connection.send(message)
        except OSError as error:
            raise SimulatorError("the simulator's process has died") from error

    def _receive(self) -> Any:
        try:
            kind, payload = self._connection.recv()
        except (EOFError, OSError) as error:
            raise SimulatorError("the simulator's process has died") from error
        if kind == "crash":
            raise SimulatorError(f"the simulator failed: {payload}")
        return payload


def limits_of(
    spec: EnvironmentSpec, *, rest: tuple[float | None, ...] | None = None, velocity: float = float("inf")
) -> Limits:
    """The bounds of an environment's actions as limits.

    Args:
        spec: of the environment.
        rest: (Da,) see `Limits`; None = by the kind of the actions: the last place where they are absolute, else 0.
        velocity: most change of a command, in parts of its range per second.
    """
    most = tuple(velocity * (high - low) for low, high in zip(spec.action_low, spec.action_high, strict=True))
    anything = (float("inf"),) * spec.action_dim
    return Limits(spec.action_low, spec.action_high, most, anything, _rest_of(spec) if rest is None else rest)


def _rest_of(spec: EnvironmentSpec) -> tuple[float | None, ...]:
    """(Da,) what stands still, see `Limits`."""
    return (None if spec.action_kind == "absolute" else 0.0,) * spec.action_dim


class _Outbox:
    """Sends the newest sample from a thread: pictures fill a pipe, and the simulator never waits for a reader."""

    def __init__(self, connection: Connection) -> None:
        self._connection, self._changed = connection, threading.Condition()
        self._newest: bytes | None = None
        self._credit = _CREDIT
        self.sending = threading.Lock()
        threading.Thread(target=self._run, name="samples", daemon=True).start()

    def put(self, sample: Mapping[str, Any]) -> None:
        """Takes the place of one that was not sent yet."""
        message = bytes(ForkingPickler.dumps(("sample", sample)))  # now: a simulator may write into its arrays
        with self._changed:
            self._newest = message
            self._changed.notify()

    def more(self) -> None:
        """One was read."""
        with self._changed:
            self._credit += 1
            self._changed.notify()

    def _run(self) -> None:
        with contextlib.suppress(OSError):  # the loop's process is gone, which the simulator sees by itself
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._newest is not None and self._credit > 0)
                    message, self._newest = self._newest, None
                    self._credit -= 1
                assert message is not None
                with self.sending:
                    self._connection.send_bytes(message)


def _live(
    connection: Connection,
    source: EnvironmentSource,
    seed: int,
    rest: tuple[float | None, ...] | None,
    control_dt: float | None,
) -> None:
    """The process: a control step whenever its time has come."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the loop ends it
    outbox = _Outbox(connection)
    try:
        environment = load_environment(source)
        with contextlib.closing(environment):
            observation = environment.reset(seed)
            connection.send(("spec", environment.spec))
            dt = control_dt or environment.spec.control_dt
            _step_by_the_clock(connection, outbox, environment, observation, rest, dt)
    except (BrokenPipeError, EOFError, ConnectionResetError):  # the loop's process is gone
        return
    except Exception as error:
        with contextlib.suppress(OSError), outbox.sending:
            connection.send(("crash", f"{type(error).__name__}: {error}"))


def _step_by_the_clock(
    connection: Connection,
    outbox: _Outbox,
    environment: Environment,
    observation: Mapping[str, Any],
    rest: tuple[float | None, ...] | None,
    control_dt: float,
) -> None:
    at_rest = _rest_of(environment.spec) if rest is None else rest
    still = np.array([np.nan if x is None else x for x in at_rest], np.float32)
    pose_of = getattr(environment, "standstill", lambda: None)
    command: np.ndarray[Any, Any] | None = None  # None before the first one: the simulator's time stands
    executed, steps, finished, success = None, 0, False, False
    due = time.monotonic()
    while True:
        told = {"observation": observation, "stamp_s": time.monotonic(), "executed": executed, "steps": steps}
        pose = pose_of()
        told["pose"] = None if pose is None else np.array(pose, np.float64)
        outbox.put({**told, "finished": finished, "success": success})
        due = max(due + control_dt, time.monotonic())
        while connection.poll(max(0.0, due - time.monotonic())):
            kind, value = connection.recv()
            if kind == "close":
                return
            if kind == "more":
                outbox.more()
            elif kind == "command":
                command = value
            elif command is not None:  # hold
                command = np.where(np.isnan(still), command, still)
        if command is None or finished:
            continue
        result = environment.step(command.astype(np.float32))
        observation, executed, steps, success = result.observation, result.executed_action, steps + 1, result.success
        finished = result.terminated or result.truncated or success
