"""LightningDataModule over one dataset in memory."""

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from scd_robot.datasets import EpisodeDataset
from scd_robot.datasets.windows import split_episodes
from scd_robot.training.batches import EpochSampler, SegmentDataset, TrainingBatch
from scd_robot.training.compat import lightning
from scd_robot.training.config import ExperimentConfig

__all__ = ["EpisodeDataModule"]


class EpisodeDataModule(lightning.LightningDataModule):
    """Training and held-out segments.

    One Lightning epoch is `validate_every` training steps: training resumes at epoch boundaries, where nothing but the
    epoch's number says which batch comes next.

    Args:
        data: the episodes.
        experiment: settings.
        first_step: training step to begin with, a multiple of `validate_every`.
    """

    def __init__(self, data: EpisodeDataset, experiment: ExperimentConfig, first_step: int = 0) -> None:
        super().__init__()
        self.data, self.experiment, self.first_step = data, experiment, first_step
        training = experiment.training
        self.train_episodes, self.held_out_episodes = split_episodes(
            data.num_episodes, training.held_out, training.seed, data.parts
        )

    def train_dataloader(self) -> DataLoader[TrainingBatch]:
        """Yields one `TrainingBatch` per optimiser step."""
        training = self.experiment.training
        epoch = self.first_step // training.validate_every
        if self.trainer is not None:
            epoch = max(epoch, self.trainer.current_epoch)
        rank, world_size = (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)
        return self._loader(
            SegmentDataset(self.data, self.experiment, self.train_episodes, rank=rank, world_size=world_size),
            EpochSampler(training.validate_every, training.max_steps, epoch),
        )

    def val_dataloader(self) -> DataLoader[TrainingBatch] | list[DataLoader[TrainingBatch]]:
        """Yields the held-out segments with fixed draws; nothing where no episode is held out."""
        if not len(self.held_out_episodes):
            return []
        return self._loader(SegmentDataset(self.data, self.experiment, self.held_out_episodes, validation=True), None)

    def statistics_rows(self) -> NDArray[np.bool_]:
        """(N,) bool, the steps of the training episodes: held-out ones do not enter the statistics."""
        return np.isin(np.repeat(np.arange(self.data.num_episodes), self.data.episode_lengths), self.train_episodes)

    def _loader(self, dataset: SegmentDataset, sampler: EpochSampler | None) -> DataLoader[TrainingBatch]:
        workers = self.experiment.training.num_workers
        return DataLoader(
            dataset, batch_size=None, sampler=sampler, num_workers=workers, persistent_workers=workers > 0
        )
