"""The verb `scd train`."""

import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Literal

import tyro

from scd_robot.datasets.formats import ReadOptions

__all__ = ["open_datasets", "read_transforms", "report", "train"]

logger = logging.getLogger(__name__)


def train(
    preset: Annotated[str, tyro.conf.Positional],
    /,
    *,
    dataset: list[str],
    weights: list[float] | None = None,
    out: Path,
    read: Annotated[ReadOptions, tyro.conf.arg(name="")] = ReadOptions(),  # noqa: B008 - frozen
    transforms: str | None = None,
    tasks: str | None = None,
    goals: tuple[str, ...] = (),
    max_steps: int | None = None,
    seed: int | None = None,
    settings: Annotated[tuple[str, ...], tyro.conf.arg(name="set")] = (),
    resume: bool = False,
    init: Path | None = None,
    init_statistics: Literal["checkpoint", "dataset"] | None = None,
    autoencoder: Path | None = None,
    eval_env: str | None = None,
    eval_every: int = 0,
    eval_episodes: int = 20,
    accelerator: str = "auto",
    devices: int = 1,
    num_nodes: int = 1,
    strategy: str = "auto",
    threads: int | None = None,
    json: Path | None = None,
) -> None:
    """Trains a policy, or a model of frames, on a dataset.

    Writes OUT/checkpoints/step_* (each a complete policy), and TensorBoard and CSV logs in OUT/logs. A run that was
    interrupted continues with --resume and the same options, and ends with the same weights.

    Args:
        preset: named experiment: metaworld_state (any vectors), image (pictures too), memory_state or pusht_state
            (docs/training.md), frames_64 (imagines pictures), frames_latent (larger ones) or image_frames (acts and
            imagines, docs/frames.md); or the config.json of a checkpoint, to run it again.
        dataset: dataset of any known format (see 'scd data info --help'), or several, which are then mixed; widths of
            observations and actions are taken from it.
        weights: with several datasets, the share of control steps that each supplies, in any unit; by default every
            segment counts once.
        out: folder of the run.
        read: what to read of the datasets.
        transforms: what to do between the recording and the model, as JSON or a file that holds it: rename, images,
            rotations, grippers, select, chunk (docs/data.md); by default the preset's.
        tasks: tell the model the task of each episode: "one-hot", or a JSON file {"task in words": [numbers], ...} with
            embeddings of the words. Words are those of a LeRobot dataset; where a recording has none, the name of its
            environment.
        goals: observation keys whose last observation of the episode is shown from the beginning, as "goal.KEY".
        max_steps: optimiser steps; by default the preset's.
        seed: keys every random draw; by default the preset's.
        settings: settings that replace the preset's, as FIELD=VALUE: training.learning_rate=3e-4 model.history_length=1
            policy.sampler.num_denoising_steps=4; 'scd info' shows all of a trained one.
        resume: continue the run in OUT from its newest checkpoint.
        init: fine-tune from this checkpoint (or run) of the same architecture; a policy with or without a frame decoder
            besides (image_frames, image) from one without or with it.
        init_statistics: with --init, normalise with the checkpoint's statistics or with new ones of the dataset.
        autoencoder: folder of 'scd train-autoencoder': frames are imagined as its latents. frames_latent needs it;
            frames_64 and image_frames may have it.
        eval_env: evaluate in this environment while training, from start states that `scd eval` never uses.
        eval_every: training steps between these evaluations, a multiple of training.validate_every.
        eval_episodes: episodes of each of them.
        accelerator: Lightning's: auto, cpu, gpu.
        devices: per node.
        num_nodes: machines.
        strategy: Lightning's: auto, ddp, ...
        threads: CPU threads; by default all cores, at most 8.
        json: write the summary to this file too ("-": standard output).
    """
    from scd_robot.cli.threads import use_training_threads
    from scd_robot.errors import ConfigError
    from scd_robot.output import check_target
    from scd_robot.presets import resolve, with_settings
    from scd_robot.training import train as run
    from scd_robot.training.autoencoder_file import read_autoencoder

    if bool(eval_env) != bool(eval_every):
        raise ConfigError("evaluation while training needs both --eval-env and --eval-every")
    if eval_episodes < 1:
        raise ConfigError(f"--eval-episodes must be at least 1, got {eval_episodes}")
    if json is not None:
        check_target(json)
    data = open_datasets(dataset, weights, read)
    given = list(settings)
    given += [] if max_steps is None else [f"training.max_steps={max_steps}"]
    given += [] if seed is None else [f"training.seed={seed}"]
    experiment = _told(resolve(preset, data.spec, read_transforms(transforms)), data, tasks, goals)
    if autoencoder is not None:
        experiment = experiment.with_autoencoder(read_autoencoder(autoencoder).config)
    experiment = with_settings(experiment, given)
    count = use_training_threads(threads)
    name = " + ".join(dataset)
    logger.info("training %s on %s, %d steps, %d threads", preset, name, experiment.training.max_steps, count)
    summary = run(
        data,
        experiment,
        out,
        resume=resume,
        init=init,
        init_statistics=init_statistics,
        autoencoder=autoencoder,
        evaluate=_evaluation(eval_env, eval_episodes, data.spec, experiment) if eval_env else None,
        evaluate_every=eval_every,
        accelerator=accelerator,
        devices=devices,
        num_nodes=num_nodes,
        strategy=strategy,
        progress=str(json) != "-",
    )
    report(summary, json)


def report(summary: dict[str, Any] | None, json: Path | None) -> None:
    """Prints how the training went, and writes it to `json`; only the first process of a run has a summary."""
    from scd_robot.output import write_json

    if summary is None:
        return
    if str(json) != "-":
        metrics = summary["metrics"]
        error, frame = metrics.get("val/chunk_rmse"), metrics.get("val/frame_rmse")
        held_out = "" if error is None else f", held-out chunk error {error:.4f} (RMS, normalised units)"
        if frame is not None:
            repeated = metrics["val/repeated_frame_rmse"]
            held_out += f", held-out error of the next frame {frame:.4f}, of the last one repeated {repeated:.4f} (RMS)"
        print(f"{summary['checkpoint']}: {summary['steps']} steps in {summary['seconds']:.0f} s{held_out}")
    if json is not None:
        write_json(json, summary)


def open_datasets(paths: list[str], weights: list[float] | None, read: ReadOptions) -> Any:
    """One `EpisodeDataset`."""
    from scd_robot.datasets import open_dataset
    from scd_robot.datasets.combine import join_datasets, mix_datasets

    datasets = [open_dataset(path, **vars(read)) for path in paths]
    return join_datasets(datasets, paths) if weights is None else mix_datasets(datasets, weights, paths)


def read_transforms(given: str | None) -> Any:
    """A `TransformConfig` of JSON, or of a file that holds it; fields may be left out. None without."""
    import json

    from scd_robot.config import from_json
    from scd_robot.errors import ConfigError
    from scd_robot.transforms import TransformConfig

    if given is None:
        return None
    inline = given.lstrip().startswith("{")
    told = "--transforms" if inline else given
    try:
        found = json.loads(given if inline else Path(given).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read the transforms {given}: {error}") from error
    return from_json(TransformConfig, found, told, partial=True)


def _told(experiment: Any, data: Any, tasks: str | None, goals: tuple[str, ...]) -> Any:
    """The experiment with tasks and goals as observations, see `train`."""
    from scd_robot.datasets.tasks import one_hot_tasks, read_task_vectors
    from scd_robot.errors import ConfigError

    if tasks not in (None, "one-hot") and not Path(tasks).exists():
        raise ConfigError(f"--tasks takes one-hot, or a JSON file with a vector for each task; there is no {tasks}")
    if goals:
        experiment = experiment.with_goals(goals)
    if tasks is not None:
        experiment = experiment.with_tasks(
            one_hot_tasks(data) if tasks == "one-hot" else read_task_vectors(Path(tasks))
        )
    return experiment


def _evaluation(environment: str, episodes: int, dataset: Any, experiment: Any) -> Callable[[Any], dict[str, float]]:
    """A closed-loop evaluation from the start states kept for validation.

    Whether the policy that is to be trained fits the environment is looked at now, rather than after the first hour.
    """
    from scd_robot.cli.policy_source import known_task
    from scd_robot.seeding import VALIDATION
    from scd_robot.sim_eval import evaluate
    from scd_robot.sim_eval.policy_adapter import check_policy_spec
    from scd_robot.sim_eval.workers import close_workers, start_workers
    from scd_robot.transforms import Transforms
    from scd_robot.types import PolicySpec

    transforms, model = Transforms(experiment.transforms, dataset), experiment.model
    task = known_task(environment, experiment.transforms.tasks)
    sources = [transforms.sources[key] for key in model.observation_shapes if key in transforms.sources]
    planned = PolicySpec(
        observation={source: transforms.recorded.observation[source] for source in sources},
        action_dim=dataset.action_dim,
        control_dt=dataset.control_dt,
        chunk_length=model.chunk_length,
        num_executed=experiment.policy.num_executed,
        history_length=model.history_length,
        action_kind=dataset.action_kind,
    )
    workers = start_workers(environment, 1)
    try:
        check_policy_spec(SimpleNamespace(spec=planned), workers[0].spec)
    finally:
        close_workers(workers)

    def run(policy: Any) -> dict[str, float]:
        if task is not None:
            policy.task = task
        result = evaluate(policy, environment, episodes, seed_domain=VALIDATION, num_videos=0, progress=False)
        low, high = result.interval
        if result.success_rate is None:  # no valid episode says nothing about the policy
            return {"invalid": float(result.invalid)}
        best = result.mean_best_reward
        rewards = {} if best is None else {"best_reward": best}
        return {"success_rate": result.success_rate, "interval_low": low, "interval_high": high, **rewards}

    return run
