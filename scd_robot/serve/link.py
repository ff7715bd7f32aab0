"""A connection to a policy server that never makes its user wait, and that is made anew whenever it breaks.

One thread connects and receives, another one sends; what they share with the user are queues.
"""

import contextlib
import logging
import queue
import socket
import threading
from dataclasses import dataclass
from typing import Any, Protocol

from scd_robot.errors import ScdRobotError
from scd_robot.serve.endpoint import ClientConnection, ConnectionClosed, Endpoint, read_answer

__all__ = ["Answered", "Broken", "Connected", "Event", "Link", "SocketLink"]

logger = logging.getLogger(__name__)

_ATTEMPT_S = 5.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 1.0
_JOIN_S = 2.0


@dataclass(frozen=True)
class Connected:
    """There is a connection; frames may be sent.

    Attributes:
        metadata: what the server said first.
    """

    metadata: dict[str, Any]


@dataclass(frozen=True)
class Answered:
    """The server sent a frame."""

    frame: str | bytes


@dataclass(frozen=True)
class Broken:
    """The connection is gone; what was not answered never will be."""

    reason: str


Event = Connected | Answered | Broken


class Link(Protocol):
    """The way to a server, as `SocketLink` is one; its calls never wait."""

    def send(self, frame: bytes) -> None:
        """Sends a frame through the connection that was told last; it gets lost where that is gone."""
        ...

    def receive(self) -> Event | None:
        """What happened next; None = nothing."""
        ...

    def restart(self) -> None:
        """Gives the connection up and makes another one; nothing more is told of the old one."""
        ...

    def close(self) -> None:
        """Ends."""
        ...


class SocketLink:
    """A websocket.

    Args:
        endpoint: of the server.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._events: queue.SimpleQueue[tuple[ClientConnection, Event]] = queue.SimpleQueue()
        self._frames: queue.SimpleQueue[tuple[ClientConnection, bytes] | None] = queue.SimpleQueue()
        self._closed = threading.Event()
        self._open: ClientConnection | None = None  # written by the receiving thread
        self._current: ClientConnection | None = None  # the one that was told last; of the user's thread alone
        self._given_up: ClientConnection | None = None
        self._noted = ""  # the last error that nobody foresaw
        self._threads = [
            threading.Thread(target=work, name=name, daemon=True)
            for work, name in ((self._receive, "policy link"), (self._send, "policy link, sending"))
        ]
        for thread in self._threads:
            thread.start()

    def send(self, frame: bytes) -> None:
        """Hands a frame to the thread that sends."""
        if self._current is not None:
            self._frames.put((self._current, frame))

    def receive(self) -> Event | None:
        """What happened next."""
        while True:
            try:
                connection, event = self._events.get_nowait()
            except queue.Empty:
                return None
            if connection is self._given_up:
                continue
            self._current = None if isinstance(event, Broken) else connection
            return event

    def restart(self) -> None:
        """Shuts the socket, at which the receiving thread makes another connection."""
        self._given_up, self._current = self._current, None
        if self._given_up is not None:
            _shut(self._given_up)

    def close(self) -> None:
        """Ends the threads."""
        self._closed.set()
        self._frames.put(None)
        if self._open is not None:
            _shut(self._open)
        for thread in self._threads:
            thread.join(timeout=_JOIN_S)

    def _receive(self) -> None:
        pause_s = _FIRST_PAUSE_S
        while not self._closed.is_set():
            try:
                connection = self._endpoint.open(_ATTEMPT_S)
            except Exception as error:  # whatever it is, the robot waits for another attempt
                self._note("no connection", error)
            else:
                self._open = connection
                with contextlib.suppress(OSError, ConnectionClosed), connection:  # it may be gone when it is closed
                    if self._serve(connection):
                        pause_s = _FIRST_PAUSE_S
            self._closed.wait(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def _serve(self, connection: ClientConnection) -> bool:
        """Receives until the connection breaks; tells whether it was of use: whether anything was answered."""
        greeted = answered = False
        try:
            if not self._closed.is_set():
                metadata = read_answer(self._endpoint.address, connection.recv(timeout=_ATTEMPT_S))
                self._events.put((connection, Connected(metadata)))
                greeted = True
            while not self._closed.is_set():
                self._events.put((connection, Answered(connection.recv())))
                answered = True
        except Exception as error:  # whatever it is, the robot must not wait for what never comes
            self._note("the connection ends", error)
            if greeted:
                self._events.put((connection, Broken(str(error) or type(error).__name__)))
        return answered

    def _send(self) -> None:
        while (item := self._frames.get()) is not None:
            connection, frame = item
            try:
                connection.send(frame)
            except Exception as error:
                self._note("a frame could not be sent", error)
                _shut(connection)  # the receiving thread tells

    def _note(self, what: str, error: Exception) -> None:
        """With its traceback once where nobody foresaw it; attempts are without end."""
        told = f"{what}: {type(error).__name__}: {error}"
        if isinstance(error, OSError | ConnectionClosed | ScdRobotError) or told == self._noted:
            logger.debug("%s: %s", self._endpoint.address, told)
        else:
            logger.error("%s: %s", self._endpoint.address, told, exc_info=error)
            self._noted = told


def _shut(connection: ClientConnection) -> None:
    """Without a farewell, which a server that hangs would not answer."""
    with contextlib.suppress(OSError):
        connection.socket.shutdown(socket.SHUT_RDWR)
