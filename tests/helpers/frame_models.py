"""Small models of frames, and a moving square to train them on."""

from dataclasses import replace
from typing import Any

import numpy as np

from scd_robot.datasets import EpisodeDataset
from scd_robot.diffusion import FlowTimeConfig
from scd_robot.model import FrameConfig, ScdConfig
from scd_robot.nn import ImageConfig
from scd_robot.policies.scd import ScdPolicyConfig
from scd_robot.training import ExperimentConfig, TrainingConfig
from scd_robot.training.augmentation import AugmentationConfig
from scd_robot.types import ArraySpec, DatasetSpec

SHAPE = (16, 16, 1)
FRAMES: dict[str, Any] = {
    "observation_shapes": {"eye": SHAPE},
    "action_dim": 2,
    "width": 32,
    "num_heads": 2,
    "encoder_layers": 2,
    "decoder_layers": 1,
    "history_length": 4,
    "num_context_tokens": 0,
    "add_context": False,  # as the preset
    "chunk_length": 1,
    "num_past_actions": 0,
    "past_action_input": "full",
    "images": ImageConfig(channels=(8, 16), tokens_per_image=0),
    "frames": FrameConfig("eye", patch_size=4),
}
JOINT: dict[str, Any] = {  # actions beside them, and more to be observed
    **FRAMES,
    "observation_shapes": {"eye": SHAPE, "last": (2,)},
    "num_context_tokens": 1,
    "chunk_length": 4,
    "num_past_actions": 2,
    "past_action_input": "none",
    "frames": FrameConfig("eye", patch_size=4, beside_actions=True, decoder_layers=1),
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "separable": {},
    "entangled": {"architecture": "entangled", "context_corruption": 0.0, "num_context_tokens": 1},
}


def frame_config(architecture: str = "separable", **changes: Any) -> ScdConfig:
    """Of a small model; `changes` replace fields."""
    return ScdConfig(**{**FRAMES, **ARCHITECTURES[architecture], **changes})


def frame_experiment(max_steps: int = 4, architecture: str = "separable", **training: Any) -> ExperimentConfig:
    """To train one on the moving square; `training` replaces fields."""
    settings: dict[str, Any] = {
        "max_steps": max_steps,
        "batch_size": 4,
        "segment_length": 12,
        "positions_per_segment": 8,
        "warmup_steps": 2,
        "validate_every": 2,
        "held_out": 0.2,
        "learning_rate": 2e-3,
        "ema_decay": 0.98,
        "flow_time": FlowTimeConfig("logit_normal", -2.0, 1.2),
        "augmentation": AugmentationConfig(0, 0, 0, 0),
        **training,
    }
    return ExperimentConfig(
        "square", frame_config(architecture), TrainingConfig(**settings), ScdPolicyConfig(num_executed=1)
    )


def joint_config(**changes: Any) -> ScdConfig:
    """Of a small model of actions and frames; `changes` replace fields."""
    return ScdConfig(**{**JOINT, **changes})


def joint_experiment(max_steps: int = 4, model: ScdConfig | None = None, **training: Any) -> ExperimentConfig:
    """To train one on the square that is pushed; `training` replaces fields."""
    settings = replace(frame_experiment(max_steps, **training).training, flow_time=FlowTimeConfig())
    return ExperimentConfig("square", model or joint_config(), settings, ScdPolicyConfig(num_executed=2))


def pushed_square(episodes: int = 12, steps: int = 24, seed: int = 0) -> EpisodeDataset:
    """The moving square beside the action that was executed last, as a vector."""
    data = moving_square(episodes, steps, seed)
    last = np.roll(data.arrays["action"], 1, axis=0)
    last[::steps] = 0
    spec = replace(data.spec, observation={**data.spec.observation, "last": ArraySpec((2,))})
    return replace(data, spec=spec, arrays={**data.arrays, "last": last})


def moving_square(episodes: int = 12, steps: int = 24, seed: int = 0) -> EpisodeDataset:
    """A bright square of 4 x 4 pixels, which each action moves by whole pixels; where it would leave, it stays."""
    rng = np.random.default_rng(seed)
    frames = np.full((episodes * steps, *SHAPE), 30, np.uint8)
    action = rng.integers(-2, 3, (episodes * steps, 2)).astype(np.float32)
    for episode in range(episodes):
        at = rng.integers(0, 13, 2)
        for row in range(episode * steps, (episode + 1) * steps):
            frames[row, at[0] : at[0] + 4, at[1] : at[1] + 4] = 220
            at = np.clip(at + action[row].astype(int), 0, 12)
    spec = DatasetSpec({"eye": ArraySpec(SHAPE, "uint8")}, 2, 0.1, "moving square")
    return EpisodeDataset(spec, steps * np.arange(1, episodes + 1), {"eye": frames, "action": action})
