"""The tiny dataset seen by two cameras of different sizes, and small policies for it."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from tiny import tiny_data, tiny_experiment

from scd_robot.datasets import EpisodeDataset
from scd_robot.model import build_model
from scd_robot.nn import ImageConfig
from scd_robot.policies import ScdPolicy
from scd_robot.policies.registry import policy_class, policy_type
from scd_robot.training.start import fit_normalizer
from scd_robot.training.transformed import transformed
from scd_robot.transforms import TransformConfig
from scd_robot.types import ArraySpec

SHAPES = {"position": (2,), "eye": (16, 24, 3), "wrist": (8, 12, 1)}
MODEL = {"observation_shapes": SHAPES, "images": ImageConfig(channels=(8, 8)), "past_action_input": "none"}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "separable": {},
    "entangled": {"architecture": "entangled", "context_corruption": 0.0, "num_context_tokens": 1},
}


def picture_data(**changes: np.ndarray) -> EpisodeDataset:
    """The tiny dataset with two cameras in the place of the goal."""
    data, rng = tiny_data(), np.random.default_rng(3)
    frames = {key: rng.integers(0, 256, (data.num_steps, *SHAPES[key]), np.uint8) for key in ("eye", "wrist")}
    arrays = {key: array for key, array in data.arrays.items() if key != "goal"} | frames | changes
    specs = {key: ArraySpec(arrays[key].shape[1:], str(arrays[key].dtype)) for key in SHAPES}
    return replace(data, spec=replace(data.spec, observation=specs), arrays=arrays)


def picture_policy(architecture: str, data: EpisodeDataset, transforms: TransformConfig, **model: Any) -> ScdPolicy:
    """With random weights; `model` replaces fields of the architecture."""
    experiment = tiny_experiment(model={**MODEL, **ARCHITECTURES[architecture], **model})
    torch.manual_seed(0)
    network = build_model(experiment.model)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    normalizer = fit_normalizer(transformed(data, transforms), experiment)
    kind = policy_class(policy_type(architecture))
    policy: ScdPolicy = kind(network, normalizer, data.spec, experiment.policy, transforms=transforms)
    return policy
