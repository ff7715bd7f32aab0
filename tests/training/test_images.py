"""Training on pictures: read and encoded once, augmented alike in a whole segment; one path from end to end."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from pictures import ARCHITECTURES, MODEL, SHAPES, picture_data
from tiny import interrupted, tiny_experiment

from scd_robot.checkpoint import list_checkpoints, read_checkpoint
from scd_robot.datasets import PRESENT, EpisodeDataset
from scd_robot.datasets.lazy import LazyArray
from scd_robot.errors import ConfigError, DatasetError, ShapeError
from scd_robot.model import build_model
from scd_robot.policies import load_policy
from scd_robot.training import train
from scd_robot.training.augmentation import AugmentationConfig, augmented, color_jitter
from scd_robot.training.batches import SegmentDataset
from scd_robot.training.objective import loss_terms
from scd_robot.training.start import check_fits, fit_normalizer
from scd_robot.training.transformed import with_pictures_in_memory

OPTIONS = {"accelerator": "cpu", "progress": False}


class Counting(LazyArray):
    """An array on disk that counts the rows read from it."""

    def __init__(self, array: np.ndarray) -> None:
        super().__init__(array.shape, array.dtype)
        self.array, self.rows_read = array, 0

    def read(self, start: int, stop: int) -> np.ndarray:
        self.rows_read += stop - start
        return self.array[start:stop]


def batch_of(data: EpisodeDataset, experiment, step: int = 0, **options):
    return SegmentDataset(data, experiment, np.arange(data.num_episodes), **options)[step]


def parts(data: EpisodeDataset, experiment):
    torch.manual_seed(0)
    return build_model(experiment.model), fit_normalizer(data, experiment)


@pytest.mark.parametrize("stride", [1, 2])
def test_pictures_stay_uint8_and_each_is_read_once_per_segment(stride: int) -> None:
    data = picture_data()
    eye = Counting(data.arrays["eye"])
    experiment = tiny_experiment(model={**MODEL, "history_stride": stride})
    dataset = SegmentDataset(
        replace(data, arrays={**data.arrays, "eye": eye}), experiment, np.arange(data.num_episodes)
    )
    for step in range(4):
        eye.rows_read = 0
        segments = dataset._index.batch(step, range(4), 4)
        batch = dataset[step]
        seen = batch.segments.observation["eye"]
        assert seen.dtype == torch.uint8
        steps, real = segments.steps()
        np.testing.assert_array_equal(seen.numpy()[real], data.arrays["eye"][steps][real])
        assert not seen.numpy()[~real].any()
        assert eye.rows_read == int((segments.stop - segments.start).sum())


@pytest.mark.parametrize("architecture", ["separable", "entangled"])
def test_each_picture_of_a_segment_is_encoded_once_and_padding_never(architecture: str) -> None:
    data, experiment = picture_data(), tiny_experiment(model={**MODEL, **ARCHITECTURES[architecture]})
    model, normalizer = parts(data, experiment)
    batch, encoded = batch_of(data, experiment), []
    model.tokenizer.images[0].register_forward_hook(lambda module, inputs, output: encoded.append(len(inputs[0])))
    loss_terms(model, normalizer, batch)
    assert not batch.segments.step_valid.all()
    assert encoded == [int(batch.segments.step_valid.sum())]


def test_padding_and_absent_pictures_change_nothing_that_is_learned() -> None:
    data, experiment = picture_data(), tiny_experiment(model=MODEL)
    there = np.arange(data.num_steps) % 3 == 0
    data = replace(data, arrays={**data.arrays, PRESENT + "eye": there})
    spoiled = np.where(there[:, None, None, None], data.arrays["eye"], np.uint8(255))
    model, normalizer = parts(data, experiment)
    losses = [
        loss_terms(model, normalizer, batch_of(d, experiment))[0]
        for d in (data, replace(data, arrays={**data.arrays, "eye": spoiled}))
    ]
    assert torch.equal(*losses)
    batch = batch_of(data, experiment)
    padding = ~batch.segments.step_valid[..., None, None, None]
    seen = {**batch.segments.observation, "eye": torch.where(padding, 77, batch.segments.observation["eye"])}
    padded = replace(batch, segments=replace(batch.segments, observation=seen))
    assert torch.equal(loss_terms(model, normalizer, padded)[0], losses[0])


@pytest.mark.parametrize("changes", [{}, {"history_length": 1}, {"observation_shapes": {"eye": (16, 24, 3)}}])
def test_every_parameter_learns_also_in_bf16_without_memory_and_without_vectors(changes: dict) -> None:
    data, experiment = picture_data(), tiny_experiment(model={**MODEL, **changes})
    model, normalizer = parts(data, experiment)
    for parameter in model.parameters():  # none of them at zero, where others get no gradient
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    with torch.autocast("cpu", torch.bfloat16):
        total, count = loss_terms(model, normalizer, batch_of(data, experiment))
    (total / count).backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]


class TestAugmentation:
    def test_it_is_drawn_by_seed_step_and_sample_for_each_segment_and_camera(self) -> None:
        data, experiment = picture_data(), tiny_experiment(model=MODEL)
        draws = batch_of(data, experiment, 5).draws
        assert draws.image_shift.shape == (4, 2, 2)
        assert draws.image_colour.shape == (4, 2, 3)
        assert len(draws.image_shift.flatten().unique()) == 16
        halves = [batch_of(data, experiment, 5, rank=rank, world_size=2).draws for rank in (0, 1)]
        assert torch.equal(torch.cat([half.image_colour for half in halves]), draws.image_colour)
        other = batch_of(data, tiny_experiment(model=MODEL, seed=1), 5).draws
        assert not torch.equal(other.image_shift, draws.image_shift)

    def test_it_changes_no_other_draw_and_is_for_training_alone(self) -> None:
        data, experiment = picture_data(), tiny_experiment(model=MODEL)
        off = tiny_experiment(model=MODEL, augmentation=AugmentationConfig(0, 0, 0, 0))
        first, second = batch_of(data, experiment).draws, batch_of(data, off).draws
        for name in ("noise", "flow_time", "position", "stream"):
            assert torch.equal(getattr(first, name), getattr(second, name))
        for draws in (second, batch_of(data, experiment, validation=True).draws):
            assert draws.image_shift.numel() == draws.image_colour.numel() == 0
            batch = batch_of(data, off).segments.observation
            same = augmented(batch, draws.image_shift, draws.image_colour)
            assert all(same[key] is value for key, value in batch.items())

    def test_a_segment_is_moved_as_one_by_whole_pixels(self) -> None:
        images = torch.randint(0, 256, (2, 3, 8, 10, 3), dtype=torch.uint8)
        before = images.clone()
        shift = torch.tensor([[[0.25, -0.1]], [[0.0, 0.2]]])  # 2 rows down and 1 column left; 2 columns right
        colour = torch.ones(2, 1, 3)
        moved = augmented({"eye": images, "a": torch.zeros(2, 3, 2)}, shift, colour)["eye"]
        assert moved.dtype == torch.uint8
        assert torch.equal(moved[0, :, 2:, :-1], images[0, :, :-2, 1:])
        assert torch.equal(moved[0, :, :2, :-1], images[0, :, :1, 1:].expand(-1, 2, -1, -1))
        assert torch.equal(moved[1, :, :, 2:], images[1, :, :, :-2])
        assert torch.equal(images, before)

    @pytest.mark.parametrize("channels", [1, 3, 4])
    def test_colours_change_by_one_factor_in_a_segment_and_a_fourth_channel_does_not(self, channels: int) -> None:
        images = torch.full((2, 3, 8, 10, channels), 100, dtype=torch.uint8)
        colour = torch.tensor([[[0.5, 1.0, 1.0]], [[1.2, 1.0, 1.0]]])
        changed = augmented({"eye": images}, torch.zeros(2, 1, 2), colour)["eye"]
        for segment, value in ((0, 50), (1, 120)):
            assert (changed[segment, ..., :3] == value).all()
        assert (changed[..., 3:] == 100).all()

    @pytest.mark.parametrize("settings", [{"shift": 0.5}, {"shift": -0.1}, {"contrast": 1.5}, {"brightness": -1}])
    def test_settings_out_of_range_are_refused(self, settings) -> None:
        with pytest.raises(ConfigError, match=f"augmentation.{next(iter(settings))} must be in"):
            AugmentationConfig(**settings)


def test_pictures_that_fit_are_kept_in_memory_and_others_are_not() -> None:
    data = picture_data()
    data = replace(data, arrays={**data.arrays, "eye": Counting(data.arrays["eye"])})
    size = data.arrays["eye"].nbytes / 1e9
    kept = with_pictures_in_memory(data, ["eye", "wrist"], 1.01 * size)
    assert isinstance(kept.arrays["eye"], np.ndarray)
    assert with_pictures_in_memory(data, ["eye"], 0.99 * size).arrays["eye"] is data.arrays["eye"]


@pytest.mark.parametrize(
    ("eye", "error", "told"),
    [
        (lambda x: (x > 99).astype(np.uint8), DatasetError, "'eye' hold nothing but 0 and 1 in 16 frames"),
        (lambda x: 0 * x, DatasetError, "hold nothing but 0 in 16 frames"),
        (lambda x: x.astype(np.float32), DatasetError, "'eye' must be uint8 of 0 to 255, the dataset has float32"),
        (lambda x: x[:, :8], ShapeError, r"takes 'eye' of shape \(16, 24, 3\), the dataset has \(8, 24, 3\)"),
    ],
)
def test_datasets_whose_pictures_are_none_are_refused(eye, error, told) -> None:
    spoiled = eye(picture_data().arrays["eye"])
    with pytest.raises(error, match=told):
        check_fits(picture_data(eye=spoiled), tiny_experiment(model=MODEL))


def test_pictures_of_one_colour_are_told_of(caplog: pytest.LogCaptureFixture) -> None:
    eye = picture_data().arrays["eye"].copy()
    eye[0] = 0
    check_fits(picture_data(eye=eye), tiny_experiment(model=MODEL))
    assert "some pictures 'eye' are of one colour everywhere: 'scd data validate'" in caplog.text


@pytest.mark.parametrize("architecture", ["separable", "entangled"])
def test_a_picture_policy_trains_resumes_to_the_same_weights_and_acts(tmp_path, architecture: str) -> None:
    experiment = tiny_experiment(4, model={**MODEL, **ARCHITECTURES[architecture]}, validate_every=2)
    data = picture_data()
    train(data, experiment, tmp_path / "whole", **OPTIONS)
    with interrupted():
        train(data, experiment, tmp_path / "parts", **OPTIONS)
    train(data, experiment, tmp_path / "parts", resume=True, **OPTIONS)
    policies = [load_policy(tmp_path / name) for name in ("whole", "parts")]
    weights = [policy.model.state_dict() for policy in policies]
    assert all(torch.equal(weights[0][name], value) for name, value in weights[1].items())
    action = policies[0].act({key: data.arrays[key][:3] for key in SHAPES})
    assert action.shape == (3, 2)


@pytest.mark.slow
def test_recording_training_and_evaluating_with_pictures_of_a_memory_task(tmp_path) -> None:
    from scd_robot.datasets import open_dataset
    from scd_robot.presets import resolve, with_settings
    from scd_robot.recording import record_demonstrations
    from scd_robot.sim_eval import evaluate

    name = "scd_memory/cue-reach:delay=2,observation=image"
    record_demonstrations(name, 6, tmp_path / "cue.zarr", workers=1, progress=False)
    data = open_dataset(tmp_path / "cue.zarr")
    settings = ["training.max_steps=30", "training.validate_every=10", "training.warmup_steps=1", "model.width=32"]
    settings += ["model.images.channels=8,16,16", "model.history_stride=2", "training.batch_size=2"]
    experiment = with_settings(resolve("image", data.spec), settings)
    train(data, experiment, tmp_path / "run", **OPTIONS)
    losses = [read_checkpoint(folder).metrics["val/loss"] for folder in list_checkpoints(tmp_path / "run")]
    assert losses[-1] < losses[0]
    result = evaluate(load_policy(tmp_path / "run"), name, 2, num_envs=1, num_videos=0, progress=False)
    assert len(result.valid) == 2


def test_jitter_on_explicit_numbers():
    image = torch.tensor([0.2, 0.4, 0.6]).reshape(1, 3, 1, 1).expand(1, 3, 2, 2)
    same = color_jitter(image, torch.ones(1, 3))
    torch.testing.assert_close(same, image)
    torch.testing.assert_close(color_jitter(image, torch.tensor([[2.0, 1, 1]])), (2 * image).clamp(0, 1))
    grey = 0.299 * 0.2 + 0.587 * 0.4 + 0.114 * 0.6
    torch.testing.assert_close(color_jitter(image, torch.tensor([[1.0, 1, 0]])), torch.full_like(image, grey))
    torch.testing.assert_close(color_jitter(image, torch.tensor([[1.0, 0, 1]])), torch.full_like(image, grey))
