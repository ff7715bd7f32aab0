"""Training with Lightning: data module, objective, moving average, checkpoints."""

from scd_robot.training.batches import SegmentDataset, TrainingBatch
from scd_robot.training.config import ExperimentConfig, FrameLossConfig, TrainingConfig
from scd_robot.training.datamodule import EpisodeDataModule
from scd_robot.training.ema import Ema
from scd_robot.training.module import ScdLightningModule
from scd_robot.training.objective import loss_terms
from scd_robot.training.run import train
from scd_robot.training.self_forcing import SelfForcingConfig

__all__ = [
    "Ema",
    "EpisodeDataModule",
    "ExperimentConfig",
    "FrameLossConfig",
    "ScdLightningModule",
    "SegmentDataset",
    "SelfForcingConfig",
    "TrainingBatch",
    "TrainingConfig",
    "loss_terms",
    "train",
]
