"""Policies for the tiny dataset whose weights are all drawn at random."""

from typing import Any

import torch
from tiny import tiny_data, tiny_experiment

from scd_robot.config import from_json, to_json
from scd_robot.model import build_model
from scd_robot.normalization import Normalizer, compute_statistics
from scd_robot.policies import ScdPolicy
from scd_robot.policies.registry import policy_class, policy_type
from scd_robot.policies.scd import ScdPolicyConfig


def small_policy(model: dict[str, Any] | None = None, **settings: Any) -> ScdPolicy:
    """With statistics of the tiny dataset; `model` and `settings` replace fields of architecture and policy."""
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
    policy: ScdPolicy = kind(network, Normalizer(statistics, dict.fromkeys(keys, "min_max")), data.spec, config)
    return policy
