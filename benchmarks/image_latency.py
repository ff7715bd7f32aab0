"""Latency of the encoder step of a policy that sees: cameras, tokens per picture, history, size of the pictures.

    python benchmarks/image_latency.py                    table, and runs/benchmarks/image_latency.json
    python benchmarks/image_latency.py --rounds 50        quicker, wider spread

float32, one thread, batch 1, through `ScdPolicy.observe` with numpy in and out, as benchmarks/latency.py measures it,
random weights, all configurations in turns. A plan does not depend on any of these: it reads the context. Beside the
wall clock stands the CPU time of the process (time.process_time), which other load on the machine lengthens less.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import datetime
import itertools
import sys
import time
from dataclasses import replace

import numpy as np
import torch
from job import describe_machine, result_file
from latency import percentiles, timed

from scd_robot.model import build_model
from scd_robot.normalization import FieldStatistics, Normalizer
from scd_robot.output import write_json
from scd_robot.policies.scd import ScdPolicy
from scd_robot.presets import image
from scd_robot.types import ArraySpec, DatasetSpec

CAMERAS, TOKENS, HISTORIES = (1, 2, 4), (1, 4, 16), (16, 64, 256)
SIZES = (64, 96, 224)
VECTOR = 7


def make_policy(cameras: int, tokens: int, history: int, size: int) -> ScdPolicy:
    """The preset `image` for so many square pictures and one vector."""
    pictures = {f"camera_{i}": ArraySpec((size, size, 3), "uint8") for i in range(cameras)}
    dataset = DatasetSpec({"proprio": ArraySpec((VECTOR,)), **pictures}, VECTOR, 0.05, "benchmark")
    experiment = image(dataset)
    images = replace(experiment.model.images, tokens_per_image=tokens)
    architecture = replace(experiment.model, history_length=history, images=images)
    low, high, middle = ((value,) * VECTOR for value in (-1.0, 1.0, 0.0))
    statistics = dict.fromkeys(("proprio", "action"), FieldStatistics(low, high, middle, high, low, high))
    normalizer = Normalizer(statistics, dict.fromkeys(statistics, "min_max"))
    return ScdPolicy(build_model(architecture), normalizer, dataset, experiment.policy)


def observation(policy: ScdPolicy, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """One random observation, batch 1."""
    return {
        key: rng.integers(0, 256, (1, *spec.shape), np.uint8)
        if spec.dtype == "uint8"
        else rng.standard_normal((1, *spec.shape), np.float32)
        for key, spec in policy.spec.observation.items()
    }


Times = dict[tuple[int, ...], tuple[list[float], list[float]]]


def take_turns(policies: dict[tuple[int, ...], ScdPolicy], rounds: int) -> Times:
    """Wall and CPU milliseconds of encoder steps in full windows; the first tenth of the rounds is dropped."""
    rng = np.random.default_rng(0)
    seen = {key: observation(policy, rng) for key, policy in policies.items()}
    for key, policy in policies.items():
        for _ in range(policy.spec.history_length):
            policy.observe(seen[key])
    times: Times = {key: ([], []) for key in policies}
    for _ in range(rounds + rounds // 10):
        for key, policy in policies.items():
            started = time.process_time()
            times[key][0].append(timed(lambda key=key, policy=policy: policy.observe(seen[key])))
            times[key][1].append(1e3 * (time.process_time() - started))
    return {key: (wall[rounds // 10 :], cpu[rounds // 10 :]) for key, (wall, cpu) in times.items()}


def main() -> None:
    """Measures, prints the table and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200, help="turns of every configuration")
    parser.add_argument("--out", type=result_file, default="runs/benchmarks/image_latency.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    grid = [
        (cameras, tokens, history, SIZES[0])
        for cameras, tokens, history in itertools.product(CAMERAS, TOKENS, HISTORIES)
    ]
    grid += [(1, TOKENS[0], HISTORIES[0], size) for size in SIZES[1:]]
    load = os.getloadavg()[0]
    times = take_turns({key: make_policy(*key) for key in grid}, arguments.rounds)
    print(f"load average at the start: {load:.2f}; encoder step in ms, p50 / p95 / p99, and p50 of CPU time\n")
    print(
        "| cameras | tokens per picture | history | pixels | tokens in the window | encoder step | CPU |\n|"
        + "---|" * 7
    )
    for (cameras, tokens, history, size), (wall, cpu) in times.items():
        cells = " / ".join(f"{value:.2f}" for value in percentiles(wall).values()) + f" | {np.median(cpu):.2f}"
        window = history * (cameras * tokens + 2)  # and the vector's, and the context's
        print(f"| {cameras} | {tokens} | {history} | {size} x {size} | {window} | {cells} |")
    names = ("cameras", "tokens_per_image", "history", "pixels")
    write_json(
        arguments.out,
        {
            "date": datetime.date.today().isoformat(),
            "command": " ".join(["python", *sys.argv]),
            "machine": {**describe_machine(), "load_1min_at_start": load},
            "torch": torch.__version__,
            "rounds": arguments.rounds,
            "encoder_step_ms": [
                dict(zip(names, key, strict=True)) | {"wall": percentiles(wall), "cpu": percentiles(cpu)}
                for key, (wall, cpu) in times.items()
            ],
        },
    )
    print(f"written: {arguments.out}")


if __name__ == "__main__":
    main()
