"""Few denoising steps: success against the number of decoder calls per plan (NFE), for every objective.

The teacher learns by flow matching. Each few-step objective learns from scratch with as many updates, and by
distillation: it begins with the teacher's weights, of which the decoder alone goes on learning for a third of the
updates. All are evaluated from the same start states with 1, 2, 4, 8 and 16 denoising steps (MIP: 1 and 2), and
compared with the teacher's 16. Aim: with 1 or 2, not inferior.

    python benchmarks/few_steps.py                        # both tasks, all arms: about two hours of one core
    python benchmarks/few_steps.py --tasks push-v3
"""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from common import Job, Recording, benchmark_parser, run_benchmark
from reporting import arms_table, percent, provenance, start_state_line

from scd_robot.sim_eval.comparison import NON_INFERIORITY_MARGIN, compare

TASKS = ("push-v3", "assembly-v3")
STEPS = (1, 2, 4, 8, 16)
OBJECTIVES = {"mean_flow": STEPS, "mip": (1, 2), "shortcut": STEPS}
UPDATES = (1500, 500)  # from scratch, and distilled
SETTINGS = {"scratch": (), "distilled": ("training.trained=decoder", "training.warmup_steps=20")}
TEACHER = "flow_matching"

Results = Mapping[str, dict[str, Any]]


def make_jobs(tasks: Sequence[str], updates: Sequence[int] = UPDATES, seed: int = 0) -> list[Job]:
    """Of every task the teacher, then what is distilled from it, then what learns from scratch."""
    jobs = []
    for task in tasks:
        where, teacher = f"metaworld/{task}", f"{task}_{TEACHER}"
        common: dict[str, Any] = {"recording": Recording(where), "environment": where, "seed": seed}
        scratch, distilled = (f"training.max_steps={number}" for number in updates)
        jobs.append(Job(teacher, settings=(scratch,), denoising_steps=STEPS, **common))
        for way, begins, budget in (("distilled", teacher, distilled), ("scratch", "", scratch)):
            for objective, steps in OBJECTIVES.items():
                settings = (f"training.objective={objective}", budget, *SETTINGS[way])
                name = f"{task}_{objective}-{way}"
                jobs.append(Job(name, settings=settings, begins_from=begins, denoising_steps=steps, **common))
    return jobs


def make_report(results: Results, tasks: Sequence[str]) -> str:
    """Per task: success by arm and NFE, the differences to the teacher with 16, and what training took."""
    parts = ["## Few denoising steps"]
    for task in tasks:
        jobs = [job for job in make_jobs(tasks) if job.name.startswith(f"{task}_")]
        done = {j.name: results[j.name] for j in jobs if j.name in results and results[j.name]["status"] == "done"}
        parts += [f"### {task}", _curve(done), _differences(done, f"{task}_{TEACHER}")]
        parts += [arms_table(results, [job.name for job in jobs])]
    return "\n\n".join([*parts, start_state_line(results.values()), provenance(results)])


def _curve(done: Results) -> str:
    """Successes by arm and number of denoising steps."""
    lines = ["| arm | " + " | ".join(f"NFE {steps}" for steps in STEPS) + " |", "|" + "---|" * (1 + len(STEPS))]
    for name, result in done.items():
        found = result["by_denoising_steps"]
        cells = [_cell(found[str(steps)]) if str(steps) in found else "-" for steps in STEPS]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(evaluation: Mapping[str, Any]) -> str:
    valid = evaluation["episodes"] - evaluation["invalid"]
    if not valid:
        return "no valid episode"
    return f"{evaluation['successes']}/{valid}, {percent(evaluation['success_rate'], evaluation['interval'])}"


def _differences(done: Results, teacher: str) -> str:
    """Every arm with 1 and 2 denoising steps against the teacher with the most."""
    if teacher not in done:
        return "The teacher is not done yet."
    reference = done[teacher]["by_denoising_steps"][str(STEPS[-1])]
    margin = 100 * NON_INFERIORITY_MARGIN
    lines = [
        f"| arm, NFE | minus {teacher} with {STEPS[-1]}, paired Newcombe 95 % | non-inferior by {margin:g} points |",
        "|---|---|---|",
    ]
    for name, result in done.items():
        for steps in STEPS[:2]:
            label = f"{name}, {steps}"
            comparison = compare([result["by_denoising_steps"][str(steps)]], [reference], label, teacher)
            low, high = (100 * bound for bound in comparison.interval)
            shown = "shown" if low > -margin else "NOT shown"
            lines.append(f"| {label} | {100 * comparison.difference:+.1f} % [{low:+.1f}, {high:+.1f}] | {shown} |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = benchmark_parser(__doc__ or "", "few_steps")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="default: all")
    parser.add_argument(
        "--updates", type=int, nargs=2, metavar=("SCRATCH", "DISTILLED"), default=UPDATES, help="default %(default)s"
    )
    options = parser.parse_args()
    sys.exit(
        run_benchmark(
            options, make_jobs(options.tasks, options.updates), lambda results: make_report(results, options.tasks)
        )
    )
