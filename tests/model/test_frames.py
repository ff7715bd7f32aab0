"""Models of frames: one pass or step by step, the same decoders as for actions, what a frame depends on."""

import dataclasses

import pytest
import torch
from frame_models import ARCHITECTURES, SHAPE, frame_config
from model_streams import randomised, stream_of

from scd_robot.diffusion import SamplerConfig, corrupt
from scd_robot.errors import ConfigError, ShapeError
from scd_robot.model import CausalDitFrameModel, DiffusionDecoder, FrameConfig, FrameModel, ScdFrameModel, build_model
from scd_robot.model.causal_dit import CausalDitTransformer
from scd_robot.nn import AutoencoderConfig, ImageConfig

DOUBLE = torch.float64
LATENT = FrameConfig("eye", 4, autoencoder=AutoencoderConfig((8,), 5))  # 2 x 2 latents in a patch


def sampled(model: FrameModel, context: object, rows: int, **options: object) -> torch.Tensor:
    """Tokens that one and the same noise and action become, given contexts of `rows`."""
    generator = torch.Generator().manual_seed(2)
    noise = torch.randn(1, *model.config.token_shape, generator=generator, dtype=DOUBLE).expand(rows, -1, -1)
    action = torch.randn(1, 2, generator=generator, dtype=DOUBLE).expand(rows, -1)
    last = torch.randint(0, 256, (1, *SHAPE), generator=generator, dtype=torch.uint8).expand(rows, *SHAPE)
    return model.imagine(context, action, model.known(last), noise=noise, sampler=SamplerConfig("euler", 3), **options)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"past_action_input": "none"},
        {"images": ImageConfig("patch", patch_size=8, tokens_per_image=0)},
        {"frames": LATENT},
    ],
)
@torch.no_grad()
def test_frames_from_the_cache_equal_those_from_the_whole_history(architecture: str, changes: dict) -> None:
    """At every control step, before, at and after eviction; for the entangled model cached = uncached."""
    config = frame_config(architecture, **changes)
    model = randomised(config)
    steps = config.receptive_field + config.history_length + 2
    observation, past = stream_of(config, 2, steps, DOUBLE)
    past = past if config.past_action_input == "full" else None
    whole = model.encode_at(torch.arange(steps).expand(2, -1), observation, past)
    full = sampled(model, model.samples(whole, 1), 2 * steps).unflatten(0, (2, steps))
    cache = model.new_cache(2)
    for t in range(steps):
        step = {key: value[:, t] for key, value in observation.items()}
        context = model.encode_step(step, cache, past_action=None if past is None else past[:, t])
        stepped = sampled(model, context, 2)
        assert (stepped - full[:, t]).abs().max() < 1e-9 * full.abs().max(), f"control step {t}"
    assert (full[:, 1:] - full[:, :-1]).abs().amax(dim=(2, 3)).min() > 1e-6  # history matters


def test_the_decoders_are_those_that_plan_actions() -> None:
    separable, entangled = (build_model(frame_config(name)) for name in ("separable", "entangled"))
    assert type(separable) is ScdFrameModel
    assert type(entangled) is CausalDitFrameModel
    assert type(separable.decoder) is DiffusionDecoder
    assert type(entangled.decoder) is CausalDitTransformer
    assert separable.tokenizer.slot_names == entangled.tokenizer.slot_names  # the same tokens
    assert len(entangled.decoder.blocks) == len(separable.encoder.blocks) + len(separable.decoder.blocks)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_the_next_frame_depends_on_the_action_of_the_present_step_and_the_context_does_not(architecture: str) -> None:
    model = randomised(frame_config(architecture))
    observation, past = stream_of(model.config, 1, 6, DOUBLE)
    context = model.samples(model.encode_at(torch.tensor([[5]]), observation, past), 2)
    known = model.known(observation["eye"][:, 5].expand(2, *SHAPE))
    noise = torch.zeros(2, *model.config.token_shape, dtype=DOUBLE)
    one, two = model.imagine(context, torch.tensor([[0.3, 0.1], [0.3, -0.9]], dtype=DOUBLE), known, noise=noise)
    assert (one - two).abs().max() > 1e-4


@pytest.mark.parametrize("residual", [True, False])
def test_tokens_are_patches_and_become_the_frame_again(residual: bool) -> None:
    model = build_model(frame_config(frames=FrameConfig("eye", 4, residual)))
    frame, last = (torch.randint(0, 256, (3, *SHAPE), dtype=torch.uint8) for _ in range(2))
    tokens = model.tokens(frame, model.known(last))
    assert tokens.shape == (3, 16, 16)
    assert torch.equal(model.frames(tokens, model.known(last)), frame)
    known = 4 * (frame.float() - last.float()) / 127.5 if residual else frame.float() / 127.5 - 1
    torch.testing.assert_close(tokens[:, 6], known[:, 4:8, 8:12].flatten(1))  # second row, third column


@pytest.mark.parametrize("residual", [True, False])
@torch.no_grad()
def test_with_an_autoencoder_tokens_are_patches_of_latents_and_become_what_it_decodes(residual: bool) -> None:
    model = randomised(frame_config(frames=dataclasses.replace(LATENT, residual=residual)))
    frame, last = (torch.randint(0, 256, (3, *SHAPE), dtype=torch.uint8) for _ in range(2))
    latents, before = (model.autoencoder.encode(pictures) for pictures in (frame, last))
    assert latents.shape == (3, 8, 8, 5)
    known = model.known(last)
    torch.testing.assert_close(known[:, 6], before[:, 2:4, 4:6].flatten(1))  # second row, third column
    tokens = model.tokens(frame, known)
    assert tokens.shape == (3, *model.config.token_shape) == (3, 16, 20)
    shown, then = model.following(tokens, known)
    assert (shown.int() - model.autoencoder.decode(latents).int()).abs().max() <= 1
    torch.testing.assert_close(then, model.known(frame))  # latents, and not the picture encoded again
    assert not torch.allclose(then, model.known(shown))


def test_an_untrained_decoder_repeats_the_last_frame() -> None:
    model = build_model(frame_config())
    observation, past = stream_of(model.config, 2, 3, torch.float32)
    with torch.no_grad():
        context = model.encode(observation, past)[:, -1]
        known = model.known(observation["eye"][:, -1])
        tokens = model.imagine(context, past[:, -1], known)
    assert torch.equal(model.frames(tokens, known), observation["eye"][:, -1])


@torch.no_grad()
def test_velocity_leads_to_what_the_decoder_says_is_clean() -> None:
    model = randomised(frame_config())
    context = model.with_action(torch.randn(2, 16, 32, dtype=DOUBLE), torch.randn(2, 2, dtype=DOUBLE))
    x, flow_time = torch.randn(2, 16, 16, dtype=DOUBLE), torch.tensor([[0.2], [0.9]], dtype=DOUBLE)
    known = torch.randn(2, 16, 16, dtype=DOUBLE)
    clean = model.decoder(torch.cat((x, known), dim=-1), flow_time, context)
    velocity = model.velocity(x, flow_time, context, known=known)
    torch.testing.assert_close(x + (1 - flow_time)[..., None] * velocity, clean)


@torch.no_grad()
def test_guidance_leads_away_from_a_corrupted_context() -> None:
    model = randomised(frame_config(context_corruption=0.5))
    context, drawn = torch.randn(2, 16, 32, dtype=DOUBLE), torch.randn(2, 17, 32, dtype=DOUBLE)
    one_step = {"noise": torch.randn(2, 16, 16, dtype=DOUBLE), "sampler": SamplerConfig("euler", 1)}
    action, known = torch.randn(2, 2, dtype=DOUBLE), model.known(torch.zeros(2, *SHAPE, dtype=torch.uint8))
    strong = model.imagine(context, action, known, **one_step)
    guided = model.imagine(context, action, known, guidance_scale=1.5, corruption_noise=drawn, **one_step)
    spoiled = corrupt(model.with_action(context, action), drawn, 0.5)
    x = torch.cat((one_step["noise"], known), dim=-1)
    weak = model.decoder(x, torch.zeros(2, 1, dtype=DOUBLE), spoiled)
    torch.testing.assert_close(guided, weak + 1.5 * (strong - weak))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"observation_shapes": {"eye": SHAPE, "a": (3,)}}, "its camera 'eye' and nothing else"),
        ({"observation_shapes": {"wrist": SHAPE}}, "its camera 'eye' and nothing else"),
        ({"observation_shapes": {"eye": (5,)}}, "its camera 'eye' and nothing else"),
        ({"observation_shapes": {"eye": (*SHAPE[:2], 4)}}, r"'eye' has 4 channels: record picture\[..., :3\]"),
        ({"frames": FrameConfig("eye", 5)}, "patch_size 5 must divide the sides of 'eye', 16 x 16"),
        (
            {"frames": dataclasses.replace(LATENT, patch_size=32)},
            "patch_size 32 must divide the sides of 'eye', 16 x 16",
        ),
        ({"chunk_length": 4}, "needs chunk_length 1, got 4"),
        ({"num_past_actions": 2}, "needs num_past_actions 0, got 2"),
        ({"history_stride": 2}, "needs history_stride 1, got 2"),
        ({"frames": FrameConfig()}, "num_context_tokens must be at least 1, got 0"),
    ],
)
def test_what_models_of_frames_have_not_is_refused(changes: dict, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        frame_config(**changes)


def test_patches_hold_whole_places_of_the_autoencoder() -> None:
    with pytest.raises(ConfigError, match=r"patch_size 4 must be a multiple of 8, the pixels on each side"):
        FrameConfig("eye", 4, autoencoder=AutoencoderConfig((8, 8, 8), 5))


def test_what_does_not_fit_the_model_is_refused() -> None:
    model = build_model(frame_config())
    context, action, known = torch.zeros(2, 16, 32), torch.zeros(2, 2), torch.zeros(2, 16, 16)
    with pytest.raises(ShapeError, match=r"action must be \(2, 2\), got \(2, 3\)"):
        model.imagine(context, torch.zeros(2, 3), known)
    with pytest.raises(ShapeError, match=r"known must be \(2, 16, 16\), got \(2, 16, 8\)"):
        model.imagine(context, action, known[:, :, :8])
    with pytest.raises(ConfigError, match="'euler' or 'midpoint', which never ask at flow time 1, got 'heun'"):
        model.imagine(context, action, known, sampler=SamplerConfig("heun", 2))
    without = build_model(dataclasses.replace(model.config, context_corruption=0))
    with pytest.raises(ConfigError, match="guidance needs a model trained with context_corruption"):
        without.imagine(context, action, known, guidance_scale=1.5)
