"""Success and jerk where plans take long: six ways to carry out chunks, against the time that a plan takes.

Each episode runs through the control loop in virtual time: observations are new in every control step, the simulator
goes on while a plan is made, and the plan is there so many ms after it was asked for (0 ms: at once). All arms of a
task run the same checkpoint, which was trained with committed prefixes (`max_delay_steps`), from the same start states,
and ask for a plan after the same number of actions, which is no less than the delay.

In the two tasks that do not wait chance pushes the ball, and a chunk that is drawn holds the answers to pushes that
are drawn with it. Their policies act with two denoising steps, which is nearly the mean of all that may come
(`--nfe`). That of tray-balance also acts itself after its training, with plans that take 0 to 8 control steps, and
learns from what the expert would have done (DAgger), round by round: in demonstrations the actions that are executed
while a plan is made are also a sign of what the expert saw meanwhile, and a model takes them for it.

    synchronous       stands still while a plan is made
    naive             goes on with the running chunk, and jumps to the new one when it is there
    ensemble          plans as often as it can, and takes the mean of all chunks
    guided            real-time chunking without training, arXiv 2506.07339
    guided_identity   the same without the network's Jacobian
    trained           real-time chunking as it was trained for, arXiv 2512.05964

    python benchmarks/delay.py                                  trains and measures everything: hours
    python benchmarks/delay.py --only push-v3 --arms trained    one task, one arm
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import logging
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from common import Job, Recording, benchmark_parser, run_benchmark
from job import code_version, describe_machine, read_json
from reporting import PairedCounts, arms_table, pair, percent, provenance, start_state_line, success_counts

from scd_robot.checkpoint import list_checkpoints, read_step
from scd_robot.control import ControlLoop, DelayConfig, ExecutionConfig, LoopConfig, RecorderConfig, VirtualClock
from scd_robot.control.executor import Strategy
from scd_robot.control.planner import VirtualPlanner
from scd_robot.datasets import open_dataset
from scd_robot.datasets.combine import mix_datasets
from scd_robot.errors import ConfigError
from scd_robot.output import write_json
from scd_robot.presets import resolve, with_settings
from scd_robot.recording import record_demonstrations
from scd_robot.seeding import EVALUATION, derive_seed
from scd_robot.sim_eval import make_environment
from scd_robot.sim_eval.metrics import wilson_interval
from scd_robot.sim_eval.motion import motion_quality
from scd_robot.sim_eval.simulated_robot import limits_of
from scd_robot.sim_eval.virtual_robot import VirtualRobot
from scd_robot.training import train
from scd_robot.types import Environment

DELAYS_MS = (0, 25, 50, 100, 200)
ARMS: dict[str, Strategy] = {
    "synchronous": "synchronous",
    "naive": "receding",
    "ensemble": "ensemble",
    "guided": "guided",
    "guided_identity": "guided_identity",
    "trained": "prefix",
}
AIM_LOSS = 0.05  # of success, the trained arm at the longest delay
_EARLY_S = 1e-6  # so that a plan is there in the control step in which it is due, whatever the clock's rounding
# The two that do not wait: what noise does to a hand is not to be learned as a plan, so there is little of it; they are
# pushed away instead, and no chunk reaches over a push but one in the actions that it was committed to.
DYNAMIC = (
    "training.max_steps=1800",
    "model.history_length=32",
    "training.disturbance_threshold=0.5",
    "model.chunk_length=24",
    "model.max_delay_steps=8",
)
ATTEMPTS, MAX_DELAY_STEPS = 200, 8  # of a round of corrections
# A chunk ends behind an action that was this far from its label: what follows answers the policy's error.
CORRECTING = ("training.max_steps=1000", "training.disturbance_threshold=0.2")


@dataclass(frozen=True)
class Task:
    """What is learned, and how commands stand still.

    Attributes:
        recording: of the environment that it is about.
        settings: of the training.
        num_executed: actions between plans, as long as the delay is no longer.
        rounds: of corrections that follow the training.
        num_denoising_steps: of plans; None = as trained.
        rest: see `Limits`; None = all commands are increments.
    """

    recording: Recording
    settings: tuple[str, ...]
    num_executed: int
    rounds: int = 0
    num_denoising_steps: int | None = None
    rest: tuple[float | None, ...] | None = None

    @property
    def environment(self) -> str:
        """Its name."""
        return self.recording.environment


TASKS = {
    "moving-target": Task(
        Recording("scd_memory/moving-target", 400, 0, 0.015, 0.02), DYNAMIC, 4, 0, 2, (None, None, None)
    ),
    "tray-balance": Task(Recording("scd_memory/tray-balance", 400, 0, 0.05, 0.02), DYNAMIC, 4, 4, 2, (None, None)),
    "push-v3": Task(
        Recording("metaworld/push-v3"),
        ("training.max_steps=2000", "model.chunk_length=40", "model.max_delay_steps=16"),
        num_executed=8,
        rest=(0.0, 0.0, 0.0, None),  # the gripper's effort stays
    ),
}

Results = Mapping[str, dict[str, Any]]


def make_jobs() -> list[Job]:
    """A training per task, evaluated without any delay as well."""
    return [
        Job(name, task.recording, task.environment, (*task.settings, f"policy.num_executed={task.num_executed}"))
        for name, task in TASKS.items()
    ]


class PinnedPolicy:
    """A policy whose noise is that of one episode, whatever was run before."""

    def __init__(self, policy: Any, episode: int) -> None:
        self._policy, self._episode = policy, episode

    def reset(self) -> None:
        """Begins the episode."""
        self._policy.reset(episodes=[self._episode])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._policy, name)


def run_episode(
    policy: Any, environment: Environment, task: Task, strategy: Strategy, delay_ms: float, index: int
) -> dict[str, Any]:
    """One episode through the control loop in virtual time."""
    delay_s, spec = 1e-3 * delay_ms, environment.spec
    clock = VirtualClock()
    robot = VirtualRobot(environment, derive_seed(EVALUATION, index), clock)
    delay_steps = max(1, int(np.ceil(delay_s / spec.control_dt - 1e-9)))
    gain = min(ExecutionConfig.max_gain, policy.config.sampler.num_denoising_steps)  # which no more may be used
    delay = DelayConfig(warm_up=0, initial=delay_steps)
    execution = ExecutionConfig(strategy, task.num_executed, gain, delay=delay)
    config = LoopConfig(execution=execution, recorder=RecorderConfig(seconds=1.0))
    pinned = PinnedPolicy(policy, index)
    planner = VirtualPlanner(pinned, clock, lambda: max(0.0, delay_s - _EARLY_S))
    loop = ControlLoop(robot, pinned, limits_of(spec, rest=task.rest), config, clock=clock, planner=planner)
    report = loop.run(until=lambda: robot.finished)
    return {
        "index": index,
        "success": robot.success,
        "invalid": False,
        "initial_state_hash": robot.initial_state_hash,
        "steps": len(robot.actions),
        "jerk": motion_quality(robot.actions, (), robot.hand, spec.control_dt)["jerk"],
        "plans": report.plans,
        "delay_steps": report.delay_steps,
        "faults": report.faults,
    }


def corrected(out: Path, job: Job, rounds: int) -> Path:
    """The job's run after so many rounds of corrections, of which those that are done are not repeated."""
    import torch

    from scd_robot.policies import load_policy

    torch.set_num_threads(1)
    assert isinstance(job.recording, Recording)
    run, parts = out / "work" / job.name / "run", [open_dataset(out / "recordings" / f"{job.recording.name}.zarr")]
    for count in range(1, rounds + 1):
        folder = out / "corrections" / f"{job.name}_{count}"
        store, summary, following = folder / "recording.zarr", folder / "recording.json", folder / "run"
        if not summary.is_file():  # without it a store is the rest of a recording that was killed
            acting = {"policy": load_policy(run), "max_delay_steps": MAX_DELAY_STEPS}
            found = record_demonstrations(job.environment, ATTEMPTS, store, seed=count, overwrite=True, **acting)
            write_json(summary, found)
        parts.append(open_dataset(store))
        data = mix_datasets(parts, [count, *[1] * count], [str(number) for number in range(count + 1)])
        settings = [*job.settings, *CORRECTING, f"training.seed={count}"]
        experiment = with_settings(resolve(job.preset, data.spec), settings)
        done = list_checkpoints(following)
        if not done or read_step(done[-1]) < experiment.training.max_steps:
            begins = {"resume": True} if done else {"init": run, "init_statistics": "checkpoint"}
            train(data, experiment, following, accelerator="cpu", **begins)
        run = following
    return run


def measure(
    out: Path,
    results: Results,
    arms: Sequence[str],
    delays_ms: Sequence[int],
    episodes: int,
    rounds: int | None = None,
    nfe: int | None = None,
) -> None:
    """Runs what is not measured yet of the tasks that are trained; OUT/delays/TASK_ARM_MSms.json holds a cell each.

    Args:
        out: folder of the benchmark.
        results: of the trainings.
        arms: by name.
        delays_ms: of a plan.
        episodes: of a cell.
        rounds: of corrections; None = the task's.
        nfe: denoising steps of a plan; None = the task's.
    """
    from scd_robot.policies import load_policy

    for name, result in results.items():
        if result["status"] != "done":
            continue
        task = TASKS[name]
        count, steps = task.rounds if rounds is None else rounds, nfe or task.num_denoising_steps
        policy = load_policy(corrected(out, Job.from_json(result["job"]), count), num_denoising_steps=steps)
        about = {
            "corrections": _corrections(out, name, count),
            "num_denoising_steps": policy.config.sampler.num_denoising_steps,
        }
        environment = make_environment(task.environment)
        for arm in arms:
            for delay_ms in delays_ms:
                path = _cell_path(out, name, arm, delay_ms)
                known = _known_episodes(path, about)
                started = time.monotonic()
                with without_warnings("scd_robot.control"):  # a late plan is what is looked for
                    found = [
                        run_episode(policy, environment, task, ARMS[arm], delay_ms, index)
                        for index in range(len(known), episodes)
                    ]
                if not found:
                    continue
                cell = {
                    **{key: result[key] for key in ("schema", "versions", "training")},
                    "name": path.stem,
                    "status": "done",
                    **about,
                    "evaluation": {"env": task.environment, "episodes_detail": [*known, *found]},
                    "machine": describe_machine(),
                    "code": code_version(),
                    "command": " ".join(["python", *sys.argv]),
                    "date": time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()),
                }
                write_json(path, cell)
                minutes = (time.monotonic() - started) / 60
                successes, valid = success_counts(cell)
                print(f"{path.stem}: {successes}/{valid} successes, {minutes:.1f} min", flush=True)


@contextmanager
def without_warnings(name: str) -> Iterator[None]:
    """A logger and those below it tell errors only."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _corrections(out: Path, task: str, rounds: int) -> list[dict[str, Any]]:
    """What the recordings of each round told."""
    numbers = range(1, rounds + 1)
    return [read_json(out / "corrections" / f"{task}_{count}" / "recording.json") for count in numbers]


def _known_episodes(path: Path, about: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Those of a cell that was measured in part, of the same policy."""
    if not path.is_file():
        return []
    cell = read_json(path)
    for name, value in about.items():
        if cell.get(name) != value:
            raise ConfigError(f"{path} is of other {name}; choose another --out")
    return list(cell["evaluation"]["episodes_detail"])


def _cell_path(out: Path, task: str, arm: str, delay_ms: int) -> Path:
    return out / "delays" / f"{task}_{arm}_{delay_ms}ms.json"


def make_report(out: Path, results: Results) -> str:
    """Per task: success and jerk by arm and delay, and what the delay costs each arm."""
    cells = {
        (name, arm, delay): read_json(path)
        for name in TASKS
        for arm in ARMS
        for delay in DELAYS_MS
        if (path := _cell_path(out, name, arm, delay)).is_file()
    }
    parts = ["## Plans that take long", arms_table(results, list(TASKS))]
    for name in TASKS:
        parts += [
            f"### {name}",
            *_told_of_policy(cells, name),
            _table(cells, name, _success),
            "Jerk, root mean square over an episode, mean over episodes, in the hand's unit / s^3:",
            _table(cells, name, _jerk),
            "Success less that of the same arm at 0 ms, in points, paired Newcombe 95 %:",
            _table(cells, name, lambda cell, first: "" if cell is first else _points(pair(cell, first))),
            _verdict(cells, name),
        ]
    named = {cell["name"]: cell for cell in cells.values()}
    return "\n\n".join([*parts, start_state_line(named.values()), provenance(named)])


def _told_of_policy(cells: Mapping[tuple[str, str, int], Any], name: str) -> list[str]:
    steps = {cell.get("num_denoising_steps") for (task, *_), cell in cells.items() if task == name} - {None}
    rounds = next((cell.get("corrections", []) for (task, *_), cell in cells.items() if task == name), [])
    return [f"Denoising steps: {', '.join(map(str, sorted(steps)))}"] * bool(steps) + [
        f"Corrections, round {count}: {found['episodes']} attempts of the policy, {found['steps']} control steps, "
        f"{found['successes']} successes"
        for count, found in enumerate(rounds, 1)
    ]


def _table(cells: Mapping[tuple[str, str, int], Any], name: str, show: Any) -> str:
    """One row per arm, one column per delay; `show(cell, the arm's cell at 0 ms)`."""
    lines = ["| arm | " + " | ".join(f"{delay} ms" for delay in DELAYS_MS) + " |", "|" + "---|" * (1 + len(DELAYS_MS))]
    for arm in ARMS:
        first = cells.get((name, arm, DELAYS_MS[0]))
        row = [cells.get((name, arm, delay)) for delay in DELAYS_MS]
        texts = ["-" if cell is None or first is None else show(cell, first) for cell in row]
        lines.append(f"| {arm} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


def _success(cell: Mapping[str, Any], first: Mapping[str, Any]) -> str:
    successes, valid = success_counts(cell)
    return f"{successes}/{valid}, {percent(successes / valid, wilson_interval(successes, valid))}"


def _jerk(cell: Mapping[str, Any], first: Mapping[str, Any]) -> str:
    known = [episode["jerk"] for episode in cell["evaluation"]["episodes_detail"] if episode["jerk"] is not None]
    return f"{np.mean(known):.1f}" if known else "-"


def _points(counts: PairedCounts) -> str:
    low, high = (100 * bound for bound in counts.interval)
    return f"{100 * counts.difference:+.1f} [{low:+.1f}, {high:+.1f}]"


def _verdict(cells: Mapping[tuple[str, str, int], Any], name: str) -> str:
    """Whether the trained arm keeps its success at the longest delay."""
    ends = [cells.get((name, "trained", delay)) for delay in (DELAYS_MS[0], DELAYS_MS[-1])]
    if None in ends:
        return f"The trained arm at {DELAYS_MS[-1]} ms is not measured yet."
    counts = pair(ends[1], ends[0])
    verdict = "reached" if counts.difference >= -AIM_LOSS else "NOT reached"
    return f"- trained, {DELAYS_MS[-1]} ms: {_points(counts)} points; aim at most -{100 * AIM_LOSS:.0f}: {verdict}"


def main() -> int:
    """The command line."""
    parser = benchmark_parser(__doc__ or "", "delay")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="measure these only")
    parser.add_argument("--cell-episodes", type=int, default=100, help="per arm and delay (default %(default)s)")
    parser.add_argument("--rounds", type=int, help="of corrections (default: 4 for tray-balance, 0 for the others)")
    parser.add_argument("--nfe", type=int, help="denoising steps (default: 2 where chance pushes, else as trained)")
    parser.add_argument("--delays", nargs="+", type=int, choices=DELAYS_MS, default=list(DELAYS_MS), metavar="MS")
    options: argparse.Namespace = parser.parse_args()

    def finish(results: Results) -> str:
        if not options.report:
            wanted = {name: result for name, result in results.items() if not options.only or name in options.only}
            cells = options.arms, options.delays, options.cell_episodes
            measure(options.out, wanted, *cells, options.rounds, options.nfe)
        return make_report(options.out, results)

    return run_benchmark(options, make_jobs(), finish)


if __name__ == "__main__":
    sys.exit(main())
