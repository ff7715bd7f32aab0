"""One design choice at a time around the reference, on assembly and on push with the goal hidden after 5 control steps.

The reference is the preset metaworld_state with the levels in REFERENCE. Its budget is chosen so that it succeeds in 60
to 90 % of the episodes: at 100 % a worse choice would not show. `--pilot` trains it with several budgets to find that.

    python benchmarks/ablations.py --pilot                 # then set BUDGETS
    python benchmarks/ablations.py                         # all arms, one seed
    python benchmarks/ablations.py --seeds 0 1 2 --only assembly_reference_seed0 assembly_fusion-concat_seed0 ...
"""

import sys
from collections.abc import Mapping
from typing import Any

from common import Job, Recording, benchmark_parser, run_benchmark
from reporting import arms_table, comparison_table, provenance, start_state_line, success_counts

ENVIRONMENTS = {"assembly": "metaworld/assembly-v3", "push-hidden": "metaworld/push-v3:goal_steps=5"}
BUDGETS = {"assembly": 400, "push-hidden": 600}  # optimiser steps; --pilot: 83/100 and 80/100 at these
PILOT_BUDGETS = (300, 400, 600, 1000)

# Besides the preset, for all arms: a history that covers the episode, which the hidden goal needs, and the split of
# layers that the first of them had.
COMMON = ("model.history_length=128", "model.encoder_layers=4", "model.decoder_layers=2")

# Factor -> level -> settings. Decoder samples per encoded segment are positions_per_segment x noise_draws; positions
# vary and noise_draws stays 1: another position costs what another draw costs, and has a context of its own.
FACTORS: dict[str, dict[str, tuple[str, ...]]] = {
    "fusion": {"concat": ("model.fusion=concat",), "prefix": ("model.fusion=prefix",)},
    "corruption": {level: (f"model.context_corruption={level}",) for level in ("0", "0.05", "0.1")},
    "past": {
        f"{shown}-predict{predicted}": (f"model.past_action_input={shown}", f"model.num_past_actions={predicted}")
        for predicted in (0, 8)
        for shown in ("none", "noised", "full")  # full and 8: the encoder sees what the decoder is to predict
    },
    "virtual-reset": {level: (f"training.virtual_reset_probability={level}",) for level in ("0", "0.2")},
    "samples": {
        level: (f"training.positions_per_segment={level}", "training.noise_draws=1") for level in ("1", "4", "16")
    },
    "context-tokens": {level: (f"model.num_context_tokens={level}",) for level in ("1", "4")},
    "context-added": {"no": ("model.add_context=false",), "yes": ("model.add_context=true",)},
}
# The levels are pinned here, so that a changed default of the preset cannot move the reference unseen.
REFERENCE = {
    "fusion": "prefix",
    "corruption": "0.05",
    "past": "none-predict0",
    "virtual-reset": "0.2",
    "samples": "16",
    "context-tokens": "1",
    "context-added": "no",
}


def arms() -> dict[str, tuple[str, ...]]:
    """Settings by arm: the reference, then every other level of every factor."""
    levels = {"reference": REFERENCE}
    for factor, choices in FACTORS.items():
        for level in choices:
            if level != REFERENCE[factor]:
                levels[f"{factor}-{level}"] = {**REFERENCE, factor: level}
    return {arm: sum((FACTORS[f][level] for f, level in chosen.items()), COMMON) for arm, chosen in levels.items()}


def make_jobs(seeds: list[int]) -> list[Job]:
    """Every arm in every environment."""
    return [
        _job(environment, _name(environment, arm, seed), BUDGETS[environment], settings, seed)
        for environment in ENVIRONMENTS
        for arm, settings in arms().items()
        for seed in seeds
    ]


def make_pilot_jobs(seeds: list[int]) -> list[Job]:
    """The reference at several budgets; each has a learning-rate schedule of its own length."""
    return [
        _job(environment, _name(environment, f"pilot-{budget}", seed), budget, arms()["reference"], seed)
        for environment in ENVIRONMENTS
        for budget in PILOT_BUDGETS
        for seed in seeds
    ]


def make_report(results: Mapping[str, dict[str, Any]], seeds: list[int]) -> str:
    """Per environment: all arms, and their paired differences to the reference of the same seed."""
    parts = ["## Ablations, one factor at a time"]
    for environment, full_name in ENVIRONMENTS.items():
        names = [_name(environment, arm, seed) for arm in arms() for seed in seeds]
        pairs = [
            (_name(environment, arm, seed), _name(environment, "reference", seed))
            for arm in arms()
            for seed in seeds
            if arm != "reference"
        ]
        parts += [f"### {full_name}", arms_table(results, names), comparison_table(results, pairs)]
        parts += [_seeds_table(results, environment, seeds)] if len(seeds) > 1 else []
    return "\n\n".join([*parts, start_state_line(results.values()), provenance(results)])


def make_pilot_report(results: Mapping[str, dict[str, Any]], seeds: list[int]) -> str:
    """Success of the reference by budget."""
    names = [job.name for job in make_pilot_jobs(seeds)]
    advice = "Set BUDGETS to the budget at which the reference succeeds in 60 to 90 % of the episodes."
    title = "## Pilot: the reference at several budgets"
    return "\n\n".join(
        [title, arms_table(results, names), advice, start_state_line(results.values()), provenance(results)]
    )


def _job(environment: str, name: str, budget: int, settings: tuple[str, ...], seed: int) -> Job:
    full_name = ENVIRONMENTS[environment]
    return Job(name, Recording(full_name), full_name, (f"training.max_steps={budget}", *settings), seed)


def _name(environment: str, arm: str, seed: int) -> str:
    return f"{environment}_{arm}_seed{seed}"


def _seeds_table(results: Mapping[str, dict[str, Any]], environment: str, seeds: list[int]) -> str:
    """Arms with all seeds done. No interval: the seeds share their start states and are few."""
    rows = ["| arm | mean success | each seed |", "|---|---|---|"]
    for arm in arms():
        found = [results.get(_name(environment, arm, seed)) for seed in seeds]
        counts = [success_counts(r) for r in found if r is not None and r["status"] == "done"]
        if len(counts) == len(seeds) and all(valid for _, valid in counts):
            mean = sum(successes / valid for successes, valid in counts) / len(counts)
            each = ", ".join(f"{successes}/{valid}" for successes, valid in counts)
            rows.append(f"| {environment}_{arm} | {100 * mean:.1f} % | {each} |")
    return "\n".join(rows) if len(rows) > 2 else "No arm has all seeds yet."


if __name__ == "__main__":
    parser = benchmark_parser(__doc__ or "", "ablations")
    parser.add_argument("--pilot", action="store_true", help="train the reference alone, with several budgets")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the trainings (default 0)")
    options = parser.parse_args()
    make, report = (make_pilot_jobs, make_pilot_report) if options.pilot else (make_jobs, make_report)
    sys.exit(run_benchmark(options, make(options.seeds), lambda results: report(results, options.seeds)))
