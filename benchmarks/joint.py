"""Does a frame decoder beside the actions help or hurt the policy? Trained with and without, paired.

    python benchmarks/joint.py --pilot                     # the preset image at several budgets; then set BUDGETS
    python benchmarks/joint.py --seeds 0 1 2

Arms of one task and seed have the same demonstrations, batches, draws of the action loss, first weights of encoder and
action decoder, and start states:

    actions       the preset image
    weight-0      the preset image_frames with frames.loss_weight 0: the tokens of the picture see pictures alone, and
                  that is all that the actions notice of the frame decoder, which learns nothing
    weight-1, weight-10   the same with these weights

What the frames' loss does is a weight beside weight-0; what it takes to have one at all is weight-0 beside actions.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from common import Job, Recording, benchmark_parser, run_benchmark
from reporting import arms_table, comparison_table, provenance, start_state_line, success_counts


@dataclass(frozen=True)
class Task:
    """What is seen, demonstrated and learned.

    Attributes:
        recording: demonstrations; episodes are evaluated in the same environment.
        settings: besides the preset's, for all arms.
    """

    recording: Recording
    settings: tuple[str, ...] = ()


# As image_frames has them; image itself looks at a fast robot in every so many control steps only.
EVERY_STEP = ("model.history_stride=1", "model.history_length=64", "training.batch_size=8")
CUE = "scd_memory/cue-reach:delay=10,cue_visible=1,observation=image"
TASKS = {
    "cue": Task(
        Recording(CUE, 160, action_noise=0.015, disturbances=0.02),
        (
            *EVERY_STEP,
            "policy.num_executed=4",
            "training.segment_length=96",
            "training.virtual_reset_probability=0",
            "training.idle_weight=0.1",
            "training.disturbance_threshold=0.5",
            "training.warmup_steps=50",
        ),
    ),
    "button": Task(Recording("metaworld/button-press-topdown-v3:observation=image,camera=corner4"), EVERY_STEP),
}
BUDGETS = {"cue": 200, "button": 1000}  # optimiser steps; --pilot finds where 60 to 90 % succeed
PILOT_BUDGETS = (100, 200, 300, 500, 1000)
WEIGHTS = ("0", "1", "10")
ARMS: dict[str, tuple[str, tuple[str, ...]]] = {
    "actions": ("image", ()),
    **{f"weight-{w}": ("image_frames", (f"training.frames.loss_weight={w}",)) for w in WEIGHTS},
}
PAIRS = (("weight-0", "actions"), *((f"weight-{w}", "weight-0") for w in WEIGHTS if w != "0"))
TOLD = ("val/loss", "val/chunk_rmse", "val/frame_rmse", "val/repeated_frame_rmse")


def make_jobs(seeds: list[int]) -> list[Job]:
    """Every arm of every task, seed by seed."""
    return [_job(task, arm, seed, BUDGETS[task], _name(task, arm, seed)) for seed in seeds for task, arm in _arms()]


def make_pilot_jobs(seeds: list[int]) -> list[Job]:
    """The preset image at several budgets; each has a learning-rate schedule of its own length."""
    return [
        _job(task, "actions", seed, budget, _name(task, f"pilot-{budget}", seed))
        for task in TASKS
        for budget in PILOT_BUDGETS
        for seed in seeds
    ]


def make_report(results: Mapping[str, dict[str, Any]], seeds: list[int]) -> str:
    """Per task: all arms, held-out errors, and paired differences of the same seed."""
    parts = ["## Frames beside actions"]
    for task in TASKS:
        names = [_name(task, arm, seed) for arm in ARMS for seed in seeds]
        pairs = [(_name(task, arm, seed), _name(task, other, seed)) for arm, other in PAIRS for seed in seeds]
        parts += [f"### {TASKS[task].recording.environment}", arms_table(results, names), _errors(results, names)]
        parts += [comparison_table(results, pairs), _means(results, task, seeds)]
    return "\n\n".join([*parts, start_state_line(results.values()), provenance(results)])


def make_pilot_report(results: Mapping[str, dict[str, Any]], seeds: list[int]) -> str:
    """Success of the preset image by budget."""
    table = arms_table(results, [job.name for job in make_pilot_jobs(seeds)])
    return "\n\n".join(["## Pilot: the preset image at several budgets", table, provenance(results)])


def _arms() -> list[tuple[str, str]]:
    return [(task, arm) for task in TASKS for arm in ARMS]


def _job(task: str, arm: str, seed: int, budget: int, name: str) -> Job:
    preset, settings = ARMS[arm]
    of_all = (f"training.max_steps={budget}", *TASKS[task].settings)
    recording = TASKS[task].recording
    return Job(name, recording, recording.environment, (*of_all, *settings), seed, preset)


def _name(task: str, arm: str, seed: int) -> str:
    return f"{task}_{arm}_seed{seed}"


def _errors(results: Mapping[str, dict[str, Any]], names: list[str]) -> str:
    """What each training said of its held-out episodes at its end."""
    rows = [f"| arm | {' | '.join(TOLD)} |", "|---|" + "---|" * len(TOLD)]
    for name in names:
        if name in results and results[name]["status"] == "done":
            metrics = results[name]["training"]["metrics"]
            cells = (f"{metrics[key]:.4f}" if key in metrics else "-" for key in TOLD)
            rows.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(rows)


def _means(results: Mapping[str, dict[str, Any]], task: str, seeds: list[int]) -> str:
    """Mean differences over the seeds that are done in both arms. No interval: the seeds are few."""
    lines = []
    for arm, other in PAIRS:
        differences = []
        for seed in seeds:
            found = [results.get(_name(task, name, seed)) for name in (arm, other)]
            counts = [success_counts(r) for r in found if r is not None and r["status"] == "done"]
            if len(counts) == 2 and all(valid for _, valid in counts):
                differences.append(counts[0][0] / counts[0][1] - counts[1][0] / counts[1][1])
        if differences:
            each = ", ".join(f"{100 * d:+.1f}" for d in differences)
            mean = 100 * sum(differences) / len(differences)
            lines.append(f"- {task}: {arm} - {other}: {mean:+.1f} % over {len(differences)} seeds ({each})")
    return "\n".join(lines) or f"- {task}: no two arms to compare are done yet"


if __name__ == "__main__":
    parser = benchmark_parser(__doc__ or "", "joint")
    parser.add_argument("--pilot", action="store_true", help="train the preset image alone, with several budgets")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the trainings (default 0 1 2)")
    options = parser.parse_args()
    make, report = (make_pilot_jobs, make_pilot_report) if options.pilot else (make_jobs, make_report)
    sys.exit(run_benchmark(options, make(options.seeds), lambda results: report(results, options.seeds)))
