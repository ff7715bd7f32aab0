"""How a policy is served: what `scd serve` can be told."""

import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from scd_robot.errors import ConfigError

__all__ = ["ServerConfig", "tls_context"]


@dataclass(frozen=True)
class ServerConfig:
    """How a policy is served.

    Attributes:
        host: address to listen at; 0.0.0.0 = all.
        port: 0 = any that is free.
        http_port: for `POST /act` (one_shot.py), likewise; None = there is no such thing.
        keys: the client's key of some observation keys.
        api_key: that clients must send; None = none.
        tls_cert: file with the certificate chain (PEM).
        tls_key: file with its private key; None = it is in `tls_cert`.
        max_connections: at a time; further ones are refused.
        max_frame_bytes: of one message.
        max_history_bytes: of one connection, its snapshots included.
        idle_timeout_s: silence after which a history is dropped; 0 = never.
        batch_window_s: a request waits so long for those of other connections.
        steps_per_plan: control steps that a client lets pass after a plan if it does not tell; None = num_executed.
        prompt_resets: a new prompt begins a new history.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    http_port: int | None = None
    keys: Mapping[str, str] = field(default_factory=dict)
    api_key: str | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None
    max_connections: int = 32
    max_frame_bytes: int = 32 * 2**20
    max_history_bytes: int = 2**30
    idle_timeout_s: float = 600.0
    batch_window_s: float = 0.002
    steps_per_plan: int | None = None
    prompt_resets: bool = False

    def __post_init__(self) -> None:
        for name in ("max_connections", "max_frame_bytes", "max_history_bytes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("idle_timeout_s", "batch_window_s"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ConfigError(f"{name} must not be negative, got {getattr(self, name)}")
        for name in ("port", "http_port"):
            if not 0 <= (getattr(self, name) or 0) < 65536:
                raise ConfigError(f"{name} must be from 0 to 65535, got {getattr(self, name)}")
        if self.api_key is not None and not (self.api_key.strip() and self.api_key.isascii()):
            raise ConfigError("an API key must be ASCII and not empty; give one, or leave it out")
        if self.tls_key is not None and self.tls_cert is None:
            raise ConfigError("a TLS key without a certificate; give both")


def tls_context(config: ServerConfig) -> ssl.SSLContext | None:
    """With the certificate; None = there is none. Raises ConfigError where it cannot be used."""
    if config.tls_cert is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(config.tls_cert, config.tls_key)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"cannot use the certificate {str(config.tls_cert)!r} and its key: {error}") from error
    return context
