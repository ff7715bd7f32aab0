"""The memory suite: one policy per task over mixed delays, beside its twin without history and beside no memory needed.

Every task is recorded with delays of 10, 50 and 200 control steps mixed. Two arms with the same parameters, data and
updates learn from it: `history` attends to the whole episode, its `twin` to the current control step alone. Each is
evaluated at each delay from the same start states. The same again where the cue stays in view and nothing has to be
remembered, evaluated with mixed delays: there the history must not hurt.

    python benchmarks/memory.py --floors     experts, the expert without memory, random actions: minutes
    python benchmarks/memory.py              the trainings: hours
"""

import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
from common import Job, Recording, benchmark_parser, run_benchmark
from reporting import percent, provenance, start_state_line

from scd_robot.seeding import EVALUATION, derive_seed, keyed_rng
from scd_robot.sim_eval import make_environment
from scd_robot.sim_eval.comparison import NON_INFERIORITY_MARGIN, arm_interval, compare, outcomes
from scd_robot.sim_eval.memory import MEMORY_TASKS, TASKS
from scd_robot.sim_eval.metrics import wilson_interval
from scd_robot.types import Environment

DELAYS = (10, 50, 200)
SEEDS = {"cue-reach": (0, 1, 2), "place-back": (0, 1, 2)}  # the others have one
ARMS = {"history": (), "twin": ("model.history_length=1",)}
# What follows the delay in the environment's name, the delays of evaluations, and episodes of each: to exclude 5 points
# of difference takes more of them than a success rate does.
VIEWS = {"hidden": ("", DELAYS, 100), "visible": (",cue_visible=1", ("mixed",), 400)}
# Twice the preset's updates, in both arms: the first has the most phases, the others ask most exactly for what is
# remembered.
SETTINGS = dict.fromkeys(("place-back", "occluded-reach", "hidden-friction"), ("training.max_steps=2000",))
AIM, AIM_DELAY = 0.90, 50
_RANDOM = 77  # keys the random actions

Results = Mapping[str, dict[str, Any]]


def make_jobs() -> list[Job]:
    """Every task with the cue hidden and in view, for both arms and all seeds; first what says most."""
    order = [(0, "hidden"), (0, "visible"), (1, "hidden"), (2, "hidden"), (1, "visible"), (2, "visible")]
    return [
        _job(task, view, arm, seed)
        for seed, view in order
        for task in MEMORY_TASKS
        for arm in ARMS
        if seed in _seeds(task)
    ]


def _seeds(task: str) -> tuple[int, ...]:
    return SEEDS.get(task, (0,))


def _job(task: str, view: str, arm: str, seed: int) -> Job:
    options, delays, episodes = VIEWS[view]
    first, *others = (f"scd_memory/{task}:delay={delay}{options}" for delay in delays)
    disturbances = 0.0 if task == "hidden-friction" else 0.02  # a push that is disturbed cannot be mended
    where = f"scd_memory/{task}:delay=mixed{options}"
    recording = Recording(where, episodes=600, action_noise=0.015, disturbances=disturbances)
    name = _name(task, view, arm, seed)
    settings = (*ARMS[arm], *SETTINGS.get(task, ()))
    return Job(name, recording, first, settings, seed, preset="memory_state", episodes=episodes, also=tuple(others))


def _name(task: str, view: str, arm: str, seed: int) -> str:
    return f"{task}_{view}_{arm}_seed{seed}"


def make_report(results: Results) -> str:
    """Success by task, view, arm and delay; whether history hurts where it is not needed."""
    done = {name: result for name, result in results.items() if result["status"] == "done"}
    failed = [f"- FAILED {name}: {result['error']}" for name, result in results.items() if name not in done]
    return "\n\n".join(
        part
        for part in (
            "## Memory suite",
            *(f"### Cue {view}\n\n{_table(done, view)}" for view in VIEWS),
            "\n".join(_verdicts(done)),
            "\n".join(failed),
            start_state_line(done.values()),
            provenance(done),
        )
        if part
    )


def _table(done: Results, view: str) -> str:
    """Success of both arms of every task in a view."""
    delays = VIEWS[view][1]
    lines = ["| task | arm | seeds | " + " | ".join(f"delay {delay}" for delay in delays) + " |"]
    lines.append("|" + "---|" * (3 + len(delays)))
    for task in MEMORY_TASKS:
        for arm in ARMS:
            found = _results(done, task, view, arm)
            cells = [_cell(found, number) for number in range(len(delays))]
            lines.append(f"| {task} | {arm} | {len(found)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _results(done: Results, task: str, view: str, arm: str) -> list[dict[str, Any]]:
    """What is done of an arm, by seed."""
    names = [_name(task, view, arm, seed) for seed in _seeds(task)]
    return [done[name] for name in names if name in done]


def _documents(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Evaluations at each delay."""
    return [result["evaluation"], *result["also"].values()]


def _cell(results: list[dict[str, Any]], number: int) -> str:
    """Successes of all seeds together, over the start states that are valid in all, with their interval."""
    if not results:
        return "-"
    found = [outcomes(_documents(result)[number]) for result in results]
    indices = sorted(set.intersection(*(set(successes) for successes in found)))
    if not indices:
        return "no valid episode"
    table = np.array([[successes[index] for index in indices] for successes in found], bool)
    return f"{table.sum()}/{table.size}, {percent(float(table.mean()), arm_interval(table))}"


def _verdicts(done: Results) -> list[str]:
    """The aim at a delay of 50, and non-inferiority where nothing is hidden."""
    lines, number = [], DELAYS.index(AIM_DELAY)
    for task in MEMORY_TASKS:
        hidden, wanted = _results(done, task, "hidden", "history"), len(_seeds(task))
        rates = [_documents(result)[number]["success_rate"] for result in hidden]
        if rates and None not in rates:
            verdict = "reached" if np.mean(rates) >= AIM else "NOT reached"
            verdict += f" ({len(hidden)} of {wanted} seeds)" if len(hidden) < wanted else ""
            shown = ", ".join(f"{100 * rate:.0f} %" for rate in rates)
            lines.append(f"- {task}, delay {AIM_DELAY}: {shown} by seed; aim {100 * AIM:.0f} % {verdict}")
        twins = _results(done, task, "hidden", "twin")
        if twins:
            guess = make_environment(f"scd_memory/{task}:delay={AIM_DELAY},expert=memoryless")
            floor = _floor(guess, VIEWS["hidden"][2], random=False)
            lines.append(f"- {task}, delay {AIM_DELAY}: twin {_cell(twins, number)}; an expert that guesses {floor}")
        pair = [_results(done, task, "visible", arm) for arm in ARMS]
        if all(pair) and len(pair[0]) == len(pair[1]):
            lines.append(f"- {task}, cue in view: {_non_inferiority(*pair)}")
    return lines


def _non_inferiority(history: list[dict[str, Any]], twin: list[dict[str, Any]]) -> str:
    """The difference of the arms, all seeds together, and whether history is shown not to hurt."""
    documents = [[result["evaluation"] for result in arm] for arm in (history, twin)]
    comparison = compare(*documents, "history", "twin")
    low, high = (100 * bound for bound in comparison.interval)
    margin = 100 * NON_INFERIORITY_MARGIN
    held = "non-inferior" if low > -margin else "NOT shown to be non-inferior"
    difference = f"{100 * comparison.difference:+.1f} points [{low:+.1f}, {high:+.1f}]"
    seeds = f"{len(history)} seed{'s' if len(history) > 1 else ''}"
    about = ", of these checkpoints" if comparison.about == "checkpoints" else ""
    return f"history - twin {difference}, {seeds}: {held} (margin {margin:g} points{about})"


def floors(episodes: int) -> str:
    """Success of the experts, of the expert without memory, and of random actions."""
    lines = ["| task | delay | expert | expert without memory | random actions |", "|---|---|---|---|---|"]
    for task in TASKS:
        for delay in DELAYS if task in MEMORY_TASKS else (None,):
            options = "" if delay is None else f":delay={delay}"
            other = f"{options},expert=memoryless" if options else ":expert=memoryless"
            cells = [
                _floor(make_environment(f"scd_memory/{task}{options}"), episodes, random=False),
                _floor(make_environment(f"scd_memory/{task}{other}"), episodes, random=False) if options else "-",
                _floor(make_environment(f"scd_memory/{task}{options}"), episodes, random=True),
            ]
            lines.append(f"| {task} | {'-' if delay is None else delay} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _floor(environment: Environment, episodes: int, random: bool) -> str:
    successes = 0
    for episode in range(episodes):
        environment.reset(derive_seed(EVALUATION, episode))
        rng = keyed_rng(_RANDOM, episode)
        while True:
            drawn = rng.uniform(-1, 1, environment.spec.action_dim).astype(np.float32)
            result = environment.step(drawn if random else environment.expert_action())
            if result.success or result.terminated or result.truncated:
                break
        successes += result.success
    environment.close()
    return f"{successes}/{episodes}, {percent(successes / episodes, wilson_interval(successes, episodes))}"


if __name__ == "__main__":
    parser = benchmark_parser(__doc__ or "", "memory")
    parser.add_argument("--floors", action="store_true", help="experts and floors only")
    arguments = parser.parse_args()
    if arguments.floors:
        print(floors(arguments.episodes or 100))
        sys.exit(0)
    sys.exit(run_benchmark(arguments, make_jobs(), make_report))
