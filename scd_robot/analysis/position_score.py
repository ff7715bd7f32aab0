"""A score of imagined frames by where things are in them, for a policy that chooses among chunks.

    scd eval CHECKPOINT --imagine FRAMES --score scd_robot.analysis.position_score:NearTo \
        --score-options dataset=data/push.zarr thing=object goal=goal

Shapes: N candidates, Tf frames imagined, H W C picture, Ta chunk length, Da action width.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scd_robot.analysis.imagination import check_recording
from scd_robot.analysis.position_probe import PositionProbe, ProbeConfig, train_probe
from scd_robot.datasets import POSITION, PRESENT, open_dataset
from scd_robot.errors import ConfigError, UnknownNameError
from scd_robot.policies import Imagination
from scd_robot.types import ActionArray

__all__ = ["NearTo"]


class NearTo:
    """Negative distance [m] of a thing from another one, or from a place, in the last imagined frame.

    Both are looked for by a probe, trained on recorded pictures (about ten CPU seconds at 64 x 64), but on none that is
    marked as absent.

    Args:
        imagination: whose frames these are.
        dataset: a recording of the same camera with positions (scd data record --keep-positions).
        thing: name of the position that is to come near.
        goal: name of another position, or three coordinates [m].
        updates: of the probe's training.

    Raises:
        ConfigError: the recording has no positions, or the goal is no place.
        UnknownNameError: it has none of these names.
    """

    def __init__(
        self,
        imagination: Imagination,
        dataset: str,
        thing: str,
        goal: str | Sequence[float],
        updates: int = ProbeConfig.updates,
    ) -> None:
        data = open_dataset(Path(dataset))
        check_recording(imagination, data)
        known = {key.removeprefix(POSITION): key for key in data.arrays if key.startswith(POSITION)}
        if not known:
            raise ConfigError(f"{dataset} holds no positions; record it with --keep-positions")
        names = [thing, goal] if isinstance(goal, str) else [thing]
        for name in names:
            if name not in known:
                raise UnknownNameError(f"position in {dataset}", name, known)
        self._thing, self._goal = thing, goal
        positions = {name: np.asarray(data.arrays[known[name]][:]) for name in dict.fromkeys(names)}
        if not isinstance(goal, str) and np.shape(goal) != positions[thing].shape[1:]:
            raise ConfigError(f"goal must be {positions[thing].shape[1]} coordinates [m] or a name, got {goal}")
        owner = np.repeat(np.arange(data.num_episodes), data.episode_lengths)
        pictures = np.asarray(data.arrays[imagination.source][:])
        if data.has_gaps(imagination.source):
            there = np.asarray(data.arrays[PRESENT + imagination.source][:], bool)
            pictures, owner = pictures[there], owner[there]
            positions = {name: values[there] for name, values in positions.items()}
        pictures = imagination.pictures(pictures[:, None])[:, 0]
        self.probe: PositionProbe = train_probe(pictures, positions, owner, ProbeConfig(updates=updates))

    def __call__(self, frames: NDArray[np.uint8], chunks: ActionArray) -> NDArray[np.float64]:
        """(N,) of frames (N, Tf, H, W, C); the chunks are not looked at."""
        found = self.probe.positions(frames[:, -1])
        goal: Any = found[self._goal] if isinstance(self._goal, str) else np.asarray(self._goal)
        distance: NDArray[np.float64] = np.linalg.norm(found[self._thing] - goal, axis=-1)
        return -distance
