"""One training run, from a dataset to a folder of checkpoints."""

import contextlib
import errno
import json
import logging
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from scd_robot.checkpoint import find_checkpoint, list_checkpoints, read_checkpoint, read_step
from scd_robot.datasets import EpisodeDataset
from scd_robot.errors import ConfigError, OutputError
from scd_robot.model import HistoryModel
from scd_robot.policies.scd import ScdPolicy
from scd_robot.training.callbacks import CheckpointWriter, ClosedLoopEvaluation, ProgressBar
from scd_robot.training.compat import lightning
from scd_robot.training.config import ExperimentConfig
from scd_robot.training.datamodule import EpisodeDataModule
from scd_robot.training.feature_cache import with_cached_features
from scd_robot.training.module import ScdLightningModule
from scd_robot.training.start import Start, begin, check_fits, check_weights
from scd_robot.training.transformed import transformed, with_pictures_in_memory

__all__ = ["train"]


logger = logging.getLogger(__name__)

_REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)


def train(
    data: EpisodeDataset,
    experiment: ExperimentConfig,
    out: Path,
    *,
    resume: bool = False,
    init: Path | None = None,
    init_statistics: str | None = None,
    autoencoder: Path | None = None,
    evaluate: Callable[[ScdPolicy], dict[str, float]] | None = None,
    evaluate_every: int = 0,
    accelerator: str = "auto",
    devices: int = 1,
    num_nodes: int = 1,
    strategy: str = "auto",
    progress: bool = True,
) -> dict[str, Any] | None:
    """Trains, and writes out/checkpoints/step_* and out/logs (TensorBoard and CSV).

    Args:
        data: the episodes.
        experiment: what to train and how.
        out: folder of the run.
        resume: continue the run in `out` from its newest checkpoint; it ends with the same weights as an
            uninterrupted one (on a CPU with the same number of threads).
        init: checkpoint to fine-tune from; its architecture must equal the experiment's, but that of a policy may have
            a frame decoder besides where this one has none, and the other way round.
        init_statistics: with `init`, whose normalisation to use: "checkpoint" or "dataset".
        autoencoder: folder of the autoencoder, where the model is one of frames and has one (`autoencoder.py`).
        evaluate: runs a policy in closed loop and returns metrics.
        evaluate_every: steps between evaluations, a multiple of validate_every; 0 = never.
        accelerator: Lightning's.
        devices: per node.
        num_nodes: machines.
        strategy: Lightning's, e.g. "ddp"; "fsdp" shards parameters and optimiser state over the devices.
        progress: show a progress bar.

    Returns:
        JSON-able summary: checkpoint, steps, seconds, parameters, metrics. None in all processes but the first.

    Raises:
        OutputError: `out` holds a run already and `resume` is not given, or cannot be written.
        CheckpointError: nothing to resume from, or other settings, data or weights were used there; no autoencoder; or
            there are no pretrained weights for a backbone.
        MissingDependencyError: a backbone needs timm.
        ConfigError, DatasetError, ShapeError: settings and data do not fit.
        TrainingDivergedError: the loss became NaN; checkpoints written before stay.
        KeyboardInterrupt, SystemExit: Ctrl-C, and SIGTERM (exit code 143); likewise.
    """
    data.check("the training dataset")
    recorded, data = data.spec, transformed(data, experiment.transforms)
    check_fits(data, experiment)
    if evaluate_every % experiment.training.validate_every:
        raise ConfigError(
            f"evaluate_every {evaluate_every} must be a multiple of validate_every {experiment.training.validate_every}"
        )
    if evaluate is not None and evaluate_every and experiment.model.decodes_frames:
        raise ConfigError("a model of frames plans no actions, so that there is nothing to evaluate in an environment")
    if not resume and list_checkpoints(out):
        raise OutputError(
            f"{out} already holds a run at {list_checkpoints(out)[-1].name}; choose another --out, or --resume it"
        )
    if init is None and not resume:
        check_weights(experiment.model)
        if experiment.training.trained == "decoder":
            raise ConfigError(
                "training.trained=decoder leaves the encoder as it is, and without --init it would be a random one: "
                "name a checkpoint with --init (scd distill takes its teacher), or set training.trained=all"
            )
    training = experiment.training
    if not training.cache_features:
        data = with_pictures_in_memory(data, experiment.model.image_keys, training.images_in_memory_gb)
    sources: dict[str, Any] = {"init": init, "init_statistics": init_statistics, "autoencoder": autoencoder}
    start = begin(data, experiment, out, resume=resume, **sources)
    lightning.seed_everything(experiment.training.seed, verbose=False)
    module = ScdLightningModule(experiment, start.normalizer)
    if start.weights_from is not None:
        module.load_weights(start.weights_from)
    elif start.state is None and (pretrained := module.load_pretrained()):
        start.origin["backbone"] = pretrained
    if start.autoencoder is not None:
        module.load_autoencoder(start.autoencoder)
    if training.cache_features:
        data = _with_features(data, module, start, out, accelerator, progress)

    callbacks: list[Any] = [ProgressBar()] if progress else []
    if evaluate is not None and evaluate_every:
        callbacks.append(ClosedLoopEvaluation(evaluate, evaluate_every, recorded))
    callbacks.append(CheckpointWriter(out, recorded, start.origin))
    trainer = _trainer(out, experiment, callbacks, accelerator, devices, num_nodes, strategy)
    started = time.monotonic()
    if start.step < experiment.training.max_steps:
        with _writing_to(out), _stopped_from_outside(out):
            datamodule = EpisodeDataModule(data, experiment, start.step)
            trainer.fit(module, datamodule, ckpt_path=start.state, weights_only=True if start.state else None)
    if not trainer.is_global_zero:
        return None
    newest = find_checkpoint(out)
    return {
        "checkpoint": str(newest),
        "steps": read_step(newest),
        "seconds": round(time.monotonic() - started, 2),
        "parameters": sum(p.numel() for p in module.model.parameters()),
        "encoder_parameters": _parameters(module.model, "encoder."),
        "decoder_parameters": _parameters(module.model, "decoder."),
        "metrics": json.loads((newest / "metrics.json").read_text()),
    }


def _with_features(
    data: EpisodeDataset, module: ScdLightningModule, start: Start, out: Path, accelerator: str, progress: bool
) -> EpisodeDataset:
    """The dataset with features in the place of pictures, which lie in the folder of the run."""
    backbone = module.model.tokenizer.backbone
    if backbone is None:  # no pictures
        return data
    if start.state is not None:  # the trainer takes the weights of a resumed run later
        module.load_weights(read_checkpoint(out))
    return with_cached_features(
        data,
        backbone,
        out / "features",
        start.origin["dataset"],
        most_gb=module.experiment.training.images_in_memory_gb,
        device="cuda" if accelerator != "cpu" and torch.cuda.is_available() else "cpu",
        progress=progress,
    )


def _parameters(model: HistoryModel[Any], prefix: str) -> int:
    return sum(p.numel() for name, p in model.named_parameters() if name.startswith(prefix))


@contextlib.contextmanager
def _stopped_from_outside(out: Path) -> Iterator[None]:
    """Lets Ctrl-C and SIGTERM end a training as they end anything else: Lightning makes exits of its own of them."""
    from lightning.pytorch.utilities.exceptions import SIGTERMException

    on_interrupt = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as stop:
        asked = isinstance(stop, SIGTERMException)
        if not asked and not isinstance(stop.__context__, KeyboardInterrupt):
            raise
        written = list_checkpoints(out)
        left = f"--resume goes on from {written[-1].name}" if written else "there was no checkpoint yet"
        logger.warning("the training of %s was stopped; %s", out, left)
        if asked:
            raise SystemExit(128 + signal.SIGTERM) from stop
        signal.signal(signal.SIGINT, on_interrupt)  # Lightning ignores further ones
        raise KeyboardInterrupt from stop


@contextlib.contextmanager
def _writing_to(out: Path) -> Iterator[None]:
    """Turns the system's refusals to write logs into one error, also those in TensorBoard's thread.

    That thread's exceptions are raised again in this one, so they need not be printed.
    """
    shown = threading.excepthook

    def keep_refusals_quiet(thread_error: threading.ExceptHookArgs) -> None:
        error = thread_error.exc_value
        if not (isinstance(error, OSError) and error.errno in _REFUSALS):
            shown(thread_error)

    threading.excepthook = keep_refusals_quiet
    try:
        yield
    except OSError as error:
        if error.errno not in _REFUSALS:
            raise
        raise OutputError(
            f"cannot write to {out}: {os.strerror(error.errno).lower()}; choose another --out, or mend that "
            "and --resume: checkpoints written so far are untouched"
        ) from error
    finally:
        threading.excepthook = shown


def _trainer(
    out: Path,
    experiment: ExperimentConfig,
    callbacks: list[Any],
    accelerator: str,
    devices: int,
    num_nodes: int,
    strategy: str,
) -> Any:
    training = experiment.training
    from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
    from lightning.pytorch.utilities.exceptions import MisconfigurationException

    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # devices found, products advertised
    warnings.filterwarnings("ignore", message=".*LeafSpec.*", module="lightning")
    warnings.filterwarnings("ignore", message="Found .* in eval mode", module="lightning")  # a backbone is meant to be
    try:
        trainer = lightning.Trainer(
            accelerator=accelerator,
            devices=devices,
            num_nodes=num_nodes,
            strategy=_strategy(strategy, devices * num_nodes),
            precision=training.precision,
            max_epochs=-(-training.max_steps // training.validate_every),  # the sampler cuts the last one short
            logger=[CSVLogger(out / "logs", name="csv"), TensorBoardLogger(out / "logs", name="tensorboard")],
            log_every_n_steps=min(10, training.validate_every, training.max_steps),
            num_sanity_val_steps=0,
            # Lightning reads the length of an epoch once, unless it is told that the last one is shorter.
            reload_dataloaders_every_n_epochs=int(training.max_steps % training.validate_every > 0),
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            callbacks=callbacks,
        )
    except (MisconfigurationException, TypeError, ValueError) as error:
        raise ConfigError(
            f"cannot train with accelerator {accelerator!r}, {devices} devices, {num_nodes} nodes, strategy "
            f"{strategy!r} and precision {training.precision!r}: {error}"
        ) from error
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "checkpoints").mkdir(exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot write to {out}: {error.strerror}; choose another --out") from error
    return trainer


def _strategy(name: str, world_size: int) -> Any:
    """Lightning's strategy of that name; "fsdp" shards parameters over all devices."""
    if name != "fsdp":
        return name
    from lightning.pytorch.strategies import ModelParallelStrategy

    return ModelParallelStrategy(world_size, tensor_parallel_size=1, save_distributed_checkpoint=False)
