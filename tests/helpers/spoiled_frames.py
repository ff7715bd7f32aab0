"""Sends spoiled copies of valid requests to a server, and checks a good connection beside them all the time."""

from typing import Any

import numpy as np
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from scd_robot.serve import PolicyClient
from scd_robot.serve.wire import pack


def valid_frames(rng: np.random.Generator) -> list[bytes]:
    """Requests of all kinds to the tiny policy."""
    seen = {key: rng.uniform(-1, 1, 2).astype(np.float32) for key in ("position", "goal")}
    actions = rng.uniform(-1, 1, (2, 2)).astype(np.float32)
    messages: list[dict[str, Any]] = [
        seen,
        {"observation": seen, "prompt": "go"},
        {**seen, "scd/reset": True, "scd/episode": 7},
        {**seen, "scd/observe_only": True, "scd/executed": actions},
        {**seen, "scd/prefix": actions, "scd/snapshot": "a"},
        {**seen, "scd/restore": "a"},
        {**seen, "scd/running": actions, "scd/delay_steps": 1, "scd/max_gain": 2.0},
        {**seen, "endpoint": "infer", "session_id": "b", "reset": False},
        {"endpoint": "reset"},
        {**seen, "position": np.float64(1.0)},
    ]
    return [pack(message) for message in messages]


def spoil(frame: bytes, rng: np.random.Generator) -> bytes:
    """Flips, drops, repeats or inserts bytes, or cuts the end off."""
    data = bytearray(frame)
    for _ in range(rng.integers(1, 4)):
        at, kind = int(rng.integers(len(data) or 1)), rng.integers(8)
        if kind < 5 and data:
            data[at] ^= 1 << int(rng.integers(8))
        elif kind == 5:
            data[at : at + int(rng.integers(4))] = b""
        elif kind == 6:
            data[at:at] = rng.bytes(int(rng.integers(1, 4)))
        else:
            data = data[: at + 1] if rng.random() < 0.3 else data + data[at : at + 8]
    return bytes(data)


def send_spoiled_frames(address: str, policy: Any, frames: int, seed: int) -> dict[str, int]:
    """How many were answered and refused, and by how many internal errors.

    Args:
        address: of a server with the same policy.
        policy: to compare the good connection's actions with.
        frames: how many to spoil.
        seed: of the spoiling.
    """
    rng = np.random.default_rng(seed)
    outcome = {"sent": 0, "answered": 0, "refused": 0, "closed": 0, "internal_errors": 0, "good_requests": 0}
    policy.reset(episodes=[0])
    options: dict[str, Any] = {"reset": True, "episode": 0}
    with PolicyClient(address) as good:
        bad: ClientConnection | None = None
        for number in range(frames):
            if bad is None:
                bad = connect(address, compression=None, max_size=None).__enter__()
                bad.recv()
            outcome["sent"] += 1
            try:
                originals = valid_frames(rng)
                bad.send(spoil(originals[int(rng.integers(len(originals)))], rng))
                answer = bad.recv(timeout=60)
                outcome["refused" if isinstance(answer, str) else "answered"] += 1
                outcome["internal_errors"] += isinstance(answer, str) and "internal error" in answer
                if isinstance(answer, str) and answer.startswith("MessageError"):
                    bad.recv(timeout=60)
            except ConnectionClosed:
                outcome["closed"] += 1
                bad.__exit__(None, None, None)
                bad = None
            if number % 10 == 0:
                seen = {key: rng.uniform(-1, 1, 2).astype(np.float32) for key in ("position", "goal")}
                policy.observe({key: value[None] for key, value in seen.items()})
                answer = good.infer(seen, step=number // 10, **options)
                np.testing.assert_allclose(answer["actions"], policy.plan()[0], rtol=0, atol=1e-5)
                options = {}
                outcome["good_requests"] += 1
        if bad is not None:
            bad.__exit__(None, None, None)
    return outcome
