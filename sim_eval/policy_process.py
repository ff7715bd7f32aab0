"""A policy under another Python: for policies whose requirements clash with those of scd_robot.

That Python needs numpy and what the policy needs, and no scd_robot. The two processes talk over a socket pair that
nobody else can reach, in JSON and arrays of numbers (see `policy_server`).

Shapes: B rows, Da action width.
"""

import contextlib
import dataclasses
import logging
import os
import socket
import subprocess
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import scd_robot
from scd_robot.errors import ConfigError
from scd_robot.sim_eval.policy_adapter import PolicyError
from scd_robot.sim_eval.policy_server import pack, spec_from_json, unpack
from scd_robot.types import ActionArray, EnvironmentSpec, Observation, PolicySpec

__all__ = ["PolicyProcess"]

logger = logging.getLogger(__name__)

_END_S = 5.0

# Arguments: the socket's number, the path of scd_robot and that of the server. Of scd_robot only what needs nothing but
# numpy is imported, by its path: the folder it lies in, and what else is there, stays out of sys.path.
_PROGRAM = """
import importlib.util, sys
if sys.path[0] == "":
    del sys.path[0]  # modules of the current folder come last, not first
def load(name, path, **options):
    spec = importlib.util.spec_from_file_location(name, path, **options)
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
package, server = sys.argv[2:4]
load("scd_robot", package + "/__init__.py", submodule_search_locations=[package])
load("scd_policy_server", server)
"""


class PolicyProcess:
    """The policy that a dotted name makes under another Python, with `reset` and `act` as if it were here.

    Args:
        python: path of the interpreter, 3.11 or later.
        name: `package.module:callable`; the module is installed there, or lies in `folder`.
        options: keyword arguments of the callable, plain JSON types.
        environment: for a callable that has a parameter of this name.
        folder: the process's current folder; None = this one's.

    Attributes:
        provenance: what the policy is, see `policy_server.build_policy`; "python" is the interpreter.
        spec: its `PolicySpec`, where it has one.
        planned: (B,) which rows the last `act` planned for; None where the policy does not tell.
        takes_rows: whether its `reset` begins episodes in some rows while others go on.

    Raises:
        ConfigError: the interpreter cannot be started, or the policy not be made.
        PolicyError: making it failed for another reason.
    """

    def __init__(
        self,
        python: str,
        name: str,
        options: Mapping[str, Any] | None = None,
        environment: EnvironmentSpec | None = None,
        folder: Path | None = None,
    ) -> None:
        self._python, self._name = python, name
        self._start(folder)
        described = None if environment is None else dataclasses.asdict(environment)
        about = self._call({"name": name, "options": dict(options or {}), "environment": described})[0]
        self.provenance = {**about["provenance"], "python": python}
        self.spec: PolicySpec | None = None if about["spec"] is None else spec_from_json(PolicySpec, about["spec"])
        self.planned: NDArray[np.bool_] | None = None
        self.takes_rows: bool = about["takes_rows"]

    def _start(self, folder: Path | None) -> None:
        package = Path(scd_robot.__file__).parent
        ours, theirs = socket.socketpair()
        with ours, theirs:
            descriptor = theirs.fileno()
            arguments = [str(descriptor), str(package), str(Path(__file__).with_name("policy_server.py"))]
            # Its own packages, not those that PYTHONPATH names for this Python.
            environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
            try:
                self._process = subprocess.Popen(
                    [os.path.abspath(self._python), "-c", _PROGRAM, *arguments],
                    pass_fds=(descriptor,),
                    stdin=subprocess.DEVNULL,
                    env=environment,
                    cwd=folder,
                )
            except OSError as error:
                reason = error.strerror or error
                raise ConfigError(
                    f"cannot start {self._python}: {reason}; name the python of an environment"
                ) from error
            self._connection = Connection(ours.detach())

    def reset(self, rows: Sequence[int] | None = None, episodes: Sequence[int] | None = None) -> None:
        """Begins new episodes, see `types.Policy`."""
        self._call({"call": "reset", "rows": _integers(rows), "episodes": _integers(episodes)})

    def act(self, observation: Observation, executed_action: ActionArray | None = None) -> ActionArray:
        """One control step, see `types.Policy`."""
        arrays = {f"observation/{key}": np.asarray(value) for key, value in observation.items()}
        if executed_action is not None:
            arrays["executed_action"] = executed_action
        planned, answer = self._call({"call": "act"}, arrays)
        self.planned = None if planned is None else np.array(planned, bool)
        return answer["action"]

    def drain_timings(self) -> dict[str, list[float]]:
        """What the policy measured itself, in its own process; see `PolicyAdapter`."""
        timings: dict[str, list[float]] = self._call({"call": "timings"})[0]
        return timings

    def close(self) -> None:
        """Ends the process; may be called twice."""
        self._connection.close()
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> "PolicyProcess":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_connection"):
            with contextlib.suppress(OSError):
                self.close()

    def _call(self, message: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]] | None = None) -> Any:
        """Value and arrays of the answer."""
        try:
            self._connection.send_bytes(pack(message, arrays))
            answer, found = unpack(self._connection.recv_bytes())
        except (EOFError, BrokenPipeError, ConnectionResetError) as error:
            code = self._process.wait()
            raise PolicyError(
                f"the process of the policy {self._name} died with code {code}; see what {self._python} printed. It "
                "must be Python 3.11 or later with numpy"
            ) from error
        if "error" in answer:
            logger.debug("%s", answer["traceback"])
            kind = ConfigError if answer["error"] == "refused" else PolicyError
            raise kind(f"{answer['message']} (the policy {self._name}, in a process of {self._python})")
        return answer["ok"], found


def _integers(values: Sequence[int] | None) -> list[int] | None:
    return None if values is None else [int(value) for value in values]
