"""Promises of the decoder and of `ScdModel.plan`."""

import dataclasses

import pytest
import torch

from scd_robot.diffusion import SamplerConfig
from scd_robot.errors import ConfigError, ShapeError
from scd_robot.model import ScdConfig, ScdModel, build_model

CONFIG = ScdConfig(
    observation_shapes={"a": (3,)},
    action_dim=2,
    width=32,
    num_heads=2,
    encoder_layers=1,
    decoder_layers=3,
    history_length=2,
    num_context_tokens=3,
    chunk_length=6,
    num_past_actions=4,
)
FUSIONS = ["concat", "prefix"]


def randomised(**changes: object) -> ScdModel:
    torch.manual_seed(0)
    model = ScdModel(dataclasses.replace(CONFIG, **changes)).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(
                torch.randn_like(parameter) * (0.5 / parameter.shape[-1] ** 0.5 if parameter.ndim > 1 else 0.5)
            )
    return model


def inputs(model: ScdModel, batch: int = 4, past: bool = True) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    config = model.config
    length = config.chunk_length + (config.num_past_actions if past else 0)
    x = torch.randn(batch, length, config.action_dim, dtype=torch.float64)
    context = torch.randn(batch, config.num_context_tokens, config.width, dtype=torch.float64)
    return x, torch.rand(batch, length, dtype=torch.float64), context


@pytest.mark.parametrize("fusion", FUSIONS)
@torch.no_grad()
def test_parts_computed_once_per_plan_equal_recomputing(fusion: str) -> None:
    model = randomised(fusion=fusion)
    x, flow_time, context = inputs(model)
    prepared = model.decoder.prepare(context)
    for shift in (0.0, 0.3):
        times = (flow_time + shift).clamp(max=1)
        whole = model.decoder(x + shift, times, context)
        cached = model.decoder.velocity(x + shift, model.decoder.condition(times), prepared)
        assert torch.equal(whole, cached)


@pytest.mark.parametrize("delay", [0, 2])
@pytest.mark.parametrize("fusion", FUSIONS)
@torch.no_grad()
def test_a_plan_is_eulers_method_on_the_velocity_of_training(fusion: str, delay: int) -> None:
    """What follows from flow times that all tokens share is kept in another shape while a plan is denoised."""
    model = randomised(fusion=fusion, max_delay_steps=3)
    x, _, context = inputs(model, past=False)
    prefix, known = x[:, :delay] + 1.0, torch.arange(x.shape[1]) < delay
    plan = model.plan(context, sampler=SamplerConfig("euler", 4), noise=x, prefix=prefix if delay else None).actions
    x[:, :delay] = prefix
    for step in range(4):
        times = torch.where(known, 1.0, step / 4).expand(len(x), -1).double()
        x = torch.where(known[:, None], x, x + model.velocity(x, times, context) / 4)
    torch.testing.assert_close(plan, x)


@pytest.mark.parametrize("architecture", ["separable", "entangled"])
@torch.no_grad()
def test_plans_can_be_made_under_autocast(architecture: str) -> None:
    """As validation does in a training with bf16-mixed precision."""
    model = build_model(
        dataclasses.replace(CONFIG, architecture=architecture, context_corruption=0.0, num_context_tokens=1)
    )
    with torch.autocast("cpu", torch.bfloat16):
        context = model.samples(model.encode_at(torch.tensor([[1, 3]]), {"a": torch.randn(1, 5, 3)}), 2)
        assert model.plan(context).actions.isfinite().all()


@torch.no_grad()
def test_prefix_context_is_blind_to_noise_and_flow_time_while_concat_is_not() -> None:
    """In fusion `prefix` a full sequence with the prefix-LM mask gives the same as the cached keys and values."""
    model = randomised(fusion="prefix", num_past_actions=0)
    x, _, context = inputs(model)
    flow_time = torch.full((4, 1), 0.4, dtype=torch.float64)
    decoder = model.decoder
    conditions = decoder.condition(flow_time)
    embedded = decoder.context_embed(context) + decoder.context_position
    added = decoder.context_add(embedded.mean(1, keepdim=True))
    tokens = torch.cat((embedded, decoder.embed(x) + decoder.position + added), 1)
    count = context.shape[1]
    is_context = torch.arange(tokens.shape[1]) < count
    mask = ~is_context[:, None] | is_context[None, :]
    for block, modulation in zip(decoder.blocks, conditions.blocks, strict=True):
        neutral = (0.0, 1.0, 1.0) * 2  # shift, factor and gate
        pairs = zip(neutral, modulation, strict=True)
        both = tuple(torch.where(is_context[None, :, None], none, some) for none, some in pairs)
        tokens = block(tokens, both, mask)
    shift, factor = conditions.head
    normed = torch.nn.functional.layer_norm(tokens[:, count:], tokens.shape[-1:], eps=1e-6)
    expected = decoder.head(normed * factor + shift)
    torch.testing.assert_close(decoder(x, flow_time, context), expected)


@pytest.mark.parametrize("fusion", FUSIONS)
@torch.no_grad()
def test_context_that_adds_nothing_is_as_without(fusion: str) -> None:
    model, without = randomised(fusion=fusion), randomised(fusion=fusion, add_context=False)
    without.load_state_dict({name: value for name, value in model.state_dict().items() if "context_add" not in name})
    given = inputs(model)
    assert (model.decoder(*given) - without.decoder(*given)).abs().amin() > 1e-6
    for parameter in model.decoder.context_add.parameters():
        parameter.zero_()
    assert torch.equal(model.decoder(*given), without.decoder(*given))


@pytest.mark.parametrize("fusion", FUSIONS)
@torch.no_grad()
def test_leaving_out_the_past_changes_nothing_for_the_future(fusion: str) -> None:
    model = randomised(fusion=fusion)
    x, flow_time, context = inputs(model)
    shared = flow_time[:, :1]
    with_past = model.decoder(x, shared, context)
    without = model.decoder(x[:, 4:], shared, context)
    torch.testing.assert_close(with_past[:, 4:], without)


@pytest.mark.parametrize("fusion", FUSIONS)
@torch.no_grad()
def test_past_tokens_see_the_future_so_that_they_can_judge_it(fusion: str) -> None:
    model = randomised(fusion=fusion)
    x, flow_time, context = inputs(model)
    changed = x.clone()
    changed[:, -1] += 1
    moved = (model.decoder(changed, flow_time, context) - model.decoder(x, flow_time, context)).abs().amax((0, 2))
    assert (moved[:4] > 1e-6).all()


@pytest.mark.parametrize("fusion", FUSIONS)
@torch.no_grad()
def test_absent_tokens_are_seen_by_nobody(fusion: str) -> None:
    model = randomised(fusion=fusion)
    x, flow_time, context = inputs(model)
    valid = torch.ones(x.shape[:2], dtype=torch.bool)
    valid[0, :2], valid[1, -3:], valid[2] = False, False, False
    garbage = torch.where(valid[..., None], x, 1e3)
    first = model.decoder(x, flow_time[:, :1], context, valid)
    second = model.decoder(garbage, flow_time[:, :1], context, valid)
    torch.testing.assert_close(first[valid], second[valid])
    assert torch.isfinite(second).all()


@pytest.mark.parametrize("fusion", FUSIONS)
@torch.no_grad()
def test_one_shared_flow_time_equals_the_same_time_for_each_token(fusion: str) -> None:
    model = randomised(fusion=fusion)
    x, flow_time, context = inputs(model)
    shared = flow_time[:, :1]
    torch.testing.assert_close(
        model.decoder(x, shared, context), model.decoder(x, shared.expand(-1, x.shape[1]), context)
    )


@pytest.mark.parametrize("fusion", FUSIONS)
@torch.no_grad()
def test_context_decides_the_plan_and_rows_do_not_mix(fusion: str) -> None:
    model = randomised(fusion=fusion)
    x, _, context = inputs(model, past=False)
    plan = model.plan(context, noise=x).actions
    for row in range(4):
        alone = model.plan(context[row : row + 1], noise=x[row : row + 1]).actions
        torch.testing.assert_close(alone, plan[row : row + 1])
    other = model.plan(context.flip(0), noise=x).actions
    assert (other - plan).abs().max() > 1e-3


def test_a_new_model_predicts_zero_velocity() -> None:
    model = ScdModel(CONFIG)
    x, flow_time, context = (t.float() for t in inputs(model))
    assert torch.equal(model.decoder(x, flow_time, context), torch.zeros_like(x))


@pytest.mark.parametrize("max_delay", [0, 3])
@pytest.mark.parametrize("solver", ["euler", "heun", "midpoint"])
@torch.no_grad()
def test_plan_begins_with_exactly_the_committed_actions(max_delay: int, solver: str) -> None:
    model = randomised(max_delay_steps=max_delay)
    x, _, context = inputs(model, past=False)
    prefix = torch.randn(4, 2, 2, dtype=torch.float64)
    sampler = SamplerConfig(solver, 4)
    plan = model.plan(context, noise=x, prefix=prefix, sampler=sampler)
    assert torch.equal(plan.actions[:, :2], prefix)
    free = model.plan(context, noise=x, sampler=sampler).actions
    assert (plan.actions[:, 2:] - free[:, 2:]).abs().max() > 1e-6, "the rest of the plan has to know of the prefix"


@torch.no_grad()
def test_guidance_doubles_the_evaluations_and_scale_one_is_off() -> None:
    model = randomised(context_corruption=0.1)
    x, _, context = inputs(model, past=False)
    noise = torch.randn_like(context)
    plain = model.plan(context, noise=x)
    guided = model.plan(context, noise=x, guidance_scale=1.5, corruption_noise=noise)
    again = model.plan(context, noise=x, guidance_scale=1.5, corruption_noise=noise)
    assert guided.num_evaluations == 2 * plain.num_evaluations == 16
    assert torch.equal(guided.actions, again.actions)
    assert (guided.actions - plain.actions).abs().max() > 1e-6
    with pytest.raises(ConfigError, match="context_corruption"):
        randomised(context_corruption=0.0).plan(context, guidance_scale=1.5)


@torch.no_grad()
def test_plan_with_past_returns_both_parts() -> None:
    model = randomised()
    x, _, context = inputs(model)
    plan = model.plan(context, noise=x, with_past=True)
    assert plan.past is not None
    assert plan.past.shape == (4, 4, 2)
    alone = model.plan(context, noise=x[:, 4:])
    torch.testing.assert_close(plan.actions, alone.actions)


def test_wrong_noise_and_prefix_are_refused() -> None:
    model = randomised(max_delay_steps=2)
    x, _, context = inputs(model, past=False)
    with pytest.raises(ShapeError, match="noise must be"):
        model.plan(context, noise=x[:, 1:])
    with pytest.raises(ConfigError, match="at most 2"):
        model.plan(context, prefix=x[:, :3])
    with pytest.raises(ConfigError, match="shorter than chunk_length"):
        model.plan(context, prefix=x)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 30}, "multiple of"),
        ({"history_length": 0}, "history_length must be at least 1, got 0"),
        ({"fusion": "film"}, "fusion must be one of"),
        ({"observation_shapes": {}}, "observation_shapes is empty"),
        ({"observation_shapes": {"image": (8, 8)}}, "takes vectors"),
        ({"max_delay_steps": 6}, "below chunk_length"),
        ({"context_corruption": -0.1}, "must not be negative"),
    ],
)
def test_impossible_architectures_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(CONFIG, **change)


@pytest.mark.parametrize("architecture", ["separable", "entangled"])
def test_nothing_of_a_model_is_in_float64(architecture: str) -> None:
    """Which not every accelerator can hold."""
    changes = {"num_context_tokens": 1, "context_corruption": 0.0, "step_end_input": True}
    model = build_model(dataclasses.replace(CONFIG, architecture=architecture, **changes))
    assert {tensor.dtype for tensor in (*model.parameters(), *model.buffers())} <= {torch.float32, torch.int64}
