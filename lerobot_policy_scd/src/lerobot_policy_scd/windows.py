"""The loss on windows as LeRobot cuts them: one pass of the encoder, chunks learned at many of its control steps.

It is that of `scd_robot.training` for windows of one length, without what needs Lightning; a test compares the two.

Shapes: B windows, T encoder steps, P actions of a window = stride * (T - 1) + k + Ta, k past actions, Ta chunk length,
L = k + Ta, M positions, Da action width.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from scd_robot.diffusion import FlowTimeConfig, corrupt, interpolate, sample_flow_time
from scd_robot.model import ScdModel

__all__ = ["WindowDraws", "Windows", "window_loss"]


@dataclass(frozen=True)
class Windows:
    """A batch, normalised.

    Attributes:
        observation: (B, T, ...) by key, pictures uint8.
        step_valid: (B, T) bool, False before the episode began: a history begins at the first step that is valid.
        action: (B, P, Da) from k control steps before the first encoder step on.
        action_valid: (B, P) bool, False outside the episode.
    """

    observation: Mapping[str, Tensor]
    step_valid: Tensor
    action: Tensor
    action_valid: Tensor


@dataclass(frozen=True)
class WindowDraws:
    """Random quantities of a batch.

    Attributes:
        position: (B, M) int64 encoder steps whose chunks are denoised.
        position_valid: (B, M) bool, False where a window has fewer valid steps than M.
        flow_time: (B, M).
        noise: (B, M, L, Da).
        corruption: (B * M, K, D) of the context.
    """

    position: Tensor
    position_valid: Tensor
    flow_time: Tensor
    noise: Tensor
    corruption: Tensor

    @classmethod
    def random(cls, model: ScdModel, windows: Windows, positions: int) -> "WindowDraws":
        """Drawn from torch's generator, whose state LeRobot saves and restores."""
        config, valid = model.config, windows.step_valid
        # Valid steps in random order come first.
        order, position = torch.rand(valid.shape, device=valid.device).masked_fill(~valid, -1.0).sort(descending=True)
        position, chosen = position[:, :positions], order[:, :positions] >= 0
        rng = np.random.default_rng(int(torch.randint(2**62, ())))
        time = sample_flow_time(FlowTimeConfig(), tuple(position.shape), rng)
        length, device = config.num_past_actions + config.chunk_length, valid.device
        return cls(
            position,
            chosen,
            torch.from_numpy(time).to(device),
            torch.randn(*position.shape, length, config.action_dim, device=device),
            torch.randn(position.numel(), config.num_context_tokens, config.width, device=device),
        )


def window_loss(model: ScdModel, windows: Windows, draws: WindowDraws) -> tuple[Tensor, Tensor]:
    """Squared velocity errors (mean over Da) summed over the counted actions of each window, and their number, (B,)."""
    config, position = model.config, draws.position
    pictures = dict.fromkeys(config.image_keys, windows.step_valid)
    context = model.encode_at(position, windows.observation, present=pictures or None, stream=windows.step_valid.long())
    context = model.samples(context, 1)
    if config.context_corruption:
        context = corrupt(context, draws.corruption, config.context_corruption)

    offset = torch.arange(-config.num_past_actions, config.chunk_length, device=position.device)
    index = config.history_stride * position[..., None] + offset + config.num_past_actions  # (B, M, L)
    rows = torch.arange(len(position), device=position.device)[:, None, None]
    data, valid = windows.action[rows, index], windows.action_valid[rows, index]
    # A history that begins inside an episode knows no actions from before.
    first = (~windows.step_valid).sum(1)[:, None, None]
    valid = valid & ((offset >= 0) | (config.history_stride * (position[..., None] - first) + offset >= 0))

    flow_time = draws.flow_time.flatten()[:, None]
    path = interpolate(draws.noise.flatten(0, 1), data.flatten(0, 1), flow_time)
    said = model.velocity(path.x_t, flow_time, context, valid.flatten(0, 1))
    error = (said.float() - path.velocity).square().mean(-1).view(valid.shape)
    counted = valid & draws.position_valid[..., None]
    return torch.where(counted, error, 0.0).sum((1, 2)), counted.sum((1, 2))
