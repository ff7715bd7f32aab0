"""The headline: separable beside the entangled rival, Diffusion Policy and BC-RNN, on the same data and start states.

Every arm has one run per seed. Its checkpoints are evaluated along the way, so that the arms can be read at equal
updates (the last checkpoint) and at equal CPU time (the last checkpoint that cost no more than all of the separable
model's training). The entangled rival's learning rate and NFE are chosen with as many trials as ours: `--tune`;
those of the policies from outside are not tuned (`make rivals`). They have about 1.5 million parameters (BC-RNN more:
robomimic's own size) and train for MINUTES of one core, with a cosine that ends there (BC-RNN: a constant learning
rate, as published); Diffusion Policy runs with DDIM, 16 steps of 100, as its paper does on robots.

    python benchmarks/headline.py --tune                        which learning rate and NFE suit each architecture
    python benchmarks/headline.py --pusht pusht_cchi_v7_replay.zarr
    python benchmarks/updates.py                                time of an update; the report uses its last run
    python benchmarks/rivals.py                                 latency; the report quotes its last run

Training time is a run's updates times the CPU time of one, which `updates.py` measures for all arms in turns: what a
run itself took depends on what the machine did beside it. Policies from outside are timed by their own run.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from common import Given, Job, Recording, benchmark_parser, run_benchmark
from job import read_json
from reporting import percent, provenance, start_state_line

from scd_robot.sim_eval.comparison import NON_INFERIORITY_MARGIN, arm_interval, compare, outcomes

Results = Mapping[str, dict[str, Any]]


@dataclass(frozen=True)
class Task:
    """Demonstrations, where to evaluate, the budget, and how many training seeds.

    The budget leaves the arms apart: with the presets' own nearly all succeed always.
    """

    recording: Recording | Given
    environment: str
    updates: int
    seeds: tuple[int, ...] = (0,)
    preset: str = "metaworld_state"
    settings: tuple[str, ...] = ()


THREE = (0, 1, 2)
_HIDDEN = "metaworld/push-v3:goal_steps=5"
_CUE, _COUNT = "scd_memory/cue-reach:delay=mixed", "scd_memory/count-press:delay=mixed"
TASKS = {
    "assembly": Task(Recording("metaworld/assembly-v3"), "metaworld/assembly-v3", 1000, THREE),
    "push-hidden": Task(Recording(_HIDDEN), _HIDDEN, 1000, THREE),
    "pick-place": Task(Recording("metaworld/pick-place-v3"), "metaworld/pick-place-v3", 1000),
    "peg-insert": Task(Recording("metaworld/peg-insert-side-v3"), "metaworld/peg-insert-side-v3", 1000),
    "door-open": Task(Recording("metaworld/door-open-v3"), "metaworld/door-open-v3", 1000),
    "cue-reach": Task(
        Recording(_CUE, 600, action_noise=0.015, disturbances=0.02), "scd_memory/cue-reach:delay=50", 1000,
        preset="memory_state",
    ),
    "count-press": Task(
        Recording(_COUNT, 600, action_noise=0.015, disturbances=0.02), "scd_memory/count-press:delay=50", 1000,
        preset="memory_state",
    ),
}  # fmt: skip
PUSHT = "pusht:observation=keypoints,starts=benchmark"

MINUTES = 15
_TIME = (f"training.cpu_seconds={60 * MINUTES}", "training.max_steps=1000000", "training.validate_every=200")
_DDIM = ("policy.noise_scheduler_type=DDIM", "policy.num_inference_steps=16")
OUTSIDE: dict[str, tuple[str, tuple[str, ...]]] = {
    "Diffusion Policy, CNN": ("outside.diffusion", (*_TIME, "model.network=unet", *_DDIM)),
    "Diffusion Policy, transformer": ("outside.diffusion", (*_TIME, "model.network=transformer", *_DDIM)),
    "BC-RNN": ("outside.bc_rnn", _TIME),
}
_ENTANGLED = ("model.architecture=entangled", "model.context_corruption=0")
ARMS: dict[str, tuple[str, ...]] = {
    "separable": (),
    "separable concat": ("model.fusion=concat",),
    "separable 4:2": ("model.encoder_layers=4", "model.decoder_layers=2"),
    "entangled": _ENTANGLED,
    "history-1 twin": ("model.history_length=1",),
    "separable, brief": (),
    "converted": (),
}
# A brief training has this share of the updates, which is at most 15 % of the entangled model's computing. `converted`
# begins with the entangled model's layers, `separable, brief` from scratch.
BRIEF = ("separable, brief", "converted")
SHARE = 0.3
CONVERTS = ("0:5", "first:2,last:1")
OURS, RIVAL = "separable", "entangled"
LEARNING_RATES = ("2.5e-4", "5e-4", "1e-3", "2e-3")  # of the trials; the preset has 1e-3
NFE = (4, 8, 16)  # of the trials; the preset has 8
TUNED_ON = {"assembly": 400, "push-hidden": 600}  # updates at which the presets leave room for better
READINGS = 5
_TICKS = ("planning tick", "idle tick", "control step")  # p50 / p99 [ms]
AIM_TIME, AIM_OF_FINAL = 0.6, 0.9


def make_tasks(pusht: Path | None) -> dict[str, Task]:
    """All tasks; PushT where its recording is at hand."""
    if pusht is None:
        return TASKS
    human = Given(str(pusht.resolve()), ("state", "keypoint"), control_dt=0.1)
    return {**TASKS, "pusht": Task(human, PUSHT, 4000, THREE, preset="pusht_state")}


def make_jobs(tasks: Mapping[str, Task]) -> list[Job]:
    """Every arm of every task, the first seeds first."""
    return [
        _job(name, task, arm, seed)
        for seed in THREE
        for name, task in tasks.items()
        for arm in (*ARMS, *(OUTSIDE if isinstance(task.recording, Recording) else ()))
        if seed in task.seeds
    ]


def make_trials() -> list[Job]:
    """Both architectures with every learning rate, at a budget that tells them apart."""
    trials = []
    for name, updates in TUNED_ON.items():
        for arm in (OURS, RIVAL):
            for rate in LEARNING_RATES:
                job = _job(name, replace(TASKS[name], updates=updates), arm, 0)
                settings = (*job.settings, f"training.learning_rate={rate}")
                trials.append(
                    replace(job, name=_trial_name(name, arm, rate), settings=settings, readings=1, denoising_steps=NFE)
                )
    return trials


def _job(name: str, task: Task, arm: str, seed: int) -> Job:
    where = (_name(name, arm, seed), task.recording, task.environment)
    if arm in OUTSIDE:
        module, settings = OUTSIDE[arm]
        return Job(*where, settings, seed, rival=module, readings=READINGS)
    updates, readings = (round(SHARE * task.updates), 1) if arm in BRIEF else (task.updates, READINGS)
    budget = (f"training.max_steps={updates}", f"training.validate_every={updates // readings}")
    warmup = (f"training.warmup_steps={updates // 10}",) if arm in BRIEF else ()
    settings = (*task.settings, *budget, *warmup, *ARMS[arm])
    job = Job(*where, settings, seed, preset=task.preset, readings=readings)
    if arm == "converted":
        return replace(job, begins_from=_name(name, RIVAL, seed), converts=CONVERTS)
    return job


def _name(task: str, arm: str, seed: int) -> str:
    return f"{task}_{arm.replace(', ', '-').replace(' ', '-').replace(':', '+')}_seed{seed}"


def _trial_name(task: str, arm: str, rate: str) -> str:
    return f"tune_{task}_{arm}_{rate}"


# ---------------------------------------------------------------------------------------------------------- reports


def make_report(results: Results, tasks: Mapping[str, Task], updates: Path, latency: Path) -> str:
    """A table per task, the aims, the latency."""
    done = {name: result for name, result in results.items() if result["status"] == "done"}
    failed = [f"- FAILED {name}: {result['error']}" for name, result in results.items() if name not in done]
    times = read_json(updates) if updates.is_file() else None
    told = f"Training times are missing: python benchmarks/updates.py writes {updates}."
    if times:
        about = f"{times['date']}, code {times['code']}, {times['machine']['cpu']}"
        told = f"CPU time of an update: {times['command']}, {about}."
    parts = ["## Separable and entangled, side by side", told]
    for name, task in tasks.items():
        if any(_results(done, name, task, arm) for arm in (*ARMS, *OUTSIDE)):
            update_ms = times["update_ms"].get(task.preset, {}) if times else {}
            seconds = {arm: found["p50"] / 1e3 for arm, found in update_ms.items()}
            seconds |= {"separable, brief": seconds[OURS]} if seconds else {}
            parts += [f"### {task.environment}, {task.updates} updates", _table(done, name, task, seconds)]
            parts += ["\n".join(_verdicts(done, name, task, seconds))]
    parts += [_latency(latency), "\n".join(failed), start_state_line(done.values()), provenance(done)]
    return "\n\n".join(part for part in parts if part)


def make_tuning_report(results: Results) -> str:
    """Success by architecture, learning rate and NFE."""
    lines = [
        "## Learning rates; successes with NFE 4, 8, 16",
        "",
        "| task | arm | " + " | ".join(LEARNING_RATES) + " |",
    ]
    lines.append("|" + "---|" * (2 + len(LEARNING_RATES)))
    totals = {(arm, rate, steps): 0 for arm in (OURS, RIVAL) for rate in LEARNING_RATES for steps in NFE}
    for task, updates in TUNED_ON.items():
        for arm in (OURS, RIVAL):
            cells = []
            for rate in LEARNING_RATES:
                result = results.get(_trial_name(task, arm, rate))
                if result is None or result["status"] != "done":
                    cells.append("-")
                    continue
                counts = [result["by_denoising_steps"][str(steps)] for steps in NFE]
                cells.append(", ".join(f"{one['successes']}/{one['episodes'] - one['invalid']}" for one in counts))
                for steps, one in zip(NFE, counts, strict=True):
                    totals[arm, rate, steps] += one["successes"]
            lines.append(f"| {task}, {updates} updates | {arm} | " + " | ".join(cells) + " |")
    for arm in (OURS, RIVAL):
        _, rate, steps = max((key for key in totals if key[0] == arm), key=lambda key: totals[key])
        lines.append(f"\n- {arm}: most successes with {rate} and NFE {steps}")
    return "\n".join([*lines, "", provenance(results)])


def _results(done: Results, name: str, task: Task, arm: str) -> list[dict[str, Any]]:
    """What is done of an arm, by seed."""
    names = [_name(name, arm, seed) for seed in task.seeds]
    return [done[one] for one in names if one in done]


def _table(done: Results, name: str, task: Task, update_s: Mapping[str, float]) -> str:
    """One row per arm that was run; `update_s` is the CPU time of an update, by arm."""
    head = (
        "arm", "seeds", "successes", "score", "success, 95 %", "beside the entangled, 95 %", "parameters",
        "training, CPU s", f"CPU s to {100 * AIM_OF_FINAL:.0f} % of the entangled's success",
        "success at the separable's CPU time",
    )  # fmt: skip
    rows = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    rival = _results(done, name, task, RIVAL)
    equal = task.updates * update_s[OURS] if OURS in update_s else None
    for arm in (*ARMS, *OUTSIDE):
        found = _results(done, name, task, arm)
        if not found:
            continue
        successes = [outcomes(result["evaluation"]) for result in found]
        indices = sorted(set.intersection(*(set(one) for one in successes)))
        table = np.array([[one[index] for index in indices] for one in successes], bool)
        scores = [result["evaluation"]["best_reward"] for result in found]
        points = [_points(result, arm, update_s) for result in found]
        cells = (
            arm,
            str(len(found)),
            ", ".join(f"{one.sum()}/{one.size}" for one in table),
            f"{np.mean(scores):.3f}" if name == "pusht" and None not in scores else "-",
            percent(float(table.mean()), arm_interval(table)),
            "-" if arm == RIVAL else _difference(found, rival),
            f"{found[0]['training']['parameters']:,}",
            f"{np.mean([one[-1][0] for one in points]):.0f}" if all(points) else "-",
            _mean([_time_to(one, _target(rival)) for one in points], "{:.0f}") if all(points) and rival else "-",
            _mean([_success_at(one, equal) for one in points], "{:.1%}") if all(points) and equal else "-",
        )
        rows.append("| " + " | ".join(cells) + " |")
    missing = [arm for arm in (*ARMS, *OUTSIDE) if not _results(done, name, task, arm)]
    return "\n".join([*rows, *(["", f"Not run: {', '.join(missing)}."] if missing else [])])


def _difference(arm: Sequence[dict[str, Any]], rival: Sequence[dict[str, Any]]) -> str:
    """Difference of success over seeds and start states, and whether it shows that the arm is not worse."""
    if len(arm) != len(rival):
        return "-"
    found = compare([r["evaluation"] for r in arm], [r["evaluation"] for r in rival], "arm", "rival")
    low, high = (100 * bound for bound in found.interval)
    held = "non-inferior" if low > -100 * NON_INFERIORITY_MARGIN else "not shown to be non-inferior"
    return f"{100 * found.difference:+.1f} [{low:+.1f}, {high:+.1f}], {held}"


def _mean(values: Sequence[float | None], form: str) -> str:
    """Mean over seeds, or how many of them have no value."""
    known = [value for value in values if value is not None]
    if not known:
        return "never"
    missing = f" ({len(values) - len(known)} of {len(values)} never)" if len(known) < len(values) else ""
    return form.format(float(np.mean(known))) + missing


def _points(result: Mapping[str, Any], arm: str, update_s: Mapping[str, float]) -> list[tuple[float, float]]:
    """CPU time [s] and success of every evaluated checkpoint, oldest first; empty where the time is unknown."""
    training = result["training"]
    own = training["cpu_s"] / training["steps"] if arm in OUTSIDE and training["cpu_s"] else None
    one = own if arm in OUTSIDE else update_s.get(arm)
    if one is None:
        return []
    points = [(reading["updates"], reading["evaluation"]["success_rate"]) for reading in result["readings"]]
    points.append((training["steps"], result["evaluation"]["success_rate"]))
    return [(one * step, rate) for step, rate in points if rate is not None]


def _target(rival: Sequence[dict[str, Any]]) -> float | None:
    """The success that all arms are timed to: a share of the rival's final one over its seeds; None without any."""
    rates = [r["evaluation"]["success_rate"] for r in rival if r["evaluation"]["success_rate"] is not None]
    return AIM_OF_FINAL * float(np.mean(rates)) if any(rates) else None


def _time_to(points: Sequence[tuple[float, float]], target: float | None) -> float | None:
    """CPU time [s] of the first checkpoint that reaches a success rate; None if none does."""
    return next((time for time, rate in points if target is not None and rate >= target), None)


def _success_at(points: Sequence[tuple[float, float]], cpu_s: float | None) -> float | None:
    """Success of the last checkpoint that cost at most so much CPU time (1 % more counts as equal)."""
    known = [rate for time, rate in points if cpu_s is not None and time <= 1.01 * cpu_s]
    return known[-1] if known else None


def _verdicts(done: Results, name: str, task: Task, update_s: Mapping[str, float]) -> list[str]:
    """The aims of a task."""
    ours, rival = (_results(done, name, task, arm) for arm in (OURS, RIVAL))
    if not ours or len(ours) != len(rival):
        return []
    lines = [f"- {OURS} beside the {RIVAL}, {len(ours)} of {len(task.seeds)} seeds: {_difference(ours, rival)}"]
    target = _target(rival)
    if not update_s:
        return lines
    arms = ((OURS, ours), (RIVAL, rival))
    times = [[_time_to(_points(result, arm, update_s), target) for result in found] for arm, found in arms]
    known = [[time for time in arm if time is not None] for arm in times]
    if target is None or any(len(some) < len(arm) for some, arm in zip(known, times, strict=True)):
        return [*lines, "- training time to equal success: an arm never reached it"]
    ratio = float(np.mean(known[0]) / np.mean(known[1]))
    verdict = "reached" if ratio <= AIM_TIME else "NOT reached"
    lines.append(f"- CPU time to {target:.1%} success: {ratio:.2f} of the rival's; aim {AIM_TIME}: {verdict}")
    return lines


def _latency(path: Path) -> str:
    """The aims of the last latency run."""
    if not path.is_file():
        return f"Latency has not been measured: python benchmarks/rivals.py writes {path}."
    measured = read_json(path)
    lines = [f"### Latency ({measured['command']}, {measured['date']}, code {measured['code']})", ""]
    head = ("history, NFE, arm", *_TICKS, "planning tick / entangled's, median (5-95 %)", "memory of a history [KiB]")
    lines += ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for key, times in measured["times"].items():
        history, _, arm = key.split(" ", 2)
        cells = [f"{times[name]['p50']:.2f} / {times[name]['p99']:.2f}" for name in _TICKS]
        ratio = measured["ratios"][key]
        beside = "" if arm == RIVAL else f"{ratio['median']:.2f} ({ratio['p5']:.2f}-{ratio['p95']:.2f})"
        memory = measured["memory_kib"][f"{history} {arm}"]
        lines.append(f"| {key} | " + " | ".join(cells) + f" | {beside} | {memory:,.0f} |")
    for arm, ratio in measured["growth"].items():
        lines.append(f"\n- {arm}: planning tick with a history of 256 over 16: {ratio['median']:.2f}")
    return "\n".join(lines)


def main() -> int:
    """The command line."""
    parser = benchmark_parser(__doc__ or "", "headline")
    parser.add_argument("--pusht", type=Path, help="diffusion_policy's recording; without it PushT is left out")
    parser.add_argument("--tune", action="store_true", help="the trials of learning rates instead")
    parser.add_argument("--updates", type=Path, default=Path("runs/benchmarks/updates.json"), help="of updates.py")
    parser.add_argument("--latency", type=Path, default=Path("runs/benchmarks/rivals.json"), help="of rivals.py")
    options: argparse.Namespace = parser.parse_args()
    if options.tune:
        return run_benchmark(options, make_trials(), make_tuning_report)
    tasks = make_tasks(options.pusht)
    report = partial(make_report, tasks=tasks, updates=options.updates, latency=options.latency)
    return run_benchmark(options, make_jobs(tasks), report)


if __name__ == "__main__":
    sys.exit(main())
