"""Weights, gain and direction of guided real-time chunking (arXiv 2506.07339)."""

import math

import pytest
import torch
from torch import Tensor

from scd_robot.diffusion import (
    SamplerConfig,
    TowardsActions,
    guidance_gain,
    guided_velocity,
    overlap_weights,
    sample,
)
from scd_robot.errors import ConfigError


def test_weights_are_those_of_the_paper() -> None:
    length, executed, delay = 10, 3, 2
    expected = []
    for i in range(length):
        c = (length - executed - i) / (length - executed - delay + 1)
        soft = c * (math.e**c - 1) / (math.e - 1)
        expected.append(1.0 if i < delay else soft if i < length - executed else 0.0)
    weights = overlap_weights(length, executed, delay)
    torch.testing.assert_close(weights, torch.tensor(expected, dtype=torch.float64))
    assert (weights.diff()[delay - 1 : length - executed] < 0).all(), "it falls over the overlap and its end"


@pytest.mark.parametrize(("executed", "delay", "ones"), [(5, 5, 5), (9, 1, 1), (4, 0, 0)])
def test_weights_at_the_limits_of_the_split(executed: int, delay: int, ones: int) -> None:
    weights = overlap_weights(10, executed, delay)
    assert (weights == 1).sum() == ones
    assert (weights[10 - executed :] == 0).all()
    assert (weights[: 10 - executed] > 0).all()


def test_a_delay_beyond_the_overlap_is_refused() -> None:
    with pytest.raises(ConfigError, match="got 6, 10 and 5"):
        overlap_weights(10, 5, 6)


def test_the_gain_is_that_of_the_paper_and_finite_at_both_ends() -> None:
    for t in (0.3, 0.5, 0.7):
        r2 = (1 - t) ** 2 / (t**2 + (1 - t) ** 2)
        assert guidance_gain(t, 100.0) == pytest.approx((1 - t) / (t * r2))
    assert guidance_gain(0.5, 1.5) == 1.5
    assert [guidance_gain(t, 5.0) for t in (0.0, 1.0, 1e-320, 1 - 1e-16)] == [5.0] * 4


class Field:
    """A velocity that mixes all numbers of x, in float64."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.mix = torch.randn(6, 6, generator=generator, dtype=torch.float64) * 0.5
        self.x, self.target = (torch.randn(2, 3, 2, generator=generator, dtype=torch.float64) for _ in range(2))
        self.weights = torch.tensor([1.0, 0.4, 0.0], dtype=torch.float64)[:, None]

    def __call__(self, x: Tensor, flow_time: float) -> Tensor:
        return torch.tanh(x.flatten(1) @ self.mix + flow_time).view_as(x)

    def error(self, x: Tensor, flow_time: float) -> float:
        denoised = x + (1 - flow_time) * self(x, flow_time)
        return float((self.weights * (self.target - denoised) ** 2).sum() / 2)


@pytest.mark.parametrize("flow_time", [0.0, 0.4, 0.9])
def test_the_exact_correction_is_the_slope_of_the_weighted_error(flow_time: float) -> None:
    """Against finite differences: it goes down the error sum w (y - D)^2 / 2."""
    field, step = Field(), 1e-6
    slope = torch.zeros_like(field.x)
    for index in range(field.x.numel()):
        ahead, behind = field.x.clone(), field.x.clone()
        ahead.view(-1)[index] += step
        behind.view(-1)[index] -= step
        slope.view(-1)[index] = (field.error(ahead, flow_time) - field.error(behind, flow_time)) / (2 * step)
    with torch.no_grad():
        guided = guided_velocity(field, field.target, field.weights, 5.0, "exact")(field.x, flow_time)
    assert not guided.requires_grad
    correction = (guided - field(field.x, flow_time)) / guidance_gain(flow_time, 5.0)
    torch.testing.assert_close(correction, -slope, rtol=1e-6, atol=1e-8)


def test_the_identity_variant_is_the_weighted_error_itself() -> None:
    field = Field()
    guided = guided_velocity(field, field.target, field.weights, 5.0, "identity")(field.x, 0.5)
    slope = field(field.x, 0.5)
    error = field.weights * (field.target - field.x - 0.5 * slope)
    torch.testing.assert_close(guided, slope + 2.0 * error)
    exact = guided_velocity(field, field.target, field.weights, 5.0, "exact")(field.x, 0.5)
    assert (exact - guided).abs().max() > 0.01


@pytest.mark.parametrize("jacobian", ["exact", "identity"])
def test_a_free_flow_ends_on_the_target_where_the_weight_is_one(jacobian: str) -> None:
    """With v = 0 five Euler steps at the gain of the paper leave nothing of the distance, and 0 weight all of it."""
    start = torch.randn(1, 4, 2, dtype=torch.float64)
    target, weights = torch.ones_like(start), torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=torch.float64)[:, None]
    velocity = guided_velocity(lambda x, t: 0.0 * x, target, weights, 5.0, jacobian)  # type: ignore[arg-type]
    result = sample(velocity, start, SamplerConfig("euler", 5)).x
    torch.testing.assert_close(result, torch.where(weights > 0, target, start))


@pytest.mark.parametrize("wrong", [{"max_gain": 0.0}, {"max_gain": math.inf}, {"jacobian": "none"}])
def test_settings_are_checked(wrong: dict[str, float | str]) -> None:
    with pytest.raises(ConfigError):
        TowardsActions(torch.zeros(1, 2, 3), 1, **wrong)  # type: ignore[arg-type]
