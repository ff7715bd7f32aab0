"""Plans that are guided towards a running chunk, and plans of which some numbers are given, of both architectures."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from scd_robot.diffusion import SamplerConfig, TowardsActions, guidance_gain, overlap_weights
from scd_robot.errors import ConfigError, ShapeError
from scd_robot.model import ActionModel, FixedActions, ScdConfig, build_model

CONFIG = ScdConfig(
    observation_shapes={"a": (3,)},
    action_dim=2,
    width=16,
    num_heads=2,
    encoder_layers=1,
    decoder_layers=1,
    history_length=2,
    chunk_length=6,
    num_past_actions=2,
)
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "prefix": {"fusion": "prefix"},
    "concat": {"fusion": "concat"},
    "entangled": {"architecture": "entangled", "context_corruption": 0.0},
}
SAMPLER = SamplerConfig("euler", 5)
every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)


def make(architecture: str, **changes: object) -> ActionModel[Any]:
    torch.manual_seed(0)
    model = build_model(dataclasses.replace(CONFIG, **ARCHITECTURES[architecture], **changes)).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.5 / parameter.shape[-1] ** 0.5 if parameter.ndim > 1 else 0.5
            parameter.copy_(torch.randn_like(parameter) * scale)
    return model


def contexts(model: ActionModel[Any]) -> Any:
    """Of four samples, as a policy has them: made in inference mode."""
    torch.manual_seed(1)
    with torch.inference_mode():
        observation = {"a": torch.randn(2, 3, 3, dtype=torch.float64)}
        return model.samples(model.encode_at(torch.tensor([[0, 2], [1, 2]]), observation), 1)


def noise_of(model: ActionModel[Any], past: bool = False) -> Tensor:
    torch.manual_seed(2)
    length = model.config.chunk_length + (model.config.num_past_actions if past else 0)
    return torch.randn(4, length, 2, dtype=torch.float64)


def towards(jacobian: Any = "exact", max_gain: float = 5.0) -> TowardsActions:
    torch.manual_seed(3)
    return TowardsActions(torch.randn(4, 4, 2, dtype=torch.float64), 2, max_gain, jacobian)


@every_architecture
def test_one_guided_step_is_that_of_finite_differences(architecture: str) -> None:
    """Of one Euler step from noise, where the gain is the largest: x + v + gain * (w (y - D))^T dD/dx."""
    model, goal = make(architecture), towards(max_gain=1.0)
    context, noise = contexts(model), noise_of(model)
    one = SamplerConfig("euler", 1)
    weights = overlap_weights(6, 2, 2)[:, None]
    target = torch.cat((goal.actions, torch.zeros(4, 2, 2, dtype=torch.float64)), dim=1)

    def plan(x: Tensor, **settings: Any) -> Tensor:
        with torch.no_grad():
            return model.plan(context, sampler=one, noise=x, **settings).actions  # at t = 0 that is D(x)

    error = weights * (target - plan(noise))
    step, expected = 1e-6, torch.zeros_like(noise)
    for i in range(6):
        for j in range(2):
            moved = torch.zeros_like(noise)
            moved[:, i, j] = step
            slope = (plan(noise + moved) - plan(noise - moved)) / (2 * step)
            expected[:, i, j] = (error * slope).sum((1, 2))
    guided = plan(noise, towards=goal)
    torch.testing.assert_close(guided, plan(noise) + guidance_gain(0.0, 1.0) * expected, rtol=1e-6, atol=1e-8)
    assert (guided - plan(noise, towards=towards("identity", 1.0))).abs().max() > 1e-3


@every_architecture
@pytest.mark.parametrize("jacobian", ["exact", "identity"])
def test_a_guided_plan_is_the_same_with_gradients_off_and_leads_towards_the_running_chunk(
    architecture: str, jacobian: str
) -> None:
    model, goal = make(architecture), towards(jacobian)
    context, noise = contexts(model), noise_of(model)
    settings: dict[str, Any] = {"sampler": SAMPLER, "noise": noise}
    with torch.inference_mode():
        free = model.plan(context, **settings)
        guided = model.plan(context, **settings, towards=goal)
    with torch.no_grad():
        again = model.plan(context, **settings, towards=goal, conditioning=model.conditioning(SAMPLER))
    torch.testing.assert_close(guided.actions, again.actions)
    assert not again.actions.requires_grad
    assert guided.num_evaluations == free.num_evaluations == 5
    assert all(parameter.grad is None for parameter in model.parameters())

    def distance(actions: Tensor) -> float:
        return float((actions[:, :2] - goal.actions[:, :2]).square().mean())

    assert distance(guided.actions) < 0.5 * distance(free.actions)


@every_architecture
@torch.no_grad()
def test_past_actions_are_not_guided(architecture: str) -> None:
    """With weights on the chunk alone, a field that moves each number by itself leaves the past as it was."""
    model = make(architecture)
    with torch.no_grad():
        model.decoder.head.weight.zero_()  # the velocity does not depend on x
    context, noise = contexts(model), noise_of(model, past=True)
    settings: dict[str, Any] = {"sampler": SAMPLER, "noise": noise, "with_past": True}
    free, guided = model.plan(context, **settings), model.plan(context, **settings, towards=towards())
    assert free.past is not None
    assert guided.past is not None
    torch.testing.assert_close(guided.past, free.past)
    torch.testing.assert_close(guided.actions[:, :2], towards().actions[:, :2])
    torch.testing.assert_close(guided.actions[:, 4:], free.actions[:, 4:])


def test_guidance_is_refused_where_it_makes_no_sense() -> None:
    model = make("prefix", step_end_input=True)
    context = contexts(model)
    for solver, steps in (("average", 5), ("mip", 2)):
        with pytest.raises(ConfigError, match=f"solver '{solver}' does not ask for"):
            model.plan(context, sampler=SamplerConfig(solver, steps), towards=towards())  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="at least 5 denoising steps"):
        model.plan(context, sampler=SamplerConfig("euler", 4), towards=towards())
    with pytest.raises(ShapeError, match="the remaining actions must be"):
        model.plan(context, sampler=SAMPLER, towards=TowardsActions(torch.zeros(4, 6, 2), 1))
    with pytest.raises(ConfigError, match="delay_steps <= chunk_length - num_executed"):
        model.plan(context, sampler=SAMPLER, towards=TowardsActions(torch.zeros(4, 2, 2), 3))


@every_architecture
@pytest.mark.parametrize("sampler", [SAMPLER, SamplerConfig("heun", 3), SamplerConfig("mip", 2)])
@pytest.mark.parametrize("max_delay_steps", [0, 3])
@torch.no_grad()
def test_fixed_numbers_are_in_the_plan_and_change_the_others(
    architecture: str, sampler: SamplerConfig, max_delay_steps: int
) -> None:
    model = make(architecture, max_delay_steps=max_delay_steps)
    context, noise = contexts(model), noise_of(model)
    mask = torch.zeros(6, 2, dtype=torch.bool)
    mask[:, 1] = True
    values = torch.full((4, 6, 2), 0.7, dtype=torch.float64)
    prefix = torch.full((4, 2, 2), -0.3, dtype=torch.float64)
    settings: dict[str, Any] = {"sampler": sampler, "noise": noise}
    free = model.plan(context, **settings).actions
    fixed = model.plan(context, **settings, fixed=FixedActions(values, mask)).actions
    both = model.plan(context, **settings, fixed=FixedActions(values, mask), prefix=prefix).actions
    assert (fixed[..., 1] == 0.7).all()
    assert (fixed[..., 0] - free[..., 0]).abs().max() > 1e-4, "the rest takes it into account"
    assert (both[:, :2] == -0.3).all()
    assert (both[:, 2:, 1] == 0.7).all()


def test_fixed_numbers_hold_in_a_guided_plan_and_at_each_denoising_step() -> None:
    model = make("prefix")
    mask = torch.zeros(6, 2, dtype=torch.bool)
    mask[:, 0] = True
    values = torch.full((4, 6, 2), 0.7, dtype=torch.float64)
    noise, seen, velocity = noise_of(model), [], model.decoder.velocity

    def watched(x: Tensor, *rest: Any) -> Tensor:
        seen.append(x.detach()[..., 0])
        return velocity(x, *rest)

    model.decoder.velocity = watched
    plan = model.plan(
        contexts(model), sampler=SAMPLER, noise=noise, towards=towards(), fixed=FixedActions(values, mask)
    )
    for step, x in enumerate(seen):
        torch.testing.assert_close(x, (1 - step / 5) * noise[..., 0] + step / 5 * 0.7)
    assert len(seen) == 5
    assert (plan.actions[..., 0] == 0.7).all()


def test_fixed_actions_of_another_shape_are_refused() -> None:
    model = make("prefix")
    for values, mask in (((4, 5, 2), (5, 2)), ((4, 6, 2), (2,))):
        fixed = FixedActions(torch.zeros(values), torch.ones(mask, dtype=torch.bool))
        with pytest.raises(ShapeError, match="fixed actions must be values"):
            model.plan(contexts(model), sampler=SAMPLER, fixed=fixed)
