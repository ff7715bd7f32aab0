"""Trains a rival, in its own environment (constraints/lerobot.txt), and writes checkpoints of it.

    make .venv-lerobot/.made
    scd data convert push.zarr push.hdf5
    .venv-lerobot/bin/python -P benchmarks/outside/train.py outside.diffusion --dataset push.hdf5 --out runs/dp \
        --set training.max_steps=5000 model.network=transformer

An arm is a module with a class `Trainer` and a function `load_policy`, see `outside/diffusion.py`. Checkpoints are
OUT/checkpoints/step_N with model.safetensors, config.json, and progress.json: updates, seconds, mean loss since the one
before. There is no resuming. The process ends when its standard input does.
"""

import argparse
import importlib
import importlib.metadata
import json
import os
import platform
import sys
import threading
import time
from pathlib import Path
from typing import Any

__all__ = ["main"]

EVERY = 500
PACKAGES = ("lerobot", "robomimic", "diffusers", "torch", "numpy")


def main() -> None:
    """Reads the command line and trains."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arm", help="module: outside.diffusion or outside.bc_rnn")
    parser.add_argument("--dataset", type=Path, required=True, help="robomimic HDF5 file")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="GROUP.KEY=VALUE",
        help="training.max_steps (updates) and training.cpu_seconds: the first that is reached ends the training; "
        f"training.validate_every (updates between checkpoints, {EVERY}), and what the arm knows of training and model",
    )
    options = parser.parse_args()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    sys.path.append(str(Path(__file__).parents[1]))
    settings = read_settings(options.set)
    import torch

    torch.set_num_threads(options.threads)
    train(options.arm, options.dataset, options.out, options.seed, settings["training"], settings["model"])


def read_settings(items: list[str]) -> dict[str, dict[str, Any]]:
    """`training.batch_size=64 model.down_dims=[64,128]` by group; values are JSON or plain text."""
    groups: dict[str, dict[str, Any]] = {"training": {}, "model": {}}
    for item in items:
        path, _, text = item.partition("=")
        group, _, name = path.partition(".")
        if group not in groups or not name or not text:
            raise SystemExit(f"settings are written training.KEY=VALUE or model.KEY=VALUE, got {item!r}")
        try:
            groups[group][name] = json.loads(text)
        except ValueError:
            groups[group][name] = text
    return groups


def train(arm: str, dataset: Path, out: Path, seed: int, training: dict[str, Any], model: dict[str, Any]) -> None:
    """Trains until the updates or the seconds of the processor are used up.

    Not of the wall clock: what else the machine does would decide how much is learned.

    Args:
        arm: name of its module.
        dataset: robomimic HDF5 file.
        out: new folder.
        seed: of the training.
        training: `max_steps`, `cpu_seconds`, `validate_every` and what the arm knows.
        model: what the arm knows.
    """
    most, seconds = training.pop("max_steps", None), training.pop("cpu_seconds", None)
    every = training.pop("validate_every", EVERY)
    if most is None and seconds is None:
        raise SystemExit("a training needs an end: --set training.max_steps=N or training.cpu_seconds=S")
    if (out / "checkpoints").exists():
        raise SystemExit(f"{out} holds a training already; choose another --out")
    module = importlib.import_module(arm)
    started, cpu = time.monotonic(), time.process_time()
    trainer = module.Trainer(dataset, seed, training, model)
    parameters = sum(p.numel() for p in trainer.module.parameters())
    about = {"arm": arm, "seed": seed, "parameters": parameters, "versions": _versions(), **trainer.config}
    done, losses = 0, []
    while True:
        told = {"updates": done, "wall_s": time.monotonic() - started, "cpu_s": time.process_time() - cpu}
        progress = max(done / most if most else 0.0, told["cpu_s"] / seconds if seconds else 0.0)
        if done and (progress >= 1 or done % every == 0):
            _write(out / "checkpoints" / f"step_{done:08d}", trainer.weights(), about, told, losses)
            print(f"{done} updates, {told['cpu_s']:.0f} s, loss {sum(losses) / len(losses):.4f}", flush=True)
            losses = []
        if progress >= 1:
            return
        losses.append(trainer.step(progress))
        done += 1


def _write(folder: Path, weights: dict[str, Any], config: Any, progress: dict[str, Any], losses: list[float]) -> None:
    """A checkpoint, beside its place and renamed."""
    from safetensors.torch import save_file

    beside = folder.with_name(f".{folder.name}.part")
    beside.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, beside / "model.safetensors")
    (beside / "config.json").write_text(json.dumps(config, indent=1))
    (beside / "progress.json").write_text(json.dumps({**progress, "loss": sum(losses) / len(losses)}))
    beside.replace(folder)


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _end_with_parent() -> None:
    """Ends this process when the other end of its standard input is closed, if that is a pipe."""
    import stat

    if stat.S_ISFIFO(os.fstat(0).st_mode):
        os.read(0, 1)
        os._exit(3)


if __name__ == "__main__":
    main()
