"""One environment in a process of its own, so that simulators run side by side and may crash or hang alone.

The worker is spawned, never forked (OpenGL and thread pools do not survive a fork), and answers over a pipe. What goes
wrong in it comes back in one of two ways:

- errors that the user can mend (`MissingDependencyError`, `UnknownNameError`, ...) are raised as themselves;
- everything else that happens during an episode (an exception in the simulator, a dead process, no answer in time)
  raises `WorkerCrashError`; the worker is then only good for `restart` or `close`.
"""

import contextlib
import functools
import importlib
import logging
import multiprocessing
import os
import pickle
import re
import select
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Self

from scd_robot.errors import ConfigError, RenderError, ScdRobotError, SimulatorError, UnknownNameError
from scd_robot.sim_eval.foreign import start_foreign
from scd_robot.sim_eval.messages import StepCodec, receive_message
from scd_robot.sim_eval.result import collect_versions
from scd_robot.types import Environment, EnvironmentSpec

__all__ = [
    "EnvironmentSource",
    "EnvironmentWorker",
    "WorkerCrashError",
    "close_workers",
    "describe_source",
    "load_environment",
    "serve",
    "start_workers",
]

logger = logging.getLogger(__name__)

EnvironmentSource = str | Callable[[], Environment]
"""A registry name ("metaworld/push-v3"), a dotted name ("package.module:callable"), or a picklable callable."""

_DOTTED_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
_COMMANDS = ("reset", "step", "state_hash", "render", "versions")
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
_CLOSE_TIMEOUT_S = 5.0


class WorkerCrashError(SimulatorError):
    """The simulator raised an exception, its process died, or it did not answer in time."""


def describe_source(source: EnvironmentSource) -> str:
    """The name under which an environment appears in messages, before it exists."""
    if isinstance(source, functools.partial):
        source = source.func
    return source if isinstance(source, str) else getattr(source, "__qualname__", type(source).__name__)


def load_environment(source: EnvironmentSource) -> Environment:
    """Makes the environment in this process.

    Raises:
        UnknownNameError: there is no environment, or no callable, of this name.
        MissingDependencyError: its simulator is not installed.
    """
    if not isinstance(source, str):
        return source()
    if not _DOTTED_NAME.fullmatch(source):
        from scd_robot.sim_eval.registry import make_environment

        return make_environment(source)
    module_name, _, attribute = source.partition(":")
    module = importlib.import_module(module_name)
    if not hasattr(module, attribute):
        raise UnknownNameError(f"callable in module {module_name}", attribute, vars(module))
    environment: Environment = getattr(module, attribute)()
    return environment


class EnvironmentWorker:
    """An environment in a spawned process.

    Args:
        source: which environment.
        timeout_s: seconds within which a command must be answered; a worker that takes longer counts as hung.
        startup_timeout_s: the same for starting the process and making the environment.
        python: interpreter of another environment, in which the simulator is installed; None = this one.

    Raises:
        ConfigError: the source cannot travel to the process, or there is no such interpreter.
    """

    def __init__(
        self,
        source: EnvironmentSource,
        *,
        timeout_s: float = 60.0,
        startup_timeout_s: float = 180.0,
        python: str | None = None,
    ) -> None:
        self._source, self._python = source, python
        self._timeout_s = timeout_s
        self._startup_timeout_s = startup_timeout_s
        self._spec: EnvironmentSpec | None = None
        self._closed = False
        self._start()

    @property
    def spec(self) -> EnvironmentSpec:
        """What the environment offers; waits for the worker to be ready.

        Raises:
            ScdRobotError: the environment could not be made.
        """
        if self._spec is None:
            self._set_spec(self._wait_until_ready())
        assert self._spec is not None
        return self._spec

    def send(self, command: str, *args: Any) -> None:
        """Starts `reset(seed)`, `step(action)`, `state_hash()`, `render(height, width)` or `versions()`.

        `receive` has the result.
        """
        assert command in _COMMANDS, command
        assert self._spec is not None, "the worker's spec has not been asked for"
        message = self._codec.pack_action(*args) if command == "step" else None
        # A pipe that is broken already is reported by `receive`, like one that breaks later.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            if message is None:
                self._connection.send((command, args))
            else:
                self._connection.send_bytes(message)

    def receive(self) -> Any:
        """The result of the command that was sent.

        Raises:
            WorkerCrashError: the simulator crashed, died or hung.
            ScdRobotError: an error of the user's kind, as raised in the worker.
        """
        return self._receive(self._timeout_s)

    def call(self, command: str, *args: Any) -> Any:
        """`send`, then `receive`."""
        self.send(command, *args)
        return self.receive()

    def restart(self) -> None:
        """Replaces the process, which may be dead or hung, by a fresh one; returns when that is ready.

        Raises:
            ScdRobotError: the environment could not be made this time.
        """
        self._kill()
        self._start()
        self._set_spec(self._wait_until_ready())

    def close(self) -> None:
        """Ends the process, kindly if it listens; may be called twice."""
        if self._closed:
            return
        self.begin_close()
        self._closed = True
        self._process.join(_CLOSE_TIMEOUT_S)
        self._kill()

    def begin_close(self) -> None:
        """Asks the process to end, without waiting for it; `close` has still to be called."""
        if not self._closed:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                self._connection.send(("close", ()))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _set_spec(self, spec: EnvironmentSpec) -> None:
        self._spec, self._codec = spec, StepCodec(spec)

    def _start(self) -> None:
        self._start_process()
        self._poll = select.poll()  # kept: Connection.poll makes one for every call
        self._poll.register(self._connection.fileno(), select.POLLIN)

    def _start_process(self) -> None:
        if self._python is not None:
            if not isinstance(self._source, str):
                raise ConfigError(f"another python needs the environment's name, got {describe_source(self._source)}")
            self._process: Any
            with _single_threaded_children():
                self._process, self._connection = start_foreign(self._python, self._source)
            return
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, self._source), daemon=True)
        try:
            with _single_threaded_children():
                self._process.start()
        except (AttributeError, TypeError, pickle.PicklingError) as error:  # the source does not travel
            raise ConfigError(
                f"an environment given as a callable must be picklable (a module's function, or functools.partial of "
                f"one), got {describe_source(self._source)}: {error}"
            ) from error
        theirs.close()  # so that a dead worker ends the stream

    def _wait_until_ready(self) -> EnvironmentSpec:
        name = describe_source(self._source)
        try:
            spec: EnvironmentSpec = self._receive(self._startup_timeout_s)
        except WorkerCrashError as error:
            died = isinstance(error.__cause__, (EOFError, ConnectionResetError))
            hint = "; a script that starts workers needs `if __name__ == '__main__':` around its main part"
            if self._python is not None:
                hint = f"; is scd_robot installed for {self._python}? See what it printed above"
            raise SimulatorError(f"environment {name!r} could not be started: {error}{hint if died else ''}") from error
        return spec

    def _receive(self, timeout_s: float) -> Any:
        try:
            if not self._poll.poll(1e3 * timeout_s):
                self._process.kill()
                raise WorkerCrashError(f"the simulator did not answer within {timeout_s:g} s")
            message = receive_message(self._connection)
        except (EOFError, ConnectionResetError) as error:
            self._process.join(_CLOSE_TIMEOUT_S)
            raise WorkerCrashError(f"the simulator's process died (exit code {self._process.exitcode})") from error
        if isinstance(message, bytes):
            return self._codec.unpack_result(message)
        kind, payload = message
        if kind == "error":
            raise _rebuild_error(*payload)
        if kind == "crash":
            raise WorkerCrashError(payload)
        return payload

    def _kill(self) -> None:
        if self._process.is_alive():
            self._process.kill()
        self._process.join()
        self._process.close()
        self._connection.close()


def start_workers(
    source: EnvironmentSource,
    count: int,
    *,
    timeout_s: float = 60.0,
    startup_timeout_s: float = 180.0,
    python: str | None = None,
) -> list[EnvironmentWorker]:
    """Starts `count` workers at the same time and waits until all are ready; arguments as for one.

    Raises:
        ScdRobotError: the environment could not be made; no process is left behind.
    """
    workers: list[EnvironmentWorker] = []
    try:
        for _ in range(count):
            options: Any = {"timeout_s": timeout_s, "startup_timeout_s": startup_timeout_s, "python": python}
            workers.append(EnvironmentWorker(source, **options))
        for worker in workers:
            _ = worker.spec
    except BaseException:
        close_workers(workers)
        raise
    return workers


def close_workers(workers: Sequence[EnvironmentWorker]) -> None:
    """Ends all processes at the same time."""
    for worker in workers:
        worker.begin_close()
    for worker in workers:
        worker.close()


@contextlib.contextmanager
def _single_threaded_children() -> Iterator[None]:
    """Processes started inside get one thread per numerical library: there is one process per core already.

    The libraries read these variables when they are loaded, which is before any code of ours runs in the child.
    """
    before = {name: os.environ.get(name) for name in _THREAD_VARIABLES}
    os.environ.update(dict.fromkeys(_THREAD_VARIABLES, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def serve(connection: Connection, source: EnvironmentSource) -> None:
    """The worker's whole life: make the environment, answer commands until told to stop or abandoned."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    try:
        environment = load_environment(source)
        codec = StepCodec(environment.spec)
        connection.send(("ok", environment.spec))
    except Exception as error:
        _send_error(connection, error, starting=True)
        return
    try:
        while True:
            try:
                message = receive_message(connection)
            except (EOFError, ConnectionResetError):  # the parent is gone
                return
            command, args = ("step", (codec.unpack_action(message),)) if isinstance(message, bytes) else message
            if command == "close":
                return
            try:
                answer = collect_versions() if command == "versions" else getattr(environment, command)(*args)
                packed = codec.pack_result(answer) if command == "step" else None
                if packed is None:
                    connection.send(("ok", answer))
                else:
                    connection.send_bytes(packed)
            except BrokenPipeError:
                return
            except Exception as error:
                _send_error(connection, error, starting=False)
    finally:
        environment.close()


def _send_error(connection: Connection, error: Exception, *, starting: bool) -> None:
    crash = isinstance(error, SimulatorError) and not isinstance(error, RenderError) and not starting
    with contextlib.suppress(BrokenPipeError):
        if isinstance(error, ScdRobotError) and not crash:
            connection.send(("error", (type(error), str(error), vars(error))))
        else:
            logger.debug("crash in a worker", exc_info=error)
            frame = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{os.path.basename(frame.filename)}:{frame.lineno}"
            connection.send(("crash", f"{type(error).__name__} at {where}: {error}"))


def _rebuild_error(kind: type[ScdRobotError], message: str, state: dict[str, Any]) -> ScdRobotError:
    """The error as it was, without its constructor, which may take other arguments than the message."""
    error = kind.__new__(kind, message)
    error.__dict__.update(state)
    return error
