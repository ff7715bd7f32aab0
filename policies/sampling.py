"""With what plans are computed: noise that does not depend on the other rows, and as many threads as help.

Shapes: S samples of a row, L action tokens, Da action width, K context tokens, D width.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray

from scd_robot.model import ScdConfig
from scd_robot.policies.rows import Rows
from scd_robot.seeding import POLICY_NOISE, keyed_rng

__all__ = ["inference", "plan_noise"]

_SMALL_BATCH = 16  # rows up to which one thread is faster than several


def plan_noise(
    config: ScdConfig, rows: Rows, chosen: NDArray[np.int64], *, seed: int, num_samples: int, guided: bool
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Of the sampler (rows, S, L, Da) and of guidance (rows or 0, K, D), keyed by (seed, episode, plan).

    With several samples L counts the past actions too, by which one of them is chosen.
    """
    length = config.chunk_length + (config.num_past_actions if num_samples > 1 else 0)
    noise = np.empty((len(chosen), num_samples, length, config.action_dim), np.float32)
    corruption = np.empty((len(chosen) * guided, config.num_context_tokens, config.width), np.float32)
    for i, row in enumerate(chosen):
        rng = keyed_rng(POLICY_NOISE, seed, rows.episode[row], rows.num_plans[row])
        rng.standard_normal(dtype=np.float32, out=noise[i])
        if guided:
            rng.standard_normal(dtype=np.float32, out=corruption[i])
    return noise, corruption


@contextmanager
def inference(device: torch.device, batch: int) -> Iterator[None]:
    """No gradients, and on a CPU one thread for small batches: more only wait for each other."""
    threads = torch.get_num_threads()
    single = device.type == "cpu" and batch <= _SMALL_BATCH and threads > 1
    if single:
        torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            yield
    finally:
        if single:
            torch.set_num_threads(threads)
