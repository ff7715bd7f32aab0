"""The entangled rival: what is cached across control steps and denoising steps equals computing everything anew."""

import dataclasses
from copy import deepcopy

import pytest
import torch
from model_streams import ENTANGLED, randomised, stream_of

from scd_robot.diffusion import SamplerConfig
from scd_robot.errors import ConfigError
from scd_robot.model import CausalDitModel, HistoryContext, ScdModel, build_model
from scd_robot.nn import attention

VARIANTS = {
    "per_key": {},
    "joint": {"observation_tokens": "joint"},
    "past_action": {"past_action_input": "full"},
    "memoryless": {"history_length": 1},
    "no_past": {"num_past_actions": 0},
    "local": {"local_layers": 2},
    "all_local": {"local_layers": 3},
}


def streamed(model: CausalDitModel, observation: dict, past: torch.Tensor) -> list[HistoryContext]:
    """The context of every control step, in a control loop; copied, for the cache goes on."""
    cache, found = model.new_cache(past.shape[0]), []
    for t in range(past.shape[1]):
        step = {key: value[:, t] for key, value in observation.items()}
        reads_past = model.config.past_action_input != "none"
        context = model.encode_step(step, cache, past_action=past[:, t] if reads_past else None)
        found.append(context.rows(torch.arange(len(past))))
    return found


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
@torch.no_grad()
def test_plans_from_the_cache_equal_those_from_the_whole_history(variant, dtype, tolerance) -> None:
    """At every control step, before, at and after eviction."""
    config = dataclasses.replace(ENTANGLED, **VARIANTS[variant])
    model = randomised(config, dtype)
    steps = config.receptive_field + 2 * config.history_length + 3
    observation, past = stream_of(config, 2, steps, dtype)
    reads_past = config.past_action_input != "none"
    noise = torch.randn(2, config.chunk_length, config.action_dim, dtype=dtype)
    position = torch.arange(steps).expand(2, -1)
    whole = model.encode_at(position, observation, past if reads_past else None)
    repeated = noise.repeat_interleave(steps, 0)
    full = model.plan(whole, noise=repeated).actions.unflatten(0, (2, steps))
    for t, context in enumerate(streamed(model, observation, past)):
        stepped = model.plan(context, noise=noise).actions
        assert (stepped - full[:, t]).abs().max() < tolerance * full.abs().max(), f"control step {t}"


@torch.no_grad()
def test_a_reset_row_plans_from_its_new_history_alone_and_the_others_go_on() -> None:
    model = randomised(ENTANGLED)
    cache, begins = model.new_cache(3), [0, 0, 0]
    resets = {4: [1], 11: [0, 2], 12: [2], 23: [1]}  # before and after control steps were evicted
    observation, _ = stream_of(ENTANGLED, 3, 31, torch.float64)
    noise = torch.randn(3, 4, 2, dtype=torch.float64)
    for t in range(31):
        if t in resets:
            cache.reset(torch.isin(torch.arange(3), torch.tensor(resets[t])))
            begins = [t if row in resets[t] else begin for row, begin in enumerate(begins)]
        context = model.encode_step({key: value[:, t] for key, value in observation.items()}, cache)
        plans = model.plan(context, noise=noise).actions
        for row, begin in enumerate(begins):
            since = {key: value[row : row + 1, begin : t + 1] for key, value in observation.items()}
            whole = model.encode_at(torch.tensor([[t - begin]]), since)
            expected = model.plan(whole, noise=noise[row : row + 1]).actions
            torch.testing.assert_close(plans[row : row + 1], expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize("local_layers", [0, 2, 3])
@torch.no_grad()
def test_what_is_absent_is_not_seen_for_want_of_anything_else(local_layers: int, monkeypatch) -> None:
    """Plans of windows in which nothing is there come from their noise alone, and no softmax is over nothing."""
    real = attention.scaled_dot_product_attention

    def looked_at(*given: torch.Tensor, attn_mask: torch.Tensor) -> torch.Tensor:
        sees = attn_mask if attn_mask.dtype == torch.bool else attn_mask > -torch.inf
        assert sees.any(-1).all()
        return real(*given, attn_mask=attn_mask)

    monkeypatch.setattr(attention, "scaled_dot_product_attention", looked_at)
    config = dataclasses.replace(ENTANGLED, local_layers=local_layers, history_length=3)
    model, steps, generator = randomised(config), 20, torch.Generator().manual_seed(2)
    observation, _ = stream_of(config, 2, steps, torch.float64)
    present = {key: torch.rand(2, steps, generator=generator) < 0.4 for key in observation}
    stream = (torch.arange(steps) >= torch.tensor([[6], [13]])).long()
    noise = torch.randn(2, 4, 2, dtype=torch.float64)
    whole = model.encode_at(torch.arange(steps).expand(2, -1), observation, present=present, stream=stream)
    full = model.plan(whole, noise=noise.repeat_interleave(steps, 0)).actions.unflatten(0, (2, steps))
    blind = ~whole.seen.any(-1)
    assert 3 < blind.sum() < steps
    cache = model.new_cache(2)
    for t in range(steps):
        cache.reset(stream[:, t] != stream[:, max(0, t - 1)])
        now, there = ({key: value[:, t] for key, value in given.items()} for given in (observation, present))
        plans = model.plan(model.encode_step(now, cache, present=there), noise=noise).actions
        torch.testing.assert_close(plans, full[:, t], atol=1e-10, rtol=0)
    other = model.encode_at(
        torch.arange(steps).expand(2, -1), {key: value + 1 for key, value in observation.items()}, present=present
    )
    again = model.plan(other, noise=noise.repeat_interleave(steps, 0)).actions.unflatten(0, (2, steps))
    blind &= ~other.seen.any(-1)
    assert blind.any()
    torch.testing.assert_close(again[blind], full[blind], atol=1e-10, rtol=0)


@torch.no_grad()
def test_features_stream_too() -> None:
    model = randomised(ENTANGLED)
    observation, past = stream_of(ENTANGLED, 3, 40, torch.float64)
    streams = torch.stack([context.features[:, 0] for context in streamed(model, observation, past)], dim=1)
    torch.testing.assert_close(streams, model.encode(observation), atol=1e-9, rtol=0)


@torch.no_grad()
def test_what_is_written_behind_the_history_equals_joining_both() -> None:
    """Without gradients keys and values are written into one buffer per plan, with them they are joined each time."""
    model = randomised(ENTANGLED)
    observation, past = stream_of(ENTANGLED, 2, 9, torch.float64)
    context = streamed(model, observation, past)[-1]
    x, flow_time = torch.randn(2, 7, 2, dtype=torch.float64), torch.rand(2, 7, dtype=torch.float64)
    buffered = model.velocity(x, flow_time, context)
    with torch.enable_grad():
        torch.testing.assert_close(model.velocity(x, flow_time, context), buffered)
    prepared = model.decoder.prepare(context)
    condition = model.decoder.condition(flow_time)
    model.decoder.velocity(torch.randn_like(x), condition, prepared)  # what it leaves in the buffer is never read again
    torch.testing.assert_close(model.decoder.velocity(x, condition, prepared), buffered)


@pytest.mark.parametrize("local_layers", [0, 1, 3])
@torch.no_grad()
def test_a_sample_sees_its_window_and_nothing_after_it(local_layers: int) -> None:
    config = dataclasses.replace(ENTANGLED, local_layers=local_layers)
    model = randomised(config)
    steps, at = config.receptive_field + 6, config.receptive_field + 3
    observation, _ = stream_of(config, 1, steps, torch.float64)
    noise, position = torch.randn(1, 4, 2, dtype=torch.float64), torch.tensor([[at]])

    def plan(seen: dict) -> torch.Tensor:
        return model.plan(model.encode_at(position, seen), noise=noise).actions

    before = plan(observation)
    for step in range(steps):
        changed = {key: value.clone() for key, value in observation.items()}
        changed["a"][:, step] += 1.0
        age = at - step
        moved = (plan(changed) - before).abs().max() > 1e-9
        assert moved == (0 <= age < config.receptive_field), f"age {age}"


@torch.no_grad()
def test_without_memory_only_the_steps_that_are_asked_for_are_encoded() -> None:
    config = dataclasses.replace(ENTANGLED, history_length=1)
    model = randomised(config)
    observation, _ = stream_of(config, 2, 12, torch.float64)
    position = torch.tensor([[7, 2], [11, 0]])
    context = model.encode_at(position, observation, stream=torch.arange(12).expand(2, -1) // 5)
    assert context.keys_values[0][0].shape[2] == 2 * model.tokenizer.tokens_per_step
    noise = torch.randn(4, 4, 2, dtype=torch.float64)
    plans = model.plan(context, noise=noise).actions
    everywhere = model.encode_at(torch.arange(12).expand(2, -1), observation)
    torch.testing.assert_close(plans, model.plan(everywhere.at(position), noise=noise).actions)


@torch.no_grad()
def test_streams_and_samples_do_not_mix() -> None:
    model = randomised(ENTANGLED)
    observation, _ = stream_of(ENTANGLED, 2, 12, torch.float64)
    stream = torch.zeros(2, 12, dtype=torch.int64)
    stream[1, 5:] = 1
    position = torch.tensor([[3, 11], [4, 8]])
    x = torch.randn(8, 7, 2, dtype=torch.float64)
    flow_time = torch.rand(8, 1, dtype=torch.float64)
    together = model.velocity(x, flow_time, model.samples(model.encode_at(position, observation, stream=stream), 2))
    for row in range(2):
        alone = {key: value[row : row + 1] for key, value in observation.items()}
        for sample in range(2):
            for copy in range(2):
                r = 4 * row + 2 * sample + copy
                at = position[row : row + 1, sample : sample + 1]
                context = model.encode_at(at, alone, stream=stream[row : row + 1])
                torch.testing.assert_close(
                    together[r : r + 1], model.velocity(x[r : r + 1], flow_time[r : r + 1], context)
                )


@torch.no_grad()
def test_past_actions_that_are_left_out_change_nothing() -> None:
    model = randomised(ENTANGLED)
    observation, past = stream_of(ENTANGLED, 2, 9, torch.float64)
    context = streamed(model, observation, past)[-1]
    x, flow_time = torch.randn(2, 7, 2, dtype=torch.float64), torch.full((2, 1), 0.4, dtype=torch.float64)
    with_past = model.velocity(x, flow_time, context)
    torch.testing.assert_close(with_past[:, 3:], model.velocity(x[:, 3:], flow_time, context))


def test_a_model_is_copied_as_any_module_is() -> None:
    model = build_model(ENTANGLED)
    copied = deepcopy(model).state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, copied[name]), name


def test_it_has_as_many_layers_and_reads_as_many_tokens() -> None:
    separable = ScdModel(dataclasses.replace(ENTANGLED, architecture="separable"))
    entangled = CausalDitModel(ENTANGLED)
    assert isinstance(build_model(ENTANGLED), CausalDitModel)
    assert len(entangled.decoder.blocks) == len(separable.encoder.blocks) + len(separable.decoder.blocks)
    assert entangled.tokenizer.slot_names == separable.tokenizer.slot_names[:-1]  # all but the context's slot
    cache = entangled.new_cache(1)
    assert len(cache.keys_values) == len(entangled.decoder.blocks)


def test_evaluations_are_counted() -> None:
    model = randomised(ENTANGLED, torch.float32)
    observation, past = stream_of(ENTANGLED, 1, 3, torch.float32)
    with torch.no_grad():
        plan = model.plan(streamed(model, observation, past)[-1], sampler=SamplerConfig(num_denoising_steps=5))
    assert plan.num_evaluations == 5


@pytest.mark.parametrize(
    "change",
    [
        {"context_corruption": 0.05},
        {"num_context_tokens": 2},
        {"memory_gate": True},
        {"architecture": "both"},
        {"local_layers": 4},
    ],
)
def test_what_it_has_not_is_refused(change) -> None:
    with pytest.raises(ConfigError, match=next(iter(change))):
        dataclasses.replace(ENTANGLED, **change)
