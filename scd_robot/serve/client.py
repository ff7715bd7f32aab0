"""A client for policy servers, on numpy, msgpack and websockets alone: a robot's computer needs no torch.

`examples/client.py` is a control loop with it.
"""

import contextlib
import logging
import math
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from scd_robot.errors import ConfigError, PolicyChangedError
from scd_robot.serve.endpoint import (
    ClientConnection,
    ConnectionClosed,
    Endpoint,
    HistoryLostError,
    RequestRefusedError,
    ServerUnreachableError,
    check_weights,
    read_answer,
    running_keys,
    weights_of,
)
from scd_robot.serve.wire import pack
from scd_robot.types import ActionArray, RunningChunk

__all__ = ["HistoryLostError", "PolicyClient", "RequestRefusedError", "ServerUnreachableError"]

logger = logging.getLogger(__name__)


class PolicyClient:
    """One connection, which is one history of the policy.

    Args:
        address: "ws://host:port", or "wss://" with TLS.
        api_key: that the server asks for.
        tls_ca: file with the certificate of the server's authority (PEM); None = the system's.
        connect_timeout_s: for so long it tries to reach the server, at first and when the connection broke.
        answer_timeout_s: for so long it waits for an answer.
        max_frame_bytes: of an answer.
        weights_sha256: of the weights that the server must have; None = any: where they are others after the connection
            was made anew, that is logged.

    Attributes:
        metadata: what the server said first.
        weights_sha256: as given.

    Raises:
        ServerUnreachableError: nobody answers there, or the key is wrong.
        PolicyChangedError: the server has other weights.
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
        weights_sha256: str | None = None,
    ) -> None:
        self.address, self.weights_sha256 = address, weights_sha256
        self._endpoint = Endpoint(address, api_key, tls_ca, max_frame_bytes)
        self._timeouts = connect_timeout_s, answer_timeout_s
        self._stack = contextlib.ExitStack()
        self._connection: ClientConnection | None = None
        self._begun = self._waiting = False
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
        running: RunningChunk | None = None,
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
            running: (1, m, Da) what is left of the chunk that is executed; the plan is guided towards it.
            snapshot: keep the history under this name, on the server.
            restore: go on with the history of this name.
            prompt: the task in words, one of `metadata["tasks"]`; with every observation, or with none of a connection,
                which is then for `metadata["task"]`.

        Returns:
            "actions" (Ta, Da) unless `observe_only`, timings, and what "scd/..." tells.

        Raises:
            RequestRefusedError: the server says what is wrong with it.
            HistoryLostError: the connection broke within an episode; it has been made anew, and a new history begins.
            PolicyChangedError: the server is there again with other weights than `weights_sha256`.
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
            running=running,
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
        if (running := chosen.pop("scd/running", None)) is not None:
            chosen |= running_keys(running)
        message = pack({**(observation or {}), **chosen})
        self._loses_nothing = bool(options.get("reset")) or not self._begun
        self._message = message
        if self._waiting:  # nobody received the last answer, which must not be taken for that of this message
            self.close()
        self._waiting = True
        try:
            if self._connection is None:
                raise ConnectionError
            self._connection.send(message)
        except (ConnectionClosed, ConnectionError, OSError):
            self._again()

    def receive(self) -> dict[str, Any]:
        """The second half of `infer`."""
        if not self._waiting:
            raise ConfigError("receive() is for the answer of a message: call send() before it")
        try:
            answer = self._next_message()
        except ConnectionClosed:
            self._again()
            try:
                answer = self._next_message()
            except ConnectionClosed as error:
                raise ServerUnreachableError(
                    f"{self.address} ends the connection when it gets this message, twice: {error}"
                ) from error
        self._begun = True
        return answer

    def reset(self) -> None:
        """Forgets the history on the server."""
        self.infer(reset=True)
        self._begun = False

    def close(self) -> None:
        """Ends the connection; may be called twice."""
        self._connection, self._waiting = None, False
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
        self._waiting = True
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
                attempt = self._endpoint.open(max(0.1, deadline - time.monotonic()))
                self._connection = self._stack.enter_context(attempt)
                self._welcome(self._next_message(max(0.1, deadline - time.monotonic())))
                return
            except (OSError, ConnectionClosed) as error:
                if time.monotonic() + pause > deadline:
                    raise ServerUnreachableError(
                        f"no policy server answers at {self.address} ({error}); start one with scd serve"
                    ) from error
                time.sleep(pause)
                pause = min(2 * pause, 1.0)

    def _welcome(self, metadata: dict[str, Any]) -> None:
        try:
            wanted = self.weights_sha256 or (weights_of(self.metadata) if self.metadata else weights_of(metadata))
            check_weights(self.address, wanted, weights_of(metadata))
        except PolicyChangedError as error:
            if self.weights_sha256 is not None:
                self.close()
                raise
            logger.warning("%s", error)
        self.metadata = metadata

    def _next_message(self, most_s: float = math.inf) -> dict[str, Any]:
        if self._connection is None:
            raise ServerUnreachableError(f"the connection to {self.address} is closed; make a new client")
        answer_timeout_s = min(self._timeouts[1], most_s)
        try:
            answer = self._connection.recv(timeout=answer_timeout_s)
        except TimeoutError as error:
            self.close()  # a late answer must not be taken for that of the next request
            raise ServerUnreachableError(f"{self.address} did not answer within {answer_timeout_s:g} s") from error
        except ConnectionClosed:
            raise
        except BaseException:  # Ctrl-C, say
            self.close()
            raise
        self._waiting = False
        return read_answer(self.address, answer)
