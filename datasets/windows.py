"""Which steps a training sample takes: pure index arithmetic, no arrays of data.

Shapes: E episodes, B samples, T steps of a segment, k past actions, Ta chunk length.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scd_robot.errors import ConfigError, DatasetError
from scd_robot.seeding import EPISODE_SPLIT, SEGMENT_ORDER, SEGMENT_START, keyed_rng

__all__ = ["SegmentBatch", "SegmentIndex", "split_episodes"]

IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class SegmentBatch:
    """B segments of episodes, as steps of the concatenated dataset.

    Attributes:
        start: (B,) first step of each segment.
        stop: (B,) one past its last step.
        episode_start: (B,) first step of its episode.
        episode_stop: (B,) one past the last step of its episode.
        stride: every how many steps one belongs to the segment.
    """

    start: IntArray
    stop: IntArray
    episode_start: IntArray
    episode_stop: IntArray
    stride: int = 1

    @property
    def lengths(self) -> IntArray:
        """(B,) steps that belong to each segment."""
        return -(-(self.stop - self.start) // self.stride)

    def steps(self) -> tuple[IntArray, NDArray[np.bool_]]:
        """Indices (B, T) of the segments' steps, T the longest, and which are real; padding repeats the last one."""
        number = np.arange(self.lengths.max())
        last = self.lengths[:, None] - 1
        return self.start[:, None] + self.stride * np.minimum(number, last), number <= last

    def step_valid(self) -> NDArray[np.bool_]:
        """(B, T) the second result of `steps`, which costs less."""
        lengths = self.lengths
        longest = lengths.max()
        if lengths.min() == longest:
            return np.ones((len(lengths), longest), np.bool_)
        return np.asarray(np.arange(longest) < lengths[:, None])

    def inside(self, position: IntArray, before: int, after: int) -> NDArray[np.bool_]:
        """(B, ..., before + after) the second result of `steps_around`, which costs less."""
        axes = (slice(None),) + (None,) * position.ndim
        base = (self.start[axes[:-1]] + self.stride * position)[..., None]
        number = np.arange(-before, after)
        return np.asarray((number >= self.episode_start[axes] - base) & (number < self.episode_stop[axes] - base))

    def before(self, steps: IntArray) -> IntArray:
        """Indices (B, T) of the steps before those at `steps` (B, T); the first of an episode stands for its own."""
        return np.maximum(steps - 1, self.episode_start[:, None])

    def steps_around(self, position: IntArray, before: int, after: int) -> tuple[IntArray, NDArray[np.bool_]]:
        """Indices (B, ..., before + after) of the steps around some of the segments', and which lie in the episode.

        Neighbours outside the episode repeat its first or last step and are marked False: they are no data.

        Args:
            position: (B, ...) numbers of steps that belong to the segments.
            before: steps before each.
            after: steps from each on, itself included.
        """
        axes = (slice(None),) + (None,) * position.ndim
        index = (self.start[axes[:-1]] + self.stride * position)[..., None] + np.arange(-before, after)
        first, last = self.episode_start[axes], self.episode_stop[axes] - 1
        return np.clip(index, first, last), (index >= first) & (index <= last)


class SegmentIndex:
    """Deterministic shuffled segments of a set of episodes.

    An episode no longer than `segment_length` is one segment. A longer one is ceil(length / segment_length) segments
    per epoch: the first from its first step, the others from random starts, drawn anew each epoch, of which enough fall
    on the last possible one that the episode's end is seen as often as its middle.

    Args:
        episode_ends: (E,) cumulative, exclusive ends of all episodes.
        segment_length: most steps in a segment.
        episodes: numbers of the episodes to use; None = all.
        seed: keys shuffling and starts.
        stride: every how many steps one belongs to a segment; in training segments begin anywhere in the first
            `stride` steps they could.
        weights: (E,) how often control steps of each episode are drawn relative to those of others, with replacement;
            None = every segment once per epoch, in shuffled order.
        group_size: size of the batches that are to hold segments of like length, so that little of them is padding; 0 =
            lengths are mixed.
    """

    def __init__(
        self,
        episode_ends: IntArray,
        segment_length: int,
        episodes: IntArray | None = None,
        seed: int = 0,
        stride: int = 1,
        weights: NDArray[np.float64] | None = None,
        group_size: int = 0,
    ) -> None:
        if segment_length < 1:
            raise ConfigError(f"segment_length must be at least 1, got {segment_length}")
        ends = np.asarray(episode_ends, np.int64)
        starts = np.concatenate(([0], ends[:-1]))
        chosen = np.arange(len(ends)) if episodes is None else np.asarray(episodes, np.int64)
        if not len(chosen):
            raise DatasetError("no episodes to take segments from")
        self._starts, self._ends, self._segment_length, self._seed = starts[chosen], ends[chosen], segment_length, seed
        counts = -(-(self._ends - self._starts) // segment_length)
        self._counts = counts
        self._episode = np.repeat(np.arange(len(chosen)), counts)
        self._is_first = np.diff(self._episode, prepend=-1) != 0
        self._first, self._end = self._starts[self._episode], self._ends[self._episode]
        self._slack = np.maximum(self._end - self._first - segment_length, 0)
        self._moves = (self._slack > 0) & ~self._is_first  # starts that are drawn anew each epoch
        self._stride, self._group_size = stride, group_size
        self._epochs: dict[int, IntArray] = {}  # see `_epoch`
        self._cumulative: NDArray[np.float64] | None = None
        if weights is not None:
            steps = (self._ends - self._starts) / counts
            share = (np.asarray(weights, np.float64)[chosen] * steps)[self._episode]
            self._cumulative = np.cumsum(share) / share.sum()

    def __len__(self) -> int:
        return len(self._episode)

    def batch(self, step: int, samples: range, batch_size: int) -> SegmentBatch:
        """The segments of a training step, a function of (seed, step, sample) alone.

        Args:
            step: number of the training step.
            samples: which samples of the global batch, e.g. those of one device.
            batch_size: size of the global batch.
        """
        low, high = step * batch_size + samples.start, step * batch_size + samples.stop
        columns = []
        for epoch in range(low // len(self), (high - 1) // len(self) + 1):
            begin = epoch * len(self)
            columns.append(self._epoch(epoch)[:, max(low - begin, 0) : high - begin])
        start, stop, first, end = columns[0] if len(columns) == 1 else np.concatenate(columns, axis=1)
        return SegmentBatch(start, stop, first, end, self._stride)

    def ordered(self, segments: IntArray | range) -> SegmentBatch:
        """Segments by their numbers in the order of the dataset, for validation; an episode's are evenly spaced."""
        segment = np.asarray(segments)
        episode = self._episode[segment]
        first, end = self._starts[episode], self._ends[episode]
        count = self._counts[episode]
        place = segment - np.searchsorted(self._episode, episode)
        slack = np.maximum(end - first - self._segment_length, 0)
        start = first + slack * place // np.maximum(count - 1, 1)
        return SegmentBatch(start, np.minimum(end, start + self._segment_length), first, end, self._stride)

    def _epoch(self, epoch: int) -> IntArray:
        """(4, N) start and stop of an epoch's segments, and of their episodes, in the order of the samples."""
        if epoch not in self._epochs:
            for old in [known for known in self._epochs if known < epoch - 1]:
                del self._epochs[old]
            rng = keyed_rng(SEGMENT_ORDER, self._seed, epoch)
            if self._cumulative is None:
                segment = rng.permutation(len(self))
            else:
                segment = np.searchsorted(self._cumulative, rng.random(len(self)), side="right")
            draw = keyed_rng(SEGMENT_START, self._seed, epoch).random(len(self))
            first, end, slack = self._first[segment], self._end[segment], self._slack[segment]
            offset = (draw * np.minimum(self._stride, end - first)).astype(np.int64)  # 0 without a stride
            inside = np.minimum(slack, (draw * (slack + self._segment_length // 2 + 1)).astype(np.int64))
            start = first + np.where(self._moves[segment], inside, offset)
            stop = np.minimum(end, start + self._segment_length)
            rows = np.stack([start, stop, first, end])
            if self._group_size:
                rows = rows[:, group_by_length(stop - start, self._group_size, -epoch * len(self), rng)]
            self._epochs[epoch] = rows
        return self._epochs[epoch]


def group_by_length(lengths: IntArray, size: int, offset: int, rng: np.random.Generator) -> IntArray:
    """(N,) an order in which groups of `size` have like lengths, and which is random otherwise.

    Groups are cut from what 16 of them hold, sorted, and then shuffled.

    Args:
        lengths: (N,) in random order.
        size: of a group.
        offset: the first group begins at this place, modulo `size`; what lies before it is left as it is.
        rng: shuffles the groups.
    """
    first = min(offset % size, len(lengths))
    whole = first + (len(lengths) - first) // size * size
    pools = [np.arange(i, min(whole, i + 16 * size)) for i in range(first, whole, 16 * size)]
    groups = [pool[np.argsort(lengths[pool], kind="stable")].reshape(-1, size) for pool in pools]
    order = [rng.permutation(group).ravel() for group in groups]
    return np.concatenate([np.arange(first), *order, np.arange(whole, len(lengths))])


def split_episodes(
    num_episodes: int, held_out: float, seed: int = 0, parts: IntArray | None = None
) -> tuple[IntArray, IntArray]:
    """Splits episodes into training and held-out numbers, each ascending.

    Args:
        num_episodes: E.
        held_out: share to hold out, in [0, 1); of each part at least one episode where it is positive and there are
            more, and never the last one.
        seed: keys the choice.
        parts: (E,) number of the dataset that each episode comes from; None = all from one.
    """
    if not 0 <= held_out < 1:
        raise ConfigError(f"the share of held-out episodes must be in [0, 1), got {held_out}")
    order = keyed_rng(EPISODE_SPLIT, seed).permutation(num_episodes)
    part = np.zeros(num_episodes, np.int64) if parts is None else parts
    kept, out = [], []
    for number in np.unique(part):
        inside = order[part[order] == number]
        count = min(len(inside) - 1, max(1, round(held_out * len(inside)))) if held_out else 0
        kept.append(inside[count:])
        out.append(inside[:count])
    return np.sort(np.concatenate(kept)), np.sort(np.concatenate(out))
