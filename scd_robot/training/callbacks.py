"""Callbacks: checkpoints, one progress bar for the whole run, closed-loop evaluation."""

import copy
import logging
import shutil
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from scd_robot.checkpoint import list_checkpoints, write_checkpoint
from scd_robot.config import to_json
from scd_robot.model import build_model
from scd_robot.policies.registry import checkpoint_type, policy_class
from scd_robot.policies.scd import ScdPolicy
from scd_robot.training.compat import lightning
from scd_robot.types import DatasetSpec

__all__ = ["RESUME_FILE", "CheckpointWriter", "ClosedLoopEvaluation", "ProgressBar"]


logger = logging.getLogger(__name__)

RESUME_FILE = Path("resume") / "training_state.ckpt"


class _AtEpochEnd(lightning.Callback, ABC):
    """Acts at the end of every epoch in which steps were taken.

    Lightning ends the epoch in which a training state was saved once more when it resumes from it.
    """

    _resumed_at = 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Remembers where training starts or resumes."""
        self._resumed_at = trainer.global_step

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Calls `at_epoch_end` unless no step was taken since the start."""
        if trainer.global_step > self._resumed_at:
            self.at_epoch_end(trainer, pl_module)

    @abstractmethod
    def at_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """What to do."""


class CheckpointWriter(_AtEpochEnd):
    """Writes a checkpoint at the end of every epoch; the two newest keep the state to resume from.

    Args:
        out: folder of the training run.
        dataset: specification of the training data.
        origin: what the run was made from, see `training.start`.
    """

    def __init__(self, out: Path, dataset: DatasetSpec, origin: dict[str, Any]) -> None:
        self.out, self.dataset, self.origin = out, dataset, origin

    def at_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Writes out/checkpoints/step_XXXXXXXX."""
        folder = self.out / "checkpoints" / f"step_{trainer.global_step:08d}"
        weights = pl_module.ema.weights(pl_module.model)
        if not trainer.is_global_zero:  # every process takes part in saving the training state, one writes
            trainer.save_checkpoint(folder / RESUME_FILE)
            return
        write_checkpoint(
            folder,
            policy=checkpoint_type(pl_module.experiment.model),
            step=trainer.global_step,
            config=to_json(pl_module.experiment),
            dataset=self.dataset,
            normalizer=pl_module.normalizer,
            origin=self.origin,
            weights=weights,
            metrics=_present_metrics(trainer, pl_module),
            write_resume=lambda resume: trainer.save_checkpoint(resume / RESUME_FILE.name),
        )
        for older in list_checkpoints(self.out)[:-2]:
            shutil.rmtree(older / "resume", ignore_errors=True)


def _present_metrics(trainer: Any, pl_module: Any) -> dict[str, float]:
    """The latest metrics, without those of an evaluation at an earlier step."""
    evaluated_now = pl_module.evaluated_at == trainer.global_step
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return {name: value for name, value in metrics.items() if evaluated_now or not name.startswith("eval/")}


class ProgressBar(lightning.Callback):
    """One bar over all optimiser steps, with the latest losses."""

    def __init__(self) -> None:
        self._bar: tqdm[Any] | None = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Opens the bar where training starts or resumes."""
        if trainer.is_global_zero:
            total = pl_module.experiment.training.max_steps
            self._bar = tqdm(total=total, initial=trainer.global_step, desc="training", unit="step", file=sys.stderr)

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        """Advances the bar."""
        if self._bar is None:
            return
        names = {"train/loss": "loss", "train/frame_loss": "frame loss"}
        names |= {"val/chunk_rmse": "val rmse", "val/frame_rmse": "val frame rmse"}
        metrics = trainer.callback_metrics
        self._bar.set_postfix({short: f"{float(metrics[n]):.4f}" for n, short in names.items() if n in metrics}, False)
        self._bar.update(trainer.global_step - self._bar.n)

    def on_train_end(self, *args: Any) -> None:
        """Closes the bar."""
        if self._bar is not None:
            self._bar.close()

    def on_exception(self, *args: Any) -> None:
        """Closes the bar, so that the error is printed below it."""
        self.on_train_end()


class ClosedLoopEvaluation(_AtEpochEnd):
    """Evaluates the averaged weights in simulation after some validations.

    Args:
        evaluate: runs a policy and returns its metrics.
        every: training steps between evaluations, a multiple of validate_every.
        dataset: specification of the training data.
    """

    def __init__(self, evaluate: Callable[[ScdPolicy], dict[str, float]], every: int, dataset: DatasetSpec) -> None:
        self.evaluate, self.every, self.dataset = evaluate, every, dataset

    def at_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Logs the metrics as eval/NAME; the checkpoint of this step holds them too."""
        if trainer.global_step % self.every:
            return
        weights = pl_module.ema.weights(pl_module.model)
        pl_module.evaluated_at = trainer.global_step
        if not trainer.is_global_zero:
            return
        model = build_model(pl_module.experiment.model)
        model.load_state_dict(weights)
        normalizer = copy.deepcopy(pl_module.normalizer)
        experiment = pl_module.experiment
        kind = policy_class(checkpoint_type(experiment.model))
        policy = kind(model, normalizer, self.dataset, experiment.policy, pl_module.device, experiment.transforms)
        for name, value in self.evaluate(policy).items():
            pl_module.log(f"eval/{name}", value, rank_zero_only=True)
            logger.info("step %d: eval/%s %.3f", trainer.global_step, name, value)
