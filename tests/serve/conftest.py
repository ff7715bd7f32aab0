"""A small policy behind a server on a free port of this machine, and observations for it."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from small_policies import small_policy

from scd_robot.serve import PolicyClient
from scd_robot.serve.server import PolicyServer, ServerConfig, running_server


@pytest.fixture
def start() -> Iterator[Callable[..., PolicyServer]]:
    """`start(policy=None, **config)`: a running server; it stops at the end of the test."""
    with contextlib.ExitStack() as stack:

        def begin(policy=None, **config) -> PolicyServer:
            return stack.enter_context(running_server(policy or small_policy(), ServerConfig(port=0, **config)))

        yield begin


@pytest.fixture
def connect() -> Iterator[Callable[..., PolicyClient]]:
    """`connect(server)`: a client, closed at the end of the test."""
    with contextlib.ExitStack() as stack:

        def begin(server: PolicyServer, **options) -> PolicyClient:
            return stack.enter_context(PolicyClient(server.address, **options))

        yield begin


@pytest.fixture
def point(monkeypatch) -> str:
    """Name of the toy environment of the evaluation tests, importable here and in worker processes."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "sim_eval"))
    return "toy_environment:make_point"


@pytest.fixture
def stream() -> Callable[..., list[dict[str, np.ndarray]]]:
    """`stream(steps, seed)`: observations of one robot, without a batch axis."""

    def make(steps: int, seed: int = 0) -> list[dict[str, np.ndarray]]:
        values = np.random.default_rng(seed).uniform(-1, 1, (steps, 2, 2)).astype(np.float32)
        return [{"position": position, "goal": goal} for position, goal in values]

    return make
