"""A tiny dataset and experiment that train in a second; shared by the training tests and run as a program by some.

python tiny.py OUT MAX_STEPS [--resume] [--strategy NAME] [--stop-after STEP] [--frames | --own-frames] [-- OUT ...]

Several runs follow each other in the same processes, which take far longer to begin than to train.
"""

import contextlib
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from scd_robot.datasets import EpisodeDataset
from scd_robot.model import ScdConfig
from scd_robot.policies.scd import ScdPolicyConfig
from scd_robot.training import ExperimentConfig, TrainingConfig
from scd_robot.types import ArraySpec, DatasetSpec

LENGTHS = (9, 14, 5, 21, 17, 8)


@contextlib.contextmanager
def interrupted() -> Iterator[None]:
    """The training within it is cut off when its first checkpoint is written."""
    import pytest

    from scd_robot.training.callbacks import CheckpointWriter

    write = CheckpointWriter.at_epoch_end

    def write_and_fail(*args: object) -> None:
        write(*args)
        raise InterruptedError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CheckpointWriter, "at_epoch_end", write_and_fail)
        with pytest.raises(InterruptedError):
            yield


def tiny_data() -> EpisodeDataset:
    """A point that is pushed towards a goal shown in its observation."""
    rng = np.random.default_rng(0)
    ends = np.cumsum(LENGTHS)
    position, goal, action = (np.zeros((ends[-1], 2), np.float32) for _ in range(3))
    for start, stop in zip(np.r_[0, ends[:-1]], ends, strict=True):
        target, at = rng.uniform(-1, 1, 2), rng.uniform(-1, 1, 2)
        for step in range(start, stop):
            position[step], goal[step] = at, target
            action[step] = np.clip(2 * (target - at), -1, 1)
            at = at + 0.2 * action[step]
    executed = action + 0.05 * rng.standard_normal(action.shape).astype(np.float32)
    spec = DatasetSpec({"position": ArraySpec((2,)), "goal": ArraySpec((2,))}, 2, 0.1, "tiny")
    arrays = {"position": position, "goal": goal, "action": action, "executed_action": executed}
    return EpisodeDataset(spec, ends.astype(np.int64), arrays)


def tiny_experiment(max_steps: int = 6, model: dict | None = None, **training: object) -> ExperimentConfig:
    """Small in every respect; `model` and `training` replace fields."""
    architecture = {
        "observation_shapes": {"position": (2,), "goal": (2,)},
        "action_dim": 2,
        "width": 16,
        "num_heads": 2,
        "encoder_layers": 2,
        "decoder_layers": 1,
        "history_length": 4,
        "num_context_tokens": 2,
        "chunk_length": 4,
        "num_past_actions": 2,
        "past_action_input": "noised",
    }
    settings = {
        "max_steps": max_steps,
        "batch_size": 4,
        "segment_length": 12,
        "positions_per_segment": 5,
        "noise_draws": 2,
        "warmup_steps": 2,
        "validate_every": 3,
        "held_out": 0.2,
    }
    return ExperimentConfig(
        "tiny",
        ScdConfig(**{**architecture, **(model or {})}),  # type: ignore[arg-type]
        TrainingConfig(**{**settings, **training}),  # type: ignore[arg-type]
        ScdPolicyConfig(num_executed=2),
    )


def main() -> None:
    """Trains in a process of its own."""
    import torch

    torch.set_num_threads(1)
    arguments: list[str] = []
    for argument in [*sys.argv[1:], "--"]:
        if argument != "--":
            arguments.append(argument)
            continue
        train_once(*arguments)
        arguments = []


def train_once(out: str, max_steps: str, *arguments: str) -> None:
    """One of the runs that the program is asked for."""
    from scd_robot.training import train

    options = dict(itertools.pairwise([*arguments, ""]))
    strategy = options.get("--strategy", "auto")
    data, experiment = tiny_data(), tiny_experiment(int(max_steps))
    if options.keys() & {"--frames", "--own-frames"}:
        sys.path.append(str(Path(__file__).parents[1] / "helpers"))
        from frame_models import frame_experiment, joint_experiment, pushed_square

        from scd_robot.training import SelfForcingConfig

        data, experiment = pushed_square(6, steps=20), joint_experiment(int(max_steps))  # beside actions
        if "--own-frames" in options:
            experiment = frame_experiment(int(max_steps), self_forcing=SelfForcingConfig(0.2, frames=3))
    with stopped_after(int(options["--stop-after"])) if "--stop-after" in options else contextlib.nullcontext():
        train(
            data,
            experiment,
            Path(out),
            resume="--resume" in options,
            accelerator="cpu",
            devices=1 if strategy == "auto" else 2,
            strategy=strategy,
            progress=False,
        )


@contextlib.contextmanager
def stopped_after(step: int) -> Iterator[None]:
    """The training within it ends in the epoch's end hook of this step, after its checkpoint is written."""
    from scd_robot.training.callbacks import CheckpointWriter

    write = CheckpointWriter.at_epoch_end

    def write_and_stop(self, trainer, pl_module) -> None:  # type: ignore[no-untyped-def]
        write(self, trainer, pl_module)
        trainer.should_stop = trainer.global_step >= step

    CheckpointWriter.at_epoch_end = write_and_stop  # type: ignore[method-assign]
    try:
        yield
    finally:
        CheckpointWriter.at_epoch_end = write  # type: ignore[method-assign]


if __name__ == "__main__":
    main()
