"""From an expert to a success rate with the Python API: record, train, evaluate.

Needs the extra [sim]. About ten minutes on two CPU cores; fewer --max-steps are quicker and worse.

    python examples/train_from_python.py --out runs/example
"""

import argparse
import logging
from pathlib import Path

from scd_robot.datasets import open_dataset
from scd_robot.policies import load_policy
from scd_robot.presets import resolve, with_settings
from scd_robot.recording import record_demonstrations
from scd_robot.sim_eval import evaluate
from scd_robot.training import train


def main(environment: str, out: Path, demonstrations: int, max_steps: int, episodes: int) -> None:
    # Noise on the executed actions takes the expert off its path, so that the data shows how to come back. The labels
    # that the policy learns stay clean.
    store = out / "demonstrations.zarr"
    record_demonstrations(environment, demonstrations, store, seed=0, action_noise=0.1, overwrite=True)

    # A preset resolves to a configuration for this dataset: widths are taken from the data, never typed twice. What the
    # command line writes as --set is a list of the same strings here.
    data = open_dataset(store)
    experiment = with_settings(resolve("metaworld_state", data.spec), [f"training.max_steps={max_steps}"])

    # Every checkpoint is a complete policy, and a run that was killed resumes from its newest one to the same weights.
    begun = any((out / "run" / "checkpoints").glob("step_*"))
    summary = train(data, experiment, out / "run", resume=begun)
    print(f"{summary['parameters']} parameters, {summary['steps']} steps in {summary['seconds']:.0f} s")

    # Episode i starts from a state that is a function of i alone and that no demonstration began with.
    policy = load_policy(summary["checkpoint"])
    result = evaluate(policy, environment, episodes, out=out / "evaluation", overwrite=True)
    low, high = result.interval
    print(f"{result.successes}/{len(result.valid)} successes, 95 % interval {100 * low:.0f} to {100 * high:.0f} %")
    print(f"videos and plots: {out / 'evaluation' / 'report.html'}")


# Simulators run in spawned processes, which import this file again: without the guard each would start all over.
if __name__ == "__main__":
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environment", default="metaworld/push-v3")
    parser.add_argument("--out", type=Path, default=Path("runs/example"))
    parser.add_argument("--demonstrations", type=int, default=100)
    parser.add_argument("--max-steps", type=int, default=2000)
    parser.add_argument("--episodes", type=int, default=50)
    options = parser.parse_args()
    main(options.environment, options.out, options.demonstrations, options.max_steps, options.episodes)
