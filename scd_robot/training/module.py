"""LightningModule: optimisation of the loss, moving average, validation by sampled chunks or frames."""

import logging
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from scd_robot.checkpoint import Checkpoint
from scd_robot.errors import CheckpointError, TrainingDivergedError
from scd_robot.model import FrameDenoiser, JointModel, build_model
from scd_robot.normalization import Normalizer
from scd_robot.training.batches import TrainingBatch
from scd_robot.training.compat import lightning
from scd_robot.training.config import ExperimentConfig, TrainingConfig
from scd_robot.training.ema import Ema
from scd_robot.training.objective import held_out_errors, losses, select_samples

__all__ = ["ScdLightningModule", "learning_rate_factor"]

logger = logging.getLogger(__name__)

_DECODERS = ("decoder.", "frame_head.")
_BACKBONE = "tokenizer.backbone."


def learning_rate_factor(step: int, training: TrainingConfig) -> float:
    """Learning rate at an optimiser step, in units of the peak: linear warm-up, then a cosine to its final value."""
    if step < training.warmup_steps:
        return (step + 1) / training.warmup_steps
    progress = (step - training.warmup_steps) / max(1, training.max_steps - training.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return training.final_learning_rate + (1 - training.final_learning_rate) * cosine


def _counted(names: Iterable[str]) -> str:
    """The parts of a model that tensors of these names belong to, with the number of each one's tensors."""
    found = Counter(".".join(name.split(".")[:2]) for name in names)
    return ", ".join(f"{part} ({count})" for part, count in sorted(found.items()))


class ScdLightningModule(lightning.LightningModule):
    """Trains the model of an experiment.

    Args:
        experiment: architecture and settings.
        normalizer: statistics of the training data.
    """

    def __init__(self, experiment: ExperimentConfig, normalizer: Normalizer) -> None:
        super().__init__()
        self.experiment = experiment
        self.model = build_model(experiment.model)
        if experiment.training.trained == "decoder":
            for name, parameter in self.model.named_parameters():
                if not name.startswith(_DECODERS):
                    parameter.requires_grad_(False)
        self.normalizer = normalizer
        self.ema = Ema(self.model, experiment.training.ema_decay)
        self.evaluated_at = -1  # step of the last closed-loop evaluation
        self._averaged = ExitStack()
        self._sums: dict[str, tuple[float, float]] = {}

    def load_weights(self, source: Checkpoint) -> None:
        """Starts from a checkpoint's weights, and the moving average from them.

        A decoder that is newly told where its steps end begins as one that is not; one of frames besides begins as it
        was initialised where the checkpoint has none, and is left out where this model has none.
        """
        own, given = self.model.state_dict(), dict(source.weights)
        had = source.config["model"]["frames"]["beside_actions"]
        may_be_new = ("decoder.step_length.",) if had else ("decoder.step_length.", "frame_head.")
        new = {name: w for name, w in own.items() if name not in given and name.startswith(may_be_new)}
        goes = had and not isinstance(self.model, JointModel)
        left_out = [name for name in given if goes and name.startswith("frame_head.")]
        for name in left_out:
            del given[name]
        try:
            self.model.load_state_dict({**new, **given})
        except RuntimeError as error:
            reason = "; ".join(line.strip() for line in str(error).splitlines()[1:])
            raise CheckpointError(f"the weights of {source.path} do not fit its configuration: {reason}") from error
        if new or left_out:
            parts = {"taken": given, "new, as initialised": new, "left out": left_out}
            told = "; ".join(f"{what}: {_counted(names)}" for what, names in parts.items() if names)
            logger.info("weights of %s %s", source.path, told)
        self.ema = Ema(self.model, self.experiment.training.ema_decay)

    def load_pretrained(self) -> dict[str, str]:
        """Takes the pretrained weights that the configuration names; what they are, as JSON, or nothing.

        Raises:
            CheckpointError: there are none, or they are of another network.
        """
        backbone, images = self.model.tokenizer.backbone, self.experiment.model.images
        if backbone is None:
            return {}
        backbone.load_pretrained(images.weights)
        self.ema = Ema(self.model, self.experiment.training.ema_decay)
        return {"name": images.backbone, "weights": images.weights, "sha256": backbone.digest()}

    def load_autoencoder(self, weights: Mapping[str, Tensor]) -> None:
        """Gives the part that decodes frames its autoencoder, which is not trained.

        Raises:
            CheckpointError: the weights are of another architecture.
        """
        decoding = self.model.frame_head if isinstance(self.model, JointModel) else self.model
        assert isinstance(decoding, FrameDenoiser)
        assert decoding.autoencoder is not None
        try:
            decoding.autoencoder.load_state_dict(weights)
        except RuntimeError as error:
            raise CheckpointError(f"the weights do not fit the autoencoder: {str(error).splitlines()[-1]}") from error
        self.ema = Ema(self.model, self.experiment.training.ema_decay)

    def configure_model(self) -> None:
        """Shards parameters, gradients and optimiser state over devices, with strategy "fsdp"."""
        if self.device_mesh is None or isinstance(next(self.model.parameters()), DTensor):
            return
        decoding: tuple[str, ...] = ("plan",)
        if self.model.config.decodes_frames:
            # What is gathered for the first step of a roll-out stays so, however many there are on this device. None of
            # these calls another one, at whose end it would be given back.
            decoding = ("known", "with_action", "imagine", "new_cache")
        if isinstance(self.model, JointModel):  # what is gathered to encode stays so while its frame head decodes
            decoding = ("plan", "encode_both_at")
        fully_shard(self.model, mesh=self.device_mesh["data_parallel"])
        for method in ("encode", "encode_at", "velocity", *decoding):
            register_fsdp_forward_method(self.model, method)
        self.ema = Ema(self.model, self.experiment.training.ema_decay)

    def configure_optimizers(self) -> Any:
        """AdamW with learning rates of their own for decoder and backbone, and weight decay on matrices only."""
        training = self.experiment.training
        factors = {
            "decoder": training.decoder_learning_rate_factor,
            "backbone": training.backbone_learning_rate_factor,
            "": 1.0,
        }
        groups: dict[tuple[str, bool], list[Tensor]] = {}
        trained = ((name, p) for name, p in self.model.named_parameters() if p.requires_grad)
        for name, parameter in trained:
            part = "decoder" if name.startswith(_DECODERS) else "backbone" if name.startswith(_BACKBONE) else ""
            groups.setdefault((part, parameter.ndim > 1), []).append(parameter)
        settings = [
            {
                "params": parameters,
                "lr": training.learning_rate * factors[part],
                "weight_decay": training.weight_decay if is_matrix else 0.0,
            }
            for (part, is_matrix), parameters in groups.items()
        ]
        optimizer = torch.optim.AdamW(
            settings, betas=(training.betas[0], training.betas[1]), fused=self.device_mesh is None
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, training))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_fit_start(self) -> None:
        """Moves the moving average to the training device."""
        self.ema.to(self.device)

    def training_step(self, batch: TrainingBatch, batch_idx: int) -> Tensor:
        """Mean over the counted tokens of the global batch, whatever share of it this device holds.

        Where frames are decoded beside actions, the weighted sum of both means, which are logged apart.
        """
        training, world_size = self.experiment.training, self.trainer.world_size
        samples = select_samples(self.model, self.normalizer, batch)
        loss: Tensor | float = 0.0
        for name, (total, count) in losses(self.model, samples, batch.draws, training.objective).items():
            sums = torch.stack((total.detach(), count.to(total.dtype)))
            if world_size > 1:
                sums = self.trainer.strategy.reduce(sums, reduce_op="sum")
            count = sums[1].clamp(min=1)  # of a batch without pictures no frame counts
            mean = sums[0] / count
            if not torch.isfinite(mean):
                raise TrainingDivergedError(
                    f"the {name.replace('_', ' ')} became {mean.item()} at step {self.trainer.global_step}; continue "
                    "from the last checkpoint with a smaller learning_rate, and look for outliers with 'scd data info'"
                )
            self.log(f"train/{name}", mean, prog_bar=True)
            weight = training.frames.loss_weight if name == "frame_loss" else 1.0
            loss = loss + total * (weight * world_size / count)  # gradients are averaged over devices
        assert isinstance(loss, Tensor)
        return loss

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips by the total norm, logs it, and stops on NaN."""
        clip = self.experiment.training.gradient_clip or math.inf
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), clip)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        if not torch.isfinite(norm):
            raise TrainingDivergedError(
                f"the gradient's norm became {norm.item()} at step {self.trainer.global_step}; continue from the last "
                "checkpoint with a smaller learning_rate"
            )
        self.log("train/gradient_norm", norm)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """One update of the weights and of their moving average."""
        super().optimizer_step(*args, **kwargs)
        self.ema.update(self.model)

    def on_validation_start(self) -> None:
        """Validates the averaged weights, those that a checkpoint holds."""
        self._averaged.enter_context(self.ema.applied_to(self.model))
        self._sums = {}

    def validation_step(self, batch: TrainingBatch, batch_idx: int) -> None:
        """Loss, and error of what is sampled with the policy's sampler, on held-out episodes."""
        samples = select_samples(self.model, self.normalizer, batch)
        found = losses(self.model, samples, batch.draws, self.experiment.training.objective)
        found |= held_out_errors(self.model, samples, batch.draws, self.experiment.policy.sampler)
        for name, (value, weight) in found.items():
            before = self._sums.get(name, (0.0, 0.0))
            self._sums[name] = (before[0] + float(value), before[1] + float(weight))

    def on_validation_epoch_end(self) -> None:
        """Logs means over all held-out tokens; errors as root mean squares in normalised units."""
        means = {name: total / max(weight, 1.0) for name, (total, weight) in self._sums.items()}
        if not all(map(math.isfinite, means.values())):
            raise TrainingDivergedError(
                f"the validation at step {self.trainer.global_step} gave {means}; continue from the last checkpoint "
                "with a smaller learning_rate"
            )
        for name, mean in means.items():
            self.log(*(f"val/{name}", mean) if name.endswith("loss") else (f"val/{name}_rmse", math.sqrt(mean)))

    def on_validation_end(self) -> None:
        """Back to the raw weights."""
        self._averaged.close()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the moving average to the training state."""
        checkpoint["ema"] = self.ema.state_dict()

    def on_load_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        """Takes the moving average from the training state."""
        self.ema.load_state_dict(checkpoint["ema"])
