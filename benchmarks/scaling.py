"""A cost model of the policy, checked at two sizes: operations, memory, training, bytes of data.

    python benchmarks/scaling.py                    docs/scaling.md quotes its tables

The model is a handful of formulas in width D, layers, history W, tokens per control step P, chunk length Ta and so on
(`predict`). Beside each of its numbers stands what is counted: operations by torch's FlopCounterMode around the real
encoder step, denoising step and training update; bytes by adding up the tensors of weights and cache, and the files of
a recording. Counting takes no idle machine: nothing here is timed, but the last table, which divides the operations of
an update by its time.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import datetime
import statistics
import sys
from dataclasses import fields, replace
from typing import Any

import numpy as np
import torch
from job import code_version, describe_machine, result_file
from latency import DATASET, measure_machine
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from scd_robot.analysis.latency import timed
from scd_robot.datasets import EpisodeDataset
from scd_robot.model import ScdConfig, ScdModel
from scd_robot.normalization import Normalizer, compute_statistics
from scd_robot.output import write_json
from scd_robot.presets import metaworld_state
from scd_robot.training import ExperimentConfig, SegmentDataset, loss_terms
from scd_robot.types import DatasetSpec

SIZES: dict[str, dict[str, Any]] = {
    "preset": {},
    "four times the width, twice the layers": {
        "width": 512,
        "num_heads": 8,
        "encoder_layers": 8,
        "decoder_layers": 4,
    },
}
EPISODES, LENGTH = 8, 128  # of the random demonstrations


def predict(config: ScdConfig, batch: int, segment: int, samples: int) -> dict[str, float]:
    """The cost model; multiplications and additions count as two operations, norms and the like as none.

    Args:
        config: architecture.
        batch: segments of an update.
        segment: control steps of a segment.
        samples: decoder samples of a segment.
    """
    d, window, length = config.width, config.history_length, config.chunk_length
    widths = sum(shape[0] for shape in config.observation_shapes.values())
    tokens = 1  # of a control step: joint vectors
    slots = config.num_context_tokens  # which only read
    layer = (4 + 2 * config.mlp_ratio) * d * d  # weights of attention and perceptron
    seen = 2 * (window * tokens + slots) * d  # weighed and added up by each token
    encoder = 2 * (tokens + slots) * config.encoder_layers * (layer + seen) + 2 * widths * d
    unread = layer - 3 * d * d  # of the history the last layer makes queries, keys and values only
    encoder -= 2 * tokens * (unread + seen)
    past = config.num_past_actions
    decoded, context = length, config.num_context_tokens
    read = 2 * config.decoder_layers * (layer + (decoded + context) * 2 * d) * decoded
    step = read + 4 * decoded * config.action_dim * d
    # A training update: every control step once through the encoder, and the slots of those that are sampled; every
    # sample once through the decoder, and twice as much for the gradients. Attention of a segment: the whole square,
    # masked; modulation depends on flow time.
    modulation = 2 * (6 * config.decoder_layers + 2 + 2) * d * d + 2 * d * 256
    learned = past + decoded
    sample = 2 * config.decoder_layers * (layer + (learned + context) * 2 * d) * learned + modulation
    sample += 4 * learned * config.action_dim * d
    prefix = 2 * config.decoder_layers * context * (layer + 2 * context * d) + 2 * context * d * d
    encoded = segment * tokens + samples * slots
    forward = batch * encoded * 2 * config.encoder_layers * (layer + 2 * encoded * d)
    forward -= batch * segment * tokens * 2 * (unread + 2 * encoded * d)
    forward += batch * (segment * 2 * widths * d + samples * (sample + prefix))
    weights = config.encoder_layers * layer + config.decoder_layers * (layer + 6 * d * d)
    return {
        "encoder step [MFLOP]": encoder / 1e6,
        "denoising step [MFLOP]": step / 1e6,
        "update [GFLOP]": 3 * forward / 1e9,
        "weights [MB]": 4 * weights / 1e6,
        "history of one robot [MB]": 8 * config.encoder_layers * window * tokens * d / 1e6,
    }


def count(experiment: ExperimentConfig, data: EpisodeDataset) -> tuple[dict[str, float], float]:
    """The same numbers of the real model, and milliseconds of an update's loss and gradients (median of three)."""
    config = experiment.model
    model = ScdModel(config).eval()
    seen = {key: torch.randn(1, *shape) for key, shape in config.observation_shapes.items()}
    cache = model.new_cache(1)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):  # operations of the fused kernel are not counted
        with FlopCounterMode(display=False) as encoder:
            context = model.encode_step(seen, cache)
        prepared = model.decoder.prepare(context)
        conditioning = model.decoder.condition(torch.zeros(1, 1))
        x = torch.randn(1, config.chunk_length, config.action_dim)
        with FlopCounterMode(display=False) as step:
            model.decoder.velocity(x, conditioning, prepared)
    keys = [*config.observation_shapes, "action"]
    table = {key: compute_statistics(data.arrays[key], key) for key in keys}
    normalizer = Normalizer(table, dict.fromkeys(keys, "min_max"))
    batch = SegmentDataset(data, experiment, np.arange(data.num_episodes))[0]
    model.train()

    def update() -> None:
        total, tokens = loss_terms(model, normalizer, batch)
        (total / tokens).backward()  # type: ignore[no-untyped-call]

    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as training:
        update()
    ms = statistics.median(timed(update) for _ in range(3))
    cached = sum(getattr(cache, field.name).nbytes for field in fields(cache))
    return {
        "encoder step [MFLOP]": encoder.get_total_flops() / 1e6,
        "denoising step [MFLOP]": step.get_total_flops() / 1e6,
        "update [GFLOP]": training.get_total_flops() / 1e9,
        "weights [MB]": sum(p.numel() for p in model.parameters()) * 4 / 1e6,
        "history of one robot [MB]": cached / 1e6,
    }, ms


def random_demonstrations(
    spec: DatasetSpec = DATASET, episodes: int = EPISODES, length: int = LENGTH
) -> EpisodeDataset:
    """Numbers of the shapes of `spec`."""
    rng, rows = np.random.default_rng(0), episodes * length
    arrays = {key: rng.standard_normal((rows, *of.shape), np.float32) for key, of in spec.observation.items()}
    arrays["action"] = rng.uniform(-1, 1, (rows, spec.action_dim)).astype(np.float32)
    return EpisodeDataset(spec, np.arange(length, rows + 1, length), arrays)


def main() -> None:
    """Counts, prints the tables and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=result_file, default="runs/benchmarks/scaling.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    data, machine = random_demonstrations(), measure_machine()
    document: dict[str, Any] = {"sizes": {}}
    print("| size | | predicted | counted | counted / predicted |\n|---|---|---|---|---|")
    for name, changes in SIZES.items():
        base = metaworld_state(DATASET)
        experiment = replace(base, model=replace(base.model, **changes))
        training = experiment.training
        segment = min(training.segment_length, LENGTH)
        predicted = predict(experiment.model, training.batch_size, segment, training.positions_per_segment)
        counted, ms = count(experiment, data)
        for what, value in predicted.items():
            print(f"| {name} | {what} | {value:.3g} | {counted[what]:.3g} | {counted[what] / value:.2f} |")
        rate = counted["update [GFLOP]"] / (1e-3 * ms)
        steps = training.batch_size * segment / (1e-3 * ms)
        document["sizes"][name] = {
            "predicted": predicted,
            "counted": counted,
            "update_ms": ms,
            "gflop_per_s": rate,
            "control_steps_per_s": steps,
        }
    print(f"\n| size | update [ms] | GFLOP/s (a large product: {machine['gflops']:.0f}) | control steps/s |")
    print("|---|---|---|---|")
    for name, found in document["sizes"].items():
        print(
            f"| {name} | {found['update_ms']:.0f} | {found['gflop_per_s']:.0f} | {found['control_steps_per_s']:,.0f} |"
        )
    about = {"date": datetime.date.today().isoformat(), "command": " ".join(["python", *sys.argv])}
    about |= {"code": code_version(), "torch": torch.__version__}
    write_json(options.out, {**about, "machine": {**machine, **describe_machine()}, **document})
    print(f"\nwritten: {options.out}")


if __name__ == "__main__":
    main()
