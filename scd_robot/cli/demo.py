"""The verb `scd demo`: the whole path from an expert to a report, on one machine."""

import time
from pathlib import Path
from typing import Any

__all__ = ["demo"]


def demo(
    *,
    env: str = "metaworld/push-v3",
    out: Path = Path("demo_output"),
    demonstrations: int = 100,
    max_steps: int | None = None,
    episodes: int = 50,
    seed: int = 0,
    overwrite: bool = False,
    json: Path | None = None,
) -> None:
    """Records demonstrations, trains a policy, evaluates it in closed loop, and shows where the report is.

    Takes about ten minutes on two CPU cores and downloads nothing. An interrupted demo continues where it was: finished
    stages are kept.

    Args:
        env: a Meta-World task.
        out: folder for everything: demonstrations.zarr, run/, evaluation/.
        demonstrations: expert episodes to record.
        max_steps: optimiser steps; by default the preset's.
        episodes: episodes of the evaluation.
        seed: of demonstrations and training.
        overwrite: start anew instead of continuing.
        json: write the summary to this file too ("-": standard output).
    """
    from scd_robot.cli import data as data_verbs
    from scd_robot.cli.evaluate import evaluate
    from scd_robot.cli.train import train
    from scd_robot.output import check_target, write_json

    if json is not None:
        check_target(json)
    started = time.monotonic()
    store, run, evaluation = out / "demonstrations.zarr", out / "run", out / "evaluation"
    if overwrite:
        _forget(out)
    stages: dict[str, Any] = {}

    _say(1, f"recording {demonstrations} expert demonstrations of {env} in MuJoCo", "half a minute")
    if not store.exists():
        out.mkdir(parents=True, exist_ok=True)
        data_verbs.record(env, episodes=demonstrations, out=store, seed=seed, action_noise=0.1)
    stages["record_s"] = time.monotonic() - started

    _say(2, "training a separable causal diffusion policy", "about seven minutes on two cores")
    resume = (run / "checkpoints").is_dir() and any((run / "checkpoints").glob("step_*"))
    train("metaworld_state", dataset=store, out=run, max_steps=max_steps, seed=seed, resume=resume)
    stages["train_s"] = time.monotonic() - started - stages["record_s"]

    _say(3, f"evaluating it in closed loop over {episodes} episodes that start where no demonstration did", "a minute")
    result_file = out / "result.json"
    evaluate(run, env=env, episodes=episodes, out=evaluation, overwrite=True, json=result_file)
    stages["total_s"] = time.monotonic() - started

    report = evaluation / "report.html"
    print(f"\nDone in {stages['total_s'] / 60:.1f} minutes. Open the report, with videos, in a browser:\n  {report}")
    if json is not None:
        write_json(json, {"stages": stages, "report": report, "run": run, "dataset": store, "result": result_file})


def _say(stage: int, what: str, duration: str) -> None:
    print(f"\n[{stage}/3] {what} ({duration})", flush=True)


def _forget(out: Path) -> None:
    """Removes what an earlier demo wrote, and nothing else."""
    import shutil

    for name in ("demonstrations.zarr", "run", "evaluation"):
        shutil.rmtree(out / name, ignore_errors=True)
