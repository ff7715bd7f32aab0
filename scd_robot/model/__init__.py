"""The Separable Causal Diffusion model; start reading in `scd_robot/model/scd.py`. Beside it its entangled rival."""

from typing import Any

from scd_robot.model.base import ActionModel, ActionPlan, HistoryModel, check_sampler
from scd_robot.model.causal_dit import CausalDitModel, HistoryContext
from scd_robot.model.config import ScdConfig
from scd_robot.model.decoder import Conditioning, DiffusionDecoder
from scd_robot.model.encoder import CausalEncoder
from scd_robot.model.scd import ScdModel
from scd_robot.model.tokenizer import StepTokenizer

__all__ = [
    "ActionModel",
    "ActionPlan",
    "CausalDitModel",
    "CausalEncoder",
    "Conditioning",
    "DiffusionDecoder",
    "HistoryContext",
    "HistoryModel",
    "ScdConfig",
    "ScdModel",
    "StepTokenizer",
    "build_model",
    "check_sampler",
]


def build_model(config: ScdConfig) -> ActionModel[Any]:
    """The model of a configuration, with random weights."""
    return CausalDitModel(config) if config.architecture == "entangled" else ScdModel(config)
