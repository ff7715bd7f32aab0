"""Objectives of policies that need one or two denoising steps; networks enter as callables.

Two families. A network that is told where its step ends learns the *average* velocity of the flow from here to there,

    (end - t) * u(x_t, t, end) = integral of v from t to end,

by which a step of any length is exact: `mean_flow` and `shortcut` learn it from data, two ways. A network that is told
nothing new is enough for MIP, whose two steps are regressions: `MIP_TIME`, `sample_mip_time`.

Shapes: B batch, L tokens, Da action width.
"""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["MIP_TIME", "mean_flow", "sample_mip_time", "sample_step_end", "shortcut"]

AverageVelocity = Callable[[Tensor, Tensor, Tensor], Tensor]

MIP_TIME = 0.9  # flow time of MIP's second step, t* in arXiv 2512.01809
MEAN_FLOW_LEAD = 0.03  # of the quotient of differences
_INSTANTANEOUS = 0.5  # share of draws whose step has no length: flow matching, on which everything else rests


def sample_step_end(flow_time: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.float32]:
    """Draws where steps from `flow_time` end, in [flow_time, 1], same shape.

    Half of them have no length. The others are long rather than short (half of them go at least three quarters of the
    way to the data), since few steps are what they are learned for.
    """
    ends = 1 - (1 - flow_time) * rng.random(flow_time.shape, dtype=np.float32) ** 2
    return np.where(rng.random(flow_time.shape) < _INSTANTANEOUS, flow_time, ends).astype(np.float32)


def sample_mip_time(shape: tuple[int, ...], rng: np.random.Generator) -> NDArray[np.float32]:
    """Draws 0, MIP's first step, or `MIP_TIME`, its second, each half of the time."""
    return np.where(rng.random(shape) < 0.5, 0.0, MIP_TIME).astype(np.float32)


def mean_flow(
    average: AverageVelocity,
    x: Tensor,
    flow_time: Tensor,
    end_time: Tensor,
    velocity: Tensor,
    lead: float = MEAN_FLOW_LEAD,
) -> tuple[Tensor, Tensor]:
    """MeanFlow (Geng et al., arXiv 2505.13447, eq. 6 to 11; its times run from data to noise).

    The derivative of the definition by t, along the path and with `end` held, gives the target

        u = v + (end - t) * du,   du = derivative of u(x_t, t, end) along the path.

    The paper takes du from a Jacobian-vector product. Here it is a quotient of differences over `lead`: networks that
    embed flow time by fine sinusoids, as ours do, were never taught a slope at that scale. The quotient costs less,
    too, and works with every kernel of attention.

    Args:
        average: called as average(x, flow_time, end_time) -> (B, L, Da); differentiable.
        x: (B, L, Da) point on the path.
        flow_time: (B, L) or (B, 1), t.
        end_time: as flow_time, at least t; where both are equal the target is `velocity`.
        velocity: (B, L, Da), of the path through x.
        lead: flow time from t to the second point of the quotient, or to `end` where that is nearer.

    Returns:
        The network's average velocity, and its target, through which no gradient flows; each (B, L, Da).
    """
    ahead = torch.minimum(flow_time + lead, end_time)
    step, rest = (ahead - flow_time)[..., None], (end_time - ahead)[..., None]
    said = average(x, flow_time, end_time)
    with torch.no_grad():
        change = average(x + step * velocity, ahead, end_time) - said
        target = velocity + torch.where(rest > 0, rest / step * change, 0.0)
    return said, target


def shortcut(
    average: AverageVelocity, x: Tensor, flow_time: Tensor, end_time: Tensor, velocity: Tensor
) -> tuple[Tensor, Tensor]:
    """Shortcut model (Frans et al., arXiv 2410.12557): one step is as good as two of half its length.

    Their step sizes are powers of two; here steps have any length. Arguments and results are those of `mean_flow`.
    """
    middle = (flow_time + end_time) / 2
    with torch.no_grad():
        first = average(x, flow_time, middle)
        second = average(x + (middle - flow_time)[..., None] * first, middle, end_time)
        target = torch.where((end_time > flow_time)[..., None], (first + second) / 2, velocity)
    return average(x, flow_time, end_time), target
