"""Random draws as functions of integer keys, so that results depend neither on batch, worker nor process counts.

`keyed_rng(seed, episode, plan)` gives the same stream wherever and whenever it is asked for. The generator is Philox
(Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011), keyed through numpy's SeedSequence.
"""

import numpy as np

__all__ = ["EVALUATION", "RECORDING", "VALIDATION", "derive_seed", "keyed_rng"]

# Domains keep the start states of demonstrations, of evaluations in training, and of evaluations disjoint.
RECORDING = 1
VALIDATION = 2
EVALUATION = 3


def keyed_rng(*keys: int) -> np.random.Generator:
    """A generator that is a function of `keys` (non-negative integers) alone."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([int(k) for k in keys])))


def derive_seed(*keys: int) -> int:
    """A 32-bit seed that is a function of `keys` (non-negative integers) alone; for libraries that want an int."""
    return int(np.random.SeedSequence([int(k) for k in keys]).generate_state(1, np.uint32)[0])
