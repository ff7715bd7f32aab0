"""The verb `scd demo`: the whole path from an expert to a report, on one machine."""

import json as json_module
import shutil
import time
from pathlib import Path
from typing import Any

from scd_robot.errors import ConfigError, OutputError
from scd_robot.output import check_target, write_json

__all__ = ["demo"]

_MARKER = "demo.json"  # the options of the demo whose folder this is


def demo(
    *,
    env: str = "metaworld/push-v3",
    out: Path = Path("demo_output"),
    demonstrations: int = 100,
    max_steps: int = 2000,
    episodes: int = 50,
    seed: int = 0,
    overwrite: bool = False,
    json: Path | None = None,
) -> None:
    """Records demonstrations, trains a policy, evaluates it in closed loop, and shows where the report is.

    Takes minutes on two CPU cores and downloads nothing. Called again with the same options after an interruption it
    continues: finished stages are kept.

    Args:
        env: a Meta-World task.
        out: folder for everything: demonstrations.zarr, run/, evaluation/.
        demonstrations: expert episodes to record.
        max_steps: optimiser steps; fewer than the preset's, and enough for the default task.
        episodes: episodes of the evaluation.
        seed: of demonstrations and training.
        overwrite: start anew instead of continuing.
        json: write the summary to this file too ("-": standard output).
    """
    from scd_robot.cli import data as data_verbs
    from scd_robot.cli.evaluate import evaluate
    from scd_robot.cli.train import train

    if json is not None:
        check_target(json)
    options = {"env": env, "demonstrations": demonstrations, "max_steps": max_steps, "seed": seed}
    _claim(out, options, overwrite)
    started = time.monotonic()
    store, run, evaluation = out / "demonstrations.zarr", out / "run", out / "evaluation"
    stages: dict[str, float] = {}

    _say(1, f"recording {demonstrations} expert demonstrations of {env} in MuJoCo", "under half a minute")
    if _finished_episodes(store) < demonstrations:
        data_verbs.record(env, episodes=demonstrations, out=store, seed=seed, action_noise=0.1, overwrite=True)
    stages["record_s"] = time.monotonic() - started

    _say(2, "training a separable causal diffusion policy", "five to ten minutes on two cores; the bar tells")
    resume = any((run / "checkpoints").glob("step_*"))
    train("metaworld_state", dataset=[str(store)], out=run, max_steps=max_steps, seed=seed, resume=resume)
    stages["train_s"] = time.monotonic() - started - stages["record_s"]

    _say(3, f"evaluating it over {episodes} episodes that start where no demonstration did", "about a minute")
    evaluate(str(run), env=env, episodes=episodes, out=evaluation, overwrite=True)
    stages["total_s"] = time.monotonic() - started

    report = evaluation / "report.html"
    print(f"\nDone in {stages['total_s'] / 60:.1f} minutes. Open the report, with videos, in a browser:\n  {report}")
    if json is not None:
        summary: dict[str, Any] = {"stages": stages, "report": report, "run": run, "dataset": store}
        write_json(json, {**summary, "result": evaluation / "result.json"})


def _say(stage: int, what: str, duration: str) -> None:
    print(f"\n[{stage}/3] {what} ({duration})", flush=True)


def _claim(out: Path, options: dict[str, Any], overwrite: bool) -> None:
    """Makes `out` the folder of a demo with these options, or sees that it is.

    Raises:
        OutputError: the folder belongs to something else.
        ConfigError: it holds a demo with other options.
    """
    marker = out / _MARKER
    if not marker.is_file():
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise OutputError(f"{out} is there already and holds no demo; choose another --out")
    elif overwrite:
        for name in ("demonstrations.zarr", "run", "evaluation"):
            if (out / name).exists():
                shutil.rmtree(out / name)
    else:
        there = json_module.loads(marker.read_text(encoding="utf-8"))
        changed = [f"{k} {there.get(k)!r} there, {v!r} here" for k, v in options.items() if there.get(k) != v]
        if changed:
            raise ConfigError(
                f"{out} holds a demo with other options ({'; '.join(changed)}); add --overwrite or choose another --out"
            )
    write_json(marker, options)


def _finished_episodes(store: Path) -> int:
    """Episodes of the store, 0 where there is none yet."""
    from scd_robot.datasets import open_dataset
    from scd_robot.errors import DatasetError

    if not store.exists():
        return 0
    try:
        return open_dataset(store).num_episodes
    except DatasetError:  # killed before its first episode was finished
        return 0
