"""How far exported graphs are from the policy that they were made of: both see the same episode, step by step.

Compared are all that the graphs compute: the context of every control step, through evictions of the ring cache and
with a virtual reset in the middle; a plan of each of these contexts, with committed prefixes of all lengths in turn and
without; and velocities of the decoder. Each side has the cache and contexts of its own, so that errors add up as they
would on a robot.

Shapes: B rows, K context tokens, D width, Ta chunk length, Da action width.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from scd_robot.errors import ConfigError
from scd_robot.export.policy import ExportedPolicy
from scd_robot.policies.scd import ScdPolicy
from scd_robot.rotations import matrix_of
from scd_robot.types import ActionArray, Observation

__all__ = ["TOLERANCE", "check_parity", "compare", "drawn_observations", "needed_steps"]

TOLERANCE = 1e-4
_SEED = 20260210


def check_parity(
    policy: ScdPolicy,
    exported: ExportedPolicy,
    observations: Sequence[Observation] | None = None,
    tolerance: float | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """`compare`, refusing graphs that are not good.

    Args:
        policy: on the CPU.
        exported: made of it.
        observations: of consecutive control steps, arrays (B, ...) each; None = `drawn_observations`.
        tolerance: largest difference of a context (which has unit RMS) or a velocity, and of an action in units of half
            its range in the training data; None = `TOLERANCE`.
        progress: show a progress bar.

    Raises:
        ConfigError: a difference is larger, or not a number.
    """
    tolerance = TOLERANCE if tolerance is None else tolerance
    if not tolerance > 0:
        raise ConfigError(f"the tolerance must be positive, got {tolerance}")
    drawn = observations is None
    seen = drawn_observations(policy, exported.manifest.batch_size) if observations is None else observations
    report = compare(policy, exported, seen, progress)
    report = {"tolerance": tolerance, "observations": "drawn" if drawn else "recorded", **report}
    worst = {name: report[name]["max"] for name in ("context", "action", "velocity")}
    report["good"] = all(error <= tolerance for error in worst.values())
    if not report["good"]:
        told = ", ".join(f"{name} {error:.2g}" for name, error in worst.items())
        raise ConfigError(
            f"the graphs are not good: largest differences from the policy are {told}, the tolerance is {tolerance:g}; "
            "nothing was written; try another --format, or other versions of torch and onnxruntime"
        )
    return report


def needed_steps(policy: ScdPolicy) -> int:
    """Control steps in which the ring cache overflows before a reset in the middle, and again after it."""
    return policy.architecture.history_stride * (2 * policy.architecture.history_length + 16)


def drawn_observations(policy: ScdPolicy, batch_size: int) -> list[dict[str, NDArray[Any]]]:
    """Random observations within the ranges of the training data, of `needed_steps`; rotations are any."""
    rng = np.random.default_rng(_SEED)
    statistics = policy.normalizer.statistics
    recorded = {source: key for key, source in policy.transforms.sources.items()}
    ranges = {}
    for source, spec in policy.spec.observation.items():
        found = statistics.get(recorded[source])
        if found is not None and (found.width,) == spec.shape:
            ranges[source] = (np.asarray(found.minimum), np.asarray(found.maximum))
    seen = []
    for _ in range(needed_steps(policy)):
        drawn: dict[str, NDArray[Any]] = {}
        for source, spec in policy.spec.observation.items():
            shape, limits = (batch_size, *spec.shape), ranges.get(source, (-np.ones(1), np.ones(1)))
            pixels = spec.dtype == "uint8"
            drawn[source] = (
                rng.integers(0, 256, shape, np.uint8) if pixels else rng.uniform(*limits, shape).astype(np.float32)
            )
        turns = matrix_of(rng.standard_normal((batch_size, 4)), "quat_xyzw")
        seen.append(policy.transforms.with_rotations(drawn, turns))
    return seen


def compare(
    policy: ScdPolicy, exported: ExportedPolicy, observations: Sequence[Observation], progress: bool = False
) -> dict[str, Any]:
    """Largest and root-mean-square differences of contexts, actions and velocities over an episode.

    Actions are compared in units of half their range in the training data (dimensions that are constant there in the
    dataset's units). The executed actions are the policy's plans, clipped to that range.
    """
    batch = len(next(iter(observations[0].values())))
    middle, found = len(observations) // 2, defaultdict[str, list[NDArray[Any]]](list)
    low, high = (np.asarray(x, np.float32) for x in _action_range(policy))
    half = np.where(high > low, (high - low) / 2, 1.0)
    for side in (policy, exported):
        side.reset(episodes=list(range(batch)))
        if policy.spec.tasks:
            side.task = policy.task or policy.spec.tasks[0]
    executed: ActionArray | None = None
    lengths, plans = [], 0
    bar = tqdm(observations, desc="comparing", unit="step", disable=not progress)
    for step, observation in enumerate(bar):
        if step == middle:
            for side in (policy, exported):
                side.reset(rows=list(range(batch)), episodes=list(range(batch, 2 * batch)))
        for side in (policy, exported):
            side.observe(observation, executed)
        found["context"].append(policy.context.numpy() - exported.context)
        if not policy.may_plan:
            continue
        length = plans % (min(policy.max_prefix, policy.spec.chunk_length - 1) + 1)
        prefix: ActionArray | None = None
        if executed is not None and length:
            prefix = np.repeat(executed[:, None], length, axis=1)
        chunks = [side.plan_from(side.snapshot(), prefix) for side in (policy, exported)]
        found["action"].append((chunks[0] - chunks[1]) / half)
        found["velocity"].append(_velocity_difference(policy, exported, step))
        executed, plans = np.clip(chunks[0][:, plans % policy.spec.chunk_length], low, high), plans + 1
        lengths.append(0 if prefix is None else length)
    return {
        "control_steps": len(observations),
        "history_length": policy.architecture.history_length,
        "reset_at": middle,
        "plans": plans,
        "longest_prefix": max(lengths, default=0),
        **{name: _errors(values) for name, values in found.items()},
    }


def _velocity_difference(policy: ScdPolicy, exported: ExportedPolicy, step: int) -> NDArray[np.float32]:
    """(B, Ta, Da) of one evaluation of the decoder on the policy's context, at a random flow time for each token."""
    rng = np.random.default_rng((_SEED, step))
    context = policy.context.numpy()
    shape = (len(context), policy.spec.chunk_length, policy.architecture.action_dim)
    inputs = {
        "x": rng.standard_normal(shape, np.float32),
        "flow_time": rng.random(shape[:2], np.float32),
        "context": context,
    }
    if "end_time" in exported.manifest.graphs["decoder_step"].inputs:
        inputs["end_time"] = inputs["flow_time"] + (1 - inputs["flow_time"]) * rng.random(shape[:2], np.float32)
    x, flow_time, end_time = (
        torch.from_numpy(inputs[name]) if name in inputs else None for name in ("x", "flow_time", "end_time")
    )
    assert x is not None
    assert flow_time is not None
    with torch.inference_mode():
        expected = policy.model.velocity(x, flow_time, policy.context, None, end_time).numpy()
    difference: NDArray[np.float32] = exported.decoder_step(inputs) - expected
    return difference


def _action_range(policy: ScdPolicy) -> tuple[NDArray[Any], NDArray[Any]]:
    """Smallest and largest actions (Da,) of the training data as recorded; where transforms change them, -1 and 1."""
    statistics, config = policy.normalizer.statistics["action"], policy.transforms.config
    keys = [*(step.key for step in config.rotations), *(step.key for step in config.grippers)]
    if config.chunk_parts or "action" in keys:
        ones = np.ones(policy.spec.action_dim)
        return -ones, ones
    return np.asarray(statistics.minimum), np.asarray(statistics.maximum)


def _errors(values: Sequence[NDArray[Any]]) -> dict[str, float]:
    """Of differences (B, ...) of control steps; NaN stays NaN and is never good."""
    every = np.stack(values).astype(np.float64)
    return {"max": float(np.abs(every).max()), "rms": float(np.sqrt(np.square(every).mean()))}
