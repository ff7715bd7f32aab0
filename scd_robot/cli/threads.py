"""How many threads torch should use for training."""

import logging
import os

__all__ = ["use_training_threads"]

logger = logging.getLogger(__name__)


def use_training_threads(threads: int | None) -> int:
    """Sets torch's threads for training and returns them.

    Args:
        threads: as asked for by the user; None = all cores this process may run on, at most 8 (more only wait for each
            other on models of this size).
    """
    import torch

    count = threads or min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    torch.set_num_threads(count)
    return count
