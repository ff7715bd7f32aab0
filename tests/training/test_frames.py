"""Training of models of frames: the next frame of each drawn control step, seen as the history is seen."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from frame_models import ARCHITECTURES, moving_square
from frame_models import frame_experiment as experiment

from scd_robot.errors import ConfigError
from scd_robot.model import FrameModel, build_model
from scd_robot.normalization import Normalizer
from scd_robot.training import ExperimentConfig
from scd_robot.training.augmentation import AugmentationConfig
from scd_robot.training.batches import LATEST_FRAME_TIME, SegmentDataset, TrainingBatch
from scd_robot.training.objective import loss_terms, select_samples
from scd_robot.training.start import fit_normalizer
from scd_robot.transforms import ChunkPart, TransformConfig

DATA = moving_square(6, steps=20)


def parts(settings: ExperimentConfig) -> tuple[FrameModel, Normalizer, TrainingBatch]:
    torch.manual_seed(0)
    dataset = SegmentDataset(DATA, settings, np.arange(DATA.num_episodes))
    return build_model(settings.model), fit_normalizer(DATA, settings), dataset[1]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_samples_hold_the_frames_that_follow_and_the_actions_between(architecture: str) -> None:
    settings = experiment(architecture=architecture, noise_draws=2)
    model, normalizer, batch = parts(settings)
    samples = select_samples(model, normalizer, batch)
    segments = SegmentDataset(DATA, settings, np.arange(6))._index.batch(1, range(4), 4)
    frames, index = DATA.arrays["eye"], 0
    for b in range(4):
        for m in range(8):
            row = segments.start[b] + int(batch.draws.position[b, m])
            for _ in range(2):
                assert bool(samples.counted[index])
                assert row + 1 < segments.stop[b]
                last = model.known(torch.from_numpy(frames[row : row + 1]))
                assert torch.equal(samples.known[index : index + 1], last)
                shown = model.frames(samples.data[index : index + 1], last)
                np.testing.assert_array_equal(shown[0], frames[row + 1])
                action = normalizer.denormalize("action", samples.action[index])
                np.testing.assert_allclose(action, DATA.arrays["action"][row], atol=1e-5)
                index += 1
    assert index == len(samples.data) == len(samples.context)


def test_what_comes_after_a_segment_is_never_chosen() -> None:
    settings = experiment(positions_per_segment=30)
    _, _, batch = parts(settings)
    lengths = batch.segments.step_valid.sum(1)
    assert batch.draws.position_valid.sum(1).tolist() == (lengths - 1).tolist()
    assert batch.draws.flow_time.max() <= LATEST_FRAME_TIME


def test_the_next_frame_is_augmented_as_the_history_is() -> None:
    settings = experiment(augmentation=AugmentationConfig(0.1, 0, 0, 0))
    model, normalizer, batch = parts(settings)
    moved = select_samples(model, normalizer, batch)
    still = select_samples(
        model, normalizer, replace(batch, draws=replace(batch.draws, image_shift=torch.zeros(0, 1, 2)))
    )
    assert not torch.equal(moved.known, still.known)
    shift = [int(x) for x in (batch.draws.image_shift[0, 0] * 16).round()]
    first = torch.roll(model.frames(still.data, still.known)[0], shift, (0, 1))
    inside = (slice(2, -2), slice(2, -2))
    assert torch.equal(model.frames(moved.data, moved.known)[0][inside], first[inside])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_parameter_learns_also_in_bf16(architecture: str) -> None:
    model, normalizer, batch = parts(experiment(architecture=architecture))
    for parameter in model.parameters():  # none of them at zero, where others get no gradient
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    with torch.autocast("cpu", torch.bfloat16):
        total, count = loss_terms(model, normalizer, batch)
    (total / count).backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]


def test_settings_that_have_no_meaning_for_frames_are_refused() -> None:
    with pytest.raises(ConfigError, match="segment_length must be at least 2, got 1"):
        experiment(segment_length=1)
    relative = TransformConfig(chunk="relative", chunk_parts=(ChunkPart(0, "eye", 0, 1),))
    with pytest.raises(ConfigError, match=r"transforms\.chunk must be 'absolute', got 'relative'"):
        replace(experiment(), transforms=relative)
    with pytest.raises(ConfigError, match="never ask at flow time 1, got 'mip'"):
        experiment().with_objective("mip")
