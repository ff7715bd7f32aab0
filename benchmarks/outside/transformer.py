"""The transformer of Diffusion Policy (arXiv 2303.04137, section III.A and appendix), written from the paper.

No installable package that is kept up has it. Diffusion step and observations are tokens that noisy actions attend to;
an action attends to itself and earlier ones, and to observations of its own control step and earlier ones.

Shapes: B rows, H actions, To observations, Do and Da widths, D model width.
"""

import math

import torch
from torch import Tensor, nn

__all__ = ["ActionTransformer"]


class ActionTransformer(nn.Module):
    """Predicts the noise of action chunks; takes the place of LeRobot's U-Net, with its arguments.

    Args:
        action_dim: Da.
        observation_dim: Do of one control step.
        horizon: H, the first of them for the first observation.
        num_observations: To.
        width: D.
        layers: of the decoder.
        heads: of attention.
        dropout: of attention and feed-forward layers.
    """

    def __init__(
        self,
        action_dim: int,
        observation_dim: int,
        horizon: int,
        num_observations: int,
        width: int = 256,
        layers: int = 8,
        heads: int = 4,
        dropout: float = 0.3,
    ) -> None:
        super().__init__()
        self._num_observations = num_observations
        self.action_input = nn.Linear(action_dim, width)
        self.observation_input = nn.Linear(observation_dim, width)
        self.action_position = nn.Parameter(torch.zeros(1, horizon, width))
        self.memory_position = nn.Parameter(torch.zeros(1, 1 + num_observations, width))
        self.memory_encoder = nn.Sequential(nn.Linear(width, 4 * width), nn.Mish(), nn.Linear(4 * width, width))
        layer = nn.TransformerDecoderLayer(
            width, heads, 4 * width, dropout, activation="gelu", batch_first=True, norm_first=True
        )
        self.decoder = nn.TransformerDecoder(layer, layers, norm=nn.LayerNorm(width))
        self.output = nn.Linear(width, action_dim)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        for position in (self.action_position, self.memory_position):
            nn.init.normal_(position, std=0.02)
        # True = hidden. Memory token 0 is the diffusion step, token 1 + i observation i.
        action, memory = torch.arange(horizon)[:, None], torch.arange(1 + num_observations)
        self.register_buffer("_later_actions", torch.arange(horizon) > action, persistent=False)
        self.register_buffer("_later_observations", memory - 1 > action, persistent=False)

    def forward(self, sample: Tensor, timestep: Tensor, global_cond: Tensor) -> Tensor:
        """Noise in `sample` (B, H, Da) at diffusion steps (B,), given observations (B, To * Do)."""
        observations = self.observation_input(global_cond.unflatten(1, (self._num_observations, -1)))
        step = _sinusoids(timestep, observations.shape[-1])[:, None]
        memory = self.memory_encoder(torch.cat([step, observations], 1) + self.memory_position)
        actions = self.action_input(sample) + self.action_position
        hidden = self.decoder(
            actions, memory, tgt_mask=self._later_actions, memory_mask=self._later_observations, tgt_is_causal=True
        )
        return self.output(hidden)


def _sinusoids(steps: Tensor, width: int) -> Tensor:
    """Sine and cosine embeddings (B, width) of diffusion steps (B,)."""
    rates = torch.exp(torch.arange(width // 2, device=steps.device) * (-math.log(10_000) / (width // 2 - 1)))
    angles = steps.float()[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], 1)
