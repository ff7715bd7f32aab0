"""Solvers of the probability-flow ODE dx/dt = v(x, t) from flow time 0 (noise) to 1 (data), and shorter ways there.

They take any callable, count its evaluations and know no network.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from scd_robot.diffusion.few_steps import MIP_TIME
from scd_robot.errors import ConfigError

__all__ = ["Sample", "SamplerConfig", "evaluation_times", "sample"]

Velocity = Callable[[Tensor, float], Tensor]
Clamp = Callable[[Tensor, float], Tensor]

_EVALUATIONS = {"euler": 1, "heun": 2, "midpoint": 2, "average": 1, "mip": 1}


@dataclass(frozen=True)
class SamplerConfig:
    """How noise becomes data.

    Attributes:
        solver: of the ODE: "euler" evaluates the velocity once per step, "heun" and "midpoint" twice (second order).
            "average" is for networks that say the average velocity over a step (objectives mean_flow and shortcut).
            "mip" predicts the data from zeros, then once more from `MIP_TIME` of what it predicted (objective mip): no
            noise, so that the same context gives the same sample.
        num_denoising_steps: equal steps from flow time 0 to 1; 1 or 2 for "mip".
    """

    solver: Literal["euler", "heun", "midpoint", "average", "mip"] = "euler"
    num_denoising_steps: int = 8

    def __post_init__(self) -> None:
        if self.solver not in _EVALUATIONS:
            raise ConfigError(f"solver must be one of {sorted(_EVALUATIONS)}, got {self.solver!r}")
        if self.num_denoising_steps < 1:
            raise ConfigError(f"num_denoising_steps must be at least 1, got {self.num_denoising_steps}")
        if self.solver == "mip" and self.num_denoising_steps > 2:
            raise ConfigError(f"solver 'mip' takes 1 or 2 denoising steps, got {self.num_denoising_steps}")

    @property
    def num_evaluations(self) -> int:
        """NFE: velocity evaluations per sample."""
        return self.num_denoising_steps * _EVALUATIONS[self.solver]


@dataclass(frozen=True)
class Sample:
    """Result of `sample`.

    Attributes:
        x: at flow time 1.
        num_evaluations: NFE, how often the velocity was called.
    """

    x: Tensor
    num_evaluations: int


def evaluation_times(config: SamplerConfig) -> list[float]:
    """The distinct flow times at which `sample` will call the velocity, ascending."""
    steps = config.num_denoising_steps
    if config.solver == "mip":
        return [0.0, MIP_TIME][:steps]
    times = {i / steps for i in range(steps)}
    if config.solver == "heun":
        times.add(1.0)
    if config.solver == "midpoint":
        times |= {(i + 0.5) / steps for i in range(steps)}
    return sorted(times)


def sample(velocity: Velocity, noise: Tensor, config: SamplerConfig, clamp: Clamp | None = None) -> Sample:
    """Integrates from noise to data.

    Args:
        velocity: called as velocity(x, flow_time) with flow_time from `evaluation_times`; returns dx/dt like x, for
            solver "average" the average of it until the next of these times.
        noise: x at flow time 0, any shape; solver "mip" takes zeros in its place.
        config: solver and number of steps.
        clamp: called as clamp(x, flow_time) on every state before the velocity sees it and on the result, to hold
            known parts of x on their value.
    """
    hold: Clamp = clamp or (lambda x, _: x)
    count = 0

    def slope(x: Tensor, flow_time: float) -> Tensor:
        nonlocal count
        count += 1
        return velocity(x, flow_time)

    if config.solver == "mip":
        x = torch.zeros_like(noise)
        for time in evaluation_times(config):
            x = hold(time * x, time)
            x = hold(x + (1 - time) * slope(x, time), 1.0)
        return Sample(x, count)
    steps = config.num_denoising_steps
    dt = 1 / steps
    x = hold(noise, 0.0)
    for i in range(steps):
        start, end = i / steps, (i + 1) / steps
        first = slope(x, start)
        if config.solver in ("euler", "average"):
            x = torch.add(x, first, alpha=dt)
        elif config.solver == "midpoint":
            middle = (i + 0.5) / steps
            x = x + dt * slope(hold(x + 0.5 * dt * first, middle), middle)
        else:
            x = x + 0.5 * dt * (first + slope(hold(x + dt * first, end), end))
        x = hold(x, end)
    return Sample(x, count)
