"""Decoders that are told where their step ends, and plans by the solvers 'average' and 'mip', of both architectures."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from scd_robot.diffusion import MIP_TIME, SamplerConfig, mean_flow
from scd_robot.errors import ConfigError
from scd_robot.model import ActionModel, ScdConfig, build_model

CONFIG = ScdConfig(
    observation_shapes={"a": (3,)},
    action_dim=2,
    width=32,
    num_heads=2,
    encoder_layers=1,
    decoder_layers=2,
    history_length=2,
    chunk_length=6,
    num_past_actions=4,
    context_corruption=0.0,
)
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "prefix": {"fusion": "prefix"},
    "concat": {"fusion": "concat"},
    "entangled": {"architecture": "entangled"},
}
pytestmark = pytest.mark.parametrize("architecture", ARCHITECTURES)


def make(architecture: str, randomise: str = "", **changes: object) -> ActionModel[Any]:
    """Weights that are all random, or random in the parts whose names hold `randomise`."""
    torch.manual_seed(0)
    model = build_model(dataclasses.replace(CONFIG, **ARCHITECTURES[architecture], **changes)).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if randomise in name:
                scale = 0.5 / parameter.shape[-1] ** 0.5 if parameter.ndim > 1 else 0.5
                parameter.copy_(torch.randn_like(parameter) * scale)
    return model


def contexts(model: ActionModel[Any]) -> Any:
    """Of four samples."""
    torch.manual_seed(1)
    observation = {"a": torch.randn(2, 3, 3, dtype=torch.float64)}
    return model.samples(model.encode_at(torch.tensor([[0, 2], [1, 2]]), observation), 1)


def noise_of(model: ActionModel[Any], past: bool = False) -> Tensor:
    torch.manual_seed(2)
    length = model.config.chunk_length + (model.config.num_past_actions if past else 0)
    return torch.randn(4, length, 2, dtype=torch.float64)


def times(value: float) -> Tensor:
    return torch.full((4, 1), value, dtype=torch.float64)


@torch.no_grad()
def test_the_new_input_begins_as_if_it_were_not_there(architecture: str) -> None:
    teacher = make(architecture)
    student = build_model(dataclasses.replace(teacher.config, step_end_input=True)).double().eval()
    missing, unexpected = student.load_state_dict(teacher.state_dict(), strict=False)
    assert not unexpected
    assert {name.rpartition(".mlp.")[0] for name in missing} == {"decoder.step_length"}
    context, x, start = contexts(teacher), noise_of(teacher, past=True), times(0.3)
    expected = teacher.velocity(x, start, context)
    for end in (None, times(0.3), times(0.8), times(1.0)):
        assert torch.equal(student.velocity(x, start, context, end_time=end), expected)
    sampler = SamplerConfig("average", 4)
    plan = student.plan(context, noise=x[:, 4:], sampler=sampler)
    assert torch.equal(plan.actions, teacher.plan(context, noise=x[:, 4:], sampler=SamplerConfig("euler", 4)).actions)


@pytest.mark.parametrize("past", [False, True])
@torch.no_grad()
def test_every_step_of_a_plan_knows_its_end(architecture: str, past: bool) -> None:
    model = make(architecture, step_end_input=True)
    context, noise = contexts(model), noise_of(model, past)
    x = noise
    for start, end in ((0.0, 0.5), (0.5, 1.0)):
        x = x + 0.5 * model.velocity(x, times(start), context, end_time=times(end))
    plan = model.plan(context, noise=noise, sampler=SamplerConfig("average", 2), with_past=past)
    assert plan.num_evaluations == 2
    torch.testing.assert_close(plan.actions, x[:, -6:])
    if past:
        torch.testing.assert_close(plan.past, x[:, :4])
    usual = model.plan(context, noise=noise, sampler=SamplerConfig("euler", 2), with_past=past)
    assert (plan.actions - usual.actions).abs().max() > 1e-3, "the step's end has to matter"


@torch.no_grad()
def test_committed_actions_are_shown_clean_with_a_step_that_has_ended(architecture: str) -> None:
    model = make(architecture, step_end_input=True, max_delay_steps=3)
    context, noise = contexts(model), noise_of(model)
    prefix = torch.randn(4, 2, 2, dtype=torch.float64)
    x = torch.cat((prefix, noise[:, 2:]), dim=1)
    start, end = (torch.full((4, 6), value, dtype=torch.float64) for value in (0.0, 1.0))
    start[:, :2] = 1.0
    expected = x + model.velocity(x, start, context, end_time=end)
    plan = model.plan(context, noise=noise, prefix=prefix, sampler=SamplerConfig("average", 1))
    assert torch.equal(plan.actions[:, :2], prefix)
    torch.testing.assert_close(plan.actions[:, 2:], expected[:, 2:])


@pytest.mark.parametrize("max_delay", [0, 3])
@torch.no_grad()
def test_mip_regresses_twice_and_ignores_the_noise(architecture: str, max_delay: int) -> None:
    model = make(architecture, max_delay_steps=max_delay)
    context, zeros = contexts(model), torch.zeros_like(noise_of(model))
    first = model.velocity(zeros, times(0.0), context)
    x = MIP_TIME * first
    second = x + (1 - MIP_TIME) * model.velocity(x, times(MIP_TIME), context)
    for steps, expected in ((1, first), (2, second)):
        plan = model.plan(context, noise=noise_of(model), sampler=SamplerConfig("mip", steps))
        assert plan.num_evaluations == steps
        torch.testing.assert_close(plan.actions, expected)
    prefix = torch.randn(4, 2, 2, dtype=torch.float64)
    committed = model.plan(context, prefix=prefix, sampler=SamplerConfig("mip", 2)).actions
    assert torch.equal(committed[:, :2], prefix)
    assert (committed - second)[:, 2:].abs().max() > 1e-6, "the rest of the plan has to know of the prefix"


def test_mean_flow_differentiates_the_decoder(architecture: str) -> None:
    """Through attention, masks and the history alike; against derivatives in forward mode."""
    model = make(architecture, step_end_input=True)
    context, x, eps = contexts(model), noise_of(model, past=True), 5e-8
    valid = torch.ones(4, 10, dtype=torch.bool)
    valid[0, 7:] = False
    velocity, start, end = torch.randn_like(x), times(0.2), times(0.9)

    def average(x: Tensor, start: Tensor, end: Tensor) -> Tensor:
        return model.velocity(x, start, context, valid, end)

    said, target = mean_flow(average, x, start, end, velocity, 2 * eps)
    torch.testing.assert_close(said, average(x, start, end))
    with sdpa_kernel(SDPBackend.MATH):  # the only kernel with derivatives in forward mode
        _, change = torch.func.jvp(lambda x, t: average(x, t, end), (x, start), (velocity, torch.ones_like(start)))
    expected = (velocity + 0.7 * change).detach()
    torch.testing.assert_close(target, expected, atol=1e-3, rtol=1e-3)
    assert (expected - velocity).abs().max() > 1e-2


def test_a_model_that_knows_no_steps_cannot_take_them(architecture: str) -> None:
    model = make(architecture)
    with pytest.raises(ConfigError, match="step_end_input"):
        model.plan(contexts(model), sampler=SamplerConfig("average", 1))
