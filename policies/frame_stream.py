"""What a model of frames has seen while a robot runs, control step by control step, and what it imagines from there.

Shapes: B rows, n some of them, N futures of each, Tf frames imagined, Da action width, H W C picture.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from scd_robot.errors import ConfigError, ShapeError
from scd_robot.policies.imagination import Imagination
from scd_robot.policies.inputs import checked_action
from scd_robot.policies.rows import row_numbers
from scd_robot.policies.sampling import TorchCache, inference
from scd_robot.seeding import LIVE_FRAMES
from scd_robot.types import ActionArray

__all__ = ["FrameStream"]

Frames = NDArray[np.uint8]


class FrameStream:
    """The history of B rows in a model of frames, numpy in and out.

    Rows are independent: noise is keyed by (seed, episode, control step, number of the frame), and so it is the same
    for all futures of a row: they differ by their actions alone.

    Args:
        imagination: the model.

    Attributes:
        position: (B,) control steps that each row has seen; None before the first.
        pictures: (B, H, W, C) uint8, the last that were seen, as the model sees them.
    """

    def __init__(self, imagination: Imagination) -> None:
        self.imagination = imagination
        self.position: NDArray[np.int64] | None = None
        self.pictures: Frames | None = None
        self._episodes: NDArray[np.int64] = np.zeros(0, np.int64)
        self._first: list[int] | None = None
        self._next = 0
        self._cache: TorchCache | None = None
        self._context: Any = None
        self._unknown_action = imagination.transforms.unknown_action()

    def reset(self, rows: Sequence[int] | None = None, episodes: Sequence[int] | None = None) -> None:
        """Begins new episodes; see `types.Policy.reset`. Without `episodes` they are counted on, from 0."""
        if rows is None:
            self.position, self._first = None, None if episodes is None else list(episodes)
            return
        if self.position is None or self._cache is None:
            raise ConfigError("reset(rows=...) before the first picture: the number of rows is not known yet")
        chosen = row_numbers(rows, len(self.position))
        numbers = np.arange(self._next, self._next + len(chosen)) if episodes is None else np.asarray(episodes)
        mask = np.zeros(len(self.position), bool)
        mask[chosen] = True
        self._cache.reset(mask)
        self.position[chosen], self._episodes[chosen] = 0, numbers
        self._next = max(self._next, int(self._episodes.max()) + 1)

    def observe(self, frames: NDArray[Any], executed_action: ActionArray | None = None) -> None:
        """Reads one control step of every row.

        Args:
            frames: (B, H, W, C) uint8 as recorded.
            executed_action: (B, Da) as recorded, executed in the control step before; not read in rows that begin.

        Raises:
            ShapeError: see `Imagination.pictures`; another batch size than before, or no action.
        """
        self.take(*self.prepare(frames, executed_action))

    def prepare(self, frames: NDArray[Any], executed_action: ActionArray | None) -> tuple[Frames, ActionArray]:
        """What `observe` is given, checked and as `take` reads it; changes nothing."""
        if frames is None:
            raise ShapeError(
                f"the camera {self.imagination.source!r} gave no picture; a model of frames needs one in every control "
                "step"
            )
        seen = self.imagination.pictures(np.asarray(frames)[:, None])[:, 0]
        batch, running = len(seen), None if self.position is None else len(self.position)
        if running is None and self._first is not None and len(self._first) != batch:
            raise ShapeError(f"reset() was given {len(self._first)} episodes, the pictures have {batch} rows")
        if running not in (None, batch):
            raise ShapeError(f"batch has {batch} rows, {running} are running; call reset() first")
        begun = np.zeros(batch, bool) if self.position is None else self.position > 0
        shape = (batch, len(self._unknown_action))
        if executed_action is None:
            if begun.any():
                raise ShapeError(f"executed_action must be {shape} after the first control step, got None")
            executed_action = np.tile(self._unknown_action, (batch, 1))
        executed = checked_action("executed_action", executed_action, shape)
        return seen, np.where(begun[:, None], executed, self._unknown_action)

    def take(self, seen: Frames, executed: ActionArray) -> None:
        """Reads one control step of what `prepare` gave."""
        position, cache = self._begun(len(seen))
        with inference(self.imagination.device, len(seen)):
            picture = torch.as_tensor(seen, device=self.imagination.device)
            self._context = self.imagination.read(picture, self.imagination.normalised(executed), cache.tensors)
        self.pictures = seen
        position += 1

    def imagine(self, actions: ActionArray, rows: NDArray[np.int64] | None = None) -> Frames:
        """What would be seen after each action, in several futures of the control step last observed.

        History and context are those of `observe`, repeated for each future.

        Args:
            actions: (n, N, Tf, Da) as recorded, the first ones executed in that control step.
            rows: (n,) which; None = all.

        Returns:
            (n, N, Tf, H, W, C) uint8, as the model sees pictures.

        Raises:
            ShapeError: actions of another shape, or with NaN.
            ConfigError: a row has seen nothing yet.
        """
        position = self.position
        if position is None or self._cache is None or self.pictures is None:
            raise ConfigError("imagine() needs a picture first: call observe(frames)")
        chosen = np.arange(len(position)) if rows is None else np.asarray(rows, np.int64)
        if not position[chosen].all():
            raise ConfigError(f"imagine() needs a picture of rows {chosen[position[chosen] == 0].tolist()} first")
        shape = np.shape(actions)
        if len(shape) != 4 or shape[0] != len(chosen) or 0 in shape:
            raise ShapeError(f"actions must be (n, N, Tf, Da) with n = {len(chosen)}, got {shape}")
        flat = np.asarray(actions).reshape(-1, *shape[2:])
        width = self.imagination.transforms.recorded.action_dim
        flat = checked_action("actions", flat, (len(flat), shape[2], width))
        index, seed = np.repeat(chosen, shape[1]), self.imagination.config.seed
        keys = [(LIVE_FRAMES, seed, int(self._episodes[row]), int(position[row])) for row in index]
        device = self.imagination.device
        with inference(device, len(index)):
            context = self.imagination.repeated(self._context, torch.as_tensor(index, device=device))
            cache = self._cache.select(index).tensors if shape[2] > 1 else self._cache.tensors  # else never read
            last = torch.as_tensor(self.pictures[index], device=device)
            ahead = self.imagination.ahead(context, cache, last, self.imagination.normalised(flat), keys)
            imagined: Frames = ahead.cpu().numpy()
        return imagined.reshape(*shape[:3], *imagined.shape[2:])

    def _begun(self, batch: int) -> tuple[NDArray[np.int64], TorchCache]:
        """Positions and cache of so many rows, new ones where the first picture comes after a reset."""
        if self.position is None or self._cache is None:
            numbers = list(range(self._next, self._next + batch)) if self._first is None else self._first
            self._episodes = np.asarray(numbers, np.int64)
            self._next = int(self._episodes.max()) + 1
            self.position = np.zeros(batch, np.int64)
            self._cache = TorchCache(self.imagination.model.new_cache(batch))
        return self.position, self._cache
