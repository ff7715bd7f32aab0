"""Control steps per second of an evaluation, beside bare stepping of the same environments in as many processes.

    python benchmarks/sim.py                                       the seven environments of docs/results.md
    python benchmarks/sim.py --env metaworld/push-v3 --workers 4
    python benchmarks/sim.py --native                              physics of the memory suite by mujoco.rollout

Both arms have the same number of worker processes and take turns within each round. `bare`: each process steps an
environment with random actions in a loop of its own, and nobody looks. `evaluation`: `evaluate` with a policy that
costs next to nothing (the same random actions), its batch of environments divided among the processes; the time in
which that policy acted is taken out and told apart. What is left is the price of lock-step, messages and bookkeeping.

`--native` asks whether MuJoCo's own batched stepping would serve the memory suite: microseconds of one control step of
physics in each of its seven tasks, by calls of `mj_step` as the suite makes them and by `mujoco.rollout`, for one state
and for 16 states on two threads, beside the whole step of the environment.
"""

import argparse
import datetime
import multiprocessing
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from job import code_version, describe_machine, result_file

from scd_robot.output import write_json
from scd_robot.seeding import EVALUATION, derive_seed
from scd_robot.sim_eval import evaluate, make_environment
from scd_robot.types import ActionArray, EnvironmentSpec

ENVIRONMENTS = (
    "gymnasium/FrankaKitchen-v1",
    "metaworld/push-v3",
    "pusht",
    "gymnasium/AdroitHandDoor-v1",
    "scd_memory/place-back",
    "scd_memory/cue-reach",
    "scd_memory/cue-reach:observation=image",
)
AIM = 0.90
BATCH = 16  # states of a batched rollout


def random_actions(spec: EnvironmentSpec) -> ActionArray:
    """Actions (4096, Da), the same in both arms."""
    low, high = spec.action_low, spec.action_high
    return np.random.default_rng(0).uniform(low, high, (4096, len(low))).astype(np.float32)


class RandomActions:
    """A policy that costs next to nothing.

    Attributes:
        seconds: that it took in all calls of `act`.
    """

    def __init__(self, actions: ActionArray) -> None:
        self.seconds = 0.0
        self._actions, self._step = actions, 0

    def reset(self, rows: Any = None, episodes: Any = None) -> None:
        """Nothing to forget."""

    def act(self, observation: Any) -> Any:
        """Random actions (B, Da), drawn beforehand."""
        began = time.perf_counter()
        count = len(next(iter(observation.values())))
        self._step = (self._step + count) % (len(self._actions) - count)
        chosen = self._actions[self._step : self._step + count]
        self.seconds += time.perf_counter() - began
        return chosen


def step_alone(connection: Connection, name: str, steps: int) -> None:
    """A process that steps an environment whenever it is told to, and answers with the seconds it took."""
    environment = make_environment(name)
    actions = random_actions(environment.spec)
    episode = 0
    connection.send("ready")
    while connection.recv():
        environment.reset(derive_seed(EVALUATION, episode))
        started, done = time.perf_counter(), 0
        while done < steps:
            result = environment.step(actions[done % len(actions)])
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


def evaluation_rate(name: str, workers: int, environments: int, steps: int) -> tuple[float, float]:
    """An evaluation of about workers * steps control steps, start of processes apart.

    Returns:
        Control steps per second without the policy's own time, and that time [us] per control step.
    """
    spec = make_environment(name).spec
    policy = RandomActions(random_actions(spec))
    # Whole rounds of the batch: rows that wait for the last ones at the end would be counted against us by chance.
    episodes = environments * max(1, round(workers * steps / spec.max_steps / environments))
    result = evaluate(policy, name, episodes, num_envs=environments, processes=workers, num_videos=0, progress=False)
    done = sum(episode.steps for episode in result.episodes_detail)
    return done / (result.wall_s - policy.seconds), 1e6 * policy.seconds / done


def beside_bare(name: str, workers: int, environments: int, steps: int, rounds: int) -> dict[str, Any]:
    """Measures both arms in turns, and prints a row of the table.

    Returns:
        Medians over the rounds, of `bare` and `evaluation` [control steps/s] and `policy_us`, and each round's `ratio`.
    """
    bare = Bare(name, workers, steps)
    found = np.array([(bare.rate(), *evaluation_rate(name, workers, environments, steps)) for _ in range(rounds)])
    bare.close()
    ratio = found[:, 1] / found[:, 0]
    alone, evaluated, policy_us = np.median(found, axis=0)
    verdict = "" if np.median(ratio) >= AIM else f", aim {AIM} missed"
    print(
        f"| {name} | {alone:,.0f}/s | {evaluated:,.0f}/s | {policy_us:.2f} us | {np.median(ratio):.2f} "
        f"({ratio.min():.2f}-{ratio.max():.2f}){verdict} |",
        flush=True,
    )
    return {"bare": alone, "evaluation": evaluated, "policy_us": policy_us, "ratio": ratio.tolist()}


def native_arms(environment: Any) -> dict[str, Callable[[], Any]]:
    """One control step of physics in different ways, and the environment's whole step."""
    import mujoco
    from mujoco import rollout

    kind, model, data = mujoco.mjtState.mjSTATE_FULLPHYSICS, environment.model, environment.data
    environment.reset(derive_seed(EVALUATION, 0))
    target, action = environment.target, np.zeros(environment.action_dim)
    substeps = round(environment.control_dt / environment.sim_dt)
    start = np.zeros((BATCH, mujoco.mj_stateSize(model, kind)))
    mujoco.mj_getState(model, data, start[0], kind)
    start[:] = start[0]
    controls, models = np.tile(target, (BATCH, substeps, 1)), [model] * BATCH
    one, two = rollout.Rollout(nthread=0), rollout.Rollout(nthread=2)
    scratch = [mujoco.MjData(model) for _ in range(2)]

    def by_steps() -> None:
        for _ in range(substeps):
            data.ctrl[:] = target
            mujoco.mj_step(model, data)

    def by_rollout() -> None:
        mujoco.mj_getState(model, data, start[0], kind)
        state, _ = one.rollout(model, data, start[:1], controls[:1])
        mujoco.mj_setState(model, data, state[0, -1], kind)

    def batched() -> None:
        two.rollout(models, scratch, start, controls)

    def whole() -> None:
        if environment.steps >= environment.spec.max_steps - 1:
            environment.reset(derive_seed(EVALUATION, 0))
        environment.step(action)

    return {"mj_step": by_steps, "rollout": by_rollout, "batched": batched, "step": whole}


def native_stepping(rounds: int) -> dict[str, dict[str, float]]:
    """Prints microseconds per control step and state, arms taking turns; medians over the rounds."""
    from scd_robot.sim_eval.memory import TASKS

    print(
        f"| task | mj_step | mujoco.rollout | rollout, {BATCH} states, 2 threads | whole step |\n|---|---|---|---|---|"
    )
    results = {}
    for name in TASKS:
        arms = native_arms(make_environment(f"scd_memory/{name}"))
        times: dict[str, list[float]] = {arm: [] for arm in arms}
        for _ in range(rounds):
            for arm, call in arms.items():
                began = time.perf_counter()
                for _ in range(100):
                    call()
                times[arm].append((time.perf_counter() - began) * 1e4 / (BATCH if arm == "batched" else 1))
        results[name] = {arm: float(np.median(values)) for arm, values in times.items()}
        print(f"| {name} | " + " | ".join(f"{value:.1f}" for value in results[name].values()) + " |", flush=True)
    return results


def main() -> None:
    """Measures, prints the table and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", nargs="+", default=list(ENVIRONMENTS))
    parser.add_argument("--workers", type=int, default=2, help="processes of either arm (default %(default)s)")
    parser.add_argument("--num-envs", type=int, default=16, help="environments of the evaluation (default %(default)s)")
    parser.add_argument("--steps", type=int, default=2000, help="control steps of each worker in a round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=result_file, default="runs/benchmarks/sim.json")
    parser.add_argument("--native", action="store_true", help="measure mujoco.rollout instead")
    options = parser.parse_args()
    about = {"date": datetime.date.today().isoformat(), "machine": describe_machine(), "code": code_version()}
    if options.native:
        out = options.out.with_name("sim_native.json")
        write_json(out, {**about, "rounds": options.rounds, "microseconds": native_stepping(options.rounds)})
        print(f"\nwritten: {out}")
        return
    results = {}
    where = f"{options.workers} processes, batch {options.num_envs}"
    print(f"| environment ({where}) | bare | evaluation | policy, per step | ratio (rounds, min-max) |")
    print("|---|---|---|---|---|")
    for name in options.env:
        results[name] = beside_bare(name, options.workers, options.num_envs, options.steps, options.rounds)
    write_json(
        options.out,
        {**about, "workers": options.workers, "num_envs": options.num_envs, "rounds": options.rounds, **results},
    )
    print(f"\nwritten: {options.out}")


if __name__ == "__main__":
    main()
