"""Random draws as functions of integer keys, so that results depend neither on batch, worker nor process counts.

`keyed_rng(seed, episode, plan)` gives the same stream wherever and whenever it is asked for. The generator is Philox
(Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011), keyed through numpy's SeedSequence.
"""

import numpy as np

__all__ = [
    "AUTOENCODER",
    "EPISODE_SPLIT",
    "EVALUATION",
    "FRAME_DRAW",
    "LIVE_FRAMES",
    "OBSERVATION_FAULTS",
    "POLICY_NOISE",
    "RECORDING",
    "ROLL_OUT_DRAW",
    "SEGMENT_ORDER",
    "SEGMENT_START",
    "TRAINING_DRAW",
    "VALIDATION",
    "VALIDATION_DRAW",
    "derive_seed",
    "keyed_rng",
]

# The first key says what a stream is for. The first three keep the start states of demonstrations, of evaluations in
# training, and of evaluations disjoint.
RECORDING = 1
VALIDATION = 2
EVALUATION = 3
POLICY_NOISE = 4
EPISODE_SPLIT = 5
SEGMENT_ORDER = 6
SEGMENT_START = 7
TRAINING_DRAW = 8
VALIDATION_DRAW = 9
OBSERVATION_FAULTS = 10
LIVE_FRAMES = 11
FRAME_DRAW = 12
ROLL_OUT_DRAW = 13
AUTOENCODER = 14


def keyed_rng(*keys: int) -> np.random.Generator:
    """A generator that is a function of `keys` (non-negative integers) alone; other keys give another stream."""
    return np.random.Generator(np.random.Philox(_sequence(keys)))


def derive_seed(*keys: int) -> int:
    """A 32-bit seed that is a function of `keys` (non-negative integers) alone; for libraries that want an int."""
    return int(_sequence(keys).generate_state(1, np.uint32)[0])


def _sequence(keys: tuple[int, ...]) -> np.random.SeedSequence:
    """Distinct for distinct keys: SeedSequence alone takes (1,) and (1, 0), or 2**32 and (0, 1), for the same."""
    words = [len(keys)]
    for key in map(int, keys):
        words += [max(1, -(-key.bit_length() // 32)), key]
    return np.random.SeedSequence(words)
