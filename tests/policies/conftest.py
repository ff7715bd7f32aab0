"""Small policies with random weights, and observations for them."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from small_policies import small_policy

from scd_robot.policies import ScdPolicy


@pytest.fixture
def scd_policy() -> Callable[..., ScdPolicy]:
    """`scd_policy(model={...}, num_executed=2, ...)`, see `small_policy`."""
    return small_policy


@pytest.fixture
def causal_dit_policy(scd_policy: Callable[..., ScdPolicy]) -> Callable[..., ScdPolicy]:
    """The same of the entangled architecture."""
    entangled = {"architecture": "entangled", "context_corruption": 0.0, "num_context_tokens": 1}

    def make(model: dict[str, Any] | None = None, **settings: Any) -> ScdPolicy:
        return scd_policy({**entangled, **(model or {})}, **settings)

    return make


@pytest.fixture
def stream() -> Callable[..., list[dict[str, np.ndarray]]]:
    """`stream(rows, steps)`: observations of independent rows, the same for row i whatever `rows` is."""

    def make(rows: int, steps: int) -> list[dict[str, np.ndarray]]:
        values = [np.random.default_rng(row).uniform(-1, 1, (steps, 2, 2)).astype(np.float32) for row in range(rows)]
        both = np.stack(values, axis=2)  # (steps, 2, rows, 2)
        return [{"position": step[0], "goal": step[1]} for step in both]

    return make
