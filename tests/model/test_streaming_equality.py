"""The central promise: streaming with the ring cache equals one pass over the whole stream, at every control step."""

import dataclasses

import pytest
import torch
from model_streams import randomised, stream_of

from scd_robot.errors import ShapeError
from scd_robot.model import FrameConfig, ScdConfig, ScdModel
from scd_robot.nn import ImageConfig, take_steps

CONFIG = ScdConfig(
    observation_shapes={"a": (3,), "b": (2,)},
    action_dim=2,
    width=32,
    num_heads=2,
    encoder_layers=3,
    decoder_layers=1,
    history_length=5,
    observation_tokens="per_key",
    num_context_tokens=2,
    context_in_history=True,
    chunk_length=4,
)
READERS = dataclasses.replace(CONFIG, context_in_history=False)
BOTH = pytest.mark.parametrize("config", [CONFIG, READERS], ids=["slots in the history", "slots that only read"])
CAMERAS = {"a": (3,), "eye": (16, 24, 3), "wrist": (9, 12, 1)}
SMALL = ImageConfig(channels=(8, 8), tokens_per_image=3)
VARIANTS = {
    "per_key": {},
    "joint": {"observation_tokens": "joint"},
    "gate": {"memory_gate": True},
    "past_action": {"past_action_input": "full"},
    "memoryless": {"history_length": 1},
    "window_two": {"history_length": 2},
    "cameras": {"observation_shapes": CAMERAS, "images": SMALL, "observation_tokens": "joint"},
    "patches": {
        "observation_shapes": {"eye": (16, 24, 4)},
        "images": ImageConfig(encoder="patch", tokens_per_image=1),
        "past_action_input": "full",
    },
    "bias": {"encoder_bias": True},
    "modulated": {"encoder_bias": True, "encoder_modulation": True, "context_in_history": False},
    "readers": {"context_in_history": False},
    "readers, gate": {"context_in_history": False, "memory_gate": True, "past_action_input": "full"},
    "readers, cameras": {
        "observation_shapes": CAMERAS,
        "images": SMALL,
        "frames": FrameConfig("eye", beside_actions=True),
        "context_in_history": False,
    },
    "frames": {
        "observation_shapes": CAMERAS,
        "images": SMALL,
        "memory_gate": True,
        "frames": FrameConfig("eye", beside_actions=True),
    },
}


def run_steps(model: ScdModel, observation: dict, past: torch.Tensor, first_position: int = 0) -> torch.Tensor:
    cache = model.new_cache(past.shape[0])
    cache.position += first_position
    out = []
    for t in range(past.shape[1]):
        step = {key: value[:, t] for key, value in observation.items()}
        reads_past = model.config.past_action_input != "none"
        out.append(model.encode_step(step, cache, past_action=past[:, t] if reads_past else None))
    return torch.stack(out, dim=1)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@torch.no_grad()
def test_step_matches_full_history_at_every_step(variant: str, dtype: torch.dtype, tolerance: float) -> None:
    config = dataclasses.replace(CONFIG, **VARIANTS[variant])
    model = randomised(config, dtype)
    steps = 3 * config.receptive_field + 7
    observation, past = stream_of(config, 3, steps, dtype)
    reads_past = config.past_action_input != "none"
    full = model.encode(observation, past if reads_past else None)
    stepped = run_steps(model, observation, past)
    error = (full - stepped).abs().amax(dim=(0, 2, 3))  # the context has unit RMS, so this is relative to the RMS
    assert error.shape == (steps,)
    assert error.max() < tolerance, f"first wrong step: {int((error >= tolerance).nonzero()[0])}"


@pytest.mark.parametrize("variant", ["readers", "readers, gate", "modulated"])
@torch.no_grad()
def test_what_the_last_layer_leaves_out_is_read_by_nobody(variant: str) -> None:
    """Of the history it makes keys and values only; `outputs` computes all tokens in all layers."""
    config = dataclasses.replace(CONFIG, **VARIANTS[variant])
    model = randomised(config)
    computed = []
    model.encoder.blocks[-1].mlp.register_forward_hook(lambda _, inputs, output: computed.append(output.shape[1]))
    observation, past = stream_of(config, 2, 11, torch.float64)
    tokens, valid = model._tokenize(observation, past if config.past_action_input != "none" else None, None, None, None)
    at = torch.tensor([[3, 8], [0, 10]])
    context = model.encoder(tokens, valid, at=at)
    everything = model.encoder.norm(model.encoder.outputs(tokens, valid, at=at))
    torch.testing.assert_close(context, everything[:, :, model.tokenizer.context_slots], atol=1e-12, rtol=0)
    slots = 2 * config.num_context_tokens
    assert computed == [slots, 11 * (tokens.shape[2] - config.num_context_tokens) + slots]


@BOTH
@pytest.mark.parametrize("layers", [1, 3])
@torch.no_grad()
def test_context_sees_exactly_its_receptive_field(layers: int, config: ScdConfig) -> None:
    config = dataclasses.replace(config, encoder_layers=layers)
    model = randomised(config)
    steps = config.receptive_field + 6
    observation, past = stream_of(config, 1, steps, torch.float64)
    last = run_steps(model, observation, past)[:, -1]
    for age in range(steps):
        changed = {key: value.clone() for key, value in observation.items()}
        changed["a"][:, steps - 1 - age] += 1.0
        for context in (run_steps(model, changed, past)[:, -1], model.encode(changed)[:, -1]):
            moved = (context - last).abs().max() > 1e-9
            assert moved == (age < config.receptive_field), f"age {age}, field {config.receptive_field}"


@BOTH
@torch.no_grad()
def test_rows_reset_at_different_times_are_independent_streams(config: ScdConfig) -> None:
    model = randomised(config)
    steps, resets = 60, {0: [], 1: [7, 30], 2: [31], 3: [1, 2, 3]}
    observation, _ = stream_of(config, 4, steps, torch.float64)
    stream = torch.zeros(4, steps, dtype=torch.int64)
    for row, times in resets.items():
        for time in times:
            stream[row, time:] += 1
    full = model.encode(observation, stream=stream)
    cache = model.new_cache(4)
    for t in range(steps):
        cache.reset(torch.tensor([t in resets[row] for row in range(4)]))
        context = model.encode_step({key: value[:, t] for key, value in observation.items()}, cache)
        torch.testing.assert_close(context, full[:, t], atol=1e-10, rtol=0)


@BOTH
@torch.no_grad()
def test_rows_that_pause_keep_their_own_position(config: ScdConfig) -> None:
    model = randomised(config)
    steps = 50
    observation, past = stream_of(config, 3, steps, torch.float64)
    full = run_steps(model, observation, past)
    cache = model.new_cache(3)
    done = torch.zeros(3, dtype=torch.int64)
    generator = torch.Generator().manual_seed(5)
    while (done < steps).any():
        active = (torch.rand(3, generator=generator) < 0.6) & (done < steps)
        index = done.clamp(max=steps - 1)
        now = {key: value[torch.arange(3), index] for key, value in observation.items()}
        context = model.encode_step(now, cache, active)
        assert torch.isfinite(context).all()
        expected = full[torch.arange(3), index]
        torch.testing.assert_close(context[active], expected[active], atol=1e-10, rtol=0)
        done += active
    assert cache.position.tolist() == [steps] * 3


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@torch.no_grad()
def test_equality_holds_a_million_steps_into_a_stream(dtype: torch.dtype, tolerance: float) -> None:
    model = randomised(CONFIG, dtype)
    start = 1_000_003
    observation, past = stream_of(CONFIG, 2, 3 * CONFIG.receptive_field, dtype)
    late_steps = run_steps(model, observation, past, first_position=start)
    late_full = model.encode(observation, first_position=start)
    early_full = model.encode(observation)
    assert (late_steps - late_full).abs().max() < tolerance
    assert (late_steps - early_full).abs().max() < tolerance


@BOTH
@torch.no_grad()
def test_absent_tokens_influence_nothing_and_no_row_is_nan(config: ScdConfig) -> None:
    model = randomised(config)
    steps = 40
    observation, _ = stream_of(config, 2, steps, torch.float64)
    present = {"b": torch.rand(2, steps, generator=torch.Generator().manual_seed(2)) < 0.5}
    full = model.encode(observation, present=present)
    garbage = {"a": observation["a"], "b": torch.where(present["b"][..., None], observation["b"], 1e3)}
    cache = model.new_cache(2)
    for t in range(steps):
        context = model.encode_step(
            {key: value[:, t] for key, value in garbage.items()}, cache, present={"b": present["b"][:, t]}
        )
        torch.testing.assert_close(context, full[:, t], atol=1e-10, rtol=0)
    nothing = {key: torch.zeros(2, steps, dtype=torch.bool) for key in config.observation_shapes}
    blind = model.encode(observation, present=nothing)
    assert torch.isfinite(blind).all()
    if not config.context_in_history:  # what is absent is not seen for want of anything else
        other = model.encode({key: value + 1 for key, value in observation.items()}, present=nothing)
        torch.testing.assert_close(blind, other, atol=1e-10, rtol=0)
        cache = model.new_cache(2)
        for t in range(steps):
            now = {key: value[:, t] for key, value in observation.items()}
            context = model.encode_step(now, cache, present={key: there[:, t] for key, there in nothing.items()})
            torch.testing.assert_close(context, blind[:, t], atol=1e-10, rtol=0)


@pytest.mark.parametrize("architecture", ["separable", "entangled"])
@torch.no_grad()
def test_an_absent_camera_influences_nothing(architecture: str) -> None:
    changes = {"observation_shapes": CAMERAS, "images": SMALL, "observation_tokens": "joint"}
    if architecture == "entangled":
        changes |= {"architecture": "entangled", "context_corruption": 0, "num_context_tokens": 1}
    config = dataclasses.replace(CONFIG, **changes)
    model = randomised(config)
    steps = 25
    observation, _ = stream_of(config, 2, steps, torch.float64)
    generator = torch.Generator().manual_seed(2)
    present = {key: torch.rand(2, steps, generator=generator) < 0.5 for key in ("eye", "wrist")}
    full = model.encode(observation, present=present)
    spoiled = {key: torch.where(there[..., None, None, None], observation[key], 255) for key, there in present.items()}
    cache = model.new_cache(2)
    for t in range(steps):
        now = {key: value[:, t] for key, value in {**observation, **spoiled}.items()}
        context = model.encode_step(now, cache, present={key: there[:, t] for key, there in present.items()})
        features = context if architecture == "separable" else context.features[:, 0]
        torch.testing.assert_close(features, full[:, t], atol=1e-10, rtol=0)
    assert (model.encode(observation) - full).abs().max() > 1e-3
    nothing = {key: torch.zeros(2, steps, dtype=torch.bool) for key in present}
    assert torch.isfinite(model.encode(observation, present=nothing)).all()


@BOTH
@pytest.mark.parametrize("gate", [False, True])
@torch.no_grad()
def test_contexts_of_some_steps_are_those_of_all(config: ScdConfig, gate: bool) -> None:
    """Also where a control step is asked for twice, and after the history was forgotten."""
    model = randomised(dataclasses.replace(config, memory_gate=gate))
    observation, _ = stream_of(config, 2, 20, torch.float64)
    stream = (torch.arange(20) >= torch.tensor([[9], [14]])).long()
    present = {"b": torch.rand(2, 20, generator=torch.Generator().manual_seed(2)) < 0.5}
    position = torch.tensor([[0, 3, 19, 9, 3], [13, 14, 1, 19, 2]])
    some = model.encode_at(position, observation, present=present, stream=stream)
    every = model.encode(observation, present=present, stream=stream)
    torch.testing.assert_close(some, take_steps(every, position), atol=1e-10, rtol=0)


@torch.no_grad()
def test_slots_that_only_read_are_not_kept() -> None:
    """What they say changes nothing later, and the cache has no place for them."""
    model = randomised(READERS)
    observation, _ = stream_of(READERS, 1, 6, torch.float64)
    kept, before = model.new_cache(1), model.encode(observation)
    assert kept.token_valid.shape == (1, 5, 2)
    assert randomised(CONFIG).new_cache(1).token_valid.shape == (1, 5, 4)
    history = model.encoder.outputs(*model.tokenizer(observation))[:, :, :2]
    model.tokenizer.type_embedding[2:] = model.tokenizer.type_embedding[2:].flip(-1)
    assert (model.encode(observation) - before).abs().max() > 1e-3
    torch.testing.assert_close(model.encoder.outputs(*model.tokenizer(observation))[:, :, :2], history)


@torch.no_grad()
def test_pictures_of_another_size_or_type_are_refused() -> None:
    config = dataclasses.replace(CONFIG, observation_shapes=CAMERAS, images=SMALL)
    model = randomised(config)
    observation, _ = stream_of(config, 1, 2, torch.float64)
    for wrong in (observation["eye"] / 255, observation["eye"][:, :, :8], observation["eye"][0]):
        with pytest.raises(ShapeError, match=r"pictures 'eye' must be \(B, T, 16, 24, 3\) uint8"):
            model.encode({**observation, "eye": wrong})


@BOTH
@torch.no_grad()
def test_episodes_of_different_length_are_padded_without_effect(config: ScdConfig) -> None:
    model = randomised(config)
    observation, _ = stream_of(config, 2, 30, torch.float64)
    full = model.encode(observation)
    short = model.encode({key: value[1:, :13] for key, value in observation.items()})
    torch.testing.assert_close(full[1:, :13], short, atol=1e-10, rtol=0)


@BOTH
@torch.no_grad()
def test_inactive_rows_of_an_empty_cache_stay_finite_and_untouched(config: ScdConfig) -> None:
    for gate in (False, True):
        model = randomised(dataclasses.replace(config, memory_gate=gate))
        observation, _ = stream_of(config, 2, 1, torch.float64)
        cache = model.new_cache(2)
        before = cache.clone()
        context = model.encode_step({k: v[:, 0] for k, v in observation.items()}, cache, torch.tensor([False, False]))
        assert torch.isfinite(context).all()
        assert torch.equal(cache.keys_values, before.keys_values)
        assert torch.equal(cache.slot_position, before.slot_position)
        assert torch.equal(cache.position, before.position)


@torch.no_grad()
def test_snapshot_is_not_changed_by_later_steps() -> None:
    model = randomised(CONFIG)
    observation, _ = stream_of(CONFIG, 1, 20, torch.float64)
    steps = [{k: v[:, t] for k, v in observation.items()} for t in range(20)]
    cache = model.new_cache(1)
    for step in steps[:10]:
        model.encode_step(step, cache)
    snapshot = cache.clone()
    first = [model.encode_step(step, cache) for step in steps[10:]]
    second = [model.encode_step(step, snapshot) for step in steps[10:]]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@torch.no_grad()
def test_a_memory_gate_starts_closed_and_opens_to_history() -> None:
    model = randomised(dataclasses.replace(CONFIG, memory_gate=True))
    observation, _ = stream_of(CONFIG, 2, 9, torch.float64)
    last = {key: value[:, -1:] for key, value in observation.items()}
    for block in model.encoder.blocks:
        block.memory_gate.zero_()
    torch.testing.assert_close(model.encode(observation)[:, -1:], model.encode(last, first_position=8))
    for block in model.encoder.blocks:
        block.memory_gate.fill_(1.0)
    assert (model.encode(observation)[:, -1:] - model.encode(last, first_position=8)).abs().max() > 1e-3
