"""Where a policy server is, how a connection to it is opened, and what its answers mean.

Shapes: m remaining actions, Da action width.
"""

import ssl
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from scd_robot.errors import (
    ConfigError,
    MissingDependencyError,
    PolicyChangedError,
    ScdRobotError,
    UnknownNameError,
)
from scd_robot.serve.wire import MessageError, unpack
from scd_robot.types import ArraySpec, PolicySpec, RunningChunk

try:
    from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidMessage, InvalidStatus, InvalidURI
    from websockets.sync.client import ClientConnection, connect
except ModuleNotFoundError as error:
    raise MissingDependencyError(
        "a client needs websockets 13 or newer: pip install websockets, or 'scd_robot[serve]'"
    ) from error

__all__ = [
    "ClientConnection",
    "ConnectionClosed",
    "Endpoint",
    "HistoryLostError",
    "RequestRefusedError",
    "Served",
    "ServerUnreachableError",
    "check_weights",
    "read_answer",
    "running_keys",
    "weights_of",
]


class ServerUnreachableError(ScdRobotError):
    """No policy server answers at this address, or it lets nobody in."""


class RequestRefusedError(ScdRobotError):
    """The server answered a request with an error."""


class HistoryLostError(ScdRobotError):
    """The connection broke in the middle of an episode, and the server has forgotten its history."""


@dataclass(frozen=True)
class Endpoint:
    """A server's address, and how to be let in.

    Attributes:
        address: "ws://host:port", or "wss://" with TLS.
        api_key: that the server asks for.
        tls_ca: file with the certificate of the server's authority (PEM); None = the system's.
        max_frame_bytes: of an answer.

    Raises:
        ConfigError: another kind of address, or a certificate that cannot be used.
    """

    address: str
    api_key: str | None = field(default=None, repr=False)
    tls_ca: str | Path | None = None
    max_frame_bytes: int = 32 * 2**20
    _tls: ssl.SSLContext | None = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.address.startswith(("ws://", "wss://")):
            raise ConfigError(f"an address begins with ws:// or wss://, got {self.address!r}")
        try:
            urllib.parse.urlsplit(self.address).port  # noqa: B018 - it looks when it is asked
        except ValueError as error:
            raise ConfigError(f"{self.address!r} is no address: {error}") from error
        object.__setattr__(self, "_tls", _tls(self.address, self.tls_ca))

    def open(self, timeout_s: float) -> ClientConnection:
        """One attempt to connect; the server speaks first.

        Raises:
            ServerUnreachableError: it does not let us in; another attempt would be of no use.
            OSError: nobody answers, or somebody who says that the server is not there now, or full.
        """
        try:
            return connect(
                self.address,
                additional_headers={} if self.api_key is None else {"Authorization": f"Api-Key {self.api_key}"},
                ssl=self._tls,
                compression=None,
                open_timeout=timeout_s,
                close_timeout=1.0,
                max_size=self.max_frame_bytes,
            )
        except InvalidStatus as error:
            words = (error.response.body or b"").decode(errors="replace").strip()[:300]
            told = f"{error}{words and ': '}{words}"
            if error.response.status_code >= 500:
                raise ConnectionError(told) from error
            asks = error.response.status_code == 401
            hint = "; give api_key=... (scd eval: the variable SCD_API_KEY)" if asks else ""
            raise ServerUnreachableError(f"{self.address} does not let us in: {told}{hint}") from error
        except InvalidMessage as error:  # a forwarder, behind which nobody listens
            raise ConnectionError(str(error)) from error
        except (InvalidHandshake, InvalidURI, ssl.SSLError) as error:
            raise ServerUnreachableError(f"{self.address} does not let us in: {error}") from error


@dataclass(frozen=True)
class Served:
    """What a server of this project says about its policy.

    Attributes:
        address: of the server.
        spec: of the policy.
        keys: what a client calls each key of the observation.
        history_stride: control steps from one that can be planned from to the next.
        max_prefix: most committed actions that a plan begins with.
        max_gain: the largest gain with which a plan can be guided towards a running chunk; 0 = none can.
        task: what it does where it is not told, in words; None = it must be told, or has one task only.
        provenance: where actions come from, as plain JSON types.
    """

    address: str
    spec: PolicySpec
    keys: dict[str, str]
    history_stride: int
    max_prefix: int
    max_gain: float
    task: str | None
    provenance: dict[str, Any]

    @classmethod
    def of(cls, address: str, told: Mapping[str, Any]) -> "Served":
        """From the first message of a connection.

        Raises:
            ConfigError: the server does not keep histories as ours do, or does not say all that is to be known.
        """
        if told.get("protocol") != "openpi+scd" or told.get("version") != 1:
            raise ConfigError(
                f"{address} speaks {told.get('protocol', 'plain openpi')!r}, version {told.get('version')}; this needs "
                "a server started with scd serve ('openpi+scd', version 1)"
            )
        try:
            return cls._read(address, told)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ConfigError(
                f"{address} does not say what it serves as scd serve does ({type(error).__name__}: {error}); start it "
                "with this version of scd_robot"
            ) from error

    @classmethod
    def _read(cls, address: str, told: Mapping[str, Any]) -> "Served":
        spec = PolicySpec(
            observation={array["name"]: ArraySpec.from_json(array) for array in told["keys"].values()},
            action_dim=told["action_dim"],
            control_dt=told["control_dt"],
            chunk_length=told["action_horizon"],
            num_executed=told["num_executed"],
            history_length=told["history"],
            tasks=tuple(told.get("tasks", ())),
            max_delay_steps=told.get("max_delay_steps"),
            optional=tuple(sorted(array["name"] for array in told["keys"].values() if array.get("optional"))),
        )
        return cls(
            address=address,
            spec=spec,
            keys={array["name"]: key for key, array in told["keys"].items()},
            history_stride=told.get("history_stride", 1),
            max_prefix=told.get("max_prefix", spec.chunk_length - 1),
            max_gain=told.get("max_gain", 0),
            task=told.get("task"),
            provenance={**told["policy"], "server": address, "served_by": told["server"]},
        )

    def prompt(self, task: str | None) -> str | None:
        """What goes with every observation, since servers remember no prompt: the task, or the server's own."""
        return self.task if task is None else task

    def check_task(self, task: str | None) -> None:
        """Raises UnknownNameError where the policy does not know a task (None = the server's)."""
        if task is not None and task not in self.spec.tasks:
            raise UnknownNameError("task of this policy", task, self.spec.tasks)


def running_keys(running: RunningChunk) -> dict[str, Any]:
    """What a request holds so that its plan is guided towards a running chunk (1, m, Da)."""
    return {
        "scd/running": np.asarray(running.actions[0], np.float32),
        "scd/delay_steps": running.delay_steps,
        "scd/max_gain": running.max_gain,
        "scd/identity": not running.exact,
    }


def weights_of(told: Mapping[str, Any]) -> str | None:
    """The checksum of a server's weights, from the first message of a connection; None = it does not say."""
    policy = told.get("policy")
    return policy.get("weights_sha256") if isinstance(policy, Mapping) else None


def check_weights(address: str, before: str | None, now: str | None) -> None:
    """Raises PolicyChangedError where a server has other weights than before; None = it does not say."""
    if before != now:
        raise PolicyChangedError(
            f"{address} has other weights than before: {now or 'it does not say which'}, not {before or 'unnamed ones'}"
        )


def read_answer(address: str, frame: str | bytes) -> dict[str, Any]:
    """What a server said.

    Raises:
        RequestRefusedError: it refused.
        MessageError: it is no message, or has actions that nobody should follow.
    """
    if isinstance(frame, str):
        raise RequestRefusedError(f"{address} refuses: {frame}")
    message = unpack(frame)
    actions = message.get("actions")
    if actions is not None and not (isinstance(actions, np.ndarray) and np.isfinite(actions).all()):
        raise MessageError(f"{address} sent actions that are no array of finite numbers; stop the robot")
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
