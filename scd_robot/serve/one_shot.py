"""Plain HTTP beside the websocket: `POST /act` with one observation, answered by one plan. Nothing is remembered.

For scripts, and for policies that need no history: each request begins one, which ends with the answer. It has a port
of its own, since the websockets library takes no request bodies, and threads of its own, which never compute.
"""

import contextlib
import json
import logging
import socket
import ssl
import threading
from collections.abc import Callable, Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np

from scd_robot.errors import ScdRobotError
from scd_robot.serve.wire import DEEPEST, MessageError, pack, unpack

__all__ = ["FULL", "INTERNAL", "NO_KEY", "OneShotServer", "json_message"]

logger = logging.getLogger(__name__)

NO_KEY = "send the header 'Authorization: Api-Key KEY'\n"
FULL = "all connections are taken; try again later\n"
INTERNAL = "internal error; the server's log says more"
_JSON, _MSGPACK = "application/json", ("application/msgpack", "application/x-msgpack")
_LARGEST_JSON = 2 * 2**20  # bytes: as lists they are many times larger in memory
_LONGEST_READ_S = 10.0
_BLOCK = 1 << 16  # bytes


class OneShotServer(ThreadingHTTPServer):
    """Answers POST /act in a thread until `close`.

    Args:
        address: host and port; 0 = any that is free.
        answer: of a message by text keys; raises ScdRobotError where it is refused.
        may_enter: whether these Authorization headers are those of a client that is let in.
        max_bytes: of one request.
        max_connections: at a time; further ones are refused.
        tls: None = plain.

    Raises:
        OSError: the address cannot be had.
    """

    daemon_threads = True
    allow_reuse_address = True

    def __init__(
        self,
        address: tuple[str, int],
        answer: Callable[[dict[str, Any]], Mapping[str, Any]],
        may_enter: Callable[[list[str]], bool],
        max_bytes: int,
        max_connections: int,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.answer, self.may_enter, self.max_bytes, self.tls = answer, may_enter, max_bytes, tls
        self._slots = threading.Semaphore(max_connections)
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        super().__init__(address, _Handler)
        threading.Thread(target=self.serve_forever, name="POST /act", daemon=True).start()

    def close(self) -> None:
        """Stops listening."""
        self.shutdown()
        self.server_close()

    def process_request(self, request: Any, client_address: Any) -> None:
        """A thread for a connection, if there may be one more."""
        if self._slots.acquire(blocking=False):
            try:
                super().process_request(request, client_address)
            except BaseException:  # no thread could be started
                self._slots.release()
                raise
            return
        if self.tls is None:
            head = f"HTTP/1.1 503 Service Unavailable\r\nContent-Length: {len(FULL)}\r\nConnection: close\r\n\r\n"
            request.sendall((head + FULL).encode())
        self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """All of a connection."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._slots.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that broke, or was no HTTP at all, is no matter for standard error."""
        logger.debug("a connection for POST /act failed", exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    """One connection, one request."""

    server: OneShotServer
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "scd_robot", ""

    def setup(self) -> None:
        """Bounds the time until the request has been read, however slowly it comes."""
        self._too_late = threading.Timer(_LONGEST_READ_S, self._hang_up)
        self._too_late.daemon = True
        self._too_late.start()
        if self.server.tls is not None:
            try:
                self.request = self.server.tls.wrap_socket(self.request, server_side=True)
            except BaseException:
                self._too_late.cancel()
                raise
        super().setup()

    def finish(self) -> None:
        """The end of the connection."""
        self._too_late.cancel()
        del self._too_late  # it holds this handler, which holds the socket
        super().finish()
        if self.server.tls is not None:  # socketserver closes the one that was wrapped
            with contextlib.suppress(OSError):
                self.request.shutdown(socket.SHUT_RDWR)
            self.request.close()

    def do_POST(self) -> None:
        """Reads, asks, answers."""
        self.close_connection = True
        if self.path.partition("?")[0] != "/act":
            return self._refuse(HTTPStatus.NOT_FOUND, "there is only POST /act here\n")
        if self.headers.get("Origin") is not None:
            return self._refuse(HTTPStatus.FORBIDDEN, "no page of another site may drive a robot\n")
        if not self.server.may_enter(self.headers.get_all("Authorization") or []):
            return self._refuse(HTTPStatus.UNAUTHORIZED, NO_KEY)
        kind = self.headers.get_content_type()
        if kind != _JSON and kind not in _MSGPACK:
            told = f"Content-Type must be {_JSON} or {_MSGPACK[0]}, got {kind!r:.80}\n"
            return self._refuse(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, told)
        length, largest = self._length(), self.server.max_bytes
        if length is None:
            return self._say(HTTPStatus.LENGTH_REQUIRED, "send the header Content-Length\n")
        if kind == _JSON:
            largest = min(largest, _LARGEST_JSON)
        if length > largest:
            hint = "; send msgpack, or allow more" if kind == _JSON else ""
            told = f"a request of this kind may have {largest} bytes, this one has {length}{hint}\n"
            return self._refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, told)
        body = self.rfile.read(length)
        self._too_late.cancel()
        return self._answer(body, kind) if len(body) == length else None

    def _answer(self, body: bytes, kind: str) -> None:
        try:
            answer = self.server.answer(json_message(body) if kind == _JSON else unpack(body))
        except ScdRobotError as error:
            return self._say(HTTPStatus.BAD_REQUEST, f"{type(error).__name__}: {error}"[:4000])
        except Exception:
            logger.exception("a request failed")
            return self._say(HTTPStatus.INTERNAL_SERVER_ERROR, INTERNAL)
        return self._send(HTTPStatus.OK, json.dumps(_plain(answer)).encode() if kind == _JSON else pack(answer), kind)

    def _length(self) -> int | None:
        """Of the body in bytes; None = not told."""
        text = self.headers.get("Content-Length", "")
        return int(text) if text.isascii() and text.isdigit() and "Transfer-Encoding" not in self.headers else None

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What http.server refuses by itself: another method (it says 501), or a head that is none of HTTP."""
        self.close_connection = True
        if code == HTTPStatus.NOT_IMPLEMENTED:
            self._say(HTTPStatus.METHOD_NOT_ALLOWED, "there is only POST /act here\n", Allow="POST")
        else:
            self._say(HTTPStatus(code), f"{message or HTTPStatus(code).phrase}\n")

    def _refuse(self, status: HTTPStatus, text: str) -> None:
        """Says it before the body was read, and lets the body go by: else the client is told of a broken pipe only."""
        self._say(status, text)
        left = min(self._length() or 0, max(self.server.max_bytes, _LARGEST_JSON))
        while left > 0 and (block := self.rfile.read(min(left, _BLOCK))):
            left -= len(block)

    def _say(self, status: HTTPStatus, text: str, **more: str) -> None:
        self._send(status, text.encode(errors="replace"), "text/plain; charset=utf-8", **more)

    def _send(self, status: HTTPStatus, body: bytes, kind: str, **more: str) -> None:
        self.send_response(status)
        sent = {"Content-Type": kind, "Content-Length": str(len(body)), "Connection": "close", **more}
        for name, value in sent.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _hang_up(self) -> None:
        try:
            self.request.shutdown(socket.SHUT_RDWR)
        except OSError:
            logger.debug("a slow client has gone by itself")

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are counted, not listed."""
        logger.debug(format, *args)


def json_message(body: bytes) -> dict[str, Any]:
    """The message that a JSON object is: lists of numbers become arrays, uint8 where all are whole and of 0 to 255.

    Raises:
        MessageError: it is none.
    """
    try:
        message = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise MessageError(f"these {len(body)} bytes are no JSON: {error}") from error
    if not isinstance(message, dict):
        raise MessageError(f"a message must be an object, got {type(message).__name__}")
    return {key: _arrays(value, key, 1) for key, value in message.items()}


def _arrays(value: Any, key: str, depth: int) -> Any:
    if isinstance(value, dict):
        if depth > DEEPEST:
            raise MessageError(f"maps may be nested {DEEPEST} deep")
        return {inner: _arrays(entry, f"{key}/{inner}", depth + 1) for inner, entry in value.items()}
    if not isinstance(value, list):
        return value
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise MessageError(f"{key!r:.80} must hold lists of one length, of numbers: {error}") from error
    if array.dtype.kind not in "biuf":
        raise MessageError(f"{key!r:.80} must hold numbers of at most 8 bytes, got an array of {array.dtype}")
    if array.dtype.kind in "iu" and array.size and array.min() >= 0 and array.max() <= 255:
        return array.astype(np.uint8)
    return array


def _plain(value: Any) -> Any:
    """JSON's types, of what an answer holds."""
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value
