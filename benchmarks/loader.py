"""Windows per second from the loader of training, beside robomimic's SequenceDataset and a bare numpy gather.

    python benchmarks/loader.py                 tables, and runs/benchmarks/loader.json

A batch is BATCH windows of observations and actions, as tensors, from random places of random episodes; all arms give
the same numbers of steps and take turns within each round. One process, one thread, no workers, files in the page
cache: what is compared is the work per window.

- scd: choice of segments and `SegmentReader.read`, as training calls them, with the actions of the whole window.
- robomimic: `SequenceDataset` behind a torch DataLoader, with its cache in memory ("all") and without (None: read from
  the HDF5 file, uncompressed as robomimic writes it).
- ceiling: one numpy gather of the batch, observations and actions side by side, out of one array in memory, into a
  tensor; for images on disk the gather of the images from an array in memory.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import datetime
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from job import describe_machine, result_file
from torch.utils.data import DataLoader, RandomSampler

from scd_robot.datasets import EpisodeDataset, open_dataset
from scd_robot.datasets.convert import write_zarr
from scd_robot.datasets.hdf5.robomimic_writer import write_robomimic
from scd_robot.datasets.windows import SegmentIndex
from scd_robot.errors import MissingDependencyError
from scd_robot.output import write_json
from scd_robot.training.segments import SegmentReader
from scd_robot.types import ArraySpec, DatasetSpec

HISTORIES = (16, 128)
BATCH = {"state": {16: 1024, 128: 256}, "image": {16: 64, 128: 16}}
EPISODES, LENGTH = {"state": 200, "image": 40}, 300
STATE = {"object": 14, "robot0_eef_pos": 3, "robot0_eef_quat": 4, "robot0_gripper_qpos": 2}
IMAGE = (96, 96, 3)


def make_dataset(images: bool) -> EpisodeDataset:
    """Random states, and images of noise on a moving gradient, which compress about as badly as a camera's."""
    rng = np.random.default_rng(0)
    episodes = EPISODES["image" if images else "state"]
    count = episodes * LENGTH
    arrays: dict[str, Any] = {key: rng.standard_normal((count, n), np.float32) for key, n in STATE.items()}
    spec = {key: ArraySpec((n,)) for key, n in STATE.items()}
    if images:
        row = np.arange(IMAGE[0], dtype=np.int32)
        frames = np.empty((count, *IMAGE), np.uint8)
        for i in range(count):
            frames[i] = (row[:, None, None] + row[None, :, None] + i) % 200 + rng.integers(0, 56, IMAGE)
        arrays["agentview_image"], spec["agentview_image"] = frames, ArraySpec(IMAGE, "uint8")
    arrays["action"] = rng.standard_normal((count, 7), np.float32)
    return EpisodeDataset(DatasetSpec(spec, 7, 0.05, "benchmark"), np.arange(1, episodes + 1) * LENGTH, arrays)


def ours(data: EpisodeDataset, keys: list[str], history: int, batch: int) -> Callable[[], Any]:
    """Loads the next batch."""
    index, reader = SegmentIndex(data.episode_ends, history), SegmentReader(data, keys, 0, history)
    steps, position = iter(range(10**9)), np.zeros((batch, 1), np.int64)
    return lambda: reader.read(index.batch(next(steps), range(batch), batch), position)


def robomimic(path: Path, keys: list[str], history: int, batch: int, cache: str | None) -> Callable[[], Any]:
    """Loads the next batch of `SequenceDataset`."""
    try:
        import robomimic.utils.obs_utils as obs_utils
        from robomimic.utils.dataset import SequenceDataset
    except ImportError as error:
        raise MissingDependencyError("this benchmark needs robomimic: make test installs it") from error
    rgb = [key for key in keys if "image" in key]
    obs_utils.initialize_obs_utils_with_obs_specs({"obs": {"low_dim": sorted(set(keys) - set(rgb)), "rgb": rgb}})
    dataset = SequenceDataset(
        hdf5_path=str(path), obs_keys=keys, dataset_keys=("actions",), frame_stack=1, seq_length=history,
        pad_frame_stack=False, pad_seq_length=False, get_pad_mask=False, hdf5_cache_mode=cache, load_next_obs=False,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    sampler = RandomSampler(dataset, replacement=True, num_samples=10**9, generator=generator)
    loader = iter(DataLoader(dataset, batch_size=batch, sampler=sampler, num_workers=0))
    return lambda: next(loader)


def ceiling(data: EpisodeDataset, keys: list[str], history: int, batch: int) -> Callable[[], Any]:
    """One gather from one array that holds observations and actions, or images alone."""
    arrays = [np.asarray(data.arrays[key][:]) for key in keys]
    arrays += [np.asarray(data.arrays["action"][:])] if arrays[0].ndim == 2 else []
    one = arrays[0] if len(arrays) == 1 else np.concatenate(arrays, axis=1)
    rng = np.random.default_rng(0)
    starts = [rng.integers(0, len(one) - history, batch) for _ in range(64)]
    turn = iter(range(10**9))
    return lambda: torch.from_numpy(one[starts[next(turn) % 64][:, None] + np.arange(history)])


def take_turns(arms: dict[str, Callable[[], Any]], rounds: int) -> dict[str, np.ndarray]:
    """Seconds per batch (rounds,) of each arm; the first fifth of the rounds warms up and is dropped."""
    times: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(rounds + rounds // 4):
        for name, call in arms.items():
            started = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - started)
    return {name: np.array(values[rounds // 4 :]) for name, values in times.items()}


def report(title: str, times: dict[str, np.ndarray], batch: int) -> dict[str, Any]:
    """Prints one table; windows per second from the median, and each arm's ratio to scd over the rounds."""
    print(f"\n{title}\n\n| arm | windows/s | ms per batch p50 / p95 | scd is faster by (rounds, 5-95 %) |")
    print("|---|---|---|---|")
    result = {}
    for name, values in times.items():
        ratio = values / times["scd"]
        low, high = np.percentile(ratio, (5, 95))
        median = float(np.median(values) / np.median(times["scd"]))
        p50, p95 = np.percentile(1e3 * values, (50, 95))
        rate = batch / float(np.median(values))
        print(f"| {name} | {rate:,.0f} | {p50:.3f} / {p95:.3f} | {median:.2f} ({low:.2f}-{high:.2f}) |")
        result[name] = {"windows_per_s": rate, "scd_faster_by": median, "p5": low, "p95": high}
    return result


def main() -> None:
    """Measures, prints the tables and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100, help="turns of every arm")
    parser.add_argument("--out", type=result_file, default="runs/benchmarks/loader.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("state", "image"):
            data = make_dataset(kind == "image")
            store, hdf5 = Path(folder) / f"{kind}.zarr", Path(folder) / f"{kind}.hdf5"
            write_zarr(data, store, progress=False)
            write_robomimic(data, hdf5, progress=False)
            keys = ["agentview_image"] if kind == "image" else list(STATE)
            rounds = max(10, arguments.rounds // 5) if kind == "image" else arguments.rounds
            for history in HISTORIES:
                batch = BATCH[kind][history]
                arms = {
                    "scd": ours(open_dataset(store, keys), keys, history, batch),
                    "robomimic on disk": robomimic(hdf5, keys, history, batch, None),
                    "ceiling": ceiling(data, keys, history, batch),
                }
                if (kind, history) != ("image", 128):  # it keeps every window by itself: 24 GB
                    arms["robomimic in memory"] = robomimic(hdf5, keys, history, batch, "all")
                title = f"{kind} windows of {history} steps, batch {batch}"
                results[f"{kind} {history}"] = report(title, take_turns(arms, rounds), batch)
    about = {"date": datetime.date.today().isoformat(), "machine": describe_machine(), "torch": torch.__version__}
    write_json(arguments.out, {**about, **results})
    print(f"\nwritten: {arguments.out}")


if __name__ == "__main__":
    main()
