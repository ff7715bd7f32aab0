"""Control steps per second of an evaluation, beside bare stepping of the same environments in as many processes.

    python benchmarks/sim.py                                       Meta-World, PushT and the memory suite
    python benchmarks/sim.py --env metaworld/push-v3 --workers 4

Both arms have the same number of worker processes and take turns within each round. `bare`: each process steps its
environment with random actions in a loop of its own, and nobody looks. `evaluation`: `evaluate` with a policy that
costs nothing (the same random actions). What is left is the price of lock-step, messages and bookkeeping.
"""

import argparse
import datetime
import multiprocessing
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from job import code_version, describe_machine

from scd_robot.output import write_json
from scd_robot.seeding import EVALUATION, derive_seed
from scd_robot.sim_eval import evaluate, make_environment

ENVIRONMENTS = ("metaworld/push-v3", "pusht", "scd_memory/cue-reach", "scd_memory/place-back")
AIM = 0.90


class RandomActions:
    """A policy that costs nothing."""

    def __init__(self, low: tuple[float, ...], high: tuple[float, ...]) -> None:
        self._actions = np.random.default_rng(0).uniform(low, high, (4096, len(low))).astype(np.float32)
        self._step = 0

    def reset(self, rows: Any = None, episodes: Any = None) -> None:
        """Nothing to forget."""

    def act(self, observation: Any) -> Any:
        """Random actions, drawn beforehand."""
        count = len(next(iter(observation.values())))
        self._step = (self._step + count) % (len(self._actions) - count)
        return self._actions[self._step : self._step + count]


def step_alone(connection: Connection, name: str, steps: int) -> None:
    """A process that steps an environment whenever it is told to, and answers with the seconds it took."""
    environment = make_environment(name)
    policy = RandomActions(environment.spec.action_low, environment.spec.action_high)
    episode = 0
    connection.send("ready")
    while connection.recv():
        environment.reset(derive_seed(EVALUATION, episode))
        started, done = time.perf_counter(), 0
        while done < steps:
            result = environment.step(policy.act({"": np.zeros(1)})[0])
            done += 1
            if result.success or result.terminated or result.truncated:
                episode += 1
                environment.reset(derive_seed(EVALUATION, episode))
        connection.send(time.perf_counter() - started)


class Bare:
    """Processes that step by themselves."""

    def __init__(self, name: str, workers: int, steps: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipes, self._steps = [], steps
        for _ in range(workers):
            ours, theirs = context.Pipe()
            context.Process(target=step_alone, args=(theirs, name, steps), daemon=True).start()
            theirs.close()  # so that one that dies ends the pipe
            self._pipes.append(ours)
        for pipe in self._pipes:
            pipe.recv()

    def rate(self) -> float:
        """Control steps per second of all together."""
        for pipe in self._pipes:
            pipe.send(True)
        return len(self._pipes) * self._steps / max(pipe.recv() for pipe in self._pipes)

    def close(self) -> None:
        """Ends them."""
        for pipe in self._pipes:
            pipe.send(False)


def evaluation_rate(name: str, workers: int, steps: int) -> float:
    """Control steps per second of an evaluation of about workers * steps control steps, start of processes apart."""
    spec = make_environment(name).spec
    policy = RandomActions(spec.action_low, spec.action_high)
    episodes = max(workers, round(workers * steps / spec.max_steps))
    result = evaluate(policy, name, episodes, num_envs=workers, num_videos=0, progress=False)
    return sum(episode.steps for episode in result.episodes_detail) / result.wall_s


def main() -> None:
    """Measures, prints the table and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", nargs="+", default=list(ENVIRONMENTS))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=2000, help="control steps of each worker in a round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/sim.json"))
    options = parser.parse_args()
    results = {}
    print(f"| environment ({options.workers} workers) | bare steps/s | evaluation steps/s | ratio (rounds, min-max) |")
    print("|---|---|---|---|")
    for name in options.env:
        bare = Bare(name, options.workers, options.steps)
        rates = np.array(
            [(bare.rate(), evaluation_rate(name, options.workers, options.steps)) for _ in range(options.rounds)]
        )
        bare.close()
        ratio = rates[:, 1] / rates[:, 0]
        alone, evaluated = np.median(rates, axis=0)
        verdict = "" if np.median(ratio) >= AIM else f", aim {AIM} missed"
        print(
            f"| {name} | {alone:,.0f} | {evaluated:,.0f} | {np.median(ratio):.2f} "
            f"({ratio.min():.2f}-{ratio.max():.2f}){verdict} |",
            flush=True,
        )
        results[name] = {"bare": alone, "evaluation": evaluated, "ratio": ratio.tolist()}
    about = {"date": datetime.date.today().isoformat(), "machine": describe_machine(), "code": code_version()}
    write_json(options.out, {**about, "workers": options.workers, "rounds": options.rounds, **results})
    print(f"\nwritten: {options.out}")


if __name__ == "__main__":
    main()
