"""Environments in processes of their own, so that simulators run side by side and may crash or hang alone.

The worker is spawned, never forked (OpenGL and thread pools do not survive a fork), and answers over a pipe. What goes
wrong in it comes back in one of two ways:

- errors that the user can mend (`MissingDependencyError`, `UnknownNameError`, ...) are raised as themselves;
- everything else that happens during an episode (an exception in the simulator, a dead process, no answer in time)
  raises `WorkerCrashError`; the worker is then only good for `restart` or `close`.

A process may hold several environments, in slots: waking it up and talking to it costs more than many a simulator's
control step. They crash together, but the error tells whose fault it was.
"""

import contextlib
import ctypes
import functools
import logging
import multiprocessing
import os
import pickle
import select
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, Self

from scd_robot import __version__
from scd_robot.errors import ConfigError, ScdRobotError, SimulatorError
from scd_robot.sim_eval.foreign import start_foreign
from scd_robot.sim_eval.messages import StepCodec, Steps, receive_message
from scd_robot.sim_eval.provenance import usable_cores
from scd_robot.sim_eval.serving import EnvironmentSource, load_environment, serve
from scd_robot.types import ActionArray, EnvironmentSpec

__all__ = [
    "EnvironmentSource",
    "EnvironmentWorker",
    "WorkerCrashError",
    "close_workers",
    "describe_source",
    "load_environment",
    "start_workers",
]

logger = logging.getLogger(__name__)

_COMMANDS = ("reset", "step", "state_hash", "render", "versions", "begin")
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
_CLOSE_TIMEOUT_S = 5.0
_RESTARTS = 3


class WorkerCrashError(SimulatorError):
    """The simulator raised an exception, its process died, or it did not answer in time.

    Attributes:
        slot: which of the worker's environments was at work.
    """

    slot = 0


def describe_source(source: EnvironmentSource) -> str:
    """The name under which an environment appears in messages, before it exists."""
    if isinstance(source, functools.partial):
        source = source.func
    return source if isinstance(source, str) else getattr(source, "__qualname__", type(source).__name__)


class EnvironmentWorker:
    """One or more environments of one kind in a spawned process.

    Args:
        source: which environment.
        count: so many of them, in slots 0 to count - 1.
        timeout_s: seconds within which a command must be answered; a worker that takes longer counts as hung.
        startup_timeout_s: the same for starting the process and making the environment.
        python: interpreter of another environment, in which the simulator is installed; None = this one.
        core: the processor core it is to stay on; None = wherever the system puts it.

    Attributes:
        closed: it has no process (any more): it was closed, or could not be restarted.

    Raises:
        ConfigError: the source cannot travel to the process, or there is no such interpreter. Whether the interpreter
            fits is told by `spec`.
    """

    def __init__(
        self,
        source: EnvironmentSource,
        count: int = 1,
        *,
        timeout_s: float = 60.0,
        startup_timeout_s: float = 180.0,
        python: str | None = None,
        core: int | None = None,
    ) -> None:
        if python is not None and count > 1:
            raise ConfigError(f"a process of another python has one environment, got {count}")
        self._source, self._python, self.count, self._core = source, python, count, core
        self._at_work = multiprocessing.get_context("spawn").RawValue(
            ctypes.c_int, 0
        )  # the slot; written by the process
        self._timeout_s = timeout_s
        self._startup_timeout_s = startup_timeout_s
        self._asked = 0  # steps
        self._spec: EnvironmentSpec | None = None
        self.closed = False
        self._start()

    @property
    def spec(self) -> EnvironmentSpec:
        """What the environment offers; waits for the worker to be ready.

        Raises:
            ConfigError: the other python is too old, or has another version of scd_robot or none.
            ScdRobotError: the environment could not be made.
        """
        if self._spec is None:
            self._set_spec(self._wait_until_ready())
        assert self._spec is not None
        return self._spec

    def send(self, command: str, *args: Any, slot: int = 0) -> None:
        """Starts a command in the environment of a slot; `receive` has the result.

        Commands: `reset(seed)`, `step(action)`, `state_hash()`, `render(height, width)`, `versions()`, and
        `begin(seed)`, which gives the results of `reset` and `state_hash`, and where the hand is (None = not told).
        Steps tell that as "hand" of their `info`.
        """
        assert command in _COMMANDS, command
        assert self._spec is not None, "the worker's spec has not been asked for"
        # A pipe that is broken already is reported by `receive`, like one that breaks later.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._connection.send((command, slot, args))

    def send_steps(self, slots: Sequence[int], actions: ActionArray) -> None:
        """Starts a control step in each of some slots (n), one after the other, with actions (n, Da).

        `receive_steps` has the results.
        """
        self._asked = len(slots)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._connection.send_bytes(self._codec.pack_actions(slots, actions))

    def receive_steps(self) -> Steps:
        """The results of the steps that were sent, in their order.

        Raises:
            WorkerCrashError, ScdRobotError: see `receive`; the others' results are lost as well.
        """
        results: Steps = self._receive(self._timeout_s * self._asked)
        return results

    def receive(self) -> Any:
        """The result of the command that was sent.

        Raises:
            WorkerCrashError: the simulator crashed, died or hung.
            ScdRobotError: an error of the user's kind, as raised in the worker.
        """
        return self._receive(self._timeout_s)

    def call(self, command: str, *args: Any, slot: int = 0) -> Any:
        """`send`, then `receive`."""
        self.send(command, *args, slot=slot)
        return self.receive()

    def restart(self) -> None:
        """Replaces the process, which may be dead or hung, by a fresh one; returns when that is ready.

        Raises:
            SimulatorError: the environment could not be made again, in several attempts; the worker is closed.
        """
        for attempt in range(1, _RESTARTS + 1):
            self._kill()
            try:
                self._start()
                self._set_spec(self._wait_until_ready())
            except (ScdRobotError, OSError) as error:  # the system may have no process to give
                if attempt == _RESTARTS:
                    self.closed = True
                    self._kill()
                    raise SimulatorError(
                        f"the simulator did not start again in {_RESTARTS} attempts: {error}"
                    ) from error
                logger.warning("attempt %d to start the environment again: %s", attempt, error)
            else:
                return

    def close(self) -> None:
        """Ends the process, kindly if it listens; may be called twice."""
        if self.closed:
            return
        self.begin_close()
        self.closed = True
        self._process.join(_CLOSE_TIMEOUT_S)
        self._kill()

    def begin_close(self) -> None:
        """Asks the process to end, without waiting for it; `close` has still to be called."""
        if not self.closed:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                self._connection.send(("close", 0, ()))

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
        if self._core is not None:
            _keep_on_core(self._process.pid, self._core)
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
        ours, theirs = context.Pipe()
        process = context.Process(target=serve, args=(theirs, self._source, self.count, self._at_work), daemon=True)
        try:
            with _single_threaded_children():
                process.start()
        except (AttributeError, TypeError, pickle.PicklingError) as error:  # the source does not travel
            raise ConfigError(
                f"an environment given as a callable must be picklable (a module's function, or functools.partial of "
                f"one), got {describe_source(self._source)}: {error}"
            ) from error
        theirs.close()  # so that a dead worker ends the stream
        self._process, self._connection = process, ours

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
                raise self._crash(f"the simulator did not answer within {timeout_s:g} s")
            message = receive_message(self._connection)
        except (EOFError, ConnectionResetError) as error:
            self._process.join(_CLOSE_TIMEOUT_S)
            raise self._crash(f"the simulator's process died (exit code {self._process.exitcode})") from error
        if isinstance(message, bytes):
            return self._codec.unpack_results(message)
        kind, payload = message
        if kind == "error":
            raise _rebuild_error(*payload)
        if kind == "crash":
            raise self._crash(payload)
        if kind == "unusable":
            raise ConfigError(
                f"{self._python} cannot run simulators for this process: it {payload}; that environment needs Python "
                f"3.11 or later and scd_robot {__version__}: docs/install.md"
            )
        return payload

    def _crash(self, message: str) -> WorkerCrashError:
        error = WorkerCrashError(message)
        error.slot = self._at_work.value
        return error

    def _kill(self) -> None:
        if self._connection.closed:  # already
            return
        if self._process.is_alive():
            self._process.kill()
        self._process.join()
        self._process.close()
        self._connection.close()


def start_workers(
    source: EnvironmentSource,
    count: int,
    *,
    processes: int | None = None,
    timeout_s: float = 60.0,
    startup_timeout_s: float = 180.0,
    python: str | None = None,
) -> list[EnvironmentWorker]:
    """Starts workers for `count` environments at the same time and waits until all are ready.

    Args:
        source: which environment.
        count: environments in all; the first workers get one more where they cannot be divided evenly.
        processes: workers; None = one per environment. As many as there are cores share these out among themselves.
        timeout_s: see `EnvironmentWorker`.
        startup_timeout_s: the same.
        python: the same; one environment per process.

    Raises:
        ScdRobotError: the environment could not be made; no process is left behind.
    """
    cores = usable_cores() if processes is not None and python is None else []
    processes = count if processes is None else processes
    workers: list[EnvironmentWorker] = []
    try:
        for number in range(processes):
            options: Any = {"timeout_s": timeout_s, "startup_timeout_s": startup_timeout_s, "python": python}
            options["core"] = cores[number] if len(cores) == processes else None
            workers.append(EnvironmentWorker(source, len(range(number, count, processes)), **options))
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


def _keep_on_core(pid: int, core: int) -> None:
    """Ties a process to a core, and lets it wait there until the process that woke it has gone on.

    Where there is a worker for every core, the system otherwise moves them about at every control step, and stops
    their parent in the middle of waking them: two fifths of the time went that way on two cores.
    """
    with contextlib.suppress(AttributeError, OSError):  # not on this system, or not allowed: it works without
        os.sched_setaffinity(pid, {core})
        os.sched_setscheduler(pid, os.SCHED_BATCH, os.sched_param(0))


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


def _rebuild_error(kind: type[ScdRobotError], message: str, state: dict[str, Any]) -> ScdRobotError:
    """The error as it was, without its constructor, which may take other arguments than the message."""
    error = kind.__new__(kind, message)
    error.__dict__.update(state)
    return error
