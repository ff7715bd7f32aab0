"""The Separable Causal Diffusion model; start reading in `scd_robot/model/scd.py`."""

from scd_robot.model.config import ScdConfig
from scd_robot.model.decoder import Conditioning, DiffusionDecoder
from scd_robot.model.encoder import CausalEncoder
from scd_robot.model.scd import ActionPlan, ScdModel
from scd_robot.model.tokenizer import StepTokenizer

__all__ = ["ActionPlan", "CausalEncoder", "Conditioning", "DiffusionDecoder", "ScdConfig", "ScdModel", "StepTokenizer"]
