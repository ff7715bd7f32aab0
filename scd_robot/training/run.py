"""One training run, from a dataset to a folder of checkpoints."""

import json
import logging
import math
import pickle
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from scd_robot.checkpoint import (
    Checkpoint,
    find_checkpoint,
    list_checkpoints,
    read_checkpoint,
    read_step,
    resume_file,
)
from scd_robot.config import from_json, to_json
from scd_robot.datasets import EpisodeDataset
from scd_robot.errors import CheckpointError, ConfigError, DatasetError, OutputError, ShapeError
from scd_robot.model import ScdConfig
from scd_robot.normalization import Mode, Normalizer, compute_statistics
from scd_robot.policies.scd import ScdPolicy
from scd_robot.training.callbacks import RESUME_FILE, CheckpointWriter, ClosedLoopEvaluation, ProgressBar
from scd_robot.training.compat import lightning
from scd_robot.training.config import ExperimentConfig
from scd_robot.training.datamodule import EpisodeDataModule
from scd_robot.training.module import ScdLightningModule

__all__ = ["fit_normalizer", "train"]


logger = logging.getLogger(__name__)


def train(
    data: EpisodeDataset,
    experiment: ExperimentConfig,
    out: Path,
    *,
    resume: bool = False,
    init: Path | None = None,
    init_statistics: str | None = None,
    evaluate: Callable[[ScdPolicy], dict[str, float]] | None = None,
    evaluate_every: int = 0,
    accelerator: str = "auto",
    devices: int = 1,
    num_nodes: int = 1,
    strategy: str = "auto",
    progress: bool = True,
) -> dict[str, Any]:
    """Trains, and writes out/checkpoints/step_* and out/logs (TensorBoard and CSV).

    Args:
        data: the episodes.
        experiment: what to train and how.
        out: folder of the run.
        resume: continue the run in `out` from its newest checkpoint; it ends with the same weights as an
            uninterrupted one (on a CPU with the same number of threads).
        init: checkpoint to fine-tune from; its architecture must equal the experiment's.
        init_statistics: with `init`, whose normalisation to use: "checkpoint" or "dataset".
        evaluate: runs a policy in closed loop and returns metrics.
        evaluate_every: steps between evaluations, a multiple of validate_every; 0 = never.
        accelerator: Lightning's.
        devices: per node.
        num_nodes: machines.
        strategy: Lightning's, e.g. "ddp"; "fsdp" shards parameters and optimiser state over the devices.
        progress: show a progress bar.

    Returns:
        JSON-able summary: checkpoint, steps, seconds, parameters, metrics.

    Raises:
        OutputError: `out` holds a run already and `resume` is not given, or cannot be written.
        CheckpointError: nothing to resume from, or another experiment was run there.
        ConfigError, DatasetError, ShapeError: settings and data do not fit.
        TrainingDivergedError: the loss became NaN; checkpoints written before stay.
    """
    data.check("the training dataset")
    _check_lengths(data, experiment)
    if evaluate_every % experiment.training.validate_every:
        raise ConfigError(
            f"evaluate_every {evaluate_every} must be a multiple of validate_every {experiment.training.validate_every}"
        )
    state = _resume_state(out, experiment) if resume else None
    if state is None and list_checkpoints(out):
        raise OutputError(
            f"{out} already holds a run at {list_checkpoints(out)[-1].name}; choose another --out, or --resume it"
        )
    lightning.seed_everything(experiment.training.seed, verbose=False)
    first_step = 0 if state is None else read_step(out)
    datamodule = EpisodeDataModule(data, experiment, first_step)
    source = _read_init(init, init_statistics, experiment, data) if init is not None else None
    if source is not None and init_statistics == "checkpoint":
        normalizer = source.normalizer
    else:
        normalizer = fit_normalizer(datamodule, experiment)
    module = ScdLightningModule(experiment, normalizer)
    if source is not None:
        _load_weights(module, source)
        module.ema = type(module.ema)(module.model, experiment.training.ema_decay)

    callbacks: list[Any] = [ProgressBar()] if progress else []
    if evaluate is not None and evaluate_every:
        callbacks.append(ClosedLoopEvaluation(evaluate, evaluate_every, data.spec))
    callbacks.append(CheckpointWriter(out, data.spec))
    trainer = _trainer(out, experiment, callbacks, accelerator, devices, num_nodes, strategy)
    started = time.monotonic()
    if first_step < experiment.training.max_steps:
        trainer.fit(module, datamodule, ckpt_path=state, weights_only=True if state else None)
    newest = find_checkpoint(out)
    return {
        "checkpoint": str(newest),
        "steps": read_step(out),
        "seconds": round(time.monotonic() - started, 2),
        "parameters": sum(p.numel() for p in module.model.parameters()),
        "encoder_parameters": sum(p.numel() for p in module.model.encoder.parameters()),
        "decoder_parameters": sum(p.numel() for p in module.model.decoder.parameters()),
        "metrics": json.loads((newest / "metrics.json").read_text()),
    }


def fit_normalizer(datamodule: EpisodeDataModule, experiment: ExperimentConfig) -> Normalizer:
    """Statistics of the training episodes."""
    rows, arrays = datamodule.statistics_rows(), datamodule.data.arrays
    modes: dict[str, Mode] = dict.fromkeys(
        experiment.model.observation_shapes, experiment.training.observation_normalization
    )
    modes["action"] = experiment.training.action_normalization
    return Normalizer({key: compute_statistics(arrays[key][rows], key) for key in modes}, modes)


def _load_weights(module: ScdLightningModule, source: Checkpoint) -> None:
    try:
        module.model.load_state_dict(source.weights)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise CheckpointError(f"the weights of {source.path} do not fit its configuration: {reason}") from error


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
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "checkpoints").mkdir(exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot write to {out}: {error.strerror}; choose another --out") from error
    try:
        return lightning.Trainer(
            accelerator=accelerator,
            devices=devices,
            num_nodes=num_nodes,
            strategy=_strategy(strategy, devices * num_nodes),
            precision=training.precision,
            max_epochs=-(-training.max_steps // training.validate_every),  # the sampler cuts the last one short
            logger=[CSVLogger(out / "logs", name="csv"), TensorBoardLogger(out / "logs", name="tensorboard")],
            log_every_n_steps=min(10, training.validate_every),
            num_sanity_val_steps=0,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            callbacks=callbacks,
        )
    except (MisconfigurationException, ValueError) as error:
        raise ConfigError(
            f"cannot train with accelerator {accelerator!r}, {devices} devices, {num_nodes} nodes, strategy "
            f"{strategy!r} and precision {training.precision!r}: {error}"
        ) from error


def _strategy(name: str, world_size: int) -> Any:
    """Lightning's strategy of that name; "fsdp" shards parameters over all devices."""
    if name != "fsdp":
        return name
    from lightning.pytorch.strategies import ModelParallelStrategy

    return ModelParallelStrategy(world_size, tensor_parallel_size=1, save_distributed_checkpoint=False)


def _check_lengths(data: EpisodeDataset, experiment: ExperimentConfig) -> None:
    model = experiment.model
    shapes = {key: spec.shape for key, spec in data.spec.observation.items()}
    for key, shape in model.observation_shapes.items():
        if shapes.get(key) != tuple(shape):
            raise ShapeError(f"the model takes {key!r} of shape {tuple(shape)}, the dataset has {shapes.get(key)}")
    if model.action_dim != data.spec.action_dim:
        raise ShapeError(
            f"the model gives actions of width {model.action_dim}, the dataset's are {data.spec.action_dim}"
        )
    if model.leaks_past_actions:
        logger.warning(
            "past_action_input='full' shows the encoder the very actions that num_past_actions=%d asks the decoder to "
            "predict: past-token prediction then teaches nothing; use 'noised' or 'none'",
            model.num_past_actions,
        )
    longest = int(data.episode_lengths.max())
    steps = math.ceil(float(np.minimum(data.episode_lengths, experiment.training.segment_length).sum()))
    if steps < 2:
        raise DatasetError(f"{data.num_episodes} episodes hold {steps} steps; there is nothing to learn from")
    if longest > experiment.training.segment_length:
        logger.info(
            "episodes of up to %d steps are cut into segments of %d (training.segment_length); each later segment "
            "starts as a virtual reset",
            longest,
            experiment.training.segment_length,
        )


def _resume_state(out: Path, experiment: ExperimentConfig) -> Path:
    """The training state to continue from."""
    newest = read_checkpoint(out)
    state = resume_file(newest.path, RESUME_FILE.name)
    if newest.config != to_json(experiment):
        changed = _differences(newest.config, to_json(experiment))
        raise CheckpointError(f"{out} was run with other settings ({changed}); resume it with the same, or use --init")
    try:
        torch.load(state, weights_only=True, mmap=True)
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(
            f"{state} is not a training state of plain tensors ({reason}); remove {newest.path} to resume from the "
            "checkpoint before it, or use --init"
        ) from error
    return state


def _differences(old: Any, new: Any, where: str = "") -> str:
    if isinstance(old, dict) and isinstance(new, dict):
        parts = [_differences(old.get(k), new.get(k), f"{where}.{k}".lstrip(".")) for k in {**old, **new}]
        return "; ".join(part for part in parts if part)
    return "" if old == new else f"{where}: {old!r} there, {new!r} here"


def _read_init(init: Path, statistics: str | None, experiment: ExperimentConfig, data: EpisodeDataset) -> Checkpoint:
    if statistics not in ("checkpoint", "dataset"):
        raise ConfigError(
            "--init needs --init-statistics: 'checkpoint' keeps the old normalisation (same robot, same units), "
            f"'dataset' computes it anew; got {statistics!r}"
        )
    source = read_checkpoint(init)
    old = from_json(ScdConfig, source.config["model"], "model")
    if old != experiment.model:
        changed = _differences(to_json(old), to_json(experiment.model))
        raise ShapeError(f"{source.path} has another architecture ({changed}); fine-tuning needs the same")
    if source.dataset.control_dt != data.spec.control_dt:
        logger.warning(
            "%s was trained at control_dt %g s, the dataset has %g s",
            source.path,
            source.dataset.control_dt,
            data.spec.control_dt,
        )
    return source
