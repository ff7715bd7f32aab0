"""PushT from the human demonstrations of Diffusion Policy, in its protocol.

    python benchmarks/pusht.py --dataset pusht_cchi_v7_replay.zarr       trains, evaluates, prints the curve

The preset pusht_state is trained, and the
last five checkpoints are evaluated over 100 episodes each, from the starts of diffusion_policy's test seeds 100000 to
100099, 300 control steps, ending at success. The score of an episode is its best reward: coverage / 0.95, at most 1.
Published for the CNN policy on states: 0.95 for the best checkpoint, 0.91 mean of the last ten (arXiv 2303.04137).

Checkpoints and results stay in --out; started again, the program continues.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import datetime
import logging
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from job import code_version, describe_machine, read_json

from scd_robot.checkpoint import list_checkpoints, read_step
from scd_robot.datasets import open_dataset
from scd_robot.output import write_json
from scd_robot.policies import load_policy
from scd_robot.presets import resolve, with_settings
from scd_robot.sim_eval import evaluate
from scd_robot.training import train

AVERAGED = 5
AIM, FLOOR = 0.90, 0.80


def score_of(checkpoint: Path, out: Path, episodes: int) -> dict[str, Any]:
    """Mean best reward of a checkpoint, with a 95 % bootstrap interval over episodes; kept in `out`."""
    target = out / "scores" / f"{checkpoint.name}_{episodes}.json"
    if target.is_file():
        return dict(read_json(target))
    result = evaluate(load_policy(checkpoint), "pusht:observation=keypoints,starts=benchmark", episodes, num_videos=0)
    best = np.array([record.best_reward for record in result.valid])
    score = {
        "step": read_step(checkpoint),
        "score": float(best.mean()),
        "interval": result.best_reward_interval,
        "covered_95": result.successes,
        "episodes": len(best),
        "invalid": result.invalid,
        "best_rewards": best.tolist(),
    }
    write_json(target, score)
    return score


def main() -> int:
    """Trains, evaluates, prints the table and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True, help="the replay buffer")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/pusht"))
    parser.add_argument("--episodes", type=int, default=100)
    parser.add_argument("--checkpoints", type=int, default=AVERAGED, help="so many of the last are evaluated")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--accelerator", choices=("cpu", "gpu"), default="cpu", help="of the training")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="FIELD=VALUE", help="settings that replace the preset's"
    )
    options = parser.parse_args()
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    torch.set_num_threads(options.threads)
    run = options.out / "run"
    data = open_dataset(options.dataset, ["state", "keypoint"], control_dt=0.1)
    experiment = with_settings(resolve("pusht_state", data.spec), options.set)
    written = list_checkpoints(run)
    started = time.monotonic()
    if not written or read_step(written[-1]) < experiment.training.max_steps:
        summary = train(data, experiment, run, resume=bool(written), accelerator=options.accelerator)
        assert summary is not None
    wall_s = time.monotonic() - started
    scores = [
        score_of(checkpoint, options.out, options.episodes)
        for checkpoint in list_checkpoints(run)[-options.checkpoints :]
    ]
    print("\n| updates | score, mean of best rewards | 95 % over episodes | covered 95 % |\n|---|---|---|---|")
    for score in scores:
        interval = "{:.3f}-{:.3f}".format(*score["interval"]) if score["interval"] else "-"
        covered = f"{score['covered_95']}/{score['episodes']}"
        print(f"| {score['step']} | {score['score']:.3f} | {interval} | {covered} |")
    mean = float(np.mean([score["score"] for score in scores[-AVERAGED:]]))
    verdict = "aim reached" if mean >= AIM else "floor reached" if mean >= FLOOR else "floor NOT reached"
    print(
        f"\nmean of the last {min(AVERAGED, len(scores))} checkpoints: {mean:.3f} (aim {AIM}, floor {FLOOR}: {verdict})"
    )
    print(f"training in this session: {wall_s / 60:.1f} min on {options.threads} threads")
    about = {"date": datetime.date.today().isoformat(), "machine": describe_machine(), "code": code_version()}
    document = {**about, "command": " ".join(["python", *sys.argv]), "wall_s": wall_s, "mean": mean, "scores": scores}
    write_json(options.out / "pusht.json", document)
    return 0


if __name__ == "__main__":
    sys.exit(main())
