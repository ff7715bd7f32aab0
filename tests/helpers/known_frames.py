"""A model of frames whose every prediction is known: each action moves the picture by whole pixels."""

from typing import Any

import torch
from frame_models import SHAPE, frame_config, frame_experiment, moving_square
from torch import Tensor

from scd_robot.datasets import EpisodeDataset
from scd_robot.model import build_model
from scd_robot.policies import Imagination
from scd_robot.policies.scd import ScdPolicyConfig
from scd_robot.training.start import fit_normalizer

__all__ = ["SHAPE", "KnownFrames", "known_frames", "random_frames"]

DATA = moving_square()


class KnownFrames(Imagination):
    """Imagines that the picture moves by the action, rounded to pixels; what leaves on one side enters on the other."""

    def ahead(self, context: Any, cache: Any, picture: Tensor, action: Tensor, keys: Any) -> Tensor:
        """As of `Imagination`."""
        assert len(context) == len(cache.position) == len(picture) == len(action) == len(keys) or action.shape[1] == 1
        steps = self.normalizer.denormalize("action", action).round().int().tolist()
        frames = []
        for row, moves in zip(picture, steps, strict=True):
            shown = [row]
            for move in moves:
                shown.append(shown[-1].roll(tuple(move), dims=(0, 1)))
            frames.append(torch.stack(shown[1:]))
        return torch.stack(frames)


def known_frames(data: EpisodeDataset = DATA, **settings: Any) -> KnownFrames:
    """For pictures and actions of `data`; the model's weights do not matter."""
    model = build_model(frame_config())
    config = ScdPolicyConfig(num_executed=1, **settings)
    return KnownFrames(model, fit_normalizer(data, frame_experiment()), data.spec, config)


def random_frames(architecture: str = "separable", **settings: Any) -> Imagination:
    """A real model with random weights, none of them zero."""
    torch.manual_seed(0)
    model = build_model(frame_config(architecture))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    config = ScdPolicyConfig(num_executed=1, **settings)
    return Imagination(model, fit_normalizer(DATA, frame_experiment()), DATA.spec, config)
