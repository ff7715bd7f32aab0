"""The policy server: websockets in, batches for one worker thread, websockets out. START HERE for how a request goes.

It speaks openpi's protocol: the server begins with a map of metadata; then each binary message of the client, an
observation, is answered by a binary message with "actions", or by a text: what went wrong, in one sentence. The event
loop never computes, so pings, /healthz and /metrics are answered while a plan is made.
"""

import asyncio
import contextlib
import functools
import hmac
import logging
import math
import signal
import ssl
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from typing import Any

import numpy as np

from scd_robot import __version__
from scd_robot.errors import ConfigError, MissingDependencyError, ScdRobotError
from scd_robot.serve.config import ServerConfig, tls_context
from scd_robot.serve.engine import Answer, Engine, Session
from scd_robot.serve.metrics import Metrics
from scd_robot.serve.observations import ObservationReader
from scd_robot.serve.one_shot import FULL, INTERNAL, NO_KEY, OneShotServer
from scd_robot.serve.requests import Request, RequestReader
from scd_robot.serve.wire import MessageError, pack, unpack

try:
    from websockets.asyncio.server import Server, ServerConnection, serve
    from websockets.exceptions import ConnectionClosed
    from websockets.http11 import Request as HttpRequest
    from websockets.http11 import Response
except ModuleNotFoundError as error:
    raise MissingDependencyError("serving needs websockets 13 or newer: pip install 'scd_robot[serve]'") from error

__all__ = ["PolicyServer", "ServerConfig", "running_server"]

logger = logging.getLogger(__name__)

_POSITIONS = (
    "Positions in the history are control steps. Without scd/step or scd/executed an observation counts as the next "
    "one, but steps_per_plan later after a plan, if the client never sends scd/observe_only."
)
_LONGEST_REFUSAL = 4000  # characters: it repeats what the client sent
_REASONS = {1007: "no message of this protocol", 1011: "internal error"}
_LOOPBACK = ("localhost", "127.", "::1")


class PolicyServer:
    """One policy for all who connect.

    Args:
        policy: see `scd_robot.policies.load_policy`; nobody else may use it meanwhile.
        config: how.

    Attributes:
        address: of the running server, "ws://127.0.0.1:8000".
        http_address: "http://127.0.0.1:8001", where there is `POST /act`.
        metadata: the first message to every client.
        metrics: what was counted.
    """

    def __init__(self, policy: Any, config: ServerConfig | None = None) -> None:
        self.config = config or ServerConfig()
        self.address = self.http_address = ""
        self.metrics = Metrics()
        spec, model = policy.spec, policy.architecture
        needed = sum(math.prod(array.shape) * np.dtype(array.dtype).itemsize for array in spec.observation.values())
        if needed + 1024 > self.config.max_frame_bytes:
            raise ConfigError(
                f"an observation takes {needed} bytes, a message may have {self.config.max_frame_bytes}; allow more"
            )
        observations = ObservationReader(spec.observation, self.config.keys, spec.optional)
        self._reader = RequestReader(observations, spec.action_dim, spec.chunk_length)
        limits = (self.config.steps_per_plan, self.config.max_history_bytes, self.config.prompt_resets)
        self._engine = Engine(policy, *limits)
        self.metadata = _metadata(policy, observations.client_keys, self._engine.steps_per_plan, model)
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="policy")
        self._waiting: asyncio.Queue[tuple[Session, Request, asyncio.Future[Answer]]] = asyncio.Queue()

    async def run(self, started: threading.Event | None = None, stop: asyncio.Event | None = None) -> None:
        """Serves until `stop` is set; None = until the process is asked to end (SIGTERM, SIGINT).

        Raises:
            ConfigError: the address is taken, or the certificate cannot be used.
            ScdRobotError: the policy cannot plan.
        """
        loop, config = asyncio.get_running_loop(), self.config
        tls = tls_context(config)
        await loop.run_in_executor(self._worker, self._engine.warm_up)
        if stop is None:
            stop = asyncio.Event()
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, stop.set)
        batches = asyncio.create_task(self._run_batches())
        one_shot = None
        try:
            if config.http_port is not None:
                one_shot = self._serve_one_shots(config.http_port, loop, tls)
            async with serve(
                self._handle,
                config.host,
                config.port,
                ssl=tls,
                compression=None,
                origins=[None],  # web pages have an origin; no page of another site may drive a robot
                process_request=self._answer_http,
                max_size=config.max_frame_bytes,
                max_queue=2,
                server_header=None,
            ) as server:
                self._announce(server, tls is not None)
                if started is not None:
                    started.set()
                await stop.wait()
        except OSError as error:
            raise _cannot_listen(config.host, config.port, error) from error
        finally:
            if one_shot is not None:
                await loop.run_in_executor(None, one_shot.close)
            batches.cancel()
            self._worker.shutdown()

    def _serve_one_shots(self, port: int, loop: asyncio.AbstractEventLoop, tls: ssl.SSLContext | None) -> OneShotServer:
        """Listens for `POST /act`."""
        config = self.config

        def answer(message: dict[str, Any]) -> dict[str, Any]:  # in a thread of the one-shot server
            return asyncio.run_coroutine_threadsafe(self._answer_once(message), loop).result()

        def may_enter(given: list[str]) -> bool:
            if self._has_key(given):
                return True
            loop.call_soon_threadsafe(functools.partial(self.metrics.add, "scd_refused_total", reason="key"))
            return False

        limits = (config.max_frame_bytes, config.max_connections)
        try:
            server = OneShotServer((config.host, port), answer, may_enter, *limits, tls)
        except OSError as error:
            raise _cannot_listen(config.host, port, error) from error
        host, port = server.server_address[:2]
        self.http_address = _url("http" if tls is None else "https", str(host), port)
        return server

    def _announce(self, server: Server, tls: bool) -> None:
        host, port = next(iter(server.sockets)).getsockname()[:2]
        self.address = _url("wss" if tls else "ws", host, port)
        logger.info("serving at %s; %s", self.address, _POSITIONS)
        if self.http_address:
            logger.info("one observation, one plan, no history: POST %s/act", self.http_address)
        logger.info(
            "a history takes %.1f MB; clients send %s", self._engine.history_bytes / 2**20, self.metadata["keys"]
        )
        if not host.startswith(_LOOPBACK) and self.config.api_key is None:
            logger.warning("anyone who reaches %s:%s can use this policy: there is no API key", host, port)

    # Before a connection is a websocket.

    def _answer_http(self, connection: ServerConnection, request: HttpRequest) -> Response | None:
        path = request.path.partition("?")[0]
        if path == "/healthz":
            return connection.respond(HTTPStatus.OK, "OK\n")
        if not self._has_key(request.headers.get_all("Authorization")):
            self.metrics.add("scd_refused_total", reason="key")
            return connection.respond(HTTPStatus.UNAUTHORIZED, NO_KEY)
        if path == "/metrics":
            return connection.respond(HTTPStatus.OK, self.metrics.text())
        if self.metrics.value("scd_connections") >= self.config.max_connections:
            self.metrics.add("scd_refused_total", reason="full")
            return connection.respond(HTTPStatus.SERVICE_UNAVAILABLE, FULL)
        return None

    def _has_key(self, given: list[str]) -> bool:
        """Whether these Authorization headers hold the key, or none is needed."""
        if self.config.api_key is None:
            return True
        scheme, _, key = (given[0] if len(given) == 1 else "").partition(" ")
        same = hmac.compare_digest(key.strip().encode(errors="replace"), self.config.api_key.strip().encode())
        return same and scheme.lower() in ("api-key", "bearer")

    # A connection.

    async def _handle(self, connection: ServerConnection) -> None:
        session, loop = Session(), asyncio.get_running_loop()
        self.metrics.add("scd_connections")
        self.metrics.add("scd_connections_total")
        try:
            await connection.send(pack(self.metadata))
            total_ms: float | None = None
            while True:
                frame = await self._next_frame(connection, session)
                begun = time.perf_counter()
                answer, code = await self._answer(session, frame, total_ms)
                await connection.send(answer)
                total_ms = 1e3 * (time.perf_counter() - begun)
                self.metrics.observe_ms(total_ms)
                if code is not None:
                    await connection.close(code, _REASONS[code])
                    return
        except ConnectionClosed:
            pass
        finally:
            self.metrics.add("scd_connections", -1)
            with contextlib.suppress(RuntimeError):  # the server ends
                loop.run_in_executor(self._worker, self._engine.forget, session)

    async def _next_frame(self, connection: ServerConnection, session: Session) -> str | bytes:
        """The client's next message; its history is dropped if that is long in coming."""
        receive = asyncio.ensure_future(connection.recv())
        try:
            if self.config.idle_timeout_s:
                done, _ = await asyncio.wait([receive], timeout=self.config.idle_timeout_s)
                if not done:
                    loop = asyncio.get_running_loop()
                    if await loop.run_in_executor(self._worker, self._engine.forget, session):
                        self.metrics.add("scd_evictions_total")
                        logger.info(
                            "dropped the history of a client that sent nothing for %g s", self.config.idle_timeout_s
                        )
            return await receive
        finally:
            receive.cancel()

    async def _answer(
        self, session: Session, frame: str | bytes, total_ms: float | None
    ) -> tuple[str | bytes, int | None]:
        """What to send, and the code to close with (None = go on)."""
        begun = time.perf_counter()
        try:
            if isinstance(frame, str):
                raise MessageError("expected a binary message (msgpack), got a text")
            request = self._reader.read(unpack(frame))
            answer = await self._computed(session, request)
        except ScdRobotError as error:
            self.metrics.add("scd_errors_total", fault="client")
            logger.debug("refused a request: %s", error)
            return f"{type(error).__name__}: {error}"[:_LONGEST_REFUSAL], 1007 if isinstance(
                error, MessageError
            ) else None
        except Exception:
            self.metrics.add("scd_errors_total", fault="server")
            logger.exception("a request failed")
            return INTERNAL, 1011
        if request.wants_text:
            return "reset successful", None
        if request.observation is None:
            return pack(answer.message), None
        timing = {"infer_ms": 1e3 * (time.perf_counter() - begun)}
        if total_ms is not None:
            timing["prev_total_ms"] = total_ms
        return pack({**answer.message, "server_timing": timing}), None

    async def _answer_once(self, message: dict[str, Any]) -> dict[str, Any]:
        """The answer to a request that has no history, before it or after.

        Raises:
            ScdRobotError: it is refused.
        """
        begun = time.perf_counter()
        try:
            request = self._reader.read(message)
            if request.kind != "plan" or request.snapshot is not None or request.restore is not None:
                raise ConfigError(
                    "POST /act makes a plan of one observation and keeps nothing; for a history, connect to "
                    f"{self.address}"
                )
            answer = await self._computed(Session(), request)
        except Exception as error:
            self.metrics.add("scd_errors_total", fault="client" if isinstance(error, ScdRobotError) else "server")
            raise
        infer_ms = 1e3 * (time.perf_counter() - begun)
        self.metrics.observe_ms(infer_ms)
        return {**answer.message, "server_timing": {"infer_ms": infer_ms}}

    async def _computed(self, session: Session, request: Request) -> Answer:
        """The answer, once its batch has been computed."""
        self.metrics.add("scd_requests_total", kind=request.kind)
        waiting: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting.put_nowait((session, request, waiting))
        return await waiting

    # Batches.

    async def _run_batches(self) -> None:
        """Hands requests that wait together to the worker, for ever."""
        loop = asyncio.get_running_loop()
        while True:
            batch = [await self._waiting.get()]
            deadline = loop.time() + self.config.batch_window_s
            while len(batch) < self.metrics.value("scd_connections"):
                try:
                    batch.append(self._waiting.get_nowait())
                except asyncio.QueueEmpty:
                    left = deadline - loop.time()
                    if left <= 0:
                        break
                    with contextlib.suppress(TimeoutError):
                        batch.append(await asyncio.wait_for(self._waiting.get(), left))
            requests = [(session, request) for session, request, _ in batch]
            try:
                results = await loop.run_in_executor(self._worker, self._engine.run, requests)
            except Exception as error:
                results = [error] * len(batch)
            self.metrics.add("scd_batches_total")
            self.metrics.add("scd_batch_rows_total", len(batch))
            for (_, _, waiting), result in zip(batch, results, strict=True):
                if waiting.done():  # its client is gone
                    continue
                if isinstance(result, Exception):
                    waiting.set_exception(result)
                else:
                    waiting.set_result(result)


@contextlib.contextmanager
def running_server(policy: Any, config: ServerConfig | None = None) -> Iterator[PolicyServer]:
    """A server in a thread of this process, which stops at the end of the `with` block."""
    server, started, stop = PolicyServer(policy, config), threading.Event(), asyncio.Event()
    loop = asyncio.new_event_loop()
    failure: list[BaseException] = []

    def run() -> None:
        try:
            loop.run_until_complete(server.run(started, stop))
        except BaseException as error:
            failure.append(error)
        finally:
            loop.close()
            started.set()

    thread = threading.Thread(target=run, name="policy server", daemon=True)
    thread.start()
    started.wait()
    try:
        if failure:
            raise failure[0]
        yield server
    finally:
        with contextlib.suppress(RuntimeError):  # it has ended already
            loop.call_soon_threadsafe(stop.set)
        thread.join()


def _metadata(policy: Any, client_keys: Mapping[str, str], steps_per_plan: int, model: Any) -> dict[str, Any]:
    """What every client is told first; names as in openpi's dialects where they have one."""
    spec = policy.spec
    made = getattr(policy, "provenance", {})
    return {
        "protocol": "openpi+scd",
        "version": 1,
        "server": f"scd_robot {__version__}",
        "action_horizon": spec.chunk_length,
        "action_dim": spec.action_dim,
        "control_hz": 1 / spec.control_dt,
        "control_dt": spec.control_dt,
        "history": spec.history_length,
        "history_stride": model.history_stride,
        "num_executed": spec.num_executed,
        "max_prefix": policy.max_prefix,
        "max_delay_steps": spec.max_delay_steps,
        "max_gain": policy.max_gain,
        "steps_per_plan": steps_per_plan,
        "positions": _POSITIONS,
        "tasks": list(spec.tasks),
        "task": policy.task if spec.tasks else None,
        "keys": {
            client_keys[key]: {**array.to_json(), "name": key, "optional": key in spec.optional}
            for key, array in spec.observation.items()
        },
        "policy": {key: made[key] for key in ("type", "step", "weights_sha256", "preset") if key in made},
    }


def _cannot_listen(host: str, port: int, error: OSError) -> ConfigError:
    return ConfigError(f"cannot listen at {host}:{port}: {error.strerror or error}; choose another host or port")


def _url(scheme: str, host: str, port: int) -> str:
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"
