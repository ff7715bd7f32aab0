"""Guided real-time chunking: a plan goes on as the running chunk did, though nothing was trained for it.

Black et al., arXiv 2506.07339: pseudo-inverse guidance of the flow towards the running chunk's remaining actions y,
each with a weight w. With the estimate of the data D(x) = x + (1 - t) v(x, t) the velocity becomes

    v + gain(t) * (w * (y - D(x)))^T dD/dx.

The product with the Jacobian dD/dx costs a pass back through the network at each denoising step. "identity" leaves it
out (dD/dx = 1): cheaper, and no longer the paper's method, for it moves each action by itself and lets the network find
out at the next denoising step.

Shapes: B batch, L tokens, Da action width, Ta chunk length H, s actions executed of the running chunk, d delay.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from scd_robot.errors import ConfigError

__all__ = ["Jacobian", "TowardsActions", "guidance_gain", "guided_velocity", "overlap_weights"]

Jacobian = Literal["exact", "identity"]
Velocity = Callable[[Tensor, float], Tensor]


@dataclass(frozen=True)
class TowardsActions:
    """What a chunk is guided towards.

    Attributes:
        actions: (B, n, Da) the running chunk's remaining actions, n = H - s; action 0 is for the plan's control step.
        delay_steps: d <= n, of them are carried out while the plan is made.
        max_gain: beta, which bounds the gain.
        jacobian: "exact", or "identity" (see above).
    """

    actions: Tensor
    delay_steps: int
    max_gain: float = 5.0
    jacobian: Jacobian = "exact"

    def __post_init__(self) -> None:
        if self.actions.ndim != 3:
            raise ConfigError(f"the remaining actions must be (B, n, Da), got {tuple(self.actions.shape)}")
        if not 0 < self.max_gain < float("inf"):
            raise ConfigError(f"max_gain must be positive and finite, got {self.max_gain}")
        if self.jacobian not in get_args(Jacobian):
            raise ConfigError(f"jacobian must be one of {', '.join(get_args(Jacobian))}, got {self.jacobian!r}")


def overlap_weights(chunk_length: int, num_executed: int, delay_steps: int) -> Tensor:
    """(Ta,) float64, arXiv 2506.07339, eq. 5: how much each action of a new chunk is to be as in the running one.

    1 for those that will have been carried out, i < d; c (e^c - 1) / (e - 1) with c = (H - s - i) / (H - s - d + 1) for
    d <= i < H - s, which falls from below 1 to above 0; 0 for the last s, of which the running chunk says nothing.

    Raises:
        ConfigError: not 0 <= d <= H - s.
    """
    overlap = chunk_length - num_executed
    if not 0 <= delay_steps <= overlap <= chunk_length:
        raise ConfigError(
            f"guidance needs 0 <= delay_steps <= chunk_length - num_executed, got {delay_steps}, {chunk_length} and "
            f"{num_executed}"
        )
    index = np.arange(chunk_length)
    c = (overlap - index) / (overlap - delay_steps + 1)
    falling = np.where(index < overlap, c * np.expm1(np.maximum(c, 0)) / np.expm1(1), 0.0)
    return torch.from_numpy(np.where(index < delay_steps, 1.0, falling))


def guidance_gain(flow_time: float, max_gain: float) -> float:
    """min(beta, (1 - t) / (t r^2)) with r^2 = (1 - t)^2 / (t^2 + (1 - t)^2): arXiv 2506.07339, eq. 2 and 4.

    That is (t^2 + (1 - t)^2) / (t (1 - t)), which is infinite at both ends of flow time: there it is beta.
    """
    product = flow_time * (1 - flow_time)
    square = flow_time**2 + (1 - flow_time) ** 2
    return max_gain if square >= max_gain * product else square / product


def guided_velocity(
    velocity: Velocity, target: Tensor, weights: Tensor, max_gain: float, jacobian: Jacobian
) -> Velocity:
    """A velocity that leads to `target` as far as the data allows.

    Args:
        velocity: called as velocity(x, flow_time) with x (B, L, Da); for "exact" differentiable in x.
        target: (B, L, Da), y.
        weights: broadcastable to that, w; 0 where there is no target.
        max_gain: beta.
        jacobian: see above. "exact" switches gradients on by itself, which inference mode does not allow.
    """

    def exact(x: Tensor, flow_time: float) -> Tensor:
        with torch.enable_grad():
            point = x.clone().requires_grad_()
            slope = velocity(point, flow_time)
            denoised = point + (1 - flow_time) * slope
            error = weights * (target - denoised.detach())
            (correction,) = torch.autograd.grad(denoised, point, error)
        return slope.detach() + guidance_gain(flow_time, max_gain) * correction

    def by_identity(x: Tensor, flow_time: float) -> Tensor:
        slope = velocity(x, flow_time)
        error = weights * (target - x - (1 - flow_time) * slope)
        return slope + guidance_gain(flow_time, max_gain) * error

    return exact if jacobian == "exact" else by_identity
