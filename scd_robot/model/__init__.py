"""The Separable Causal Diffusion model; start reading in `scd_robot/model/scd.py`. Beside it its entangled rival."""

from typing import Any

from scd_robot.model.base import ActionModel, ActionPlan, HistoryModel, check_guidance, greatest_gain
from scd_robot.model.causal_dit import CausalDitModel, HistoryContext
from scd_robot.model.config import FrameConfig, ScdConfig
from scd_robot.model.decoder import Conditioning, DiffusionDecoder
from scd_robot.model.denoiser import Denoiser, check_sampler
from scd_robot.model.encoder import CausalEncoder
from scd_robot.model.frames import CausalDitFrameModel, FrameDenoiser, FrameModel, ScdFrameModel
from scd_robot.model.held import FixedActions
from scd_robot.model.joint import JointModel
from scd_robot.model.scd import ScdModel
from scd_robot.model.tokenizer import StepTokenizer

__all__ = [
    "ActionModel",
    "ActionPlan",
    "CausalDitFrameModel",
    "CausalDitModel",
    "CausalEncoder",
    "Conditioning",
    "Denoiser",
    "DiffusionDecoder",
    "FixedActions",
    "FrameConfig",
    "FrameDenoiser",
    "FrameModel",
    "HistoryContext",
    "HistoryModel",
    "JointModel",
    "ScdConfig",
    "ScdFrameModel",
    "ScdModel",
    "StepTokenizer",
    "build_model",
    "check_guidance",
    "check_sampler",
    "greatest_gain",
]


def build_model(config: ScdConfig) -> HistoryModel[Any]:
    """The model of a configuration, with random weights: an `ActionModel`, or with `frames.camera` a `FrameModel`.

    With `frames.beside_actions` it is both in one, a `JointModel`.
    """
    entangled = config.architecture == "entangled"
    if config.decodes_frames:
        return CausalDitFrameModel(config) if entangled else ScdFrameModel(config)
    if config.frames.beside_actions:
        return JointModel(config)
    return CausalDitModel(config) if entangled else ScdModel(config)
