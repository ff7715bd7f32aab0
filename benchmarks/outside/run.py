"""A trained rival as a policy: `scd eval outside.run:load_run --policy-options run=... --policy-python ...`."""

import hashlib
import importlib
import json
from pathlib import Path
from typing import Any

__all__ = ["list_checkpoints", "load_run"]


def list_checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a training, oldest first."""
    return sorted((run / "checkpoints").glob("step_*"))


def load_run(run: str, seed: int = 0, threads: int = 1, **options: Any) -> Any:
    """The policy of a checkpoint's folder, or of a training's (its newest checkpoint).

    Args:
        run: folder.
        seed: of the policy's noise.
        threads: of torch.
        **options: what the arm's `load_policy` knows.
    """
    import torch
    from safetensors.torch import load_file

    torch.set_num_threads(threads)
    place = Path(run)
    folder = place if (place / "model.safetensors").is_file() else (list_checkpoints(place) or [place])[-1]
    config = json.loads((folder / "config.json").read_text())
    module = importlib.import_module(config["arm"])
    policy = module.load_policy(config, load_file(folder / "model.safetensors"), seed=seed, **options)
    policy.provenance = {
        "type": config["arm"],
        "checkpoint": str(folder),
        "step": json.loads((folder / "progress.json").read_text())["updates"],
        "weights_sha256": hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest(),
        "trained_with": config["versions"],
        "settings": {"seed": seed, **options},
    }
    return policy
