"""Closed-form promises of path, flow times and solvers."""

import math

import numpy as np
import pytest
import torch

from scd_robot.diffusion import (
    FlowTimeConfig,
    SamplerConfig,
    corrupt,
    guide,
    interpolate,
    sample,
    sample_flow_time,
)
from scd_robot.diffusion.sampler import evaluation_times
from scd_robot.errors import ConfigError

SOLVERS = ["euler", "heun", "midpoint"]


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("steps", [1, 3, 8])
def test_constant_velocity_is_integrated_exactly(solver: str, steps: int) -> None:
    noise, shift = torch.randn(2, 4, 3, dtype=torch.float64), torch.randn(2, 4, 3, dtype=torch.float64)
    result = sample(lambda x, t: shift, noise, SamplerConfig(solver, steps))
    torch.testing.assert_close(result.x, noise + shift)


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2), ("midpoint", 2)])
def test_error_falls_with_the_order_of_the_solver(solver: str, order: int) -> None:
    start = torch.ones(1, dtype=torch.float64)

    def error(steps: int) -> float:
        result = sample(lambda x, t: x * (1 + t), start, SamplerConfig(solver, steps))
        return abs(float(result.x) - math.exp(1.5))  # x' = x (1 + t)

    assert math.log2(error(32) / error(64)) == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize(("solver", "per_step"), [("euler", 1), ("heun", 2), ("midpoint", 2)])
def test_evaluations_are_counted_and_announced(solver: str, per_step: int) -> None:
    config, seen = SamplerConfig(solver, 5), []

    def velocity(x: torch.Tensor, t: float) -> torch.Tensor:
        seen.append(t)
        return x

    result = sample(velocity, torch.ones(1), config)
    assert result.num_evaluations == len(seen) == config.num_evaluations == 5 * per_step
    assert sorted(set(seen)) == evaluation_times(config)


@pytest.mark.parametrize("solver", SOLVERS)
def test_clamped_entries_hold_their_value_at_every_evaluation(solver: str) -> None:
    known = torch.tensor([0.0, 1.0, 0.0], dtype=torch.bool)

    def velocity(x: torch.Tensor, t: float) -> torch.Tensor:
        assert x[1] == 7.0
        return torch.ones_like(x) * 3

    result = sample(velocity, torch.zeros(3), SamplerConfig(solver, 4), lambda x, t: torch.where(known, 7.0, x))
    torch.testing.assert_close(result.x, torch.tensor([3.0, 7.0, 3.0]))


def test_path_runs_from_noise_to_data_with_a_flow_time_per_token() -> None:
    noise, data = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    flow_time = torch.tensor([[0.0, 0.25, 1.0], [1.0, 0.5, 0.0]])
    path = interpolate(noise, data, flow_time)
    torch.testing.assert_close(path.x_t[0, 0], noise[0, 0])
    torch.testing.assert_close(path.x_t[0, 1], 0.75 * noise[0, 1] + 0.25 * data[0, 1])
    torch.testing.assert_close(path.x_t[1, 0], data[1, 0])
    torch.testing.assert_close(path.velocity, data - noise)
    torch.testing.assert_close(path.x_t + (1 - flow_time[..., None]) * path.velocity, data)


def test_flow_times_have_the_stated_distributions() -> None:
    rng = np.random.default_rng(0)
    uniform = sample_flow_time(FlowTimeConfig("uniform"), (40_000,), rng)
    normal = sample_flow_time(FlowTimeConfig("logit_normal", mean=1.0, std=0.5), (40_000,), rng)
    beta = sample_flow_time(FlowTimeConfig("beta"), (40_000,), rng)
    for times in (uniform, normal, beta):
        assert times.dtype == np.float32
        assert times.min() >= 0
        assert times.max() < 1
    assert uniform.mean() == pytest.approx(0.5, abs=0.01)
    assert np.median(normal) == pytest.approx(1 / (1 + math.exp(-1.0)), abs=0.01)
    assert beta.mean() == pytest.approx(0.999 * (1 - 0.6), abs=0.01)  # more mass near noise
    assert beta.max() <= 0.999


def test_guidance_scale_one_is_no_guidance_and_two_doubles_the_difference() -> None:
    strong, weak = torch.randn(3), torch.randn(3)
    torch.testing.assert_close(guide(strong, weak, 1.0), strong)
    torch.testing.assert_close(guide(strong, weak, 2.0), 2 * strong - weak)
    torch.testing.assert_close(corrupt(strong, weak, 0.1), strong + 0.1 * weak)


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ConfigError, match="num_denoising_steps"):
        SamplerConfig(num_denoising_steps=0)
    with pytest.raises(ConfigError, match="solver"):
        SamplerConfig(solver="rk45")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="std"):
        FlowTimeConfig(std=0.0)
