"""Latency beside the entangled rival: the same tokens, width and number of layers, all of them at every denoising step.

    python benchmarks/rivals.py                     table, and runs/benchmarks/rivals.json
    python benchmarks/rivals.py --rounds 30         quicker, wider spread

As `latency.py`: float32, one thread, batch 1, through the policies with numpy in and out, random weights, windows full.
The rival has its best configuration: clean history tokens, whose keys and values of all layers are cached across
control steps and denoising steps, no context slots, one buffer per plan for the keys (relative to the current control
step, so that noisy tokens need not be rotated) and values of history and noisy tokens. All arms take turns within each
round. The mean per control step is that of a planning tick and 7 idle ticks. Memory is what one robot's history takes:
the cache of keys and values, and its bookkeeping.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import datetime
import sys
from dataclasses import fields
from functools import partial
from typing import Any

import numpy as np
import torch
from job import code_version, describe_machine, result_file
from latency import make_policy, observation, percentiles, ratio_of

from scd_robot.analysis.latency import take_turns
from scd_robot.model import ActionModel
from scd_robot.output import write_json
from scd_robot.presets import metaworld_state

HISTORIES = (16, 64, 256)
STEPS = (4, 8, 16)
ARMS: dict[str, dict[str, Any]] = {
    "separable, prefix": {},
    "separable, concat": {"fusion": "concat"},
    "separable, 4 + 2 layers": {"encoder_layers": 4, "decoder_layers": 2},
    "entangled": {"architecture": "entangled", "context_corruption": 0.0},
}
EXECUTED = 8
AIM_TICK, AIM_GROWTH = 0.2, 1.25


def main() -> None:
    """Measures, prints the table and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100, help="turns of every configuration")
    parser.add_argument("--out", type=result_file, default="runs/benchmarks/rivals.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"load average at the start: {os.getloadavg()[0]:.2f}; torch {torch.__version__}; ms, p50 / p99\n")
    keys = [(history, steps, arm) for history in HISTORIES for steps in STEPS for arm in ARMS]
    policies = {(w, n, arm): make_policy(w, n, **ARMS[arm]) for w, n, arm in keys}
    times = take_turns(policies, partial(observation, np.random.default_rng(0)), arguments.rounds)
    for entry in times.values():
        idle = np.array(entry["idle tick"]).reshape(len(entry["planning tick"]), -1).mean(axis=1)
        entry["control step"] = list((np.array(entry["planning tick"]) + (EXECUTED - 1) * idle) / EXECUTED)
    memory = {(w, arm): _cache_kib(policies[w, STEPS[0], arm].model) for w in HISTORIES for arm in ARMS}
    columns = ("encoder step", "idle tick", "planning tick", "control step")
    names = ("history", "NFE", "arm", *columns, "tick / entangled", "memory [KiB]")
    print("| " + " | ".join(names) + " |\n|" + "---|" * len(names))
    ratios: dict[str, dict[str, float]] = {}
    for w, n, arm in keys:
        ratio = ratio_of(times[w, n, arm]["planning tick"], times[w, n, "entangled"]["planning tick"])
        ratios[f"{w} {n} {arm}"] = ratio
        found = [percentiles(times[w, n, arm][name]) for name in columns]
        cells = [f"{p['p50']:.2f} / {p['p99']:.2f}" for p in found]
        beside = "" if arm == "entangled" else f"{ratio['median']:.2f} ({ratio['p5']:.2f}-{ratio['p95']:.2f})"
        print(f"| {w} | {n} | {arm} | " + " | ".join(cells) + f" | {beside} | {memory[w, arm]:,.0f} |")
    print()
    growth = {arm: ratio_of(times[256, 8, arm]["planning tick"], times[16, 8, arm]["planning tick"]) for arm in ARMS}
    for arm, ratio in growth.items():
        print(
            f"- {arm}: planning tick with a history of 256 over 16, NFE 8: {ratio['median']:.2f} "
            f"({ratio['p5']:.2f}-{ratio['p95']:.2f})"
        )
    for arm in ("separable, prefix", "separable, 4 + 2 layers"):
        tick = ratios[f"64 16 {arm}"]["median"]
        verdict = _judge(tick, AIM_TICK)
        print(f"- {arm}: aim: tick at most {AIM_TICK} of the rival's at history 64, NFE 16: {tick:.2f}, {verdict}")
    slope = growth["separable, prefix"]["median"]
    print(f"- aim: 256 over 16 at most {AIM_GROWTH}: {slope:.2f}, {_judge(slope, AIM_GROWTH)}")
    parameters = {arm: sum(p.numel() for p in policies[64, 8, arm].model.parameters()) for arm in ARMS}
    print("- parameters: " + ", ".join(f"{arm} {count:,}" for arm, count in parameters.items()))
    base = metaworld_state.__name__
    document = {
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", *sys.argv]),
        "code": code_version(),
        "preset": base,
        "machine": describe_machine(),
        "torch": torch.__version__,
        "rounds": arguments.rounds,
        "times": {" ".join(map(str, key)): {k: percentiles(v) for k, v in e.items()} for key, e in times.items()},
        "ratios": ratios,
        "growth": growth,
        "memory_kib": {f"{w} {arm}": value for (w, arm), value in memory.items()},
        "parameters": parameters,
    }
    write_json(arguments.out, document)
    print(f"written: {arguments.out}")


def _cache_kib(model: ActionModel[Any]) -> float:
    """Memory of one robot's history [KiB]."""
    cache = model.new_cache(1)
    return sum(getattr(cache, field.name).nbytes for field in fields(cache)) / 1024


def _judge(value: float, aim: float) -> str:
    return "reached" if value <= aim else "NOT reached"


if __name__ == "__main__":
    main()
