"""Rotary positions that stay exact in endless streams, and flow-time features.

Shapes: B batch, N heads, L tokens, Dh head width, D width.
"""

import math

import torch
from torch import Tensor, nn

__all__ = ["FlowTimeEmbedding", "RotaryEmbedding", "apply_rotary"]

_TURN_BITS = 32  # one full turn is 2**32 phase units
_TURN_MASK = (1 << _TURN_BITS) - 1


class RotaryEmbedding(nn.Module):
    """Rotary position embedding (Su et al., arXiv 2104.09864) with integer phases.

    A float angle `position * frequency` loses its fraction as the stream grows: after a million control steps float32
    resolves 0.06 rad. Here each frequency is an integer number of 2**-32 turns per control step, so the phase is
    computed exactly in int64 and reduced to one turn before it becomes a float: step 1,000,000 is as exact as step 0.
    """

    increments: Tensor

    def __init__(self, head_dim: int, base: float = 10_000.0) -> None:
        super().__init__()
        frequency = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)  # [rad / control step]
        increments = torch.round(frequency * (2**_TURN_BITS / (2 * math.pi))).to(torch.int64)
        self.register_buffer("increments", increments, persistent=False)

    def forward(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Of integer `positions` (B, L) what `apply_rotary` takes, each (B, 1, 1, L, Dh) of `dtype`.

        Angles are computed in float64 for float64, else in float32.
        """
        phase = (positions[:, None, None, :, None] * self.increments) & _TURN_MASK
        angle = phase.to(torch.float64 if dtype == torch.float64 else torch.float32) * (2 * math.pi / 2**_TURN_BITS)
        cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
        return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates queries or keys x (B, N, any, L, Dh) by what `RotaryEmbedding` gives; by -sin back again."""
    first, second = x.chunk(2, dim=-1)
    return torch.addcmul(x * cos.to(x.dtype), torch.cat((second, first), dim=-1), sin.to(x.dtype))


class FlowTimeEmbedding(nn.Module):
    """Sinusoidal features of flow time, then a two-layer MLP: (...,) -> (..., D)."""

    frequencies: Tensor

    def __init__(self, width: int, num_frequencies: int = 64, scale: float = 1000.0) -> None:
        super().__init__()
        exponents = torch.arange(num_frequencies, dtype=torch.float64) / num_frequencies
        frequencies = (scale * 10_000.0**-exponents).float()  # not every accelerator holds float64
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.mlp = nn.Sequential(nn.Linear(2 * num_frequencies, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, flow_time: Tensor) -> Tensor:
        """Embeds flow_time (...), in [0, 1], as (..., D)."""
        angle = flow_time[..., None] * self.frequencies.to(flow_time.dtype)
        return self.mlp(torch.cat((angle.cos(), angle.sin()), dim=-1))
