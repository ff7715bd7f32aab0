"""Few-step objectives: the flow's average velocity is their fixed point, gradients stop, one step finds the modes."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from scd_robot.diffusion import (
    MIP_TIME,
    FlowTimeConfig,
    SamplerConfig,
    interpolate,
    mean_flow,
    sample,
    sample_flow_time,
    sample_mip_time,
    sample_step_end,
    shortcut,
)
from scd_robot.errors import ConfigError

OBJECTIVES = [mean_flow, shortcut]
LEAD = 1e-6  # of quotients in float64
MEAN, STD = 0.7, 0.3  # of Gaussian data; 0 would be a single point


def spread(time: Tensor, std: float) -> Tensor:
    """Standard deviation of x_t where data is N(MEAN, std^2)."""
    return ((1 - time) ** 2 + (time * std) ** 2).sqrt()


def flow(x: Tensor, time: Tensor, end: Tensor, std: float = STD) -> Tensor:
    """Where the flow carries x from flow time `time` until `end`, each (B, L), exactly."""
    time, end = time[..., None], end[..., None]
    return MEAN * end + spread(end, std) / spread(time, std) * (x - MEAN * time)


def average(x: Tensor, time: Tensor, end: Tensor, std: float = STD) -> Tensor:
    """The exact average velocity of that flow; float64, since the step may be short."""
    return (flow(x, time, end, std) - x) / (end - time)[..., None]


def marginal(x: Tensor, time: Tensor, std: float = STD) -> Tensor:
    """The exact velocity, the derivative of `flow` by `end` at `time`."""
    time = time[..., None]
    slope = (time * std**2 - (1 - time)) / spread(time, std) ** 2
    return MEAN + slope * (x - MEAN * time)


def points(batch: int = 5, length: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """x, flow times, and ends after them."""
    torch.manual_seed(0)
    time = torch.rand(batch, length, dtype=torch.float64) * 0.7
    return torch.randn(batch, length, 2, dtype=torch.float64), time, time + 0.05 + 0.2 * torch.rand_like(time)


@pytest.mark.parametrize("std", [STD, 0.0])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_average_velocity_of_the_flow_is_its_own_target(objective: Callable, std: float) -> None:
    x, time, end = points()
    options = {"lead": LEAD} if objective is mean_flow else {}
    said, target = objective(lambda *at: average(*at, std), x, time, end, marginal(x, time, std), **options)
    torch.testing.assert_close(said, average(x, time, end, std))
    torch.testing.assert_close(target, said, atol=1e-5, rtol=1e-5)


def test_mean_flow_takes_the_derivative_along_the_path() -> None:
    x, time, end = points()
    velocity, eps = torch.randn_like(x), 1e-5

    def anything(x: Tensor, time: Tensor, end: Tensor) -> Tensor:
        return torch.sin(x.cumsum(1) * (1 + time[..., None])) + (end - time)[..., None] ** 2

    _, target = mean_flow(anything, x, time, end, velocity, LEAD)
    ahead, behind = (anything(x + s * velocity, time + s, end) for s in (eps, -eps))
    expected = velocity + (end - time)[..., None] * (ahead - behind) / (2 * eps)
    torch.testing.assert_close(target, expected, atol=1e-4, rtol=1e-4)
    assert (target - velocity).abs().max() > 0.1


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_step_without_length_is_flow_matching(objective: Callable) -> None:
    x, time, _ = points()
    velocity = torch.randn_like(x)
    _, target = objective(lambda x, t, e: x.sum(1, keepdim=True) * t[..., None] + x, x, time, time, velocity)
    torch.testing.assert_close(target, velocity)


def test_tokens_that_are_clean_already_do_not_move() -> None:
    x, time, end = points(length=2)
    time[:, 0] = end[:, 0] = 1.0
    velocity = torch.randn_like(x)
    still = velocity.clone()
    still[:, 0] = 0

    def mixes(x: Tensor, time: Tensor, end: Tensor) -> Tensor:
        return (x * (1 + time[..., None])).sum(1, keepdim=True).expand_as(x)

    _, target = mean_flow(mixes, x, time, end, velocity, LEAD)
    change = (still + still * time[..., None] + x * torch.tensor([0.0, 1.0])[:, None]).sum(1)
    torch.testing.assert_close(target[:, 1], velocity[:, 1] + (end - time)[:, 1:] * change, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_gradients_flow_through_what_is_said_and_stop_at_the_target(objective: Callable) -> None:
    x, time, end = points()
    weight = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)

    def said_by(x: Tensor, time: Tensor, end: Tensor) -> Tensor:
        return torch.tanh(weight * x) * (1 + time + end)[..., None]

    said, target = objective(said_by, x, time, end, torch.randn_like(x))
    assert not target.requires_grad
    (found,) = torch.autograd.grad(said.sum(), weight)
    (expected,) = torch.autograd.grad(said_by(x, time, end).sum(), weight)
    torch.testing.assert_close(found, expected)


def test_a_quotient_over_a_straight_path_is_exact_at_any_length() -> None:
    x, time, end = points()
    for lead in (0.03, 0.1, 1.0):  # the last reaches beyond every end
        said, target = mean_flow(lambda *at: average(*at, 0.0), x, time, end, marginal(x, time, 0.0), lead)
        torch.testing.assert_close(target, said)


@pytest.mark.parametrize("steps", [1, 2, 4, 16])
def test_average_velocities_are_exact_with_any_number_of_steps(steps: int) -> None:
    noise = torch.randn(7, 1, 2, dtype=torch.float64)

    def velocity(x: Tensor, time: float) -> Tensor:
        start = torch.full((7, 1), time, dtype=torch.float64)
        return average(x, start, start + 1 / steps)

    result = sample(velocity, noise, SamplerConfig("average", steps))
    assert result.num_evaluations == steps
    torch.testing.assert_close(result.x, MEAN + STD * noise)


@pytest.mark.parametrize("steps", [1, 2])
def test_mip_predicts_from_zeros_then_from_its_prediction_without_noise(steps: int) -> None:
    known = torch.tensor([[[True], [False]]])
    seen: list[tuple[Tensor, float]] = []

    def velocity(x: Tensor, time: float) -> Tensor:  # predicts 2 at first, then what it is shown plus 0.5
        seen.append((x, time))
        return torch.full_like(x, 2.0) if time == 0 else (0.5 - x * (1 - 1 / MIP_TIME)) / (1 - time)

    def clamp(x: Tensor, time: float) -> Tensor:
        return torch.where(known, 7.0, x)

    result = sample(velocity, torch.randn(1, 2, 1), SamplerConfig("mip", steps), clamp)
    assert result.num_evaluations == steps
    assert [time for _, time in seen] == [0.0, MIP_TIME][:steps]
    torch.testing.assert_close(seen[0][0], torch.tensor([[[7.0], [0.0]]]))
    assert seen[-1][0][0, 0] == 7.0
    torch.testing.assert_close(result.x, torch.tensor([[[7.0], [2.0 if steps == 1 else 2.5]]]))


def test_mip_has_no_third_step() -> None:
    with pytest.raises(ConfigError, match="1 or 2 denoising steps, got 8"):
        SamplerConfig("mip", 8)


def test_draws_of_steps_and_of_mip_are_the_stated_ones() -> None:
    rng = np.random.default_rng(0)
    time = sample_flow_time(FlowTimeConfig(), (20_000,), rng)
    end = sample_step_end(time, rng)
    assert end.dtype == np.float32
    assert ((end >= time) & (end <= 1)).all()
    moves = end > time
    assert moves.mean() == pytest.approx(0.5, abs=0.02)
    assert np.median(((end - time) / (1 - time))[moves]) == pytest.approx(0.75, abs=0.02)
    draws = sample_mip_time((20_000,), rng)
    assert set(draws.tolist()) == {0.0, float(np.float32(MIP_TIME))}
    assert draws.mean() == pytest.approx(MIP_TIME / 2, abs=0.02)


def learned(objective: Callable | None) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """A small network, trained on data that is -1 or 1; by flow matching without an objective."""
    torch.manual_seed(0)
    rng, size = np.random.default_rng(0), (256, 1)
    network = nn.Sequential(nn.Linear(3, 48), nn.SiLU(), nn.Linear(48, 48), nn.SiLU(), nn.Linear(48, 1))
    optimizer = torch.optim.Adam(network.parameters(), 5e-3)

    def velocity(x: Tensor, time: Tensor, end: Tensor) -> Tensor:
        return network(torch.cat((x, time[..., None], (end - time)[..., None]), -1))

    for _ in range(600):
        data = torch.from_numpy(rng.choice(np.float32([-1, 1]), (*size, 1)))
        noise = torch.from_numpy(rng.standard_normal((*size, 1), np.float32))
        start = sample_flow_time(FlowTimeConfig("uniform"), size, rng)
        end = torch.from_numpy(sample_step_end(start, rng))
        time = torch.from_numpy(start)
        path = interpolate(noise, data, time)
        if objective is None:
            said, target = velocity(path.x_t, time, time), path.velocity
        else:
            said, target = objective(velocity, path.x_t, time, end, path.velocity)
        optimizer.zero_grad()
        (said - target).square().mean().backward()
        optimizer.step()
    return velocity


def test_one_step_finds_both_modes_where_flow_matching_gives_their_mean() -> None:
    noise = torch.randn(1000, 1, 1, generator=torch.Generator().manual_seed(0))
    start, end = torch.zeros(1000, 1), torch.ones(1000, 1)
    plain = noise + learned(None)(noise, start, start).detach()
    assert (plain.abs() > 0.5).float().mean() < 0.2
    for objective in OBJECTIVES:
        x = noise + learned(objective)(noise, start, end).detach()
        assert ((x.abs() - 1).abs() < 0.5).float().mean() > 0.8, objective
        assert abs(x.sign().mean()) < 0.15, objective
