"""CPU time of a training update, by arm of the headline: batch, loss, gradients, optimiser, moving average.

    python benchmarks/updates.py                    table, and runs/benchmarks/updates.json

One thread, float32; all arms take turns within each round, on random demonstrations of the shapes and lengths of real
ones. `headline.py --updates` multiplies these times by the updates that its runs needed, so that no training's time
depends on what the machine did beside it, or on which machine it was.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import datetime
import sys
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from headline import ARMS, CONVERTS, RIVAL
from job import code_version, describe_machine, result_file
from latency import DATASET, percentiles, ratio_of
from scaling import random_demonstrations

from scd_robot.model.convert import parse_layers, separable_config
from scd_robot.normalization import Normalizer, compute_statistics
from scd_robot.output import write_json
from scd_robot.presets import resolve, with_settings
from scd_robot.training import SegmentDataset
from scd_robot.training.module import ScdLightningModule
from scd_robot.training.objective import loss_terms
from scd_robot.training.transformed import transformed
from scd_robot.types import ArraySpec, DatasetSpec

PUSHT = DatasetSpec({"state": ArraySpec((5,)), "keypoint": ArraySpec((9, 2))}, 2, 0.1, "benchmark")
PRESETS = {  # demonstrations, and about how many control steps an episode of them has
    "metaworld_state": (DATASET, 128),
    "memory_state": (DATASET, 145),
    "pusht_state": (PUSHT, 124),
}
EPISODES = 16


def main() -> None:
    """Measures, prints the table and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20, help="updates of every arm, after two that warm up")
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=list(PRESETS))
    parser.add_argument("--out", type=result_file, default="runs/benchmarks/updates.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"load average at the start: {os.getloadavg()[0]:.2f}; torch {torch.__version__}")
    arms = [arm for arm in ARMS if arm != "separable, brief"]
    presets: dict[str, dict[str, dict[str, float]]] = {}
    for preset in options.presets:
        updates = {arm: make_update(preset, arm) for arm in arms}
        times: dict[str, list[float]] = {arm: [] for arm in arms}
        for turn in range(-2, options.rounds):
            for arm, update in updates.items():
                begin = time.process_time()
                update(turn)
                if turn >= 0:
                    times[arm].append(1e3 * (time.process_time() - begin))
        print(f"\n{preset}\n\n| arm | CPU ms of an update, p50 / p95 | / entangled, median (5-95 %) |\n|---|---|---|")
        presets[preset] = {}
        for arm, found in times.items():
            numbers, ratio = percentiles(found), ratio_of(found, times[RIVAL])
            beside = f"{ratio['median']:.2f} ({ratio['p5']:.2f}-{ratio['p95']:.2f})" if arm != RIVAL else ""
            print(f"| {arm} | {numbers['p50']:.0f} / {numbers['p95']:.0f} | {beside} |")
            presets[preset][arm] = {**numbers, **{f"ratio_{name}": value for name, value in ratio.items()}}
    about = {"date": datetime.date.today().isoformat(), "command": " ".join(["python", *sys.argv])}
    about |= {"code": code_version(), "torch": torch.__version__, "machine": describe_machine()}
    write_json(options.out, {**about, "rounds": options.rounds, "update_ms": presets})
    print(f"\nwritten: {options.out}")


def make_update(preset: str, arm: str) -> Callable[[int], None]:
    """One update of an arm, of the batch of this number."""
    spec, length = PRESETS[preset]
    experiment = with_settings(resolve(preset, spec), ARMS[RIVAL if arm == "converted" else arm])
    if arm == "converted":
        encoder, decoder = (parse_layers(layers, experiment.model.depth) for layers in CONVERTS)
        model = separable_config(experiment.model, encoder, decoder, num_context_tokens=1, fusion="prefix")
        experiment = replace(experiment, model=model)
    data = transformed(random_demonstrations(spec, EPISODES, length), experiment.transforms)
    statistics = {key: compute_statistics(data.arrays[key], key) for key in [*data.spec.observation, "action"]}
    module = ScdLightningModule(experiment, Normalizer(statistics, dict.fromkeys(statistics, "min_max")))
    batches = SegmentDataset(data, experiment, np.arange(data.num_episodes))
    optimizer = module.configure_optimizers()["optimizer"]

    def update(number: int) -> None:
        total, count = loss_terms(module.model, module.normalizer, batches[number % len(batches)])
        (total / count).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(module.model.parameters(), experiment.training.gradient_clip or float("inf"))
        optimizer.step()
        optimizer.zero_grad()
        module.ema.update(module.model)

    return update


if __name__ == "__main__":
    main()
