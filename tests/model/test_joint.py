"""Actions and frames from one encoder: what reaches which decoder, and that each is the model it would be alone."""

import pytest
import torch
from frame_models import JOINT, SHAPE, joint_config
from model_streams import randomised, stream_of

from scd_robot.diffusion import SamplerConfig
from scd_robot.errors import ConfigError
from scd_robot.model import FrameConfig, JointModel, ScdConfig, ScdModel, build_model
from scd_robot.nn import AutoencoderConfig

DOUBLE = torch.float64
OBSERVED = {"eye": SHAPE, "last": (2,), "wrist": (8, 8, 3), "arm": (3,)}
FULL = {"observation_shapes": OBSERVED, "observation_tokens": "per_key", "past_action_input": "full"}


def contexts(model: JointModel, observation: dict, past: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """At every control step: of actions, of frames."""
    batch, steps = observation["eye"].shape[:2]
    return model.encode_both_at(torch.arange(steps).expand(batch, -1), observation, past)


@pytest.mark.parametrize(
    "changes",
    [{}, FULL, {"memory_gate": True}, {"images": JOINT["images"].__class__(channels=(8,), tokens_per_image=3)}],
)
@torch.no_grad()
def test_the_frames_context_is_that_of_a_model_of_frames_with_the_same_weights(changes: dict) -> None:
    """In one pass with all that is observed, and step by step from pictures alone, before and after eviction."""
    config = joint_config(**changes)
    model = randomised(config)
    alone = model.frame_model().eval()
    steps = config.receptive_field + 3
    observation, past = stream_of(config, 2, steps, DOUBLE)
    of_actions, of_frames = contexts(model, observation, past if config.past_action_input == "full" else None)
    assert of_frames.shape == (2, steps, alone.config.num_decoder_context - 1, config.width)
    cache = alone.new_cache(2)
    stepped = [alone.encode_step({"eye": observation["eye"][:, t]}, cache) for t in range(steps)]
    torch.testing.assert_close(torch.stack(stepped, dim=1), of_frames, rtol=0, atol=1e-9)
    again = model.encode(observation, past if config.past_action_input == "full" else None)
    torch.testing.assert_close(of_actions, again, rtol=0, atol=1e-9)


@pytest.mark.parametrize("autoencoder", [None, AutoencoderConfig((8, 8), 16)])
@torch.no_grad()
def test_the_model_of_frames_decodes_as_the_head_does(autoencoder: AutoencoderConfig | None) -> None:
    model = randomised(joint_config(frames=FrameConfig("eye", 4, beside_actions=True, autoencoder=autoencoder)))
    alone = model.frame_model().eval()
    context, noise = torch.randn(2, 16, 32, dtype=DOUBLE), torch.randn(2, 16, 16, dtype=DOUBLE)
    known = alone.known(torch.randint(0, 256, (2, *SHAPE), dtype=torch.uint8))
    given = context, torch.randn(2, 2, dtype=DOUBLE), known
    sampler = SamplerConfig("euler", 3)
    one, two = (part.imagine(*given, sampler=sampler, noise=noise) for part in (model.frame_head, alone))
    assert torch.equal(one, two)
    assert one.abs().max() > 0.1


@torch.no_grad()
def test_frames_follow_from_pictures_and_actions_alone_and_actions_from_everything() -> None:
    config = joint_config(**FULL)
    model = randomised(config)
    observation, past = stream_of(config, 1, 6, DOUBLE)
    of_actions, of_frames = contexts(model, observation, past)
    for key in (*OBSERVED, "action"):
        others = {k: v if k != key else (255 - v if v.dtype == torch.uint8 else v + 1) for k, v in observation.items()}
        moved, seen = contexts(model, others, past + (key == "action"))
        assert (moved - of_actions)[:, -1].abs().max() > 1e-4, f"{key} tells nothing about the next actions"
        changed = float((seen - of_frames)[:, -1].abs().max())
        assert changed > 1e-4 if key == "eye" else changed == 0, f"{key} changes the frames' context by {changed}"


def test_all_but_the_frame_head_begins_as_in_a_model_without_it() -> None:
    torch.manual_seed(0)
    joint = build_model(joint_config())
    torch.manual_seed(0)
    alone = build_model(joint_config(frames=FrameConfig()))
    assert type(joint) is JointModel
    assert type(alone) is ScdModel
    assert alone.encoder.sees is None
    weights = joint.state_dict()
    assert all(torch.equal(weights.pop(name), weight) for name, weight in alone.state_dict().items())
    assert weights
    assert all(name.startswith("frame_head.") for name in weights)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"frames": FrameConfig("nose", 4, beside_actions=True)}, r"unknown camera \(model.frames.camera\) 'nose'"),
        ({"frames": FrameConfig("last", 4, beside_actions=True)}, r"unknown camera \(model.frames.camera\) 'last'"),
        ({"frames": FrameConfig("eye", 5, beside_actions=True)}, "patch_size 5 must divide the sides of 'eye'"),
        ({"history_stride": 2}, "need history_stride 1, got 2"),
        ({"architecture": "entangled", "context_corruption": 0}, "need architecture separable, got entangled"),
        ({"num_context_tokens": 0}, "num_context_tokens must be at least 1, got 0"),
    ],
)
def test_what_a_model_of_both_cannot_be_is_refused(changes: dict, told: str) -> None:
    with pytest.raises((ConfigError, KeyError), match=told):
        ScdConfig(**{**JOINT, **changes})


def test_frames_beside_actions_need_a_camera_and_layers() -> None:
    with pytest.raises(ConfigError, match=r"beside_actions needs frames\.camera"):
        FrameConfig(beside_actions=True)
    with pytest.raises(ConfigError, match=r"frames\.decoder_layers must be at least 1, got 0"):
        FrameConfig("eye", decoder_layers=0)
