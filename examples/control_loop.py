"""A policy in a plain control loop, as on a robot: one observation in, one action out, every control step.

The environment stands for the robot. Needs the extra [sim] and a checkpoint, such as one of train_from_python.py.

    python examples/control_loop.py runs/example/run
"""

import argparse
import contextlib
import time
from pathlib import Path

import numpy as np
import torch

import scd_robot
from scd_robot.seeding import EVALUATION, derive_seed
from scd_robot.sim_eval import make_environment


def main(checkpoint: Path, name: str, episode: int, max_steps: int) -> None:
    torch.set_num_threads(1)  # a batch of one is fastest with one thread
    policy = scd_robot.load_policy(checkpoint)
    with contextlib.closing(make_environment(name)) as robot:
        observation = robot.reset(derive_seed(EVALUATION, episode))
        policy.reset(episodes=[episode])  # forgets the history; the episode's number keys the noise
        executed = None
        for step in range(min(max_steps, robot.spec.max_steps)):
            # A policy works on a batch of rows, here of one robot. It encodes this observation into its history once,
            # and denoises a new chunk of actions when the last one is used up (policy.spec.num_executed of them).
            # executed_action is what the robot really did last time: a limiter may have changed what was asked for.
            started = time.perf_counter()
            batch = {key: value[None] for key, value in observation.items()}
            action = policy.act(batch, executed_action=executed)[0]
            elapsed_ms = 1e3 * (time.perf_counter() - started)

            planned = "  new plan" if policy.drain_timings()["plan_ms"] else ""
            print(f"{step:4d}  {np.array2string(action, precision=3, sign=' ')}  {elapsed_ms:6.2f} ms{planned}")

            # On a robot: wait here for the next tick, robot.spec.control_dt seconds after the last.
            outcome = robot.step(action)
            observation, executed = outcome.observation, outcome.executed_action[None]
            if outcome.success or outcome.terminated or outcome.truncated:
                print("success" if outcome.success else "no success", f"after {step + 1} control steps")
                return
    print(f"no success within {max_steps} control steps")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--environment", default="metaworld/push-v3")
    parser.add_argument("--episode", type=int, default=0)
    parser.add_argument("--max-steps", type=int, default=500)
    options = parser.parse_args()
    main(options.checkpoint, options.environment, options.episode, options.max_steps)
