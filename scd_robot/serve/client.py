"""A client for policy servers, on numpy, msgpack and websockets alone: a robot's computer needs no torch.

`examples/client.py` is a control loop with it.
"""

import contextlib
import logging
import ssl
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from scd_robot.errors import ConfigError, MissingDependencyError, ScdRobotError
from scd_robot.serve.wire import MessageError, pack, unpack
from scd_robot.types import ActionArray

try:
    from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidURI
    from websockets.sync.client import ClientConnection, connect
except ModuleNotFoundError as error:
    raise MissingDependencyError(
        "a client needs websockets 13 or newer: pip install websockets, or 'scd_robot[serve]'"
    ) from error

__all__ = ["HistoryLostError", "PolicyClient", "RequestRefusedError", "ServerUnreachableError"]

logger = logging.getLogger(__name__)


class ServerUnreachableError(ScdRobotError):
    """No policy server answers at this address, or it lets nobody in."""


class RequestRefusedError(ScdRobotError):
    """The server answered a request with an error."""


class HistoryLostError(ScdRobotError):
    """The connection broke in the middle of an episode, and the server has forgotten its history."""


class PolicyClient:
    """One connection, which is one history of the policy.

    Args:
        address: "ws://host:port", or "wss://" with TLS.
        api_key: that the server asks for.
        tls_ca: file with the certificate of the server's authority (PEM); None = the system's.
        connect_timeout_s: for so long it tries to reach the server, at first and when the connection broke.
        answer_timeout_s: for so long it waits for an answer.
        max_frame_bytes: of an answer.

    Attributes:
        metadata: what the server said first.

    Raises:
        ServerUnreachableError: nobody answers there, or the key is wrong.
    """

    def __init__(
        self,
        address: str,
        *,
        api_key: str | None = None,
        tls_ca: str | Path | None = None,
        connect_timeout_s: float = 10.0,
        answer_timeout_s: float = 60.0,
        max_frame_bytes: int = 32 * 2**20,
    ) -> None:
        if not address.startswith(("ws://", "wss://")):
            raise ConfigError(f"an address begins with ws:// or wss://, got {address!r}")
        self.address = address
        self._headers = {"Authorization": f"Api-Key {api_key}"} if api_key is not None else {}
        self._tls = _tls(address, tls_ca)
        self._timeouts = connect_timeout_s, answer_timeout_s
        self._max_frame_bytes = max_frame_bytes
        self._stack = contextlib.ExitStack()
        self._connection: ClientConnection | None = None
        self._begun = False
        self.metadata: dict[str, Any] = {}
        self._connect()

    def infer(
        self,
        observation: Mapping[str, Any] | None = None,
        *,
        reset: bool = False,
        episode: int | None = None,
        step: int | None = None,
        executed: ActionArray | None = None,
        observe_only: bool = False,
        prefix: ActionArray | None = None,
        snapshot: str | None = None,
        restore: str | None = None,
        prompt: str | None = None,
    ) -> dict[str, Any]:
        """Sends an observation and returns the answer; see docs/serving.md for what goes with it.

        Args:
            observation: by the keys in `metadata["keys"]`; None = only `reset`, `snapshot` or `restore`.
            reset: a new episode begins with it.
            episode: number of that, which keys the policy's noise.
            step: control step of the observation.
            executed: (n, Da) executed since the last observation, oldest first.
            observe_only: no plan is needed.
            prefix: (d, Da) committed actions with which the plan begins.
            snapshot: keep the history under this name, on the server.
            restore: go on with the history of this name.
            prompt: the task in words, one of `metadata["tasks"]`; it stays until there is another one.

        Returns:
            "actions" (Ta, Da) unless `observe_only`, timings, and what "scd/..." tells.

        Raises:
            RequestRefusedError: the server says what is wrong with it.
            HistoryLostError: the connection broke within an episode; it has been made anew, and a new history begins.
            ServerUnreachableError: the server is gone or does not answer.
        """
        self.send(
            observation,
            reset=reset,
            episode=episode,
            step=step,
            executed=executed,
            observe_only=observe_only,
            prefix=prefix,
            snapshot=snapshot,
            restore=restore,
            prompt=prompt,
        )
        return self.receive()

    def send(self, observation: Mapping[str, Any] | None = None, **options: Any) -> None:
        """The first half of `infer`: several clients can send before the first one waits for its answer."""
        chosen = {
            name if name == "prompt" else f"scd/{name}": value
            for name, value in options.items()
            if value is not None and value is not False
        }
        message = pack({**(observation or {}), **chosen})
        self._loses_nothing = bool(options.get("reset")) or not self._begun
        self._message = message
        try:
            if self._connection is None:
                raise ConnectionError
            self._connection.send(message)
        except (ConnectionClosed, ConnectionError, OSError):
            self._again()

    def receive(self) -> dict[str, Any]:
        """The second half of `infer`."""
        try:
            answer = self._next_message()
        except ConnectionClosed:
            self._again()
            answer = self._next_message()
        self._begun = True
        return answer

    def reset(self) -> None:
        """Forgets the history on the server."""
        self.infer(reset=True)
        self._begun = False

    def close(self) -> None:
        """Ends the connection; may be called twice."""
        self._connection = None
        self._stack.close()

    def __enter__(self) -> "PolicyClient":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _again(self) -> None:
        """A new connection for the message that was not answered, where that does not need the lost history."""
        logger.warning("the connection to %s broke; connecting again", self.address)
        self._connect()
        self._begun = False
        if not self._loses_nothing and self.metadata.get("history") != 1:
            raise HistoryLostError(
                f"the connection to {self.address} broke within an episode and its history is lost; stop the robot, or "
                "go on with the next observation, which begins a new history"
            )
        assert self._connection is not None
        try:
            self._connection.send(self._message)
        except ConnectionClosed as error:
            raise ServerUnreachableError(f"{self.address} closes the connection at once: {error}") from error

    def _connect(self) -> None:
        self.close()
        connect_timeout_s, _ = self._timeouts
        deadline, pause = time.monotonic() + connect_timeout_s, 0.05
        while True:
            try:
                self._connection = self._stack.enter_context(
                    connect(
                        self.address,
                        additional_headers=self._headers,
                        ssl=self._tls,
                        compression=None,
                        open_timeout=max(0.1, deadline - time.monotonic()),
                        close_timeout=1.0,
                        max_size=self._max_frame_bytes,
                    )
                )
                self.metadata = self._next_message()
                return
            except (InvalidHandshake, InvalidURI, ssl.SSLError) as error:
                raise ServerUnreachableError(f"{self.address} does not let us in: {error}") from error
            except (OSError, ConnectionClosed) as error:
                if time.monotonic() + pause > deadline:
                    raise ServerUnreachableError(
                        f"no policy server answers at {self.address} ({error}); start one with scd serve"
                    ) from error
                time.sleep(pause)
                pause = min(2 * pause, 1.0)

    def _next_message(self) -> dict[str, Any]:
        if self._connection is None:
            raise ServerUnreachableError(f"the connection to {self.address} is closed; make a new client")
        _, answer_timeout_s = self._timeouts
        try:
            answer = self._connection.recv(timeout=answer_timeout_s)
        except TimeoutError as error:
            self.close()  # a late answer must not be taken for that of the next request
            raise ServerUnreachableError(f"{self.address} did not answer within {answer_timeout_s:g} s") from error
        if isinstance(answer, str):
            raise RequestRefusedError(f"{self.address} refuses: {answer}")
        message = unpack(answer)
        actions = message.get("actions")
        if actions is not None and not (isinstance(actions, np.ndarray) and np.isfinite(actions).all()):
            raise MessageError(f"{self.address} sent actions that are no array of finite numbers; stop the robot")
        return message


def _tls(address: str, authority: str | Path | None) -> ssl.SSLContext | None:
    if address.startswith("ws://"):
        if authority is not None:
            raise ConfigError(f"a certificate is of no use for {address}; begin it with wss://")
        return None
    try:
        return ssl.create_default_context(cafile=authority)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"cannot use the certificate {str(authority)!r}: {error}") from error
