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

    Raises:
        ConfigError: fewer than one.
    """
    import torch

    from scd_robot.errors import ConfigError

    if threads is not None and threads < 1:
        raise ConfigError(f"--threads must be at least 1, got {threads}; leave it out for all cores, at most 8")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count = min(8, cores) if threads is None else threads
    torch.set_num_threads(count)
    return count
