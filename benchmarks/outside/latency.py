"""What a plan costs: Diffusion Policy at its published and at our size beside ours, in one process, in turns.

    make rivals
    PYTHONPATH=. .venv-lerobot/bin/python -P benchmarks/outside/latency.py --rounds 30

float32, one thread, batch 1, random weights (latency does not depend on their values), observations of Meta-World. The
rivals run in their best configuration: DDIM, torch.inference_mode. A planning tick is, of a rival,
`DiffusionPolicy.select_action` when its queue of actions is empty, with LeRobot's normalisation before and after; of
ours an encoder step with a full window and a plan, through `ScdPolicy` with numpy in and out. Nothing is sent to
another process. All arms take turns within each round, so that other load on the machine meets them alike; ratios are
of the thread's processor time, which counts only what the arm itself does.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import datetime
import functools
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.append(str(Path(__file__).parents[1]))
from outside import diffusion

from scd_robot.diffusion import SamplerConfig
from scd_robot.model import ScdConfig, build_model
from scd_robot.normalization import FieldStatistics, Normalizer
from scd_robot.output import write_json
from scd_robot.policies.scd import ScdPolicy, ScdPolicyConfig
from scd_robot.sim_eval.provenance import code_version, describe_machine
from scd_robot.types import ArraySpec, DatasetSpec

WIDTHS = {"goal": 3, "object": 14, "proprio": 4}
ACTION_DIM = 4
STEPS = (4, 8, 16)
WARM_UP = 2
OURS = "ours"
RIVALS: dict[str, tuple[str, dict[str, Any]]] = {
    "dp-cnn, our size": ("unet", diffusion.UNET),
    "dp-cnn, published size": ("unet", {}),
    "dp-transformer, our size": ("transformer", diffusion.TRANSFORMER),
    "dp-transformer, published size": ("transformer", {"horizon": 10}),
}

Tick = Callable[[], object]


def rival_tick(network: str, model: dict[str, Any]) -> tuple[Callable[[int], object], int]:
    """A planning tick of a rival, given the number of denoising steps, and its parameters."""
    bounds = {
        diffusion.STATE: WIDTHS["goal"],
        diffusion.REST: WIDTHS["object"] + WIDTHS["proprio"],
        diffusion.ACTION: ACTION_DIM,
    }
    config = {
        "network": network,
        "model": model,
        "widths": WIDTHS,
        "action_dim": ACTION_DIM,
        "statistics": {key: {"min": [-1.0] * width, "max": [1.0] * width} for key, width in bounds.items()},
    }
    policy, before, after = diffusion.build(config, {"noise_scheduler_type": "DDIM"})
    policy.eval()

    @torch.inference_mode()
    def tick(steps: int) -> Any:
        policy.diffusion.num_inference_steps = steps
        now = {key: torch.randn(1, bounds[key]) for key in (diffusion.STATE, diffusion.REST)}
        policy._queues[diffusion.ACTION].clear()
        return after(policy.select_action(before(now))).numpy()

    return tick, sum(p.numel() for p in policy.parameters())


def our_tick(steps: int) -> tuple[Tick, int]:
    """A planning tick of ours, the defaults of the preset metaworld_state, and its parameters."""
    shapes = {key: (width,) for key, width in WIDTHS.items()}
    model = build_model(ScdConfig(observation_shapes=shapes, action_dim=ACTION_DIM))
    ones = {key: (1.0,) * width for key, width in {**WIDTHS, "action": ACTION_DIM}.items()}
    statistics = {}
    for key, one in ones.items():
        minus, zero = tuple(-x for x in one), tuple(0.0 * x for x in one)
        statistics[key] = FieldStatistics(minus, one, zero, one, minus, one)
    spec = DatasetSpec({key: ArraySpec(shape) for key, shape in shapes.items()}, ACTION_DIM, 0.0125, "benchmark")
    config = ScdPolicyConfig(sampler=SamplerConfig("euler", steps))
    policy = ScdPolicy(model, Normalizer(statistics, dict.fromkeys(ones, "min_max")), spec, config)
    rng = np.random.default_rng(0)

    def observe() -> None:
        policy.observe({key: rng.standard_normal((1, *shape), np.float32) for key, shape in shapes.items()})

    for _ in range(policy.spec.history_length):
        observe()

    def tick() -> Any:
        observe()
        return policy.plan()

    return tick, sum(p.numel() for p in model.parameters())


def main() -> None:
    """Measures, prints the table and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30, help="turns of every arm, after the warm-up")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/outside_latency.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(
        f"load average at the start: {os.getloadavg()[0]:.2f}; torch {torch.__version__}; ms, wall p50 / p99, CPU p50"
    )
    ticks: dict[tuple[str, int], Tick] = {}
    parameters: dict[str, int] = {}
    for steps in STEPS:
        ticks[OURS, steps], parameters[OURS] = our_tick(steps)
    for arm, (network, model) in RIVALS.items():
        tick, parameters[arm] = rival_tick(network, model)
        ticks |= {(arm, steps): functools.partial(tick, steps) for steps in STEPS}
    wall: dict[tuple[str, int], list[float]] = {key: [] for key in ticks}
    cpu: dict[tuple[str, int], list[float]] = {key: [] for key in ticks}
    for index in range(options.rounds + WARM_UP):
        for key, tick in ticks.items():
            started = time.perf_counter(), time.thread_time()
            tick()
            if index >= WARM_UP:
                wall[key].append(1e3 * (time.perf_counter() - started[0]))
                cpu[key].append(1e3 * (time.thread_time() - started[1]))
    print("\n| arm | parameters | " + " | ".join(f"NFE {steps} | CPU | / ours" for steps in STEPS) + " |")
    print("|" + "---|" * (2 + 3 * len(STEPS)))
    found = {}
    for arm, count in parameters.items():
        cells = []
        for steps in STEPS:
            p50, p99 = np.percentile(wall[arm, steps], (50, 99))
            own = float(np.median(cpu[arm, steps]))
            ratio = float(np.median(np.array(cpu[arm, steps]) / np.array(cpu[OURS, steps])))
            told = {"p50": float(p50), "p99": float(p99), "cpu_p50": own, "cpu_over_ours": ratio}
            found[f"{arm}, NFE {steps}"] = told
            cells += [f"{p50:.1f} / {p99:.1f}", f"{own:.1f}", f"{ratio:.1f}"]
        print(f"| {arm} | {count:,} | " + " | ".join(cells) + " |")
    document = {
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", *sys.argv]),
        "code": code_version(Path(__file__).parents[2]),
        "machine": describe_machine(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "rounds": options.rounds,
        "parameters": parameters,
        "ms": found,
    }
    write_json(options.out, document)
    print(f"\n/ ours: median over the rounds of the ratio of CPU times within a round\nwritten: {options.out}")


if __name__ == "__main__":
    main()
