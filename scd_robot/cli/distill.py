"""The verb `scd distill`."""

import logging
from pathlib import Path
from typing import Annotated, Literal

import tyro

from scd_robot.datasets.formats import ReadOptions

__all__ = ["distill"]

logger = logging.getLogger(__name__)


def distill(
    checkpoint: Annotated[Path, tyro.conf.Positional],
    /,
    *,
    objective: Literal["mean_flow", "shortcut", "mip"],
    dataset: list[str],
    weights: list[float] | None = None,
    out: Path,
    read: Annotated[ReadOptions, tyro.conf.arg(name="")] = ReadOptions(),  # noqa: B008 - frozen
    max_steps: int | None = None,
    train_encoder: bool = False,
    seed: int | None = None,
    settings: Annotated[tuple[str, ...], tyro.conf.arg(name="set")] = (),
    resume: bool = False,
    accelerator: str = "auto",
    threads: int | None = None,
    json: Path | None = None,
) -> None:
    """Teaches a trained policy to plan in one or two denoising steps.

    Writes what 'scd train' writes, and the teacher's hash into each checkpoint. Training begins with the teacher's
    weights, settings and normalisation, and learns from the data, not from plans of the teacher.

    Args:
        checkpoint: the teacher: a checkpoint's folder, or a training run's (its newest checkpoint).
        objective: mean_flow and shortcut learn the average velocity over steps of any length, so that the number of
            denoising steps can still be chosen; mip learns two regressions, without noise.
        dataset: what the teacher was trained on, or more of its kind; several datasets are mixed.
        weights: with several datasets, the share of control steps that each supplies, in any unit; by default every
            segment counts once.
        out: folder of the run.
        read: what to read of the datasets.
        max_steps: optimiser steps; by default a third of the teacher's.
        train_encoder: let the encoder learn too, which costs more and is what the entangled architecture always does;
            by default the decoder alone learns, so that contexts stay what they are.
        seed: keys every random draw; by default the teacher's. Another one holds out other episodes, from which the
            teacher has learned.
        settings: settings that replace the teacher's, as FIELD=VALUE: training.learning_rate=3e-4
            policy.sampler.num_denoising_steps=2.
        resume: continue the run in OUT from its newest checkpoint.
        accelerator: Lightning's: auto, cpu, gpu.
        threads: CPU threads; by default all cores, at most 8.
        json: write the summary to this file too ("-": standard output).
    """
    from scd_robot.checkpoint import read_checkpoint
    from scd_robot.cli.threads import use_training_threads
    from scd_robot.cli.train import open_datasets, report
    from scd_robot.config import from_json
    from scd_robot.errors import ConfigError
    from scd_robot.output import check_target
    from scd_robot.presets import with_settings
    from scd_robot.training import ExperimentConfig
    from scd_robot.training import train as run

    if json is not None:
        check_target(json)
    teacher = read_checkpoint(checkpoint)
    experiment = from_json(ExperimentConfig, teacher.config, f"{teacher.path}/config.json")
    if experiment.model.decodes_frames:
        raise ConfigError(
            f"{teacher.path} is a model of frames, and distillation is for policies; few denoising steps of a frame "
            "are asked for where it is imagined (--num-denoising-steps)"
        )
    everything = train_encoder or experiment.model.architecture == "entangled"
    steps = max(1, experiment.training.max_steps // 3) if max_steps is None else max_steps
    given = [f"training.objective={objective}", f"training.trained={'all' if everything else 'decoder'}"]
    given += [f"training.max_steps={steps}", *settings]
    given += [] if seed is None else [f"training.seed={seed}"]
    experiment = with_settings(experiment, given)
    data = open_datasets(dataset, weights, read)
    count = use_training_threads(threads)
    logger.info("distilling %s by %s, %d steps, %d threads", teacher.path, objective, steps, count)
    summary = run(
        data,
        experiment,
        out,
        resume=resume,
        init=teacher.path,
        init_statistics="checkpoint",
        accelerator=accelerator,
        progress=str(json) != "-",
    )
    report(summary, json)
