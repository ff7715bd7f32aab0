"""The verb `scd export`."""

import itertools
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

__all__ = ["export"]


def export(
    checkpoint: Annotated[Path, tyro.conf.Positional],
    /,
    *,
    out: Path,
    format: Literal["onnx", "torch-export", "aoti"] = "onnx",
    batch_size: int = 1,
    num_denoising_steps: int | None = None,
    num_executed: int | None = None,
    guidance_scale: float | None = None,
    num_samples: int | None = None,
    seed: int | None = None,
    dataset: Path | None = None,
    episode: int = 0,
    tolerance: float = 1e-4,
    parity: bool = True,
    overwrite: bool = False,
    json: Path | None = None,
) -> None:
    """Writes a separable policy as graphs that run without this package's models, and compares them with the policy.

    OUT gets three graphs (one encoder step with the history as explicit tensors, one evaluation of the decoder, a whole
    plan with all denoising steps), manifest.json, and parity.json: largest and RMS differences from the policy over an
    episode that overflows the history, with a reset in the middle. Beyond the tolerance nothing is written. 'scd eval
    OUT' and 'scd serve OUT' run it; ONNX needs numpy and onnxruntime only (docs/export.md).

    Args:
        checkpoint: a checkpoint's folder, or a training run's (its newest checkpoint).
        out: folder for the graphs.
        format: onnx; torch-export, for torch's loader, which may unpickle; aoti, native code for this kind of CPU,
            compiled by AOTInductor, which needs a C++ compiler.
        batch_size: rows that the graphs compute at a time.
        num_denoising_steps: replaces the checkpoint's.
        num_executed: actions taken from one plan before the next; replaces the checkpoint's.
        guidance_scale: guidance by context corruption; replaces the checkpoint's (1 = off).
        num_samples: plans sampled at a time, of which the one that agrees best with the executed past is kept; replaces
            the checkpoint's (1 = off).
        seed: of the policy's noise; replaces the checkpoint's.
        dataset: recorded episodes, to compare over one of them, which is repeated until the history overflows; by
            default observations are drawn within the ranges of the training data.
        episode: which of them.
        tolerance: largest difference of a context or velocity, and of an action in units of half its range in the
            training data.
        parity: compare.
        overwrite: replace an earlier export in OUT.
        json: write the report of the comparison to this file too ("-": standard output).
    """
    import torch

    from scd_robot.cli.termination import unfinished_removed
    from scd_robot.errors import ConfigError
    from scd_robot.export.write import export_policy
    from scd_robot.output import check_target, write_json
    from scd_robot.policies import load_policy

    if json is not None:
        check_target(json)
    if not tolerance > 0:
        raise ConfigError(f"--tolerance must be positive, got {tolerance:g}; --no-parity leaves the comparison out")
    if dataset is not None and not parity:
        raise ConfigError("--dataset is for the comparison, which --no-parity leaves out")
    torch.set_num_threads(1)
    policy = load_policy(
        checkpoint,
        num_denoising_steps=num_denoising_steps,
        num_executed=num_executed,
        guidance_scale=guidance_scale,
        num_samples=num_samples,
        seed=seed,
    )
    observations = None if dataset is None else _recorded(policy, dataset, episode, batch_size)
    with unfinished_removed():
        report = export_policy(
            policy,
            out,
            format,
            batch_size=batch_size,
            observations=observations,
            tolerance=tolerance if parity else 0,
            overwrite=overwrite,
            progress=str(json) != "-",
        )
    if json is not None:
        write_json(json, report)
    if str(json) != "-":
        print("\n".join(_lines(report, out)))


def _recorded(policy: Any, path: Path, episode: int, batch_size: int) -> list[dict[str, Any]]:
    """Observations of an episode, repeated until the history overflows twice; row i is i control steps ahead.

    Goals are what was observed at its end.
    """
    import numpy as np

    from scd_robot.datasets import open_dataset
    from scd_robot.errors import DatasetError
    from scd_robot.export.parity import needed_steps
    from scd_robot.transforms import GOAL

    goals = {policy.transforms.sources[GOAL + key] for key in policy.transforms.config.goals}
    recorded = {key: key.removeprefix(GOAL) if key in goals else key for key in policy.spec.observation}
    keys = list(dict.fromkeys(recorded.values()))
    data = open_dataset(path, keys)
    if not -data.num_episodes <= episode < data.num_episodes:
        raise DatasetError(f"--episode {episode}: {path} has {data.num_episodes} episodes")
    arrays = data.episode(episode, keys)
    length = len(arrays[keys[0]])
    steps = itertools.islice(itertools.cycle(range(length)), max(length, needed_steps(policy)))
    rows, last = np.arange(batch_size), np.full(batch_size, length - 1)
    return [
        {key: arrays[name][last if key in goals else (step + rows) % length] for key, name in recorded.items()}
        for step in steps
    ]


def _lines(report: dict[str, Any], out: Path) -> list[str]:
    if not report:
        return [f"exported, not compared with the policy: {out}"]
    told = ", ".join(
        f"{name} {report[name]['max']:.1e} (RMS {report[name]['rms']:.1e})"
        for name in ("context", "action", "velocity")
    )
    return [
        f"largest differences over {report['control_steps']} control steps and {report['plans']} plans: {told}; "
        f"tolerance {report['tolerance']:g}",
        f"exported: {out}",
    ]
