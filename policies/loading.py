"""From a checkpoint folder to a policy."""

from pathlib import Path
from typing import Any

import torch

from scd_robot.checkpoint import Checkpoint, read_checkpoint
from scd_robot.config import to_json
from scd_robot.policies.registry import policy_class

__all__ = ["load_policy", "policy_of"]


def load_policy(path: str | Path, device: str | torch.device = "cpu", **overrides: Any) -> Any:
    """Loads a trained policy.

    Args:
        path: checkpoint folder, or a training run's folder (its newest checkpoint).
        device: torch device, e.g. "cpu" or "cuda".
        **overrides: settings of the policy that replace the checkpoint's, e.g. `num_denoising_steps=4`,
            `num_executed=4`, `seed=1`, None leaves the checkpoint's; and `reproducible=True`, see `ScdPolicy`.

    Returns:
        An object with `reset`, `observe`, `plan`, `act` and `spec`, see `scd_robot.policies.ScdPolicy`.

    Raises:
        CheckpointError: missing, foreign or damaged.
        UnknownNameError: a policy type that this version does not have.
        ConfigError: an override is unknown or out of range.
    """
    return policy_of(read_checkpoint(path), device, **overrides)


def policy_of(checkpoint: Checkpoint, device: str | torch.device = "cpu", **overrides: Any) -> Any:
    """The policy of a checkpoint that was read already; arguments and errors as for `load_policy`.

    Its attribute `provenance` tells, as plain JSON types, what it was made of.
    """
    kind = policy_class(checkpoint.policy)
    policy = kind.from_parts(
        checkpoint.config, checkpoint.weights, checkpoint.normalizer, checkpoint.dataset, device, **overrides
    )
    policy.provenance = {
        "type": checkpoint.policy,
        "checkpoint": str(checkpoint.path),
        "step": checkpoint.step,
        "weights_sha256": checkpoint.weights_sha256,
        "preset": checkpoint.config["preset"],
        "trained_from": checkpoint.origin,
        "trained_with": checkpoint.versions,
        "device": str(device),
        "settings": to_json(policy.config),
        "reproducible": policy.reproducible,
    }
    return policy
