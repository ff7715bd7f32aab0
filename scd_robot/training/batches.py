"""Training batches: episode segments with all random draws, each a function of (seed, step, sample) alone.

Because nothing depends on what was drawn before, a run that was killed continues with the same batches, and several
devices together see what one device would have seen.

Shapes: B segments, T encoder steps (longest segment), k past actions, Ta chunk length, L = k + Ta, M positions, S noise
draws, Da action width, K context tokens, D width, V cameras. For models of frames L is the number of patches, Da that
of numbers in one, and K counts the action.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from scd_robot.datasets import ACTION, EpisodeDataset
from scd_robot.datasets.combine import shares_among
from scd_robot.datasets.windows import SegmentBatch, SegmentIndex
from scd_robot.diffusion import sample_flow_time, sample_mip_time, sample_step_end
from scd_robot.errors import ConfigError
from scd_robot.seeding import FRAME_DRAW, ROLL_OUT_DRAW, TRAINING_DRAW, VALIDATION_DRAW, keyed_rng
from scd_robot.training.config import ExperimentConfig
from scd_robot.training.segments import SegmentReader, Segments
from scd_robot.training.self_forcing import RollOuts

__all__ = ["Draws", "EpochSampler", "SegmentDataset", "TrainingBatch"]

LATEST_FRAME_TIME = 0.95  # flow time up to which frames are noised: errors of the velocity grow as 1 / (1 - flow time)


@dataclass
class Draws:
    """Random quantities of a batch.

    Attributes:
        stream: (B, T) int64, 0 before the virtual reset and 1 from it on; 1 more after a roll-out; -1 in steps that a
            sparse history leaves out. A step sees those of its own value.
        position: (B, M) int64 encoder steps whose chunks are denoised.
        position_valid: (B, M) bool, False where a segment has fewer eligible steps than M.
        flow_time: (B, M, S).
        noise: (B, M, S, L, Da).
        corruption: (B, M, S, K, D), or empty where the model has none.
        past_action_noise: (B, T, Da), or empty where the model has none.
        delay: (B, M, S) int64 committed actions.
        end_time: (B, M, S) where steps from flow_time end, or empty where the model does not ask for it.
        image_shift: (B, V, 2) how pictures are moved, see `augmentation.augmented`; (0, V, 2) = not at all.
        image_colour: (B, V, 3).
        frames: for a frame decoder beside actions, draws of its own at the first of the positions; else None.
        rolls: pictures that the model imagines itself; None = none of them.
    """

    stream: Tensor
    position: Tensor
    position_valid: Tensor
    flow_time: Tensor
    noise: Tensor
    corruption: Tensor
    past_action_noise: Tensor
    delay: Tensor
    end_time: Tensor
    image_shift: Tensor
    image_colour: Tensor
    frames: "Draws | None" = None
    rolls: RollOuts | None = None


@dataclass
class TrainingBatch:
    """What one training step learns from.

    Attributes:
        segments: recorded data.
        draws: the random quantities.
    """

    segments: Segments
    draws: Draws


class SegmentDataset(Dataset[TrainingBatch]):
    """Item i is the whole batch of training step i (of one device), so that loading is one gather per key.

    Args:
        data: the episodes, after the experiment's transforms.
        experiment: architecture and training settings.
        episodes: which episodes to use.
        rank: number of this device.
        world_size: number of devices; must divide the batch size.
        validation: items are the held-out segments in order, with draws that never change.
    """

    def __init__(
        self,
        data: EpisodeDataset,
        experiment: ExperimentConfig,
        episodes: NDArray[np.int64],
        *,
        rank: int = 0,
        world_size: int = 1,
        validation: bool = False,
    ) -> None:
        training, model = experiment.training, experiment.model
        if training.batch_size % world_size:
            raise ConfigError(f"batch_size {training.batch_size} is not a multiple of the {world_size} devices")
        self._experiment, self._validation = experiment, validation
        self._rolls_out = training.self_forcing.probability > 0 and not validation
        self._index = SegmentIndex(
            data.episode_ends,
            training.segment_length,
            episodes,
            training.seed,
            model.history_stride,
            None if validation else shares_among(data, episodes),
            training.batch_size if training.group_by_length else 0,
        )
        # What validation looks at, from everywhere in the dataset.
        shown = min(len(self._index), training.validation_segments)
        self._shown = np.linspace(0, len(self._index) - 1, shown).astype(np.int64)
        self._idle = None
        if training.idle_weight < 1 and not validation:
            self._idle = idle_rows(np.asarray(data.arrays[ACTION]), data.episode_ends, model.chunk_length)
        share = training.batch_size // world_size
        self._samples = range(rank * share, (rank + 1) * share)
        self._reader = SegmentReader(
            data,
            list(model.observation_shapes),
            model.num_past_actions,
            model.chunk_length,
            model.past_action_input != "none" or self._rolls_out,
            experiment.transforms,
            training.disturbance_threshold,
        )

    def __len__(self) -> int:
        if not self._validation:
            return self._experiment.training.max_steps
        return -(-len(self._shown) // self._experiment.training.batch_size)

    def __getitem__(self, step: int) -> TrainingBatch:
        size, training_seed = self._experiment.training.batch_size, self._experiment.training.seed
        if self._validation:
            samples = range(step * size, min(len(self._shown), (step + 1) * size))
            segments = self._index.ordered(self._shown[samples.start : samples.stop])
            keys = [(VALIDATION_DRAW, training_seed, 0, sample) for sample in samples]
        else:
            segments = self._index.batch(step, self._samples, size)
            keys = [(TRAINING_DRAW, training_seed, step, sample) for sample in self._samples]
        draws = self._draw(segments, keys)
        if self._experiment.model.frames.beside_actions:
            draws.frames = self._draw_frames(draws, keys)
        if self._rolls_out:
            draws.rolls = self._draw_rolls(draws.stream.numpy(), segments, keys)
        return TrainingBatch(self._reader.read(segments, draws.position.numpy()), draws)

    def _draw(self, segments: SegmentBatch, keys: list[tuple[int, int, int, int]]) -> Draws:
        model, training = self._experiment.model, self._experiment.training
        batch, steps = len(keys), int(segments.lengths.max())
        positions, copies = training.positions_per_segment, training.noise_draws
        stream = np.zeros((batch, steps), np.int64)
        position = np.zeros((batch, positions), np.int64)
        position_valid = np.zeros((batch, positions), bool)
        flow_time = np.empty((batch, positions, copies), np.float32)
        noise = np.empty((batch, positions, copies, *model.token_shape), np.float32)
        corrupts = (batch if model.context_corruption else 0, positions, copies, model.num_decoder_context, model.width)
        corruption = np.empty(corrupts, np.float32)
        noises_past = model.past_action_input == "noised"
        past_noise = np.zeros((batch if noises_past else 0, steps, model.action_dim), np.float32)
        delay = np.zeros((batch, positions, copies), np.int64)
        end_time = np.empty((batch if model.step_end_input else 0, positions, copies), np.float32)
        cameras, augmentation = len(model.image_keys), training.augmentation
        augments = cameras > 0 and augmentation.is_on and not self._validation
        shift, colour = (np.zeros((batch * augments, cameras, n), np.float32) for n in (2, 3))
        begins_inside = segments.start > segments.episode_start
        for i, key in enumerate(keys):
            rng, steps_here = keyed_rng(*key), int(segments.lengths[i])
            # One past those that may be chosen: of a model of frames the next one has to be there.
            last = steps_here - model.decodes_frames
            cut, at = rng.random(), rng.integers(1, max(2, steps_here))
            if cut < training.virtual_reset_probability and not self._validation:
                stream[i, at:] = 1
            first = max(0, min(training.burn_in // model.history_stride, last - 1)) if begins_inside[i] else 0
            eligible = np.arange(first, last)
            if training.sparse_history_probability and not self._validation:
                eligible = self._sparse(stream[i], eligible, rng)
            if self._idle is None:
                eligible = rng.permutation(eligible)[:positions]
            else:
                idle = self._idle[segments.start[i] + model.history_stride * eligible]
                chances = rng.random(len(eligible)) ** np.where(idle, 1 / training.idle_weight, 1.0)
                eligible = eligible[np.argsort(-chances)[:positions]]
            position[i, : len(eligible)], position_valid[i, : len(eligible)] = eligible, True
            if training.objective == "mip":
                flow_time[i] = sample_mip_time((positions, copies), rng)
            else:
                flow_time[i] = sample_flow_time(training.flow_time, (positions, copies), rng)
            if model.decodes_frames:
                np.minimum(flow_time[i], LATEST_FRAME_TIME, out=flow_time[i])
            rng.standard_normal(dtype=np.float32, out=noise[i])
            if model.max_delay_steps:
                # Of half of the plans nothing is committed: drawn evenly, action 0 would be learned in one of
                # max_delay_steps + 1 plans only, and the first actions are those that are executed.
                committed = rng.integers(1, model.max_delay_steps + 1, (positions, copies))
                delay[i] = np.where(rng.random((positions, copies)) < 0.5, 0, committed)
            if model.context_corruption:
                rng.standard_normal(dtype=np.float32, out=corruption[i])
            if noises_past:
                past_noise[i, :steps_here] = rng.standard_normal((steps_here, model.action_dim), np.float32)
            if model.step_end_input:
                end_time[i] = sample_step_end(flow_time[i], rng)
            if augments:
                shift[i], colour[i] = augmentation.draw(cameras, rng)
        drawn = (stream, position, position_valid, flow_time, noise, corruption, past_noise, delay)
        fields: list[Any] = [torch.from_numpy(x) for x in (*drawn, end_time, shift, colour)]
        return Draws(*fields)

    def _sparse(
        self, stream: NDArray[np.int64], eligible: NDArray[np.int64], rng: np.random.Generator
    ) -> NDArray[np.int64]:
        """Leaves steps out of a segment's `stream` (T,), if it is one of those; which of the `eligible` are left."""
        every = self._experiment.policy.num_executed // self._experiment.model.history_stride
        drawn, phase = rng.random(), rng.integers(min(every, len(eligible)))
        if drawn >= self._experiment.training.sparse_history_probability:
            return eligible
        stream[(np.arange(len(stream)) - eligible[phase]) % every != 0] = -1
        return eligible[phase::every]

    def _draw_frames(self, draws: Draws, keys: list[tuple[int, int, int, int]]) -> Draws:
        """What a frame decoder beside actions is trained with; the other draws are as without it."""
        training, model = self._experiment.training, self._experiment.model.frames_alone
        positions = min(training.frames.positions_per_segment, training.positions_per_segment)
        shape = (len(keys), positions, training.noise_draws)
        flow_time, noise = np.empty(shape, np.float32), np.empty((*shape, *model.token_shape), np.float32)
        corrupts = (len(keys) if model.context_corruption else 0, *shape[1:], model.num_decoder_context, model.width)
        corruption = np.empty(corrupts, np.float32)
        for i, key in enumerate(keys):
            rng = keyed_rng(FRAME_DRAW, *key)
            times = sample_flow_time(training.frames.flow_time, shape[1:], rng)
            flow_time[i] = np.minimum(times, LATEST_FRAME_TIME)
            rng.standard_normal(dtype=np.float32, out=noise[i])
            if model.context_corruption:
                rng.standard_normal(dtype=np.float32, out=corruption[i])
        return replace(
            draws,
            position=draws.position[:, :positions],
            position_valid=draws.position_valid[:, :positions],
            flow_time=torch.from_numpy(flow_time),
            noise=torch.from_numpy(noise),
            corruption=torch.from_numpy(corruption),
        )

    def _draw_rolls(
        self, stream: NDArray[np.int64], segments: SegmentBatch, keys: list[tuple[int, int, int, int]]
    ) -> RollOuts | None:
        """What the model imagines; the other draws are as without it, but for `stream`.

        After a roll-out the history begins anew: nowhere in use do recorded pictures follow imagined ones.
        """
        config, shape = self._experiment.training.self_forcing, self._experiment.model.token_shape
        places, noise = [], []
        for i, key in enumerate(keys):
            rng, steps_here = keyed_rng(ROLL_OUT_DRAW, *key), int(segments.lengths[i])
            place = config.draw(stream[i, :steps_here], rng)
            if place is not None:
                stream[i, place[2] :] += 1
                places.append((i, *place))
                noise.append(rng.standard_normal((config.frames, *shape), np.float32))
        if not places:
            return None
        segment, begin, first, stop = torch.tensor(places).unbind(1)
        return RollOuts(segment, begin, first, stop, torch.from_numpy(np.stack(noise)), config.num_denoising_steps)


def idle_rows(action: NDArray[np.float32], episode_ends: NDArray[np.int64], length: int) -> NDArray[np.bool_]:
    """(N,) where the next `length` actions, or all that are left of the episode, are the same.

    Args:
        action: (N, Da).
        episode_ends: (E,).
        length: control steps.
    """
    rows = np.arange(len(action))
    changes = np.append((action[1:] != action[:-1]).any(axis=1), True)
    changes[episode_ends - 1] = True  # the chunk ends there at the latest
    next_change = np.minimum.accumulate(np.where(changes, rows, len(action))[::-1])[::-1]
    last = np.minimum(rows + length, episode_ends[np.searchsorted(episode_ends, rows, side="right")]) - 1
    idle: NDArray[np.bool_] = next_change >= last
    return idle


class EpochSampler(Sampler[int]):
    """Yields the training steps of one Lightning epoch: `steps` of them, the last epoch perhaps fewer.

    Lightning calls `set_epoch` before each epoch, except that when it resumes it has asked for an iterator by then:
    therefore the epoch to begin with is given.
    """

    def __init__(self, steps: int, max_steps: int, epoch: int = 0) -> None:
        self.steps, self.max_steps, self.epoch = steps, max_steps, epoch

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch that the next iteration is for."""
        self.epoch = epoch

    def _range(self) -> range:
        return range(self.epoch * self.steps, min(self.max_steps, (self.epoch + 1) * self.steps))

    def __iter__(self) -> Iterator[int]:
        return iter(self._range())

    def __len__(self) -> int:
        return len(self._range())
