"""Ours beside Diffusion Policy and BC-RNN: the same demonstrations, start states, evaluator, and time for training.

    make rivals                                 their environment (1.7 GB on disk)
    python benchmarks/headline.py --tasks push-v3 --seeds 0 1 2

All arms have about 1.5 million parameters (BC-RNN more: robomimic's own size). Ours is the preset metaworld_state as it
is; the rivals train for MINUTES of one core, the preset's own limit, with a cosine that ends there (BC-RNN: a constant
learning rate, as published). Every arm is read at three points of its training. Diffusion Policy runs with
DDIM, 16 steps of 100, as its paper does on robots.
"""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from common import Job, Recording, benchmark_parser, run_benchmark
from reporting import arms_table, comparison_table, provenance, readings_table, start_state_line

MINUTES = 15
TASKS = ("push-v3", "pick-place-v3", "door-open-v3", "peg-insert-side-v3", "assembly-v3")
OURS = "ours"
_TIME = (f"training.cpu_seconds={60 * MINUTES}", "training.max_steps=1000000", "training.validate_every=200")
_DDIM = ("policy.noise_scheduler_type=DDIM", "policy.num_inference_steps=16")
RIVALS = {
    "dp-cnn": ("outside.diffusion", (*_TIME, "model.network=unet", *_DDIM)),
    "dp-transformer": ("outside.diffusion", (*_TIME, "model.network=transformer", *_DDIM)),
    "bc-rnn": ("outside.bc_rnn", _TIME),
}


def make_jobs(tasks: Sequence[str], seeds: Sequence[int]) -> list[Job]:
    """Every arm on every task, for all seeds; the first seeds first."""
    jobs = []
    for seed in seeds:
        for task in tasks:
            where, common = f"metaworld/{task}", {"seed": seed, "readings": 3}
            jobs.append(Job(_name(task, OURS, seed), Recording(where), where, **common))
            for arm, (module, settings) in RIVALS.items():
                jobs.append(Job(_name(task, arm, seed), Recording(where), where, settings, rival=module, **common))
    return jobs


def _name(task: str, arm: str, seed: int) -> str:
    return f"{task}_{arm}_seed{seed}"


def make_report(results: Mapping[str, dict[str, Any]], tasks: Sequence[str], seeds: Sequence[int]) -> str:
    """Success of every arm, at every reading, and ours against each rival."""
    names = [_name(task, arm, seed) for task in tasks for arm in (OURS, *RIVALS) for seed in seeds]
    pairs = [(_name(t, OURS, s), _name(t, rival, s)) for t in tasks for rival in RIVALS for s in seeds]
    parts = [
        "## Beside others' policies",
        arms_table(results, names),
        readings_table(results, names),
        comparison_table(results, pairs),
        start_state_line(results.values()),
        provenance(results),
    ]
    return "\n\n".join(parts)


if __name__ == "__main__":
    parser = benchmark_parser(__doc__ or "", "headline")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    options = parser.parse_args()
    jobs = make_jobs(options.tasks, options.seeds)
    sys.exit(run_benchmark(options, jobs, lambda results: make_report(results, options.tasks, options.seeds)))
