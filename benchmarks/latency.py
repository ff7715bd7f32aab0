"""Latency of the policy in a control loop: flat in elapsed time, nearly flat in history length.

    python benchmarks/latency.py                    tables, and runs/benchmarks/latency.json
    python benchmarks/latency.py --rounds 50        quicker, wider spread

float32, one thread, batch 1, through `ScdPolicy` with numpy in and out: checks, normalisation and copies are included.
Latency does not depend on the values of the weights, so they are random. All configurations take turns within each
round, so that other load on the machine meets them alike. Times are of the wall clock (time.perf_counter).

- encoder step, plan, planning tick, idle tick: see `scd_robot.analysis.latency`.
- floor: the larger of operations / measured GFLOP/s (a large float32 matrix product) and bytes / measured bandwidth
  (of reading arrays, the best size: weights and cache fit into the processor's caches) that the same computation
  needs at the least, on one thread.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import datetime
import sys
from dataclasses import replace
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from job import describe_machine, result_file

from scd_robot.analysis.latency import take_turns, timed
from scd_robot.diffusion import SamplerConfig
from scd_robot.model import ScdConfig, ScdModel, build_model
from scd_robot.normalization import FieldStatistics, Normalizer
from scd_robot.output import write_json
from scd_robot.policies.registry import policy_class, policy_type
from scd_robot.policies.scd import ScdPolicy, ScdPolicyConfig
from scd_robot.presets import metaworld_state
from scd_robot.types import ArraySpec, DatasetSpec

HISTORIES = (1, 16, 64, 256, 1024)
STEPS = (1, 2, 4, 8, 16)
DATASET = DatasetSpec(
    {"proprio": ArraySpec((4,)), "object": ArraySpec((14,)), "goal": ArraySpec((3,))}, 4, 0.0125, "benchmark"
)


def make_policy(history: int, denoising_steps: int, device: str = "cpu", **model: Any) -> ScdPolicy:
    """The preset metaworld_state with another window and number of denoising steps; `model` replaces more fields."""
    experiment = metaworld_state(DATASET)
    widths = {key: spec.shape[0] for key, spec in DATASET.observation.items()} | {"action": DATASET.action_dim}
    ones = {key: tuple([1.0] * n) for key, n in widths.items()}
    statistics = {
        key: FieldStatistics(tuple([-1.0] * len(v)), v, tuple([0.0] * len(v)), v, tuple([-1.0] * len(v)), v)
        for key, v in ones.items()
    }
    normalizer = Normalizer(statistics, dict.fromkeys(statistics, "min_max"))
    config = ScdPolicyConfig(
        num_executed=experiment.policy.num_executed, sampler=SamplerConfig("euler", denoising_steps)
    )
    architecture = replace(experiment.model, history_length=history, **model)
    kind = policy_class(policy_type(architecture.architecture))
    return cast(ScdPolicy, kind(build_model(architecture), normalizer, DATASET, config, device))


def observation(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """One random observation, batch 1."""
    return {key: rng.standard_normal((1, *spec.shape), np.float32) for key, spec in DATASET.observation.items()}


def elapsed(rounds: int, history: int = 64, late: int = 10_000) -> dict[str, list[float]]:
    """Encoder steps near the start of a stream and after `late` control steps, in turns."""
    rng = np.random.default_rng(1)
    early_policy, late_policy = make_policy(history, 8), make_policy(history, 8)
    for _ in range(late):
        late_policy.observe(observation(rng))
    times: dict[str, list[float]] = {"step 10": [], f"step {late}": []}
    for _ in range(rounds):
        early_policy.reset()
        for name, policy in zip(times, (early_policy, late_policy), strict=True):
            for _ in range(9):  # the same work before both, so that the processor's caches are alike
                policy.observe(observation(rng))
            now = observation(rng)
            times[name].append(timed(lambda now=now, policy=policy: policy.observe(now)))
    return times


def measure_machine(device: str = "cpu") -> dict[str, float]:
    """GFLOP/s of a large float32 product, and GB/s of reading arrays, the best of several sizes; of one CPU thread."""
    on_cpu = torch.device(device).type == "cpu"
    size, counts = (1024, (2**18, 2**20, 2**22, 2**26)) if on_cpu else (8192, (2**26, 2**28))  # 1 MB to 1 GB
    a, b = torch.randn(size, size, device=device), torch.randn(size, size, device=device)
    flops = max(2 * size**3 / timed(lambda: (a @ b)[0, 0].item()) / 1e6 for _ in range(12))
    bandwidth = 0.0
    for count in counts:
        array = torch.zeros(count, device=device)
        times = (timed(lambda array=array: array.sum().item()) for _ in range(20))
        bandwidth = max(bandwidth, *(4 * count / ms / 1e6 for ms in times))
    return {"gflops": flops, "gb_per_s": bandwidth}


def floor_ms(config: ScdConfig, evaluations: int, machine: dict[str, float]) -> dict[str, float]:
    """Least time [ms] of an encoder step and a plan: operations and bytes of weights and cache, nothing else."""
    d, window = config.width, config.history_length
    model = ScdModel(config)
    tokens = model.tokenizer.tokens_per_step
    remembered = tokens - model.encoder.num_readers
    encoder_weights = sum(p.numel() for p in model.encoder.parameters())
    cache = 2 * config.encoder_layers * window * remembered * d
    encoder_ops = 2 * tokens * encoder_weights + 2 * tokens * cache
    decoder_weights = sum(p.numel() for n, p in model.decoder.blocks.named_parameters() if "modulation" not in n)
    length, context = config.chunk_length, config.num_context_tokens
    attention = 4 * config.decoder_layers * length * (length + context) * d
    plan_ops = evaluations * (2 * length * decoder_weights + attention)

    def floor(operations: float, numbers: float) -> float:
        return 1e3 * max(operations / (1e9 * machine["gflops"]), 4 * numbers / (1e9 * machine["gb_per_s"]))

    return {"encoder step": floor(encoder_ops, encoder_weights + cache), "plan": floor(plan_ops, decoder_weights)}


def percentiles(values: list[float]) -> dict[str, float]:
    """p50, p95 and p99."""
    return {f"p{q}": float(np.percentile(values, q)) for q in (50, 95, 99)}


def ratio_of(above: list[float], below: list[float]) -> dict[str, float]:
    """Ratio of medians, and 5 to 95 % of the single rounds'."""
    low, high = np.percentile(np.array(above) / np.array(below), (5, 95))
    return {"median": float(np.median(above) / np.median(below)), "p5": float(low), "p95": float(high)}


def show(
    title: str, column: str, times: dict[int, dict[str, list[float]]], floors: dict[int, dict[str, float]]
) -> None:
    """One Markdown table."""
    names = (column, "encoder step", "plan", "planning tick", "idle tick", "floor of the tick", "tick / floor")
    print(f"\n{title}\n\n| " + " | ".join(names) + " |")
    print("|" + "---|" * 7)
    for key, entry in times.items():
        cells = [" / ".join(f"{v:.2f}" for v in percentiles(values).values()) for values in entry.values()]
        floor = sum(floors[key].values())
        ratio = percentiles(entry["planning tick"])["p50"] / floor
        print(f"| {key} | " + " | ".join(cells) + f" | {floor:.2f} | {ratio:.1f} |")


def ratio_line(what: str, above: list[float], below: list[float]) -> dict[str, float]:
    """Prints and returns the ratio of two arms measured in turns, with its spread over the rounds."""
    ratios = np.array(above) / np.array(below)
    low, high = np.percentile(ratios, (5, 95))
    result = {"p50_over_p50": float(np.median(above) / np.median(below)), "p5": float(low), "p95": float(high)}
    print(f"{what}: {result['p50_over_p50']:.3f} (ratio of medians; single rounds 5-95 %: {low:.2f}-{high:.2f})")
    return result


def main() -> None:
    """Measures, prints the tables and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=300, help="turns of every configuration")
    parser.add_argument("--out", type=result_file, default="runs/benchmarks/latency.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    machine = measure_machine()
    print(f"one thread: {machine['gflops']:.0f} GFLOP/s, {machine['gb_per_s']:.1f} GB/s; torch {torch.__version__}")
    print(f"load average at the start: {os.getloadavg()[0]:.2f}; times in ms, p50 / p95 / p99")

    observe = partial(observation, np.random.default_rng(0))
    by_history = take_turns({w: make_policy(w, 8) for w in HISTORIES}, observe, arguments.rounds)
    base = metaworld_state(DATASET).model
    floors = {w: floor_ms(replace(base, history_length=w), 8, machine) for w in HISTORIES}
    show("History length (control steps per layer), 8 denoising steps", "history", by_history, floors)

    by_steps = take_turns({n: make_policy(64, n) for n in STEPS}, observe, arguments.rounds)
    step_floors = {n: floor_ms(replace(base, history_length=64), n, machine) for n in STEPS}
    show("Denoising steps (NFE), history 64", "NFE", by_steps, step_floors)

    print()
    ticks = {w: by_history[w]["planning tick"] for w in HISTORIES}
    growth = ratio_line("planning tick, history 256 over 16", ticks[256], ticks[16])
    times = elapsed(arguments.rounds)
    drift = ratio_line("encoder step, elapsed 10,000 over 10 control steps", times["step 10000"], times["step 10"])
    slope = 1e3 * (np.median(ticks[1024]) - np.median(ticks[16])) / (1024 - 16)
    floor_slope = 1e3 * (sum(floors[1024].values()) - sum(floors[16].values())) / (1024 - 16)
    print(f"slope in history: {slope:.3f} us per control step; of the floor: {floor_slope:.3f} us")

    write_json(
        arguments.out,
        {
            "date": datetime.date.today().isoformat(),
            "command": " ".join(["python", *sys.argv]),
            "machine": {**machine, **describe_machine()},
            "torch": torch.__version__,
            "rounds": arguments.rounds,
            "history": {w: {k: percentiles(v) for k, v in e.items()} for w, e in by_history.items()},
            "nfe": {n: {k: percentiles(v) for k, v in e.items()} for n, e in by_steps.items()},
            "floors": {"history": floors, "nfe": step_floors},
            "elapsed": {k: percentiles(v) for k, v in times.items()},
            "ratios": {"history_256_over_16": growth, "elapsed_10000_over_10": drift},
            "slope_us": {"measured": slope, "floor": floor_slope},
        },
    )
    print(f"written: {arguments.out}")


if __name__ == "__main__":
    main()
