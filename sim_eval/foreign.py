"""A worker's process under another Python: for simulators whose requirements clash with those of the policy.

That Python has an environment of its own with the simulator and scd_robot in it, of this version, for that is what the
messages are made for. The two processes talk over a socket pair that nobody else can reach, in the same messages as
ordinary workers; numpy 1.26 and 2 read each other's arrays.
"""

import contextlib
import os
import socket
import subprocess
import sys
from multiprocessing.connection import Connection

from scd_robot import __version__
from scd_robot.errors import ConfigError

__all__ = ["ForeignProcess", "main", "start_foreign"]

# Runs under any Python 3, so that one that does not fit is told. Arguments: the socket's number and our version.
_PROGRAM = """
import sys
if sys.path[0] == "":
    del sys.path[0]  # modules of the current folder do not count; Python has an option for that only since 3.11

def trouble():
    if sys.version_info < (3, 11):
        return "is Python %d.%d" % tuple(sys.version_info[:2])
    try:
        import scd_robot
    except ImportError as error:
        return "has no scd_robot that works (%s)" % error
    versions = scd_robot.__version__, sys.argv[2]
    if versions[0] != versions[1] and "0+unknown" not in versions:
        return "has scd_robot %s" % versions[0]

reason = trouble()
if reason:
    from multiprocessing.connection import Connection
    connection = Connection(int(sys.argv[1]))
    connection.recv_bytes()
    connection.send(("unusable", reason))
else:
    from scd_robot.sim_eval.foreign import main
    main()
"""


class ForeignProcess:
    """The process, with the methods of `multiprocessing.Process` that a worker needs."""

    def __init__(self, process: "subprocess.Popen[bytes]") -> None:
        self._process = process

    @property
    def exitcode(self) -> int | None:
        """None while it runs."""
        return self._process.poll()

    def is_alive(self) -> bool:
        """Whether it runs."""
        return self._process.poll() is None

    def join(self, timeout: float | None = None) -> None:
        """Waits for its end."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout)

    def kill(self) -> None:
        """Ends it at once."""
        self._process.kill()

    def close(self) -> None:
        """Nothing is left to release once it has ended."""


def start_foreign(python: str, source: str) -> tuple[ForeignProcess, Connection]:
    """Starts a worker under another Python and sends it the name of its environment.

    Args:
        python: path of the interpreter.
        source: registry name or dotted name of the environment.

    Raises:
        ConfigError: there is no such interpreter.
    """
    ours, theirs = socket.socketpair()
    with ours, theirs:
        descriptor = theirs.fileno()
        # Its own packages, not those that PYTHONPATH names for this Python.
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        try:
            process = subprocess.Popen(
                [os.path.abspath(python), "-c", _PROGRAM, str(descriptor), __version__],
                pass_fds=(descriptor,),
                stdin=subprocess.DEVNULL,
                env=environment,
            )
        except OSError as error:
            reason = error.strerror or error
            raise ConfigError(f"cannot start {python}: {reason}; name the python of an environment") from error
        connection = Connection(ours.detach())
        connection.send(source)
    return ForeignProcess(process), connection


def main() -> None:
    """The life of a worker under another Python, which is told the number of its end of the socket pair."""
    from scd_robot.sim_eval.serving import serve

    connection = Connection(int(sys.argv[1]))
    serve(connection, connection.recv())
