"""The verb `scd serve`."""

import os
from pathlib import Path
from typing import Annotated

import tyro

from scd_robot.cli.policy_source import load_source

__all__ = ["serve"]

KEY_VARIABLE = "SCD_API_KEY"


def serve(
    checkpoint: Annotated[Path, tyro.conf.Positional],
    /,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    http_port: int | None = None,
    keys: tuple[str, ...] = (),
    device: str = "cpu",
    num_denoising_steps: int | None = None,
    num_executed: int | None = None,
    guidance_scale: float | None = None,
    num_samples: int | None = None,
    seed: int | None = None,
    task: str | None = None,
    trust: bool = False,
    steps_per_plan: int | None = None,
    prompt_resets: bool = False,
    api_key_file: Path | None = None,
    tls_cert: Path | None = None,
    tls_key: Path | None = None,
    max_connections: int = 32,
    max_frame_mb: float = 32.0,
    max_history_mb: float = 1024.0,
    idle_timeout_s: float = 600.0,
    batch_window_ms: float = 2.0,
) -> None:
    """Answers robots over the network: one observation in, a chunk of actions out, until Ctrl-C or SIGTERM.

    Any client of openpi works as it is, also the published openpi-client. Each connection has a history of its own;
    requests of several connections are computed together. Clients that say more (resets, executed actions, control
    steps without a plan, committed actions: docs/serving.md) get more out of it; scd_robot.serve.PolicyClient does, and
    'scd eval ws://HOST:PORT --env ...' evaluates a policy through its server. Health: http://HOST:PORT/healthz,
    counters for Prometheus: /metrics.

    The server listens to this machine only, unless --host says otherwise. Then give it an API key, which clients send
    as 'Authorization: Api-Key KEY', and TLS where the network is not yours.

    Args:
        checkpoint: a checkpoint's folder, or a training run's (its newest checkpoint), or a folder that 'scd export'
            wrote.
        host: address to listen at; 0.0.0.0 = all of this machine's.
        port: 0 = any that is free; the log says which.
        http_port: for scripts that send one observation and want one plan, by POST http://HOST:PORT/act with JSON or
            msgpack; there is no history in it. Without this option nothing listens for that.
        keys: how clients call observation keys of the checkpoint, each as OURS=THEIRS, for example
            proprio=observation/state; unsaid ones go by their own name, also below "observation".
        device: torch device of the policy.
        num_denoising_steps: replaces the checkpoint's.
        num_executed: what clients are told to execute of a plan; replaces the checkpoint's.
        guidance_scale: guidance by context corruption; replaces the checkpoint's (1 = off).
        num_samples: plans sampled at a time, of which the one that agrees best with the executed past is kept; replaces
            the checkpoint's (1 = off).
        seed: of the policy's noise; replaces the checkpoint's.
        task: in words, for a policy of several tasks: that of clients without a "prompt".
        trust: run the native or pickled code of an export of the formats aoti and torch-export; ONNX needs no trust.
        steps_per_plan: control steps that a client which does not tell lets pass after each plan; by default
            num_executed.
        prompt_resets: a new "prompt" begins a new history; for clients that cannot say that an episode begins.
        api_key_file: file with the key that clients must send; by default what the environment variable SCD_API_KEY
            holds, and without that there is none.
        tls_cert: file with the certificate chain (PEM); clients then connect to wss://.
        tls_key: file with its private key, where that is another one.
        max_connections: at a time; further ones are refused.
        max_frame_mb: of one message.
        max_history_mb: of one connection, its snapshots included.
        idle_timeout_s: silence after which a connection's history is dropped; 0 = never.
        batch_window_ms: where there are several connections, a request waits so long for those of the others.
    """
    import asyncio

    from scd_robot.errors import ConfigError
    from scd_robot.serve.server import PolicyServer, ServerConfig

    for name, size in (("--max-frame-mb", max_frame_mb), ("--max-history-mb", max_history_mb)):
        if not 0 < size < float("inf"):
            raise ConfigError(f"{name} must be a positive finite number, got {size:g}")
    config = ServerConfig(
        host=host,
        port=port,
        http_port=http_port,
        keys=parse_keys(keys),
        api_key=_api_key(api_key_file),
        tls_cert=tls_cert,
        tls_key=tls_key,
        max_connections=max_connections,
        max_frame_bytes=int(max_frame_mb * 2**20),
        max_history_bytes=int(max_history_mb * 2**20),
        idle_timeout_s=idle_timeout_s,
        batch_window_s=1e-3 * batch_window_ms,
        steps_per_plan=steps_per_plan,
        prompt_resets=prompt_resets,
    )
    policy = load_source(
        checkpoint,
        device,
        trust,
        num_denoising_steps=num_denoising_steps,
        num_executed=num_executed,
        guidance_scale=guidance_scale,
        num_samples=num_samples,
        seed=seed,
        task=task,
    )
    asyncio.run(PolicyServer(policy, config).run())


def parse_keys(pairs: tuple[str, ...]) -> dict[str, str]:
    """From "OURS=THEIRS" to a mapping.

    Raises:
        ConfigError: one is not of this form, or a key stands twice.
    """
    from scd_robot.errors import ConfigError

    mapping: dict[str, str] = {}
    for pair in pairs:
        ours, _, theirs = pair.partition("=")
        if not ours or not theirs or ours in mapping:
            raise ConfigError(f"--keys takes OURS=THEIRS, once for each of the checkpoint's keys, got {pair!r}")
        mapping[ours] = theirs
    return mapping


def _api_key(path: Path | None) -> str | None:
    return os.environ.get(KEY_VARIABLE) if path is None else path.read_text().strip()
