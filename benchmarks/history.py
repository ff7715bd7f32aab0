"""History where it matters: the goal is shown in the first 5 control steps only, then it is zeroed.

Two arms with the same parameters, data, updates and start states: `history` attends to the whole episode, its `twin` to
the current control step alone (history_length=1). Both are trained and evaluated with the goal hidden, and, as a
reference for what the task allows, with the goal always in view.

    python benchmarks/history.py
"""

import sys
from collections.abc import Mapping
from typing import Any

from common import Job, Recording, benchmark_parser, run_benchmark
from reporting import arms_table, comparison_table, provenance, start_state_line, success_counts

TASKS = ("push-v3", "pick-place-v3")
GOAL_STEPS = 5
# Of both arms: only the history length may differ between them.
SETTINGS: tuple[str, ...] = ("training.max_steps=2000",)
# Four layers that each see 128 control steps reach 509 steps back: a whole episode of at most 500.
ARMS = {"history": "model.history_length=128", "twin": "model.history_length=1"}
AIM_KEPT = 0.90


def make_jobs(seeds: list[int]) -> list[Job]:
    """Every task with the goal hidden and in view, for both arms and all seeds."""
    jobs = []
    for task in TASKS:
        for view in ("hidden", "full"):
            environment = f"metaworld/{task}" + (f":goal_steps={GOAL_STEPS}" if view == "hidden" else "")
            for arm, setting in ARMS.items():
                for seed in seeds:
                    settings = (*SETTINGS, setting)
                    jobs.append(Job(_name(task, view, arm, seed), Recording(environment), environment, settings, seed))
    return jobs


def make_report(results: Mapping[str, dict[str, Any]], seeds: list[int]) -> str:
    """All arms, the share of full-goal success that is kept, and the paired comparisons."""
    names = [
        _name(task, view, arm, seed) for task in TASKS for view in ("hidden", "full") for arm in ARMS for seed in seeds
    ]
    pairs = []
    for task in TASKS:
        for seed in seeds:
            pairs.append((_name(task, "hidden", "history", seed), _name(task, "hidden", "twin", seed)))
            pairs += [(_name(task, "hidden", arm, seed), _name(task, "full", arm, seed)) for arm in ARMS]
    kept = [_kept_line(results, task, arm, seed) for task in TASKS for arm in ARMS for seed in seeds]
    parameters = {r["training"]["parameters"] for r in results.values() if r["status"] == "done"}
    updates = {r["training"]["steps"] for r in results.values() if r["status"] == "done"}
    control = "the same" if len(parameters) < 2 and len(updates) < 2 else "NOT the same"
    return "\n\n".join(
        [
            f"## Goal shown for {GOAL_STEPS} control steps",
            arms_table(results, names),
            "### Success kept with the goal hidden\n\n" + "\n".join(kept),
            comparison_table(results, pairs),
            f"Parameters {sorted(parameters)} and updates {sorted(updates)} are {control} in all arms.",
            start_state_line(results.values()),
            provenance(results),
        ]
    )


def _name(task: str, view: str, arm: str, seed: int) -> str:
    return f"{task}_{view}_{arm}_seed{seed}"


def _kept_line(results: Mapping[str, dict[str, Any]], task: str, arm: str, seed: int) -> str:
    hidden, full = (results.get(_name(task, view, arm, seed)) for view in ("hidden", "full"))
    label = f"- {task}, {arm}, seed {seed}: "
    if hidden is None or full is None or "failed" in (hidden["status"], full["status"]):
        return label + "not done"
    (hidden_successes, hidden_valid), (full_successes, full_valid) = success_counts(hidden), success_counts(full)
    counts = f"{hidden_successes}/{hidden_valid} hidden, {full_successes}/{full_valid} full"
    if not (full_successes and hidden_valid):
        return label + f"{counts}; no ratio without a success in full view"
    ratio = (hidden_successes / hidden_valid) / (full_successes / full_valid)
    aim = "" if arm != "history" else f" (aim {AIM_KEPT:.2f}: {'reached' if ratio >= AIM_KEPT else 'NOT reached'})"
    return label + f"{counts}, ratio {ratio:.3f}{aim}"


if __name__ == "__main__":
    parser = benchmark_parser(__doc__ or "", "history")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the trainings (default 0)")
    options = parser.parse_args()
    sys.exit(run_benchmark(options, make_jobs(options.seeds), lambda results: make_report(results, options.seeds)))
