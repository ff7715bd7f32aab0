"""Success on five Meta-World tasks with the preset metaworld_state as it is.

100 demonstrations of the scripted expert and one training of at most 15 minutes per task, then 100 episodes from start
states that no demonstration used.

    python benchmarks/five_tasks.py
"""

import sys
from collections.abc import Mapping
from typing import Any

from common import Job, Recording, benchmark_parser, run_benchmark
from reporting import arms_table, percent, provenance, start_state_line, success_counts

from scd_robot.sim_eval.metrics import wilson_interval

TASKS = ("push-v3", "pick-place-v3", "door-open-v3", "peg-insert-side-v3", "assembly-v3")
SETTINGS: tuple[str, ...] = ()  # the preset's defaults are what is measured
LIMIT_MIN = 15.0
AIM_MEAN, AIM_EACH = 0.90, 0.75


def make_jobs() -> list[Job]:
    """One job per task."""
    return [Job(task, Recording(f"metaworld/{task}"), f"metaworld/{task}", SETTINGS) for task in TASKS]


def make_report(results: Mapping[str, dict[str, Any]]) -> str:
    """The table, the mean over tasks, and whether it counts."""
    return "\n\n".join(
        [
            "## Meta-World, five tasks",
            arms_table(results, TASKS),
            "\n".join(_verdict(results)),
            start_state_line(results.values()),
            provenance(results),
        ]
    )


def _verdict(results: Mapping[str, dict[str, Any]]) -> list[str]:
    done = {task: results[task] for task in TASKS if task in results and results[task]["status"] == "done"}
    counts = [success_counts(result) for result in done.values()]
    if len(done) < len(TASKS) or not all(valid for _, valid in counts):
        return [f"INCOMPLETE: {len(done)} of {len(TASKS)} tasks are done; no mean over tasks."]
    rates = [successes / valid for successes, valid in counts]
    pooled = wilson_interval(sum(s for s, _ in counts), sum(n for _, n in counts))
    mean = sum(rates) / len(rates)
    lines = [
        f"Mean over tasks {percent(mean, pooled)} (Wilson over all {sum(n for _, n in counts)} episodes), lowest task "
        f"{100 * min(rates):.1f} %. Aim: mean at least {100 * AIM_MEAN:.0f} %, none under {100 * AIM_EACH:.0f} %: "
        f"{'reached' if mean >= AIM_MEAN and min(rates) >= AIM_EACH else 'NOT reached'}."
    ]
    slow = [task for task, result in done.items() if result["training"]["wall_s"] > 60 * LIMIT_MIN]
    if slow:
        lines.append(f"NOT VALID: the training of {', '.join(slow)} took more than {LIMIT_MIN:.0f} minutes.")
    else:
        lines.append(f"Valid: every training took at most {LIMIT_MIN:.0f} minutes.")
    return lines


if __name__ == "__main__":
    parser = benchmark_parser(__doc__ or "", "five_tasks")
    parser.set_defaults(parallel=1, threads=2)  # the limit is for one training on two cores
    sys.exit(run_benchmark(parser.parse_args(), make_jobs(), make_report))
