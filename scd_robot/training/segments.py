"""Reads segments of episodes into tensors: one gather per key, and no Python over single steps.

Shapes: B segments, T encoder steps (longest segment), M positions, k past actions, Ta chunk length, L = k + Ta,
Da action width.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scd_robot.datasets import ACTION, PRESENT, EpisodeDataset
from scd_robot.datasets.lazy import LazyArray, RowArray
from scd_robot.datasets.windows import SegmentBatch
from scd_robot.transforms import TransformConfig, relative_chunk

__all__ = ["SegmentReader", "Segments"]

Indices = Callable[[], NDArray[np.int64]]


@dataclass
class Segments:
    """Segments after the experiment's transforms, not normalised.

    Attributes:
        observation: (B, T, ...) by key; steps past a segment's end are no data.
        present: (B, T) bool by key, for keys that are absent in some steps; empty where all are there.
        step_valid: (B, T) bool, False past a segment's end.
        label: (B, M, L, Da) actions around each position, as the chunk has them.
        executed: (B, M, L, Da) what was really executed then.
        action_valid: (B, M, L) bool, False outside the episode: no data.
        disturbed: (B, M, L) bool, actions of the chunk in whose place another was executed; None = not asked for.
        past_action: (B, T, Da) executed one control step before each, or (0, T, Da) where nobody reads it.
    """

    observation: dict[str, Tensor]
    present: dict[str, Tensor]
    step_valid: Tensor
    label: Tensor
    executed: Tensor
    action_valid: Tensor
    disturbed: Tensor | None
    past_action: Tensor


class SegmentReader:
    """Reads what a model needs of segments.

    Args:
        data: the episodes, after the transforms of single control steps.
        keys: observation keys.
        num_past_actions: k.
        chunk_length: Ta.
        reads_past_action: the action before each control step is asked for.
        transforms: of which those of chunks are done here.
        disturbance_threshold: executed actions that deviate more from their labels are disturbed; 0 = none is.
    """

    def __init__(
        self,
        data: EpisodeDataset,
        keys: Sequence[str],
        num_past_actions: int,
        chunk_length: int,
        reads_past_action: bool = False,
        transforms: TransformConfig | None = None,
        disturbance_threshold: float = 0.0,
    ) -> None:
        self._threshold = disturbance_threshold
        self._before, self._after, self._reads_past = num_past_actions, chunk_length, reads_past_action
        self._transforms, self._control_dt = transforms or TransformConfig(), data.spec.control_dt
        self._observation = {key: data.arrays[key] for key in keys}
        vectors = {key: array for key, array in self._observation.items() if is_vector(array)}
        self._widths = {key: array.shape[1] for key, array in vectors.items()}
        # Side by side, so that a window of all vectors is one copy.
        self._vectors = np.concatenate(list(vectors.values()), axis=1) if len(vectors) > 1 else None
        self._present = {key: data.arrays[PRESENT + key] for key in keys if data.has_gaps(key)}
        self._states = {part.key: data.arrays[part.key] for part in self._transforms.chunk_parts}
        self._action, self._executed = data.arrays[ACTION], data.executed()

    def read(self, segments: SegmentBatch, position: NDArray[np.int64]) -> Segments:
        """One batch.

        Args:
            segments: where they lie.
            position: (B, M) encoder steps around which actions are wanted.
        """
        # Indices of single steps are made only where something asks for them: most windows are copied in one piece.
        all_steps = functools.cache(lambda: segments.steps()[0])
        around = functools.cache(lambda: segments.steps_around(position, self._before, self._after)[0])
        first, length = segments.start[:, None] + segments.stride * position - self._before, self._before + self._after
        label = take_windows(self._action, first, length, around)
        executed = label
        if self._executed is not self._action:
            executed = take_windows(self._executed, first, length, around)
        disturbed = None
        if self._threshold:
            disturbed = (executed - label).abs().amax(dim=-1) > self._threshold
            disturbed[..., : self._before] = False
        if self._reads_past:
            past = gather(self._executed, segments.before(all_steps()))
        else:
            past = torch.empty((0, int(segments.lengths.max()), *self._executed.shape[1:]))
        if self._transforms.chunk_parts:
            state = {key: value[all_steps()] for key, value in self._states.items()}
            at = {key: np.take_along_axis(value, position[..., None], axis=1) for key, value in state.items()}
            label, executed = (self._relative(x, at) for x in (label, executed))
            if self._reads_past:
                past = self._relative(past[:, :, None], state)[:, :, 0]
        return Segments(
            observation=self._observe(segments, all_steps),
            present={key: torch.from_numpy(value[all_steps()] != 0) for key, value in self._present.items()},
            step_valid=torch.from_numpy(segments.step_valid()),
            label=label,
            executed=executed,
            action_valid=torch.from_numpy(segments.inside(position, self._before, self._after)),
            disturbed=disturbed,
            past_action=past,
        )

    def _observe(self, segments: SegmentBatch, steps: Indices) -> dict[str, Tensor]:
        """Observations (B, T, ...) by key: all vectors in one copy, as views of it."""
        parts: dict[str, Tensor] = {}
        if self._vectors is not None:
            together = self._steps_of(self._vectors, segments, steps)
            parts = dict(zip(self._widths, together.split(list(self._widths.values()), dim=-1), strict=True))
        for key, array in self._observation.items():
            if array.ndim == 4:
                parts[key] = read_pictures(array, segments)
            elif key not in parts:
                parts[key] = self._steps_of(array, segments, steps)
        return parts

    def _steps_of(self, array: RowArray, segments: SegmentBatch, steps: Indices) -> Tensor:
        if segments.stride > 1:
            return gather(array, steps())
        return take_windows(array, segments.start, int(segments.lengths.max()), steps)

    def _relative(self, actions: Tensor, state: Mapping[str, NDArray[np.float32]]) -> Tensor:
        """Actions (..., L, Da) relative to the state (..., Do) by key."""
        relative = relative_chunk(actions.numpy(), state, self._transforms, self._control_dt)
        return torch.from_numpy(relative.astype(np.float32, copy=False))


def is_vector(array: RowArray) -> bool:
    """Rows of float32 numbers in memory."""
    return isinstance(array, np.ndarray) and array.ndim == 2 and array.dtype == np.float32


def read_pictures(array: RowArray, segments: SegmentBatch) -> Tensor:
    """Pictures (B, T, H, W, C), or their features: copied once, and past a segment's end nothing but zeros."""
    lengths = segments.lengths
    out = torch.from_numpy(np.zeros((len(lengths), int(lengths.max()), *array.shape[1:]), array.dtype))
    for segment, (start, stop, length) in enumerate(zip(segments.start, segments.stop, lengths, strict=True)):
        place = out.numpy()[segment, :length]
        if isinstance(array, LazyArray) and segments.stride == 1:
            array.read_into(int(start), int(stop), place)
        else:
            place[:] = array[start:stop][:: segments.stride]  # on disk neighbours lie in one piece
    return out


def gather(array: RowArray, index: NDArray[np.int64]) -> Tensor:
    """Rows (..., *) at `index` (...): torch's index_select takes them from memory faster than indexing does."""
    if isinstance(array, LazyArray):
        return torch.from_numpy(array[index])
    rows = torch.from_numpy(array).index_select(0, torch.from_numpy(index).reshape(-1))
    return rows.reshape(*index.shape, *array.shape[1:])


def take_windows(array: RowArray, start: NDArray[np.int64], length: int, index: Indices) -> Tensor:
    """Rows (..., length, *) from each `start` (...) on.

    In memory that is one copy per window. Rows at which `index()` (..., length) says otherwise, because a window leaves
    its episode, hold whatever lies there: they are no data. (Where a window leaves the array, `index()` is followed.)
    """
    inside = start.size and start.min() >= 0 and start.max() + length <= len(array)
    if isinstance(array, LazyArray) or not inside or not array.flags.c_contiguous:
        return gather(array, index())
    flat = torch.from_numpy(array).reshape(-1)
    width = flat.numel() // len(array)
    windows = flat.as_strided((len(array) - length + 1, length * width), (width, 1))
    taken = windows.index_select(0, torch.from_numpy(start).reshape(-1))
    return taken.reshape(*start.shape, length, *array.shape[1:])
