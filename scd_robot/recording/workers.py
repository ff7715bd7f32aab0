"""Attempts in their order, made by one process or several: the result is the same for any number of them."""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Generator, Iterator
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from scd_robot.errors import ScdRobotError, SimulatorError
from scd_robot.recording.acting import ChunkingPolicy
from scd_robot.recording.attempt import Attempt, RecordingConfig, run_attempt
from scd_robot.sim_eval.registry import make_environment
from scd_robot.types import Environment

__all__ = ["available_cpus", "run_attempts"]

_AHEAD = 4  # attempts per worker that may be under way or waiting for an earlier one
_JOIN_TIMEOUT_S = 5.0


def available_cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_attempts(
    environment: Environment, config: RecordingConfig, limit: int, workers: int, policy: ChunkingPolicy | None = None
) -> Generator[Attempt, None, None]:
    """Yields the attempts 0, 1, ... up to `limit`; close the generator to end the processes earlier.

    Args:
        environment: the one that `config` names; used where `workers` is 1, else each process makes its own.
        config: of the recording.
        limit: number of attempts.
        workers: number of processes.
        policy: that acts, in this process: `workers` is 1; None = the expert does.

    Raises:
        SimulatorError: a process could not start its simulator, or died.
    """
    if workers == 1:
        for index in range(limit):
            yield run_attempt(environment, config, index, policy)
        return
    pool = _start(config, workers)
    try:
        yield from _in_order(pool, limit)
    finally:
        _stop(pool)


def _in_order(pool: dict[Connection, BaseProcess], limit: int) -> Iterator[Attempt]:
    ahead = _AHEAD * len(pool)
    idle = list(pool)
    waiting: dict[int, Attempt] = {}  # done, but an earlier one is not
    given = 0
    for index in range(limit):
        while index not in waiting:
            while idle and given < min(limit, index + ahead):
                with contextlib.suppress(OSError):  # a process that has ended may have said why: `_receive` tells
                    idle.pop().send(given)
                given += 1
            ready = wait(list(pool))
            for connection in (c for c in pool if c in ready):
                attempt = _receive(connection, pool)
                waiting[attempt.index] = attempt
                idle.append(connection)
        yield waiting.pop(index)


def _receive(connection: Connection, pool: dict[Connection, BaseProcess]) -> Attempt:
    try:
        answer = connection.recv()
    except (EOFError, OSError) as error:
        process = pool[connection]
        process.join(_JOIN_TIMEOUT_S)
        raise SimulatorError(
            f"a recording process died with exit code {process.exitcode} (negative: killed by that signal, for want of "
            'memory perhaps); try workers=1, and call this under `if __name__ == "__main__":` where a script does it'
        ) from error
    if isinstance(answer, str):
        raise SimulatorError(answer)
    return answer


def _start(config: RecordingConfig, workers: int) -> dict[Connection, BaseProcess]:
    """Processes by our end of the pipe to them. Spawned, since a simulator does not survive a fork."""
    context = multiprocessing.get_context("spawn")
    pool: dict[Connection, BaseProcess] = {}
    with _interrupts_ignored():
        for _ in range(workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, config), name="scd-record", daemon=True)
            process.start()
            theirs.close()  # so that the death of the process ends the pipe
            pool[ours] = process
    return pool


def _stop(pool: dict[Connection, BaseProcess]) -> None:
    """Ends all processes at once; what they still work on is not wanted."""
    for connection, process in pool.items():
        connection.close()
        process.terminate()
    for process in pool.values():
        process.join(_JOIN_TIMEOUT_S)
        if process.is_alive():
            process.kill()
            process.join()


@contextlib.contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """Ctrl-C goes to all processes of a terminal; ours inherit that they ignore it, and this one ends them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous: Any = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def _work(connection: Connection, config: RecordingConfig) -> None:
    """A process's loop: receives numbers, sends attempts (or a sentence if no simulator starts)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        environment = make_environment(config.environment)
    except ScdRobotError as error:
        connection.send(str(error))
        return
    with contextlib.suppress(EOFError, OSError):  # the recording has ended, or its process is gone
        while True:
            connection.send(run_attempt(environment, config, connection.recv()))
    environment.close()
