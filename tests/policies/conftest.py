"""Small policies with random weights."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from scd_robot.config import from_json, to_json
from scd_robot.model import build_model
from scd_robot.normalization import Normalizer, compute_statistics
from scd_robot.policies import ScdPolicy
from scd_robot.policies.registry import policy_class, policy_type
from scd_robot.policies.scd import ScdPolicyConfig


@pytest.fixture
def scd_policy() -> Callable[..., ScdPolicy]:
    """`scd_policy(model={...}, num_executed=2, ...)`: all weights random, statistics of the tiny dataset."""
    from tiny import tiny_data, tiny_experiment

    def make(model: dict[str, Any] | None = None, **settings: Any) -> ScdPolicy:
        data, experiment = tiny_data(), tiny_experiment(model=model)
        torch.manual_seed(0)
        network = build_model(experiment.model)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.copy_(torch.randn_like(parameter) * 0.3)
        keys = [*experiment.model.observation_shapes, "action"]
        statistics = {key: compute_statistics(data.arrays[key], key) for key in keys}
        config = from_json(ScdPolicyConfig, {**to_json(experiment.policy), **settings})
        kind = policy_class(policy_type(experiment.model.architecture))
        return kind(network, Normalizer(statistics, dict.fromkeys(keys, "min_max")), data.spec, config)

    return make


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
