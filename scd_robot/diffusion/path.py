"""The straight path from noise to data, and how flow times are drawn in training.

Convention everywhere in this package: flow time 0 is noise, 1 is data.

Shapes: B batch, L tokens, Da action width.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from scd_robot.config import check_finite
from scd_robot.errors import ConfigError

__all__ = ["FlowTimeConfig", "PathSample", "interpolate", "sample_flow_time"]


@dataclass(frozen=True)
class FlowTimeConfig:
    """Distribution of the flow time in training.

    Attributes:
        distribution: "uniform"; "logit_normal", sigmoid(mean + std * normal) (Esser et al., arXiv 2403.03206);
            "beta", 0.999 * (1 - b) with b ~ Beta(1.5, 1), more mass near noise (Black et al., arXiv 2410.24164).
        mean: of the logit-normal.
        std: of the logit-normal, positive.
    """

    distribution: Literal["uniform", "logit_normal", "beta"] = "beta"
    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        check_finite(self)
        if self.distribution not in ("uniform", "logit_normal", "beta"):
            raise ConfigError(f"distribution must be uniform, logit_normal or beta, got {self.distribution!r}")
        if not self.std > 0:
            raise ConfigError(f"std of the flow time's logit must be positive, got {self.std}")


def sample_flow_time(config: FlowTimeConfig, shape: tuple[int, ...], rng: np.random.Generator) -> NDArray[np.float32]:
    """Draws flow times in [0, 1) of the given shape, float32."""
    if config.distribution == "uniform":
        return rng.random(shape, dtype=np.float32)
    if config.distribution == "logit_normal":
        logit = config.mean + config.std * rng.standard_normal(shape)
        return (1 / (1 + np.exp(-logit))).astype(np.float32)
    return (0.999 * (1 - rng.beta(1.5, 1.0, shape))).astype(np.float32)


@dataclass(frozen=True)
class PathSample:
    """A point on the path and what the network should say there.

    Attributes:
        x_t: (B, L, Da) noised data.
        velocity: (B, L, Da) regression target, d x_t / d flow_time.
    """

    x_t: Tensor
    velocity: Tensor


def interpolate(noise: Tensor, data: Tensor, flow_time: Tensor) -> PathSample:
    """Rectified flow (Liu et al., arXiv 2209.03003): x_t = (1 - t) * noise + t * data, velocity = data - noise.

    Args:
        noise: (B, L, Da) standard normal.
        data: (B, L, Da).
        flow_time: (B, L) or (B, 1), one per token or one for all.
    """
    time = flow_time[..., None]
    return PathSample(x_t=(1 - time) * noise + time * data, velocity=data - noise)
